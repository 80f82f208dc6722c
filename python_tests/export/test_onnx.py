"""ONNX files: what onnxruntime computes from them, what is in them, and that the model stays as it was."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from host_models import PRUNING, images_for, make_host
from torch import Tensor, nn

from tokenprune_ext import methods
from tokenprune_ext.export import onnx as export_module
from tokenprune_ext.patch import UnsupportedModelError
from tokenprune_ext.prune import apply

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
export_onnx = export_module.export_onnx

LAYERS, KEEP = [0, 1], [11, 7]  # of 16 patches
FAST = {"zero_tprune": {"iters": (3, 2, 1), "similar": 2}}


def pruned(host: str, method: str, layers: int = 2, **options: Any) -> nn.Module:
    """A model that prunes in its first blocks. One more follows where there has to be one that does not."""
    depth = {"num_hidden_layers" if host.startswith("hf_") else "depth": layers + (method == "auto")}
    model = make_host(host, **depth)
    return apply(model, methods.create(method, **options), layers=LAYERS[:layers], keep=KEEP[:layers])


def run(path: Path, images: Tensor) -> dict[str, Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {"images": images.numpy()})), strict=True))


def check(model: nn.Module, path: Path, tolerance: float = 1e-4, **options: Any) -> export_module.OnnxSummary:
    """One file says what the model says, for several batch sizes."""
    summary = export_onnx(model, path, **options)
    for batch in (1, 2, 5):
        images = images_for(model, batch, seed=batch)
        with torch.no_grad():
            output = model(images)
        expected = {"logits": output} if isinstance(output, Tensor) else dict(output.items())
        torch.testing.assert_close(run(path, images), expected, rtol=tolerance, atol=tolerance)
    return summary


# What a method needs for its two pruning layers.
TOPKS = {"tome": 4, "ats": 4, "random": 4, "zero_tprune": 6}


@pytest.mark.parametrize("method", PRUNING)
def test_every_method(method, tmp_path):
    summary = check(pruned("vit", method, **FAST.get(method, {})), tmp_path / "model.onnx")
    assert summary.operators["TopK"] == TOPKS.get(method, 2)
    assert not summary.operators.keys() & {"ScatterElements", "ScatterND", "GatherND", "Loop", "If", "NonZero"}
    if method in ("topk", "evit", "pomt"):
        assert "GatherElements" not in summary.operators


def test_dense(tmp_path):
    model = make_host("vit", depth=2)
    summary = check(model, tmp_path / "dense.onnx")
    assert "TopK" not in summary.operators
    last = apply(model, methods.create("dense", class_token_only=True))
    assert check(last, tmp_path / "last.onnx").inputs == {"images": ("batch", 3, 64, 64)}


HOSTS = {"siglip": "auto", "eva02": "evit", "beit": "pomt", "hf_vit": "tome", "hf_clip": "auto"}


@pytest.mark.parametrize(("host", "method"), HOSTS.items())
def test_every_family(host, method, tmp_path):
    check(pruned(host, method), tmp_path / "model.onnx")


VARIANTS = [
    ("topk", {"reduction": "merge"}),
    ("pomt", {"reduction": "weighted", "feature": "k"}),
    ("peaks", {"importance": "wpr", "exponent": 0.5}),
    ("zero_tprune", {"reduction": "merge", "partition": "alternate", "iters": (2, 2, 2), "similar": 2}),
    ("tome", {"reduction": "drop"}),
]


@pytest.mark.parametrize(("method", "options"), VARIANTS)
def test_options(method, options, tmp_path):
    check(pruned("vit", method, layers=1, **options), tmp_path / "model.onnx")


def test_a_token_map_keeps_its_order(tmp_path):
    summary = check(pruned("hf_vit_bare", "topk"), tmp_path / "model.onnx")
    assert summary.outputs["last_hidden_state"] == ("batch", 8, 48)
    assert summary.operators["TopK"] == 4


def test_a_fixed_batch(tmp_path):
    model = apply(make_host("vit", depth=2), "topk", layers=[0], keep=0.5)
    summary = export_onnx(model, tmp_path / "model.onnx", batch=3)
    assert summary.inputs == {"images": (3, 3, 64, 64)}
    assert summary.outputs == {"logits": (3, 10)}
    assert not summary.operators.keys() & {"Shape", "Range"}
    images = images_for(model, 3)
    torch.testing.assert_close(run(summary.path, images)["logits"], model(images).detach(), rtol=1e-4, atol=1e-4)
    with pytest.raises(Exception, match="Got: 2 Expected: 3"):
        run(summary.path, images[:2])


def test_half_precision(tmp_path):
    model = apply(make_host("vit", torch.float16, depth=2), "topk", layers=[0], keep=0.5)
    check(model, tmp_path / "model.onnx", tolerance=2e-2)


def test_a_newer_opset_and_images_of_another_size(tmp_path):
    model = apply(make_host("rope_axial", dynamic_img_size=True, depth=2), "auto", layers=[0], keep=0.5)
    images = torch.randn(2, 3, 96, 64)
    summary = export_onnx(model, tmp_path / "model.onnx", opset=20, images=images)
    assert summary.opset == 20
    assert summary.inputs == {"images": ("batch", 3, 96, 64)}
    torch.testing.assert_close(run(summary.path, images)["logits"], model(images).detach(), rtol=1e-4, atol=1e-4)


def parts(model: nn.Module) -> dict[str, tuple[nn.Module, type, dict[str, Any]]]:
    return {name: (part, type(part), dict(vars(part))) for name, part in model.named_modules()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A model, what it was before it was written, and the summary."""
    model = apply(make_host("vit", depth=2), "auto", layers=[0], keep=0.5)
    calls = []
    model.blocks[1].register_forward_hook(lambda *args: calls.append(args))
    model.head.weight.requires_grad_(False)
    model.head.bias.grad = torch.ones(10)
    before, state = parts(model), {key: value.clone() for key, value in model.state_dict().items()}
    summary = export_onnx(model, tmp_path_factory.mktemp("onnx") / "model.onnx")
    return model, before, state, summary


