"""Hugging Face datasets on disk."""

from __future__ import annotations

import json
import pickle
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from tests.images import encode, fail_to_list, picture
from trex_models.data.decode import UnreadableImageError
from trex_models.data.huggingface import HuggingFaceSource
from trex_models.data.loading import load_batches
from trex_models.data.multicrop import CropSpec, MultiCropDataset
from trex_models.data.photometric import LOCAL_AUGMENTATION

LABELS = [2, 0, 2, 1, 0, 2, 1]
NAMES = ["cat", "dog", "ant", "unused"]
FEATURES = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a temporary cache, and no network."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def pixels(index: int) -> np.ndarray:
    return picture(10 + index, 12, seed=index)


def content(index: int) -> bytes:
    return encode(pixels(index), "PNG")


def rows(features: dict[str, Any] | None = None, **columns: list[Any]) -> datasets.Dataset:
    """Return a dataset of seven images with columns added or replaced."""
    images = [{"bytes": content(i), "path": f"{i}.png"} for i in range(len(LABELS))]
    data = {"image": images, "label": LABELS, "note": list("abcdefg"), **columns}
    kinds = {**FEATURES, "note": datasets.Value("string"), **(features or {})}
    data = {name: values for name, values in data.items() if kinds[name] is not None}
    kinds = {name: kind for name, kind in kinds.items() if kind is not None}
    return datasets.Dataset.from_dict(data, features=datasets.Features(kinds))


def saved(path: Path, data: datasets.Dataset | datasets.DatasetDict, **options: Any) -> Path:
    data.save_to_disk(str(path), **options)
    return path


def on_hub(path: Path) -> Path:
    (path / "data").mkdir(parents=True)
    for shard in range(2):
        part = rows().shard(2, shard, contiguous=True)
        part.to_parquet(path / "data" / f"train-0000{shard}-of-00002.parquet")
    rows().select([1, 3]).to_parquet(path / "data" / "validation-00000-of-00001.parquet")
    return path


def check(source: HuggingFaceSource, order: list[int] | None = None) -> None:
    order = list(range(len(LABELS))) if order is None else order
    assert len(source) == len(order)
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [LABELS[index] for index in order]
    assert list(source.classes) == NAMES
    for row, index in enumerate(order):
        np.testing.assert_array_equal(source.read(row), pixels(index))


