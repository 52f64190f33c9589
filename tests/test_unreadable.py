"""Unreadable images: raised or skipped deterministically, listed, and limited in number."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.images import save_image
from tests.runs import assert_same_state, last_state, logged, output_of, refused, run
from trex_models.train import checkpointing
from trex_models.train.unreadable import UnreadableImages

NAMES = [f"{label}/{i}.png" for label in "ab" for i in range(16)]
BROKEN = ["a/3.png", "b/8.png"]  # neither in the preflight check nor in the first batch


def make_folder(root: Path, broken: list[str]) -> list[str]:
    """Save two classes of 16 images, some truncated; return the options of a run on them."""
    for seed, name in enumerate(NAMES):
        save_image(root / name, seed)
        if name in broken:
            (root / name).write_bytes((root / name).read_bytes()[:200])
    options = f"--data.source folder --data.path {root} --validation.images-per-class 0"
    return options.split()


def assert_same_run(a: Path, b: Path) -> None:
    """Compare the last states and metrics of two runs, but not their settings."""
    ours, theirs = (last_state(folder) | {"config": None} for folder in (a, b))
    assert_same_state(ours, theirs)
    assert logged(a) == logged(b)


SKIP = ["--data.unreadable", "skip", "--data.max-unreadable", "0.1"]


@pytest.fixture(scope="module")
def skipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Return the options of a dataset with two truncated images, and a run that skips them."""
    folder = tmp_path_factory.mktemp("skipped")
    options = make_folder(folder / "images", BROKEN)
    assert run(folder / "run", *options, *SKIP) == 0
    return options, folder / "run"


def test_the_list_names_file_and_reason(skipped: tuple[list[str], Path]) -> None:
    _, folder = skipped
    lines = (folder / "unreadable.txt").read_text().splitlines()
    for line, name in zip(lines, BROKEN, strict=True):
        assert f"{folder.parent / 'images' / name} cannot be read" in line
    assert logged(folder)[-1]["unreadable"] == 2
    assert last_state(folder)["unreadable"] == [sorted(NAMES).index(name) for name in BROKEN]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_substitutes_do_not_depend_on_workers(
    workers: str, skipped: tuple[list[str], Path], tmp_path: Path
) -> None:
    options, folder = skipped
    out = output_of(tmp_path / "run", *options, *SKIP, "--system.workers", workers)
    assert f"2 unreadable images were skipped; see {tmp_path}" in out
    assert out.count("skipped: ") == 2  # once per image, not per epoch
    assert_same_run(tmp_path / "run", folder)


def test_raise_ends_the_run_and_skip_continues(
    skipped: tuple[list[str], Path], tmp_path: Path
) -> None:
    options, folder = skipped
    command = [*options, "--system.save-steps", "0"]
    err = refused(tmp_path / "run", *command)
    assert any(f"{name} cannot be read as an image" in err for name in BROKEN)
    assert "or skip unreadable images with --data.unreadable skip" in err
    (kept,) = checkpointing.list_checkpoints(tmp_path / "run")  # saved after the last complete step
    assert checkpointing.load(kept)["step"] > 0
    assert run(tmp_path / "run", *command, *SKIP) == 0
    assert_same_run(tmp_path / "run", folder)


def test_too_many_end_the_run_after_it_is_saved(
    skipped: tuple[list[str], Path], tmp_path: Path
) -> None:
    options, folder = skipped
    few = [*options, *SKIP[:3], "0.04"]  # 1 of 32
    err = refused(tmp_path / "run", *few)
    assert "2 training images are unreadable (the limit is 1), such as" in err
    # The same command fails again:
    assert "2 training images are unreadable (the limit is 1)" in refused(tmp_path / "run", *few)
    assert len((tmp_path / "run" / "unreadable.txt").read_text().splitlines()) == 2
    assert run(tmp_path / "run", *options, *SKIP) == 0
    assert_same_state(last_state(tmp_path / "run")["method"], last_state(folder)["method"])


def test_before_the_start(tmp_path: Path) -> None:
    """The first image is one of those that the preflight check reads."""
    options = make_folder(tmp_path / "images", ["a/0.png"])
    err = refused(tmp_path / "run", *options)
    assert "or skip unreadable images with --data.unreadable skip" in err
    warning = "warning: 1 of 16 sampled training images are unreadable, "
    assert warning in output_of(tmp_path / "run", *options, *SKIP)
    options = make_folder(tmp_path / "broken", NAMES)
    assert "none of 16 sampled training images" in refused(tmp_path / "other", *options, *SKIP)
    assert not (tmp_path / "other").exists()


