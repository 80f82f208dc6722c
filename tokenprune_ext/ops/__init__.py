"""The operators, as documented functions. ``torch.ops.tokenprune.*`` are the same operators.

Importing this package defines them; the kernels come from the compiled libraries (see ``tokenprune_ext._loader``).
"""

from .attn_colsum import attn_colsum
from .attn_colsum_qk import attn_colsum_qk
from .bipartite_match import bipartite_match
from .class_attention import class_attention
from .head_aggregate import head_aggregate
from .head_reduced_sum import head_reduced_sum
from .merge_tokens import merge_tokens
from .nearest_token import nearest_token
from .peaks_match import peaks_match
from .quantile_gather import quantile_gather
from .topk_gather import topk_gather
from .wpr import wpr
from .wpr_qk import wpr_qk
from .zero_tprune import zero_tprune

__all__ = [
    "attn_colsum",
    "attn_colsum_qk",
    "bipartite_match",
    "class_attention",
    "head_aggregate",
    "head_reduced_sum",
    "merge_tokens",
    "nearest_token",
    "peaks_match",
    "quantile_gather",
    "topk_gather",
    "wpr",
    "wpr_qk",
    "zero_tprune",
]