def refused(path: Path, message: str, **options: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        HuggingFaceSource(path, **options)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_saved_data_set(tmp_path: Path) -> None:
    """The format that is set for the dataset does not matter."""
    source = HuggingFaceSource(saved(tmp_path / "set", rows().with_format("numpy", ["note"])))
    check(source)
    assert source.name(3) == f"{tmp_path / 'set'} row 3 (3.png)"
    check(pickle.loads(pickle.dumps(source)))
    state = json.loads((tmp_path / "set" / "state.json").read_text())
    assert state["_format_type"] == "numpy"
    with pytest.MonkeyPatch.context() as patch:  # labels and digest do not decode images
        patch.setattr(Image, "open", None)
        patch.setattr(datasets.Image, "decode_example", None)
        source = HuggingFaceSource(tmp_path / "set")
        assert source.labels.tolist() == LABELS
        assert source.digest()


def test_a_saved_dictionary_of_splits(tmp_path: Path) -> None:
    data = datasets.DatasetDict(train=rows(), test=rows().select([1, 3]))
    path = saved(tmp_path / "set", data)
    check(HuggingFaceSource(path, "train"))
    source = HuggingFaceSource(path, "test")
    check(source, [1, 3])
    assert source.name(1) == f"{path}[test] row 1 (3.png)"
    for split, problem in (("", "several splits"), ("val", "no split 'val'")):
        refused(path, rf"{problem} \(splits: test, train\); choose one with", split=split)
    shutil.rmtree(path / "train")  # the other split does not need it
    check(HuggingFaceSource(path, "test"), [1, 3])
    path = saved(tmp_path / "one", datasets.DatasetDict(train=rows()))
    for split in ("", "train"):  # the only split need not be specified
        check(HuggingFaceSource(path, split))


@pytest.mark.parametrize("rearrange", ["shuffle", "select"])
def test_a_saved_rearrangement(tmp_path: Path, rearrange: str) -> None:
    data = rows().add_column("index", list(range(len(LABELS))))
    data = data.shuffle(seed=3) if rearrange == "shuffle" else data.select([5, 1, 3, 0])
    source = HuggingFaceSource(saved(tmp_path / "set", data))
    check(source, data["index"][:])
    again = saved(tmp_path / "again", data.flatten_indices())
    assert source.digest() == HuggingFaceSource(again).digest()


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = on_hub(tmp_path / "set")
    check(pickle.loads(pickle.dumps(HuggingFaceSource(path, "train"))))
    card = "---\ndataset_info:\n  splits:\n"
    for name in ("train", "validation", "test"):  # one of them was not downloaded
        card += f"  - name: {name}\n    num_bytes: 1\n    num_examples: 1000\n"
    (path / "README.md").write_text(card + "---\n")
    check(HuggingFaceSource(path, "validation"), [1, 3])
    refused(path, r"several splits \(splits: train, validation\)")
    monkeypatch.chdir(tmp_path)
    path.rename(tmp_path / "parquet")  # also the name of a format in datasets
    check(HuggingFaceSource("parquet", "train"))
    file = tmp_path / "parquet" / "data" / "train-00000-of-00002.parquet"
    source = HuggingFaceSource(file)
    check(source, [0, 1, 2, 3])
    assert source.name(0) == f"{file} row 0 (0.png)"
    refused(file, "has no splits; remove --data.split train", split="train")


BYTES = datasets.Value("binary")
STRUCT = {"bytes": BYTES, "path": datasets.Value("string")}


@pytest.mark.parametrize("feature", [BYTES, datasets.Value("large_binary"), STRUCT])
def test_images_that_are_not_marked_as_such(tmp_path: Path, feature: Any) -> None:
    images = [content(i) for i in range(len(LABELS))]
    if feature is STRUCT:
        images = [{"bytes": data, "path": None} for data in images]  # type: ignore[misc]
    path = saved(tmp_path / "set", rows({"image": feature}, image=images))
    source = HuggingFaceSource(path)
    check(source)
    assert source.name(3) == f"{path} row 3"
    assert len(source.digest()) == 64


def test_parquet_by_other_tools(tmp_path: Path) -> None:
    table = pyarrow.table({"jpg": [content(i) for i in range(3)], "cls": ["b", "a", "b"]})
    path = tmp_path / "set"
    path.mkdir()
    pyarrow.parquet.write_table(table, path / "x.parquet")
    refused(path, r"no unambiguous label column \(columns: jpg")
    source = HuggingFaceSource(path, label_column="cls")
    assert source.classes == ["a", "b"]
    assert source.labels.tolist() == [1, 0, 1]
    np.testing.assert_array_equal(source.read(2), pixels(2))


def test_images_outside_of_the_data_set(tmp_path: Path) -> None:
    (tmp_path / "away.png").write_bytes(content(1))
    path = tmp_path / "set" / "train.parquet"
    path.parent.mkdir()
    (path.parent / "near.png").write_bytes(content(0))
    images = [
        *({"bytes": None, "path": name} for name in ("near.png", str(tmp_path / "away.png"))),
        *({"bytes": None, "path": "absent.png"}, {"bytes": None, "path": None}, None),
        *({"bytes": b"torn", "path": "torn.jpg"}, {"bytes": b"torn", "path": None}),
    ]
    table = rows({"image": STRUCT}, image=images).with_format("arrow")[:]
    pyarrow.parquet.write_table(table.replace_schema_metadata(), path)
    for place in (path, path.parent):
        source = HuggingFaceSource(place, image_column="image")
        np.testing.assert_array_equal(source.read(0), pixels(0))
        np.testing.assert_array_equal(source.read(1), pixels(1))
        for row, message in (
            (2, "absent.png cannot .*No such file"),
            (3, "row 3 cannot be read as an image .the row contains neither"),
            (4, "row 4 cannot be read as an image .the row contains neither"),
            (5, r"row 5 \(torn.jpg\) cannot be read as an image .unknown format"),
            (6, "row 6 cannot be read as an image"),
        ):
            with pytest.raises(UnreadableImageError, match=message):
                source.read(row)
        assert len(source.digest()) == 64


def test_columns_by_name(tmp_path: Path) -> None:
    more = {"mask": datasets.Image(), "fine": datasets.ClassLabel(names=["x", "y"])}
    masks = [{"bytes": content(6 - i), "path": None} for i in range(7)]
    data = rows(more, mask=masks, fine=[0, 1] * 3 + [0])
    path = saved(tmp_path / "set", data)
    refused(path, r"us image column \(columns: image \(.*Image\), .* --data.image-column image or ")
    source = HuggingFaceSource(path, image_column="mask", label_column="fine")
    assert source.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    np.testing.assert_array_equal(source.read(0), pixels(6))
    for name in ("absent", "note"):
        refused(path, rf"no image column '{name}' \(columns: image", image_column=name)
    for name in ("absent", "mask"):
        message = f"no label column '{name}' .*choose one with --data.label-column "
        refused(path, message, image_column="image", label_column=name)
    data = data.remove_columns("mask").rename_column("label", "breed")
    check(HuggingFaceSource(saved(tmp_path / "other", data.remove_columns("fine"))))
    refused(saved(tmp_path / "two", data), "no unambiguous label column")


def test_columns_of_wrong_types_are_reported_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "away.png").write_bytes(content(0))
    paths = datasets.Dataset.from_dict(
        {"image": [str(tmp_path / "away.png")] * 2, "label": [0.0, 1.0]}
    )
    path = saved(tmp_path / "paths", paths)
    message = r"no image column 'image' .*cast_column\(NAME, datasets"
    refused(path, message, image_column="image")
    images = paths.cast_column("image", datasets.Image())
    path = saved(tmp_path / "images", images)
    message = "no label column 'label' .*must be class labels, integers"
    refused(path, message, label_column="label")
    labels = images.cast_column("label", datasets.Value("bool"))
    source = HuggingFaceSource(saved(tmp_path / "labels", labels))
    assert source.classes == ["False", "True"]
    assert source.labels.tolist() == [0, 1]
    np.testing.assert_array_equal(source.read(1), pixels(0))


