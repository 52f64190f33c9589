"""Readers of datasets as they lie on a disk: lists of the images to fit on and of those to test on.

Folders have torchvision's names. A damaged dataset may raise any error; `datasets.open_checked`
adds what was expected.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trex_models.data.image_files import FileSource, FolderSource
from trex_models.evaluation.splits import hashed_order
from trex_models.pretrained.unpickling import PlainUnpickler

Parts = tuple[FileSource, FileSource]
EUROSAT_TEST_PER_CLASS = 810  # it comes undivided
NUM_LEVELS = 5
_LIST_SUFFIXES = (".json", ".pkl", ".pickle")


def from_torchvision(kind: Any, folder: str, *train: str) -> Callable[[Path], Parts]:
    """Return the reader of a torchvision dataset: its class, image folder, and splits to fit on."""

    def read(root: Path) -> Parts:
        splits = *train, "test"
        *fitted, tested = (kind(root, split, loader=str) for split in splits)
        classes = tested.classes
        if any(part.classes != classes for part in fitted):  # each numbers the classes it holds
            raise ValueError(f"its splits {', '.join(splits)} list different classes")

        def listed(parts: list[Any]) -> FileSource:
            rows = [part[index] for part in parts for index in range(len(part))]
            paths = [Path(path).relative_to(root / folder).as_posix() for path, _ in rows]
            return FileSource(root / folder, paths, [int(label) for _, label in rows], classes)

        return listed(fitted), listed([tested])

    return read


def imagenet(root: Path) -> Parts:
    """Read ImageNet-1K; the validation images are for the test."""
    return FolderSource(root / "imagenet" / "train"), FolderSource(root / "imagenet" / "val")


def eurosat(root: Path) -> Parts:
    """Read EuroSAT, of which the same images are held out everywhere, by a hash."""
    return _divided(FolderSource(root / "eurosat" / "2750"), lambda _: EUROSAT_TEST_PER_CLASS)


def class_folders(path: Path) -> Parts:
    """Read any class folders, divided by their owner or by a hash.

    ``train/`` and, if there are both ``val/`` and ``test/``, ``val/`` are fitted on. Of undivided
    class folders a fifth is held out to test on.
    """
    found = [name for name in ("train", "val", "test") if (path / name).is_dir()]
    if "train" not in found:
        return _divided(FolderSource(path), lambda count: max(1, round(count / 5)))
    if len(found) == 1:
        raise ValueError(f"{path} holds train/ and neither test/ nor val/; rename one")
    train, *val, test = (FolderSource(path / name) for name in found)
    if not val:
        return train, test
    if train.classes != val[0].classes:
        raise ValueError(f"{path}/train and {path}/val hold different class folders")
    files = [b"train/" + file for file in train.paths.tolist()]
    files += [b"val/" + file for file in val[0].paths.tolist()]
    labels = np.concatenate([train.labels, val[0].labels])
    return FileSource(path, files, labels, train.classes), test


def _divided(source: FileSource, test_images: Callable[[int], int]) -> Parts:
    """Hold out ``test_images(count)`` of a class's images, by the hash of their paths."""
    mask = np.zeros(len(source), dtype=bool)
    for label in range(len(source.classes)):
        members = np.flatnonzero(source.labels == label)
        order = hashed_order(source.paths[members].tolist(), seed=0)
        mask[members[order[: test_images(len(members))]]] = True
    return source.part(np.flatnonzero(~mask)), source.part(np.flatnonzero(mask))


def pets(root: Path) -> Parts:
    """Read Oxford-IIIT Pets by breed."""
    folder = root / "oxford-iiit-pet"
    train, test = (
        [line.split() for line in _lines(folder / "annotations" / f"{part}.txt")]
        for part in ("trainval", "test")
    )
    # A line is an image, its breed from 1, cat or dog, and the breed among cats or dogs.
    names = {int(breed): image.rsplit("_", 1)[0] for image, breed, *_ in train}
    classes = [names[breed] for breed in range(1, len(names) + 1)]

    def listed(rows: list[list[str]]) -> FileSource:
        paths = [f"images/{image}.jpg" for image, *_ in rows]
        return FileSource(folder, paths, [int(breed) - 1 for _, breed, *_ in rows], classes)

    return listed(train), listed(test)


def sun397(root: Path) -> Parts:
    """Read SUN397, partition 1; its lists lie in SUN397/ or next to it."""
    folder = root / "SUN397"

    def names(file: str) -> list[str]:
        places = [at / part / file for at in (folder, root) for part in (".", "Partitions")]
        found = [path for path in places if path.is_file()]
        if not found:
            raise ValueError(f"{places[0]} is missing; unpack Partitions.zip there")
        return [line.lstrip("/") for line in _lines(found[0])]

    classes = names("ClassName.txt")
    label_of = {name: label for label, name in enumerate(classes)}

    def listed(paths: list[str]) -> FileSource:
        labels = [label_of[path.rsplit("/", 1)[0]] for path in paths]
        return FileSource(folder, paths, labels, classes)

    return listed(names("Training_01.txt")), listed(names("Testing_01.txt"))


