"""Transfer datasets, tested on small replicas of their layouts."""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torchvision

from tests import replicas
from tests.replicas import REPLICAS, Files, Parts, folders, own, refused, touch
from trex_models.data.fractals import FractalSource
from trex_models.data.sources import Source
from trex_models.transfer import readers
from trex_models.transfer.datasets import (
    DATASETS,
    GROUPS,
    Dataset,
    OpenedDataset,
    Sizes,
    open_checked,
    select,
)

ON_DISK = sorted(REPLICAS)


@pytest.fixture(autouse=True)
def _replicas_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "EUROSAT_TEST_PER_CLASS", 2)
    # torchvision checks the MD5 of the official lists of Flowers-102.
    monkeypatch.setattr(
        torchvision.datasets.flowers102, "check_integrity", lambda path, _md5: Path(path).exists()
    )


def small(name: str, parts: Parts) -> Dataset:
    """Return a dataset with the sizes of its replica."""
    train, test = parts
    return replace(DATASETS[name], sizes=Sizes(len(set(train.values())), len(train), len(test)))


def files(source: Source, root: Path) -> Files:
    """Return {path relative to the data root: class} for all images of a source."""
    names = [str(Path(source.name(i)).relative_to(root)) for i in range(len(source))]
    assert len(set(names)) == len(names)
    return {
        name: source.classes[label]
        for name, label in zip(names, source.labels.tolist(), strict=True)
    }


@pytest.mark.parametrize("name", ON_DISK)
def test_each_part_has_its_files_and_labels(tmp_path: Path, name: str) -> None:
    tmp_path, moved = tmp_path / "one", tmp_path / "two" / "three"
    expected = REPLICAS[name](tmp_path)
    train, test = open_checked(small(name, expected), tmp_path).sources
    assert (files(train, tmp_path), files(test, tmp_path)) == expected
    assert train.read(0).shape == (6, 8, 3)
    shutil.copytree(tmp_path, moved)
    digests = [part.digest() for part in open_checked(small(name, expected), moved).sources]
    assert digests == [train.digest(), test.digest()]  # independent of the location
    assert len(set(digests)) == 2


@pytest.mark.parametrize("name", ON_DISK)
def test_wrong_files_are_reported_with_layout_and_url(tmp_path: Path, name: str) -> None:
    message = refused(DATASETS[name], tmp_path)
    assert message.startswith(f"{name}: ")
    assert f"needed below {tmp_path}: {DATASETS[name].layout}; from " in message
    assert message.endswith(DATASETS[name].home)
    assert "You can use" not in message
    expected = REPLICAS[name](tmp_path)
    right = small(name, expected)
    count = len(expected[0])
    for change, what in (
        ({"train": count + 1}, f"expected {count + 1} training images, got {count}"),
        ({"test": len(expected[1]) - 1}, "test images, got .*remove the extra ones"),
        ({"classes": 1234}, "expected 1234 classes, got .*; unpack the dataset"),
    ):
        wrong = replace(right, sizes=right.sizes._replace(**change))
        assert re.search(what, refused(wrong, tmp_path))
    assert DATASETS[name].layout in refused(wrong, tmp_path)
    victim = sorted(expected[1])[-1]
    (tmp_path / victim).write_bytes(b"")
    message = refused(right, tmp_path)
    assert re.search(f"1 of .* missing or empty, the first is .*{re.escape(victim)}", message)


def test_groups_and_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(GROUPS["transfer"]) == 15
    assert GROUPS["paper"] == ("imagenet", *GROUPS["transfer"])
    assert set(GROUPS["paper"]) == set(REPLICAS)
    assert set().union(*GROUPS.values()) == set(DATASETS)
    assert set(GROUPS["small"]) < set(GROUPS["transfer"])
    for name in GROUPS["paper"]:
        fits = "logistic" if name in GROUPS["small"] else "sgd"
        assert DATASETS[name].classifier == fits
    for name, dataset in DATASETS.items():
        assert dataset.name == name
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    message = refused(DATASETS["digits"], Path("/absent"))
    assert "requires scikit-learn and scikit-image: pip install '.[transfer]' in a clone" in message


@pytest.mark.parametrize(
    ("name", "total"),
    [
        *[("aircraft", 100 * 100), ("cars196", 16185), ("dtd", 47 * 120), ("eurosat", 27000)],
        *[("flowers", 8189), ("pets", 7349), ("food101", 101 * 1000), ("sun397", 397 * 100)],
        *[("inat2018", 461939), ("inat2019", 268243)],
    ],
)
def test_published_numbers_add_up(name: str, total: int) -> None:
    sizes = DATASETS[name].sizes
    assert isinstance(sizes.train, int)
    assert sizes.test is not None
    assert sizes.train + sizes.test == total