@pytest.mark.parametrize(
    ("kind", "values", "classes"),
    [
        ("int64", [10, 9, 100], ["9", "10", "100"]),
        ("uint8", [3, 0, 1], ["0", "1", "3"]),
        ("string", ["b", "a", "c"], ["a", "b", "c"]),
        ("large_string", ["10", "9", "8"], ["8", "9", "10"]),
    ],
)
def test_labels_that_are_plain_values(
    tmp_path: Path, kind: str, values: list[Any], classes: list[str]
) -> None:
    labels = [values[i % 3] for i in range(7)]
    path = saved(tmp_path / "set", rows({"label": datasets.Value(kind)}, label=labels))
    source = HuggingFaceSource(path)
    assert source.classes == classes
    assert [source.classes[label] for label in source.labels] == [str(v) for v in labels]


@pytest.mark.parametrize(
    ("feature", "hidden"),
    [
        *((datasets.ClassLabel(names=NAMES), label) for label in (-1, None)),
        *((datasets.Value("int32"), label) for label in (-1, None)),
        *((datasets.Value("string"), label) for label in ("", None)),
    ],
)
def test_hidden_labels(tmp_path: Path, feature: Any, hidden: Any) -> None:
    known = ["a", "b"] if feature.dtype == "string" else [0, 1]
    labels = [*known, *[hidden] * 5]
    path = saved(tmp_path / "set", rows({"label": feature}, label=labels))
    refused(path, r"column 'label': row 2 has no label \(.*, in 5 row")


