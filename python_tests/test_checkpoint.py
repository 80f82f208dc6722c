"""A pruned model in one file: the same bits come back, and what does not fit changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from host_models import PRUNING, TINY, images_for, logits, make_host, skip_unsuited, snapshot
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import tokenprune_ext as tokenprune
from tokenprune_ext import checkpoint, methods
from tokenprune_ext.cli import main
from tokenprune_ext.loading import ModelError, load_model
from tokenprune_ext.methods import base
from tokenprune_ext.patch import adapter
from tokenprune_ext.patch.timm_vit import TimmViT

ROOT = Path(__file__).resolve().parents[1]
HOSTS = ("vit", "deit_distilled", "eva02_clip", "dinov3", "sapiens2_gqa", "beit", "hf_vit", "hf_clip")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return logits(model, images_for(model))


def pruned(host: str = "vit", method: str = "topk", **options: object) -> nn.Module:
    return tokenprune.apply(make_host(host, **options), method, keep=0.8)


def rewrite(path: Path, change: object) -> None:
    """Change the description in a file, and nothing else."""
    with safe_open(path, "pt") as file:
        about = file.metadata()
    content = json.loads(about["tokenprune"])
    change(content)
    save_file(load_file(path), path, {**about, "tokenprune": json.dumps(content)})


@pytest.mark.parametrize("method", ["auto", "tome", "topk", "zero_tprune"])
@pytest.mark.parametrize("host", HOSTS)
def test_round_trip(path: Path, host: str, method: str) -> None:
    model = make_host(host)
    skip_unsuited(method, model)
    tokenprune.apply(model, method, keep=0.8)
    state = torch.get_rng_state()
    tokenprune.save(model, path)
    loaded = tokenprune.load(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert not loaded.training
    assert type(loaded) is type(model)
    assert tokenprune.schedule_of(loaded) == tokenprune.schedule_of(model)
    assert torch.equal(outputs(loaded), outputs(model))
    assert tokenprune.describe(tokenprune.remove(loaded)).method is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("host", ["vit", "dinov3", "hf_vit"])
def test_dtype_stays(path: Path, host: str, dtype: torch.dtype) -> None:
    model = tokenprune.apply(make_host(host, dtype), "topk", keep=0.8)
    tokenprune.save(model, path)
    loaded = tokenprune.load(path)
    tensors = zip((*model.parameters(), *model.buffers()), (*loaded.parameters(), *loaded.buffers()), strict=True)
    assert all(mine.dtype == theirs.dtype and torch.equal(mine, theirs) for mine, theirs in tensors)
    assert torch.equal(outputs(loaded), outputs(model))


def test_dtypes_may_be_mixed(path: Path) -> None:
    model = tokenprune.apply(make_host("vit", torch.bfloat16), "topk", keep=0.8)
    model.norm.float()
    tokenprune.save(model, path)
    assert {key: value.dtype for key, value in tokenprune.load(path).state_dict().items()} == {
        key: value.dtype for key, value in model.state_dict().items()
    }


def test_dense_model(path: Path) -> None:
    model = make_host("vit")
    tokenprune.save(model, path)
    with pytest.raises(ValueError, match="not pruned"):
        tokenprune.schedule_of(tokenprune.load(path))
    given = tokenprune.load(path, pruned())
    assert torch.equal(outputs(given), outputs(model))
    assert tokenprune.load(path, device="meta").head.weight.is_meta


def test_what_the_model_is_stays(path: Path) -> None:
    """Arguments of the constructor, preprocessing, how the schedule was found."""
    model = make_host("vit", img_size=96, num_classes=7, global_pool="avg", dynamic_img_size=True, drop_path_rate=0.2)
    model.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    schedule = tokenprune.Schedule.build(model, methods.create("topk", class_token_only=False), keep=0.8)
    schedule.origin["command"] = "by hand"
    tokenprune.save(tokenprune.apply(model, schedule), path)
    loaded = tokenprune.load(path)
    assert loaded.pretrained_cfg == model.pretrained_cfg
    assert tokenprune.schedule_of(loaded).origin == {"command": "by hand"}
    images = torch.randn(1, 3, 64, 128)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert torch.equal(outputs(loaded.train().eval()), outputs(model))
    assert loaded.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)


def test_tied_weights(path: Path) -> None:
    model = pruned()
    tokenprune.save(model, path)  # not tied
    for tied in (model, other := pruned()):
        tied.blocks[1].mlp = tied.blocks[0].mlp
    with pytest.raises(ModelError, match=r"one tensor in the model and several in the file: blocks.0.mlp.fc1.weight"):
        tokenprune.load(path, other)
    tokenprune.save(model, path)
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight.zero_()
    assert torch.equal(outputs(tokenprune.load(path, other)), outputs(model))
    with pytest.raises(ModelError, match=r"pass it as model=.* has another set of tied tensors"):
        tokenprune.load(path)


@pytest.mark.parametrize("host", ["vit", "hf_clip"])
def test_a_new_process(path: Path, host: str) -> None:
    model, image = pruned(host, "tome"), path.with_name("image.pt")
    tokenprune.save(model, path)
    torch.save((images_for(model), outputs(model)), image)
    code = "import sys, torch, tokenprune_ext as t; torch.set_num_threads(1); x, y = torch.load(sys.argv[2])\n"
    code += "with torch.no_grad(): z = t.load(sys.argv[1])(x)\nassert torch.equal(getattr(z, 'logits', z), y)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(path), str(image)], check=True, env=environment, cwd=path.parent)


def test_other_software_reads_plain_weights(inputs: Path, path: Path) -> None:
    model = tokenprune.apply(load_model("test_vit", weights=inputs / "w.safetensors", img_size=64), "topk", keep=0.5)
    tokenprune.save(model, path)
    plain = load_model("test_vit", weights=path, img_size=64)
    assert torch.equal(outputs(plain), outputs(tokenprune.remove(model)))
    arguments = ["eval", "--model", "test_vit", "--img-size", "64", "--weights", str(path), "--method", "topk"]
    arguments += ["--keep", "0.5", "--data", str(inputs / "one.tsv"), "--workers", "0"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output


def test_a_given_model_takes_weights_and_schedule(path: Path) -> None:
    model = pruned("vit", "tome")
    tokenprune.save(model, path)
    given = pruned("vit", "topk").train()
    with torch.no_grad():
        given.head.weight.zero_()
    assert tokenprune.load(path, given) is given
    assert given.training
    assert tokenprune.schedule_of(given) == tokenprune.schedule_of(model)
    assert torch.equal(outputs(given.eval()), outputs(model))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda: pruned(depth=3), r"12 unexpected: blocks.3.*"),
        (lambda: pruned(num_classes=3), r"2 of another shape: head.weight \(file \[10, 32\], model \[3, 32\]\)"),
        (lambda: pruned().half(), r"of another dtype: cls_token \(file torch.float32, model torch.float16\)"),
        (lambda: nn.Linear(2, 2), r"do not fit Linear: 2 missing"),
        (lambda: pruned().to("meta"), "is no plain tensor with values but Tensor on meta"),
        (lambda: hooked(pruned()), "schedule does not fit PrunedVisionTransformer: block 2 .* forward hooks"),
        (lambda: pruned(patch_size=8, img_size=32), r"of another shape: patch_embed.proj.weight"),
    ],
)
def test_a_given_model_that_does_not_fit_is_left_alone(path: Path, change, said: str) -> None:
    tokenprune.save(tokenprune.apply(make_host("vit"), "tome", layers=[2], keep=0.8), path)
    given = change()
    before, weights = snapshot(given), {key: value.clone() for key, value in given.state_dict().items()}
    with pytest.raises(ModelError, match=said):
        tokenprune.load(path, given)
    assert snapshot(given) == before
    assert all(value.is_meta or torch.equal(value, weights[key]) for key, value in given.state_dict().items())


def hooked(model: nn.Module) -> nn.Module:
    model.blocks[2].attn.register_forward_hook(lambda *args: None)
    with torch.no_grad():
        model.head.weight.zero_()
    return model


@pytest.mark.parametrize("host", ["qk_norm", "beit_shared"])
def test_a_model_that_is_more_than_its_name(path: Path, host: str, caplog: pytest.LogCaptureFixture) -> None:
    model = pruned(host)
    tokenprune.save(model, path)
    assert "loading it needs model=" in caplog.text
    with pytest.raises(
        ModelError, match=r"cannot say how to build its model: pass it as model=... \(.*(not made|Beit)"
    ):
        tokenprune.load(path)
    assert torch.equal(outputs(tokenprune.load(path, make_host(host))), outputs(model))


def test_a_family_of_ones_own(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(VisionTransformer):
        pass

    class OwnAdapter(TimmViT):
        models = (Own,)

    monkeypatch.setattr(adapter, "_adapters", [OwnAdapter(), *adapter._adapters])
    model, given = (Own(patch_size=16, **TINY).eval() for _ in range(2))
    tokenprune.save(tokenprune.apply(model, "tome", keep=0.8), path)
    with pytest.raises(ModelError, match=r"pass it as model=\.\.\. \(.*Own was not made by timm"):
        tokenprune.load(path)
    assert torch.equal(outputs(tokenprune.load(path, given)), outputs(model))


def test_a_setting_that_no_argument_has_is_noticed(path: Path) -> None:
    model = pruned()
    model.blocks[2].attn.scale = 0.5
    tokenprune.save(model, path)
    with pytest.raises(ModelError, match=r"blocks.2.attn.scale: 0.25 instead of 0.5"):
        tokenprune.load(path)


@pytest.mark.parametrize("ending", ["kill", "error"])
def test_an_unfinished_file_leaves_the_old_one(path: Path, ending: str) -> None:
    tokenprune.save(model := pruned(), path)
    old = path.read_bytes()
    child = os.fork()
    if not child:  # in the middle of writing, everything stops

        def half(state: object, unfinished: Path, about: object) -> None:
            unfinished.write_bytes(old[: len(old) // 2])
            if ending == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("no space left on device")

        checkpoint.save_file = half
        try:
            checkpoint.save(pruned("vit", "tome"), path)
        except OSError:
            os._exit(3)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if ending == "kill" else 3)
    assert len(list(path.parent.iterdir())) == (2 if ending == "kill" else 1)
    assert torch.equal(outputs(tokenprune.load(path)), outputs(model))


def test_who_reads_the_old_file_reads_on(path: Path) -> None:
    tokenprune.save(pruned(), path)
    old = path.read_bytes()
    with path.open("rb") as reader:
        tokenprune.save(pruned("vit", "tome"), path)
        assert reader.read() == old
    assert path.read_bytes() != old


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.bin", "model.ckpt"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    torch.save(pruned(), tmp_path / name)
    with pytest.raises(ModelError, match=r"is pickled, which can run code .* convert it: tokenprune\.save"):
        tokenprune.load(tmp_path / name)
    with pytest.raises(ModelError, match=r"a checkpoint is a \.safetensors file"):
        tokenprune.save(pruned(), tmp_path / name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda about: about.update(format=99), "has format 99"),
        (lambda about: about.pop("format"), "description is damaged"),
        (lambda about: about["model"].update(library="keras"), "expected a model of timm or transformers, got"),
        (
            lambda about: about["model"].update(name="vit_of_2040", version="9"),
            "no model 'vit_of_2040'.*made with timm 9",
        ),
        (lambda about: about["model"].update(name="hf-hub:some/model"), "timm has no model 'hf-hub:some/model'"),
        (lambda about: about["model"]["arguments"].update(pretrained=True), "unknown arguments pretrained"),
        (lambda about: about["model"]["arguments"].update(num_classes=3), r"of another shape: head.weight \(file"),
        (lambda about: about.update(model=["timm"]), "expected a model of timm or transformers, got"),
        (lambda about: about["model"].pop("arguments"), "cannot be built: KeyError"),
        (lambda about: about["schedule"].update(keep={"0": 99}), "its schedule cannot be read: .*only 16 patch"),
        (lambda about: about["schedule"].update(input_size=[96, 96]), "its schedule does not fit vit_tiny_patch16_224"),
    ],
)
def test_descriptions_that_cannot_be_followed(path: Path, change, said: str) -> None:
    tokenprune.save(pruned(), path)
    rewrite(path, change)
    with pytest.raises(ModelError, match=said):
        tokenprune.load(path)


def test_other_files(path: Path) -> None:
    with pytest.raises(ModelError, match="no such checkpoint"):
        tokenprune.load(path)
    save_file(make_host("vit").state_dict(), path)
    with pytest.raises(ModelError, match=r"holds weights alone.*load_model"):
        tokenprune.load(path)
    tokenprune.save(pruned(), path)
    for content in (b"", b"nothing", path.read_bytes()[:-1], path.read_bytes()[:500]):
        path.write_bytes(content)
        with pytest.raises(ModelError, match="cannot read checkpoint"):
            tokenprune.load(path)
    with pytest.raises(OSError, match="No such file"):
        tokenprune.save(pruned(), path.parent / "absent" / "model.safetensors")


def test_a_method_of_another_package(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_registry", dict(base._registry))
    own = methods.register(type("Own", (type(methods.create("topk")),), {"name": "own"}))
    tokenprune.save(model := tokenprune.apply(make_host("vit"), own(), keep=0.8), path)
    assert torch.equal(outputs(tokenprune.load(path)), outputs(model))
    del base._registry["own"]
    with pytest.raises(ModelError, match=r"unknown method 'own'.*import the module that registers it first"):
        tokenprune.load(path)


def test_wrappers_and_quantised_models_are_refused(path: Path) -> None:
    with pytest.raises(ModelError, match="the _orig_mod of the model is pruned"):
        tokenprune.save(torch.compile(pruned()), path)
    quantised = torch.ao.quantization.quantize_dynamic(pruned(), {nn.Linear})
    with pytest.raises(ModelError, match=r"blocks.0.attn.qkv.*no plain tensor .* saved before it is quantised"):
        tokenprune.save(quantised, path)
    assert not path.exists()


def test_every_method_can_be_named(path: Path) -> None:
    for method in PRUNING:
        tokenprune.save(model := pruned("vit", method), path)
        assert tokenprune.schedule_of(tokenprune.load(path)) == tokenprune.schedule_of(model)
