from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors as small as those of the tests only wait for each other on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def memory_kept(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices a command would keep freed memory for, were it a process of its own; nothing is timed before."""
    from tokenprune_ext import latency

    devices: list[str] = []
    clock = latency._time_on_cpu

    def timed(call: Callable[[], object]) -> float:
        assert devices, "timed before freed memory was kept"
        return clock(call)

    monkeypatch.setattr(latency, "keep_freed_memory", lambda device: devices.append(str(device)))
    monkeypatch.setattr(latency, "_time_on_cpu", timed)
    return devices


@pytest.fixture(scope="module")
def bench() -> Iterator[Path]:
    """The folder of the benchmarks, which import each other by name as when one is run as a script."""
    if not BENCH.exists():
        pytest.skip("no source tree")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield BENCH


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """w.safetensors of a test_vit for 3 classes, and 8 images: all in images.tsv, one in one.tsv."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", img_size=64, num_classes=3).state_dict(), folder / "w.safetensors")
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    for i in range(8):
        pixels = generator.integers(0, 256, (72, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    (folder / "images.tsv").write_text("".join(f"{i}.png\t{i % 3}\n" for i in range(8)))
    (folder / "one.tsv").write_text("images/3.png\t2\n")
    return folder
