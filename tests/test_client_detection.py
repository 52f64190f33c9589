"""torchvision's detectors on t-ReX backbones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import freeze_batch_norm_2d
from timm.utils import freeze
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import trex_models  # noqa: F401  # registers the models

pytestmark = [pytest.mark.client, pytest.mark.usefixtures("naver_cache")]

NAMES = timm.list_models("trex*_resnet50*")
STAGES = {"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"}
CHANNELS = [256, 512, 1024, 2048]
SIZE = 64
SMALL = {"num_classes": 2, "min_size": SIZE, "max_size": SIZE}
FEW_BOXES = {
    "rpn_post_nms_top_n_train": 32,
    "rpn_post_nms_top_n_test": 16,
    "box_batch_size_per_image": 8,
}


def body() -> Any:
    """Return the backbone as detection has it: BatchNorm frozen, stem and first stage too."""
    model = freeze_batch_norm_2d(timm.create_model("trex_resnet50", pretrained=True))
    freeze(model, ["conv1", "layer1"])
    return model


def mask_rcnn() -> nn.Module:
    return MaskRCNN(BackboneWithFPN(body(), STAGES, CHANNELS, 256), **SMALL, **FEW_BOXES)


def retina_net() -> nn.Module:
    stages = {"layer2": "0", "layer3": "1", "layer4": "2"}
    fpn = BackboneWithFPN(body(), stages, CHANNELS[1:], 256, LastLevelP6P7(256, 256))
    return RetinaNet(fpn, **SMALL, score_thresh=0.0)


def squares() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return images with a bright square each, (3, 64, 64), and torchvision's targets for them."""
    generator = torch.Generator().manual_seed(0)
    images, targets = [], []
    for left, top in ((8, 16), (24, 20)):
        mask = torch.zeros(1, SIZE, SIZE, dtype=torch.uint8)
        mask[:, top : top + 32, left : left + 32] = 1
        images.append(0.2 * torch.rand(3, SIZE, SIZE, generator=generator) + 0.8 * mask)
        box = torch.tensor([[left, top, left + 32, top + 32]], dtype=torch.float32)
        targets.append({"boxes": box, "labels": torch.tensor([1]), "masks": mask})
    return images, targets


@pytest.mark.parametrize("name", NAMES)
def test_every_model_is_a_backbone(name: str) -> None:
    with torch.device("meta"):
        backbone = BackboneWithFPN(timm.create_model(name), STAGES, CHANNELS, 256)
        maps = backbone(torch.empty(1, 3, SIZE, SIZE))
    assert {key: tuple(m.shape) for key, m in maps.items()} == {
        key: (1, 256, side, side)
        for key, side in {"0": 16, "1": 8, "2": 4, "3": 2, "pool": 1}.items()
    }


@torch.no_grad()
def test_the_pyramid_uses_the_pretrained_features() -> None:
    images = torch.stack(squares()[0])
    backbone = BackboneWithFPN(body(), STAGES, CHANNELS, 256)
    stock = timm.create_model(
        "trex_resnet50", pretrained=True, features_only=True, out_indices=(1, 2, 3, 4)
    ).eval()
    # Frozen, BatchNorm is the same in train mode, whatever the batch.
    for found, wanted in zip(backbone.body(images).values(), stock(images), strict=True):
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    frozen = [m for m in backbone.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(frozen) == 53
    assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())


@pytest.mark.parametrize("make", [mask_rcnn, retina_net])
def test_training_lowers_the_loss_and_evaluation_gives_boxes(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    detector = make()
    cfg: Any = timm.get_pretrained_cfg("trex_resnet50")
    assert detector.transform.image_mean == list(cfg.mean)
    assert detector.transform.image_std == list(cfg.std)

    images, targets = squares()
    start = {k: v.clone() for k, v in detector.backbone.body.state_dict().items()}
    trained = [p for p in detector.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.02)
    losses = []
    for _ in range(2):
        torch.manual_seed(0)  # the same choice of boxes, as far as they are the same
        losses.append(sum(detector(images, targets).values()))
        optimizer.zero_grad()
        losses[-1].backward()
        nn.utils.clip_grad_norm_(trained, 1.0)  # random features are large
        optimizer.step()
    assert losses[1] < 0.95 * losses[0], losses
    now = detector.backbone.body.state_dict()
    moved = {k.partition(".")[0] for k in now if not torch.equal(now[k], start[k])}
    assert moved == {"layer2", "layer3", "layer4"}

    detector.eval()
    with torch.no_grad():
        found = detector(images)
    for result in found:
        assert len(result["boxes"]) == len(result["scores"]) > 0
        assert result["boxes"].min() >= 0
        assert result["boxes"].max() <= SIZE
        assert ("masks" in result) == (make is mask_rcnn)
