"""Our models in a LightningModule: the real trainer fits, saves and restores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer, seed_everything
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests.models import NUM_CLASSES, small_model

pytestmark = [
    pytest.mark.client,
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
]


class Tuner(LightningModule):  # type: ignore[misc]  # the package's types are not read
    def __init__(self) -> None:
        super().__init__()
        self.model = small_model()

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def validation_step(self, batch: list[Tensor], _index: int) -> None:
        images, labels = batch
        self.log("top1", (self.model(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return create_optimizer_v2(self.model, "adamw", lr=5e-3, layer_decay=0.9)


def colored(count: int, seed: int) -> DataLoader[tuple[Tensor, ...]]:
    """Noise whose label is its brightest channel."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % NUM_CLASSES
    images = torch.randn(count, 3, 32, 32, generator=generator)
    images[torch.arange(count), labels] += 2
    return DataLoader(TensorDataset(images, labels), batch_size=12, shuffle=seed == 0)


def trainer(folder: Path, **kwargs: object) -> Trainer:
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    options: dict[str, object] = {"accelerator": "cpu", "default_root_dir": folder, **off, **kwargs}
    return Trainer(**options)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_trains_and_restores(precision: str, tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    tuner, test = Tuner(), colored(30, 1)
    first = trainer(tmp_path, max_epochs=12, precision=precision)
    (before,) = first.validate(tuner, test, verbose=False)
    first.fit(tuner, colored(48, 0), test)
    (after,) = first.validate(tuner, test, verbose=False)
    assert after["top1"] > max(0.8, before["top1"])

    first.save_checkpoint(tmp_path / "tuned.ckpt")
    restored = Tuner.load_from_checkpoint(tmp_path / "tuned.ckpt", weights_only=True)
    for name, tensor in tuner.state_dict().items():
        torch.testing.assert_close(restored.state_dict()[name], tensor, rtol=0, atol=0)
