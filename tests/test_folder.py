"""Class folders and image files."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest

from tests.images import fail_to_list, save_image
from trex_models.data.image_files import FolderSource


def test_sorted_classes_and_files_at_any_depth(tmp_path: Path) -> None:
    for name in ("zebra/b.png", "zebra/a.jpg", "ant/deep/er/c.JPEG"):
        save_image(tmp_path / name)
    (tmp_path / "zebra" / "notes.txt").write_text("no image")
    (tmp_path / "readme.txt").write_text("no class")
    source = FolderSource(tmp_path)
    assert source.classes == ["ant", "zebra"]
    assert source.labels.tolist() == [0, 1, 1]
    assert [Path(source.name(i)).name for i in range(3)] == ["c.JPEG", "a.jpg", "b.png"]
    assert source.read(0).shape == (30, 40, 3)


def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent cannot be listed \(No such file or directory"):
        FolderSource(tmp_path / "absent")
    with pytest.raises(ValueError, match="0 class folders"):
        FolderSource(tmp_path)
    save_image(tmp_path / "only" / "a.png")
    with pytest.raises(ValueError, match="1 class folders, at least 2"):
        FolderSource(tmp_path)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"no images in 1 of 2 class folders \(bare\)"):
        FolderSource(tmp_path)


def test_odd_names(tmp_path: Path) -> None:
    """Not ASCII, no text, or beginning with a dot, which do not count."""
    for name in ("ant/a.png", "M\u00fcnchen/stra\u00dfe \u732b.png", ".ipynb_checkpoints/c.png"):
        save_image(tmp_path / name)
    save_image(tmp_path / "ant/.hidden/d.png")
    (tmp_path / "ant" / "._b.png").write_bytes(b"what another system keeps of b.png")
    source = FolderSource(tmp_path)
    assert source.classes == ["M\u00fcnchen", "ant"]
    assert source.paths.tolist() == [
        os.fsencode("M\u00fcnchen/stra\u00dfe \u732b.png"),
        b"ant/a.png",
    ]
    assert source.read(0).dtype == np.uint8
    if os.name == "posix":  # names are text elsewhere
        save_image(tmp_path / os.fsdecode(b"\xff\xfe") / "a.png")
        source = FolderSource(tmp_path)
        assert len(source.digest()) == 64
        assert source.part(np.arange(2)).digest() != source.digest()


@pytest.fixture
def three(tmp_path: Path) -> Path:
    for name in ("ant/a.png", "ant/more/b.png", "bee/c.png"):
        save_image(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("folder", [".", "ant", "ant/more"])
def test_a_folder_that_cannot_be_listed_is_an_error(
    three: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_list(monkeypatch, three / folder)
    with pytest.raises(ValueError, match=r"cannot be listed \(Input/output error\)") as caught:
        FolderSource(three)
    caught.match(str(three / folder))


def test_files_without_the_ending_of_an_image_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    taken = ("a.jpg", "b.JPG", "c.gif", "d.avif", "e.jfif", "f.jpe", "g.jp2", "h.webp")
    for name in ("ant/x.png", *(f"bee/{name}" for name in taken)):
        save_image(tmp_path / name)
    source = FolderSource(tmp_path)
    assert len(source) == 9
    assert [source.read(index).shape for index in range(9)] == [(30, 40, 3)] * 9
    assert not caplog.messages
    for name in ("ant/i", "ant/j.heic", "bee/k.HEIC", ".hidden", "readme.txt"):
        (tmp_path / name).touch()
    FolderSource(tmp_path)
    assert caplog.messages == [
        f"{tmp_path}: 4 file(s) left out (2 ending in '.heic', 1 next to the class folders, "
        "1 without an ending)"
    ]


@pytest.mark.parametrize("backward", [False, True])
def test_names_do_not_depend_on_the_order_of_the_file_system(
    three: Path, monkeypatch: pytest.MonkeyPatch, backward: bool
) -> None:
    (three / "ant" / "link").symlink_to("more")
    scandir = os.scandir

    def ordered(path: bytes) -> AbstractContextManager[list[os.DirEntry[bytes]]]:
        return nullcontext(sorted(scandir(path), key=lambda e: e.name, reverse=backward))

    monkeypatch.setattr(os, "scandir", ordered)
    assert FolderSource(three).paths.tolist() == [b"ant/a.png", b"ant/link/b.png", b"bee/c.png"]


@pytest.mark.parametrize(
    ("link", "target", "message"),
    [
        ("cow", "ant", "ant/ and cow/ are the same folder"),
        ("bee/more", "ant/more", "ant/more/ and bee/more/ are the same folder"),
        ("ant/up", ".", "ant/up/bee/ and bee/ are the same folder"),
    ],
)
def test_links_to_folders(three: Path, link: str, target: str, message: str) -> None:
    """One into a circle is followed once; one to a folder of another class is refused."""
    (three / "ant" / "more" / "loop").symlink_to(three / "ant")
    assert len(FolderSource(three)) == 3
    (three / link).symlink_to(three / target)
    with pytest.raises(ValueError, match=f"{message}, so that its images would have two labels"):
        FolderSource(three)
