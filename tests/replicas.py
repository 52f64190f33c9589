"""Small replicas of the layouts of the transfer datasets.

Each writer returns the training and the test images: path below the data root -> class.
"""

from __future__ import annotations

import functools
import itertools
import json
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import Flowers102

from tests.images import encode
from trex_models.transfer.datasets import Dataset, open_checked, select
from trex_models.transfer.readers import VOC_CLASSES

Files = dict[str, str]
Parts = tuple[Files, Files]
CLASSES = ("ant", "bee", "cow")


JPEG = encode(np.full((6, 8, 3), 128, np.uint8), "JPEG")


def touch(root: Path, paths: Iterable[str]) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(JPEG)


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def own(path: Path) -> Dataset:
    (dataset,) = select(f"mine={path}")
    return dataset


def refused(dataset: Dataset, root: Path) -> str:
    message = ""
    try:
        open_checked(dataset, root)
    except ValueError as error:
        message = str(error)
    assert re.fullmatch(f"{dataset.name}: .*; needed.*", message)
    return message


def folders(root: Path, folder: str, count: int, classes: Iterable[str] = CLASSES) -> Files:
    """Write class folders with a number of images each."""
    files = {f"{folder}/{name}/{i}.JPEG": name for name in classes for i in range(count)}
    touch(root, files)
    return files


def replica(writer: Callable[..., Iterator[Files]]) -> Callable[..., Parts]:
    """Write the images of the files that a writer yields for each part, the test part last."""

    @functools.wraps(writer)
    def write_images(root: Path, *options: int) -> Parts:
        *train, test = writer(root, *options)
        for files in (*train, test):
            touch(root, files)
        return dict(itertools.chain(*(files.items() for files in train))), test

    return write_images


@replica
def imagenet(root: Path) -> Iterator[Files]:
    yield folders(root, "imagenet/train", 3)
    yield folders(root, "imagenet/val", 2)


@replica
def aircraft(root: Path) -> Iterator[Files]:
    data = root / "fgvc-aircraft-2013b" / "data"
    classes = ["Boeing 707-320", "A300", "Cessna 172"]  # in the list's order
    write(data / "variants.txt", *classes)
    for part, name in enumerate(("trainval", "test")):
        rows = [
            (f"{part}{label}{i}", classes[label]) for i in range(3 - part) for label in (2, 0, 1)
        ]
        write(data / f"images_variant_{name}.txt", *(f"{image} {label}" for image, label in rows))
        yield {f"{data.relative_to(root)}/images/{image}.jpg": c for image, c in rows}


@replica
def cars196(root: Path) -> Iterator[Files]:
    from scipy.io import savemat

    base, classes = root / "stanford_cars", ["Acura RL Sedan 2012", "BMW M3 Coupe 2012"]
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(classes, dtype=object)})
    rows = [(f"{i:05d}.jpg", 1 + i % 2) for i in range(1, 6)]  # both folders have 00001.jpg
    table = np.array(rows, dtype=[("fname", object), ("class", object)])
    for folder, file in (
        ("cars_train", "devkit/cars_train_annos.mat"),
        ("cars_test", "cars_test_annos_withlabels.mat"),
    ):
        savemat(base / file, {"annotations": table})
        yield {f"stanford_cars/{folder}/{name}": classes[c - 1] for name, c in rows}


@replica
def dtd(root: Path) -> Iterator[Files]:
    lists = root / "dtd" / "dtd" / "labels"
    for number, part in enumerate(("train", "val", "test")):
        rows = {f"{name}/{name}_{number}{i}.jpg": name for name in CLASSES for i in range(2)}
        write(lists / f"{part}1.txt", *rows)
        yield {f"dtd/dtd/images/{path}": name for path, name in rows.items()}
    write(lists / "train2.txt", "ant/other.jpg")


