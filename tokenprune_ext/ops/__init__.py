"""The operators, as documented functions. ``torch.ops.tokenprune.*`` are the same operators.

Importing this package defines them; the kernels come from the compiled libraries (see ``tokenprune_ext._loader``).
"""

from .attn_colsum import attn_colsum
from .head_aggregate import head_aggregate
from .merge_tokens import merge_tokens
from .topk_gather import topk_gather
from .wpr import wpr

__all__ = ["attn_colsum", "head_aggregate", "merge_tokens", "topk_gather", "wpr"]
