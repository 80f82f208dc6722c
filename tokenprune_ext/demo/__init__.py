"""A small trained vision transformer with generated images, for trying token pruning without a download.

``load_model`` gives the model, ``DemoImages`` the images, ``CLASSES`` the class names.
"""

from .images import CLASSES, DemoImages
from .model import load_model

__all__ = ["CLASSES", "DemoImages", "load_model"]
