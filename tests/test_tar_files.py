"""Images in tar files: both layouts, the cached index, damaged files, and runs."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from tests.images import save_image
from tests.runs import assert_same_state, last_state, logged, output_of, run
from trex_models.data import FolderSource, TarSource, UnreadableImageError, tar_files
from trex_models.train import checkpointing

Members = Iterable[tuple[str, bytes]]
IMAGES = [(f"{name}.jpg", b"x" * 900) for name in ("a/0", "a/1", "b/0", "b/1")]


@pytest.fixture(autouse=True)
def members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bytes]]:
    """Save two classes of 16 images in the working folder; return their paths and contents."""
    monkeypatch.setenv("TREX_MODELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    paths = [Path("tree") / ("10", "9/new")[seed % 2] / f"{seed:02}.png" for seed in range(32)]
    for seed, path in enumerate(paths):
        save_image(path, seed)
    return [(str(path)[5:], path.read_bytes()) for path in paths]


def write_tar(name: str, members: Members) -> Path:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(name, "w") as tar:
        for path, data in members:
            member = tarfile.TarInfo(path)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return Path(name)


def assert_as_unpacked(source: TarSource) -> None:
    folder = FolderSource("tree")
    assert list(source.classes) == list(folder.classes)
    assert source.labels.tolist() == folder.labels.tolist()
    for index in range(len(folder)):
        np.testing.assert_array_equal(source.read(index), folder.read(index))


@pytest.mark.parametrize("prefix", ["", "./", "images/train/"])
def test_class_folders(
    prefix: str, members: list[tuple[str, bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    extra = [(name, b"x") for name in ("9/._1.png", "9/a.json", "b.json", "c.png")]
    part = [(prefix + name, data) for name, data in members + extra * (prefix == "images/train/")]
    write_tar("shards/0.tar", part[:9])
    write_tar("shards/deeper/1.tar", part[9:])
    source = TarSource("shards")
    assert_as_unpacked(pickle.loads(pickle.dumps(source)))
    assert source.name(0) == f"shards/0.tar:{prefix.removeprefix('./')}10/00.png"
    assert ("3 file(s) ignored (2 with extension '.json'" in caplog.text) == (len(part) > 32)
    assert TarSource(Path("shards").rename("moved")).digest() == source.digest()
    held = write_tar("held.tar", [member for member in part if "10/" in member[0]])
    assert set(TarSource(held, source.classes).labels.tolist()) == {0}


def test_pairs_and_one_tar_file_per_class(
    members: list[tuple[str, bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    files = [(f"v1.0/{i}.PNG", data) for i, (_, data) in enumerate(members[:6])]
    masks = [(f"v1.0/{i}.mask.png", data) for i, (_, data) in enumerate(members[:3])]
    texts = [(f"v1.0/{i}.CLS", text) for i, text in enumerate(b"10,9,9,10\n,9,9".split(b","))]
    source = TarSource(write_tar("pairs.tar", [*texts[:3], *files, *masks, *texts[3:]]))
    assert "3 file(s) ignored (3 with extension '.png')" in caplog.text
    assert len(source) == 6
    assert list(source.classes) == ["9", "10"]
    assert "".join(source.name(i)[-5] for i in range(6)) == "124503"
    assert source.labels.tolist() == [0] * 4 + [1] * 2
    for label in ("9", "10"):
        own = [(n.rpartition("/")[2], data) for n, data in members if n.startswith(label)]
        write_tar(f"imagenet/{label}.tar", own)
    assert_as_unpacked(TarSource("imagenet"))


@pytest.mark.parametrize(
    ("data", "change", "message"),
    [
        ([("a.txt", b"")], bytes, r"x.tar contains no images in tar files; add some"),
        ([("0.png.jpg", b""), ("0.cls", b"7")], bytes, "no images in tar files"),
        (IMAGES[:2], bytes, "x.tar: every label is 'a', but at least 2 classes"),
        (
            [*IMAGES, ("a/0.cls", b"7")],
            bytes,
            r"x.tar:a/1.jpg has no label; add it as text in a/1.cls",
        ),
        ([*IMAGES, ("0.cls", b"7"), ("0.cls", b"8")], bytes, "0.cls is both '7' and '8'; remove"),
        (IMAGES, gzip.compress, r"x.tar is not .*uncompressed.* after the start.*gunzip"),
        (IMAGES, lambda data: data[:5500], "unexpected end of data, after b/1.jpg.*copy it again"),
        (IMAGES, lambda data: data[: 4 * 1536], "no end-of-archive marker, after b/1.jpg"),
        (IMAGES, lambda data: data + data, "data after the end-of-archive marker, after b/1.jpg"),
        (IMAGES, lambda data: data[:3072] + b"?" * 9 + data[3081:], "marker, after a/1.jpg"),
    ],
)
def test_refused(data: Members, change: Callable[[bytes], bytes], message: str) -> None:
    path = write_tar("x.tar", data)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        TarSource(path)


def test_the_index_is_cached_until_a_file_changes(
    members: list[tuple[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar("x.tar", members)
    with patch.object(tar_files, "_build_index", wraps=tar_files._build_index) as build:
        digests = [TarSource(path).digest() for _ in range(2)]
        (file,) = Path("cache/tar").glob("*.npz")
        file.write_bytes(file.read_bytes()[:-200])  # damaged
        digests.append(TarSource(path).digest())
        os.utime(path, (0, 0))
        digests.append(TarSource(path).digest())
    assert (build.call_count, len(set(digests))) == (3, 1)
    assert len(TarSource(write_tar("x.tar", members[1:]))) == 31
    monkeypatch.setenv("TREX_MODELS_CACHE", str(path))  # not a folder
    with pytest.raises(ValueError, match="set TREX_MODELS_CACHE to another folder"):
        TarSource(path)


def test_a_run_resumes_bit_for_bit_and_skips_damaged_images(
    members: list[tuple[str, bytes]],
) -> None:
    members[4] = "10/04.png", members[4][1][:200]
    path = write_tar("x.tar", members)
    with pytest.raises(UnreadableImageError, match="x.tar:10/04.png cannot be read as an image"):
        TarSource(path).read(2)
    options = "--data.source tar --data.path x.tar --validation.path x.tar --data.unreadable skip"
    tar = [*options.split(), "--data.max-unreadable", "0.1", "--validation.images-per-class", "0"]
    assert run(Path("run"), *tar) == 0
    state, lines = last_state(Path("run")), logged(Path("run"))
    checkpointing.list_checkpoints(Path("run"))[-1].unlink()
    os.utime(path, (0, 0))
    out = output_of(Path("run"), *tar, "--system.workers", "1")
    assert "all training images have new modification times" in out
    differing = {"config": None, "files": None}
    assert_same_state(last_state(Path("run")) | differing, state | differing)
    assert logged(Path("run")) == lines
