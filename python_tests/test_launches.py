"""What is recorded of launches, on the host; ops/test_occupancy.py is the part for a GPU."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from ops import simt

from tokenprune_ext import launches
from tokenprune_ext._loader import Library
from tokenprune_ext.launches import Launch, record_launches

on_host = [
    pytest.mark.simt,
    pytest.mark.skipif(not simt.available, reason="no CUDA toolkit: CUDA kernels not run on the host"),
]


def launch(grid: tuple[int, int, int], blocks_per_sm: int = 2, num_sms: int = 10) -> Launch:
    return Launch("kernel", grid, 128, 32, 0, 0, blocks_per_sm, num_sms)


@pytest.mark.parametrize(
    ("grid", "waves", "tail"),
    [((1, 1, 1), 0.05, 0.05), ((20, 1, 1), 1, 1), ((7, 3, 1), 1.05, 0.05), ((3, 2, 5), 1.5, 0.5), ((40, 1, 1), 2, 1)],
)
def test_waves(grid: tuple[int, int, int], waves: float, tail: float) -> None:
    assert launch(grid).waves == pytest.approx(waves)
    assert launch(grid).tail == pytest.approx(tail)


def test_unknown_occupancy_has_no_waves() -> None:
    with pytest.raises(ValueError, match="how many blocks of kernel a multiprocessor holds is not known"):
        launch((1, 1, 1), blocks_per_sm=0).waves  # noqa: B018


@pytest.fixture
def host() -> Path:
    """The library that runs kernels on the host."""
    simt.configure("sm_80")
    return simt.path()


ATTN = (torch.full((2, 3, 33, 33), 1 / 33), None, 5, 1e-6)


class TestOnHost:
    pytestmark = on_host

    @pytest.mark.parametrize(("architecture", "num_sms"), [("sm_80", 108), ("sm_87", 16), ("sm_90", 132)])
    def test_a_launch(self, host: Path, architecture: str, num_sms: int) -> None:
        simt.configure(architecture)
        with record_launches(library=host) as found:
            (result,) = simt.call("wpr", *ATTN)
        (only,) = found
        assert only.kernel == "wpr::kernel<float, float, true, false>"
        assert (only.grid, only.threads, only.num_sms) == ((6, 1, 1), 512, num_sms)
        # 16 warps' sums of 256 columns and 16 more numbers; scores before and after; the matrix, and room to align it.
        assert only.dynamic_shared == (16 * 256 + 16 + 2 * 33) * 4 + 8 + 33 * 33 * 4 + 16
        torch.testing.assert_close(result, torch.ones(2, 3, 33))

    def test_without_execution(self, host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with record_launches(library=host) as executed:
            simt.call("wpr", *ATTN)
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True)
        try:
            with record_launches(execute=False, library=host) as skipped:
                (result,) = simt.call("wpr", *ATTN)
        finally:
            torch.use_deterministic_algorithms(False)
        assert skipped == executed
        assert result.isnan().all()  # as torch filled it

    def test_only_inside_the_block(self, host: Path) -> None:
        with record_launches(library=host) as outer:
            simt.call("wpr", *ATTN)
            with record_launches(library=host) as inner:
                simt.call("wpr", *ATTN)
                simt.call("wpr", *ATTN)
        simt.call("wpr", *ATTN)
        assert (len(outer), len(inner)) == (1, 2)

    def test_an_error_ends_it_too(self, host: Path) -> None:
        def fail() -> None:
            with record_launches(execute=False, library=host) as launches:
                found.append(launches)
                simt.call("wpr", *ATTN)
                raise ZeroDivisionError

        found: list[list[Launch]] = []
        with pytest.raises(ZeroDivisionError):
            fail()
        (result,) = simt.call("wpr", *ATTN)
        assert len(found[0]) == 1
        torch.testing.assert_close(result, torch.ones(2, 3, 33))

    def test_other_threads_are_not_recorded(self, host: Path) -> None:
        other = threading.Thread(target=simt.call, args=("wpr", *ATTN))
        with record_launches(library=host) as found:
            other.start()
            other.join()
        assert found == []


def test_a_library_that_does_not_record_is_named() -> None:
    with pytest.raises(ValueError, match=r"nowhere\.so is not loaded"), record_launches(library=Path("nowhere.so")):
        pass
    kernels = next(library for library in launches.LIBRARIES if library.name == "_C_cpu")
    with pytest.raises(ValueError, match=r"_C_cpu\.so does not record launches"), record_launches(library=kernels.path):
        pass


@pytest.mark.parametrize(
    ("module", "problem", "words"),
    [
        (None, None, "tokenprune_ext._native is not built for this Python"),
        (launches.native(), "not built", r"_C_cuda is not available \(not built\)"),
        (launches.native(), None, "torch finds no CUDA device"),
    ],
)
def test_without_cuda_it_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, module: Any, problem: str | None, words: str
) -> None:
    cpu, cuda = launches.LIBRARIES
    monkeypatch.setattr(launches, "native", lambda: module)
    monkeypatch.setattr(launches, "LIBRARIES", (cpu, Library(cuda.name, cuda.path, problem)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=f"launches cannot be recorded: .*{words}"), record_launches():
        pass
