"""timm models with weights from a local file or from the hub, loaded safely and strictly."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, is_model
from timm.models import load_state_dict as read_state_dict
from torch import Tensor, nn

from .channels import PLACES, narrow_to, widths_of
from .demo import model as _demo  # noqa: F401 - registers vit_demo
from .dynamicvit.predictors import add_predictors, count_predictors, default_places

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_SHOWN_KEYS = 5


class ModelError(ValueError):
    """A model or its weights that cannot be had; the message says why and what would do."""


def load_model(
    name: str, *, weights: str | Path | None = None, pretrained: bool = False, img_size: int | None = None
) -> nn.Module:
    """A timm model in eval mode, float32, on the CPU.

    Args:
        name: any timm model name, with or without a pretrained tag.
        weights: local .safetensors, .pth, .pt or .bin file. The number of classes follows its classifier; with the
            weights of a DynamicViT the model gets its predictors, with those of VTP it loses the channels they lack.
        pretrained: take the weights from the hub. Without both, the weights are random.
        img_size: side of the input in pixels, for models that can change it; position embeddings are resampled.

    Raises:
        ModelError: unknown name, unreadable file, keys or shapes that do not fit, hub not reachable.
    """
    if weights is not None and pretrained:
        raise ModelError("weights come from a file or from the hub, not from both")
    if ":" not in name:  # hf-hub: and local-dir: names are resolved by timm itself
        check_name(name)
    if weights is None:
        return create(name, pretrained=pretrained, img_size=img_size).eval()
    state = read_weights(weights)
    model = create(name, img_size=img_size, num_classes=_classes_in(state, name))
    _add_predictors(model, state, weights)
    _remove_channels(model, state)
    _load_strictly(model, state, weights, name, resample=img_size is not None)
    return model.eval()


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """State dict of a weight file, unwrapped from 'state_dict' or 'model'; no code in the file is run.

    Raises:
        ModelError: missing file, unknown suffix, or content that is no state dict.
    """
    path = Path(path)
    if path.suffix.lower() not in WEIGHT_SUFFIXES:
        raise ModelError(f"weights {path}: expected one of {', '.join(WEIGHT_SUFFIXES)}")
    if not path.is_file():
        raise ModelError(f"no such weights file: {path}")
    try:
        state = read_state_dict(str(path), device="cpu", weights_only=True)
    except Exception as error:  # the readers raise a dozen types for a damaged or unsafe file
        raise ModelError(f"cannot read weights {path}: {_first_line(error)}") from error
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"weights {path} hold no state dict (names to tensors, or that under 'state_dict' or 'model')")
    return state


def check_name(name: str) -> None:
    """Raises ModelError when the installed timm has no architecture of this name, with or without a tag."""
    base = name.split(".")[0]
    if is_model(base):
        return
    near = difflib.get_close_matches(base, timm.list_models(), n=5, cutoff=0.5)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    raise ModelError(f"timm has no model {name!r}{hint}")


def create(name: str, *, pretrained: bool = False, **options: Any) -> nn.Module:
    """A timm model with these arguments of its constructor, None for the default.

    Raises:
        ModelError: it cannot be built, or its weights cannot be had.
    """
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    try:
        model = timm.create_model(name, pretrained=pretrained, **given)
    except Exception as error:  # whatever a model's constructor or the hub's client raises
        if pretrained:
            raise ModelError(
                f"cannot get pretrained weights of {name!r} from the hub ({_first_line(error)}); "
                "with a local copy use --weights FILE"
            ) from error
        asked = ", ".join(f"{key}={value}" for key, value in given.items())
        raise ModelError(f"cannot build {name}({asked}): {_first_line(error)}") from error
    if getattr(getattr(model, "patch_embed", None), "num_patches", 1) < 1:
        raise ModelError(f"{name} has no patches at img_size={options.get('img_size')}: it is smaller than one patch")
    return model


def _classes_in(state: dict[str, Tensor], name: str) -> int | None:
    """Number of classes of the weights, so that a fine-tuned model needs no option."""
    config = None if ":" in name else get_pretrained_cfg(name, allow_unregistered=True)
    classifier = getattr(config, "classifier", None)
    first = classifier if isinstance(classifier, str) or not classifier else classifier[0]
    weight = state.get(f"{first}.weight")
    return None if weight is None else weight.shape[0]


def _add_predictors(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Room for the predictors in a state dict, evenly spread: it does not say where they belong."""
    count = count_predictors(state)
    if not count:
        return
    try:
        add_predictors(model, default_places(len(getattr(model, "blocks", ())), count))
    except (TypeError, ValueError) as error:
        raise ModelError(f"weights {path} hold {count} predictors of DynamicViT: {error}") from error


def _remove_channels(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """The widths of a state dict whose blocks have fewer channels inside; what still does not fit is reported later."""
    with contextlib.suppress(KeyError, IndexError, TypeError, ValueError):
        own = widths_of(model)
        stored = [
            tuple(state[f"blocks.{index}.{place}.weight"].shape[1] for place in PLACES) for index in range(len(own))
        ]
        as_wide = all(state[name].shape == model.state_dict()[name].shape for name in ("pos_embed", "norm.weight"))
        if as_wide and stored != own:
            narrow_to(model, stored)


def _load_strictly(model: nn.Module, state: dict[str, Tensor], path: str | Path, name: str, *, resample: bool) -> None:
    keys = model.state_dict().keys()
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None and (resample or state.keys() != keys):
        # timm's own conversion of published checkpoints; for a file it does not know the keys are reported below
        with contextlib.suppress(Exception):
            state = convert(state, model)
    check_fit(model, state, path, name)
    with torch.no_grad():
        model.load_state_dict(state)


def check_fit(
    model: nn.Module, state: Mapping[str, Tensor], path: str | Path, name: str, *, dtypes: bool = False
) -> None:
    """Whether a state dict goes into a model as it is; with ``dtypes``, without a change of dtype.

    Args:
        model, state: looked at alone.
        path, name: what an error calls them.

    Raises:
        ModelError: the keys that do not fit, by kind.
    """
    own = model.state_dict(keep_vars=True)
    both = [key for key in own if key in state]
    tied: dict[int, str] = {}
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} (file {list(state[key].shape)}, model {list(own[key].shape)})"
            for key in both
            if state[key].shape != own[key].shape
        ],
        "of another dtype": [
            f"{key} (file {state[key].dtype}, model {own[key].dtype})"
            for key in both
            if dtypes and state[key].dtype != own[key].dtype
        ],
        "one tensor in the model and several in the file": [
            f"{first} and {key}"
            for key in both
            if (first := tied.setdefault(id(own[key]), key)) != key and not torch.equal(state[first], state[key])
        ],
    }
    if any(problems.values()):
        said = "; ".join(f"{len(keys)} {kind}: {_shorten(keys)}" for kind, keys in problems.items() if keys)
        raise ModelError(f"weights {path} do not fit {name}: {said}")


def _shorten(keys: list[str]) -> str:
    more = len(keys) - _SHOWN_KEYS
    return ", ".join(keys[:_SHOWN_KEYS]) + (f" and {more} more" if more > 0 else "")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
