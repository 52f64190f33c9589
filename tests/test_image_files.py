"""Image files listed by path, in class folders and in CSV files."""

from __future__ import annotations

import os
import pickle
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest

from tests.images import fail_to_list, save_image
from trex_models.data.decode import UnreadableImageError
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
    """A run resumes only if the digest of its dataset has not changed."""
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
    many = FileSource(tmp_path, PATHS * 5000, [0] * 10000, ["x"])  # more than one block
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


def test_labels_must_match() -> None:
    for labels, message in (
        ([0], r"need 2 labels, one per image, got shape \(1,\)"),
        ([0, 2], r"labels must be in \[0, 2\), got 0 to 2"),
        ([-1, 0], r"labels must be in \[0, 2\), got -1 to 0"),
    ):
        with pytest.raises(ValueError, match=message):
            FileSource("root", PATHS, labels, ["x", "y"])


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


def test_problems_of_folders_are_reported(tmp_path: Path) -> None:
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
    """Names that are not ASCII, not text, or begin with a dot and are ignored."""
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
    if os.name == "posix":  # elsewhere, names must be text
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
        f"{tmp_path}: 4 file(s) ignored (2 with extension '.heic', 1 outside the class folders, "
        "1 without an extension)"
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
    """A circular link is followed once; a link to a folder of another class is an error."""
    (three / "ant" / "more" / "loop").symlink_to(three / "ant")
    assert len(FolderSource(three)) == 3
    (three / link).symlink_to(three / target)
    with pytest.raises(ValueError, match=f"{message}, so its images would have two labels"):
        FolderSource(three)


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def test_rows_of_a_csv_file(tmp_path: Path) -> None:
    pixels = save_image(tmp_path / "images" / "a b.png", seed=1)
    other = save_image(tmp_path / "elsewhere" / "c.png", seed=2)
    away = tmp_path / "elsewhere" / "c.png"
    path = write(
        tmp_path / "list.csv",
        f"note,path,label\nx,images/a b.png,zebra\n,{away},ant\n\n,images/absent.png,zebra\n",
    )
    source = CsvSource(path)
    assert source.classes == ["ant", "zebra"]
    assert source.labels.tolist() == [1, 0, 1]
    assert source.labels.dtype == np.int64
    assert len(source) == 3
    np.testing.assert_array_equal(source.read(0), pixels)
    np.testing.assert_array_equal(source.read(1), other)
    assert source.name(0) == str(tmp_path / "images" / "a b.png")
    assert source.name(1) == str(away)
    with pytest.raises(UnreadableImageError, match=r"images.absent\.png .*No such file"):
        source.read(2)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_dialects_of_csv_files(tmp_path: Path, delimiter: str, newline: str, encoding: str) -> None:
    rows = [
        ["label", "file"],
        ['"two, words; "', '"a ""b"", \t;.png"'],
        ["stra\u00dfe", "\u732b.png"],
        ['"line\nbreak"', "c.png"],
    ]
    text = "".join(delimiter.join(row) + newline for row in rows)
    source = CsvSource(write(tmp_path / "list.csv", text, encoding), image_column="file")
    assert source.classes == ["line\nbreak", "stra\u00dfe", "two, words;"]
    assert source.labels.tolist() == [2, 1, 0]
    assert source.name(0) == str(tmp_path / 'a "b", \t;.png')
    assert source.name(1) == str(tmp_path / "\u732b.png")


def test_classes_sort_as_numbers_if_all_are(tmp_path: Path) -> None:
    source = CsvSource(write(tmp_path / "list.csv", "path , label\na.png, b \nc.png,d"))
    assert source.classes == ["b", "d"]  # spaces and a missing final newline are ignored
    head = "path,label\n"
    rows = "a,10\nb,9\nc,-1\nd,9\na,10\n"  # a twice, with the same label
    source = CsvSource(write(tmp_path / "list.csv", head + rows))
    assert source.classes == ["-1", "9", "10"]
    assert source.labels.tolist() == [2, 1, 0, 1, 2]
    source = CsvSource(write(tmp_path / "list.csv", head + "a,10\nb,9\nc,x\n"))
    assert source.classes == ["10", "9", "x"]


def test_labels_of_a_csv_file_in_a_training_sets_classes(tmp_path: Path) -> None:
    path = write(tmp_path / "list.csv", "path,label\na,dog\nb,dog\n")
    source = CsvSource(path, classes=["cat", "cow", "dog"])
    assert source.classes == ["cat", "cow", "dog"]
    assert source.labels.tolist() == [2, 2]
    write(path, "path,label\na,dog\nb,emu\n")
    with pytest.raises(ValueError, match=r"list.csv: b has the label 'emu', which is none of"):
        CsvSource(path, classes=["cat", "dog"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has 0 columns named 'path' \(columns: none\); add a header or specify --data\.im"),
        ("\n", r"has 0 columns named 'path' \(columns: none\)"),
        ("a.png,dog\n", r"0 columns named 'path' \(columns: 'a.png', 'dog'\); add a header"),
        ("path;class\n", r"named 'label' \(columns: 'path', 'class'\).*--data\.label-column"),
        ("path,label,path\n", "has 2 columns named 'path' .*; rename all but one"),
        ("path,label\na,x\nb,y\na,y\n", "line 4: a has the label 'y' here and 'x' above; remove"),
        ("path,label\nc/a,x\nb,y\n./c//a,y\n", "line 4: ./c//a has the label 'y' here and 'x' ab"),
        ("path,label\n\n", "has a header but no rows; add"),
        ("path,label\na,x\nb,x\n", "every label is 'x', but at least 2 classes are required; add"),
        ('path,label\n"a ",x\n"a ",y\n', "line 3: 'a ' has the label 'y' here and 'x' above"),
        ("path,label\na,x\n\nb\n", "line 4: 1 fields, but the header has 2; fix the row"),
        ("path,label\na,x\nb,y,z\n", r"line 3: 3 fields.*text that contains ',' must be quoted"),
        ("path,label\na,x\n,y\n", "line 3: no value for 'path'; add one"),
        ("path,label\na,x\nb, \n", "line 3: no value for 'label'; add one"),
        ('path,label\na,x\n"b,y\nc,x\n', "line 4: .*; fix the quotes of the row"),
        ('path,label\na,x\n"b"c,y\n', "line 3: .*; fix the quotes of the row"),
    ],
)
def test_problems_of_csv_files_are_reported(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "list.csv", text)
    with pytest.raises(ValueError, match=message) as caught:
        CsvSource(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_invalid_csv_files_are_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent.csv cannot be read \(No such file or directory"):
        CsvSource(tmp_path / "absent.csv")
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\); use a CSV file"):
        CsvSource(tmp_path)
    path = write(tmp_path / "list.csv", "path,label\na,x\nb,stra\u00dfe\n", "latin-1")
    with pytest.raises(
        ValueError, match=r"not UTF-8: invalid continuation byte\); use a CSV file in UTF"
    ):
        CsvSource(path)
    write(path, "path,label\na,x\n", "utf-16")
    with pytest.raises(ValueError, match="not UTF-8"):
        CsvSource(path)
