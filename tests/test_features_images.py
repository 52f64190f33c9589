"""Finding images from the arguments of `python -m trex_models.features`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.images import fail_to_list, save_image
from trex_models.features import images
from trex_models.features.images import find_images

FILES = ["b/2.png", "b/1.jpg", "a/deep/3.PNG", "a/.hidden.png", "top.jpeg"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in FILES:
        save_image(tmp_path / "images" / name)
    (tmp_path / "images" / "b" / "notes.md").write_text("no image")
    (tmp_path / "images" / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


ALL = ["a/deep/3.PNG", "b/1.jpg", "b/2.png", "top.jpeg"]


@pytest.mark.parametrize(
    ("arguments", "root", "names"),
    [
        (["images"], "images", ALL),
        (["images/"], "images", ALL),
        (["./images/../images"], "images", ALL),
        (["images/**"], "images", [*ALL[:3], "top.jpeg"]),
        (["images/*/*.jpg"], "images", ["b/1.jpg"]),
        (["images/b", "images/a"], "images", ["b/1.jpg", "b/2.png", "a/deep/3.PNG"]),
        (["images/top.jpeg"], "images", ["top.jpeg"]),
        (["images/a", "images/top.jpeg"], "images", ["a/deep/3.PNG", "top.jpeg"]),
        (["images/b/*.png"], "images/b", ["2.png"]),
    ],
)
def test_images_are_found_in_order_with_relative_names(
    place: Path, arguments: list[str], root: str, names: list[str]
) -> None:
    source, repeated = find_images(arguments)
    assert images.names(source) == names
    assert source.root == place / root
    assert repeated == 0
    found = [source.name(row) for row in range(len(names))]
    assert found == [str(place / root / name) for name in names]


def test_names_in_a_list_are_as_they_are(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absolute = place / "images" / "a" / "deep" / "3.PNG"
    (place / "images" / "list.txt").write_text(f"b/2.png\n\ntop.jpeg\r\n{absolute}\n")
    monkeypatch.chdir("/")
    found, _ = find_images([str(place / "images" / "list.txt")])
    assert images.names(found) == ["b/2.png", "top.jpeg", "a/deep/3.PNG"]
    names = [" first.png", "a\x0bb.png", "c\u2028d.png", "# 1.png"]
    for name in names:
        save_image(place / name)
    (place / "list.txt").write_text("\ufeff" + "\n".join(names), encoding="utf-8")
    assert images.names(find_images([str(place / "list.txt")])[0]) == names


def test_images_are_counted_once_by_any_name(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    found, repeated = find_images(["images/b/2.png", "images", str(place / "images" / "b")])
    assert images.names(found) == ["b/2.png", "a/deep/3.PNG", "b/1.jpg", "top.jpeg"]
    assert repeated == 3
    save_image(place / "odd" / "x[1].png")
    save_image(place / "odd" / "x1.png")
    assert images.names(find_images(["odd/x[1].png"])[0]) == ["x[1].png"]
    caplog.clear()
    find_images(["images/a", "images/b", "images/**"])
    assert caplog.messages == [f"{place}/images: 1 file(s) ignored (1 with extension '.md')"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("nowhere", "nowhere: there is no such file or folder"),
        ("images/empty", "images/empty contains no images"),
        ("images/*.gif", r"images/\*\.gif matches no files"),
        ("images/b/*.md", r"matches 1 files and folders, but no images"),
        ("images/b/notes.md", "notes.md has no image extension"),
        ("list.csv", r"a list of paths must be \.txt"),
        ("blank.txt", "blank.txt lists no images"),
        ("bad.txt", "bad.txt, line 2: model.pt has no image extension"),
        ("latin.txt", "latin.txt cannot be read as a list"),
        ("blank-end.txt", r"line 1: 'top.jpeg ' has no image extension"),
    ],
)
def test_arguments_without_images_are_reported(place: Path, argument: str, message: str) -> None:
    (place / "list.csv").write_text("path\nimages/top.jpeg\n")
    (place / "blank.txt").write_text("\n \n")
    (place / "bad.txt").write_text("images/top.jpeg\nmodel.pt\n")
    (place / "blank-end.txt").write_text("top.jpeg \n")
    (place / "latin.txt").write_bytes(b"gr\xfcn.png\n")
    with pytest.raises(ValueError, match=message):
        find_images(["images", argument])


@pytest.mark.parametrize("argument", ["images", "images/*", "images/**/*.jpg", "images/*/*.jpg"])
def test_a_folder_that_cannot_be_listed_is_an_error(
    place: Path, argument: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_list(monkeypatch, place / "images" / "b")
    with pytest.raises(ValueError, match=r"images/b/? cannot be listed \(Input/output error\)"):
        find_images([argument])
