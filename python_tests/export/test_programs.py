"""Models as files: what was written gives what the model gives, here and in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from host_models import images_for, logits, make_host
from torch import nn

import tokenprune_ext
from tokenprune_ext.export import LoadedProgram, export_package, export_program, load_program
from tokenprune_ext.patch import UnsupportedModelError
from tokenprune_ext.prune import apply, schedule_of


def check(program: LoadedProgram, model: nn.Module, **tolerance: float) -> None:
    with torch.no_grad():
        for batch in (1, 5):
            images = images_for(model, batch, seed=1)
            torch.testing.assert_close(
                logits(program, images), logits(model, images), **{"rtol": 1e-5, "atol": 1e-5, **tolerance}
            )


def small(method: str = "auto", **options) -> nn.Module:
    return apply(make_host("vit", depth=3, **options), method, layers=[0, 1], keep=0.7)


@pytest.mark.parametrize("name", ["vit", "hf_deit", "hf_dinov3_bare"])
def test_program(name, tmp_path):
    """The other methods and families are in deploy/."""
    model = apply(make_host(name), "auto", layers=[0, 1], keep=0.7)
    program = load_program(export_program(model, tmp_path / "host.pt2"))
    check(program, model)
    assert program.schedule == schedule_of(model)


@pytest.mark.parametrize(("host", "method"), [("vit", "auto"), ("hf_vit", "auto")])
def test_package(packaged, host, method):
    model, path = packaged(host, method)
    program = load_program(path)
    check(program, model, rtol=1e-4, atol=1e-4)
    assert program.schedule == schedule_of(model)
    assert program.details["mean"] == "[0.4, 0.5, 0.6]"
    assert program.details["classes"].startswith("thing 0\nthing 1\n")


def test_the_operators_stay_in_the_program(tmp_path):
    path = export_program(small("zero_tprune"), tmp_path / "vit.pt2")
    called = {str(node.target) for node in torch.export.load(path).graph.nodes}
    assert "tokenprune.zero_tprune.default" in called


def test_a_process_of_its_own_loads_them(packaged, tmp_path):
    models = {"auto": small(), "hf_deit": apply(make_host("hf_deit"), "auto", layers=[0, 1], keep=0.7)}
    for name, model in models.items():
        export_program(model, tmp_path / f"{name}.pt2")
    models["package"], package = packaged("hf_vit", "auto")
    (tmp_path / "package.pt2").write_bytes(package.read_bytes())
    for name, model in models.items():
        images = images_for(model, 3)
        with torch.no_grad():
            torch.save((images, logits(model, images)), tmp_path / f"{name}.tensors")
    code = f"""
import torch
from tokenprune_ext.export import load_program
for name in {list(models)}:
    images, expected = torch.load(name + ".tensors")
    output = load_program(name + ".pt2")(images)
    output = output if isinstance(output, torch.Tensor) else output.logits
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    print(name)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(tokenprune_ext.__file__).parents[1])}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == list(models)


def test_details_of_a_dense_model_in_bfloat16_with_a_fixed_batch(tmp_path):
    model = make_host("vit", torch.bfloat16, depth=1)
    program = load_program(export_program(model, tmp_path / "dense.pt2", batch=2, details={"by": "us", "none": None}))
    assert program.schedule is None
    expected = {"model": "vit_tiny_patch16_224", "input_size": "[3, 64, 64]", "batch": "2", "dtype": "bfloat16"}
    expected |= {"device": "cpu", "returns": "Tensor", "torch": torch.__version__, "by": "us"}
    assert {**program.details, "tokenprune": ""} == {**expected, "tokenprune": ""}
    images = images_for(model, 2)
    torch.testing.assert_close(program(images), model(images))
    for wrong, message in (
        (images[:1], r"images must be \[2, 3, 64, 64\], got \[1, 3, 64, 64\]"),
        (images[..., 1:], r"got \[2, 3, 64, 63\]"),
        (images.float(), "images must be bfloat16, got torch.float32"),
        (images.to("meta"), "images must be on cpu, got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            program(wrong)


def test_images_give_the_size_and_are_not_written(tmp_path):
    model = apply(make_host("rope_axial", dynamic_img_size=True), "topk", keep=0.7)
    images = torch.randn(3, 3, 96, 64)
    path = export_program(model, tmp_path / "large.pt2", images=images[:1])
    torch.testing.assert_close(load_program(path)(images), model(images))
    assert torch.export.load(path).example_inputs is None
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 96, 64\], got \[0, 3, 96, 64\]"):
        load_program(path)(images[:0])


@pytest.mark.parametrize("export", [export_program, export_package])
def test_nothing_is_written_when_something_is_wrong(export, tmp_path):
    model = small()
    for path, kind, message in (
        ("vit.onnx", ValueError, r"path must end in \.pt2, got .*vit.onnx"),
        ("nowhere/vit.pt2", FileNotFoundError, "no such folder: .*nowhere"),
    ):
        with pytest.raises(kind, match=message):
            export(model, tmp_path / path)
    with pytest.raises(ValueError, match="batch must be at least 1"):
        export(model, tmp_path / "vit.pt2", batch=0)
    with pytest.raises(ValueError, match="details must not have batch: the export says what they are"):
        export(model, tmp_path / "vit.pt2", details={"batch": 3})
    with pytest.raises(ValueError, match=r"call model\.eval"):
        export(model.train(), tmp_path / "vit.pt2")
    with pytest.raises(UnsupportedModelError):
        export(nn.Linear(2, 2).eval(), tmp_path / "vit.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("export", [export_program, export_package])
def test_a_failed_export_leaves_the_old_file(export, tmp_path, monkeypatch):
    def write(program, file=None, *, package_path=None, **options):
        Path(file or package_path).write_text("half a")
        raise OSError("disk full")

    path = tmp_path / "vit.pt2"
    path.write_text("old")
    monkeypatch.setattr(torch.export, "save", write)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", write)
    with pytest.raises(OSError, match="disk full"):
        export(small(), path)
    assert [file.name for file in tmp_path.iterdir()] == ["vit.pt2"]
    assert path.read_text() == "old"


def test_options_reach_the_compiler(tmp_path, monkeypatch):
    given = {}

    def write(program, *, package_path, inductor_configs):
        given.update(inductor_configs)
        Path(package_path).write_text("compiled")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", write)
    path = export_package(small(), tmp_path / "vit.pt2", options={"max_autotune": True})
    assert path.read_text() == "compiled"
    assert given["max_autotune"] is True
    assert given["aot_inductor.metadata"]["batch"] == "any"


def test_what_cannot_be_loaded_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such program"):
        load_program(tmp_path / "nothing.pt2")
    text = tmp_path / "text.pt2"
    text.write_text("no program")
    with pytest.raises(ValueError, match=r"text.pt2 is no program and no package"):
        load_program(text)
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / "foreign.pt2")
    with pytest.raises(ValueError, match=r"foreign.pt2 was not written by tokenprune: it does not say its input_size"):
        load_program(tmp_path / "foreign.pt2")
