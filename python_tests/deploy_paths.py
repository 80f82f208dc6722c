"""Every way to run a pruned model elsewhere: what `deploy/` checks and `bench/deploy_table.py` tabulates.

A path takes a pruned model and an empty folder, and raises when what comes out is not what the model gives.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from host_models import PRUNING, images_for, logits, make_host
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import tokenprune_ext
from tokenprune_ext import methods
from tokenprune_ext.export import export_package, export_program, load_program
from tokenprune_ext.export.onnx import export_onnx
from tokenprune_ext.prune import apply, remove

# One model of every family of hosts.
FAMILIES = {
    "vit": "timm ViT",
    "siglip": "timm ViT without class token",
    "eva02": "timm Eva",
    "beit": "timm Beit",
    "hf_vit": "transformers ViT",
    "hf_clip": "transformers CLIP",
}
# All methods on the first, two unlike ones on the others; where a C++ compiler takes its time, one.
LONG_CASES = [*(("vit", method) for method in PRUNING), *((host, "auto") for host in FAMILIES if host != "vit")]
CASES = [*LONG_CASES, *((host, "zero_tprune") for host in FAMILIES if host != "vit")]

ROOT = Path(__file__).resolve().parents[1]
# Subprocesses run in folders of their own.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(tokenprune_ext.__file__).parents[1])}


OPTIONS = {"zero_tprune": {"iters": (3, 2, 1)}}  # unrolled in ONNX


def pruned(host: str, method: str) -> nn.Module:
    """Two blocks prune and hand on what they made of the tokens to a third."""
    depth = "num_hidden_layers" if host.startswith("hf_") else "depth"
    return apply(
        make_host(host, **{depth: 3}), methods.create(method, **OPTIONS.get(method, {})), layers=[0, 1], keep=0.7
    )


def agree(found: Tensor, model: nn.Module, images: Tensor, tolerance: float = 1e-4) -> None:
    with torch.no_grad():
        torch.testing.assert_close(found, logits(model, images), rtol=tolerance, atol=tolerance)


def compiled(model: nn.Module, folder: Path) -> None:
    """torch.compile with Inductor, one graph."""
    torch.compiler.reset()
    images = images_for(model, 3)
    with torch.no_grad():
        agree(logits(torch.compile(model, fullgraph=True), images), model, images)


def any_batch(model: nn.Module, folder: Path) -> None:
    """torch.compile again for a second batch size and for none after it; with dynamic=True no more often."""
    for dynamic in (None, True):
        torch.compiler.reset()
        graphs = CompileCounterWithBackend("aot_eager")
        fast = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=graphs)
        for batch in (2, 3, 5, 4):
            images = images_for(model, batch, seed=batch)
            with torch.no_grad():
                agree(logits(fast, images), model, images)
        assert graphs.frame_count <= 2, f"compiled {graphs.frame_count} times"


def exported(model: nn.Module, folder: Path) -> None:
    """A torch.export program, written and read."""
    program = load_program(export_program(model, folder / "model.pt2"))
    for batch in (1, 5):
        images = images_for(model, batch, seed=batch)
        agree(logits(program, images), model, images)


_READ = """
import sys, torch
from tokenprune_ext.export import load_program
for folder in map(str.strip, sys.stdin):
    output = load_program(folder + "/model.pt2")(torch.load(folder + "/images.pt"))
    torch.save(output if isinstance(output, torch.Tensor) else output.logits, folder + "/logits.pt")
    print(folder, flush=True)
"""


@cache
def _reader() -> subprocess.Popen[str]:
    """A process that loads programs from the folders it is told, and has never seen a model."""
    command = [sys.executable, "-W", "ignore", "-c", _READ]
    folder = tempfile.gettempdir()  # Python would import the package from a source tree it is started in
    return subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def reloaded(model: nn.Module, folder: Path) -> None:
    """The program, in another process."""
    images = images_for(model, 3)
    export_program(model, folder / "model.pt2")
    torch.save(images, folder / "images.pt")
    reader = _reader()
    assert reader.stdin is not None
    assert reader.stdout is not None
    print(folder, file=reader.stdin, flush=True)
    assert reader.stdout.readline().strip() == str(folder)
    agree(torch.load(folder / "logits.pt"), model, images)


def onnx(model: nn.Module, folder: Path) -> None:
    """An ONNX file of standard operators, in onnxruntime."""
    import onnxruntime

    export_onnx(model, folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        images = images_for(model, batch, seed=batch)
        (found,) = session.run(["logits"], {"images": images.numpy()})
        agree(torch.from_numpy(found), model, images)


def cpp(model: nn.Module, folder: Path, program: Path) -> None:
    """An AOTInductor package, in the C++ program of examples/cpp."""
    images = (images_for(model, 2).clamp(-2, 2) * 32 + 128).round() / 255  # pixels
    for number, image in enumerate(images):
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
        header = f"P6\n{image.shape[2]} {image.shape[1]}\n255\n"
        (folder / f"{number}.ppm").write_bytes(header.encode() + pixels.numpy().tobytes())
    details = {"mean": [0.0] * 3, "std": [1.0] * 3}
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    export_package(model, folder / "model.pt2", details=details, options=quick)
    lines = run(folder, program, "model.pt2", "0.ppm", "1.ppm", "--logits").splitlines()
    rows = [[float(word) for word in line.split()[1:]] for line in lines if line.startswith("logits")]
    agree(torch.tensor(rows), model, images)


def _quantise(model: nn.Module) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    def chosen(part: nn.Module, name: str) -> bool:
        parent = model.get_submodule(name.rpartition(".")[0])
        # timm's forward multiplies by the weights of such a layer itself, quantised or not.
        return isinstance(part, nn.Linear) and getattr(parent, "q_bias", None) is None

    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=chosen)


def quantised(model: nn.Module, folder: Path) -> None:
    """int8 weights and activations by torchao: the same bits whether quantised before pruning or after."""
    schedule = tokenprune_ext.schedule_of(model)
    first, second, images = remove(copy.deepcopy(model)), copy.deepcopy(model), images_for(model, 3)
    _quantise(first)
    apply(first, schedule)
    _quantise(second)
    with torch.no_grad():
        found = logits(second, images)
        assert torch.equal(found, logits(first, images))
        assert not torch.equal(found, logits(model, images))


def saved(model: nn.Module, folder: Path) -> None:
    """A checkpoint, and a new model from it: the same bits."""
    tokenprune_ext.save(model, folder / "model.safetensors")
    again, images = tokenprune_ext.load(folder / "model.safetensors"), images_for(model)
    with torch.no_grad():
        agree(logits(again, images), model, images, tolerance=0)


PATHS: dict[str, Callable[[nn.Module, Path], None]] = {
    "any batch": any_batch,
    "torch.export": exported,
    "another process": reloaded,
    "ONNX": onnx,
    "int8": quantised,
    "checkpoint": saved,
}


def run(folder: Path, *command: str | Path, **environment: str) -> str:
    """What a command prints, run in a folder."""
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env={**ENVIRONMENT, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_cpp(folder: Path) -> Path:
    """examples/cpp against the installed torch; the program."""
    source = ROOT / "examples" / "cpp"
    run(folder, "cmake", "-S", source, "-B", ".", "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}")
    run(folder, "cmake", "--build", ".")
    return folder / "classify"
