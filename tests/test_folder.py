"""Class folders and image files."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest

from tests.images import fail_to_list, save_image
from trex_models.data.decode import UnreadableImageError
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


def test_names_that_are_not_ascii(tmp_path: Path) -> None:
    save_image(tmp_path / "M\u00fcnchen" / "stra\u00dfe \u732b.png")
    save_image(tmp_path / "other" / "x.png")
    source = FolderSource(tmp_path)
    index = source.classes.index("M\u00fcnchen")
    assert source.read(index).dtype == np.uint8


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


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    save_image(tmp_path / "ant" / "a.png")
    (tmp_path / "zebra").mkdir()
    (tmp_path / "zebra" / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    with pytest.raises(UnreadableImageError, match=r"zebra.torn.jpg cannot be read as an image"):
        FolderSource(tmp_path).read(1)


def test_names_that_begin_with_a_dot_do_not_count(tmp_path: Path) -> None:
    for name in ("ant/a.png", "bee/b.png", ".ipynb_checkpoints/c.png", "ant/.hidden/d.png"):
        save_image(tmp_path / name)
    (tmp_path / "bee" / "._b.png").write_bytes(b"what another system keeps of b.png")
    source = FolderSource(tmp_path)
    assert source.classes == ["ant", "bee"]
    assert source.paths.tolist() == [b"ant/a.png", b"bee/b.png"]


def test_links_in_a_circle_are_followed_once(tmp_path: Path) -> None:
    for name in ("ant/a.png", "ant/more/b.png", "bee/c.png"):
        save_image(tmp_path / name)
    (tmp_path / "ant" / "more" / "loop").symlink_to(tmp_path / "ant")
    assert len(FolderSource(tmp_path)) == 3


@pytest.mark.skipif(os.name != "posix", reason="names are text elsewhere")
def test_names_that_are_no_text(tmp_path: Path) -> None:
    for folder in (b"\xff\xfe", b"plain"):
        save_image(tmp_path / os.fsdecode(folder) / "a.png")
    source = FolderSource(tmp_path)
    assert len(source.digest()) == 64
    assert source.part(np.arange(2)).digest() != source.digest()


@pytest.mark.parametrize("folder", [".", "ant", "ant/more"])
def test_a_folder_that_cannot_be_listed_is_an_error(
    tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ant/a.png", "ant/more/b.png", "bee/c.png"):
        save_image(tmp_path / name)
    fail_to_list(monkeypatch, tmp_path / folder)
    with pytest.raises(ValueError, match=r"cannot be listed \(Input/output error\)") as caught:
        FolderSource(tmp_path)
    caught.match(str(tmp_path / folder))


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


def test_names_do_not_depend_on_the_order_of_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ant/more/a.png", "bee/b.png"):
        save_image(tmp_path / name)
    (tmp_path / "ant" / "link").symlink_to("more")
    scandir, found = os.scandir, []
    for backward in (False, True):

        def ordered(
            path: bytes, backward: bool = backward
        ) -> AbstractContextManager[list[os.DirEntry[bytes]]]:
            entries = sorted(scandir(path), key=lambda entry: entry.name, reverse=backward)
            return nullcontext(entries)

        monkeypatch.setattr(os, "scandir", ordered)
        found.append(FolderSource(tmp_path).paths.tolist())
    assert found == [[b"ant/link/a.png", b"bee/b.png"]] * 2


@pytest.mark.parametrize(
    ("link", "target", "message"),
    [
        ("cow", "ant", "ant/ and cow/ are the same folder"),
        ("bee/more", "ant/more", "ant/more/ and bee/more/ are the same folder"),
        ("ant/up", ".", "ant/up/bee/ and bee/ are the same folder"),
    ],
)
def test_one_folder_of_two_classes_is_refused(
    tmp_path: Path, link: str, target: str, message: str
) -> None:
    for name in ("ant/a.png", "ant/more/b.png", "bee/c.png"):
        save_image(tmp_path / name)
    (tmp_path / link).symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match=f"{message}, so that its images would have two labels"):
        FolderSource(tmp_path)
