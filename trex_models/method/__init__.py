"""Parts of t-ReX for custom training loops; docs/library.md has examples."""

from trex_models.method.backbone import build_backbone
from trex_models.method.bank import MemoryBank
from trex_models.method.model import Encoder, TReX
from trex_models.method.momentum import MomentumEncoder
from trex_models.method.objectives import (
    LOOK,
    CosineSoftmax,
    Distillation,
    LinearSoftmax,
    Objective,
    OnlineClassMeans,
)
from trex_models.method.optimizer import build_optimizer, learning_rates

__all__ = [
    "LOOK",
    "CosineSoftmax",
    "Distillation",
    "Encoder",
    "LinearSoftmax",
    "MemoryBank",
    "MomentumEncoder",
    "Objective",
    "OnlineClassMeans",
    "TReX",
    "build_backbone",
    "build_optimizer",
    "learning_rates",
]
