"""t-ReX and t-ReX* ResNet-50s (Sariyildiz et al., ICLR 2023) as timm models.

Importing this package registers the models with timm:

    import timm, trex_models
    model = timm.create_model("trex_resnet50", pretrained=True)
"""

from trex_models.checkpoints import CheckpointError
from trex_models.heads import CosineClassifier, Projector
from trex_models.manifest import WeightsError
from trex_models.trex import TRexResNet

__all__ = [
    "CheckpointError",
    "CosineClassifier",
    "Projector",
    "TRexResNet",
    "WeightsError",
    "__version__",
]
__version__ = "0.1.0.dev0"
