"""Datasets of the transfer evaluation: names, sizes, layouts; selecting and opening them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torchvision import datasets as tv

from trex_models.data import samples
from trex_models.data.fractals import FractalSource
from trex_models.data.image_files import FileSource
from trex_models.data.scenes import SceneSource
from trex_models.data.sources import Source
from trex_models.transfer import readers

# The recipe demo trains on images 0 to 149 of fractal classes 0 to 39, with this variation.
NUM_CLASSES, IMAGES_PER_CLASS, SIZE, VARIATION = 40, 150, 64, 0.4
TRAIN_PER_CLASS, TEST_PER_CLASS = 50, 25
Kind = Literal["classes", "labels", "masks", "gallery", "landmarks", "imagenet"]
"""Annotations of a dataset: a class or several labels per image, a class per pixel, classes of
queries and a gallery, relevant images of each query, or ImageNet-1K classes of test images only."""
Reader = Callable[[Path], tuple[Source, ...]]
"""Function that maps the data root to the training images, if any, and the test images."""
LARGE = 100_000
"""Number of training images above which the user's own datasets use the SGD classifier."""


class Sizes(NamedTuple):
    """Published numbers of classes, training and test images; None disables the check."""

    classes: int | None = None
    train: int | None = None
    test: int | None = None


@dataclass(frozen=True)
class Dataset:
    """Dataset of the evaluation."""

    name: str
    title: str
    """Name in tables and plots."""
    open: Reader
    sizes: Sizes
    layout: str
    """Required files, relative to the data root."""
    home: str
    """URL of the dataset, or how to install it; empty for the user's own datasets."""
    classifier: Literal["logistic", "sgd"] | None = "logistic"
    """Classifier in the protocol; None to choose it by the number of training images."""
    kind: Kind = "classes"


class OpenedDataset(NamedTuple):
    """Dataset whose images were opened and checked."""

    dataset: Dataset
    sources: tuple[Source, ...]
    """Training images, or the gallery, and test images, or queries; or only test images."""

    @property
    def classifier(self) -> str:
        """Classifier of the dataset, logistic or sgd."""
        is_large = len(self.sources[0]) > LARGE
        return self.dataset.classifier or ("sgd" if is_large else "logistic")

    @property
    def splits(self) -> dict[str, Source]:
        """The sources by the names "train", if there are two, and "test"."""
        return dict(zip(("train", "test")[-len(self.sources) :], self.sources, strict=True))

    def describe(self) -> dict[str, Any]:
        """Return title, number of classes, numbers of images and their hashes, for the report."""
        entry = {"title": self.dataset.title, "num_classes": len(self.sources[-1].classes)}
        parts = {k: {"images": len(s), "sha256": s.digest()} for k, s in self.splits.items()}
        return {**entry, **parts}

    def summary(self) -> str:
        """Return title and numbers of images and classes as text."""
        kind = self.dataset.kind
        names = ("gallery", "query") if kind in ("gallery", "landmarks") else ("training", "test")
        pairs = zip(self.sources, names[-len(self.sources) :], strict=True)
        counts = " and ".join(f"{len(source):,} {name}" for source, name in pairs)
        classes = f" of {len(self.sources[-1].classes):,} classes" * (kind != "landmarks")
        return f"{self.dataset.title}: {counts} images{classes}"


def _fractals(first_class: int = 0) -> tuple[Source, Source]:
    """Return 40 fractal classes; the demo trains on classes 0 to 39, not on the test images."""
    part = partial(
        FractalSource, NUM_CLASSES, size=SIZE, first_class=first_class, variation=VARIATION
    )
    return part(TRAIN_PER_CLASS), part(TEST_PER_CLASS, first_image=IMAGES_PER_CLASS)


def _scenes() -> tuple[Source, Source]:
    return SceneSource(400), SceneSource(200, first=400)


def _dataset(
    title: str, read: Reader, sizes: Sizes, layout: str, home: str, name: str = "", **options: Any
) -> Dataset:
    """Return a dataset, by default named like its title."""
    name = name or title.lower().replace(" ", "-")
    return Dataset(name, title, read, sizes, layout, home, **options)


def _downloaded(
    title: str, data: Any, sizes: Sizes, folder: str, split: str | Reader, *splits: str
) -> Dataset:
    """Return a dataset from torchvision, with its training splits or our own reader."""
    if isinstance(split, str):
        split = readers.from_torchvision(data, folder, split, *splits)
    home = f"torchvision.datasets.{data.__name__}(ROOT, download=True)"
    return _dataset(title, split, sizes, f"{folder}/, downloaded by torchvision", home)


