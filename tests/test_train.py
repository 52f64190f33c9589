"""Complete runs: train, interrupt, resume, export and reload; invalid commands and settings."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, Mock, patch

import pytest
import timm
import torch

import trex_models  # noqa: F401  # registers the models
from tests.models import load
from tests.processes import run_python
from tests.runs import assert_same_state, last_state, logged, refused, run, status_of
from trex_models.train import build, checkpointing, loop
from trex_models.train.__main__ import main
from trex_models.train.config import from_dict
from trex_models.train.recipes import RECIPES
from trex_models.train.step import training_step


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert run(folder) == 0
    return folder


def test_run_leaves_config_metrics_and_checkpoints_and_is_left_when_finished(
    finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["precision"] == "fp32"  # resolved
    assert [line["step"] for line in logged(finished)] == [2, 4, 6, 8]
    assert logged(finished)[-1]["epoch"] == 2
    times = {path.name: path.stat().st_mtime_ns for path in finished.glob("checkpoints/*")}
    assert sorted(times) == ["step_4.pt", "step_8.pt"]
    assert run(finished) == 0
    assert "finished" in capfd.readouterr().out
    again = {path.name: path.stat().st_mtime_ns for path in finished.glob("checkpoints/*")}
    assert again == times


def test_exports_reload_and_reproduce_the_method(finished: Path) -> None:
    state = last_state(finished)
    method: Any = build.build_method(from_dict(state["config"]), 4)
    method.load_state_dict(state["method"])
    method.eval()
    images = torch.randn(3, 3, 32, 32)
    backbone = load(finished / "export/backbone")
    whole = load(finished / "export/cls")
    assert type(backbone) is timm.models.ResNet
    assert backbone.num_classes == 0
    with torch.no_grad():
        features = method.encoder.backbone(images)
        torch.testing.assert_close(backbone(images), features)
        torch.testing.assert_close(
            whole.forward_features(images), backbone.forward_features(images)
        )
        logits = method.objective.logits(method.encoder.projector(features))
        torch.testing.assert_close(whole(images), logits)
    assert whole.pretrained_cfg["label_names"] == [f"fractal {c:04d}" for c in range(4)]


def test_exported_config_is_ours_not_a_stock_tags(finished: Path) -> None:
    for name, architecture in (("backbone", "resnet10t"), ("cls", "trex_resnet")):
        folder = finished / "export" / name
        config = json.loads((folder / "config.json").read_text())
        cfg = config["pretrained_cfg"]
        assert config["architecture"] == architecture
        assert "num_classes" not in config["model_args"]
        assert (cfg["crop_pct"], cfg["interpolation"]) == (1.0, "bicubic")
        assert (cfg["input_size"], cfg["first_conv"]) == ([3, 32, 32], "conv1.0")
        for key in ("license", "url", "hf_hub_id", "origin_url", "paper_ids"):
            assert not cfg.get(key)
        assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def license_of(folder: Path) -> str:
    license_: str = json.loads((folder / "config.json").read_text())["pretrained_cfg"]["license"]
    return license_


def test_owner_chooses_the_license(finished: Path, tmp_path: Path) -> None:
    """At the start, or afterwards."""
    assert run(tmp_path / "run", "--license", "mit") == 0
    for name in ("backbone", "cls"):
        assert license_of(tmp_path / "run" / "export" / name) == "mit"
    command = ["export", str(finished), "--output", str(tmp_path), "--license", "cc-by-4.0"]
    assert main(command) == 0
    assert license_of(tmp_path / "backbone") == "cc-by-4.0"


def test_backbone_exports_load_with_timm_only(finished: Path) -> None:
    code = (
        "import sys, timm, torch; "
        f"model = timm.create_model('local-dir:{finished}/export/backbone', pretrained=True); "
        "model.eval(); "
        "assert 'trex_models' not in sys.modules; print(tuple(model(torch.zeros(1,3,32,32)).shape))"
    )
    assert run_python("-c", code).stdout.strip() == "(1, 16)"


def test_interrupted_run_continues_exactly(finished: Path, tmp_path: Path) -> None:
    """Interrupt after step 6, two steps past the last checkpoint; the same command resumes."""
    step = Mock(side_effect=[*[DEFAULT] * 6, KeyboardInterrupt], wraps=training_step)
    with patch.object(loop, "training_step", step):
        assert run(tmp_path / "run") == 128 + signal.SIGINT
    assert [p.name for p in checkpointing.list_checkpoints(tmp_path / "run")] == ["step_4.pt"]
    assert logged(tmp_path / "run")[-1]["step"] == 6
    assert run(tmp_path / "run", "--system.workers", "2") == 0
    ours, theirs = last_state(tmp_path / "run"), last_state(finished)
    for part in ("method", "optimizer", "scaler", "step", "classes"):
        assert_same_state(ours[part], theirs[part], part)
    assert logged(tmp_path / "run") == logged(finished)


def test_export_of_an_unfinished_run(finished: Path, tmp_path: Path) -> None:
    assert main(["export", str(finished / "checkpoints/step_4.pt"), "--output", str(tmp_path)]) == 0
    early = load(tmp_path / "cls")
    late = load(finished / "export/cls")
    assert early.state_dict().keys() == late.state_dict().keys()
    assert not torch.equal(early.fc.weight, late.fc.weight)
    assert main(["export", str(finished), "--output", str(tmp_path / "again")]) == 0
    again = load(tmp_path / "again/cls")
    assert_same_state(dict(again.state_dict()), dict(late.state_dict()))


@pytest.mark.parametrize(
    "overrides",
    [
        ["--crops.global-crops", "2", "--crops.local-size", "32"],
        # Larger crops: torch 2.15's bfloat16 gradient of a strided convolution of a 1x1 input
        # reads uninitialized memory, on CPUs with AVX512-BF16.
        ["--precision", "bf16", "--crops.global-size", "48", "--crops.local-size", "32"],
        ["--system.no-channels-last"],
        pytest.param(["--system.compile"], marks=pytest.mark.client),
    ],
    ids=["equal sizes", "bf16", "nchw", "compile"],
)
@pytest.mark.slow
def test_variants_train_and_export(tmp_path: Path, overrides: list[str]) -> None:
    assert run(tmp_path / "run", *overrides) == 0
    assert (tmp_path / "run/export/cls/model.safetensors").exists()
    assert all(torch.tensor(line["loss"]).isfinite() for line in logged(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "args", "whole"),
    [
        ("resnet18", ["drop_path_rate=0.1"], True),
        ("regnetx_002", [], False),
        ("convnext_atto", [], False),  # its stride is 32, and it does not pad
        ("vit_tiny_patch16_224", ["patch_size=8", "depth=2"], False),
        ("mobilenetv3_small_050", [], False),  # its head is wider than num_features
    ],
)
def test_other_backbones(tmp_path: Path, backbone: str, args: list[str], whole: bool) -> None:
    """The size of a local crop differs from the global one: a ViT must take both."""
    sizes = ["--crops.global-size", "48", "--crops.local-size", "32"]
    model = ["--model.backbone", backbone, "--model.backbone-args", *args]
    assert run(tmp_path / "run", *sizes, *model) == 0
    export = tmp_path / "run" / "export"
    assert (export / "cls").exists() == whole
    reloaded = load(export / "backbone")
    features = reloaded(torch.zeros(2, 3, 48, 48))
    assert features.shape == (2, reloaded.head_hidden_size)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("--data.source folder", "--data.path is not set"),
        ("--data.source folder --data.path /absent", "/absent cannot be listed"),
        ("--optim.batch-size 33", "exceeds the dataset's 32 images"),
        ("--model.backbone resnet51", "timm has no model 'resnet51'"),
        ("--model.backbone-args depht=3", "does not accept {'depht': 3"),
        (
            "--model.backbone vit_tiny_patch16_224 --model.backbone-args dynamic_img_size=0",
            "does not accept crops of 16 pixels",
        ),
        ("--model.backbone trex_resnet50 --model.backbone-args", "trex_resnet50"),
        ("--data.path images", "use --data.source folder or csv or huggingface"),
        ("--precision fp16", "precision fp16 requires CUDA"),
        ("--system.device gpu", "not an available torch device"),
        ("--seed -1", "--seed must be at least 0"),
        ("--optim.batch-size 1", "BatchNorm requires 2"),
        ("--model.backbone hf-hub:timm/resnet18.a1_in1k", "name only the architecture"),
        ("--optim.epochs 0", "epochs must be at least 1"),
        ("--optim.name adamww", "--optim.name 'adamww' is not available; use an optimizer of timm"),
        ("--optim.name lion --optim.eps 1", "--optim.eps 1.0 is not a setting of lion; leave it"),
        ("--optim.betas 0.9 0.99", "--optim.betas (0.9, 0.99) is not a setting of sgd"),
        ("--optim.name adamw --optim.momentum 0", "--optim.momentum 0.0 is not a setting of adamw"),
        ("--optim.name adan --optim.betas 0.9 0.99", "--optim.betas of adan must be 3 numbers"),
        ("--optim.name nesterov --optim.momentum 0", "does not accept these settings (Nesterov"),
        ("--crops.local-augmentation.flip 2", "--crops.local-augmentation.flip must be finite"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: str, message: str
) -> None:
    assert status_of(run, tmp_path / "run", *overrides.split()) == 2
    err = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trexx --output x", "unknown recipe 'trexx'; choose from auto, trex, trexstar"),
        ("smoke", "--output"),
        ("smoke --output x --optim.lr 3", "--optim.lr"),
        ("smoke --output x --optim.epochs many", "many"),
        ("export /absent --output x", "/absent"),
    ],
)
def test_bad_commands(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    assert status_of(main, arguments.split()) == 2
    assert message in capsys.readouterr().err


def test_other_folders_are_not_overwritten(tmp_path: Path) -> None:
    for name, content, folder, message in (
        ("config.json", "[]", tmp_path, "is not the configuration of a run; choose another"),
        ("file", "", tmp_path / "file" / "run", "cannot be created"),
        ("thesis.txt", "precious", tmp_path, "exists, but is not the folder of a run"),
    ):
        (tmp_path / name).write_text(content)
        assert message in refused(folder)
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, content)]
        (tmp_path / name).unlink()


@pytest.mark.client
def test_help_without_docstrings() -> None:
    assert "smoke" in run_python("-OO", "-m", "trex_models.train", "--help").stdout


def test_help_lists_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in (*RECIPES, "--benchmark"))
