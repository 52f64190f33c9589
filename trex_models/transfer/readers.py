"""Readers of datasets on disk: each returns the training images and the test images.

Folder names are torchvision's. A damaged dataset may raise any error, to which
`datasets.open_checked` adds the expected layout.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from hashlib import sha256
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trex_models.cli import progress_bar
from trex_models.data import image_files
from trex_models.data.decode import UnreadableImageError, image_size, unreadable_error
from trex_models.data.image_files import CsvSource, FileSource, FolderSource, split_images, walk
from trex_models.data.sources import digest
from trex_models.evaluation.segmentation_head import IGNORED
from trex_models.evaluation.splits import hashed_order
from trex_models.pretrained.unpickling import load_arrays

Parts = tuple[FileSource, FileSource]
EUROSAT_TEST_PER_CLASS = 810  # EuroSAT has no official split
NUM_LEVELS = 5
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
_VOC_TARGETS = {"1": 1, "-1": 0, "0": -1}  # 0: only difficult objects
_CSV_TARGETS = {"1": 1, "0": 0, "-1": -1, "": -1}


def from_torchvision(kind: Any, folder: str, *train: str) -> Callable[[Path], Parts]:
    """Return a reader of a torchvision dataset: its class, image folder, training splits."""

    def read(root: Path) -> Parts:
        splits = *train, "test"
        *fitted, tested = (kind(root, split, loader=str) for split in splits)
        if any(part.classes != tested.classes for part in fitted):  # labels would differ
            raise ValueError(f"the splits {', '.join(splits)} list different classes")

        def listed(*parts: Any) -> FileSource:
            files = [part[index] for part in parts for index in range(len(part))]
            rows = [(Path(path).relative_to(root / folder).as_posix(), n) for path, n in files]
            return from_rows(root / folder, rows, tested.classes)

        return listed(*fitted), listed(tested)

    return read


def from_rows(root: Path, rows: Sequence[tuple[str, Any]], classes: Sequence[str]) -> FileSource:
    """Return a source from pairs of path and label."""
    return FileSource(root, [path for path, _ in rows], [int(label) for _, label in rows], classes)


def imagenet(root: Path) -> Parts:
    """Read ImageNet-1K; the validation images are used for testing."""
    return FolderSource(root / "imagenet" / "train"), FolderSource(root / "imagenet" / "val")


def timm_file(name: str) -> str:
    """Return a list of ImageNet classes or labels that timm contains."""
    return files("timm.data").joinpath("_info", name).read_text()


def imagenet_classes(title: str = "ImageNet") -> list[str]:
    """Return the sorted WordNet ids of ImageNet-1K, ImageNet-A or ImageNet-R."""
    return timm_file(f"{title.lower().replace('-', '_')}_synsets.txt").split()


def imagenet_variant(root: Path, folder: str, title: str) -> tuple[FileSource]:
    """Read test images of ImageNet classes; folders may be the numbers 0 to 999 in ImageNet-V2."""
    classes = imagenet_classes(title if title in ("ImageNet-A", "ImageNet-R") else "ImageNet")
    source = FolderSource(root / folder)
    is_numbered = title == "ImageNet-V2" and source.classes[0].isdecimal()
    expected = list(map(str, range(len(classes)))) if is_numbered else classes
    if odd := sorted(set(source.classes) ^ set(expected)):
        raise ValueError(
            f"{root / folder} must contain the {len(expected)} class folders of {title}; missing "
            f"or unexpected: {', '.join(odd[:3])} ({len(odd)} in all); unpack the archive again"
        )
    labels = np.array([expected.index(name) for name in source.classes])[source.labels]
    return (FileSource(source.root, source.paths, labels, classes),)


def eurosat(root: Path) -> Parts:
    """Read EuroSAT; its test images are selected by a hash, the same ones everywhere."""
    return split_by_hash(FolderSource(root / "eurosat" / "2750"), EUROSAT_TEST_PER_CLASS)


def class_folders(path: Path) -> Parts:
    """Read class folders, which are split into train/, val/ and test/, or else by a hash.

    Training images are those in ``train/`` and, if there is also ``test/``, in ``val/``. Without
    ``train/``, a fifth of each class is held out for testing.
    """
    if not (found := _parts(path)):
        return split_by_hash(FolderSource(path))
    train, *val, test = (FolderSource(path / name) for name in found)
    if not val:
        return train, test
    if train.classes != val[0].classes:
        raise ValueError(f"{path}/train and {path}/val must contain the same class folders")
    files = [
        f"{part.root.name}/{os.fsdecode(file)}" for part in (train, *val) for file in part.paths
    ]
    labels = np.concatenate([train.labels, val[0].labels])
    return FileSource(path, files, labels, train.classes), test


def _parts(path: Path) -> list[str]:
    """Return which of train, val and test are folders; none if train is not."""
    found = [name for name in ("train", "val", "test") if (path / name).is_dir()]
    if found == ["train"]:
        raise ValueError(f"{path} contains train/, but neither test/ nor val/; add one of them")
    return found if "train" in found else []


def split_by_hash(source: FileSource, count: int = 0) -> Parts:
    """Hold out images of each class, by default a fifth, by the hash of their paths."""
    mask = np.zeros(len(source), dtype=bool)
    for label in range(len(source.classes)):
        members = np.flatnonzero(source.labels == label)
        order = hashed_order(source.paths[members].tolist(), seed=0)
        mask[members[order[: count or max(1, round(len(members) / 5))]]] = True
    return source.part(np.flatnonzero(~mask)), source.part(np.flatnonzero(mask))


def pets(root: Path) -> Parts:
    """Read Oxford-IIIT Pets by breed."""
    folder = root / "oxford-iiit-pet"
    train, test = (
        [line.split() for line in read_lines(folder / "annotations" / f"{part}.txt")]
        for part in ("trainval", "test")
    )
    # Columns: image, breed (from 1), species (cat or dog), breed within the species.
    names = {int(breed): image.rsplit("_", 1)[0] for image, breed, *_ in train}
    classes = [names[breed] for breed in range(1, len(names) + 1)]

    def listed(rows: list[list[str]]) -> FileSource:
        files = [(f"images/{image}.jpg", int(breed) - 1) for image, breed, *_ in rows]
        return from_rows(folder, files, classes)

    return listed(train), listed(test)


def sun397(root: Path) -> Parts:
    """Read SUN397, partition 1; its lists are in SUN397/ or next to it."""
    folder = root / "SUN397"

    def names(file: str) -> list[str]:
        paths = [base / part / file for base in (folder, root) for part in (".", "Partitions")]
        found = [path for path in paths if path.is_file()]
        if not found:
            raise ValueError(f"{paths[0]} is missing; unpack Partitions.zip there")
        return [line.lstrip("/") for line in read_lines(found[0])]

    classes = names("ClassName.txt")
    label_of = {name: label for label, name in enumerate(classes)}
    train, test = (
        from_rows(
            folder, [(path, label_of[path.rsplit("/", 1)[0]]) for path in names(file)], classes
        )
        for file in ("Training_01.txt", "Testing_01.txt")
    )
    return train, test


def inaturalist(root: Path, year: int) -> Parts:
    """Read an iNaturalist competition by species; the validation images are used for testing."""
    folder, images = root / f"inat{year}", f"train_val{year}"

    def listed(name: str) -> FileSource:
        content = _read_json(folder / f"{name}{year}.json")
        categories = sorted(content["categories"], key=lambda category: int(category["id"]))
        label_of = {category["id"]: label for label, category in enumerate(categories)}
        file_of = {image["id"]: image["file_name"] for image in content["images"]}
        rows = [
            (file_of[row["image_id"]].removeprefix(f"{images}/"), label_of[row["category_id"]])
            for row in content["annotations"]
        ]
        renamed = rows and (folder / str(year) / rows[0][0]).exists()  # by torchvision
        classes = [str(category["name"]) for category in categories]
        return from_rows(folder / (str(year) if renamed else images), rows, classes)

    return listed("train"), listed("val")


def cog(root: Path, level: int) -> Parts:
    """Read a level, 1 to 5, of ImageNet-CoG: concepts at growing distance from ImageNet-1K.

    Sariyildiz et al., "Concept Generalization in Visual Representation Learning", ICCV 2021.
    """
    levels_file, splits_file = (root / "cog" / f"{name}.json" for name in ("levels", "splits"))
    levels, splits = _read_json(levels_file), _read_json(splits_file)
    if len(levels) != NUM_LEVELS:
        raise ValueError(f"{levels_file} has {len(levels)} levels; it must be a list of 5 lists")
    concepts = sorted(levels[level - 1])

    def listed(part: str) -> FileSource:
        numbered = enumerate(concepts)
        rows = [
            (f"{name}/{file}", label) for label, name in numbered for file in splits[name][part]
        ]
        return from_rows(root / "imagenet21k", rows, concepts)

    try:
        return listed("train"), listed("test")
    except (KeyError, TypeError) as error:
        reason = f"lacks a list of training or test images ({error})"
        raise ValueError(f"{splits_file} {reason}") from error


def query_and_gallery(path: Path) -> Parts:
    """Read class folders of a gallery and of queries, which may lack some of its classes."""
    gallery = FolderSource(path / "gallery")
    return gallery, FolderSource(path / "query", gallery.classes)


class LandmarkSource(FileSource):
    """Queries of revisited Oxford or Paris, cropped to their box.

    ``boxes`` contains left, top, right and bottom of each query in pixels, (N, 4); ``ground_truth``
    the indices of its ``easy``, ``hard`` and ``junk`` images.
    """

    def __init__(
        self, root: Path, paths: list[str], boxes: Any, ground_truth: list[dict[str, list[int]]]
    ) -> None:
        super().__init__(root, paths, [0] * len(paths), ["landmark"])
        self.boxes = np.array(boxes, np.float64).round().astype(np.int64)
        self.ground_truth = ground_truth

    def read(self, index: int) -> np.ndarray:
        """Return a query cropped to its box, (H, W, 3) uint8 RGB."""
        image = super().read(index)
        left, top, right, bottom = self.boxes[index].clip(0).tolist()
        cropped = image[top:bottom, left:right]
        if not cropped.size:
            box = left, top, right, bottom
            raise UnreadableImageError(f"{self.name(index)}: the box {box} is outside the image")
        return np.ascontiguousarray(cropped)

    def digest(self) -> str:
        """Return a hash of the paths, the boxes and the ground truth."""
        return digest(super().digest(), self.boxes, json.dumps(self.ground_truth))


def landmarks(root: Path, name: str) -> Parts:
    """Read revisited Oxford or Paris: NAME/gnd_NAME.pkl and NAME/jpg."""
    path, images = root / name / f"gnd_{name}.pkl", root / name / "jpg"
    try:
        content = load_arrays(path)
        database, queries = ([f"{n}.jpg" for n in content[key]] for key in ("imlist", "qimlist"))
        boxes = [list(map(float, query["bbx"])) for query in content["gnd"]]
        truth = [
            {kind: list(map(int, query[kind])) for kind in ("easy", "hard", "junk")}
            for query in content["gnd"]
        ]
    except (KeyError, TypeError, ValueError, EOFError, IndexError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not the ground truth of {name}: {reason}") from error
    for number, query in enumerate(truth):
        for index in chain(*query.values()):
            if not 0 <= index < len(database):
                raise ValueError(
                    f"{path}: query {number} lists image {index}, but there are {len(database)}"
                )
    if not len(queries) == len(truth) or any(len(box) != 4 for box in boxes):
        raise ValueError(f"{path}: {len(queries)} queries have {len(truth)} boxes of 4 numbers")
    gallery = FileSource(images, database, [0] * len(database), ["landmark"])
    return gallery, LandmarkSource(images, queries, boxes, truth)


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
    file = path if path.suffix == ".csv" else path / "train.csv"
    header = _header(file, "path")
    if {"label", "labels"} <= {*header}:
        raise ValueError(f"{file} has the columns label and labels; remove one of them")
    return "label" in header


def _header(path: Path, *required: str) -> list[str]:
    _, header = next(image_files.csv_rows(path))
    for column in required:
        image_files.csv_column(path, header, column)
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
    rows = image_files.csv_rows(path)
    _, header = next(rows)
    columns = {name: image_files.csv_column(path, header, name) for name in ("path", *header)}
    found: dict[str, dict[str, int]] = {}
    for line, row in rows:
        place = f"{path}, line {line}"
        image = image_files.csv_value(path, line, header, row, columns["path"])
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


class MaskSource(FileSource):
    """Source of images with masks, PNG files of class indices.

    Images are rotated as their EXIF orientation says; masks must match the rotated images.
    ``files`` are pairs of an image and its mask, relative to ``root``. If ``reduce_zero`` is True,
    label 0 is ignored, and label k is class k - 1.
    """

    def __init__(
        self, root: Path, files: Sequence[Any], classes: Sequence[str], reduce_zero: bool = False
    ) -> None:
        super().__init__(root, [image for image, _ in files], [0] * len(files), classes)
        self.masks = FileSource(root, [mask for _, mask in files], self.labels, classes)
        self.reduce_zero = reduce_zero

    def mask(self, index: int) -> np.ndarray:
        """Return the labels of an image's pixels, (H, W) uint8."""
        mask = read_mask(self.masks.name(index))
        if self.reduce_zero:
            mask[mask == 0] = IGNORED
            mask[mask < IGNORED] -= 1
        return mask

    def part(self, indices: np.ndarray) -> MaskSource:
        """Return a source of the images at the given indices."""
        files = zip(self.paths[indices].tolist(), self.masks.paths[indices].tolist(), strict=True)
        return MaskSource(self.root, list(files), self.classes, self.reduce_zero)

    def digest(self) -> str:
        """Return a hash of the paths, the classes and the contents of the masks."""
        return digest(super().digest(), self.masks.digest(), *(sha for _, sha in self.scan))

    @cached_property
    def scan(self) -> list[tuple[np.ndarray, bytes]]:
        """Labels in each mask, (256,) bool, and its hash; checks the sizes of all masks."""
        with ThreadPoolExecutor() as pool:
            results = pool.map(self._scan_mask, range(len(self)))
            return list(progress_bar(len(self), f"masks of {self.root}", "mask", iterable=results))

    def _scan_mask(self, index: int) -> tuple[np.ndarray, bytes]:
        mask, size = self.mask(index), image_size(self.name(index))
        if mask.shape != size:
            raise ValueError(
                f"{self.masks.name(index)} has {mask.shape[1]} x {mask.shape[0]} pixels, but the "
                f"image, upright, {size[1]} x {size[0]}; save the mask in the image's size"
            )
        return np.bincount(mask.ravel(), minlength=256) > 0, sha256(mask.tobytes()).digest()


