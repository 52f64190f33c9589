"""Hugging Face datasets on disk: folders of `save_to_disk`, or parquet files as on the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trex_models.data.decode import decode_image, read_image, unreadable
from trex_models.data.image_files import walk
from trex_models.data.sources import digest, encode_labels

_REMEDIES = {
    "image": "images must be an Image feature or bytes: convert a column of paths with "
    "cast_column(NAME, datasets.Image()) and save the dataset again",
    "label": "labels must be class labels, integers, text or booleans: convert the column and save "
    "the dataset again",
}
_MISSING = (None, "", -1)  # -1 is what hidden labels of test splits are on the Hub


class HuggingFaceSource:
    """Images of a dataset on disk, in random access; the network is never used.

    A folder that `save_to_disk` wrote is mapped into memory as it is. Parquet (one file, or a
    folder of files named by split, such as data/train-00000-of-00002.parquet) is first copied, all
    splits of it, to an Arrow cache of about the same size in HF_DATASETS_CACHE (by default
    ~/.cache/huggingface/datasets); the next time it is opened from there.

    Args:
        path: Folder or parquet file.
        split: Name of the split; may be empty if there is only one.
        image_column: Column of images: of images' bytes, or of both bytes and path; if empty, the
            only such column.
        label_column: Column of labels: class labels, integers, booleans or strings; if empty,
            "label" or the only one of class labels.
        classes: Class names of the training set; by default the dataset's own: all names of class
            labels, otherwise the distinct values, sorted.

    Raises:
        ValueError: `datasets` is not installed; the dataset is missing, damaged or empty; the split
            or a column is unknown or must be named; an image has no label or one of no known class,
            or there are fewer than 2 classes.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "",
        image_column: str = "",
        label_column: str = "",
        classes: Sequence[str] | None = None,
    ) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ValueError(
                "Hugging Face datasets need a package; pip install trex-models[datasets]"
            ) from error
        self.path = Path(path)
        rows, split = _open(self.path, split)
        self._where = f"{self.path}[{split}]" if split else str(self.path)
        if not len(rows):
            raise ValueError(f"{self._where} has no rows; name another split or dataset")
        features = dict(rows.features)
        images = [n for n, feature in features.items() if isinstance(feature, datasets.Image)]
        others = [n for n, feature in features.items() if _holds_bytes(feature)]
        self._column = _choose(
            self._where, features, "image", image_column, images + others, images or others
        )
        labels = [n for n, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        others = [n for n, feature in features.items() if n not in labels and _holds_names(feature)]
        likely = ["label"] if "label" in labels + others else labels
        label_column = _choose(
            self._where, features, "label", label_column, labels + others, likely
        )
        self.classes, self.labels = _labels(
            f"{self._where}, column {label_column!r}",
            rows.data.column(label_column),
            getattr(features[label_column], "names", None),
            classes,
        )
        rows = rows.with_format(None).select_columns([self._column])
        if isinstance(rows.features[self._column], datasets.Image):
            rows = rows.cast_column(self._column, datasets.Image(decode=False))
        self._rows = rows

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def read(self, index: int) -> np.ndarray:
        """Return one image, (H, W, 3) uint8 RGB; ValueError names a row that is no image."""
        data, path = self._row(index)
        if data is not None:
            return decode_image(data, self._name(index, path))
        if path:
            return read_image((self.path if self.path.is_dir() else self.path.parent) / path)
        raise unreadable(self._name(index, path), "the row holds neither bytes nor a path")

    def name(self, index: int) -> str:
        """Return dataset, row and, if there is one, the name of the file it was made of."""
        return self._name(index, self._row(index)[1])

    def digest(self) -> str:
        """Return a hash of labels, classes and the images' lengths in bytes, or else paths."""
        import pyarrow as pa
        import pyarrow.compute as pc

        # Of a column mapped into memory this reads the offsets alone. What is opened from disk has
        # no mapping of indices (save_to_disk resolves it), so that column and rows agree.
        column = self._rows.data.column(self._column)
        paths: list[str | None] = []
        if pa.types.is_struct(column.type):
            data = pc.struct_field(column, "bytes")
            paths = pc.struct_field(column, "path").filter(pc.is_null(data)).to_pylist()
            column = data
        lengths = pc.fill_null(pc.binary_length(column), -1).to_numpy().astype(np.int64)
        return digest(lengths, "\0".join(p or "" for p in paths), self.labels, *self.classes)

    def _row(self, index: int) -> tuple[bytes | None, str | None]:
        value = self._rows[index][self._column]
        return (value["bytes"], value["path"]) if isinstance(value, dict) else (value, None)

    def _name(self, index: int, path: str | None) -> str:
        return f"{self._where} row {index}" + (f" ({path})" if path else "")


def _open(path: Path, split: str) -> tuple[Any, str]:
    """Return the Dataset of a split, and the split's name; empty for what has no splits."""
    import datasets

    if not path.exists():
        raise ValueError(f"{path} does not exist; name a dataset's folder or parquet file")
    files = list(walk(path)) if path.is_dir() else []  # datasets ignores what it cannot list
    where = str(path.resolve())  # a relative one could be taken for the name of a format
    open_saved = partial(datasets.load_from_disk, keep_in_memory=False)
    splits: dict[str, Callable[[], Any]]
    try:
        if path.is_file():
            splits = {"": partial(datasets.Dataset.from_parquet, where)}
        elif (path / "dataset_dict.json").is_file():
            names = json.loads((path / "dataset_dict.json").read_text("utf-8"))["splits"]
            splits = {name: partial(open_saved, f"{where}/{name}") for name in names}
        elif (path / "state.json").is_file():
            name = json.loads((path / "state.json").read_text("utf-8")).get("_split") or ""
            splits = {name: partial(open_saved, where)}
        elif any(file.endswith(b".parquet") for file in files):
            builder = datasets.load_dataset_builder(where)
            # A card may list more than the files that were fetched: no checks against it.
            load = partial(datasets.load_dataset, where, verification_mode="no_checks")
            splits = {str(n): partial(load, split=n) for n in builder.config.data_files or {}}
        else:
            raise ValueError("neither a folder of save_to_disk nor one of parquet files")
        if not split and len(splits) == 1:
            split = next(iter(splits))
        if split in splits:
            return splits[split](), split
    except Exception as error:  # pyarrow, datasets and json have many kinds
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(
            f"{path} cannot be opened as a dataset ({reason}); write or fetch it again, or name "
            "another folder or one of its parquet files"
        ) from error
    if list(splits) == [""]:
        raise ValueError(f"{path} has no splits; leave out --data.split {split}")
    raise ValueError(
        f"{path} has the splits {', '.join(sorted(splits))}, and "
        f"{f'none called {split}' if split else 'one must be named'}; give --data.split NAME"
    )


def _holds_bytes(feature: object) -> bool:
    if isinstance(feature, dict):
        return {"bytes", "path"} <= feature.keys() and _holds_bytes(feature["bytes"])
    return getattr(feature, "dtype", "") in ("binary", "large_binary")


def _holds_names(feature: object) -> bool:
    dtype = str(getattr(feature, "dtype", ""))
    return dtype.startswith(("int", "uint", "bool")) or dtype in ("string", "large_string")


def _choose(
    where: str,
    features: Mapping[str, object],
    kind: str,
    column: str,
    suitable: Sequence[str],
    likely: Sequence[str],
) -> str:
    """Return the column asked for, or else the likely one, if it is the only one."""
    if column in suitable:
        return column
    if not column and len(likely) == 1:
        return likely[0]
    known = ", ".join(f"{name} ({getattr(f, 'dtype', f)})" for name, f in features.items())
    problem = f"no {kind} column {column!r}" if column else f"not one obvious {kind} column"
    options = f"give --data.{kind}-column {' or '.join(suitable)}"
    remedy = options if suitable else _REMEDIES[kind]
    raise ValueError(f"{where} has {problem} among {known}; {remedy}")


def _labels(
    where: str, column: Any, names: Sequence[str] | None, classes: Sequence[str] | None
) -> tuple[list[str], np.ndarray]:
    """Return classes and labels, (N,) int64, of a pyarrow.ChunkedArray of names or numbers."""
    import pyarrow.compute as pc

    distinct = pc.unique(column)
    codes = pc.index_in(column, value_set=distinct).to_numpy()
    values = distinct.to_pylist()
    for code, value in enumerate(values):
        if value in _MISSING or (names is not None and not 0 <= value < len(names)):
            raise ValueError(
                f"{where}: row {np.argmax(codes == code)} has no label ({value!r}, one of "
                f"{np.sum(codes == code)}); name a split whose labels are not hidden"
            )
    found = [str(value) if names is None else names[value] for value in values]
    classes, labels = encode_labels(
        found,
        names if classes is None else classes,
        where,
        lambda c: f"row {np.argmax(codes == c)}",
    )
    return classes, labels[codes]
