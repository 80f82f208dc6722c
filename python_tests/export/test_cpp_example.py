"""examples/cpp: built against the installed torch, it gives what the model gives, without Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

import tokenprune_ext

SOURCE = Path(__file__).resolve().parents[2] / "examples" / "cpp"
NEEDED = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(tokenprune_ext.__file__).parents[1])}

pytestmark = [
    pytest.mark.skipif(not SOURCE.exists(), reason="no source tree"),
    pytest.mark.skipif(bool(NEEDED), reason=f"no {' and no '.join(NEEDED)}"),
]


def shell(*command: str | Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=folder, env={**ENVIRONMENT, **environment}
    )


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classify")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configured = shell(
        "cmake", "-S", SOURCE, "-B", ".", *generator, f"-DPython_EXECUTABLE={sys.executable}", folder=folder
    )
    assert configured.returncode == 0, configured.stdout + configured.stderr
    built = shell("cmake", "--build", ".", folder=folder)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "classify"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    files = [folder / f"{number}.png" for number in range(3)]
    for file in files:
        Image.fromarray(generator.integers(0, 256, (72, 90, 3), dtype=np.uint8)).save(file)
    return files


def expected(model: nn.Module, files: list[Path]) -> Tensor:
    """Logits of the model in Python, preprocessed by timm."""
    how = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3), "interpolation": "bicubic", "crop_pct": 0.9}
    transform = create_transform((3, 64, 64), **how)
    with torch.no_grad():
        return model(torch.stack([transform(Image.open(file)) for file in files]))


@pytest.mark.parametrize("method", ["auto", "zero_tprune"])
def test_logits_are_those_of_the_model(packaged, program, photographs, tmp_path, method):
    model, package = packaged("vit", method)
    prepared = shell(sys.executable, SOURCE / "prepare.py", package, *photographs, "images", folder=tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    # Nothing of Python is there to be found.
    result = shell(program, package, *prepared.stdout.split(), "--logits", folder=tmp_path, PATH="", PYTHONPATH="")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    logits = torch.tensor([[float(word) for word in line.split()[1:]] for line in lines if line.startswith("logits")])
    wanted = expected(model, photographs)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    for start, (row, file) in enumerate(zip(wanted, prepared.stdout.split(), strict=True)):
        shown = lines[7 * start : 7 * start + 6]
        assert shown[0] == file
        best = row.softmax(0).topk(5)
        assert [line.split("%")[1].split() for line in shown[1:]] == [
            [str(int(number)), "thing", str(int(number))] for number in best.indices
        ]
        assert float(shown[1].split("%")[0]) == pytest.approx(100 * best.values[0].item(), abs=0.06)


def test_it_needs_no_python(program):
    needed = shell("ldd", program, folder=program.parent).stdout
    assert "libtorch_cpu.so" in needed
    assert "libpython" not in needed
    assert "libtorch_python" not in needed
    assert "not found" not in needed


def test_what_is_wrong_is_said(packaged, program, tmp_path):
    _, package = packaged("vit", "auto")
    Image.new("RGB", (64, 64)).save(tmp_path / "right.ppm")
    Image.new("RGB", (60, 64)).save(tmp_path / "small.ppm")
    Image.new("RGB", (64, 64)).save(tmp_path / "other.png")
    (tmp_path / "short.ppm").write_bytes((tmp_path / "right.ppm").read_bytes()[:-1])
    (tmp_path / "none.pt2").write_text("no package")
    for arguments, code, message in (
        ((package,), 2, "usage: classify PACKAGE.pt2 IMAGE.ppm..."),
        ((package, "small.ppm"), 1, "small.ppm is not 64 x 64 pixels"),
        ((package, "other.png"), 1, "other.png: no such file, or no binary PPM"),
        ((package, "none.ppm"), 1, "none.ppm: no such file"),
        ((package, "short.ppm"), 1, "short.ppm ends early"),
        (("none.pt2", "right.ppm"), 1, "zip archive"),
        ((package, "right.ppm", "--libraries", "nowhere"), 1, "nowhere/_C_schemas.so: cannot open"),
    ):
        result = shell(program, *arguments, folder=tmp_path)
        assert result.returncode == code, result
        assert message in result.stderr
        assert "frame #" not in result.stderr
    right = shell(program, package, "right.ppm", folder=tmp_path)
    assert right.returncode == 0, right.stderr
