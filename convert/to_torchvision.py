"""Export of a timm ResNet to a state dict of torchvision's ResNet.

timm's standard ResNets have the same keys as torchvision's. Equal outputs in float64 then prove
that stem, strides and pooling match, too.
"""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from convert.comparison import Difference, difference
from trex_models.atomic import write_safetensors

SUFFIXES = (".pth", ".safetensors")
# Number of blocks of each stage, which avoids building most of the candidates.
ARCHITECTURES = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
    "resnext50_32x4d": (3, 4, 6, 3),
    "resnext101_32x8d": (3, 4, 23, 3),
    "resnext101_64x4d": (3, 4, 23, 3),
    "wide_resnet50_2": (3, 4, 6, 3),
    "wide_resnet101_2": (3, 4, 23, 3),
}
TOLERANCE = 1e-9


def architecture(name: str, model: nn.Module, output: str) -> str:
    """Return the name of the torchvision model that has a model's keys and shapes.

    Raises:
        ValueError: No torchvision model matches.
    """
    if output == "embeddings" or (
        output == "logits" and {"projector", "cosine classifier"} & set(_parts(model))
    ):
        raise ValueError(
            f"{name} has a {' and a '.join(_parts(model))}, which torchvision's ResNet does not "
            "support; export only the backbone, --features backbone, or use --to onnx"
        )
    shapes = _shapes(model)
    stages = (getattr(model, f"layer{stage}", ()) for stage in range(1, 5))
    blocks = tuple(len(stage) for stage in stages)
    for candidate, candidate_blocks in ARCHITECTURES.items():
        if blocks == candidate_blocks and _shapes(_build(candidate)) == shapes:
            return candidate
    raise ValueError(
        f"{name} does not match any of torchvision's ResNets ({', '.join(ARCHITECTURES)}): "
        f"{_difference(shapes)}; use --to onnx"
    )


def _parts(model: nn.Module) -> list[str]:
    """Return the names of the modules after the pooled features."""
    kinds = {"Projector": "projector", "CosineClassifier": "cosine classifier"}
    classes = [type(module).__name__ for module in model.children()]
    return [name for kind, name in kinds.items() if kind in classes]


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of all tensors except the classifier's."""
    return {k: v.shape for k, v in model.state_dict().items() if not k.startswith("fc.")}


def _build(name: str, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):  # allocates no memory
        return torchvision.models.get_model(name, **kwargs)


def _difference(shapes: dict[str, torch.Size]) -> str:
    known = {_pattern(key) for key in _shapes(_build("resnet50"))}
    unknown = [key for key in shapes if _pattern(key) not in known]
    if unknown:
        return f"they have no {unknown[0]}"
    channels = shapes["conv1.weight"][1]
    if channels != 3:
        return f"it has {channels} input channels instead of 3"
    return "its blocks differ in number, type or width"


def _pattern(key: str) -> str:
    return re.sub(r"\d+\.\d+", "N", key, count=1) if key.startswith("layer") else key


def serialize(model: nn.Module, suffix: str, metadata: dict[str, Any]) -> bytes:
    """Return the bytes of a state-dict file; ``metadata`` is only stored in safetensors files."""
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    stream = io.BytesIO()
    if suffix == ".safetensors":
        # Other readers of safetensors files require the entry "format".
        write_safetensors(stream, state, {"format": "pt", **metadata})
    else:
        torch.save(state, stream)
    return stream.getvalue()


@torch.no_grad()
def compare_torchvision(
    data: bytes, suffix: str, name: str, model: nn.Module, batches: Iterable[Tensor]
) -> list[Difference]:
    """Load a state dict strictly into torchvision's model and compare it with the source.

    Both compute in float64 and in eval mode.
    """
    state = (
        safetensors.torch.load(data)
        if suffix == ".safetensors"
        else torch.load(io.BytesIO(data), weights_only=True)
    )
    loaded = _build(name, **({"num_classes": len(state["fc.bias"])} if "fc.bias" in state else {}))
    if "fc.bias" not in state:
        loaded.fc = nn.Identity()
    loaded.load_state_dict(state, assign=True)
    loaded = loaded.eval().double()
    source = copy.deepcopy(model).double()
    return [
        difference(images, loaded(images.double()), source(images.double()), TOLERANCE)
        for images in batches
    ]


def usage(path: Path, name: str, classes: int) -> str:
    """Return the Python code that loads a file."""
    load = (
        "safetensors.torch.load_file" if path.suffix == ".safetensors" else "torch.load"
    ) + f'("{path.name}")'
    if classes:
        lines = [f"model = torchvision.models.{name}(num_classes={classes})"]
    else:
        lines = [f"model = torchvision.models.{name}()", "model.fc = torch.nn.Identity()"]
    return "\n".join([*lines, f"model.load_state_dict({load})", "model.eval()"])