def test_validation_leaves_them_out(tmp_path: Path) -> None:
    options = make_folder(tmp_path / "images", [])
    make_folder(tmp_path / "held", BROKEN)
    make_folder(tmp_path / "whole", [])
    for name in BROKEN:
        (tmp_path / "whole" / name).unlink()
    for held in ("held", "whole"):
        validation = ["--validation.path", str(tmp_path / held), "--optim.epochs", "1"]
        assert run(tmp_path / f"on {held}", *options, *SKIP, *validation) == 0
    seen, expected = (logged(tmp_path / f"on {held}")[-1] for held in ("held", "whole"))
    assert seen == expected  # not counted as training images
    assert len((tmp_path / "on held" / "unreadable.txt").read_text().splitlines()) == 2
    validation = ["--validation.path", str(tmp_path / "held"), "--system.save-steps", "0"]
    err = refused(tmp_path / "raise", *options, *validation)
    assert "held" in err
    assert "--data.unreadable skip" in err
    assert last_state(tmp_path / "raise")["step"] == 4  # the end of the validated epoch


def test_images_to_compare_with_count_once(tmp_path: Path) -> None:
    """The k-NN classifier also reads training images, by its own dataset."""
    options = make_folder(tmp_path / "images", BROKEN)
    make_folder(tmp_path / "held", ["a/5.png"])
    knn = ["--validation.path", str(tmp_path / "held"), "--validation.neighbors", "3"]
    out = output_of(tmp_path / "run", *options, *SKIP, *knn)
    assert "3 unreadable images were skipped" in out
    assert logged(tmp_path / "run")[-1]["unreadable"] == 2
    listed = (tmp_path / "run" / "unreadable.txt").read_text().splitlines()
    assert [str(tmp_path) in line for line in listed] == [True] * 3


def test_mended_and_moved_images(skipped: tuple[list[str], Path], tmp_path: Path) -> None:
    options, folder = skipped
    images = folder.parent / "images"
    shutil.copytree(images, tmp_path / "moved")
    moved = [option.replace(str(images), str(tmp_path / "moved")) for option in options]
    shutil.copytree(folder, tmp_path / "run")
    checkpointing.list_checkpoints(tmp_path / "run")[-1].unlink()
    assert run(tmp_path / "run", *moved, *SKIP) == 0
    assert logged(tmp_path / "run") == logged(folder)  # no image is counted twice
    listed = (tmp_path / "run" / "unreadable.txt").read_text()
    assert str(tmp_path / "moved") in listed
    assert str(images) not in listed

    checkpointing.list_checkpoints(tmp_path / "run")[-1].unlink()
    make_folder(tmp_path / "moved", [])
    assert "skipped" not in output_of(tmp_path / "run", *moved, *SKIP[:3], "0")
    assert not (tmp_path / "run" / "unreadable.txt").exists()
    assert "unreadable" not in logged(tmp_path / "run")[-1]


def test_many_reasons_are_listed_in_the_file_and_a_few_logged(tmp_path: Path) -> None:
    images = UnreadableImages(tmp_path / "unreadable.txt", 100, 0.5)
    said: list[str] = []
    images.training |= {i: f"image {i}" for i in range(50)}
    images.exchange(True, said.append)
    assert len(said) == 6
    assert said[-1] == f"skipped: 45 more, listed in {tmp_path / 'unreadable.txt'}"
    images.exchange(True, said.append)
    assert len(said) == 6  # nothing is new
    images.training |= {50: "image 50", 49: "image 49"}
    images.exchange(True, said.append)
    assert "unreadable (the limit is 50), such as" in images.error_message()
    assert said[-1] == "skipped: image 50"
    assert len((tmp_path / "unreadable.txt").read_text().splitlines()) == 51


@pytest.mark.parametrize(("share", "allowed"), [(0.29, 29), (0.57, 57), (0.0, 0), (0.999, 99)])
def test_ceilings_are_exact(share: float, allowed: int) -> None:
    images = UnreadableImages(Path("unused"), 100, share)
    images.training |= {i: str(i) for i in range(allowed)}
    assert not images.error_message()
    images.training[allowed] = ""
    assert images.error_message()
