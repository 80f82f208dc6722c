"""What a model is apart from its weights, as plain values, and how to build it again from them."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable, Mapping
from importlib import import_module, metadata
from typing import Any

import torch
from torch import Tensor, nn

from .channels import narrow_to, widths_of
from .dynamicvit.predictors import PREDICTORS, Predictors, add_predictors
from .loading import ModelError, check_name, create
from .patch import UnsupportedModelError
from .patch.mixin import dense_class
from .vtp.gates import add_gates, gates_of

# Arguments of timm's transformers that can be read off a model; the architecture's name stands for the others.
_TIMM_ARGUMENTS: Mapping[str, Callable[[Any], Any]] = {
    "img_size": lambda vit: list(vit.patch_embed.img_size),
    "patch_size": lambda vit: list(vit.patch_embed.patch_size),
    "in_chans": lambda vit: vit.patch_embed.proj.in_channels,
    "num_classes": lambda vit: vit.num_classes,
    "global_pool": lambda vit: vit.global_pool,
    "dynamic_img_size": lambda vit: vit.dynamic_img_size,
    "embed_dim": lambda vit: vit.embed_dim,
    "depth": lambda vit: len(vit.blocks),
    "num_heads": lambda vit: vit.blocks[0].attn.num_heads,
    "num_kv_heads": lambda vit: vit.blocks[0].attn.num_kv_heads,
    "drop_rate": lambda vit: vit.head_drop.p,
    "pos_drop_rate": lambda vit: vit.pos_drop.p,
    "proj_drop_rate": lambda vit: vit.blocks[0].attn.proj_drop.p,
    "attn_drop_rate": lambda vit: vit.blocks[0].attn.attn_drop.p,
    "drop_path_rate": lambda vit: getattr(vit.blocks[-1].drop_path1, "drop_prob", 0.0),
}
# Attributes of modules that say how they are trained or where they came from.
_WITHOUT_EFFECT = {"training", "grad_checkpointing", "gradient_checkpointing", "weight_init_mode", "name_or_path"}


class RecipeError(ValueError):
    """A model that cannot be built from its name and a few plain values; the message says what is in the way."""


def recipe_of(model: nn.Module) -> dict[str, Any]:
    """Plain values for JSON, from which :func:`build` makes the model; tried out before they are returned.

    Raises:
        RecipeError: it does not come out the same.
    """
    kind = dense_class(type(model))
    if kind.__module__.startswith("transformers.models.") and hasattr(model, "config"):
        recipe = _transformers_recipe(model, kind)
    elif kind.__module__.startswith("timm.") and (getattr(model, "pretrained_cfg", None) or {}).get("architecture"):
        recipe = _timm_recipe(model, kind)
    else:
        raise RecipeError(
            f"{kind.__module__}.{kind.__qualname__} was not made by timm.create_model nor by transformers"
        )
    dtypes = {key: value.dtype for key, value in model.state_dict().items()}
    try:
        rebuilt = build(recipe, dtypes)
        widths = _widths(model)
        if widths != _widths(rebuilt):
            recipe["widths"] = widths
            rebuilt = build(recipe, dtypes)
        if gates_of(model):
            recipe["gates"] = True
            rebuilt = build(recipe, dtypes)
    except ModelError as error:
        raise RecipeError(str(error)) from error
    different = _difference(model, rebuilt)
    if different:
        raise RecipeError(f"{kind.__qualname__} built from its name and arguments has another {different}")
    return recipe


def build(recipe: Any, dtypes: Mapping[str, torch.dtype]) -> nn.Module:
    """The model of a recipe in eval mode on the CPU, with random weights of these dtypes.

    Nothing is downloaded and the state of the random generator stays as it is.

    Raises:
        ModelError: a recipe that is not understood, or the installed library cannot build it.
    """
    makers = {"timm": _timm_model, "transformers": _transformers_model}
    if not isinstance(recipe, dict) or recipe.get("library") not in makers:
        raise ModelError(f"expected a model of {' or '.join(makers)}, got {recipe!r:.200}")
    library, version = recipe["library"], recipe.get("version")
    try:
        installed = metadata.version(library)
        with torch.random.fork_rng(devices=[]):
            model = makers[library](recipe).eval()
        if recipe.get("widths") is not None:
            narrow_to(model, recipe["widths"])
        if recipe.get("gates"):
            add_gates(model)
    except metadata.PackageNotFoundError:
        raise ModelError(f"it needs {library}, which is not installed") from None
    except Exception as error:  # whatever a constructor raises
        made = "" if version == installed else f" (made with {library} {version}, installed is {installed})"
        raise ModelError(f"{error if isinstance(error, ModelError) else repr(error)}{made}") from error
    _cast(model, dtypes)
    return model


def _timm_recipe(model: Any, kind: type) -> dict[str, Any]:
    accepted = {name for base in kind.__mro__ for name in inspect.signature(base.__init__).parameters}  # type: ignore[misc]
    arguments = {}
    for name, read in _TIMM_ARGUMENTS.items():
        try:
            value = read(model) if name in accepted else None
        except (AttributeError, IndexError, TypeError):  # a model without this part: it has the default
            continue
        if value is not None and _is_plain(value):
            arguments[name] = value
    config = {key: value for key, value in model.pretrained_cfg.items() if _is_plain(value)}
    recipe = {**_library("timm"), "name": config["architecture"], "arguments": arguments, "pretrained_cfg": config}
    predictors = getattr(model, PREDICTORS, None)
    return {**recipe, "predictors": list(predictors.before)} if isinstance(predictors, Predictors) else recipe


def _timm_model(recipe: Mapping[str, Any]) -> nn.Module:
    name, arguments = recipe["name"], recipe["arguments"]
    check_name(str(name))
    unknown = arguments.keys() - _TIMM_ARGUMENTS.keys()
    if unknown:
        raise ModelError(f"unknown arguments {', '.join(sorted(unknown))}")
    model: Any = create(name, **{key: _as_tuple(value) for key, value in arguments.items()})
    model.pretrained_cfg = model.default_cfg = {
        key: _as_tuple(value) for key, value in recipe["pretrained_cfg"].items()
    }
    return add_predictors(model, recipe["predictors"]) if "predictors" in recipe else model


def _transformers_recipe(model: Any, kind: type) -> dict[str, Any]:
    config = json.loads(model.config.to_json_string(use_diff=False))
    attention = model.config._attn_implementation
    return {**_library("transformers"), "name": kind.__name__, "config": config, "attention": attention}


def _transformers_model(recipe: Mapping[str, Any]) -> nn.Module:
    transformers: Any = import_module("transformers")
    kind: Any = getattr(transformers, str(recipe["name"]), None)
    known = inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedModel)
    if not known:
        raise ModelError(f"transformers has no model {recipe['name']!r}")
    config = kind.config_class.from_dict(recipe["config"])
    return kind._from_config(config, attn_implementation=recipe["attention"], dtype=torch.float32)


def _widths(model: nn.Module) -> list[list[int]] | None:
    """Channels at the places where VTP removes them; None for a model of a kind that it does not know."""
    try:
        return [list(widths) for widths in widths_of(model)]
    except UnsupportedModelError:
        return None


def _library(name: str) -> dict[str, str]:
    return {"library": name, "version": metadata.version(name)}


def _cast(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """As the model was cast: what the state dict lacks gets the dtype that most of it has."""
    floating = [dtype for dtype in dtypes.values() if dtype.is_floating_point]
    if floating:
        model.to(Counter(floating).most_common(1)[0][0])
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in dtypes and tensor.dtype != dtypes[name]:
            tensor.data = tensor.data.to(dtypes[name])


def _difference(model: nn.Module, rebuilt: nn.Module) -> str | None:
    """Where two models differ in anything but their weights; None when they do not."""
    own, other = _facts(model), _facts(rebuilt)
    for name in (*own, *other):
        mine, theirs = own.get(name), other.get(name)
        if not _equal(mine, theirs):
            return name if isinstance(mine, Tensor) else f"{name}: {theirs} instead of {mine}"
    return None


def _equal(mine: object, theirs: object) -> bool:
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        return mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    return mine == theirs


def _facts(model: nn.Module) -> dict[str, Any]:
    """Classes, plain attributes, shapes, ties, and the tensors that are in no state dict, by name."""
    state = model.state_dict()
    facts: dict[str, Any] = {name: (list(value.shape), value.dtype) for name, value in state.items()}
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    facts["set of tied tensors"] = sorted(state.keys() - own)
    for name, buffer in model.named_buffers():
        if name not in state:
            facts[name] = buffer.cpu()
    for name, module in model.named_modules():
        facts[name or "class"] = dense_class(type(module))
        for key, value in vars(module).items():
            if not key.startswith("_") and key not in _WITHOUT_EFFECT and _is_plain(value):
                facts[f"{name}.{key}".lstrip(".")] = _as_tuple(value)
    return facts


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list | tuple) else value
