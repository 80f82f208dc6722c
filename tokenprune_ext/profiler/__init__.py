"""The tail-effect profiler: latency at every token count of a model on a device, and how many tokens to remove."""

from .accuracy import measure_accuracy
from .blocks import BlockTable, block_latency
from .journal import Journal, ProfileError
from .result import BatchProfile, Profile
from .run import profile
from .series import Series
from .settings import Settings
from .steps import Step, find_steps
from .utility import Choice, alpha_sweep, choose, utilities

__all__ = [
    "BatchProfile",
    "BlockTable",
    "Choice",
    "Journal",
    "Profile",
    "ProfileError",
    "Series",
    "Settings",
    "Step",
    "alpha_sweep",
    "block_latency",
    "choose",
    "find_steps",
    "measure_accuracy",
    "profile",
    "utilities",
]
