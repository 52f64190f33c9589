"""The comparison of fine-tuning with training from scratch."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from torch import nn

from benchmarks import fine_tuning
from benchmarks.fine_tuning import Images
from trex_models.data.samples import photographs

CFG = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
CHANNELS: dict[str, Any] = {"channels": (16, 32, 48, 64)}


@cache
def patches() -> tuple[Images, Images]:
    """20 training and 10 test patches of each of 20 photographs."""
    train, test = (Images.of(source, CFG) for source in photographs(32, 20, 10))
    return train, test


def export(model: nn.Module, run: Path) -> Path:
    backbone = run / "export" / "backbone"
    save_for_hf(model, str(backbone), model_args=CHANNELS, safe_serialization=True)
    return backbone


def new_model(num_classes: int) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("resnet10t", num_classes=num_classes, **CHANNELS)
    return model


@pytest.mark.client
def test_weights_that_know_such_images_beat_none_on_few(tmp_path: Path) -> None:
    train, test = patches()
    model = new_model(20)
    fine_tuning.learn(model, train, test, rate=3e-3, steps=150, every=150, seed=0)
    model.reset_classifier(0)  # type: ignore[operator]
    result = fine_tuning.compare(
        export(model, tmp_path),
        fine_tuning.task("photographs", 6, CFG),
        steps=20,
        every=10,
        seeds=3,
        rates=(1e-3, 3e-3),
    )
    for start in fine_tuning.STARTS:
        assert result[start]["rate"] in (1e-3, 3e-3)
        curves = result[start]["curves"]
        assert [len(curve) for curve in curves] == [3, 3, 3]  # steps 0, 10 and 20
        assert curves[0] != curves[1]
    assert result["gain"]["interval"][0] > 0
    assert result["gain"]["mean"] > 0.05


def test_both_starts_share_the_network_and_not_the_weights(tmp_path: Path) -> None:
    model = new_model(0)
    backbone = export(model, tmp_path)
    known = model.state_dict()["layer3.0.conv1.weight"]
    ours, theirs, same = (
        fine_tuning.build(backbone, start, 5, seed).state_dict()
        for start, seed in (("pretrained", 1), ("scratch", 1), ("scratch", 1))
    )
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert torch.equal(ours["layer3.0.conv1.weight"], known)
    assert not torch.equal(theirs["layer3.0.conv1.weight"], known)
    assert all(torch.equal(theirs[name], same[name]) for name in theirs)


@pytest.mark.parametrize(("name", "fitted", "held_out"), [("digits", 4, 2), ("photographs", 6, 30)])
def test_images_for_rate_selection_are_not_used_elsewhere(
    name: str, fitted: int, held_out: int
) -> None:
    task = fine_tuning.task(name, 6, CFG)
    classes = len(task.test.labels.unique())
    assert task.train.labels.bincount().tolist() == [6] * classes
    assert task.fitted.labels.bincount().tolist() == [fitted] * classes
    assert task.held_out.labels.bincount().tolist() == [held_out] * classes
    for other in (task.fitted, task.test):
        distances = torch.cdist(other.pixels.flatten(1), task.held_out.pixels.flatten(1))
        assert distances.min() > 0


def test_the_command_writes_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(new_model(0), tmp_path / "run")
    paths = ["--run", str(tmp_path / "run"), "--output", str(tmp_path / "out")]
    small = ["--steps", "2", "--seeds", "2", "--tasks", "digits:3"]
    assert fine_tuning.main([*paths, *small]) == 0
    record = json.loads((tmp_path / "out" / "fine_tuning.json").read_text())
    assert record["steps"] == [0, 1, 2]
    assert (record["results"][0]["task"], record["results"][0]["per_class"]) == ("digits", 3)
    out = capsys.readouterr().out
    gain = record["results"][0]["gain"]
    assert f"{100 * gain['mean']:+.1f}" in out
    with Image.open(tmp_path / "out" / "fine_tuning.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "is not an exported backbone; pass a finished"),
        (["--seeds", "1"], "--seeds must be at least 2, got 1"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--tasks", "digits:9", "photographs:61"], "photographs:60, got photographs:61"),
        (["--tasks", "letters:9"], "--tasks must be digits:3 to digits:110 or "),
    ],
)
def test_wrong_arguments_are_reported_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = ["--run", str(tmp_path), "--output", str(tmp_path / "out")]
    assert fine_tuning.main([*paths, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
