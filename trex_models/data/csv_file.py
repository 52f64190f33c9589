"""A CSV file that lists images and their labels."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from trex_models.data.decode import quoted
from trex_models.data.file_list import FileSource
from trex_models.data.sources import sorted_classes

_DELIMITERS = (",", "\t", ";")


class CsvSource(FileSource):
    """Images listed in a CSV file: a header that names the columns, then one row an image.

    The delimiter is the header's: a comma, a tab or a semicolon. The text is UTF-8. Spaces around
    labels do not count. Class names are the distinct labels, sorted; as numbers if all are
    integers. Indices follow the rows.

    Args:
        path: The file. Paths of images in it are relative to its folder, or absolute.
        image_column: The column of paths.
        label_column: The column of labels, any text.
        classes: Class names that the labels are looked up in (a training set's); the file's own if
            None.

    Raises:
        ValueError: The file is missing or no such CSV file, a row lacks its path or label or has a
            label of no known class, an image has two labels, or there are fewer than 2 classes.
    """

    def __init__(
        self,
        path: str | Path,
        image_column: str = "path",
        label_column: str = "label",
        classes: Sequence[str] | None = None,
    ) -> None:
        self.path = Path(path)
        known = None if classes is None else frozenset(classes)
        label_of: dict[str, str] = {}
        paths, labels = [], []
        for line, image, label in _rows(self.path, image_column, label_column):
            if known is not None and label not in known:
                raise ValueError(
                    f"{self.path}, line {line}: the label {label!r} is none of the {len(known)} "
                    "classes of the training set; correct it or remove the row"
                )
            file = os.path.normpath(image) if "./" in image or "//" in image else image
            if label_of.setdefault(file, label) != label:
                raise ValueError(
                    f"{self.path}, line {line}: {quoted(image)} has the label {label!r} here and "
                    f"{label_of[file]!r} above; remove one of the rows"
                )
            paths.append(image)
            labels.append(sys.intern(label))
        if not labels:
            raise ValueError(f"{self.path} has a header and no rows; add a row for each image")
        names = sorted_classes(labels) if classes is None else list(classes)
        if len(names) < 2:
            raise ValueError(
                f"{self.path}: every label is {names[0]!r}, at least 2 classes are needed; "
                "add images of another class"
            )
        code = {name: position for position, name in enumerate(names)}
        super().__init__(self.path.parent, paths, [code[label] for label in labels], names)


def _rows(path: Path, image_column: str, label_column: str) -> Iterator[tuple[int, str, str]]:
    """Yield line number, image and label of every row."""
    rows = None
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header, delimiter = _header(file.readline())
            image, label = (
                _position(path, header, column, option)
                for column, option in (
                    (image_column, "--data.image-column"),
                    (label_column, "--data.label-column"),
                )
            )
            rows = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
            for row in rows:
                if not any(field.strip() for field in row):
                    continue
                if len(row) != len(header):
                    raise ValueError(
                        f"{path}, line {rows.line_num + 1}: {len(row)} fields, but the header has "
                        f"{len(header)}; correct the row (text that holds {delimiter!r} must be "
                        "quoted)"
                    )
                values = row[image], row[label].strip()
                if not all(values):
                    column = image_column if values[1] else label_column
                    raise ValueError(
                        f"{path}, line {rows.line_num + 1}: {column!r} is empty; fill it in or "
                        "remove the row"
                    )
                yield rows.line_num + 1, *values
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); name a CSV file") from error
    except UnicodeDecodeError as error:
        value = error.object[error.start]
        raise ValueError(
            f"{path} is no UTF-8 text (it holds a byte 0x{value:02x}); save it as UTF-8"
        ) from error
    except csv.Error as error:
        line = 1 if rows is None else rows.line_num + 1
        raise ValueError(f"{path}, line {line}: {error}; correct the row's quotes") from error


def _header(line: str) -> tuple[list[str], str]:
    """Return the columns and the delimiter, the one that makes the most columns."""
    choices = [
        (next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), []), delimiter)
        for delimiter in _DELIMITERS
    ]
    columns, delimiter = max(choices, key=lambda choice: len(choice[0]))
    return [column.strip() for column in columns], delimiter


def _position(path: Path, header: Collection[str], column: str, option: str) -> int:
    found = [position for position, name in enumerate(header) if name == column]
    if len(found) != 1:
        remedy = "rename all but one" if found else f"add a header or give {option} NAME"
        raise ValueError(
            f"{path}: the first line names {len(found) or 'no'} columns {column!r} (it has "
            f"{', '.join(map(repr, header)) or 'nothing'}); {remedy}"
        )
    return found[0]
