"""The one test matrix of all operators.

An operator's test file subclasses :class:`OpMatrix`, names its operator and yields its samples; the class brings every
check an operator owes: values against float64, every backend and dtype, contiguity, empty batches, determinism,
opcheck, gradients, compilation. What is special to one operator stands in its own file.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from ops import simt
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TOKENS = (1, 2, 17, 64, 197, 198, 257, 577, 1370)
BATCHES = (0, 1, 3)
PREFIXES = (0, 1, 2, 5)


@dataclass(frozen=True)
class Backend:
    """Where an operator runs: its plain-torch reference, its CPU kernel, its CUDA kernels on a GPU or on the host."""

    name: str
    architecture: str = ""

    @property
    def is_simt(self) -> bool:
        return self.name == "simt"

    @property
    def device(self) -> str:
        return "cuda" if self.name == "cuda" else "cpu"

    def run(self, op: str, *args: Any) -> tuple[Tensor, ...]:
        if self.name == "reference":
            result = reference(op)(*args)
        elif self.is_simt:
            result = simt.run(op, self.architecture, *args)
        else:
            key = self.name.upper()
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tokenprune::{op}", key), f"no {key} kernel of {op}"
            result = getattr(torch.ops.tokenprune, op)(*args)
        return result if isinstance(result, tuple) else (result,)


def on_host(architecture: str, *more: Any) -> Any:
    """The CUDA kernels on the host, as a test parameter; with the others of the test, if there are some."""
    reason = "no CUDA toolkit: CUDA kernels not run on the host"
    marks = [pytest.mark.simt, pytest.mark.skipif(not simt.available, reason=reason)]
    name = "-".join(map(str, ("simt", architecture, *more)))
    return pytest.param(Backend("simt", architecture), *more, marks=marks, id=name)


BACKENDS = [
    pytest.param(Backend("reference"), id="reference"),
    pytest.param(Backend("cpu"), id="cpu"),
    pytest.param(
        Backend("cuda"),
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: CUDA kernels not run on one"),
        id="cuda",
    ),
    on_host("sm_80"),
]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def reference(op: str) -> Callable[..., Any]:
    return importlib.import_module(f"tokenprune_ext.ops.{op}").reference


@dataclass(frozen=True)
class Sample:
    """One call: tensors on the CPU, float64 (cast to the dtype under test) or integers, and the other arguments."""

    tensors: tuple[Tensor | None, ...]
    options: tuple[Any, ...]
    name: str = field(default="")
    simt: bool = True  # False: would take too long on the host, and covers nothing there that the others do not


def is_floating(arg: object) -> bool:
    """Tensors of positions keep their dtype and have no gradient."""
    return isinstance(arg, Tensor) and arg.is_floating_point()


def cast(tensor: Tensor | None, backend: Backend, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(device=backend.device, dtype=dtype)


def strided(tensor: Tensor | None) -> Tensor | None:
    """The same values behind strides that are not contiguous (also for a single element a dimension)."""
    if tensor is None:
        return None
    wide = tensor.repeat_interleave(2, dim=-1)
    return wide.transpose(0, -1).contiguous().transpose(0, -1)[..., ::2]


def error(result: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; NaN and infinities have to stand in the same places."""
    result, truth = result.double().cpu(), truth.double()
    assert result.shape == truth.shape
    finite = truth.isfinite()
    torch.testing.assert_close(result[~finite], truth[~finite], rtol=0, atol=0, equal_nan=True)
    assert result[finite].isfinite().all()
    return (result[finite] - truth[finite]).abs().max().item() if finite.any() else 0.0


