"""The operators, as documented functions. ``torch.ops.tokenprune.*`` are the same operators.

Importing this package defines them; the kernels come from the compiled libraries (see ``tokenprune_ext._loader``).
"""

from .attn_colsum import attn_colsum
from .bipartite_match import bipartite_match
from .head_aggregate import head_aggregate
from .nearest_token import nearest_token
from .topk_gather import topk_gather
from .wpr import wpr

__all__ = ["attn_colsum", "bipartite_match", "head_aggregate", "nearest_token", "topk_gather", "wpr"]
