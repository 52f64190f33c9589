"""Readers of datasets with several labels per image, and of CSV files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trex_models.data.image_files import CsvSource, FileSource, csv_column, csv_rows, csv_value
from trex_models.data.sources import digest
from trex_models.transfer import readers
from trex_models.transfer.readers import Parts, read_lines, split_by_hash

VOC_CLASSES = readers.VOC_CLASSES[1:]  # without the background
_VOC_TARGETS = {"1": 1, "-1": 0, "0": -1}  # 0: only difficult objects
_CSV_TARGETS = {"1": 1, "0": 0, "-1": -1, "": -1}


class LabelsSource(FileSource):
    """Source of image files with ``targets``, (N, C) int8: 1 present, 0 absent, -1 ignored."""

    def __init__(
        self, root: Path, paths: Sequence[str] | np.ndarray, targets: np.ndarray, classes: list[str]
    ) -> None:
        super().__init__(root, paths, np.zeros(len(paths)), classes)
        self.targets = targets.astype(np.int8)

    def digest(self) -> str:
        """Return a hash of the paths, the targets and the classes."""
        return digest(super().digest(), self.targets)

    def part(self, indices: np.ndarray) -> LabelsSource:
        """Return a source of the images at the given indices, in this order."""
        return LabelsSource(self.root, self.paths[indices], self.targets[indices], self.classes)


def voc2007(root: Path) -> Parts:
    """Read the classification task of PASCAL VOC 2007."""
    folder = root / "VOCdevkit" / "VOC2007"
    lists = folder / "ImageSets" / "Main"

    def listed(part: str) -> LabelsSource:
        images = read_lines(lists / f"{part}.txt")
        columns = []
        for name in VOC_CLASSES:
            values = dict(line.split() for line in read_lines(lists / f"{name}_{part}.txt"))
            columns.append([_VOC_TARGETS[values[image]] for image in images])
        paths = [f"JPEGImages/{image}.jpg" for image in images]
        return LabelsSource(folder, paths, np.array(columns).T, list(VOC_CLASSES))

    return listed("trainval"), listed("test")


def has_one_label(path: Path) -> bool:
    """Return True if the CSV file or files at PATH have the column ``label``, a class per image."""
    return "label" in _header(path if path.suffix == ".csv" else path / "train.csv", "path")


def _header(path: Path, *required: str) -> list[str]:
    _, header = next(csv_rows(path))
    for column in required:
        csv_column(path, header, column)
    return header


def csv_files(path: Path) -> Parts:
    """Read a CSV file, of which a fifth is held out for testing, or train.csv and test or val."""
    read = CsvSource if has_one_label(path) else read_csv_labels
    if path.suffix == ".csv":
        return split_by_hash(read(path))
    tests = [path / name for name in ("test.csv", "val.csv") if (path / name).exists()]
    if len(tests) != 1:
        raise ValueError(f"{path} has {len(tests)} of the files test.csv and val.csv; keep one")
    train = read(path / "train.csv")
    _header(tests[0], "path", *["label"] * (read is CsvSource))
    return train, read(tests[0], classes=train.classes)


def read_csv_labels(path: Path, classes: list[str] | None = None) -> LabelsSource:
    """Read images with several labels each.

    ``classes`` are those of the training images. Columns that other files lack are ignored there.
    """
    rows = csv_rows(path)
    _, header = next(rows)
    columns = {name: csv_column(path, header, name) for name in ("path", *header)}
    found: dict[str, dict[str, int]] = {}
    for line, row in rows:
        place = f"{path}, line {line}"
        image = csv_value(path, line, header, row, columns["path"])
        targets = _row_targets(place, dict(zip(header, row, strict=True)))
        if image in found:
            raise ValueError(f"{place}: {image} is listed above; remove one of the rows")
        if odd := sorted(targets.keys() - (classes or targets)):
            raise ValueError(f"{place}: {odd[0]!r} is not in train.csv; fix or remove it")
        found[image] = targets
    classes = classes or sorted(set().union(*found.values()))
    if not found or not classes:
        raise ValueError(f"{path} has no rows with labels; add a row for each image")
    missing = 0 if "labels" in header else -1
    values = [[targets.get(name, missing) for name in classes] for targets in found.values()]
    return LabelsSource(path.parent, list(found), np.array(values), classes)


def _row_targets(place: str, row: dict[str, str]) -> dict[str, int]:
    if "labels" in row:
        return {name.strip(): 1 for name in row["labels"].split(";") if name.strip()}
    targets = {name: value for name, value in row.items() if name != "path"}
    for name, value in targets.items():
        if value.strip() not in _CSV_TARGETS:
            allowed = "1 (present), 0 (absent), or -1 or nothing (ignored)"
            raise ValueError(f"{place}: {name!r} is {value!r}; use {allowed}")
    return {name: _CSV_TARGETS[value.strip()] for name, value in targets.items()}
