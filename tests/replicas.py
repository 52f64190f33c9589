"""Small replicas of the transfer data sets' layouts: the right files in the right places.

Each writer returns the training and the test images: path below the data root -> class.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import Flowers102

Files = dict[str, str]
Parts = tuple[Files, Files]
CLASSES = ("ant", "bee", "cow")


def _jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), 128, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


JPEG = _jpeg()


def touch(root: Path, paths: Iterable[str]) -> None:
    """Write an image to each path."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(JPEG)


def write(path: Path, *lines: str) -> None:
    """Write a text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def folders(root: Path, folder: str, count: int, classes: Iterable[str] = CLASSES) -> Files:
    """Write class folders of so many images."""
    files = {f"{folder}/{name}/{i}.JPEG": name for name in classes for i in range(count)}
    touch(root, files)
    return files


def imagenet(root: Path) -> Parts:
    return folders(root, "imagenet/train", 3), folders(root, "imagenet/val", 2)


def aircraft(root: Path) -> Parts:
    data = root / "fgvc-aircraft-2013b" / "data"
    classes = ["Boeing 707-320", "A300", "Cessna 172"]  # in the list's order
    write(data / "variants.txt", *classes)
    parts: list[Files] = []
    for part, name in enumerate(("trainval", "test")):
        rows = [
            (f"{part}{label}{i}", classes[label]) for i in range(3 - part) for label in (2, 0, 1)
        ]
        write(data / f"images_variant_{name}.txt", *(f"{image} {label}" for image, label in rows))
        parts.append({f"{data.relative_to(root)}/images/{image}.jpg": c for image, c in rows})
        touch(root, parts[-1])
    return parts[0], parts[1]


def cars196(root: Path) -> Parts:
    from scipy.io import savemat

    base, classes = root / "stanford_cars", ["Acura RL Sedan 2012", "BMW M3 Coupe 2012"]
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(classes, dtype=object)})
    parts: list[Files] = []
    for folder, file in (
        ("cars_train", "devkit/cars_train_annos.mat"),
        ("cars_test", "cars_test_annos_withlabels.mat"),
    ):
        rows = [(f"{i:05d}.jpg", 1 + i % 2) for i in range(1, 6)]  # both folders have 00001.jpg
        kind = [("fname", object), ("class", object)]
        savemat(base / file, {"annotations": np.array(rows, dtype=kind)})
        parts.append({f"stanford_cars/{folder}/{name}": classes[c - 1] for name, c in rows})
        touch(root, parts[-1])
    return parts[0], parts[1]


def dtd(root: Path) -> Parts:
    parts: list[Files] = []
    for number, part in enumerate(("train", "val", "test")):
        rows = [(f"{name}/{name}_{number}{i}.jpg", name) for name in CLASSES for i in range(2)]
        write(root / "dtd" / "dtd" / "labels" / f"{part}1.txt", *(row[0] for row in rows))
        parts.append({f"dtd/dtd/images/{path}": name for path, name in rows})
        touch(root, parts[-1])
    write(root / "dtd" / "dtd" / "labels" / "train2.txt", "ant/other.jpg")
    return parts[0] | parts[1], parts[2]


# Pinned: the smallest of `printf 0/AnnualCrop/AnnualCrop_1.jpg | sha256sum` and so on.
EUROSAT_TEST = (
    *("AnnualCrop/AnnualCrop_1.jpg", "AnnualCrop/AnnualCrop_5.jpg"),
    *("River/River_3.jpg", "River/River_4.jpg"),
)


def eurosat(root: Path) -> Parts:
    files = {
        f"eurosat/2750/{name}/{name}_{i}.jpg": name
        for name in ("AnnualCrop", "River")
        for i in range(1, 6)
    }
    touch(root, files)
    test = {path: files[path] for path in (f"eurosat/2750/{name}" for name in EUROSAT_TEST)}
    return {path: name for path, name in files.items() if path not in test}, test


def flowers(root: Path) -> Parts:
    from scipy.io import savemat

    folder, classes = root / "flowers-102", Flowers102.classes
    folder.mkdir(parents=True)
    order = np.random.default_rng(0).permutation(3 * len(classes)) + 1
    labels = np.zeros(len(order), dtype=np.int64)
    parts = dict(zip(("trnid", "valid", "tstid"), np.split(order, 3), strict=True))
    for ids in parts.values():
        labels[ids - 1] = 1 + np.arange(len(classes))
    savemat(folder / "setid.mat", parts)
    savemat(folder / "imagelabels.mat", {"labels": labels})
    train, val, test = (
        {f"flowers-102/jpg/image_{i:05d}.jpg": classes[labels[i - 1] - 1] for i in ids}
        for ids in parts.values()
    )
    touch(root, [*train, *val, *test])
    return train | val, test


def pets(root: Path) -> Parts:
    base, breeds = root / "oxford-iiit-pet", ["Abyssinian", "american_bulldog", "Bengal"]
    parts: list[Files] = []
    for number, part in enumerate(("trainval", "test")):
        rows = [
            (f"{b}_{10 * number + i}", label) for i in range(2) for label, b in enumerate(breeds)
        ]
        write(base / "annotations" / f"{part}.txt", *(f"{n} {c + 1} 1 1" for n, c in rows))
        parts.append({f"oxford-iiit-pet/images/{n}.jpg": breeds[label] for n, label in rows})
        touch(root, parts[-1])
    return parts[0], parts[1]


def food101(root: Path) -> Parts:
    parts: list[Files] = []
    for number, part in enumerate(("train", "test")):
        lists = {name: [f"{name}/{number}{i}" for i in range(2)] for name in reversed(CLASSES)}
        write(root / "food-101" / "meta" / f"{part}.json", json.dumps(lists))
        parts.append({f"food-101/images/{p}.jpg": name for name, v in lists.items() for p in v})
        touch(root, parts[-1])
    return parts[0], parts[1]


def sun397(root: Path) -> Parts:
    classes = ["a/abbey", "o/oast_house", "a/apartment_building/outdoor"]
    write(root / "SUN397" / "ClassName.txt", *(f"/{name}" for name in classes))
    parts: list[Files] = []
    for number, part in enumerate(("Training", "Testing")):
        rows = {f"{name}/sun_{number}{i}.jpg": name for name in classes for i in range(2)}
        write(root / "SUN397" / "Partitions" / f"{part}_01.txt", *(f"/{path}\r" for path in rows))
        parts.append({f"SUN397/{path}": name for path, name in rows.items()})
        touch(root, parts[-1])
    touch(root, ["SUN397/a/abbey/sun_of_no_list.jpg"])
    return parts[0], parts[1]


def cog_lists() -> tuple[list[list[str]], dict[str, dict[str, list[str]]]]:
    """Return five levels of two concepts, and the images of each."""
    levels = [[f"n{level}0000001", f"n{level}0000002"] for level in range(1, 6)]
    splits = {
        name: {part: [f"{name}_{part}{i}.JPEG" for i in range(2)] for part in ("train", "test")}
        for names in levels
        for name in names
    }
    return levels, splits


def cog(root: Path, level: int) -> Parts:
    levels, splits = cog_lists()
    write(root / "cog" / "levels.json", json.dumps(levels))
    write(root / "cog" / "splits.json", json.dumps(splits))
    train, test = (
        {
            f"imagenet21k/{name}/{file}": name
            for name in levels[level - 1]
            for file in splits[name][part]
        }
        for part in ("train", "test")
    )
    touch(root, [*train, *test])
    return train, test


def inaturalist(root: Path, year: int) -> Parts:
    species = {7: "Apis mellifera", 3: "Bos taurus", 5: "Formica rufa"}  # ids in no order
    parts: list[Files] = []
    for number, part in enumerate(("train", "val")):
        images = [
            {
                "id": 10 * key + number * 100 + i,
                "file_name": f"train_val{year}/x/{key}/{number}{i}.jpg",
            }
            for key in species
            for i in range(2)
        ]
        keys = [key for key in species for _ in range(2)]
        content = {
            "images": images[::-1],
            "annotations": [
                {"image_id": image["id"], "category_id": key}
                for image, key in zip(images, keys, strict=True)
            ],
            "categories": [{"id": key, "name": name} for key, name in species.items()],
        }
        write(root / f"inat{year}" / f"{part}{year}.json", json.dumps(content))
        parts.append(
            {
                f"inat{year}/{image['file_name']}": species[key]
                for image, key in zip(images, keys, strict=True)
            }
        )
        touch(root, parts[-1])
    return parts[0], parts[1]


def _cog(level: int) -> Callable[[Path], Parts]:
    return lambda root: cog(root, level)


def _inaturalist(year: int) -> Callable[[Path], Parts]:
    return lambda root: inaturalist(root, year)


REPLICAS: dict[str, Callable[[Path], Parts]] = {
    **{
        writer.__name__: writer
        for writer in (imagenet, aircraft, cars196, dtd, eurosat, flowers, pets, food101, sun397)
    },
    **{f"cog-l{level}": _cog(level) for level in range(1, 6)},
    **{f"inat{year}": _inaturalist(year) for year in (2018, 2019)},
}
