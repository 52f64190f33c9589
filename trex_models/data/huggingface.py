"""Hugging Face datasets on disk, saved by `save_to_disk` or as parquet files like on the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trex_models.data.decode import decode_image, read_image, unreadable_error
from trex_models.data.image_files import walk
from trex_models.data.sources import EncodedSource, digest, encode_labels

_REMEDIES = {
    "image": "images must be an Image feature or bytes: convert a column of paths with "
    "cast_column(NAME, datasets.Image()) and save the dataset again",
    "label": "labels must be class labels, integers, strings or booleans: convert the column and "
    "save the dataset again",
}
_MISSING = (None, "", -1)  # -1 marks the hidden labels of test splits on the Hub


class HuggingFaceSource(EncodedSource):
    """Source of the images of a Hugging Face dataset on disk; never accesses the network.

    A folder written by `save_to_disk` is memory-mapped. Parquet (one file, or a folder of files
    named by split, such as data/train-00000-of-00002.parquet) is first converted, with all splits,
    to an Arrow cache of about the same size in HF_DATASETS_CACHE (~/.cache/huggingface/datasets by
    default). Later runs open the cache.

    Args:
        path: Folder or parquet file.
        split: Name of the split; may be empty if there is only one.
        image_column: Name of the column of images (Image feature, bytes, or bytes and path). If
            empty, the only such column is used.
        label_column: Name of the column of labels (class labels, integers, booleans or strings).
            If empty, "label" or the only column of class labels is used.
        classes: Class names of the training set. By default, the names of the dataset's class
            labels, or the sorted distinct values of another type of labels.

    Raises:
        ValueError: `datasets` is not installed; the dataset is missing, damaged or empty; the split
            or a column is unknown or must be specified; an image has no label or an unknown class;
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
                "Hugging Face datasets require the package datasets: "
                "pip install '.[datasets]' in a clone"
            ) from error
        self.path = Path(path)
        rows, split = _open(self.path, split)
        self._where = f"{self.path}[{split}]" if split else str(self.path)
        if not len(rows):
            raise ValueError(f"{self._where} has no rows; use another split or dataset")
        features = dict(rows.features)
        choose = partial(_choose_column, self._where, features)
        images = [n for n, feature in features.items() if isinstance(feature, datasets.Image)]
        others = [n for n, feature in features.items() if _is_bytes(feature)]
        self._column = choose("image", image_column, images + others, images or others)
        labels = [n for n, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        others = [n for n, feature in features.items() if n not in labels and _is_name(feature)]
        defaults = ["label"] if "label" in labels + others else labels
        label_column = choose("label", label_column, labels + others, defaults)
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
        """Return one image, (H, W, 3) uint8 RGB; raise a ValueError if the row is unreadable."""
        data, path = self._row(index)
        if data is not None:
            return decode_image(data, self._name(index, path), self.reduction)
        if path:
            folder = self.path if self.path.is_dir() else self.path.parent
            return read_image(folder / path, self.reduction)
        raise unreadable_error(self._name(index, path), "the row contains neither bytes nor a path")

    def name(self, index: int) -> str:
        """Return the sample's name: dataset, row and, if known, the image's original file."""
        return self._name(index, self._row(index)[1])

    def digest(self) -> str:
        """Return a hash of labels, classes, and size in bytes (or else path) of each image."""
        import pyarrow as pa
        import pyarrow.compute as pc

        # Reads only the offsets of a memory-mapped column. Datasets opened from disk have no
        # indices mapping (save_to_disk resolves it), so column and rows have the same order.
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
    import datasets

    if not path.exists():
        raise ValueError(f"{path} does not exist; specify the folder or parquet file of a dataset")
    files = list(walk(path)) if path.is_dir() else []  # datasets ignores unreadable folders
    absolute = str(path.resolve())  # datasets could mistake a relative path for a format's name
    open_saved = partial(datasets.load_from_disk, keep_in_memory=False)
    splits: dict[str, Callable[[], Any]]
    try:
        if path.is_file():
            splits = {"": partial(datasets.Dataset.from_parquet, absolute)}
        elif (path / "dataset_dict.json").is_file():
            names = json.loads((path / "dataset_dict.json").read_text("utf-8"))["splits"]
            splits = {name: partial(open_saved, f"{absolute}/{name}") for name in names}
        elif (path / "state.json").is_file():
            name = json.loads((path / "state.json").read_text("utf-8")).get("_split") or ""
            splits = {name: partial(open_saved, absolute)}
        elif any(file.endswith(b".parquet") for file in files):
            builder = datasets.load_dataset_builder(absolute)
            # No checks, because a dataset card may list more files than were downloaded.
            load = partial(datasets.load_dataset, absolute, verification_mode="no_checks")
            splits = {str(n): partial(load, split=n) for n in builder.config.data_files or {}}
        else:
            raise ValueError("neither written by save_to_disk nor a folder of parquet files")
        if not split and len(splits) == 1:
            split = next(iter(splits))
        if split in splits:
            return splits[split](), split
    except Exception as error:  # pyarrow, datasets and json raise many types of errors
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(
            f"{path} cannot be opened as a dataset ({reason}); save or download it again, or "
            "specify another folder or one of its parquet files"
        ) from error
    if list(splits) == [""]:
        raise ValueError(f"{path} has no splits; remove --data.split {split}")
    problem = f"no split {split!r}" if split else "several splits"
    names = ", ".join(sorted(splits))
    raise ValueError(f"{path} has {problem} (splits: {names}); choose one with --data.split NAME")


def _is_bytes(feature: object) -> bool:
    if isinstance(feature, dict):
        return {"bytes", "path"} <= feature.keys() and _is_bytes(feature["bytes"])
    return getattr(feature, "dtype", "") in ("binary", "large_binary")


def _is_name(feature: object) -> bool:
    dtype = str(getattr(feature, "dtype", ""))
    return dtype.startswith(("int", "uint", "bool")) or dtype in ("string", "large_string")


def _choose_column(
    where: str,
    features: Mapping[str, object],
    kind: str,
    column: str,
    suitable: Sequence[str],
    defaults: Sequence[str],
) -> str:
    if column in suitable:
        return column
    if not column and len(defaults) == 1:
        return defaults[0]
    known = ", ".join(f"{name} ({getattr(f, 'dtype', f)})" for name, f in features.items())
    problem = f"no {kind} column {column!r}" if column else f"no unambiguous {kind} column"
    options = f"choose one with --data.{kind}-column {' or '.join(suitable)}"
    remedy = options if suitable else _REMEDIES[kind]
    raise ValueError(f"{where} has {problem} (columns: {known}); {remedy}")


def _labels(
    where: str, column: Any, names: Sequence[str] | None, classes: Sequence[str] | None
) -> tuple[list[str], np.ndarray]:
    import pyarrow.compute as pc

    distinct = pc.unique(column)
    codes = pc.index_in(column, value_set=distinct).to_numpy()
    values = distinct.to_pylist()
    for code, value in enumerate(values):
        if value in _MISSING or (names is not None and not 0 <= value < len(names)):
            raise ValueError(
                f"{where}: row {np.argmax(codes == code)} has no label ({value!r}, in "
                f"{np.sum(codes == code)} row(s)); use a split whose labels are not hidden"
            )
    class_names = [str(value) if names is None else names[value] for value in values]
    known = names if classes is None else classes
    classes, labels = encode_labels(
        class_names, known, where, lambda code: f"row {np.argmax(codes == code)}"
    )
    return classes, labels[codes]