def _offline(
    title: str, create: Callable[[], tuple[Source, Source]], sizes: Sizes, **options: Any
) -> Dataset:
    home = "pip install '.[transfer]' in a clone"
    return _dataset(title, lambda _root: create(), sizes, "no files", home, **options)


def _packaged(title: str, name: str, sizes: Sizes, layout: str) -> Dataset:
    home = "python -m benchmarks.package_images --output ROOT in a clone"
    return _dataset(
        title, lambda root: readers.class_folders(root / name), sizes, layout, home, name
    )


_VOC2012 = _downloaded(
    "VOC2012", tv.VOCSegmentation, Sizes(21, 1464, 1449), "VOCdevkit/VOC2012", readers.voc
)
_KNOWN = [
    _dataset(
        "ImageNet-1K",
        readers.imagenet,
        Sizes(1000, 1281167, 50000),
        "class folders imagenet/train/WNID and imagenet/val/WNID (n01440764, ...); the archive of "
        "validation images has none, torchvision.datasets.ImageNet(ROOT, 'val') creates them",
        "https://image-net.org/download.php",
        name="imagenet",
        classifier="sgd",
    ),
    _downloaded(
        "Aircraft", tv.FGVCAircraft, Sizes(100, 6667, 3333), "fgvc-aircraft-2013b", "trainval"
    ),
    _dataset(
        "Cars196",
        readers.from_torchvision(tv.StanfordCars, "stanford_cars", "train"),
        Sizes(196, 8144, 8041),
        "stanford_cars/cars_train/*.jpg, stanford_cars/cars_test/*.jpg, "
        "stanford_cars/devkit/cars_meta.mat, stanford_cars/devkit/cars_train_annos.mat and "
        "stanford_cars/cars_test_annos_withlabels.mat",
        "a mirror, as https://ai.stanford.edu/~jkrause/cars/car_dataset.html is offline",
    ),
    _downloaded("DTD", tv.DTD, Sizes(47, 3760, 1880), "dtd/dtd", "train", "val"),
    _downloaded("EuroSAT", tv.EuroSAT, Sizes(10, 18900, 8100), "eurosat", readers.eurosat),
    _downloaded("Flowers", tv.Flowers102, Sizes(102, 2040, 6149), "flowers-102", "train", "val"),
    _downloaded("Pets", tv.OxfordIIITPet, Sizes(37, 3680, 3669), "oxford-iiit-pet", readers.pets),
    _downloaded("Food101", tv.Food101, Sizes(101, 75750, 25250), "food-101", "train"),
    _dataset(
        "SUN397",
        readers.sun397,
        Sizes(397, 19850, 19850),
        "SUN397/a/abbey/*.jpg and the other classes; ClassName.txt, Training_01.txt and "
        "Testing_01.txt from Partitions.zip, in SUN397/ or next to it",
        "https://vision.princeton.edu/projects/2010/SUN/ (SUN397.tar.gz, Partitions.zip)",
    ),
    *(
        _dataset(
            f"CoG L{level}",
            partial(readers.cog, level=level),
            Sizes(1000, None, 50000),
            "imagenet21k/WNID/*.JPEG, cog/levels.json and cog/splits.json (format: "
            "docs/transfer_data.md)",
            "https://image-net.org/download.php (images) and https://github.com/naver/cog (lists)",
            classifier="sgd",
        )
        for level in range(1, 6)
    ),
    *(
        _dataset(
            f"iNat{year}",
            partial(readers.inaturalist, year=year),
            sizes,
            f"images in inat{year}/train_val{year}/ (or inat{year}/{year}/), "
            f"inat{year}/train{year}.json and inat{year}/val{year}.json",
            f"https://github.com/visipedia/inat_comp/tree/master/{year}",
            classifier="sgd",
        )
        for year, sizes in ((2018, Sizes(8142, 437513, 24426)), (2019, Sizes(1010, 265213, 3030)))
    ),
    *(
        _dataset(
            f"Revisited {city}",
            partial(readers.landmarks, name=name),
            Sizes(1, images, 70),
            f"{name}/gnd_{name}.pkl and {name}/jpg/*.jpg",
            "https://github.com/filipradenovic/revisitop",
            name=name,
            kind="landmarks",
        )
        for city, name, images in (("Oxford", "roxford5k", 4993), ("Paris", "rparis6k", 6322))
    ),
    _dataset(
        "VOC2007",
        readers.voc2007,
        Sizes(20, 5011, 4952),
        "VOCdevkit/VOC2007/ImageSets/Main/*.txt and VOCdevkit/VOC2007/JPEGImages/*.jpg",
        "torchvision.datasets.VOCDetection(ROOT, '2007', SPLIT, download=True), trainval and test",
        kind="labels",
    ),
    *(
        _dataset(
            f"ImageNet-{suffix}",
            partial(readers.imagenet_variant, folder=folder, title=f"ImageNet-{suffix}"),
            Sizes(classes, None, images),
            f"class folders {folder}/WNID{' or 0 to 999' * (suffix == 'V2')}",
            f"https://github.com/{repository}",
            kind="imagenet",
        )
        for suffix, folder, classes, images, repository in (
            ("V2", "imagenet-v2", 1000, 10000, "modestyachts/ImageNetV2"),
            ("A", "imagenet-a", 200, 7500, "hendrycks/natural-adv-examples"),
            ("R", "imagenet-r", 200, 30000, "hendrycks/imagenet-r"),
            ("Sketch", "imagenet-sketch", 1000, None, "HaohanWang/ImageNet-Sketch"),
            ("ReaL", "imagenet/val", 1000, 50000, "google-research/reassessed-imagenet"),
        )
    ),
    replace(_VOC2012, kind="masks"),
    _dataset(
        "ADE20K",
        readers.ade20k,
        Sizes(150, 20210, 2000),
        "images/training, annotations/training, the same for validation, and objectInfo150.txt in "
        "ADEChallengeData2016/",
        "https://groups.csail.mit.edu/vision/datasets/ADE20K/ (scene parsing benchmark)",
        kind="masks",
    ),
    _offline("Fractals", _fractals, Sizes(40, 2000, 1000)),
    _offline(
        "Unseen fractals", partial(_fractals, 40), Sizes(40, 2000, 1000), name="fractals-unseen"
    ),
    _offline("Digits", partial(samples.digits, SIZE), Sizes(10, 1198, 599)),
    _offline("Photographs", partial(samples.photographs, SIZE), Sizes(20, 1200, 600)),
    _packaged("Clip art", "clipart", Sizes(56, 1572, 393), "clipart/CLASS/*.png"),
    _packaged("Emoji", "emoji", Sizes(200, 1000, 652), "emoji/train/NAME/ and emoji/test/NAME/"),
    _offline("Scenes", _scenes, Sizes(9, 400, 200), kind="masks"),
    _offline("Scene labels", _scenes, Sizes(9, 400, 200), kind="labels"),
]

