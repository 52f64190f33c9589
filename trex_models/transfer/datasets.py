"""Datasets of the evaluation: their names, sizes and layouts; selecting and opening them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torchvision import datasets as tv

from trex_models.data import samples
from trex_models.data.fractals import FractalSource
from trex_models.data.image_files import FileSource
from trex_models.data.sources import Source
from trex_models.transfer import readers

# The recipe demo trains on images 0 to 149 of fractal classes 0 to 39, at this variation.
NUM_CLASSES, IMAGES_PER_CLASS, SIZE, VARIATION = 40, 150, 64, 0.4
TRAIN_PER_CLASS, TEST_PER_CLASS = 50, 25
Reader = Callable[[Path], tuple[Source, Source]]
"""Maps the data root to the images to fit on and those to test on."""


class Sizes(NamedTuple):
    """Published numbers of classes and images; None for any."""

    classes: int | None = None
    train: int | None = None
    test: int | None = None


@dataclass(frozen=True)
class Dataset:
    """A dataset to classify on frozen features."""

    name: str
    title: str
    """Name in tables and figures."""
    open: Reader
    sizes: Sizes
    layout: str
    """Files that it needs below the data root."""
    home: str
    """Where to get it; empty for the user's own."""
    classifier: Literal["logistic", "sgd"] | None = "logistic"
    """Classifier of the protocol; None: the number of training images decides."""


def _fractals(first_class: int = 0) -> tuple[Source, Source]:
    """Return fractals of 40 classes; the demo trains on classes 0 to 39, not on the test images."""
    part = partial(
        FractalSource, NUM_CLASSES, size=SIZE, first_class=first_class, variation=VARIATION
    )
    return part(TRAIN_PER_CLASS), part(TEST_PER_CLASS, first_image=IMAGES_PER_CLASS)


def _downloaded(
    title: str, kind: Any, sizes: Sizes, folder: str, *splits: str, read: Reader | None = None
) -> Dataset:
    """Return a dataset that lies as torchvision's class downloads it."""
    read = read or readers.from_torchvision(kind, folder, *splits)
    home = f"torchvision.datasets.{kind.__name__}(ROOT, download=True)"
    return Dataset(title.lower(), title, read, sizes, f"{folder}/ as torchvision leaves it", home)


def _offline(
    name: str, title: str, opened: Callable[[], tuple[Source, Source]], sizes: Sizes
) -> Dataset:
    home = "pip install trex-models[transfer]"
    return Dataset(name, title, lambda _root: opened(), sizes, "nothing", home)


_KNOWN = [
    Dataset(
        "imagenet",
        "ImageNet-1K",
        readers.imagenet,
        Sizes(1000, 1281167, 50000),
        "class folders (n01440764, ...) imagenet/train/WNID and imagenet/val/WNID; the "
        "validation images come unsorted, torchvision.datasets.ImageNet(ROOT, 'val') sorts them",
        "https://image-net.org/download.php",
        "sgd",
    ),
    _downloaded(
        "Aircraft", tv.FGVCAircraft, Sizes(100, 6667, 3333), "fgvc-aircraft-2013b", "trainval"
    ),
    Dataset(
        "cars196",
        "Cars196",
        readers.from_torchvision(tv.StanfordCars, "stanford_cars", "train"),
        Sizes(196, 8144, 8041),
        "stanford_cars/cars_train/*.jpg, stanford_cars/cars_test/*.jpg, "
        "stanford_cars/devkit/cars_meta.mat, stanford_cars/devkit/cars_train_annos.mat and "
        "stanford_cars/cars_test_annos_withlabels.mat",
        "a mirror: https://ai.stanford.edu/~jkrause/cars/car_dataset.html is gone",
    ),
    _downloaded("DTD", tv.DTD, Sizes(47, 3760, 1880), "dtd/dtd", "train", "val"),
    _downloaded("EuroSAT", tv.EuroSAT, Sizes(10, 18900, 8100), "eurosat", read=readers.eurosat),
    _downloaded("Flowers", tv.Flowers102, Sizes(102, 2040, 6149), "flowers-102", "train", "val"),
    _downloaded(
        "Pets", tv.OxfordIIITPet, Sizes(37, 3680, 3669), "oxford-iiit-pet", read=readers.pets
    ),
    _downloaded("Food101", tv.Food101, Sizes(101, 75750, 25250), "food-101", "train"),
    Dataset(
        "sun397",
        "SUN397",
        readers.sun397,
        Sizes(397, 19850, 19850),
        "SUN397/a/abbey/*.jpg and so on, and in SUN397/ or next to it ClassName.txt, "
        "Training_01.txt and Testing_01.txt of Partitions.zip",
        "https://vision.princeton.edu/projects/2010/SUN/ (SUN397.tar.gz, Partitions.zip)",
    ),
    *(
        Dataset(
            f"cog-l{level}",
            f"CoG L{level}",
            partial(readers.cog, level=level),
            Sizes(1000, None, 50000),
            "imagenet21k/WNID/*.JPEG, cog/levels.json and cog/splits.json ("
            "docs/transfer_data.md has their form)",
            "https://image-net.org/download.php (images) and https://github.com/naver/cog (lists)",
            "sgd",
        )
        for level in range(1, 6)
    ),
    *(
        Dataset(
            f"inat{year}",
            f"iNat{year}",
            partial(readers.inaturalist, year=year),
            sizes,
            f"inat{year}/train_val{year}/ (or inat{year}/{year}/) of the images, and "
            f"inat{year}/train{year}.json and inat{year}/val{year}.json",
            f"https://github.com/visipedia/inat_comp/tree/master/{year}",
            "sgd",
        )
        for year, sizes in (
            (2018, Sizes(8142, 437513, 24426)),
            (2019, Sizes(1010, 265213, 3030)),
        )
    ),
    _offline("fractals", "Fractals", _fractals, Sizes(40, 2000, 1000)),
    _offline("fractals-unseen", "Unseen fractals", partial(_fractals, 40), Sizes(40, 2000, 1000)),
    _offline("digits", "Digits", partial(samples.digits, SIZE), Sizes(10, 1198, 599)),
    _offline(
        "photographs", "Photographs", partial(samples.photographs, SIZE), Sizes(20, 1200, 600)
    ),
]

