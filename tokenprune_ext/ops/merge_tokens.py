"""Average dropped tokens into kept ones, weighted by how much each stands for (ToMe, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenprune_ext.checks import check_int

from ._check import accumulate_dtype, check_floating, widened
from ._define import define


def _check_index(name: str, value: object, shape: str, x: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {shape}, got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {value.dtype}")
    if value.dim() != 2 or value.shape[0] != x.shape[0]:
        raise ValueError(f"{name} must have shape {shape} with the batch of x {list(x.shape)}, got {list(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {value.device}")


def _check(x: Tensor, size: Tensor | None, kept: Tensor, dropped: Tensor, match: Tensor, num_prefix: int) -> None:
    check_floating("x", x, "[B, N, C]")
    if size is not None:
        check_floating("size", size, "[B, N]")
        if size.shape != x.shape[:2]:
            raise ValueError(f"size must have shape {list(x.shape[:2])} to go with x {list(x.shape)}, "
                             f"got {list(size.shape)}")  # fmt: skip
        if size.dtype != accumulate_dtype(x.dtype):
            raise TypeError(f"size must be {accumulate_dtype(x.dtype)} for x of {x.dtype}, got {size.dtype}")
        if size.device != x.device:
            raise ValueError(f"size must be on the device of x, {x.device}, got {size.device}")
    _check_index("kept", kept, "[B, K]", x)
    _check_index("dropped", dropped, "[B, R]", x)
    _check_index("match", match, "[B, R]", x)
    if match.shape != dropped.shape:
        raise ValueError(f"match must have the shape of dropped, {list(dropped.shape)}, got {list(match.shape)}")
    check_int("num_prefix", num_prefix, 0, x.shape[1], "the number of tokens")
    if kept.shape[1] > x.shape[1] - num_prefix:
        raise ValueError(f"kept must name at most {x.shape[1] - num_prefix} tokens an image (the number of patch "
                         f"tokens), got {kept.shape[1]}")  # fmt: skip
    if num_prefix + kept.shape[1] < 1:
        raise ValueError("at least one token must be left, got num_prefix=0 and an empty kept")


def _check_positions(kept: Tensor, dropped: Tensor, match: Tensor, tokens: int, num_prefix: int) -> None:
    """Positions are data: they are looked at where that makes nobody wait. The words are those of the CPU kernel."""
    if kept.device.type != "cpu":
        return
    if not bool((kept >= num_prefix).all() & (kept < tokens).all() & (kept.diff(dim=1) > 0).all()):
        raise RuntimeError(f"kept must hold ascending positions in {num_prefix}..{tokens - 1} (patch tokens)")
    for name, index in (("dropped", dropped), ("match", match)):
        if not bool(_inside(index, tokens).all()):
            raise RuntimeError(f"{name} must hold positions in 0..{tokens - 1}")


def _inside(index: Tensor, tokens: int) -> Tensor:
    return (index >= 0) & (index < tokens)


def _survivors(kept: Tensor, num_prefix: int) -> Tensor:
    """Positions in x of the tokens of the result, [B, P] with P = num_prefix + K."""
    return torch.cat([torch.arange(num_prefix, device=kept.device).expand(kept.shape[0], -1), kept], 1)


def _places(kept: Tensor, dropped: Tensor, match: Tensor, tokens: int, num_prefix: int) -> Tensor:
    """Where in the result each dropped token goes, [B, R]; P for nowhere."""
    batch, keep = kept.shape
    nowhere = num_prefix + keep
    places = torch.arange(num_prefix, nowhere, device=kept.device).expand(batch, -1)
    # One entry more than tokens: positions outside land there and are not looked up.
    table = kept.new_full((batch, tokens + 1), nowhere)
    table = table.scatter(1, torch.where(_inside(kept, tokens), kept, tokens), places)
    valid = _inside(match, tokens) & _inside(dropped, tokens)
    return torch.where(valid, table.gather(1, torch.where(valid, match, tokens)), nowhere)


def _rows(index: Tensor, channels: int) -> Tensor:
    return index.unsqueeze(-1).expand(-1, -1, channels)


def _alone(place: Tensor, rows: int) -> Tensor:
    """Which tokens of the result nothing is merged into, [B, P]."""
    alone = torch.ones((place.shape[0], rows + 1), dtype=torch.bool, device=place.device)
    return alone.scatter(1, place, False)[:, :rows]


def reference(
    x: Tensor, size: Tensor | None, kept: Tensor, dropped: Tensor, match: Tensor, num_prefix: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator in plain torch. (On a GPU, torch adds in no fixed order unless told to be deterministic.)"""
    _check(x, size, kept, dropped, match, num_prefix)
    tokens, channels = x.shape[1:]
    _check_positions(kept, dropped, match, tokens, num_prefix)
    dtype = accumulate_dtype(x.dtype)
    if size is None:
        size = x.new_ones(x.shape[:2], dtype=dtype)
    survivors = _survivors(kept, num_prefix)
    place = _places(kept, dropped, match, tokens, num_prefix)
    own, own_size = x.gather(1, _rows(survivors, channels)), size.gather(1, survivors)
    given, given_size = x.gather(1, _rows(dropped, channels)), size.gather(1, dropped)
    # The last row takes what goes nowhere.
    sums = pad(own.to(dtype) * own_size.unsqueeze(-1), (0, 0, 0, 1))
    sums = sums.scatter_add(1, _rows(place, channels), given.to(dtype) * given_size.unsqueeze(-1))[:, :-1]
    sizes = pad(own_size, (0, 1)).scatter_add(1, place, given_size)[:, :-1].contiguous()
    alone = _alone(place, survivors.shape[1]).unsqueeze(-1)
    merged = torch.where(alone, own, (sums / sizes.unsqueeze(-1)).to(x.dtype))
    return merged, sizes, sizes.log().to(x.dtype).unsqueeze(1).unsqueeze(1)


