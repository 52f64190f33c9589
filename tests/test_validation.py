"""Validation: exact on any number of processes, and without effect on training."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.optim.swa_utils import update_bn
from torchvision import transforms

from tests.images import picture, save_classes
from tests.models import TinyBackbone
from tests.processes import spawn
from tests.runs import assert_same_state, last_state, logged, output_of, refused, run
from trex_models.data.image_files import FolderSource
from trex_models.data.sources import ArraySource, Source
from trex_models.distributed import Process, process_group
from trex_models.evaluation.knn import knn_votes
from trex_models.heads import Projector
from trex_models.method.bank import MemoryBank
from trex_models.method.model import Encoder, TReX
from trex_models.method.objectives import OnlineClassMeans
from trex_models.precision import Precision
from trex_models.train import build, export, validation
from trex_models.train.config import Config, DataConfig, ValidationConfig
from trex_models.train.validation import Neighbors, ValidationDataset, Validator

SIDE = 24
ALONE = Process(0, 1, torch.device("cpu"))


class Recording(ArraySource):
    """Images of several shapes, smaller and larger than a crop; records which are read."""

    def __init__(self, count: int, num_classes: int) -> None:
        rng = np.random.default_rng(0)
        sizes = enumerate(rng.integers(15, 70, (count, 2)).tolist())
        images = [picture(height, width, seed=seed) for seed, (height, width) in sizes]
        labels = rng.integers(num_classes, size=count)
        super().__init__(images, labels, [f"class {c}" for c in range(num_classes)])
        self.seen: list[int] = []

    def read(self, index: int) -> np.ndarray:
        self.seen.append(index)
        return super().read(index)


def make_method(source: Source, offset: float = 0.0) -> TReX:
    """Return a method with an accuracy of about 50 %: its bank contains some of the images.

    ``offset`` changes BatchNorm's running statistics afterwards.
    """
    torch.manual_seed(0)
    encoder = Encoder(TinyBackbone(), Projector(6, 1, 7, 5))
    bank = MemoryBank(len(source), 5, len(source.classes))
    method = TReX(encoder, OnlineClassMeans(bank, 0.1), ema_momentum=0.9)
    images = torch.stack([crop(source, index, SIDE) for index in range(len(source))])
    with torch.no_grad():
        for _ in range(30):
            encoder([images])  # sets BatchNorm's running statistics
        bank.embeddings.copy_(encoder.eval()([images]))
        bank.labels.copy_(torch.from_numpy(source.labels))
        for name, buffer in method.named_buffers():  # also of the momentum encoder
            if name.endswith("running_var"):
                buffer *= torch.exp(offset * torch.linspace(-1, 1, len(buffer)))
    return method.train()


def crop(source: Source, index: int, side: int) -> Tensor:
    """Return torchvision's center crop, in the ratio of 224 to 256."""
    transform = transforms.Compose(
        [
            transforms.Resize(side * 256 // 224, transforms.InterpolationMode.BILINEAR),
            transforms.CenterCrop(side),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    return transform(Image.fromarray(source.read(index)))


def by_hand(method: TReX, source: Source, side: int = SIDE) -> dict[str, Any]:
    """Compute the accuracies image by image, and the rank from singular values."""
    method, top1, top5 = copy.deepcopy(method).eval(), 0, 0
    features = []
    for index, label in enumerate(source.labels.tolist()):
        with torch.no_grad():
            logits = method.objective.logits(method.encoder([crop(source, index, side)[None]]))[0]
        better = int((logits > logits[label]).sum())
        top1 += better < 1
        top5 += better < 5
        with torch.no_grad():
            features.append(method.encoder.backbone(crop(source, index, side)[None])[0].numpy())
    shares = np.linalg.svd(np.stack(features).astype(np.float64), compute_uv=False)
    shares /= shares.sum()
    rank = pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=0.01)
    return {"val_top1": top1 / len(source), "val_top5": top5 / len(source), "val_rank": rank}


def measure(
    method: TReX,
    source: Source,
    process: Process = ALONE,
    batch_size: int = 8,
    workers: int = 0,
    neighbors: Neighbors | None = None,
) -> dict[str, float]:
    precision = Precision.from_name("fp32", "cpu")
    dataset = ValidationDataset(source, SIDE)
    return Validator(dataset, process, precision, batch_size, workers, neighbors).measure(method)


K = 3


def some_neighbors(source: Source, count: int) -> Neighbors:
    return Neighbors(ValidationDataset(source, SIDE), np.arange(len(source))[::-1][:count], K)


def knn_by_hand(method: TReX, source: Source, references: Source, count: int) -> float:
    """Compute the k-NN accuracy with the last ``count`` references in one batch."""
    backbone = copy.deepcopy(method.encoder.backbone).eval()
    with torch.no_grad():
        known, features = (
            torch.cat([backbone(crop(images, i, SIDE)[None]) for i in range(len(images))])
            for images in (references, source)
        )
    labels = torch.from_numpy(references.labels[-count:])
    votes = knn_votes(known[-count:], labels, features, len(source.classes), K)
    return float((votes.argmax(1).numpy() == source.labels).mean())


def test_nearest_neighbors_are_those_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    source, references = Recording(37, 6), Recording(37, 6)
    method = make_method(source, offset=0.4)
    expected = knn_by_hand(method, source, references, 21)
    references.seen.clear()
    for queries in (1, 10, 4096):
        monkeypatch.setattr(validation, "_QUERIES", queries)
        measured = measure(method, source, neighbors=some_neighbors(references, 21))
        assert measured == by_hand(method, source) | {"val_knn": expected}
    assert 0.2 < expected < 1
    assert sorted(references.seen) == sorted(3 * list(range(16, 37)))


def test_starting_weights_are_measured_with_batch_statistics_and_left_unchanged() -> None:
    source = Recording(37, 6)
    method = make_method(source, offset=2.0)  # as wrong as the initial statistics
    before = copy.deepcopy(method.state_dict())
    crops = torch.cat([crop(source, index, SIDE)[None] for index in range(37)])
    calibrated = copy.deepcopy(method)
    update_bn([crops], calibrated.encoder.backbone)
    expected = knn_by_hand(calibrated, source, source, 37)
    dataset = ValidationDataset(source, SIDE)
    neighbors = Neighbors(dataset, np.arange(37), K)
    validator = Validator(dataset, ALONE, Precision.from_name("fp32", "cpu"), 37, 0, neighbors)
    assert validator.measure_start(method, calibrate=True)["val_knn"] == expected
    assert validator.measure_start(method, calibrate=False) == validator.measure(method)
    assert_same_state(method.state_dict(), before)


@pytest.mark.parametrize("side", [24, 32, 224])
def test_crops_are_torchvisions(side: int) -> None:
    source = Recording(3, 2)
    dataset = ValidationDataset(source, side)
    assert dataset.__getitems__([2, 0]).labels.tolist() == source.labels[[2, 0]].tolist()
    expected = torch.stack([crop(source, 2, side), crop(source, 0, side)])
    seen = dataset.crop.normalize(dataset.__getitems__([2, 0]).images)
    difference = (seen - expected).abs() * 255 * 0.225
    assert difference.mean() < 0.1  # levels
    assert difference.max() < 2


@pytest.mark.parametrize(("batch_size", "workers"), [(8, 0), (1, 0), (37, 0), (100, 0), (8, 1)])
def test_accuracy_is_that_of_a_plain_loop(batch_size: int, workers: int) -> None:
    source = Recording(37, 20)
    method = make_method(source, offset=0.4)
    expected = by_hand(method, source)
    assert 0.1 < expected["val_top1"] < expected["val_top5"] < 1
    assert measure(method, source, ALONE, batch_size, workers) == expected


def validate_in_a_group(folder: Path) -> dict[str, Any]:
    del folder
    with process_group("cpu") as process:
        source = Recording(37, 20)
        method = make_method(source, offset=0.4 + 2 * process.rank)
        source.seen.clear()
        before = copy.deepcopy(method.state_dict())
        own = by_hand(method, Recording(37, 20))
        measured, reads = measure(method, source, process), list(source.seen)
        near = some_neighbors(Recording(2, 20), 2)  # fewer images than the three processes
        among = measure(method, source, process, neighbors=some_neighbors(source, 31))
        return {
            "measured": measured,
            "reads": reads,
            "own statistics": own,
            "before": before,
            "after": method.state_dict(),
            "training": all(module.training for module in method.modules()),
            "of two images": measure(method, Recording(2, 20), process, neighbors=near),
            "k-NN": among["val_knn"],
        }


def test_several_processes_measure_what_one_does(tmp_path: Path) -> None:
    """Their BatchNorm statistics differ: those of process 0 are used."""
    world_size, source = 3, Recording(37, 20)
    method = make_method(source, offset=0.4)
    seen = spawn(validate_in_a_group, world_size, tmp_path)
    expected = by_hand(method, source)
    assert [one["measured"] for one in seen] == [expected] * world_size
    assert all(one["own statistics"] != expected for one in seen[1:])
    assert sorted(index for one in seen for index in one["reads"]) == list(range(37))
    assert max(len(one["reads"]) for one in seen) == -(-37 // world_size)
    assert all(one["training"] for one in seen)
    assert_same_state(seen[0]["after"], seen[0]["before"])
    buffers = {f"encoder.{name}" for name, _ in method.encoder.named_buffers()}
    for one in seen[1:]:
        shared = {k: v for k, v in one["after"].items() if k in buffers}
        assert_same_state(one["after"], one["before"] | shared)
        assert_same_state(shared, {name: seen[0]["after"][name] for name in shared})
    of_two = by_hand(method, Recording(2, 20))
    assert [one["of two images"] for one in seen] == [of_two | {"val_knn": 1.0}] * world_size
    assert [one["k-NN"] for one in seen] == [knn_by_hand(method, source, source, 31)] * world_size


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with stochastic depth that validates after both epochs."""
    folder = tmp_path_factory.mktemp("runs") / "validated"
    assert run(folder, *STOCHASTIC, "--validation.images-per-class", "3",
               "--system.workers", "1") == 0  # fmt: skip
    return folder


STOCHASTIC = ["--model.backbone-args", "channels=(8,8,16,16)", "drop_path_rate=0.5"]


def test_validation_does_not_affect_training(validated: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "run", *STOCHASTIC, "--validation.images-per-class", "0") == 0
    ours, theirs = last_state(validated), last_state(tmp_path / "run")
    for part in ("method", "optimizer", "meter", "step"):
        assert_same_state(ours[part], theirs[part], part)
    plain = [{k: v for k, v in line.items() if "val_" not in k} for line in logged(validated)]
    assert plain == logged(tmp_path / "run")


def test_generated_images_are_held_out() -> None:
    data = DataConfig(source="fractals", num_classes=2, images_per_class=5, image_size=16)
    config = Config(output="x", data=data, validation=ValidationConfig(images_per_class=4))
    source = build.open_source(data)
    dataset = build.open_validation(config, source)
    assert dataset is not None
    held_out = dataset.source
    assert held_out.labels.tolist() == [0] * 4 + [1] * 4
    trained = {source.read(index).tobytes() for index in range(len(source))}
    assert not trained & {held_out.read(index).tobytes() for index in range(len(held_out))}
    assert build.open_validation(Config(output="x", data=data), source) is None


def test_folder_of_held_out_images(tmp_path: Path) -> None:
    train, held_out = save_classes(tmp_path / "train", 8), tmp_path / "held_out"
    folders = ["--data.source", "folder", "--data.path", str(train), "--objective.bank-size", "16"]
    folders += ["--validation.path", str(held_out)]
    for names in ("abc", "ac"):
        save_classes(held_out, 4, names)
        err = refused(tmp_path / "run", *folders)
        assert f"{held_out}: a class folder has the label 'c', which is none of the 2" in err
        assert not (tmp_path / "run").exists()
        shutil.rmtree(held_out)
    save_classes(held_out, 3, "b")
    assert "validation: 3 images of 1 of the 2 classes\n" in output_of(tmp_path / "run", *folders)
    method, _ = export.load_method(tmp_path / "run")
    expected = by_hand(method, FolderSource(held_out, "ab"), side=32)
    assert {name: logged(tmp_path / "run")[-1][name] for name in expected} == expected
