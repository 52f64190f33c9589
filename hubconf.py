"""Entry points for torch.hub.

    model = torch.hub.load("PATH/TO/trex_models", "trex_resnet50", source="local", pretrained=True)

Keyword arguments are the same as for ``timm.create_model``: ``num_classes``, ``features_only``, ...
The weights are by NAVER and licensed CC BY-NC-SA 4.0, which excludes commercial use.
"""

from trex_models.trex import (
    trex_resnet50,
    trex_resnet50_cls,
    trex_resnet50_proj,
    trexstar_resnet50,
    trexstar_resnet50_cls,
    trexstar_resnet50_proj,
)

__all__ = [
    "trex_resnet50",
    "trex_resnet50_cls",
    "trex_resnet50_proj",
    "trexstar_resnet50",
    "trexstar_resnet50_cls",
    "trexstar_resnet50_proj",
]
dependencies = ["huggingface_hub", "safetensors", "timm", "torch", "torchvision"]