def inaturalist(root: Path, year: int) -> Parts:
    """Read the species of an iNaturalist competition; the validation images are for the test."""
    folder, images = root / f"inat{year}", f"train_val{year}"

    def listed(name: str) -> FileSource:
        content = _read_json(folder / f"{name}{year}.json")
        categories = sorted(content["categories"], key=lambda category: int(category["id"]))
        label_of = {category["id"]: label for label, category in enumerate(categories)}
        file_of = {image["id"]: image["file_name"] for image in content["images"]}
        rows = content["annotations"]
        files = [file_of[row["image_id"]].removeprefix(f"{images}/") for row in rows]
        renamed = files and (folder / str(year) / files[0]).exists()  # by torchvision
        return FileSource(
            folder / (str(year) if renamed else images),
            files,
            [label_of[row["category_id"]] for row in rows],
            [str(category["name"]) for category in categories],
        )

    return listed("train"), listed("val")


def cog(root: Path, level: int) -> Parts:
    """Read a level (1 to 5) of ImageNet-CoG: concepts of ImageNet-21K, ever farther from -1K's.

    Sariyildiz et al., "Concept Generalization in Visual Representation Learning", ICCV 2021.
    """
    (levels_file, levels), (splits_file, splits) = (
        _listing(root / "cog", stem) for stem in ("levels", "splits")
    )
    try:
        concepts = _concepts(levels, levels_file)[level - 1]
        images = [_images(splits, concept, splits_file) for concept in concepts]
        train, test = (
            FileSource(
                root / "imagenet21k",
                [path for pair in images for path in pair[part]],
                [label for label, pair in enumerate(images) for _ in pair[part]],
                concepts,
            )
            for part in (0, 1)
        )
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"{levels_file} or {splits_file} has an unknown layout ({error})"
        ) from error
    return train, test


def _listing(folder: Path, stem: str) -> tuple[Path, Any]:
    """Return a list's file and its content."""
    found = [path for suffix in _LIST_SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()]
    if len(found) != 1:
        kinds = ", ".join(_LIST_SUFFIXES)
        raise ValueError(f"{folder} holds {len(found) or 'no'} files {stem}.* ({kinds}), not one")
    (path,) = found
    if path.suffix == ".json":
        return path, _read_json(path)
    with path.open("rb") as file:
        try:
            return path, PlainUnpickler(file).load()
        except Exception as error:  # a damaged pickle raises anything
            raise ValueError(f"{path} cannot be read as lists of names ({error})") from error


def _concepts(content: Any, path: Path) -> list[list[str]]:
    """Return the concepts of each level, sorted, from any of the known layouts."""
    levels: dict[int, set[str]] = {}
    rows = content.items() if isinstance(content, Mapping) else enumerate(content)
    for key, value in rows:
        if isinstance(value, str | bytes | int):  # concept -> level
            levels.setdefault(_number(value, path), set()).add(_text(key))
        else:  # level -> concepts
            levels[_number(key, path)] = set(map(_text, value))
    if len(levels) != NUM_LEVELS:
        raise ValueError(f"{path} has {len(levels)} levels, not {NUM_LEVELS}: a list of 5 lists")
    return [sorted(levels[number]) for number in sorted(levels)]


def _images(content: Any, concept: str, path: Path) -> list[list[str]]:
    """Return a concept's training and test images, from any of the known layouts."""
    try:
        by_part = "train" in content  # part -> concept -> images; else the concept comes first
        parts = content if by_part else content[concept]
        if isinstance(parts, Mapping):
            parts = parts["train"], parts["test" if "test" in parts else "val"]
        train, test = (part[concept] for part in parts) if by_part else parts
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} has no lists train and test of the concept {concept}") from error
    return [
        [name if "/" in name else f"{concept}/{name}" for name in map(_text, names)]
        for names in (train, test)
    ]


def _number(level: Any, path: Path) -> int:
    """Return the number of a level called 3, "3", "L3" or "level3"."""
    digits = re.findall(r"\d+", _text(level))
    if len(digits) != 1:
        raise ValueError(f"{path}: {level!r} names no level; call them 1 to {NUM_LEVELS}")
    return int(digits[0])


def _text(value: Any) -> str:
    return str(value) if isinstance(value, int) else os.fsdecode(value)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); copy it again") from error


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]
