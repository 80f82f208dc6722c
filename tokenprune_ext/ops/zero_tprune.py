"""Zero-TPrune's three stages in one call: a rough ranking, similar pairs, page rank of the tokens that are left."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from tokenprune_ext.checks import check_choice, check_int

from ._check import accumulate_dtype, allow_tf32
from ._define import define
from ._qk import check_qk
from ._similarity import check_metric
from .bipartite_match import reference as bipartite_match
from .head_aggregate import reference as head_aggregate
from .wpr_qk import reference as wpr_qk

PARTITIONS = ("unimportant", "important")
Results = tuple[Tensor, Tensor, Tensor]


def _check(
    q: Tensor,
    k: Tensor,
    metric: Tensor,
    scale: float,
    r: int,
    class_start: bool,
    max_iters: int,
    tol: float,
    vmin: float,
    vmax: float,
    num_prefix: int,
    partition: str,
    similarity: str,
) -> None:
    check_qk(q, k, scale)
    check_metric(metric, similarity, heads=True)
    if (metric.shape[0], metric.shape[-2]) != (q.shape[0], q.shape[2]):
        raise ValueError(f"metric must have the batch and the tokens of q {list(q.shape)}, got {list(metric.shape)}")
    if metric.device != q.device:
        raise ValueError(f"metric must be on the device of q, {q.device}, got {metric.device}")
    check_choice("partition", partition, PARTITIONS)
    tokens = q.shape[2]
    check_int("num_prefix", num_prefix, 0, tokens - 1, "at least one patch token must be left")
    patches = tokens - num_prefix
    most = (patches + 1) // 2 if patches > 1 else 0
    check_int("r", r, 0, most, f"as many as bipartite_match pairs of {patches} patch tokens")
    if class_start and num_prefix < 1:
        raise ValueError("class_start needs a class token: num_prefix must be at least 1, got 0")
    check_int("max_iters", max_iters, 0)
    if not tol >= 0:
        raise ValueError(f"tol must be at least 0, got {tol}")
    if not vmin <= vmax:
        raise ValueError(f"vmin must not be above vmax, got vmin={vmin} and vmax={vmax}")


def start_scores(of: Tensor, tokens: int) -> Tensor:
    """1 for every token but the class token, which has the root of their number; in the dtype of sums, ``[tokens]``."""
    others = torch.ones(tokens - 1, dtype=accumulate_dtype(of.dtype), device=of.device)
    return torch.constant_pad_nd(others, (1, 0), tokens**0.5)


def spread(left: Tensor, kept: Tensor, tokens: int, num_prefix: int) -> Tensor:
    """The scores ``left`` ``[B, P]`` where they belong among all tokens, minus infinity for the dropped ones.

    Not NaN: run times of exported models do not agree where that is.
    """
    prefix, patches = left.split((num_prefix, left.shape[1] - num_prefix), 1)
    dropped = left.new_full((left.shape[0], tokens - num_prefix), -math.inf)
    return torch.cat([prefix, dropped.scatter(1, kept - num_prefix, patches)], 1)


def reference(
    q: Tensor,
    k: Tensor,
    metric: Tensor,
    scale: float,
    r: int,
    class_start: bool = False,
    max_iters: int = 30,
    tol: float = 1e-6,
    vmin: float = 0.01,
    vmax: float = 0.7,
    num_prefix: int = 0,
    partition: str = "unimportant",
    similarity: str = "cosine",
    allow_tf32: bool = False,
) -> Results:
    """The operator in plain torch: its stages, each of which forms the matrix."""
    _check(q, k, metric, scale, r, class_start, max_iters, tol, vmin, vmax, num_prefix, partition, similarity)
    tokens = q.shape[2]
    start = [start_scores(q, count) if class_start else None for count in (tokens, tokens - r)]
    rough = head_aggregate(wpr_qk(q, k, scale, start[0], 1), vmin, vmax, num_prefix)
    dropped, match, kept = bipartite_match(metric, rough, r, num_prefix, partition, similarity)
    left = wpr_qk(q, k, scale, start[1], max_iters, tol, kept, num_prefix)
    return spread(head_aggregate(left, vmin, vmax, num_prefix), kept, tokens, num_prefix), dropped, match


def _fake(
    q: Tensor,
    k: Tensor,
    metric: Tensor,
    scale: float,
    r: int,
    class_start: bool = False,
    max_iters: int = 30,
    tol: float = 1e-6,
    vmin: float = 0.01,
    vmax: float = 0.7,
    num_prefix: int = 0,
    partition: str = "unimportant",
    similarity: str = "cosine",
    allow_tf32: bool = False,
) -> Results:
    _check(q, k, metric, scale, r, class_start, max_iters, tol, vmin, vmax, num_prefix, partition, similarity)
    batch, _, tokens, _ = q.shape
    dropped, match = (q.new_empty((batch, r), dtype=torch.int64) for _ in range(2))
    return q.new_empty((batch, tokens), dtype=accumulate_dtype(q.dtype)), dropped, match


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    ctx.mark_non_differentiable(*output)


def _backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise RuntimeError("zero_tprune chooses tokens and has no gradient")


def _macs(given: Mapping[str, Any]) -> int:
    """Of the stages as they stand in the paper, each with its own matrix; see ``ZeroTPrune.scoring_macs``."""
    batch, heads, tokens, channels = given["q"]
    patches = tokens - given["num_prefix"]
    pairs = patches // 2 * (patches - patches // 2) * given["metric"][-1]
    left = (tokens - given["r"]) ** 2 * (channels + given["max_iters"])
    return int(batch * (heads * (tokens**2 * (channels + 1) + left) + pairs))


_op = define(
    "zero_tprune(Tensor q, Tensor k, Tensor metric, float scale, int r, bool class_start=False, int max_iters=30, "
    'float tol=1e-6, float vmin=0.01, float vmax=0.7, int num_prefix=0, str partition="unimportant", '
    'str similarity="cosine", bool allow_tf32=False) -> (Tensor, Tensor, Tensor)',
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    macs=_macs,
)


def zero_tprune(
    q: Tensor,
    k: Tensor,
    metric: Tensor,
    scale: float,
    r: int,
    class_start: bool = False,
    max_iters: int = 30,
    tol: float = 1e-6,
    vmin: float = 0.01,
    vmax: float = 0.7,
    num_prefix: int = 0,
    partition: str = "unimportant",
    similarity: str = "cosine",
) -> Results:
    """Scores of the tokens that are left when the ``r`` most redundant ones are gone, and which those are.

    I': every token is ranked by one iteration of page rank, :func:`wpr_qk`, and :func:`head_aggregate`. S: by that
    ranking, :func:`bipartite_match` splits the patch tokens and drops ``r`` of one half, which are most similar to one
    of the other. I: page rank of the tokens that are left, on the attention among themselves, and ``head_aggregate``.

    The attention of I is that of I' without what was dropped, but for the sums of its rows. A CPU forms the matrix
    once, where those of an image fit 48 MiB, shared by all threads, and each 2 MiB; otherwise, and on a GPU, the stages
    are the operators named, one after the other, and memory is theirs. A CPU leaves up to 48 MiB of it to later calls,
    of this operator and of ``wpr_qk`` together. Carries no gradient.

    Args:
        q: queries ``[B, H, N, d]``; float16, bfloat16, float32 or float64. Views of a packed qkv tensor are not copied.
        k: keys, like ``q``.
        metric: what S compares, ``[B, N, D]``, or vectors of every head, ``[B, H, N, D]``: their sums over the heads.
        scale: factor of the logits; divide it by a temperature to rank on sharper or flatter attention.
        r: tokens that S drops, at most its half.
        class_start: both rankings begin with the root of how many tokens there are for token 0, and 1 for the others;
            needs a class token. Otherwise with ones.
        max_iters: at most this many iterations of I; 0 leaves what they begin with.
        tol: an image's head stops after the iteration that changes it by ``sum |s_t - s_(t-1)| <= tol * P``, for the
            P tokens that are left.
        vmin: smallest variance of a head's scores over the patch tokens that passes the head filter.
        vmax: largest such variance.
        num_prefix: prefix tokens (class, distillation, registers) in front; they are ranked and never dropped.
        partition: ``unimportant``: S drops from the less important half; ``important``: from the other.
        similarity: ``cosine``, ``dot`` or ``euclidean``, see :func:`nearest_token`.

    Returns:
        ``(scores, dropped, match)``: ``scores`` ``[B, N]``, float32 (float64 when ``q`` is), 0 for prefix tokens, minus
        infinity for those that S dropped; int64 positions ``dropped`` ``[B, r]``, ascending, and ``match`` ``[B, r]``,
        the partner of each.

    Raises:
        TypeError: an argument is no tensor, or has an unsupported dtype.
        ValueError: shapes do not go together or are empty, ``r``, ``num_prefix``, ``max_iters`` or ``tol`` is out of
            range, ``vmin`` is above ``vmax``, ``scale`` is not finite, ``partition`` or ``similarity`` is unknown, or
            ``class_start`` without a prefix token.

    Source: Zero-TPrune (CVPR 2024), sections 3.2 and 3.3, the pruning layer I' -> S -> I.
    """
    return _op(q, k, metric, scale, r, class_start, max_iters, tol, vmin, vmax, num_prefix, partition, similarity,
               allow_tf32(q))  # fmt: skip