def _fake(
    x: Tensor, size: Tensor | None, kept: Tensor, dropped: Tensor, match: Tensor, num_prefix: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, size, kept, dropped, match, num_prefix)
    rows = num_prefix + kept.shape[1]
    sizes = x.new_empty((x.shape[0], rows), dtype=accumulate_dtype(x.dtype))
    return x.new_empty((x.shape[0], rows, x.shape[2])), sizes, x.new_empty((x.shape[0], 1, 1, rows))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, size, kept, dropped, match, ctx.num_prefix = inputs
    merged, sizes, log_sizes = output
    ctx.shape = x.shape
    if size is None:
        ctx.mark_non_differentiable(sizes, log_sizes)
    has_size = size is not None
    ctx.save_for_backward(kept, dropped, match, sizes, size, x if has_size else None, merged if has_size else None)


def _backward(
    ctx: Any, grad: Tensor, grad_sizes: Tensor, grad_logs: Tensor
) -> tuple[Tensor, Tensor | None, None, None, None, None]:
    """With y = sum s_i x_i / S and S = sum s_i: dy / dx_i = s_i / S and dy / ds_i = (x_i - y) / S."""
    kept, dropped, match, sizes, size, x, merged = ctx.saved_tensors
    batch, tokens, channels = ctx.shape
    rows = sizes.shape[1]
    place = _places(kept, dropped, match, tokens, ctx.num_prefix)
    alone = _alone(place, rows)
    # Everything below has one entry more: row P of the result and position N of x, whose values are cut off again.
    to, source = (torch.where(_inside(i, tokens), i, tokens) for i in (_survivors(kept, ctx.num_prefix), dropped))
    total = pad(sizes, (0, 1), value=1.0)
    known = sizes.new_ones((batch, tokens + 1)) if size is None else pad(size, (0, 1))
    wide = pad(grad.to(sizes.dtype), (0, 0, 0, 1))

    own_share = torch.where(alone, 1.0, known.gather(1, to) / sizes).unsqueeze(-1)
    given_share = (known.gather(1, source) / total.gather(1, place)).unsqueeze(-1)
    given = wide.gather(1, _rows(place, channels))
    grad_x = wide.new_zeros((batch, tokens + 1, channels))
    grad_x = grad_x.scatter_add(1, _rows(to, channels), wide[:, :-1] * own_share)
    grad_x = grad_x.scatter_add(1, _rows(source, channels), given * given_share)[:, :-1].to(grad.dtype)
    if size is None:
        return grad_x, None, None, None, None, None

    grad_logs = grad_logs.view_as(sizes).to(sizes.dtype)
    # Where a size is 0 and its logarithm counts nowhere, as that of padding: 0 instead of 0 / 0.
    grad_sizes = grad_sizes + grad_logs / torch.where((sizes == 0) & (grad_logs == 0), 1.0, sizes)
    values, mean = pad(x.to(sizes.dtype), (0, 0, 0, 1)), pad(merged.to(sizes.dtype), (0, 0, 0, 1))
    own_off = values.gather(1, _rows(to, channels)) - mean[:, :-1]
    own_slope = torch.where(alone, 0.0, (wide[:, :-1] * own_off).sum(-1) / sizes) + grad_sizes
    given_off = values.gather(1, _rows(source, channels)) - mean.gather(1, _rows(place, channels))
    given_slope = (given * given_off).sum(-1) / total.gather(1, place) + pad(grad_sizes, (0, 1)).gather(1, place)
    # A token that goes nowhere changes nothing, whatever its values are.
    given_slope = torch.where(place < rows, given_slope, 0.0)
    grad_size = torch.zeros_like(known).scatter_add(1, to, own_slope).scatter_add(1, source, given_slope)
    return grad_x, grad_size[:, :-1], None, None, None, None


