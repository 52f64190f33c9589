"""The same images from every type of source, and errors of sources."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import datasets
import numpy as np
import pytest

from tests.images import save_image
from tests.runs import logged, run, status_of
from trex_models.train.__main__ import parse
from trex_models.train.build import open_source, open_validation

CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Imbalanced training images in each type of source, and held-out images of one class."""
    root = tmp_path_factory.mktemp("data")
    rows: list[tuple[Path, str]] = []
    for label, count in zip(CLASSES, (4, 8, 20), strict=True):
        for number in range(count):
            path = root / "folder" / label / f"{number:02}.png"
            save_image(path, seed=len(rows))
            rows.append((path, label))
    for part, chosen in {"train": rows, "held": rows[4:12]}.items():
        with (root / f"{part}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(
                [("path", "label"), *((path.relative_to(root), label) for path, label in chosen)]
            )
    columns = {
        "image": [{"bytes": path.read_bytes(), "path": path.name} for path, _ in rows],
        "label": [CLASSES.index(label) for _, label in rows],
    }
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    train = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    held = train.select(range(4, 12))
    datasets.DatasetDict(train=train, held=held).save_to_disk(str(root / "saved"))
    train.to_parquet(str(root / "train.parquet"))
    held.to_parquet(str(root / "held.parquet"))
    return root


def options(data: Path, source: str) -> list[str]:
    kind, path = {
        "folder": ("folder", "folder"),
        "csv": ("csv", "train.csv"),
        "saved": ("huggingface", "saved"),
        "parquet": ("huggingface", "train.parquet"),
    }[source]
    chosen = ["--data.source", kind, "--data.path", str(data / path), "--optim.epochs", "1"]
    return chosen + (["--data.split", "train"] if source == "saved" else [])


@pytest.mark.parametrize("source", ["csv", "saved", "parquet"])
def test_every_source_holds_the_same_images(
    source: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, other = (
        open_source(parse("smoke", ["--output", "x", *options(data, kind)]).data)
        for kind in ("folder", source)
    )
    assert list(other.classes) == list(folder.classes) == CLASSES
    assert other.labels.tolist() == folder.labels.tolist() == [0] * 4 + [1] * 8 + [2] * 20
    for index in range(len(folder)):
        np.testing.assert_array_equal(other.read(index), folder.read(index))


@pytest.mark.parametrize("source", ["csv", "saved", "parquet"])
def test_validation_images_may_be_of_some_classes(source: str, data: Path, tmp_path: Path) -> None:
    held = ["--validation.split", "held"]
    if source != "saved":
        held = ["--validation.path", str(data / f"held.{source}")]
    config = parse("smoke", ["--output", "x", *options(data, source), *held])
    dataset = open_validation(config, open_source(config.data))
    assert dataset is not None
    assert list(dataset.source.classes) == CLASSES
    assert set(dataset.source.labels.tolist()) == {1}
    assert run(tmp_path / "run", *options(data, source), *held) == 0
    assert "val_top1" in logged(tmp_path / "run")[-1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--data.path {data}/train.csv", "train.csv is a file, not a folder of class folders"),
        ("--data.source csv", "--data.path is not set; pass the CSV file"),
        ("--data.source csv --data.path {data}/folder", "folder"),
        ("--data.source huggingface --data.path {data}/saved", "held, train.*--data.split"),
        ("--data.source huggingface --data.path {data}/saved --data.split test", "test"),
        ("--data.split train", "--data.split is not available with --data.source folder"),
        ("--data.source fractals --data.label-column x", "--data.label-column is not available"),
        ("--data.source fractals --validation.split x", "--validation.split is not available"),
        ("--data.source fractals --validation.path x", "--validation.path is not available"),
        ("--data.source fractals --data.max-unreadable 1", r"must be in \[0, 1\), got 1.0"),
        (
            "--data.source fractals --validation.images-per-class 0 --validation.neighbors 5",
            "there are no validation images",
        ),
        ("--data.source fractals --objective.neighbors 0", "--objective.neighbors must be at"),
    ],
)
def test_refused_in_one_line(
    wrong: str, message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data.source", "folder", *wrong.format(data=data).split()]
    assert status_of(run, tmp_path / "run", *options) == 2
    err = " ".join(capsys.readouterr().err.replace("\u2502", " ").split())
    assert re.search(message, err), err
    assert not (tmp_path / "run").exists()
