"""Schedule search: keep counts of every block, and options of the method, from images without labels."""

from .run import SearchResult, Variant, search
from .study import SearchError, Trial

__all__ = ["SearchError", "SearchResult", "Trial", "Variant", "search"]
