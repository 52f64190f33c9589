"""The data sets of the evaluation: their names, sizes and layouts; opening one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from trex_models.data.sources import Source
from trex_models.transfer import offline, readers
from trex_models.transfer.checks import check_parts
from trex_models.transfer.cog import cog

_VGG = "https://www.robots.ox.ac.uk/~vgg/data"
_COG_TRAIN = (1_000_000, 1_200_000)


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set to classify on frozen features."""

    name: str
    """What the command line and the report call it."""
    title: str
    """What tables and figures call it."""
    open: Callable[[Path], tuple[Source, Source]]
    """Takes the data root; returns the images to fit on and those to test on."""
    layout: str
    """What must lie where below the data root."""
    home: str
    """Where to get it; empty for the user's own."""
    classifier: Literal["logistic", "sgd"] | None = "logistic"
    """What the protocol fits; None: the number of training images decides."""
    num_classes: int | None = None
    """None: any."""
    num_train: int | tuple[int, int] | None = None
    """Images to fit on, or the least and the most of them; None: any."""
    num_test: int | None = None
    """Images to test on; None: any."""


_KNOWN = [
    DataSet(
        name="imagenet",
        title="ImageNet-1K",
        open=readers.imagenet,
        layout="class folders (n01440764, ...) imagenet/train/WNID and imagenet/val/WNID; the "
        "validation images come unsorted, torchvision.datasets.ImageNet(ROOT, 'val') sorts them",
        home="https://image-net.org/download.php",
        classifier="sgd",
        num_classes=1000,
        num_train=1281167,
        num_test=50000,
    ),
    DataSet(
        name="aircraft",
        title="Aircraft",
        open=readers.aircraft,
        layout="fgvc-aircraft-2013b/data/images/*.jpg and the lists in fgvc-aircraft-2013b/data/",
        home=f"{_VGG}/fgvc-aircraft/ or torchvision.datasets.FGVCAircraft(ROOT, download=True)",
        num_classes=100,
        num_train=6667,
        num_test=3333,
    ),
    DataSet(
        name="cars196",
        title="Cars196",
        open=readers.cars196,
        layout="stanford_cars/cars_train/*.jpg, stanford_cars/cars_test/*.jpg, "
        "stanford_cars/devkit/cars_meta.mat, stanford_cars/devkit/cars_train_annos.mat and "
        "stanford_cars/cars_test_annos_withlabels.mat",
        home="a mirror: https://ai.stanford.edu/~jkrause/cars/car_dataset.html is gone",
        num_classes=196,
        num_train=8144,
        num_test=8041,
    ),
    DataSet(
        name="dtd",
        title="DTD",
        open=readers.dtd,
        layout="dtd/dtd/images/CLASS/*.jpg and dtd/dtd/labels/{train1,val1,test1}.txt",
        home=f"{_VGG}/dtd/ or torchvision.datasets.DTD(ROOT, download=True)",
        num_classes=47,
        num_train=3760,
        num_test=1880,
    ),
    DataSet(
        name="eurosat",
        title="EuroSAT",
        open=readers.eurosat,
        layout="class folders eurosat/2750/CLASS of the RGB images",
        home="https://github.com/phelber/EuroSAT or "
        "torchvision.datasets.EuroSAT(ROOT, download=True)",
        num_classes=10,
        num_train=18900,
        num_test=8100,
    ),
    DataSet(
        name="flowers",
        title="Flowers",
        open=readers.flowers,
        layout="flowers-102/jpg/*.jpg, flowers-102/imagelabels.mat and flowers-102/setid.mat, as "
        "they were published",
        home=f"{_VGG}/flowers/102/ or torchvision.datasets.Flowers102(ROOT, download=True)",
        num_classes=102,
        num_train=2040,
        num_test=6149,
    ),
    DataSet(
        name="pets",
        title="Pets",
        open=readers.pets,
        layout="oxford-iiit-pet/images/*.jpg and oxford-iiit-pet/annotations/{trainval,test}.txt",
        home=f"{_VGG}/pets/ or torchvision.datasets.OxfordIIITPet(ROOT, download=True)",
        num_classes=37,
        num_train=3680,
        num_test=3669,
    ),
    DataSet(
        name="food101",
        title="Food101",
        open=readers.food101,
        layout="food-101/images/CLASS/*.jpg and food-101/meta/{train,test}.json",
        home="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/ or "
        "torchvision.datasets.Food101(ROOT, download=True)",
        num_classes=101,
        num_train=75750,
        num_test=25250,
    ),
    DataSet(
        name="sun397",
        title="SUN397",
        open=readers.sun397,
        layout="SUN397/a/abbey/*.jpg and so on, and in SUN397/ or beside it ClassName.txt, "
        "Training_01.txt and Testing_01.txt of Partitions.zip",
        home="https://vision.princeton.edu/projects/2010/SUN/ (SUN397.tar.gz, Partitions.zip)",
        num_classes=397,
        num_train=19850,
        num_test=19850,
    ),
    *(
        DataSet(
            name=f"cog-l{level}",
            title=f"CoG L{level}",
            open=partial(cog, level=level),
            layout="imagenet21k/WNID/*.JPEG, cog/levels.json and cog/splits.json (or .pkl; "
            "docs/transfer_data.md has their form)",
            home="https://image-net.org/download.php (images) "
            "and https://github.com/naver/cog (lists)",
            classifier="sgd",
            num_classes=1000,
            num_train=_COG_TRAIN,
            num_test=50000,
        )
        for level in range(1, 6)
    ),
    *(
        DataSet(
            name=f"inat{year}",
            title=f"iNat{year}",
            open=reader,
            layout=f"inat{year}/train_val{year}/ (or inat{year}/{year}/) of the images, and "
            f"inat{year}/train{year}.json and inat{year}/val{year}.json",
            home=f"https://github.com/visipedia/inat_comp/tree/master/{year}",
            classifier="sgd",
            num_classes=num_classes,
            num_train=num_train,
            num_test=num_test,
        )
        for year, reader, num_classes, num_train, num_test in (
            (2018, readers.inat2018, 8142, 437513, 24426),
            (2019, readers.inat2019, 1010, 265213, 3030),
        )
    ),
    *(
        DataSet(
            name=name,
            title=title,
            open=reader,
            layout="nothing",
            home="pip install trex-models[transfer]",
            num_classes=num_classes,
            num_train=num_train,
            num_test=num_test,
        )
        for name, title, reader, num_classes, num_train, num_test in (
            ("fractals", "Fractals", offline.fractals, 40, 2000, 1000),
            ("fractals-unseen", "Unseen fractals", offline.fractals_unseen, 40, 2000, 1000),
            ("digits", "Digits", offline.digits, 10, 1198, 599),
            ("photographs", "Photographs", offline.photographs, 20, 1200, 600),
        )
    ),
]