def read_mask(path: str) -> np.ndarray:
    """Read a mask, a PNG file of class indices, (H, W) uint8."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            mode, values = image.mode, np.array(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise unreadable_error(path, error) from error
    if mode not in ("1", "L", "P", "I", "I;16") or values.max() > IGNORED:
        problem = f"labels up to {values.max()}" if mode[0] == "I" else f"the mode {mode}"
        raise ValueError(
            f"{path} has {problem}; save class indices below {IGNORED} as a grayscale or palette "
            f"PNG, and {IGNORED} for ignored pixels"
        )
    return values.astype(np.uint8)


def check_masks(train: MaskSource, test: MaskSource) -> None:
    """Check that all labels are classes, and that each class is in a training mask."""
    count = len(train.classes)
    for source in (train, test):
        for index, (found, _) in enumerate(source.scan):
            if found[count:IGNORED].any():
                label = count + int(found[count:].argmax()) + source.reduce_zero
                raise ValueError(
                    f"{source.masks.name(index)} has the label {label}, but there are {count} "
                    f"classes; correct the mask, or use {IGNORED} for ignored pixels"
                )
    present, tested = (
        np.any([found for found, _ in source.scan], axis=0)[:count] for source in (train, test)
    )
    if count < 2 or not tested.any():
        problem = "training masks have one class" if count < 2 else "test pixels are all ignored"
        raise ValueError(f"{train.root}: {problem}; add masks with two classes or more")
    if not present.all():
        label = int(present.argmin())
        raise ValueError(
            f"no training mask has the class {train.classes[label]} (label {label}); add images "
            "of it, or remove it from the classes and renumber the labels"
        )


def mask_folders(path: Path) -> Parts:
    """Read images/ and masks/ in train/, val/ and test/, or else split them by a hash.

    Parts are as in ``class_folders``. Class names are the lines of ``classes.txt``, if it exists.
    """
    names = read_lines(path / "classes.txt") if (path / "classes.txt").is_file() else []
    create = partial(MaskSource, path, classes=names or ["class 0"])
    if found := _parts(path):
        *fitted, tested = (pair_masks(path, f"{part}/images", f"{part}/masks") for part in found)
        train, test = create([*chain(*fitted)]), create(tested)
    else:
        parts: Any = split_by_hash(create(pair_masks(path, "images", "masks")))
        train, test = parts
    if not len(train):
        raise ValueError(f"{path} has one image, but training and testing need one each; add more")
    if not names:
        present = np.any([labels for labels, _ in train.scan], axis=0)[:IGNORED]
        names = [f"class {label}" for label in range(1 + np.flatnonzero(present).max(initial=0))]
        train.classes = test.classes = names
    return train, test


def pair_masks(root: Path, images: str, masks: str) -> list[tuple[str, str]]:
    """Return the paths of images and of masks with the same names, relative to ``root``."""
    found = list(map(os.fsdecode, split_images(walk(root, images))[0]))
    if not found:
        raise ValueError(f"{root / images} contains no images; add images")
    stems = [Path(path).relative_to(images).with_suffix("") for path in found]
    expected = [f"{masks}/{stem}.png" for stem in stems]
    existing = list(map(os.fsdecode, walk(root, masks)))
    for name in sorted(Counter(expected) - Counter(existing)):  # twice, if of two images
        problem = "is the mask of two images" if name in existing else "is missing"
        raise ValueError(f"{root / name} {problem}; each image needs its own mask, named like it")
    if unused := sorted(set(existing) - set(expected)):
        raise ValueError(f"{root / unused[0]} is the mask of no image; add the image or remove it")
    return list(zip(found, expected, strict=True))


def voc(root: Path) -> Parts:
    """Read VOC2012 segmentation; the validation images are used for testing."""
    base = root / "VOCdevkit" / "VOC2012"

    def listed(split: str) -> MaskSource:
        names = read_lines(base / "ImageSets" / "Segmentation" / f"{split}.txt")
        files = [(f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png") for name in names]
        return MaskSource(base, files, ["background", *VOC_CLASSES])

    return listed("train"), listed("val")


def ade20k(root: Path) -> Parts:
    """Read ADE20K's scene parsing benchmark; the validation images are used for testing."""
    base = root / "ADEChallengeData2016"
    rows = read_lines(base / "objectInfo150.txt")[1:]
    classes = [row.split("\t")[-1].split(",")[0] for row in rows]

    def listed(split: str) -> MaskSource:
        files = pair_masks(base, f"images/{split}", f"annotations/{split}")
        return MaskSource(base, files, classes, reduce_zero=True)

    return listed("training"), listed("validation")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy it again") from error


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file that are not blank, without surrounding spaces."""
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]