_op = define(
    "merge_tokens(Tensor x, Tensor? size, Tensor kept, Tensor dropped, Tensor match, int num_prefix=0)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def merge_tokens(
    x: Tensor, size: Tensor | None, kept: Tensor, dropped: Tensor, match: Tensor, num_prefix: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Average every dropped token into the kept token it is matched with; any number may go into one.

    A kept token ``k`` becomes ``(size_k x_k + sum_j size_j x_j) / (size_k + sum_j size_j)`` over the dropped tokens
    ``j`` whose match is ``k``, added in this order: its own first, then as they stand in ``dropped``. A kept token that
    nothing is matched with is copied bit for bit, and so are the prefix tokens. A dropped token whose match is no kept
    token is lost. Each image is merged on its own.

    Args:
        x: tokens ``[B, N, C]``; float16, bfloat16, float32 or float64.
        size: how many patches each token stands for, ``[B, N]``, any floating dtype; ones when None. Where sizes that
            come together sum to 0, the result is NaN.
        kept: positions in ``x`` of the patch tokens that stay, ``[B, K]`` int64, ascending, none twice. K may be 0
            when there are prefix tokens.
        dropped: positions in ``x`` of the tokens that are merged, ``[B, R]`` int64; R may be 0.
        match: for each of them the position in ``x`` of the kept token it goes into, ``[B, R]`` int64.
        num_prefix: prefix tokens (class, distillation, registers) in front; they stay, unmerged, and do not stand in
            ``kept``.

    Returns:
        ``(tokens, sizes, log_sizes)``: ``tokens`` ``[B, num_prefix + K, C]``, the prefix and the kept tokens in their
        order, ``sizes`` ``[B, num_prefix + K]``, what each of them stands for now, float32 (float64 when ``x`` is), and
        ``log_sizes`` ``[B, 1, 1, num_prefix + K]``, their logarithm in the dtype of ``x``: added to the attention
        logits, a key counts as often as the patches it stands for. A size of 0 gives -inf, a negative one NaN.

    Raises:
        TypeError: an argument is no tensor, or has an unsupported dtype.
        ValueError: shapes do not go together, ``num_prefix`` is out of range, or no token is left.
        RuntimeError: on the CPU, a position is not in 0..N-1, or ``kept`` does not ascend or names a prefix token. CUDA
            does not make the host wait to find out: there nothing outside of ``x`` is read, a dropped token whose
            position or match is outside is lost, and a kept one is a row of zeros with the size 0.

    Source: ToMe (ICLR 2023), section 3 (merging; tracking token size).
    """
    return _op(x, widened(size, x), kept, dropped, match, num_prefix)