DATA_SETS = {data_set.name: data_set for data_set in _KNOWN}
_SMALL = ("aircraft", "cars196", "dtd", "eurosat", "flowers", "pets", "food101", "sun397")
_LARGE = (*(f"cog-l{level}" for level in range(1, 6)), "inat2018", "inat2019")
GROUPS = {
    "paper": ("imagenet", *_SMALL, *_LARGE),
    "transfer": (*_SMALL, *_LARGE),
    "small": _SMALL,
    "offline": ("fractals", "fractals-unseen", "digits", "photographs"),
}


def select(text: str) -> list[DataSet]:
    """Return the data sets of a list such as ``aircraft,pets,offline,mine=PATH``, each once.

    Args:
        text: Names of data sets and of groups, and ``NAME=PATH`` for class folders at PATH, with
            a backslash before each comma of PATH.

    Raises:
        ValueError: A name is unknown, is no name, or stands for two things.
    """
    chosen: dict[str, DataSet] = {}
    places: dict[str, str] = {}
    words = (word.strip().replace("\\,", ",") for word in re.split(r"(?<!\\),", text))
    for word in filter(None, words):
        name, is_own, place = word.partition("=")
        if not is_own:
            members = GROUPS.get(name, (name,))
            chosen |= {member: _named(member) for member in members}
        elif places.setdefault(name, place) != place:
            raise ValueError(f"{name} is {places[name]} and {place}; give one of them another name")
        elif name not in chosen:
            chosen[name] = _own(name, place)
    if not chosen:
        raise ValueError(f"no data set is named; {_known()}")
    return list(chosen.values())


def open_checked(data_set: DataSet, root: Path) -> tuple[Source, Source]:
    """Open a data set and check all that can be checked without decoding an image.

    Args:
        data_set: Which one.
        root: The data root.

    Returns:
        The images to fit on and those to test on.

    Raises:
        ValueError: It is missing, damaged, or not what its name promises.
    """
    try:
        train, test = data_set.open(root.expanduser())
        check_parts(train, test, data_set.num_classes, data_set.num_train, data_set.num_test)
    except MemoryError:
        raise
    except Exception as error:  # torchvision and scipy let anything out of a damaged file
        needed = f"needed: {data_set.layout}"
        if data_set.home:
            needed = f"needed below {root}: {data_set.layout}; from {data_set.home}"
        raise ValueError(f"{data_set.name}: {_reason(error)}; {needed}") from error
    return train, test


def _reason(error: Exception) -> str:
    """Return what was raised in one line, without what it says to callers of torchvision."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, RuntimeError):  # its second sentence is on an argument of torchvision's
        return text.split(". ")[0].rstrip(".")
    own = isinstance(error, ValueError | ImportError)
    return text if own else f"{type(error).__name__}: {text}"


def _own(name: str, place: str) -> DataSet:
    """Return the user's class folders as a data set."""
    if name in DATA_SETS or name in GROUPS or not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(
            f"{name}={place}: {name!r} is taken or no name; choose one of letters, digits, '-', "
            "'_' and '.'"
        )
    if not place:
        raise ValueError(f"{name}= lacks the path of its class folders; give {name}=PATH")
    path = Path(place).expanduser()
    return DataSet(
        name=name,
        title=name,
        open=lambda _root: readers.class_folders(path),
        layout=f"class folders {path}/train/CLASS and {path}/test/CLASS (or val), of the same "
        f"classes, or {path}/CLASS alone",
        home="",
        classifier=None,
    )


def _named(name: str) -> DataSet:
    if name in DATA_SETS:
        return DATA_SETS[name]
    close = difflib.get_close_matches(name, [*DATA_SETS, *GROUPS])
    meant = f" (do you mean {' or '.join(close)}?)" if close else ""
    raise ValueError(f"no data set is called {name!r}{meant}; {_known()}")


def _known() -> str:
    return (
        f"there are {', '.join(DATA_SETS)}, the groups {', '.join(GROUPS)}, and NAME=PATH for "
        "class folders of your own (write a comma in PATH as \\,)"
    )
