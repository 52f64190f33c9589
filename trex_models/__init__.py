"""t-ReX and t-ReX* ResNet-50s (Sariyildiz et al., ICLR 2023) as timm models.

Importing this package registers the models with timm:

    import timm, trex_models
    model = timm.create_model("trex_resnet50", pretrained=True)
"""

try:
    import torchvision as _torchvision  # noqa: F401  # timm needs it; a mismatch gives odd errors
except ModuleNotFoundError:
    raise
except (ImportError, OSError, RuntimeError) as _error:
    from importlib.metadata import version as _version

    # With this name, ``python -m trex_models.train`` prints one line instead of a traceback.
    raise ImportError(
        f"torch {_version('torch')} and the installed torchvision are not compatible ({_error}); "
        "install both from the same index: pip install --force-reinstall torch torchvision",
        name=__name__,
    ) from _error

from trex_models.heads import CosineClassifier, Projector
from trex_models.pretrained.checkpoints import CheckpointError
from trex_models.pretrained.manifest import WeightsError
from trex_models.trex import TRexResNet

__all__ = [
    "CheckpointError",
    "CosineClassifier",
    "Projector",
    "TRexResNet",
    "WeightsError",
    "__version__",
]
__version__ = "0.1.0"
