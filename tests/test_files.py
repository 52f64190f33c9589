"""Atomic writes."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from unittest.mock import Mock

import pytest
import timm
import torch
from safetensors import safe_open

from trex_models.atomic import append, open_new, replacing, write_safetensors, write_text_file
from trex_models.pretrained import timm_folder


def test_files_are_replaced_once_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text_file(path, "old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    append(tmp_path / "log", "a\n")
    append(tmp_path / "log", "b\n")
    assert (tmp_path / "log").read_text() == "a\nb\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
def test_errors_keep_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    write_text_file(path, "old")
    with pytest.raises(error), replacing(path) as file:  # noqa: PT012
        file.write(b"half")
        raise error
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        append(full, "line")
    monkeypatch.setattr("os.fsync", Mock(side_effect=OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match=f"full: '{tmp_path}/file'"):
        write_text_file(tmp_path / "file", "text")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="No such file or directory"):
        write_text_file(tmp_path / "absent" / "file", "text")


def test_remains_of_killed_processes_and_links(tmp_path: Path) -> None:
    (tmp_path / ".file.tmp").symlink_to(tmp_path / "victim")
    write_text_file(tmp_path / "file", "new")
    for name in (".folder.x1.tmp", "folder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    with timm_folder.replaced_folder(tmp_path / "folder") as beside:
        (beside / "new").touch()
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert found == {"file", "folder", "folder/new"}


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    with timm_folder.replaced_folder(tmp_path / "folder") as first:
        (first / "a").write_text("first")
        with timm_folder.replaced_folder(tmp_path / "folder") as second:
            (second / "b").write_text("second")
        assert [path.name for path in (tmp_path / "folder").iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["a"]

    def write_meanwhile() -> None:
        with replacing(tmp_path / "file") as file:
            file.write(b"first")
            with open_new(tmp_path / ".file.tmp") as other:
                other.write(b"half")

    with pytest.raises(OSError, match="another process is writing this file"):
        write_meanwhile()
    assert not (tmp_path / "file").exists()


def test_safetensors_are_deterministic(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(3), "a": torch.ones(2, 2)}
    metadata = {str(i): "\u00e9" * i for i in range(9)}
    written = set()
    for order in (list(metadata), list(reversed(metadata))):
        stream = io.BytesIO()
        write_safetensors(stream, tensors, {key: metadata[key] for key in order})
        written.add(stream.getvalue())
    (data,) = written
    (tmp_path / "file").write_bytes(data)
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == metadata
        assert all(torch.equal(file.get_tensor(key), value) for key, value in tensors.items())


@pytest.mark.skipif(os.name != "posix", reason="permissions")
@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002])
def test_exported_folders_follow_the_umask(tmp_path: Path, mask: int) -> None:
    model, images = (
        timm.create_model("test_resnet", num_classes=0).eval(),
        torch.zeros(1, 3, 32, 32),
    )
    previous = os.umask(mask)
    try:
        for _ in range(2):  # the second one replaces the first
            timm_folder.write_timm_folder(model, tmp_path / "model", images, model(images))
    finally:
        os.umask(previous)
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.rglob("*")}
    file = 0o666 & ~mask
    assert modes == {"model": 0o777 & ~mask, "config.json": file, "model.safetensors": file}
