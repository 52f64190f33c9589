"""segmentation_models_pytorch on t-ReX encoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.encoders import get_preprocessing_params
from torch import Tensor, nn

import trex_models

pytestmark = [pytest.mark.client, pytest.mark.usefixtures("naver_cache")]

NAMES = timm.list_models("trex*_resnet50*")
DECODERS: dict[str, Callable[..., nn.Module]] = {
    "unet": smp.Unet,
    "deeplabv3plus at stride 8": lambda *args, **kwargs: smp.DeepLabV3Plus(
        *args, encoder_output_stride=8, **kwargs
    ),
}


def discs() -> tuple[Tensor, Tensor]:
    """Return images with a bright disc each, (2, 3, 32, 32), and its mask, (2, 1, 32, 32)."""
    generator = torch.Generator().manual_seed(0)
    across = torch.arange(32.0)
    masks = torch.stack(
        [(across[:, None] - y).hypot(across - x) < 7 for y, x in ((12, 10), (18, 22))]
    ).float()[:, None]
    return torch.rand(2, 3, 32, 32, generator=generator) + masks, masks


@pytest.mark.parametrize("name", NAMES)
def test_every_model_is_an_encoder(name: str) -> None:
    with torch.device("meta"):
        model = smp.Unet(f"tu-{name}", encoder_weights=None, classes=5)
        assert model(torch.empty(1, 3, 64, 64)).shape == (1, 5, 64, 64)
    assert model.encoder.out_channels == [3, 64, 256, 512, 1024, 2048]


@pytest.mark.parametrize("name", ["trex_resnet50", "trex_resnet50.in1k_r2"])
def test_the_encoder_has_the_weights_of_its_tag(name: str, release: Path) -> None:
    model = smp.Unet(f"tu-{name}", encoder_weights=True, decoder_channels=(8, 8, 8, 8, 8))
    file = "trex_2.pth" if name.endswith("r2") else "trex.pth"
    found, wanted = model.encoder.model.state_dict(), torch.load(release / file)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("kind", DECODERS)
def test_a_step_lowers_the_loss(kind: str) -> None:
    images, masks = discs()
    model = DECODERS[kind]("tu-trex_resnet50", encoder_weights=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    encoder: Any = model.encoder
    start = encoder.model.layer4[2].conv2.weight.detach().clone()

    losses = []
    for _ in range(2):
        torch.manual_seed(0)  # the same dropout in both
        losses.append(F.binary_cross_entropy_with_logits(model(images), masks))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[1] < 0.99 * losses[0]
    assert not torch.equal(encoder.model.layer4[2].conv2.weight, start)
    assert encoder(images)[-1].shape[-1] == (4 if "stride 8" in kind else 1)


@torch.no_grad()
def test_saved_models_reload_without_the_official_weights_and_preprocess_as_timm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _ = discs()
    model = smp.FPN("tu-trex_resnet50", encoder_weights=True).eval()
    model.save_pretrained(tmp_path / "saved")
    monkeypatch.setenv("TREX_MODELS_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    reloaded = smp.from_pretrained(tmp_path / "saved", encoder_weights=None).eval()
    assert torch.equal(reloaded(images), model(images))
    # As the documentation warns: what is saved asks for them again.
    with pytest.raises(trex_models.WeightsError, match="no weights available for trex"):
        smp.from_pretrained(tmp_path / "saved")
    cfg: Any = timm.get_pretrained_cfg("trex_resnet50")
    params = get_preprocessing_params("tu-trex_resnet50")
    assert params["mean"] == list(cfg.mean)
    assert params["std"] == list(cfg.std)
    assert (params["input_space"], params["input_range"]) == ("RGB", [0, 1])
