"""torch's FlopCounterMode knows the operators."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from tokenprune_ext import ops

OPS = torch.ops.tokenprune


def flops(run) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_operators():
    """Two operations a multiply-accumulate, keywords and defaults included."""
    q = torch.randn(2, 3, 17, 8)
    attn = torch.rand(2, 3, 17, 17)
    metric, scores = torch.randn(2, 17, 24), torch.rand(2, 17)
    square = 2 * 3 * 17 * 17
    among = torch.tensor([[1, 5, 6], [2, 3, 16]])
    expected = {
        lambda: OPS.wpr(attn): 30 * square,
        lambda: OPS.wpr(attn, max_iters=4): 4 * square,
        lambda: OPS.wpr_qk(q, q, 0.3, None, 5): (8 + 5) * square,
        lambda: OPS.wpr_qk(q, q, 0.3, None, 5, among=among, num_prefix=1): 2 * 3 * 4 * 4 * (8 + 5),
        lambda: OPS.attn_colsum_qk(q, q, 0.3, num_prefix=1): 8 * square,
        lambda: OPS.class_attention(q, q, None, None, 0.3): 2 * 3 * 17 * 8,
        lambda: OPS.class_attention(q, q, q, None, 0.3): 2 * (2 * 3 * 17 * 8),
        lambda: OPS.zero_tprune(q, q, q, 0.3, 4, True, 5, num_prefix=1): (
            (8 + 1) * square + 2 * 8 * 8 * 8 + (8 + 5) * 2 * 3 * 13 * 13
        ),
        lambda: OPS.nearest_token(metric, torch.arange(17).expand(2, -1), num_prefix=1): 2 * 24 * (16 * 15 // 2),
        lambda: OPS.peaks_match(metric, scores, 5, 1): 2 * 24 * (16 * 15 // 2 + 5 * 11),
        lambda: OPS.bipartite_match(metric, None, 3, 2): 2 * 24 * 7 * 8,
        lambda: OPS.bipartite_match(q, None, 3, 2): 2 * 8 * 7 * 8,
        lambda: ops.topk_gather(metric, scores, 5): 0,
        lambda: ops.quantile_gather(metric, scores, 5): 0,
    }
    for run, macs in expected.items():
        assert flops(run) == 2 * macs


def test_on_the_meta_device():
    q = torch.empty(2, 3, 17, 8, device="meta")
    assert flops(lambda: OPS.attn_colsum_qk(q, q, 0.3)) == 2 * 2 * 3 * 17 * 17 * 8