# Pinned: the smallest of `printf 0/AnnualCrop/AnnualCrop_1.jpg | sha256sum` and so on.
EUROSAT_TEST = (
    *("AnnualCrop/AnnualCrop_1.jpg", "AnnualCrop/AnnualCrop_5.jpg"),
    *("River/River_3.jpg", "River/River_4.jpg"),
)


@replica
def eurosat(root: Path) -> Iterator[Files]:
    del root
    files = [
        (f"{name}/{name}_{i}.jpg", name) for name in ("AnnualCrop", "River") for i in range(1, 6)
    ]
    for is_test in (False, True):
        yield {
            f"eurosat/2750/{path}": name
            for path, name in files
            if (path in EUROSAT_TEST) == is_test
        }


@replica
def flowers(root: Path) -> Iterator[Files]:
    from scipy.io import savemat

    folder, classes = root / "flowers-102", Flowers102.classes
    folder.mkdir(parents=True)
    order = np.random.default_rng(0).permutation(3 * len(classes)) + 1
    labels = np.zeros(len(order), dtype=np.int64)
    parts = dict(zip(("trnid", "valid", "tstid"), np.split(order, 3), strict=True))
    for ids in parts.values():
        labels[ids - 1] = 1 + np.arange(len(classes))
        yield {f"flowers-102/jpg/image_{i:05d}.jpg": classes[labels[i - 1] - 1] for i in ids}
    savemat(folder / "setid.mat", parts)
    savemat(folder / "imagelabels.mat", {"labels": labels})


@replica
def pets(root: Path) -> Iterator[Files]:
    base, breeds = root / "oxford-iiit-pet", ["Abyssinian", "american_bulldog", "Bengal"]
    for number, part in enumerate(("trainval", "test")):
        rows = [
            (f"{b}_{10 * number + i}", label) for i in range(2) for label, b in enumerate(breeds)
        ]
        write(base / "annotations" / f"{part}.txt", *(f"{n} {c + 1} 1 1" for n, c in rows))
        yield {f"oxford-iiit-pet/images/{n}.jpg": breeds[label] for n, label in rows}


@replica
def food101(root: Path) -> Iterator[Files]:
    for number, part in enumerate(("train", "test")):
        lists = {name: [f"{name}/{number}{i}" for i in range(2)] for name in reversed(CLASSES)}
        write(root / "food-101" / "meta" / f"{part}.json", json.dumps(lists))
        yield {f"food-101/images/{p}.jpg": name for name, v in lists.items() for p in v}


@replica
def sun397(root: Path) -> Iterator[Files]:
    classes = ["a/abbey", "o/oast_house", "a/apartment_building/outdoor"]
    write(root / "SUN397" / "ClassName.txt", *(f"/{name}" for name in classes))
    touch(root, ["SUN397/a/abbey/sun_of_no_list.jpg"])
    for number, part in enumerate(("Training", "Testing")):
        rows = {f"{name}/sun_{number}{i}.jpg": name for name in classes for i in range(2)}
        write(root / "SUN397" / "Partitions" / f"{part}_01.txt", *(f"/{path}\r" for path in rows))
        yield {f"SUN397/{path}": name for path, name in rows.items()}


def cog_lists() -> tuple[list[list[str]], dict[str, dict[str, list[str]]]]:
    """Return five levels of two concepts, and the images of each."""
    levels = [[f"n{level}0000001", f"n{level}0000002"] for level in range(1, 6)]
    splits = {
        name: {part: [f"{name}_{part}{i}.JPEG" for i in range(2)] for part in ("train", "test")}
        for names in levels
        for name in names
    }
    return levels, splits


@replica
def cog(root: Path, level: int) -> Iterator[Files]:
    levels, splits = cog_lists()
    write(root / "cog" / "levels.json", json.dumps(levels))
    write(root / "cog" / "splits.json", json.dumps(splits))
    for part in ("train", "test"):
        yield {
            f"imagenet21k/{name}/{file}": name
            for name in levels[level - 1]
            for file in splits[name][part]
        }


