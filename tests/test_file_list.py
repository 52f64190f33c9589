"""Images listed by path."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from tests.images import save_image
from trex_models.data.image_files import CsvSource, FileSource, FolderSource

PATHS = ["b/\u732b.png", "a.png"]


@pytest.mark.parametrize("kind", ["text", "bytes", "array"])
def test_images_labels_and_names(tmp_path: Path, kind: str) -> None:
    pixels = save_image(tmp_path / PATHS[0], 3)
    encoded = [os.fsencode(path) for path in PATHS]
    paths = {"text": PATHS, "bytes": encoded, "array": np.array(encoded)}[kind]
    source = FileSource(tmp_path, paths, [1, 0], ["x", "y"])  # type: ignore[arg-type]
    assert len(source) == 2
    assert source.labels.tolist() == [1, 0]
    assert source.labels.dtype == np.int64
    assert source.name(0) == str(tmp_path / PATHS[0])
    np.testing.assert_array_equal(source.read(0), pixels)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source)).read(0), pixels)
    away = tmp_path / "away.png"
    source = FileSource("root", [str(away), "a.png"], [0, 0], ["x"])
    assert [source.name(i) for i in range(2)] == [str(away), "root/a.png"]
    assert source.files() == [os.fsencode(away), b"root/a.png"]


def test_the_digest_holds_paths_labels_and_classes_but_not_the_root() -> None:
    digest = FileSource("here", PATHS, [1, 0], ["x", "y"]).digest()
    assert FileSource("there", PATHS, [1, 0], ["x", "y"]).digest() == digest
    for other in ((PATHS[::-1], [1, 0], "xy"), (PATHS, [1, 1], "xy"), (PATHS, [1, 0], "xz")):
        assert FileSource("here", *other).digest() != digest


def test_digests_of_class_folders_and_csv_files_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run resumes only where its dataset has the digest of its start."""
    for name in ("zebra/b.png", "zebra/q/a.jpg", "zebra/q.png", "ant/c.JPEG"):
        save_image(tmp_path / name)
    (tmp_path / "list.csv").write_text("path,label\na.png,x\n./b,y\n/abs/c,x\n")
    assert FolderSource(tmp_path).digest().startswith("b29f0fe89a9844d7")
    monkeypatch.chdir(tmp_path)
    assert FolderSource(".").digest() == FolderSource(tmp_path).digest()
    assert FolderSource(".").read(0).shape == (30, 40, 3)
    assert CsvSource(tmp_path / "list.csv").digest().startswith("ede986ab13a3a9df")


def test_sizes_of_files_and_those_without(tmp_path: Path) -> None:
    for path in PATHS:
        save_image(tmp_path / path)
    source = FileSource(tmp_path, PATHS, [1, 0], ["x", "y"])
    found = [(tmp_path / path).stat() for path in PATHS]
    assert source.stats().tolist() == [
        [stat.st_size, int(stat.st_mtime), stat.st_dev, stat.st_ino] for stat in found
    ]
    assert source.stats().dtype == np.int64
    many = FileSource(tmp_path, PATHS * 5000, [0] * 10000, ["x"])  # more than a thread's block
    assert many.stats().tolist() == source.stats().tolist() * 5000
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"1 of 2 image files are missing or empty.*a\.png; unpack"
    ):
        source.stats()
    (tmp_path / PATHS[0]).unlink()
    with pytest.raises(ValueError, match="2 of 2 .*the first is .*\u732b.png; unpack or copy"):
        source.stats()


def test_a_part_keeps_classes_and_order(tmp_path: Path) -> None:
    part = FileSource(tmp_path, ["a", "b", "c"], [0, 1, 2], "xyz").part(np.array([2, 0]))
    assert [Path(part.name(i)).name for i in range(2)] == ["c", "a"]
    assert part.labels.tolist() == [2, 0]
    assert part.classes == ["x", "y", "z"]


def test_labels_must_fit() -> None:
    for labels, message in (
        ([0], r"one label an image: 2 images, labels \(1,\)"),
        ([0, 2], r"labels span \[0, 2\], outside the 2 classes"),
        ([-1, 0], r"labels span \[-1, 0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            FileSource("root", PATHS, labels, ["x", "y"])
