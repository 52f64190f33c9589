"""Images in tar files: both layouts, the cached index, damaged files, and runs."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from tests.images import save_image
from tests.runs import assert_same_state, last_state, logged, output_of, run
from trex_models.data import FolderSource, TarSource, UnreadableImageError, tar_files
from trex_models.train import checkpointing

Members = Iterable[tuple[str, bytes]]
IMAGES = [(f"{label}/{number}.jpg", b"x" * 900) for label in "ab" for number in range(2)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TREX_MODELS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tar"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes of 16 images; their names are integers, one has a subfolder."""
    for seed in range(32):
        save_image(tmp_path / "tree" / f"{'10' if seed % 2 else '9/new'}/{seed:02}.png", seed)
    return tmp_path / "tree"


def contents(tree: Path, prefix: str = "") -> list[tuple[str, bytes]]:
    files = sorted(tree.rglob("*.png"), key=lambda file: file.name)
    return [(f"{prefix}{file.relative_to(tree)}", file.read_bytes()) for file in files]


def write_tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def assert_same_images(source: TarSource, folder: FolderSource) -> None:
    assert list(source.classes) == list(folder.classes)
    assert source.labels.tolist() == folder.labels.tolist()
    for index in range(len(folder)):
        np.testing.assert_array_equal(source.read(index), folder.read(index))


@pytest.mark.parametrize("prefix", ["", "./", "images/train/"])
def test_class_folders(
    prefix: str, tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = contents(tree, prefix)
    extra = [(f"{prefix}{name}", b"x") for name in ("9/._1.png", "9/a.json", "b.json", "c.png")]
    write_tar(tmp_path / "shards" / "0.tar", members[:9])
    write_tar(tmp_path / "shards" / "deeper" / "1.tar", members[9:] + extra * ("/t" in prefix))
    source = TarSource(tmp_path / "shards")
    assert_same_images(pickle.loads(pickle.dumps(source)), FolderSource(tree))
    assert source.name(0) == f"{tmp_path}/shards/0.tar:{prefix.removeprefix('./')}10/01.png"
    assert ("3 file(s) ignored (2 with extension '.json'" in caplog.text) == ("/t" in prefix)
    (tmp_path / "shards").rename(tmp_path / "moved")
    assert TarSource(tmp_path / "moved").digest() == source.digest()
    held = write_tar(tmp_path / "held.tar", [member for member in members if "10/" in member[0]])
    assert set(TarSource(held, source.classes).labels.tolist()) == {0}


def test_pairs_and_one_tar_file_per_class(tree: Path, tmp_path: Path) -> None:
    files = [(f"v1.0/{i}.PNG", data) for i, (_, data) in enumerate(contents(tree)[:6])]
    texts = [
        (f"v1.0/{i}.cls", text.encode()) for i, text in enumerate("10 9 9 10\n 9 9".split(" "))
    ]
    source = TarSource(write_tar(tmp_path / "pairs.tar", [*texts[:3], *files, *texts[3:]]))
    assert list(source.classes) == ["9", "10"]
    assert [source.name(i)[-5] for i in range(6)] == ["1", "2", "4", "5", "0", "3"]
    assert source.labels.tolist() == [0] * 4 + [1] * 2
    for label in ("9", "10"):
        own = [(n.rpartition("/")[2], data) for n, data in contents(tree) if n.startswith(label)]
        write_tar(tmp_path / "imagenet" / f"{label}.tar", own)
    assert_same_images(TarSource(tmp_path / "imagenet"), FolderSource(tree))


@pytest.mark.parametrize(
    ("members", "change", "message"),
    [
        ([("a.txt", b"")], bytes, r"data.tar contains no images .*; add some"),
        (IMAGES[:2], bytes, "data.tar: every label is 'a', but at least 2 classes"),
        ([*IMAGES, ("a/0.cls", b"7")], bytes, r"data.tar:a/1.jpg has no label; add a/1.cls"),
        ([*IMAGES, ("0.cls", b"7"), ("0.cls", b"8")], bytes, "0.cls is both '7' and '8'; remove"),
        (IMAGES, gzip.compress, r"data.tar is not .*uncompressed.* after the start.*gunzip"),
        (IMAGES, lambda data: data[:5000], "unexpected end of data, after b/1.jpg.*copy it again"),
        (IMAGES, lambda data: data[: 4 * 1536], "no end-of-archive marker, after b/1.jpg"),
        (IMAGES, lambda data: data[:3072] + b"?" * 9 + data[3081:], "marker, after a/1.jpg"),
    ],
)
def test_refused(
    members: Members, change: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    path = write_tar(tmp_path / "data.tar", members)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        TarSource(path)


def test_the_index_is_cached_until_a_file_changes(
    tree: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []
    build = tar_files._build_index
    monkeypatch.setattr(
        tar_files, "_build_index", lambda path, tars: built.append(path) or build(path, tars)
    )
    path = write_tar(tmp_path / "data.tar", contents(tree))
    digests = [TarSource(path).digest() for _ in range(2)]
    assert len(built) == 1
    (file,) = cache.glob("*.npz")
    file.write_bytes(file.read_bytes()[:-200])  # damaged
    digests.append(TarSource(path).digest())
    os.utime(path, (0, 0))
    digests.append(TarSource(path).digest())
    assert len(built) == 3
    assert len(set(digests)) == 1
    write_tar(path, contents(tree)[1:])
    assert len(TarSource(path)) == 31
    (tmp_path / "file").touch()
    monkeypatch.setenv("TREX_MODELS_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="set TREX_MODELS_CACHE to another folder"):
        TarSource(path)


def test_a_run_resumes_bit_for_bit_and_skips_damaged_images(tree: Path, tmp_path: Path) -> None:
    members = contents(tree)
    members[5] = members[5][0], members[5][1][:200]
    path = write_tar(tmp_path / "data.tar", members)
    source = TarSource(path)
    damaged = next(i for i in range(32) if source.name(i).endswith(f"data.tar:{members[5][0]}"))
    with pytest.raises(UnreadableImageError, match=f"data.tar:{members[5][0]} cannot be read"):
        source.read(damaged)
    skip = ["--data.unreadable", "skip", "--data.max-unreadable", "0.1"]
    options = ["--data.source", "tar", "--data.path", str(path), *skip]
    options += ["--validation.images-per-class", "0", "--validation.path", str(path)]
    assert run(tmp_path / "run", *options) == 0
    state, lines = last_state(tmp_path / "run"), logged(tmp_path / "run")
    checkpointing.list_checkpoints(tmp_path / "run")[-1].unlink()
    os.utime(path, (0, 0))
    out = output_of(tmp_path / "run", *options, "--system.workers", "1")
    assert "all training images have new modification times" in out
    state["config"], state["files"] = None, None
    assert_same_state(last_state(tmp_path / "run") | {"config": None, "files": None}, state)
    assert logged(tmp_path / "run") == lines
