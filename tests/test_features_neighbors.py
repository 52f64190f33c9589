"""Nearest neighbors of images in a feature file: search, text output and plot."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import trex_models.features
from tests.images import save_image
from tests.models import CHANNELS, edit_config, save_model
from trex_models import plotting
from trex_models.evaluation.feature_file import Features
from trex_models.evaluation.knn import nearest_neighbors
from trex_models.features import neighbors
from trex_models.features.__main__ import main
from trex_models.features.neighbors import Neighbors, find


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("backbone", "other")):
        cfg = {"input_size": [3, 64, 64]}
        save_model(root / name, "resnet10t", cfg, seed, num_classes=0, channels=CHANNELS)
    return root


@pytest.fixture
def place(place: Path, models: Path) -> Path:
    model = ["--model", str(models / "backbone"), "--workers", "0", "--batch-size", "4"]
    assert main(["extract", "images", "--output", "f.npy", *model]) == 0
    return place


def test_neighbors_are_the_nearest_by_cosine_and_not_the_query(place: Path) -> None:
    found = trex_models.features.load("f.npy")
    rows = found.features / np.linalg.norm(found.features, axis=1, keepdims=True)
    cosines = rows @ rows[3]
    cosines[3] = -2
    nearest = np.argsort(-cosines)[:4]
    by_name, by_path = find(found, [found.names[3], f"images/{found.names[3]}"], 4)
    assert by_name == by_path
    assert by_name.names == [found.names[row] for row in nearest]
    np.testing.assert_allclose(by_name.similarities, cosines[nearest], atol=1e-5)
    assert by_name.path == place / "images" / found.names[3]


def test_a_query_excludes_itself_and_not_its_duplicates(tmp_path: Path) -> None:
    rows = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    found = Features(rows, ["one.png", "same.png", "other.png"], {"root": str(tmp_path)})
    one, same = find(found, ["one.png", "same.png"], 2)
    assert one.names == ["same.png", "other.png"]
    assert same.names == ["one.png", "other.png"]


@pytest.mark.usefixtures("place")
def test_another_image_is_prepared_and_computed_as_those_of_the_file(models: Path) -> None:
    shutil.copy("images/b/5.png", "new.png")
    for option in ("", "--precision bf16", "--preprocessing validation"):
        given = ["--output", "other.npy", "--overwrite", *option.split()]
        assert main(["extract", "images", "--model", str(models / "backbone"), *given]) == 0
        [answer] = find(trex_models.features.load("other.npy"), ["new.png"], 20)
        assert answer.names[0] == "b/5.png"
        assert answer.similarities[0] == pytest.approx(1, abs=1e-6)
        assert len(answer.names) == 11


@pytest.mark.parametrize(
    ("part", "key", "value", "differing"),
    [
        ("", "", None, "weights_sha256"),
        ("pretrained_cfg", "mean", [0.5, 0.5, 0.5], "transform"),
        ("model_args", "act_layer", "gelu", "modules_sha256"),
    ],
)
def test_the_model_must_be_that_of_the_file(
    place: Path, models: Path, part: str, key: str, value: object, differing: str
) -> None:
    shutil.copy(place / "images" / "b" / "5.png", "new.png")
    shutil.copytree(models / ("backbone" if part else "other"), "model")
    if part:
        edit_config(Path("model"), lambda config: config[part].update({key: value}))
    with pytest.raises(ValueError, match=f"differs from the model of the .* in {differing}"):
        find(trex_models.features.load("f.npy"), ["new.png"], model="model")


def test_weights_of_your_own_may_be_moved(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(place / "images" / "b" / "5.png", "new.png")
    model = timm.create_model("test_resnet", num_classes=0)
    save_file(model.state_dict(), "own.safetensors")
    given = ["--model", "test_resnet", "--file", "own.safetensors", "--workers", "0"]
    assert main(["extract", "images", "--output", "own.npy", *given]) == 0
    Path("own.safetensors").rename("moved.safetensors")
    asked = ["neighbors", "own.npy", "--query", "new.png"]
    assert main(asked) == 2
    assert "own.safetensors is not a file" in capsys.readouterr().err
    assert main([*asked, "--file", "moved.safetensors"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("b/5.png")


@pytest.mark.parametrize("root", ["moved", "images/../moved/", None])
def test_a_query_by_path_is_not_its_own_neighbor(place: Path, root: str | None) -> None:
    if root:
        shutil.copytree(place / "images", place / "moved")
    path = f"{'moved' if root else 'images'}/a/0.png"
    [answer] = find(trex_models.features.load("f.npy"), [path], root=Path(root) if root else None)
    assert answer.query == "a/0.png"
    assert "a/0.png" not in answer.names


@pytest.mark.usefixtures("place")
def test_features_stay_in_their_file(monkeypatch: pytest.MonkeyPatch) -> None:
    found = trex_models.features.load("f.npy")
    seen = []

    def noting(features: Tensor, *rest: Any) -> Any:
        seen.append(features.data_ptr())
        return nearest_neighbors(features, *rest)

    monkeypatch.setattr(neighbors, "nearest_neighbors", noting)
    find(found, ["a/0.png"])
    assert seen == [found.features.ctypes.data]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow UTF-8 names alone")
def test_names_that_are_not_utf8_are_drawn_and_printed(tmp_path: Path) -> None:
    name = os.fsdecode(b"gr\xfcn.png")
    save_image(tmp_path / name)
    row = Neighbors(name, tmp_path / name, [name], [0.5])
    plotting.save(neighbors.draw_neighbors([row], tmp_path, "title"), tmp_path / "p.png")
    assert neighbors.format_neighbors([row]).encode().count("gr\ufffdn.png".encode()) == 2


@pytest.mark.usefixtures("place")
def test_the_command_prints_and_draws(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["neighbors", "f.npy", "--query", "a/0.png", "b/1.png", "--k", "3"]
    assert main([*given, "--output", "p.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert (lines[0], lines[4]) == ("a/0.png", "b/1.png")
    with Image.open("p.png") as drawn:
        assert drawn.width > drawn.height > 300
    assert main([*given, "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [entry["query"] for entry in entries] == ["a/0.png", "b/1.png"]
    near = list(zip(entries[0]["similarities"], entries[0]["names"], strict=True))
    assert lines[1:4] == [f"  {cosine:6.3f}  {name}" for cosine, name in near]

    Path("images").rename("moved")  # then --root is needed
    assert main([*given, "--output", "moved.png"]) == 2
    assert not Path("moved.png").exists()
    assert main([*given, "--output", "moved.png", "--root", "moved"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--query", "c/0.png"], "--query c/0.png is neither a name in the file (a/0.png)"),
        (["--query", "a/0.png", "--output", "p.txt"], "file, got p.txt"),
    ],
)
@pytest.mark.usefixtures("place")
def test_invalid_queries_are_reported(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["neighbors", "f.npy", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_long_names_are_shortened_and_images_keep_their_shape(tmp_path: Path) -> None:
    Image.new("RGB", (400, 100), "red").save(tmp_path / "wide.png")
    Image.new("RGB", (20, 60), "blue").save(tmp_path / "$high_.png")
    long = "x" * 90 + "/../wide.png"
    (tmp_path / ("x" * 90)).mkdir()
    row = Neighbors("wide.png", tmp_path / "wide.png", ["$high_.png", long], [0.5, 0.25])
    figure = neighbors.draw_neighbors([row], tmp_path, "title")
    axes = figure.axes
    assert len(axes) == 3
    assert axes[1].get_xlabel() == "0.500\n$high_.png"
    label = axes[2].get_xlabel().replace("\n", "")
    assert "..." in label
    assert label.endswith("wide.png")
    pixels = np.asarray(axes[0].images[0].get_array())
    red = (pixels == (255, 0, 0)).all(2)
    assert pixels.shape[0] == pixels.shape[1] == red.any(0).sum() == 4 * red.any(1).sum()
