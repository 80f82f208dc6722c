"""DynamicViT: predictors that learn which tokens to keep. Its inference is the method ``dynamicvit``."""

from .losses import Losses, kl_loss, loss, ratio_loss, token_loss
from .masked import Dense, Masked, MaskedViT, gumbel_decision, masked_attention, teach
from .predictors import Predictor, Predictors, add_predictors, default_places, predictors_of

__all__ = [
    "Dense",
    "Losses",
    "Masked",
    "MaskedViT",
    "Predictor",
    "Predictors",
    "add_predictors",
    "default_places",
    "gumbel_decision",
    "kl_loss",
    "loss",
    "masked_attention",
    "predictors_of",
    "ratio_loss",
    "teach",
    "token_loss",
]