def test_the_model_stays_as_it_was(written):
    model, before, state, _ = written
    assert parts(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not model.training
    assert [name for name, part in model.named_parameters() if not part.requires_grad] == ["head.weight"]
    assert [name for name, part in model.named_parameters() if part.grad is not None] == ["head.bias"]
    assert model.head.bias.grad.sum() == 10


def test_what_is_in_the_file(written):
    _, _, _, summary = written
    model = onnx.load(summary.path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert {node.domain for node in model.graph.node} == {""}
    assert sum(summary.operators.values()) == len(model.graph.node)
    assert summary.size_bytes == summary.path.stat().st_size
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert str(Path.cwd()).encode() not in summary.path.read_bytes()
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    shapes = {value.name: value.type.tensor_type.shape.dim for value in inferred.graph.value_info}
    for node in inferred.graph.node:
        for name in node.output:
            known = [size.dim_value or size.dim_param for size in shapes.get(name, ())]
            assert all(known), f"{node.op_type} {name}: {known}"
    assert str(summary).splitlines()[0].endswith("opset 18, images ['batch', 3, 64, 64] -> logits ['batch', 10]")
    assert "TopK 1" in str(summary)


def test_weights_in_a_file_of_their_own(written, tmp_path, monkeypatch):
    """As torch does it beyond 2 GB."""
    model, *_ = written
    save = torch.onnx.ONNXProgram.save
    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", lambda *args: save(*args, external_data=True))
    summary = check(model, tmp_path / "model.onnx")
    files = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert files.keys() == {"model.onnx", "model.onnx.data"}
    assert summary.size_bytes == sum(files.values())


def test_nothing_is_written_when_it_fails(written, tmp_path, monkeypatch):
    model, *_ = written
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    monkeypatch.setattr(onnx.checker, "check_model", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_onnx(model, path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"old"


def test_bad_input(written, tmp_path, monkeypatch):
    model, path = make_host("vit", depth=1), tmp_path / "model.onnx"
    with pytest.raises(ValueError, match="opset must be at least 18, got 17"):
        export_onnx(model, path, opset=17)
    with pytest.raises(ValueError, match=r"opset must be one that torch .* can write, got 99"):
        export_onnx(model, path, opset=99)
    with pytest.raises(FileNotFoundError, match=r"the folder .*none does not exist"):
        export_onnx(model, tmp_path / "none" / "model.onnx")
    with pytest.raises(TypeError, match=r"model must be float32 or float16 .*, got bfloat16"):
        export_onnx(make_host("vit", torch.bfloat16, depth=1), path)
    with pytest.raises(
        TypeError, match=r"images must be torch.float32 on cpu like the model, got torch.float64 on cpu"
    ):
        export_onnx(model, path, images=torch.zeros(1, 3, 64, 64, dtype=torch.float64))
    with pytest.raises(UnsupportedModelError):
        export_onnx(nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        export_onnx(model.train(), path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"export to ONNX needs onnxscript: pip install 'tokenprune\[export\]'"):
        export_onnx(model, path)
    assert not list(tmp_path.iterdir())
