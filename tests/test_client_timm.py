"""timm's own training script and our models, in the order of the script.

timm does not ship train.py and validate.py in its packages. TIMM_SCRIPTS=DIR names a folder that
holds them, and the real scripts run too.
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver, ModelEmaV3, accuracy
from torch import Tensor, nn

from tests.images import save_colors
from tests.models import NUM_CLASSES, SMALL, quick
from tests.processes import run_python

pytestmark = pytest.mark.client

ROOT = Path(__file__).parents[1]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Folders train and val of class folders, a class a color."""
    for split, count in (("train", 16), ("val", 10)):
        save_colors(tmp_path / "images" / split, count, 48)
    return tmp_path / "images"


def loaders(images: Path, model: nn.Module) -> tuple[Any, Any]:
    config = resolve_data_config({"input_size": (3, 32, 32)}, model=model)
    train, test = (
        create_loader(
            create_dataset("", root=str(images), split=split, is_training=split == "train"),
            batch_size=8,
            is_training=split == "train",
            use_prefetcher=False,
            num_workers=0,
            scale=(0.5, 1.0),
            color_jitter=0.0,  # the color is the class
            **config,
        )
        for split in ("train", "val")
    )
    return train, test


def logits(model: nn.Module, loader: Any) -> tuple[Tensor, Tensor]:
    model.eval()
    with torch.inference_mode():
        pairs = [(model(pixels), labels) for pixels, labels in loader]
    return torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])


def create(**kwargs: Any) -> nn.Module:
    """Build as the script does from --model trex_resnet --model-kwargs backbone=resnet10t ..."""
    none = "drop_path_rate drop_block_rate global_pool bn_momentum bn_eps".split()
    given = {"in_chans": 3, "drop_rate": 0.0, "scriptable": False, **dict.fromkeys(none), **kwargs}
    model: nn.Module = timm.create_model("trex_resnet", num_classes=NUM_CLASSES, **given, **SMALL)
    return model


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's reader
def test_calls_of_the_script_learn_resume_and_validate(images: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = quick(create(checkpoint_path=""))
    train, test = loaders(images, model)
    optimizer = create_optimizer_v2(model, "adamw", lr=5e-3, weight_decay=0.05, layer_decay=0.9)
    average = ModelEmaV3(model, decay=0.5)
    task = ClassificationTask(model, criterion_kwargs={"smoothing": 0.1})
    epochs = 12
    scheduler, total = create_scheduler_v2(
        optimizer, num_epochs=epochs, warmup_epochs=1, warmup_lr=1e-3, updates_per_epoch=len(train)
    )
    assert total == epochs
    folders = {"checkpoint_dir": str(tmp_path), "recovery_dir": str(tmp_path)}
    saver = CheckpointSaver(model, optimizer, model_ema=average, **folders)
    for epoch in range(epochs):
        for pixels, labels in train:
            task.train()
            task(pixels, labels)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update(model)
        top1 = accuracy(*logits(model, test))[0].item()
        saver.save_checkpoint(epoch, metric=top1)
        scheduler.step(epoch + 1, top1)
    expected, labels = logits(model, test)
    assert accuracy(expected, labels)[0] > 80
    rates = sorted({group["lr"] / group["lr_scale"] for group in optimizer.param_groups})
    assert rates[-1] == pytest.approx(rates[0])  # the schedule keeps the ratios of the layers

    # validate.py reads what was saved, and so does train.py --resume and --initial-checkpoint.
    last = str(tmp_path / "last.pth.tar")
    validated = create()
    load_checkpoint(validated, last, use_ema=False)
    torch.testing.assert_close(logits(validated, test)[0], expected, rtol=0, atol=0)
    averaged = create()
    load_checkpoint(averaged, last, use_ema=True)
    torch.testing.assert_close(
        logits(averaged, test)[0], logits(average.module, test)[0], rtol=0, atol=0
    )
    resumed = create()
    fresh = create_optimizer_v2(resumed, "adamw", lr=5e-3, weight_decay=0.05, layer_decay=0.9)
    assert resume_checkpoint(resumed, last, fresh, log_info=False) == epochs
    torch.testing.assert_close(logits(resumed, test)[0], expected, rtol=0, atol=0)
    assert fresh.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
    initial = create(checkpoint_path=last)
    torch.testing.assert_close(logits(initial, test)[0], logits(averaged, test)[0])


@pytest.mark.parametrize(
    ("name", "file"),
    [("trex_resnet50", "trex_2.pth"), ("trex_resnet50_proj", "trex_2_checkpoint_full.pth")],
)
def test_pretrained_path_takes_official_files(name: str, file: str, release: Path) -> None:
    # What the script makes of --pretrained --pretrained-path FILE --num-classes 5.
    overlay = {"file": str(release / file), "num_classes": -1}
    model: Any = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5
    )
    backbone = torch.load(release / "trex_2.pth")
    torch.testing.assert_close(model.layer4[2].conv3.weight.data, backbone["layer4.2.conv3.weight"])
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.skipif("TIMM_SCRIPTS" not in os.environ, reason="TIMM_SCRIPTS names no folder")
def test_the_real_scripts_train_and_validate(images: Path, tmp_path: Path) -> None:
    scripts = Path(os.environ["TIMM_SCRIPTS"])
    small = [f"{key}={value}" for key, value in SMALL.items()]
    shared = ["--device-modules", "trex_models", "--model", "trex_resnet", "--device", "cpu"]
    shared += ["--data-dir", str(images), "--num-classes", str(NUM_CLASSES)]
    shared += ["--batch-size", "8", "--workers", "0", "--img-size", "32"]

    def call(script: str, *arguments: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [scripts / script, *shared, *arguments, "--model-kwargs", *small]
        run_python(*command, env=environment)

    output = ["--output", str(tmp_path), "--experiment", "run"]
    rates = ["--opt", "adamw", "--lr", "0.005", "--layer-decay", "0.9", "--warmup-epochs", "1"]
    call("train.py", *output, *rates, "--epochs", "20", "--no-prefetcher")
    with (tmp_path / "run" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["eval_top1"]) > 80
    found = tmp_path / "validated.json"
    last = str(tmp_path / "run" / "last.pth.tar")
    call(
        "validate.py", "--checkpoint", last, "--results-file", str(found),
        "--results-format", "json", "--no-prefetcher",
    )  # fmt: skip
    assert json.loads(found.read_text())["top1"] == pytest.approx(
        float(rows[-1]["eval_top1"]), abs=0.01
    )
