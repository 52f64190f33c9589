"""Readers of datasets on disk: each returns the training images and the test images.

Folder names are torchvision's. A damaged dataset may raise any error, to which
`datasets.open_checked` adds the expected layout.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from trex_models.data.decode import UnreadableImageError
from trex_models.data.image_files import FileSource, FolderSource
from trex_models.data.sources import digest
from trex_models.evaluation.splits import hashed_order
from trex_models.pretrained.unpickling import load_arrays

Parts = tuple[FileSource, FileSource]
EUROSAT_TEST_PER_CLASS = 810  # EuroSAT has no official split
NUM_LEVELS = 5


def from_torchvision(kind: Any, folder: str, *train: str) -> Callable[[Path], Parts]:
    """Return a reader of a torchvision dataset: its class, image folder, training splits."""

    def read(root: Path) -> Parts:
        splits = *train, "test"
        *fitted, tested = (kind(root, split, loader=str) for split in splits)
        classes = tested.classes
        if any(part.classes != classes for part in fitted):  # labels would differ
            raise ValueError(f"the splits {', '.join(splits)} list different classes")

        def listed(parts: list[Any]) -> FileSource:
            rows = [part[index] for part in parts for index in range(len(part))]
            paths = [Path(path).relative_to(root / folder).as_posix() for path, _ in rows]
            return FileSource(root / folder, paths, [int(label) for _, label in rows], classes)

        return listed(fitted), listed([tested])

    return read


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
    return split_by_hash(FolderSource(root / "eurosat" / "2750"), lambda _: EUROSAT_TEST_PER_CLASS)


def class_folders(path: Path) -> Parts:
    """Read class folders, which are split into train/, val/ and test/, or else by a hash.

    Training images are those in ``train/`` and, if there is also ``test/``, in ``val/``. Without
    ``train/``, a fifth of each class is held out for testing.
    """
    found = [name for name in ("train", "val", "test") if (path / name).is_dir()]
    if "train" not in found:
        return split_by_hash(FolderSource(path), lambda count: max(1, round(count / 5)))
    if len(found) == 1:
        raise ValueError(f"{path} contains train/, but neither test/ nor val/; add one of them")
    train, *val, test = (FolderSource(path / name) for name in found)
    if not val:
        return train, test
    if train.classes != val[0].classes:
        raise ValueError(f"{path}/train and {path}/val must contain the same class folders")
    files = [b"train/" + file for file in train.paths.tolist()]
    files += [b"val/" + file for file in val[0].paths.tolist()]
    labels = np.concatenate([train.labels, val[0].labels])
    return FileSource(path, files, labels, train.classes), test


def split_by_hash(source: FileSource, test_images: Callable[[int], int]) -> Parts:
    """Hold out ``test_images(count)`` images of each class, by the hash of their paths."""
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
        [line.split() for line in read_lines(folder / "annotations" / f"{part}.txt")]
        for part in ("trainval", "test")
    )
    # Columns: image, breed (from 1), species (cat or dog), breed within the species.
    names = {int(breed): image.rsplit("_", 1)[0] for image, breed, *_ in train}
    classes = [names[breed] for breed in range(1, len(names) + 1)]

    def listed(rows: list[list[str]]) -> FileSource:
        paths = [f"images/{image}.jpg" for image, *_ in rows]
        return FileSource(folder, paths, [int(breed) - 1 for _, breed, *_ in rows], classes)

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

    def listed(paths: list[str]) -> FileSource:
        labels = [label_of[path.rsplit("/", 1)[0]] for path in paths]
        return FileSource(folder, paths, labels, classes)

    return listed(names("Training_01.txt")), listed(names("Testing_01.txt"))


def inaturalist(root: Path, year: int) -> Parts:
    """Read an iNaturalist competition by species; the validation images are used for testing."""
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
    """Read a level, 1 to 5, of ImageNet-CoG: concepts at growing distance from ImageNet-1K.

    Sariyildiz et al., "Concept Generalization in Visual Representation Learning", ICCV 2021.
    """
    levels_file, splits_file = (root / "cog" / f"{name}.json" for name in ("levels", "splits"))
    levels, splits = _read_json(levels_file), _read_json(splits_file)
    if len(levels) != NUM_LEVELS:
        raise ValueError(f"{levels_file} has {len(levels)} levels; it must be a list of 5 lists")
    concepts = sorted(levels[level - 1])
    try:
        train, test = (
            FileSource(
                root / "imagenet21k",
                [f"{concept}/{name}" for concept in concepts for name in splits[concept][part]],
                [label for label, concept in enumerate(concepts) for _ in splits[concept][part]],
                concepts,
            )
            for part in ("train", "test")
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{splits_file} lacks a list of training or test images ({error})"
        ) from error
    return train, test


def query_and_gallery(path: Path) -> Parts:
    """Read class folders of a gallery and of queries, which may lack some of its classes."""
    gallery = FolderSource(path / "gallery")
    return gallery, FolderSource(path / "query", gallery.classes)


class LandmarkSource(FileSource):
    """Queries of revisited Oxford or Paris, cropped to their box.

    Args:
        root: Folder of the images.
        paths: Paths of the N queries, relative to ``root``.
        boxes: Box of each query in pixels: left, top, right, bottom, (N, 4).
        ground_truth: Indices of ``easy``, ``hard`` and ``junk`` images of each query.
    """

    def __init__(
        self,
        root: Path,
        paths: list[str],
        boxes: list[list[float]],
        ground_truth: list[dict[str, list[int]]],
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
            raise UnreadableImageError(
                f"{self.name(index)}: the box {(left, top, right, bottom)} is outside the image"
            )
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
        for index in (index for indices in query.values() for index in indices):
            if not 0 <= index < len(database):
                raise ValueError(
                    f"{path}: query {number} lists image {index}, but there are {len(database)}"
                )
    if not len(queries) == len(truth) or any(len(box) != 4 for box in boxes):
        raise ValueError(f"{path}: {len(queries)} queries have {len(truth)} boxes of 4 numbers")
    gallery = FileSource(images, database, [0] * len(database), ["landmark"])
    return gallery, LandmarkSource(images, queries, boxes, truth)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy it again") from error


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file that are not blank, without surrounding spaces."""
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]
