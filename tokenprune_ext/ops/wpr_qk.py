"""Weighted page rank of the attention graph, from queries and keys: the attention matrix is never stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenprune_ext.checks import check_int

from ._check import accumulate_dtype, allow_tf32, widened
from ._define import define
from ._qk import check_qk, probabilities, qk_gradients
from .wpr import check_iteration, wpr_gradient
from .wpr import reference as wpr_reference


def _check_among(q: Tensor, among: Tensor, num_prefix: int) -> None:
    batch, _, tokens, _ = q.shape
    if not isinstance(among, Tensor):
        raise TypeError(f"among must be a torch.Tensor [B, K] or None, got {type(among).__name__}")
    if among.dtype != torch.int64:
        raise TypeError(f"among must be int64, got {among.dtype}")
    if among.dim() != 2 or among.shape[0] != batch:
        raise ValueError(f"among must have shape [B, K] with the batch of q {list(q.shape)}, got {list(among.shape)}")
    if among.device != q.device:
        raise ValueError(f"among must be on the device of q, {q.device}, got {among.device}")
    check_int("num_prefix", num_prefix, 0, tokens, "the number of tokens")
    if among.shape[1] > tokens - num_prefix:
        raise ValueError(f"among must name at most {tokens - num_prefix} tokens an image (the number of patch tokens), "
                         f"got {among.shape[1]}")  # fmt: skip
    if num_prefix + among.shape[1] < 1:
        raise ValueError("at least one token must be ranked, got num_prefix=0 and an empty among")


def _check(
    q: Tensor,
    k: Tensor,
    scale: float,
    start: Tensor | None,
    max_iters: int,
    tol: float,
    among: Tensor | None,
    num_prefix: int,
) -> None:
    check_qk(q, k, scale)
    if among is not None:
        _check_among(q, among, num_prefix)
    elif num_prefix != 0:
        raise ValueError(f"num_prefix must be 0 without among, got {num_prefix}")
    check_iteration("q", q, start, max_iters, tol, None if among is None else num_prefix + among.shape[1])


def _check_positions(among: Tensor, tokens: int, num_prefix: int) -> None:
    """Positions are data: they are looked at where that makes nobody wait. The words are those of the CPU kernel."""
    if among.device.type != "cpu":
        return
    if not bool((among >= num_prefix).all() & (among < tokens).all() & (among.diff(dim=1) > 0).all()):
        raise RuntimeError(f"among must hold ascending positions in {num_prefix}..{tokens - 1} (patch tokens)")


def _index(q: Tensor, among: Tensor, num_prefix: int) -> Tensor:
    """Positions of the tokens that take part, as an index along the tokens of ``q``: ``[B, H, P, d]``."""
    batch, heads, _, channels = q.shape
    prefix = torch.arange(num_prefix, device=among.device).expand(batch, -1)
    return torch.cat([prefix, among], 1)[:, None, :, None].expand(-1, heads, -1, channels)


def reference(
    q: Tensor,
    k: Tensor,
    scale: float,
    start: Tensor | None = None,
    max_iters: int = 30,
    tol: float = 1e-6,
    among: Tensor | None = None,
    num_prefix: int = 0,
    allow_tf32: bool = False,
) -> Tensor:
    """The operator in plain torch; forms the matrix."""
    _check(q, k, scale, start, max_iters, tol, among, num_prefix)
    if among is not None:
        _check_positions(among, q.shape[2], num_prefix)
        index = _index(q, among, num_prefix)
        q, k = q.gather(2, index), k.gather(2, index)
    return wpr_reference(probabilities(q, k, scale), start, max_iters, tol)


def _fake(
    q: Tensor,
    k: Tensor,
    scale: float,
    start: Tensor | None = None,
    max_iters: int = 30,
    tol: float = 1e-6,
    among: Tensor | None = None,
    num_prefix: int = 0,
    allow_tf32: bool = False,
) -> Tensor:
    _check(q, k, scale, start, max_iters, tol, among, num_prefix)
    tokens = q.shape[2] if among is None else num_prefix + among.shape[1]
    return q.new_empty((*q.shape[:2], tokens), dtype=accumulate_dtype(q.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, ctx.scale, start, ctx.max_iters, ctx.tol, among, ctx.num_prefix, _ = inputs
    ctx.save_for_backward(q, k, start, among)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Forms the matrix."""
    q, k, start, among = ctx.saved_tensors
    tokens, index = q.shape[2], None
    if among is not None:
        index = _index(q, among, ctx.num_prefix)
        # One row of zeros more: positions that CUDA lets pass are looked up there.
        index = torch.where((index >= 0) & (index < tokens), index, tokens)
        q, k = (pad(part, (0, 0, 0, 1)).gather(2, index) for part in (q, k))
    attn = probabilities(q, k, ctx.scale)
    grad_attn, grad_start = wpr_gradient(attn, start, grad, ctx.max_iters, ctx.tol)
    grad_qk = qk_gradients(attn, grad_attn, q, k, ctx.scale)
    if index is not None:
        grad_q, grad_k = (
            part.new_zeros((*part.shape[:2], tokens + 1, part.shape[3])).scatter(2, index, part)[:, :, :-1]
            for part in grad_qk
        )
        grad_qk = grad_q, grad_k
    return (*grad_qk, None, grad_start, None, None, None, None, None)