# Selecting datasets.


def test_a_list_of_names_groups_and_folders(tmp_path: Path) -> None:
    chosen = select(f"pets, small,mine={tmp_path},pets,mine={tmp_path},")
    others = [name for name in GROUPS["small"] if name != "pets"]
    assert [dataset.name for dataset in chosen] == ["pets", *others, "mine"]
    assert chosen[-1].classifier is None
    (own, digits) = select(r"mine=/data/a\,b,digits")
    assert (own.layout.split()[2], digits.name) == ("/data/a,b/train/CLASS", "digits")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pets,aircaft", "'aircaft' is not a known dataset; choose from"),
        ("xyz", "choose from imagenet, .*groups paper, .*, and NAME="),
        ("mine=/a,mine=/b", "mine is both /a and /b; rename"),
        ("pets=/a", "pets=/a: 'pets' is reserved or invalid"),
        ("small=/a", "'small' is reserved"),
        ("a/b=/a", "'a/b' is reserved or invalid; use letters"),
        ("=/a", "'' is reserved or invalid"),
        ("mine=", "mine= has no path"),
        (" , ", "--datasets is empty; choose from"),
    ],
)
def test_problems_of_lists_are_reported(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(text)


# Our own splits.


def test_eurosats_division_of_a_class_does_not_depend_on_the_others(tmp_path: Path) -> None:
    _, expected = replicas.eurosat(tmp_path)
    touch(tmp_path, [f"eurosat/2750/Lake/Lake_{i}.jpg" for i in range(4)])
    touch(tmp_path, [f"eurosat/2750/Alp/Alp_{i}.jpg" for i in range(7)])
    _, test = DATASETS["eurosat"].open(tmp_path)
    found = files(test, tmp_path)
    assert expected.items() <= found.items()
    assert len(found) == 8


def test_the_number_of_images_selects_the_classifier() -> None:
    [own] = select("mine=anywhere")
    test = FractalSource(2, 5, 16)
    for count, classifier in ((10, "logistic"), (50_001, "sgd")):
        assert OpenedDataset(own, (FractalSource(2, count, 16), test)).classifier == classifier


def test_own_folders_with_three_parts_train_on_two(tmp_path: Path) -> None:
    train, val = folders(tmp_path, "train", 3), folders(tmp_path, "val", 1)
    found = open_checked(own(tmp_path), Path("/elsewhere")).sources
    assert [files(part, tmp_path) for part in found] == [train, val]
    test = folders(tmp_path, "test", 2)
    found = open_checked(own(tmp_path), tmp_path).sources
    assert [files(part, tmp_path) for part in found] == [train | val, test]
    shutil.rmtree(tmp_path / "val")
    found = open_checked(own(tmp_path), tmp_path).sources
    assert [files(part, tmp_path) for part in found] == [train, test]
    folders(tmp_path, "val", 1, ["dog", "emu"])
    assert "must contain the same class folders" in refused(own(tmp_path), tmp_path)


def test_of_undivided_folders_a_fifth_of_each_class_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    for name, count in (("ant", 4), ("bee", 10), ("cow", 13), ("test", 3)):
        folders(tmp_path, "mine", count, [name])
    train, test = open_checked(own(path), tmp_path).sources
    assert np.bincount(test.labels).tolist() == [1, 2, 3, 1]
    assert np.bincount(train.labels).tolist() == [3, 8, 10, 2]
    assert not set(files(train, path)) & set(files(test, path))
    folders(tmp_path, "one", 10)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    folders(tmp_path, "two", 3, ["aardvark"])
    one, two = (
        files(open_checked(own(tmp_path / name), tmp_path).sources[1], tmp_path / name)
        for name in ("one", "two")
    )
    assert one.items() < two.items()


def test_unsuitable_folders_are_reported(tmp_path: Path) -> None:
    message = refused(own(tmp_path / "absent"), tmp_path)
    assert message.startswith(f"mine: {tmp_path}/absent cannot be listed")
    assert message.endswith(f"or only {tmp_path}/absent/CLASS")
    folders(tmp_path, "train", 2)
    assert "neither test/ nor val/; add one" in refused(own(tmp_path), tmp_path)
    folders(tmp_path, "test", 2, ["ant", "bee", "dog"])
    assert "only one has cow, dog" in refused(own(tmp_path), tmp_path)
    folders(tmp_path, "train", 1, ["dog", "emu"])
    folders(tmp_path, "test", 1, ["cow", "emu"])
    message = refused(own(tmp_path), tmp_path)
    assert "2 classes have fewer than 2 training images" in message
    assert "the first is dog; add images" in message
    expected = replicas.imagenet(tmp_path)
    shutil.rmtree(tmp_path / "imagenet" / "val")
    touch(tmp_path, ["imagenet/val/ILSVRC2012_val_00000001.JPEG"])
    message = refused(small("imagenet", expected), tmp_path)
    assert "0 class folders" in message
    assert "torchvision.datasets.ImageNet(ROOT, 'val') creates them" in message


@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_links_to_training_images_are_reported(tmp_path: Path, link: str) -> None:
    folders(tmp_path, "train", 2)
    if link == "symbolic":
        (tmp_path / "test").symlink_to(tmp_path / "train")
    else:
        shutil.copytree(tmp_path / "train", tmp_path / "test", copy_function=os.link)
    message = refused(own(tmp_path), tmp_path)
    assert "6 files are both training and test images (the same file or a link to it)" in message
    assert "remove them from one of the two" in message


def test_test_images_listed_twice_are_reported(tmp_path: Path) -> None:
    folders(tmp_path, "train", 2)
    path, *_ = folders(tmp_path, "test", 2)
    os.link(tmp_path / path, (tmp_path / path).with_name("again.jpg"))
    assert "is listed twice, or is a link to another one" in refused(own(tmp_path), tmp_path)


# Variants of the lists, and damaged lists.


@pytest.mark.parametrize("place", ["SUN397", ".", "Partitions"])
def test_sun397_lists_may_be_next_to_its_folder(tmp_path: Path, place: str) -> None:
    expected = replicas.sun397(tmp_path)
    (tmp_path / place).mkdir(exist_ok=True)
    for path in (tmp_path / "SUN397" / "Partitions").iterdir():
        shutil.move(path, tmp_path / place)
    train, test = open_checked(small("sun397", expected), tmp_path).sources
    assert (files(train, tmp_path), files(test, tmp_path)) == expected
    (tmp_path / place / "Testing_01.txt").unlink()
    assert "Testing_01.txt is missing" in refused(DATASETS["sun397"], tmp_path)


def test_torchvisions_name_of_inaturalists_folder(tmp_path: Path) -> None:
    expected = replicas.inaturalist(tmp_path, 2018)
    train, _ = open_checked(small("inat2018", expected), tmp_path).sources
    assert train.classes == ["Bos taurus", "Formica rufa", "Apis mellifera"]  # by id
    digest = train.digest()
    (tmp_path / "inat2018" / "train_val2018").rename(tmp_path / "inat2018" / "2018")
    train, _ = open_checked(small("inat2018", expected), tmp_path).sources
    assert files(train, tmp_path) == {
        path.replace("train_val2018", "2018"): name for path, name in expected[0].items()
    }
    assert train.digest() == digest


@pytest.mark.parametrize(
    ("name", "path", "text", "message"),
    [
        ("dtd", "dtd/dtd/labels/val1.txt", "bee/x.jpg\ncow/x.jpg\n", "list different classes"),
        ("food101", "food-101/meta/test.json", '{"bee": ["bee/x"]}', "list different classes"),
        ("inat2019", "inat2019/val2019.json", "{", r"val2019\.json is not valid JSON \(Expecting"),
        ("inat2019", "inat2019/val2019.json", "{}", "KeyError: 'categories'"),
        ("aircraft", "fgvc-aircraft-2013b/data/images_variant_test.txt", "x Y", "KeyError: 'Y'"),
        ("cars196", "stanford_cars/devkit/cars_meta.mat", "torn", r"(MatRead|Index)Error: "),
        ("pets", "oxford-iiit-pet/annotations/test.txt", "x y", "invalid literal"),
        ("sun397", "SUN397/ClassName.txt", "/b/barn", "KeyError: 'a/abbey'"),
        ("cog-l2", "cog/levels.json", "[[], []]", r"levels\.json has 2 levels; it must be"),
        ("cog-l2", "cog/splits.json", "{}", r"splits\.json lacks a list .*n20000001"),
    ],
)
def test_damaged_lists(tmp_path: Path, name: str, path: str, text: str, message: str) -> None:
    expected = REPLICAS[name](tmp_path)
    (tmp_path / path).write_text(text)
    output = refused(small(name, expected), tmp_path)
    assert re.search(message, output)
    assert DATASETS[name].layout in output
