"""CSV files that list images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.images import save_image
from trex_models.data.decode import UnreadableImageError
from trex_models.data.image_files import CsvSource


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def test_images_labels_and_names(tmp_path: Path) -> None:
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
def test_dialects(tmp_path: Path, delimiter: str, newline: str, encoding: str) -> None:
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
    assert source.classes == ["b", "d"]  # spaces and an end without a line's do not count
    head = "path,label\n"
    rows = "a,10\nb,9\nc,-1\nd,9\na,10\n"  # a twice, alike
    source = CsvSource(write(tmp_path / "list.csv", head + rows))
    assert source.classes == ["-1", "9", "10"]
    assert source.labels.tolist() == [2, 1, 0, 1, 2]
    source = CsvSource(write(tmp_path / "list.csv", head + "a,10\nb,9\nc,x\n"))
    assert source.classes == ["10", "9", "x"]


def test_labels_in_a_training_sets_classes(tmp_path: Path) -> None:
    path = write(tmp_path / "list.csv", "path,label\na,dog\nb,dog\n")
    source = CsvSource(path, classes=["cat", "cow", "dog"])
    assert source.classes == ["cat", "cow", "dog"]
    assert source.labels.tolist() == [2, 2]
    write(path, "path,label\na,dog\nb,emu\n")
    with pytest.raises(ValueError, match=r"list.csv: b has the label 'emu', none of the 2 cl"):
        CsvSource(path, classes=["cat", "dog"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"names no columns 'path' \(it has nothing\); add a header or give --data\.image-col"),
        ("\n", r"names no columns 'path' \(it has nothing\)"),
        ("a.png,dog\n", r"names no columns 'path' \(it has 'a.png', 'dog'\); add a header"),
        ("path;class\n", r"columns 'label' \(it has 'path', 'class'\).*--data\.label-column NAME"),
        ("path,label,path\n", "names 2 columns 'path' .*; rename all but one"),
        ("path,label\na,x\nb,y\na,y\n", "line 4: a has the label 'y' here and 'x' above; remove"),
        ("path,label\nc/a,x\nb,y\n./c//a,y\n", "line 4: ./c//a has the label 'y' here and 'x' ab"),
        ("path,label\n\n", "has a header and no rows; add"),
        ("path,label\na,x\nb,x\n", "every label is 'x', at least 2 classes are needed; add"),
        ('path,label\n"a ",x\n"a ",y\n', "line 3: 'a ' has the label 'y' here and 'x' above"),
        ("path,label\na,x\n\nb\n", "line 4: 1 fields, but the header has 2; correct the row"),
        ("path,label\na,x\nb,y,z\n", r"line 3: 3 fields.*text that holds ',' must be quoted"),
        ("path,label\na,x\n,y\n", "line 3: 'path' is empty; fill it in"),
        ("path,label\na,x\nb, \n", "line 3: 'label' is empty; fill it in"),
        ('path,label\na,x\n"b,y\nc,x\n', "line 4: .*; correct the row's quotes"),
        ('path,label\na,x\n"b"c,y\n', "line 3: .*; correct the row's quotes"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "list.csv", text)
    with pytest.raises(ValueError, match=message) as caught:
        CsvSource(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_what_is_no_csv_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent.csv cannot be read \(No such file or directory"):
        CsvSource(tmp_path / "absent.csv")
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\); name a CSV file"):
        CsvSource(tmp_path)
    path = write(tmp_path / "list.csv", "path,label\na,x\nb,stra\u00dfe\n", "latin-1")
    with pytest.raises(
        ValueError, match=r"no UTF-8: invalid continuation byte\); name a CSV file in UTF"
    ):
        CsvSource(path)
    write(path, "path,label\na,x\n", "utf-16")
    with pytest.raises(ValueError, match="no UTF-8"):
        CsvSource(path)