DATASETS = {dataset.name: dataset for dataset in _KNOWN}
_SMALL = ("aircraft", "cars196", "dtd", "eurosat", "flowers", "pets", "food101", "sun397")
_LARGE = (*(f"cog-l{level}" for level in range(1, 6)), "inat2018", "inat2019")
GROUPS = {
    "paper": ("imagenet", *_SMALL, *_LARGE),
    "transfer": (*_SMALL, *_LARGE),
    "small": _SMALL,
    "landmarks": ("roxford5k", "rparis6k"),
    "multi-label": ("voc2007", "scene-labels"),
    "robustness": tuple(f"imagenet-{name}" for name in ("v2", "a", "r", "sketch", "real")),
    "segmentation": ("voc2012", "ade20k", "scenes"),
    "offline": ("fractals", "fractals-unseen", "digits", "photographs"),
    "packages": ("clipart", "emoji"),
}
_CHOICES = (
    f"choose from {', '.join(DATASETS)}, the groups {', '.join(GROUPS)}, and NAME=PATH for your "
    "own class folders or CSV files (escape a comma in PATH as \\,)"
)


def select(text: str) -> list[Dataset]:
    """Return the distinct datasets of a list such as ``aircraft,pets,offline,mine=PATH``.

    ``NAME=PATH`` adds the class folders at PATH, in which commas are escaped by a backslash.
    """
    chosen: dict[str, Dataset] = {}
    paths: dict[str, str] = {}
    for word in split_list(text):
        name, is_own, path = word.partition("=")
        if not is_own:
            members = GROUPS.get(name, (name,))
            if not DATASETS.keys() >= set(members):
                raise ValueError(f"{name!r} is not a known dataset; {_CHOICES}")
            chosen |= {member: DATASETS[member] for member in members}
        elif paths.setdefault(name, path) != path:
            raise ValueError(f"{name} is both {paths[name]} and {path}; rename one of them")
        elif name not in chosen:
            chosen[name] = _own(name, path)
    if not chosen:
        raise ValueError(f"--datasets is empty; {_CHOICES}")
    return list(chosen.values())


def split_list(text: str) -> list[str]:
    """Return the distinct items of a comma-separated list; a backslash escapes a comma."""
    words = (word.strip().replace("\\,", ",") for word in re.split(r"(?<!\\),", text))
    return list(dict.fromkeys(filter(None, words)))


