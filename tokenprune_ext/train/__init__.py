"""Training of vision transformers: one loop, with the method as an :class:`Objective`."""

from .data import TrainingData
from .loop import Trained, train
from .objective import CrossEntropy, Objective
from .options import Options
from .state import Diverged, RunError

__all__ = ["CrossEntropy", "Diverged", "Objective", "Options", "RunError", "Trained", "TrainingData", "train"]
