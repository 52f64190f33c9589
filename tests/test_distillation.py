"""Distillation of a frozen teacher: loss, statistics, complete runs, licenses and bad inputs."""

from __future__ import annotations

import io
import shutil
import signal
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from unittest.mock import DEFAULT, Mock, patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.images import save_image
from tests.models import CFG, TINY, load, save_model
from tests.processes import spawn
from tests.runs import assert_same_state, last_state, logged, output_of, refused, run, status_of
from trex_models.data.photometric import IMAGENET_MEAN, IMAGENET_STD
from trex_models.distributed import data_parallel, process_group
from trex_models.heads import Projector
from trex_models.method import Distillation, Encoder, TReX, build_optimizer
from trex_models.precision import Precision
from trex_models.pretrained import naver
from trex_models.pretrained.licenses import combine
from trex_models.train import checkpointing, loop
from trex_models.train.__main__ import parse
from trex_models.train.build import load_teacher
from trex_models.train.export import load_method
from trex_models.train.step import training_step


def channel_means(crops: Tensor) -> Tensor:
    """Teacher of four features: the means of the channels, and a constant."""
    return F.pad(crops.mean((2, 3)) * torch.tensor([1.0, 5.0, 0.1]) + 2, (0, 1), value=3.0)


def test_loss_and_targets_equal_those_computed_by_hand() -> None:
    """Of two global and three local crops; a batch uses the statistics of those before it."""
    torch.manual_seed(0)
    objective, seen = Distillation(4, channel_means), torch.empty(0, 4)
    for step in range(3):
        crops, labels = [torch.randn(10, 3, 8, 8), torch.randn(15, 3, 4, 4)], torch.zeros(5)
        mean, std = (seen.mean(0), seen.std(0, correction=0)) if step else (0.0, 1.0)
        own = (channel_means(crops[0]) - mean) / (std + 1e-6)
        targets = objective.targets(crops, labels)
        expected = torch.cat([own, *[(own[:5] + own[5:]) / 2] * 3])
        torch.testing.assert_close(targets, expected, rtol=1e-4, atol=1e-4)
        seen = torch.cat([seen, channel_means(crops[0])])

    loss, cosines = objective(z := torch.randn(25, 4), targets)
    distance = (z - targets).abs()
    smooth = torch.where(distance < 1, distance.square() / 2, distance - 0.5).mean(1)
    torch.testing.assert_close(cosines, (F.normalize(z) * F.normalize(targets)).sum(1))
    torch.testing.assert_close(loss, (0.5 * (1 - cosines) + 0.5 * smooth).mean())

    state = {name: value.clone() for name, value in objective.state_dict().items()}
    assert state.keys() == {"target_mean", "target_variance", "num_batches_tracked"}
    torch.testing.assert_close(state["target_variance"], seen.var(0, correction=0))
    objective.eval().targets(crops[0], labels)
    assert_same_state(objective.state_dict(), state)
    objective.num_batches_tracked.fill_(5000)  # the momentum does not fall below 0.001
    objective.train().targets(crops[0] + 1, labels)
    moved = 0.999 * seen.mean(0) + 0.001 * channel_means(crops[0] + 1).mean(0)
    torch.testing.assert_close(objective.target_mean, moved)
    assert not [*Distillation(4, nn.Linear(12, 4)).children()]


