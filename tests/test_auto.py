"""The recipe auto: its choices, their reasons, and the configuration that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.images import save_classes
from tests.runs import assert_same_state, last_state, status_of
from trex_models.data.sources import ArraySource
from trex_models.train import build
from trex_models.train.__main__ import main
from trex_models.train.auto import Facts, choose
from trex_models.train.config import flatten, from_dict, load_config, to_json
from trex_models.train.recipes import RECIPES

SMALL_NET = [
    *("--model.backbone", "resnet10t", "--model.backbone-args", "channels=(8,8,16,16)"),
    *("--model.hidden-dim", "16", "--model.embedding-dim", "8", "--system.workers", "0"),
]


def chosen(
    monkeypatch: pytest.MonkeyPatch, facts: Facts, *options: str, **fields: Any
) -> tuple[dict[str, Any], list[str]]:
    """Return the chosen settings by dotted name, and the log."""
    monkeypatch.setattr(build, "open_source", lambda _: None)
    monkeypatch.setattr(Facts, "of", lambda *_: facts)
    config, lines = RECIPES["auto"](""), list[str]()
    settings = json.loads(to_json(config))
    for field, value in fields.items():
        section, _, name = field.partition("__")
        settings[section][name] = value
    config = choose(from_dict(settings), options, lines.append)
    return flatten(json.loads(to_json(config))), lines


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (
            Facts(images=1_500, classes=50, side=64),
            {"crops.global_size": 64, "crops.local_size": 32, "crops.local_crops": 0}
            | {"optim.batch_size": 32, "optim.epochs": 100, "optim.warmup_epochs": 5}
            | {"objective.name": "softmax", "model.projector": "none"}
            | {"optim.name": "adamw", "optim.base_lr": 0.016},
        ),
        (
            Facts(images=1_600, classes=50, side=64, memory=24 * 10**9),
            {"optim.batch_size": 32, "optim.epochs": 300, "objective.name": "softmax"},
        ),
        (Facts(images=20, classes=2, side=64, processes=3), {"optim.batch_size": 18}),
        (
            Facts(images=6_000, classes=50, side=48),
            {"crops.global_size": 32, "crops.local_size": 16, "crops.local_crops": 0}
            | {"optim.batch_size": 128, "objective.name": "softmax"},
        ),
        (
            Facts(images=50_000, classes=500, side=500, memory=24 * 10**9),
            {"crops.global_size": 224, "crops.local_size": 96, "crops.local_crops": 8}
            | {"optim.batch_size": 128, "optim.epochs": 225, "optim.base_lr": 0.4}
            | {"objective.name": "cosine", "model.hidden_layers": 1},
        ),
        (
            Facts(images=1_281_167, classes=1000, side=400, memory=80 * 10**9, processes=3),
            {"optim.batch_size": 258, "optim.epochs": 100, "objective.name": "ocm"}
            | {"objective.bank_size": 8000, "objective.ema_momentum": 0.999}
            | {"model.hidden_layers": 3},
        ),
    ],
)
def test_choices_follow_from_the_images_and_the_machine(
    monkeypatch: pytest.MonkeyPatch, facts: Facts, expected: dict[str, Any]
) -> None:
    settings, lines = chosen(monkeypatch, facts)
    assert settings.items() >= expected.items()
    for field, value in expected.items():
        [line] = [line for line in lines if f"--{field.replace('_', '-')} {value}: " in line]
        assert len(line.partition(": ")[2]) > 2
    assert lines[-1] == ("  --crops.local-augmentation.flip 0.5: set 0 for text, signs or anatomy")


def test_options_are_kept_and_later_choices_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = Facts(images=1_600, classes=50, side=64)
    options = ("--crops.global-size", "32", "--optim.epochs=20", "--objective.name", "ocm")
    fields = {"crops__global_size": 32, "optim__epochs": 20, "objective__name": "ocm"}
    settings, lines = chosen(monkeypatch, facts, *options, **fields)
    assert settings["crops.local_size"] == 16
    assert settings["optim.warmup_epochs"] == 1
    assert settings["objective.bank_size"] == 400
    assert settings["objective.ema_momentum"] == 0.95  # 1 / 50 of 20 x 50 steps
    assert "  --optim.epochs 20: as given" in lines


@pytest.mark.parametrize("backbone", ["convnext_atto", "vit_tiny_patch16_224"])
def test_networks_without_batchnorm_get_adamw(
    monkeypatch: pytest.MonkeyPatch, backbone: str
) -> None:
    facts = Facts(images=5_000, classes=50, side=300, memory=80 * 10**9)
    settings, lines = chosen(monkeypatch, facts, model__backbone=backbone)
    assert settings["optim.name"] == "adamw"
    assert settings["optim.base_lr"] * settings["optim.batch_size"] / 256 == 5e-4
    assert "  --optim.name adamw: for a network without BatchNorm" in lines


def test_side_is_the_median_of_the_shorter_sides() -> None:
    images = [np.zeros((20 + i, 90, 3), np.uint8) for i in range(201)]
    facts = Facts.of(ArraySource(images, [0] * 201, "a"), RECIPES["auto"](""))
    assert facts == Facts(images=201, classes=1, side=90)


def test_a_run_can_be_repeated_from_its_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, (first, second) = (
        save_classes(tmp_path / "images", 20),
        (tmp_path / "1", tmp_path / "2"),
    )
    command = ["--data.path", str(images), "--optim.epochs", "1", "--optim.batch-size", "8"]
    assert main(["auto", *command, *SMALL_NET, "--output", str(first)]) == 0
    printed = capsys.readouterr().out
    assert "auto: 40 images of 2 classes, 30 pixels\n  --crops.global-size 32: " in printed
    assert "  --optim.batch-size 8: as given" in printed
    saved = first / "config.json"
    assert load_config(saved).crops.local_size == 16
    assert main([str(saved), "--output", str(second)]) == 0
    assert_same_state(last_state(first)["method"], last_state(second)["method"])
    assert main(["auto", *command, *SMALL_NET, "--output", str(first)]) == 0  # resumes
    assert "the run is finished" in capsys.readouterr().out


def test_unreadable_images_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = save_classes(tmp_path / "images", 10)
    (images / "a/0.jpg").write_bytes(b"damaged")
    command = ["auto", "--data.path", str(images), "--output", str(tmp_path / "run"), *SMALL_NET]
    command += ["--optim.epochs", "1", "--optim.batch-size", "8"]
    assert main(command) == 2
    assert "a/0.jpg cannot be read as an image" in capsys.readouterr().err
    options = ["--data.unreadable", "skip", "--data.max-unreadable", "0.1"]
    assert main([*command, *options]) == 0
    assert "auto: 20 images of 2 classes, 30 pixels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["auto"], "--data.path is not set; pass a folder of class folders"),
        (["auto", "--data.path", "{}/missing"], "missing cannot be listed"),
        (["auto", "--data.path", "{}/images", "--model.backbone", "resnet1O"], "timm has no model"),
        (["auto", "--data.path", "{}/images", "--optim.name", "lambb", *SMALL_NET], "such as lamb"),
        (
            ["auto", "--data.path", "{}/images", "--optim.name", "lamb", *SMALL_NET],
            "auto knows no learning rate for lamb; set --optim.base-lr, too",
        ),
        (["{}/config.json"], "config.json is not the config.json of a run (Expecting property"),
        (["{}/none.json"], "none.json is not the config.json of a run ([Errno 2] No such file"),
        (["{}/old.json"], "unknown field speed); pass another"),
        (["automatic"], "choose from auto, trex, "),
    ],
)
def test_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    save_classes(tmp_path / "images", 2)
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "old.json").write_text('{"output": "x", "speed": 1}')
    command = [text.format(tmp_path) for text in arguments]
    assert status_of(main, [*command, "--output", str(tmp_path / "run")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()