def open_checked(dataset: Dataset, root: Path) -> OpenedDataset:
    """Open the images of a dataset; check all that needs no decoding."""
    try:
        sources = dataset.open(root.expanduser())
        _check(dataset, sources)
    except Exception as error:  # torchvision and SciPy raise errors of any type
        needed = f"needed: {dataset.layout}"
        if dataset.home:
            needed = f"needed below {root}: {dataset.layout}; from {dataset.home}"
        raise ValueError(f"{dataset.name}: {_reason(error)}; {needed}") from error
    return OpenedDataset(dataset, sources)


def _check(dataset: Dataset, sources: tuple[Source, ...]) -> None:
    train, test = sources[0], sources[-1]
    classes = list(train.classes)
    if classes != list(test.classes):
        odd = ", ".join(sorted(set(classes) ^ set(test.classes))[:3])
        raise ValueError(f"training and test images must have the same classes; only one has {odd}")
    counts = {"classes": len(classes), "training images": len(train), "test images": len(test)}
    for (kind, count), expected in zip(counts.items(), dataset.sizes, strict=True):
        if expected is not None and count != expected:
            remedy = "unpack the dataset again" if count < expected else "remove the extra ones"
            raise ValueError(f"expected {expected} {kind}, got {count}; {remedy}")
    sizes = _class_counts(train)
    scarce = np.array(classes[-len(sizes) :])[sizes < 2]
    if dataset.kind in ("classes", "labels") and len(scarce):
        where = " with or without them" if dataset.kind == "labels" else ""
        raise ValueError(
            f"{len(scarce)} classes have fewer than 2 training images{where} and cannot be split, "
            f"the first is {scarce[0]}; add images or remove these classes"
        )
    if len(sources) > 1 and isinstance(train, FileSource) and isinstance(test, FileSource):
        fitted, tested = (list(map(tuple, part.stats()[:, 2:].tolist())) for part in (train, test))
        if len(set(tested)) < len(tested):
            twice = next(index for index, file in enumerate(tested) if file in tested[:index])
            raise ValueError(
                f"the test image {test.name(twice)} is listed twice, or is a link to another one; "
                "remove one of the two"
            )
        both = set(fitted).intersection(tested)
        if shared := [index for index, file in enumerate(tested) if file in both]:
            raise ValueError(
                f"{len(shared)} files are both training and test images (the same file or a link "
                f"to it), such as {test.name(shared[0])}; remove them from one of the two"
            )
    if isinstance(train, readers.MaskSource) and isinstance(test, readers.MaskSource):
        readers.check_masks(train, test)


def _class_counts(source: Source) -> np.ndarray:
    """Return the number of images with each class or, of several labels, with or without it."""
    targets = getattr(source, "targets", None)
    if targets is None:
        return np.bincount(source.labels, minlength=len(source.classes))
    return np.minimum((targets == 1).sum(0), (targets == 0).sum(0))


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError):  # the second sentence is about a torchvision argument
        return text.split(". ")[0].rstrip(".")
    clear = isinstance(error, ValueError | ImportError | OSError)
    return text if clear else f"{type(error).__name__}: {text}"


def _own(name: str, text: str) -> Dataset:
    if name in DATASETS or name in GROUPS or not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(
            f"{name}={text}: {name!r} is reserved or invalid; use letters, digits, - _ and ."
        )
    if not text:
        raise ValueError(f"{name}= has no path; pass {name}=PATH with the path of class folders")
    path = Path(text).expanduser()
    kind, read, layout = _layout(path)
    return Dataset(name, name, lambda _: read(path), Sizes(), layout, "", None, kind)


def _layout(path: Path) -> tuple[Kind, Reader, str]:
    """Return kind, reader and required files of the user's own dataset."""
    if (path / "gallery").is_dir() and (path / "query").is_dir():
        layout = f"class folders {path}/gallery/CLASS and {path}/query/CLASS"
        return "gallery", readers.query_and_gallery, layout
    if path.suffix == ".csv" or (path / "train.csv").is_file():
        kind: Kind = "classes" if readers.has_one_label(path) else "labels"
        columns = "path, and label, labels (separated by ;) or one column of 0 and 1 per class"
        files = f"{path}/train.csv and test.csv (or val.csv)" if path.is_dir() else str(path)
        return kind, lambda _: readers.csv_files(path), f"{files} with the columns {columns}"
    pairs = [(base / "images", base / "masks") for base in (path, path / "train")]
    if any(images.is_dir() and masks.is_dir() for images, masks in pairs):
        layout = (
            f"{path}/train/images, {path}/train/masks and the same in test/ (or val/), or only "
            f"{path}/images and {path}/masks; masks are PNG files with the images' names"
        )
        return "masks", readers.mask_folders, layout
    layout = f"{path}/train/CLASS and {path}/test/CLASS (or val), or only {path}/CLASS"
    return "classes", readers.class_folders, f"class folders {layout}"
