"""Files are whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from trex_models.files import append, replacing, write_whole


def test_a_file_takes_the_old_one_s_place_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, "old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
def test_an_error_leaves_the_old_file_alone(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    write_whole(path, "old")
    with pytest.raises(error), replacing(path) as file:  # noqa: PT012
        file.write(b"half")
        raise error
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_errors_name_the_file(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        append(full, "line")
    (tmp_path / ".file.tmp").symlink_to(full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/file'"):
        write_whole(tmp_path / "file", "text")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="No such file or directory"):
        write_whole(tmp_path / "absent" / "file", "text")


def test_append_adds_to_the_end(tmp_path: Path) -> None:
    append(tmp_path / "file", "a\n")
    append(tmp_path / "file", "b\n")
    assert (tmp_path / "file").read_text() == "a\nb\n"
