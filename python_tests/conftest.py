from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors as small as those of the tests only wait for each other on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bench() -> Iterator[Path]:
    """The folder of the benchmarks, which import each other by name as when one is run as a script."""
    if not BENCH.exists():
        pytest.skip("no source tree")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield BENCH
