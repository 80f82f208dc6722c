"""Latency and memory of models that are compared with each other, measured in one interleaved run."""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

_WARM_UPS = 2
_MIN_ROUNDS = 3

Clock = Callable[[Callable[[], object]], float]  # makes a call and says how many seconds it took


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass over a batch.

    Attributes:
        median_s, q20_s, q80_s: median, 20 % and 80 % quantile over the rounds, in seconds.
        images_per_s: batch size over the median.
        speedup: median, over the rounds, of the reference's time over this: load that comes and goes hits both.
        speedup_q20, speedup_q80: quantiles of the same.
        rounds_s: every measured time, in seconds.
    """

    median_s: float
    q20_s: float
    q80_s: float
    images_per_s: float
    speedup: float
    speedup_q20: float
    speedup_q80: float
    rounds_s: tuple[float, ...]


def time_in_turns(
    calls: Mapping[str, Callable[[], object]],
    *,
    cuda: bool = False,
    budget_s: float,
    on_time: Callable[[float], None] | None = None,
    clock: Clock | None = None,
) -> dict[str, list[float]]:
    """Time calls round by round in turn, so that drift of the machine meets all of them alike.

    Args:
        calls: what to time, by name; each is warmed up first.
        cuda: whether the calls run on the current CUDA device: then they are timed by its events, each with an L2 cache
            that holds nothing of its inputs.
        budget_s: seconds to spend on rounds, after warm-up; at least three rounds are made.
        on_time: called after each round with the seconds spent so far.
        clock: what times a call; by default the one of :func:`clock_of`.

    Returns:
        The times of every call, in seconds, one a round.
    """
    names = list(calls)
    clock = clock or clock_of(cuda)
    times: dict[str, list[float]] = {name: [] for name in names}
    for call in calls.values():
        for _ in range(_WARM_UPS):
            call()
    start = time.perf_counter()
    rounds = 0
    while rounds < _MIN_ROUNDS or time.perf_counter() - start < budget_s:
        first = rounds % len(names)  # another one starts each round, so that none always follows the same one
        for name in names[first:] + names[:first]:
            times[name].append(clock(calls[name]))
        rounds += 1
        if on_time is not None:
            on_time(time.perf_counter() - start)
    return times


def keep_freed_memory(device: torch.device | str) -> None:
    """Before timing on a CPU: from now on, and until it ends, this process keeps what is freed for its next call.

    glibc hands freed memory back to the system, to be faulted in again page by page. How much depends on the order in
    which the whole process allocates, and a dense model, whose tensors are larger, loses more by it than a pruned one:
    a speed-up may be a fifth too large. Does nothing for other devices and with other C libraries.
    """
    libc = ctypes.CDLL(None)
    if torch.device(device).type == "cpu" and hasattr(libc, "mallopt"):
        trim_threshold, mmap_max = -1, -4  # malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def clock_of(cuda: bool) -> Clock:
    """The clock of the current CUDA device, or of the host."""
    return _CudaClock() if cuda else _time_on_cpu


def measure_latency(
    models: Mapping[str, nn.Module],
    images: Tensor,
    *,
    budget_s: float,
    on_time: Callable[[float], None] | None = None,
) -> dict[str, Latency]:
    """Time the models on one batch, interleaved (see `time_in_turns`).

    Args:
        models: models by name, on the images' device; the first is the reference of the speed-up.
        images: the batch [B, 3, H, W].
        budget_s, on_time: see `time_in_turns`.

    Returns:
        One `Latency` per model, in the order of `models`.
    """
    calls = {name: partial(model, images) for name, model in models.items()}
    device = torch.cuda.device(images.device) if images.is_cuda else nullcontext()
    with torch.inference_mode(), device:
        times = time_in_turns(calls, cuda=images.is_cuda, budget_s=budget_s, on_time=on_time)
    reference = next(iter(times.values()))
    return {name: _summary(rounds, reference, len(images)) for name, rounds in times.items()}


def peak_memory(model: nn.Module, images: Tensor) -> int:
    """Largest number of bytes that one forward pass holds at a time beyond the weights and the input.

    On CUDA from the caching allocator's statistics; on the CPU the running sum of torch's own allocations, as
    recorded by `torch.profiler` (memory that libraries take for themselves is not in it).
    """
    with torch.inference_mode():
        model(images)
        return _cuda_peak(model, images) if images.is_cuda else _cpu_peak(model, images)


def quantile(values: Sequence[float], q: float) -> float:
    """The ``q`` quantile, 0..1, of measured values."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def _time_on_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class _CudaClock:
    """Times a call by events of the current CUDA device.

    What the L2 cache holds is pushed out before each call: an operator would else find its inputs there, which in a
    model have long gone. The flush is waited for, so that no launch hides behind it.
    """

    def __init__(self) -> None:
        device = torch.cuda.current_device()
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * cache, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


def _summary(times: list[float], reference: list[float], batch: int) -> Latency:
    median = statistics.median(times)
    ratios = [dense / pruned for dense, pruned in zip(reference, times, strict=True)]
    return Latency(
        median_s=median,
        q20_s=quantile(times, 0.2),
        q80_s=quantile(times, 0.8),
        images_per_s=batch / median,
        speedup=statistics.median(ratios),
        speedup_q20=quantile(ratios, 0.2),
        speedup_q80=quantile(ratios, 0.8),
        rounds_s=tuple(times),
    )


def _cuda_peak(model: nn.Module, images: Tensor) -> int:
    device = images.device
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    model(images)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(model: nn.Module, images: Tensor) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler logs to stderr that it found no GPU
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        model(images)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text("utf-8"))["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