class OpMatrix(ABC):
    """The checks every operator owes. Subclasses set ``op`` and define the methods below."""

    op: str

    @abstractmethod
    def samples(self) -> Iterator[Sample]:
        """All shapes and options whose values are compared."""

    @abstractmethod
    def small_sample(self) -> Sample:
        """One cheap call with a batch of 3 and every feature switched on."""

    def tensor_dtypes(self, dtype: torch.dtype, sample: Sample) -> list[torch.dtype]:
        """The dtype of each tensor argument when the matrix asks for ``dtype``: integers stay what they are."""
        return [dtype if t is None or t.is_floating_point() else t.dtype for t in sample.tensors]

    def arguments(self, sample: Sample, backend: Backend, dtype: torch.dtype) -> tuple[Any, ...]:
        dtypes = self.tensor_dtypes(dtype, sample)
        tensors = [cast(tensor, backend, kind) for tensor, kind in zip(sample.tensors, dtypes, strict=True)]
        return (*tensors, *sample.options)

    def rounding(self, backend: Backend, dtype: torch.dtype, result_dtype: torch.dtype) -> float:
        """Allowed error beside that of plain torch, relative to the largest value: some last places of the result.

        In float64 the truth itself has rounding, and plain torch shows no error.
        """
        return (32 if result_dtype == torch.float64 else 8) * torch.finfo(result_dtype).eps

    # ---- Values ----------------------------------------------------------------------------------------------------
    @each_backend
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_values(self, backend: Backend, dtype: torch.dtype) -> None:
        self.compare_values(backend, dtype)

    @pytest.mark.parametrize("backend", [on_host("sm_87"), on_host("sm_90")])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_values_on_other_architectures(self, backend: Backend, dtype: torch.dtype) -> None:
        self.compare_values(backend, dtype)

    def compare_values(self, backend: Backend, dtype: torch.dtype) -> None:
        """Error against float64 at most twice that of plain torch in the same dtype, plus its rounding noise."""
        count = 0
        for sample in self.samples():
            if backend.is_simt and not sample.simt:
                continue
            args = self.arguments(sample, backend, dtype)
            host = tuple(arg.cpu() if isinstance(arg, Tensor) else arg for arg in args)
            wide = tuple(arg.double() if is_floating(arg) else arg for arg in host)
            truths = Backend("reference").run(self.op, *wide)
            plain = Backend("reference").run(self.op, *host)
            results = tuple(result.cpu() for result in backend.run(self.op, *args))
            self.compare_integers(results, truths, wide, sample.name)
            for result, truth, same in zip(results, truths, plain, strict=True):
                assert result.dtype == same.dtype
                if not truth.is_floating_point():
                    continue
                finite = truth[truth.isfinite()]
                scale = finite.abs().max().item() if finite.numel() else 0.0
                noise = self.rounding(backend, dtype, result.dtype) * scale
                allowed = 2 * error(same, truth) + noise
                assert error(result, truth) <= allowed, f"{sample.name}: {error(result, truth)} > {allowed}"
            count += 1
        assert count > 20

    def compare_integers(
        self, results: tuple[Tensor, ...], truths: tuple[Tensor, ...], args: tuple[Any, ...], name: str
    ) -> None:
        """Integers are exact. An operator whose choices hang on rounding overrides this with what it may choose.

        ``args`` are the call's, in float64 on the CPU.
        """
        for result, truth in zip(results, truths, strict=True):
            assert truth.is_floating_point() or torch.equal(result, truth), name

    @each_backend
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_non_contiguous(self, backend: Backend, dtype: torch.dtype) -> None:
        args = self.arguments(self.small_sample(), backend, dtype)
        views = tuple(strided(arg) if isinstance(arg, Tensor) else arg for arg in args)
        assert not any(view.is_contiguous() for view in views if isinstance(view, Tensor))
        for result, expected in zip(backend.run(self.op, *views), backend.run(self.op, *args), strict=True):
            assert torch.equal(result, expected)
            assert result.is_contiguous()

    @each_backend
    def test_empty_batch(self, backend: Backend) -> None:
        args = self.arguments(self.small_sample(), backend, torch.float32)
        empty = tuple(arg[:0] if isinstance(arg, Tensor) and arg.dim() > 1 else arg for arg in args)
        for result, full in zip(backend.run(self.op, *empty), backend.run(self.op, *args), strict=True):
            assert result.shape == (0, *full.shape[1:])
            assert result.dtype == full.dtype

    @each_backend
    def test_same_bits_again_and_alone(self, backend: Backend) -> None:
        """Two runs agree to the bit, and an image's result does not depend on the rest of its batch."""
        args = self.arguments(self.small_sample(), backend, torch.float32)
        results = backend.run(self.op, *args)
        for again, result in zip(backend.run(self.op, *args), results, strict=True):
            assert torch.equal(again, result)
        if backend.name == "reference":
            return  # torch's own batched products do not promise this
        alone = tuple(arg[1:2] if isinstance(arg, Tensor) and arg.dim() > 1 else arg for arg in args)
        for single, result in zip(backend.run(self.op, *alone), results, strict=True):
            assert torch.equal(single, result[1:2])

    def test_same_bits_on_any_number_of_threads(self) -> None:
        args = self.arguments(self.small_sample(), Backend("cpu"), torch.float32)
        results = Backend("cpu").run(self.op, *args)
        torch.set_num_threads(3)
        for threaded, result in zip(Backend("cpu").run(self.op, *args), results, strict=True):
            assert torch.equal(threaded, result)

    @each_backend
    def test_inputs_are_not_written(self, backend: Backend) -> None:
        args = self.arguments(self.small_sample(), backend, torch.float32)
        before = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
        results = backend.run(self.op, *args)
        for arg, saved in zip(args, before, strict=True):
            if isinstance(arg, Tensor):
                assert torch.equal(arg, saved)
                assert all(arg.data_ptr() != result.data_ptr() for result in results)

    # ---- Contract with torch ---------------------------------------------------------------------------------------
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_opcheck(self, device: str, dtype: torch.dtype) -> None:
        args = self.arguments(self.small_sample(), Backend(device), dtype)
        for arg in args:
            if is_floating(arg):
                arg.requires_grad_()
        torch.library.opcheck(getattr(torch.ops.tokenprune, self.op).default, args)

    def test_gradcheck(self, device: str) -> None:
        args = self.arguments(self.small_sample(), Backend(device), torch.float64)
        tensors = [arg for arg in args if isinstance(arg, Tensor)]

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            given = iter(inputs)
            results = Backend(device).run(self.op, *[next(given) if isinstance(arg, Tensor) else arg for arg in args])
            return tuple(result for result in results if result.is_floating_point())

        assert torch.autograd.gradcheck(run, [tensor.requires_grad_(is_floating(tensor)) for tensor in tensors])

    def test_compiles_without_a_graph_break(self, device: str) -> None:
        args = self.arguments(self.small_sample(), Backend(device), torch.float32)
        torch.compiler.reset()
        compiled = torch.compile(getattr(torch.ops.tokenprune, self.op), fullgraph=True, backend="aot_eager")
        results = compiled(*args)
        results = results if isinstance(results, tuple) else (results,)
        for result, expected in zip(results, Backend(device).run(self.op, *args), strict=True):
            assert torch.equal(result, expected)

    def test_fake_kernel_agrees(self, device: str) -> None:
        args = self.arguments(self.small_sample(), Backend(device), torch.bfloat16)
        with torch._subclasses.FakeTensorMode() as mode:
            fakes = tuple(mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args)
            shapes = getattr(torch.ops.tokenprune, self.op)(*fakes)
        shapes = shapes if isinstance(shapes, tuple) else (shapes,)
        for fake, result in zip(shapes, Backend(device).run(self.op, *args), strict=True):
            assert (fake.shape, fake.dtype, fake.device, fake.stride()) == (
                result.shape,
                result.dtype,
                result.device,
                result.stride(),
            )


def attention(batch: int, heads: int, tokens: int, seed: int = 0, sharpness: float = 2.0) -> Tensor:
    """Random attention probabilities ``[batch, heads, tokens, tokens]`` in float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, heads, tokens, tokens, generator=generator, dtype=torch.float64)
    return (sharpness * logits).softmax(-1)


def queries_and_keys(
    batch: int, heads: int, tokens: int, channels: int, seed: int = 0, sharpness: float = 2.0
) -> tuple[Tensor, Tensor]:
    """Random queries and keys ``[batch, heads, tokens, channels]`` whose logits have deviation ``sharpness``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, tokens, channels)
    q, k = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return q * sharpness**0.5, k * sharpness**0.5


def sizes(tokens: int) -> tuple[int, int]:
    """Batch and heads that keep a case of this many tokens cheap."""
    return (3, 3) if tokens <= 257 else (1, 2)