DATASETS = {dataset.name: dataset for dataset in _KNOWN}
_SMALL = ("aircraft", "cars196", "dtd", "eurosat", "flowers", "pets", "food101", "sun397")
_LARGE = (*(f"cog-l{level}" for level in range(1, 6)), "inat2018", "inat2019")
GROUPS = {
    "paper": ("imagenet", *_SMALL, *_LARGE),
    "transfer": (*_SMALL, *_LARGE),
    "small": _SMALL,
    "offline": ("fractals", "fractals-unseen", "digits", "photographs"),
}
_KNOWN_NAMES = (
    f"there are {', '.join(DATASETS)}, the groups {', '.join(GROUPS)}, and NAME=PATH for class "
    "folders of your own (write a comma in PATH as \\,)"
)


def select(text: str) -> list[Dataset]:
    """Return the datasets of a list such as ``aircraft,pets,offline,mine=PATH``, each once.

    ``NAME=PATH`` means class folders at PATH, with a backslash before each comma of PATH.
    """
    chosen: dict[str, Dataset] = {}
    places: dict[str, str] = {}
    words = (word.strip().replace("\\,", ",") for word in re.split(r"(?<!\\),", text))
    for word in filter(None, words):
        name, is_own, place = word.partition("=")
        if not is_own:
            members = GROUPS.get(name, (name,))
            if not DATASETS.keys() >= set(members):
                raise ValueError(f"no dataset is called {name!r}; {_KNOWN_NAMES}")
            chosen |= {member: DATASETS[member] for member in members}
        elif places.setdefault(name, place) != place:
            raise ValueError(f"{name} is {places[name]} and {place}; give one of them another name")
        elif name not in chosen:
            chosen[name] = _own(name, place)
    if not chosen:
        raise ValueError(f"no dataset is named; {_KNOWN_NAMES}")
    return list(chosen.values())


def open_checked(dataset: Dataset, root: Path) -> tuple[Source, Source]:
    """Open the images to fit on and to test on; check them as far as that needs no decoding."""
    try:
        train, test = dataset.open(root.expanduser())
        _check(train, test, dataset.sizes)
    except Exception as error:  # torchvision and scipy let anything out of a damaged file
        needed = f"needed: {dataset.layout}"
        if dataset.home:
            needed = f"needed below {root}: {dataset.layout}; from {dataset.home}"
        raise ValueError(f"{dataset.name}: {_reason(error)}; {needed}") from error
    return train, test


def _check(train: Source, test: Source, sizes: Sizes) -> None:
    """Check the images to fit on and those to test on; each check costs more than the last."""
    classes = list(train.classes)
    if classes != list(test.classes):
        odd = ", ".join(sorted(set(classes) ^ set(test.classes))[:3])
        raise ValueError(f"training and test images need the same classes; only one has {odd}")
    counts = {"classes": len(classes), "training images": len(train), "test images": len(test)}
    for (what, count), expected in zip(counts.items(), sizes, strict=True):
        if expected is not None and count != expected:
            remedy = "unpack all of it again" if count < expected else "remove what was added"
            raise ValueError(f"{count} {what} where {expected} are expected; {remedy}")
    scarce = np.flatnonzero(np.bincount(train.labels, minlength=len(classes)) < 2)
    if len(scarce):
        raise ValueError(
            f"{len(scarce)} classes have fewer than 2 training images and cannot be divided, the "
            f"first is {classes[scarce[0]]}; add images or remove them"
        )
    if isinstance(train, FileSource) and isinstance(test, FileSource):
        fitted, tested = (list(map(tuple, part.stats()[:, 2:].tolist())) for part in (train, test))
        places = set(fitted)
        both = [index for index, place in enumerate(tested) if place in places]
        if both:
            raise ValueError(
                f"{len(both)} files are among the training and the test images (by name or by "
                f"link), such as {test.name(both[0])}; list each once"
            )


def _reason(error: Exception) -> str:
    """Return an error's message in one line, without its advice to callers of torchvision."""
    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError):  # its second sentence is on an argument of torchvision's
        return text.split(". ")[0].rstrip(".")
    own = isinstance(error, ValueError | ImportError | OSError)
    return text if own else f"{type(error).__name__}: {text}"


def _own(name: str, place: str) -> Dataset:
    """Return the user's class folders as a dataset."""
    if name in DATASETS or name in GROUPS or not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(
            f"{name}={place}: {name!r} is taken or not allowed; use letters, digits, - _ and ."
        )
    if not place:
        raise ValueError(f"{name}= lacks the path of its class folders; give {name}=PATH")
    path = Path(place).expanduser()
    layout = (
        f"class folders {path}/train/CLASS and {path}/test/CLASS (or val), or only {path}/CLASS"
    )
    return Dataset(name, name, lambda _: readers.class_folders(path), Sizes(), layout, "", None)