def test_the_teacher_receives_its_own_normalization(folder: Path) -> None:
    config = parse("smoke", ["--output", "x", *options(folder)])
    pixels, teacher = torch.rand(2, 3, 32, 32), load_teacher(config, torch.device("cpu"))
    assert teacher is not None
    mean, std = (torch.tensor(row)[:, None, None] for row in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        expected = load(folder / "teacher")((pixels - 0.5) / 0.5)
        torch.testing.assert_close(teacher((pixels - mean) / std), expected)
        larger = replace(config, objective=replace(config.objective, teacher_size=48))
        teacher = load_teacher(larger, torch.device("cpu"))
        assert teacher is not None
        resized = F.interpolate(pixels, (48, 48), mode="bicubic", antialias=True)
        expected = load(folder / "teacher")((resized - 0.5) / 0.5)
        torch.testing.assert_close(teacher((pixels - mean) / std), expected, rtol=1e-4, atol=1e-5)


def train(_: Path) -> dict[str, Tensor]:
    """Train a network without BatchNorm for three steps, on this process's part of 8 images."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    method = TReX(Encoder(backbone, Projector(6, 0, 1, 4)), Distillation(4, channel_means))
    with process_group("cpu") as process:
        model = data_parallel(method, process, sync_batchnorm=False)
        parts = model, method, build_optimizer(method), Precision.from_name("fp32", "cpu")
        for _step in range(3):
            images = torch.randn(8, 3, 9, 9)[process.rank :: process.world_size]
            labels = torch.zeros(len(images), dtype=torch.int64)
            training_step(*parts, [images, images[..., :5, :5]], labels, labels, 0.5)
    return dict(method.state_dict())


def test_two_processes_equal_one(tmp_path: Path) -> None:
    for state in spawn(train, 2, tmp_path):
        torch.testing.assert_close(state, train(tmp_path))


LONG = """--optim.epochs 40 --optim.batch-size 32 --optim.base-lr 2 --model.hidden-dim 64
    --crops.local-crops 1 --crops.global-scale 0.6 1 --system.log-every 5 --system.save-steps 10"""


def options(folder: Path, teacher: str = "teacher", more: str = "") -> list[str]:
    data = f"--data.source images --data.path {folder}/images"
    return f"--objective.name distill --objective.teacher {folder}/{teacher} {data} {more}".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distillation")
    for index in range(32):
        save_image(folder / "images" / "abc"[: index % 4] / f"{index}.png", seed=index)
    for seed, (name, stated) in enumerate([("teacher", "mit"), ("naver", naver.LICENSE)]):
        cfg = CFG | {"license": stated}
        save_model(folder / name, "resnet10t", cfg, seed, num_classes=0, **TINY)
    small = {"img_size": 48, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 0}
    save_model(folder / "vit", "vit_tiny_patch16_224", CFG | {"input_size": (3, 48, 48)}, **small)
    (folder / "out").write_text(output_of(folder / "run", *options(folder, more=LONG)))
    return folder


def test_a_student_learns_the_features_of_its_teacher(folder: Path) -> None:
    path, out = folder / "run", (folder / "out").read_text()
    first = f"opening {folder / 'images'}\n32 images of an unlabeled folder; resnet10t"
    assert out.startswith(first)
    assert f"\nteacher: {folder / 'teacher'}, license of derived weights: mit\n" in out
    lines = logged(path)
    assert lines[-1].keys() == {"step", "epoch", "loss", "cosine", "learning_rate"}
    assert f"training: loss {lines[-1]['loss']:.4g}, cosine {lines[-1]['cosine']:.3f} (" in out
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert lines[-1]["cosine"] > 0.5 > 0.2 > lines[0]["cosine"]

    method, state = load_method(path)
    assert (state["config"]["model"]["embedding_dim"], state["classes"]) == (32, ["images"])
    images = torch.randn(2, 3, 32, 32)
    backbone, whole = (load(path / "export" / name) for name in ("backbone", "proj"))
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), method.eval().encoder.backbone(images))
        torch.testing.assert_close(whole(images), method.encoder(images))
    assert whole.pretrained_cfg["license"] == "mit"
    assert "label_names" not in whole.pretrained_cfg


def test_a_run_resumes_exactly_with_the_same_teacher_only(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    step = Mock(side_effect=[*[DEFAULT] * 33, KeyboardInterrupt], wraps=training_step)
    with patch.object(loop, "training_step", step):
        assert run(path, *options(folder, more=LONG)) == 128 + signal.SIGINT
    error = refused(path, *options(folder, "naver", LONG))
    assert "step_30.pt was saved with different weights of the teacher; restore those" in error
    shutil.copytree(folder / "teacher", folder / "moved")  # the path may change
    assert run(path, *options(folder, "moved", LONG)) == 0
    for part in ("method", "optimizer", "step", "teacher", "inherited_license"):
        assert_same_state(last_state(path)[part], last_state(folder / "run")[part], part)
    assert logged(path) == logged(folder / "run")


def test_licenses_of_teacher_and_weights_are_inherited(folder: Path, tmp_path: Path) -> None:
    assert combine("mit", "not stated", "", "apache-2.0") == "mit and apache-2.0"
    assert combine("mit", naver.LICENSE) == naver.LICENSE
    path, command = tmp_path / "run", options(folder, "naver", "--optim.epochs 1")
    error = refused(path, *command, "--license", "mit")
    assert f"license cannot be mit: the run uses weights under {naver.LICENSE}" in error
    command += ["--init-from", str(folder / "run"), "--model.hidden-dim", "64"]
    out = output_of(path, *command)
    assert "  projector: restored\n  classifier weights and memory bank: not used (" in out
    checkpointing.list_checkpoints(path)[-1].unlink()  # the run is then resumed from the start
    for text in (out, output_of(path, *command)):
        assert f"{folder / 'naver'}, license of derived weights: {naver.LICENSE}\n" in text
        assert load(path / "export/proj").pretrained_cfg["license"] == naver.LICENSE


def test_labels_only_serve_validation_by_nearest_neighbors(folder: Path, tmp_path: Path) -> None:
    command = [*options(folder)[:4], "--optim.epochs", "1", "--validation.neighbors", "3"]
    out, last = output_of(tmp_path / "run", *command), logged(tmp_path / "run")[-1]
    assert last.keys() == {"step", "epoch", "loss", "cosine", "learning_rate"} | {
        "val_knn",
        "val_rank",
    }
    assert f"validation: k-NN {last['val_knn']:.1%} (best " in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("--objective.teacher resnet50x", "--objective.teacher: resnet50x is not a timm model; "),
        ("--objective.teacher FOLDER/vit", "does not accept crops of 32 pixels (.*teacher-size 48"),
        ("--objective.teacher=", "--objective.teacher must be set for --objective.name distill"),
        ("--objective.name ocm", "only for it, got 'FOLDER/teacher' for ocm; set both to distill"),
        ("--objective.name ocm --objective.teacher=", "--data.source images has no labels, as"),
        ("--validation.neighbors 3", "--data.source images has no labels, as"),
        ("--data.path FOLDER/vit", "FOLDER/vit contains no images; pass another folder"),
        ("--model.projector none", "backbone resnet10t has 16 features, the teacher 32, which"),
    ],
)
def test_bad_inputs_are_one_line(changes: str, message: str, folder: Path, tmp_path: Path) -> None:
    more = changes.replace("FOLDER", str(folder)).split()
    with redirect_stderr(io.StringIO()) as errors:
        assert status_of(run, tmp_path / "run", *options(folder), *more) == 2
    (line,) = errors.getvalue().splitlines()
    assert all(part in line for part in message.replace("FOLDER", str(folder)).split(".*"))
    assert not (tmp_path / "run").exists()