def _macs(given: Mapping[str, Any]) -> int:
    batch, heads, tokens, channels = given["q"]
    if given["among"] is not None:
        tokens = given["num_prefix"] + given["among"][1]
    return int(batch * heads * tokens**2 * (channels + given["max_iters"]))


_op = define(
    "wpr_qk(Tensor q, Tensor k, float scale, Tensor? start=None, int max_iters=30, float tol=1e-6, "
    "Tensor? among=None, int num_prefix=0, bool allow_tf32=False) -> Tensor",
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    macs=_macs,
)


def wpr_qk(
    q: Tensor,
    k: Tensor,
    scale: float,
    start: Tensor | None = None,
    max_iters: int = 30,
    tol: float = 1e-6,
    among: Tensor | None = None,
    num_prefix: int = 0,
) -> Tensor:
    """Weighted page rank of ``softmax(q k^T * scale)`` for every image and head, without the attention matrix.

    The same scores as :func:`wpr`. A matrix that fits on chip (in 16-bit dtypes about 260 tokens on a GPU, and 890
    where blocks form clusters: compute capability 9.0) is formed there once; for more tokens it is formed again, tile
    by tile, in every iteration, so memory beyond the inputs grows with N, not with its square. A CPU holds matrices of
    up to 2 MiB whole, one a thread; of a larger one, all threads together hold 48 MiB (3520 tokens in float32), which
    they leave to later calls, and form the rest again. (The gradient forms the matrix.)

    Args:
        q: queries ``[B, H, N, d]``; float16, bfloat16, float32 or float64. Views of a packed qkv tensor are not copied.
        k: keys, like ``q``.
        scale: factor of the logits; divide it by a temperature to rank on sharper or flatter attention.
        start: scores before the first iteration, ``[P]`` or ``[B, H, P]``; ones by default.
        max_iters: at most this many iterations; 0 returns the start.
        tol: an image's head stops after the iteration that changes it by ``sum |s_t - s_(t-1)| <= tol * P``.
        among: positions of patch tokens, ``[B, K]`` int64, ascending, none twice: ranks as if these and the prefix
            tokens were all there are. P = ``num_prefix`` + K tokens are ranked then, the prefix tokens first; all
            P = N when None. K may be 0 when there are prefix tokens. A CPU reads their queries and keys where they
            are, a GPU copies them in one launch.
        num_prefix: prefix tokens (class, distillation, registers) in front, which do not stand in ``among``; 0 without
            ``among``.

    Returns:
        Scores ``[B, H, P]``, float32 (float64 when ``q`` is). A NaN gives NaN scores. On a GPU the probabilities of
        16-bit inputs are held in float16 while they are on chip; products of float32 tensors use tf32 when
        torch's own do (``torch.backends.cuda.matmul.fp32_precision``).

    Raises:
        TypeError: an argument is no tensor, or has an unsupported dtype.
        ValueError: shapes do not fit, ``max_iters`` or ``tol`` is negative, ``scale`` is not finite, ``num_prefix`` is
            out of range or given without ``among``, or no token is ranked.
        RuntimeError: on the CPU, ``among`` does not ascend or names something other than a patch token. CUDA does not
            make the host wait to find out: there nothing outside of ``q`` and ``k`` is read, and a token that is
            outside has queries and keys of zeros.

    Source: Zero-TPrune (CVPR 2024), section 3.2, algorithm 1, on the mean-1 scale.
    """
    return _op(q, k, scale, widened(start, q, integers=True), max_iters, tol, among, num_prefix, allow_tf32(q))