def test_labels_in_a_training_sets_classes(tmp_path: Path) -> None:
    path = saved(tmp_path / "set", rows())
    source = HuggingFaceSource(path, classes=["ant", "bee", "cat", "dog"])
    assert [source.classes[label] for label in source.labels] == [NAMES[label] for label in LABELS]
    with pytest.raises(ValueError, match="row 3 has the label 'dog', which is none of the 2"):
        HuggingFaceSource(path, classes=["ant", "cat"])


def test_problems_of_datasets_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path / "absent", "does not exist; specify")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "a.txt").write_text("no data")
    refused(tmp_path / "bare", "cannot be opened as a dataset .neither written by save_to_disk nor")
    again = "cannot be opened as a dataset .*; save or download it again"
    refused(tmp_path / "bare" / "a.txt", again)
    (file,) = saved(tmp_path / "none", rows()).glob("*.arrow")
    schema = pyarrow.ipc.open_stream(file.read_bytes()).schema
    pyarrow.ipc.new_stream(file, schema).close()
    refused(tmp_path / "none", "has no rows; use another")
    rows().select([]).to_parquet(tmp_path / "none.parquet")
    refused(tmp_path / "none.parquet", "cannot be opened as a dataset .*no data")
    one = rows({"label": datasets.Value("int32")}, label=[5] * 7)
    refused(saved(tmp_path / "one", one), "'label': every label is '5', but at least 2 classes")

    torn = saved(tmp_path / "torn", rows())
    (file,) = torn.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:1000])
    refused(torn, again)
    file.unlink()
    refused(torn, again)
    (torn / "state.json").write_text("{")
    refused(torn, again)

    hub = on_hub(tmp_path / "hub")
    file = hub / "data" / "train-00001-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:-300])
    refused(hub, "hub cannot be opened as a dataset .*; save or download", split="train")
    shutil.copytree(hub / "data", hub / "data" / "more")
    fail_to_list(monkeypatch, hub / "data" / "more")
    refused(hub, r"data/more/ cannot be listed \(Input/output error\)", split="train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[datasets\]' in a clone"):
        HuggingFaceSource(tmp_path)


def test_the_digest_holds_images_and_labels_and_not_the_place(tmp_path: Path) -> None:
    digest = HuggingFaceSource(saved(tmp_path / "one", rows())).digest()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert HuggingFaceSource(tmp_path / "two").digest() == digest
    assert HuggingFaceSource(saved(tmp_path / "cut", rows(), num_shards=3)).digest() == digest
    assert HuggingFaceSource(on_hub(tmp_path / "hub"), "train").digest() == digest
    labels = [1, *LABELS[1:]]
    images = [content(6 - i) for i in range(7)]
    for name, changed in (
        ("labels", rows(label=labels)),
        ("order", rows().select([1, 0, *range(2, 7)])),
        ("images", rows(image=[{"bytes": data, "path": "x"} for data in images])),
        ("classes", rows({"label": datasets.ClassLabel(names=[*NAMES, "more"])})),
    ):
        assert HuggingFaceSource(saved(tmp_path / name, changed)).digest() != digest


def test_jpegs_can_be_decoded_at_reduced_size(tmp_path: Path) -> None:
    images = [{"bytes": encode(pixels(0), "JPEG"), "path": "x.jpg"}] * 7
    source = HuggingFaceSource(saved(tmp_path / "set", rows(image=images)))
    height, width, _ = pixels(0).shape
    assert source.reduced(lambda *_: 2).read(3).shape == (-(-height // 2), -(-width // 2), 3)
    assert source.read(3).shape == (height, width, 3)


def test_worker_processes(tmp_path: Path) -> None:
    source = HuggingFaceSource(on_hub(tmp_path / "set"), "train")
    data = MultiCropDataset(source, [CropSpec(2, 8, (0.5, 1.0), LOCAL_AUGMENTATION)], seed=0)
    keys = [[(0, 0), (0, 1)], [(0, 5), (0, 3)]]
    expected = [data.__getitems__(batch) for batch in keys]
    for batch, wanted in zip(load_batches(data, keys, workers=1), expected, strict=True):
        assert (batch.crops[0] == wanted.crops[0]).all()
        assert (batch.labels == wanted.labels).all()
