"""The transfer data sets as they lie on a disk, one reader each: lists of files, no pixels.

Each returns the images to fit on (training and validation) and those to test on. Folders are named
as torchvision's data sets name them. A damaged data set raises anything; `data_sets.open_checked`
says what was expected.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets

from trex_models.data.image_files import FileSource, FolderSource
from trex_models.evaluation.splits import hashed_order

Parts = tuple[FileSource, FileSource]
EUROSAT_TEST_PER_CLASS = 810


def imagenet(root: Path) -> Parts:
    """ImageNet-1K (ILSVRC 2012): class folders; the validation images are for the test."""
    return _two_folders(root / "imagenet" / "train", root / "imagenet" / "val")


def aircraft(root: Path) -> Parts:
    """FGVC-Aircraft by variant."""
    train, test = (datasets.FGVCAircraft(root, split, loader=str) for split in ("trainval", "test"))
    folder = root / "fgvc-aircraft-2013b"
    return _listed(folder, [train], train.classes), _listed(folder, [test], train.classes)


def cars196(root: Path) -> Parts:
    """Stanford Cars."""
    train, test = (datasets.StanfordCars(root, split, loader=str) for split in ("train", "test"))
    folder = root / "stanford_cars"
    return _listed(folder, [train], train.classes), _listed(folder, [test], train.classes)


def dtd(root: Path) -> Parts:
    """Describable Textures, partition 1; training and validation images together."""
    train, val, test = (
        datasets.DTD(root, split, partition=1, loader=str) for split in ("train", "val", "test")
    )
    for part in (val, test):  # each part numbers the classes that it holds
        if part.classes != train.classes:
            raise ValueError("its train1.txt, val1.txt and test1.txt list different classes")
    folder = root / "dtd" / "dtd"
    return _listed(folder, [train, val], train.classes), _listed(folder, [test], train.classes)


def eurosat(root: Path) -> Parts:
    """EuroSAT, RGB; it comes undivided, so 810 images of each class are held out by a hash."""
    return _divided(FolderSource(root / "eurosat" / "2750"), lambda _: EUROSAT_TEST_PER_CLASS)


def flowers(root: Path) -> Parts:
    """Oxford Flowers-102; training and validation images together."""
    train, val, test = (
        datasets.Flowers102(root, split, loader=str) for split in ("train", "val", "test")
    )
    folder, classes = root / "flowers-102", datasets.Flowers102.classes
    return _listed(folder, [train, val], classes), _listed(folder, [test], classes)


def pets(root: Path) -> Parts:
    """Oxford-IIIT Pets by breed."""
    folder = root / "oxford-iiit-pet"
    train, test = (
        [line.split() for line in _lines(folder / "annotations" / f"{part}.txt")]
        for part in ("trainval", "test")
    )
    # A line is an image, its breed from 1, cat or dog, and the breed among cats or dogs.
    names = {int(breed): image.rsplit("_", 1)[0] for image, breed, *_ in train}
    classes = [names[breed] for breed in range(1, len(names) + 1)]
    train_set, test_set = (
        FileSource(
            folder,
            [f"images/{image}.jpg" for image, *_ in rows],
            [int(breed) - 1 for _, breed, *_ in rows],
            classes,
        )
        for rows in (train, test)
    )
    return train_set, test_set


def food101(root: Path) -> Parts:
    """Food-101."""
    train, test = (datasets.Food101(root, split, loader=str) for split in ("train", "test"))
    if test.classes != train.classes:  # each part numbers the classes that it holds
        raise ValueError("its train.json and test.json list different classes")
    folder = root / "food-101"
    return _listed(folder, [train], train.classes), _listed(folder, [test], train.classes)


def sun397(root: Path) -> Parts:
    """SUN397, partition 1; its lists lie in SUN397/ or beside it."""
    folder = root / "SUN397"

    def names(file: str) -> list[str]:
        places = [
            place / file for place in (folder, folder / "Partitions", root, root / "Partitions")
        ]
        found = [path for path in places if path.is_file()]
        if not found:
            raise ValueError(f"{places[0]} is missing; unpack Partitions.zip there")
        return [line.lstrip("/") for line in _lines(found[0])]

    classes = names("ClassName.txt")
    label_of = {name: label for label, name in enumerate(classes)}
    train_set, test_set = (
        FileSource(folder, paths, [label_of[path.rsplit("/", 1)[0]] for path in paths], classes)
        for paths in (names("Training_01.txt"), names("Testing_01.txt"))
    )
    return train_set, test_set


def inat2018(root: Path) -> Parts:
    """Species of iNaturalist 2018; the validation images are for the test."""
    return _inaturalist(root / "inat2018", "2018")


def inat2019(root: Path) -> Parts:
    """Species of iNaturalist 2019; the validation images are for the test."""
    return _inaturalist(root / "inat2019", "2019")


def class_folders(path: Path) -> Parts:
    """Return any class folders, divided by their owner or by a hash.

    Args:
        path: Holds ``train/``, ``val/`` and ``test/`` of class folders, the first two of which are
            fitted on; or ``train/`` and one of the others, which is tested on; or else class
            folders alone, of each of which a fifth is held out to test on.

    Raises:
        ValueError: It holds something else.
    """
    found = [name for name in ("train", "val", "test") if (path / name).is_dir()]
    if found == ["train", "val", "test"]:
        train, val, test = (FolderSource(path / name) for name in found)
        if train.classes != val.classes:
            raise ValueError(f"{path}/train and {path}/val hold different class folders")
        files = [
            f"{name}/".encode() + file
            for name, part in (("train", train), ("val", val))
            for file in part.paths.tolist()
        ]
        labels = np.concatenate([train.labels, val.labels])
        return FileSource(path, files, labels, train.classes), test
    if len(found) == 2 and found[0] == "train":
        return _two_folders(path / "train", path / found[1])
    if found == ["train"]:
        raise ValueError(
            f"{path} holds train/ and neither test/ nor val/: rename the folder to test on, or "
            "train/ if it is a class"
        )
    return _divided(FolderSource(path), lambda count: max(1, round(count / 5)))


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        ValueError: It is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); copy it again") from error


def _two_folders(train: Path, test: Path) -> Parts:
    return FolderSource(train), FolderSource(test)


def _divided(source: FileSource, test_images: Callable[[int], int]) -> Parts:
    """Hold out images of each class, by the hash of their paths below the source's root.

    Args:
        source: All images.
        test_images: How many to hold out of a class of so many.
    """
    mask = np.zeros(len(source), dtype=bool)
    for label in range(len(source.classes)):
        members = np.flatnonzero(source.labels == label)
        order = hashed_order(source.paths[members].tolist(), seed=0)
        mask[members[order[: test_images(len(members))]]] = True
    return source.part(np.flatnonzero(~mask)), source.part(np.flatnonzero(mask))


def _listed(folder: Path, parts: Iterable[Any], classes: Sequence[str]) -> FileSource:
    """List the files of torchvision data sets whose loader is ``str``: they yield paths."""
    samples = [part[index] for part in parts for index in range(len(part))]
    paths = [Path(path).relative_to(folder).as_posix() for path, _ in samples]
    return FileSource(folder, paths, [int(label) for _, label in samples], classes)


def _inaturalist(folder: Path, year: str) -> Parts:
    """Read the JSON files of a competition; torchvision renames the folder of images to YEAR."""
    images = f"train_val{year}"

    def part(name: str) -> FileSource:
        path = folder / f"{name}{year}.json"
        content = read_json(path)
        categories = sorted(content["categories"], key=lambda category: int(category["id"]))
        label_of = {category["id"]: label for label, category in enumerate(categories)}
        file_of = {image["id"]: image["file_name"] for image in content["images"]}
        rows = content["annotations"]
        files = [file_of[row["image_id"]].removeprefix(f"{images}/") for row in rows]
        renamed = files and (folder / year / files[0]).exists()
        return FileSource(
            folder / (year if renamed else images),
            files,
            [label_of[row["category_id"]] for row in rows],
            [str(category["name"]) for category in categories],
        )

    return part("train"), part("val")


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]