@replica
def inaturalist(root: Path, year: int) -> Iterator[Files]:
    species = {7: "Apis mellifera", 3: "Bos taurus", 5: "Formica rufa"}  # ids in no order
    for number, part in enumerate(("train", "val")):
        rows = [
            (10 * key + number * 100 + i, key, f"train_val{year}/x/{key}/{number}{i}.jpg")
            for key in species
            for i in range(2)
        ]
        content = {
            "images": [{"id": id_, "file_name": file} for id_, _, file in reversed(rows)],
            "annotations": [{"image_id": id_, "category_id": key} for id_, key, _ in rows],
            "categories": [{"id": key, "name": name} for key, name in species.items()],
        }
        write(root / f"inat{year}" / f"{part}{year}.json", json.dumps(content))
        yield {f"inat{year}/{file}": species[key] for _, key, file in rows}


def voc2007(root: Path) -> dict[str, dict[str, list[int]]]:
    """Write VOC2007; return the values of its lists (1, -1, 0) by part and image."""
    folder = root / "VOCdevkit" / "VOC2007"
    parts = {}
    for first, part in ((1, "trainval"), (10, "test")):
        cells = np.random.default_rng(first).choice([1, -1, 0], (9, len(VOC_CLASSES)))
        cells[:4] = [[1], [1], [-1], [-1]]
        parts[part] = {f"{first + row:06d}": values for row, values in enumerate(cells.tolist())}
        write(folder / "ImageSets" / "Main" / f"{part}.txt", *parts[part])
        for column, name in enumerate(VOC_CLASSES):
            rows = (f"{image} {values[column]:2d}" for image, values in parts[part].items())
            write(folder / "ImageSets" / "Main" / f"{name}_{part}.txt", *rows)
        touch(folder, (f"JPEGImages/{image}.jpg" for image in parts[part]))
    return parts


def _of(writer: Callable[..., Parts], option: int) -> Callable[[Path], Parts]:
    return lambda root: writer(root, option)


WRITERS = (imagenet, aircraft, cars196, dtd, eurosat, flowers, pets, food101, sun397)
REPLICAS: dict[str, Callable[[Path], Parts]] = {
    **{writer.__name__: writer for writer in WRITERS},
    **{f"cog-l{level}": _of(cog, level) for level in range(1, 6)},
    **{f"inat{year}": _of(inaturalist, year) for year in (2018, 2019)},
}


def landmarks(root: Path, name: str) -> None:
    """Write revisited Oxford or Paris with 6 images of colors that move away from the queries'.

    Only the right half of a query, its box, has the color of image 0.
    """
    folder = root / name / "jpg"
    folder.mkdir(parents=True)
    for index in range(6):
        angle = index * np.pi / 12
        color = (255 * np.array([np.cos(angle), np.sin(angle), 0])).round().astype(np.uint8)
        Image.fromarray(np.tile(color, (20, 20, 1))).save(folder / f"all_{index}.jpg", quality=95)
    halves = np.zeros((20, 20, 3), np.uint8)
    halves[:, :10, 1], halves[:, 10:, 0] = 255, 255
    for index in range(2):
        Image.fromarray(halves).save(folder / f"query_{index}.jpg", quality=95, subsampling=0)
    box = {"bbx": np.array([9.6, 0.0, 20.0, 20.0])}
    ground_truth = [
        box | {"easy": np.array([1]), "hard": np.array([3], np.int32), "junk": [np.int64(0)]},
        box | {"easy": [0], "hard": [], "junk": np.array([], np.int64)},
    ]
    content = {
        "imlist": [f"all_{index}" for index in range(6)],
        "qimlist": ["query_0", "query_1"],
        "gnd": ground_truth,
    }
    (root / name / f"gnd_{name}.pkl").write_bytes(pickle.dumps(content, protocol=2))
