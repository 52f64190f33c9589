"""``python -m convert export --to torchvision``, and errors of both targets."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from convert import to_torchvision
from convert.__main__ import main
from convert.comparison import batches, difference, resolutions
from tests.models import SIDE, load, write_model
from tests.processes import captured
from trex_models.pretrained import naver

run = partial(captured, main, "export")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock")
    return write_model(folder, "resnet18", naver.LICENSE, num_classes=7)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    sizes: dict[str, Any] = {"proj_hidden_dim": 32, "proj_dim": 16}
    return write_model(folder, "trex_resnet", backbone="resnet18", num_classes=7, **sizes)


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    output: Tensor = model.eval().double()(images.double())
    return output


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torchvision_loads_a_classifier_strictly(stock: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new" / f"model{suffix}"
    status, printed, _ = run(stock, "--to", "torchvision", "--output", path)
    assert status == 0
    assert "torchvision.models.resnet18, fc of 7 classes" in printed
    assert "not for commercial use" in printed
    facts = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, f"{path.name}.json"]

    namespace: dict[str, Any] = {"torch": torch, "torchvision": torchvision}
    namespace["safetensors"] = __import__("safetensors.torch")
    exec(facts["load"].replace(path.name, str(path)), namespace)
    images = torch.randn(2, 3, 96, SIDE)
    assert torch.equal(outputs(namespace["model"], images), outputs(load(stock), images))
    assert facts["license"].startswith(naver.LICENSE)
    if suffix == ".safetensors":
        data = path.read_bytes()
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        assert metadata["weights_sha256"] == facts["weights_sha256"]
        assert list(metadata) == sorted(metadata)  # the same bytes each time

    values = facts["preprocessing"]
    values["interpolation"] = InterpolationMode(values["interpolation"])
    pixels = np.random.default_rng(0).integers(0, 256, (100, 140, 3), np.uint8)
    image = Image.fromarray(pixels)
    expected = create_transform(**resolve_model_data_config(load(stock)))(image)
    torch.testing.assert_close(ImageClassification(**values)(image), expected)


def test_file_licenses_and_missing_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, path = tmp_path / "own.safetensors", tmp_path / "model.pth"
    save_file(timm.create_model("resnet18").state_dict(), own, {"license": "cc-by-4.0"})
    status, printed, _ = run("resnet18", "--file", own, "--to", "torchvision", "--output", path)
    assert (status, "cc-by-4.0" in printed) == (0, True)
    facts = json.loads(path.with_name("model.pth.json").read_text())
    assert (facts["license"], facts["origin"]) == ("cc-by-4.0", "the file own.safetensors")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    status, printed, error = run("resnet18", "--to", "onnx", "--output", tmp_path / "m.onnx")
    assert (status, printed) == (2, "")
    assert "onnxscript" in error
    assert "pip install '.[export]'" in error


def test_the_backbone_of_a_complete_model_has_no_head(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    arguments = (whole, "--to", "torchvision", "--output", path, "--features", "backbone")
    assert run(*arguments)[0] == 0
    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    model.load_state_dict(load_file(path))
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = load(whole).double().forward_features(images.double()).mean((2, 3))
    assert torch.equal(outputs(model, images), expected)
    status, _, error = run(whole, "--to", "torchvision", "--output", tmp_path / "out.pth")
    assert status == 2
    assert "projector and a cosine classifier" in error
    assert "--features backbone" in error


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("resnet10t", {"num_classes": 0}, r"they have no conv1.0.weight"),
        ("resnet18", {"num_classes": 0, "channels": (8, 8, 8, 8)}, r"its blocks differ"),
        ("resnet18", {"num_classes": 0, "in_chans": 1}, r"has 1 input channels"),
        ("resnet18", {"num_classes": 0, "output_stride": 16}, r"does not reproduce"),
    ],
)
def test_models_unknown_to_torchvision_are_rejected(
    tmp_path: Path, name: str, kwargs: dict[str, Any], words: str
) -> None:
    folder = write_model(tmp_path / "model", name, **kwargs)
    path = tmp_path / "out.pth"
    status, _, error = run(folder, "--to", "torchvision", "--output", path)
    assert (status, error.count("\n")) == (2, 1)
    assert words in error
    assert "nothing was written" in error or "--to onnx" in error
    assert not list(tmp_path.glob("out*"))


def swap(model: Any) -> None:
    layer = model.layer1
    layer[0].conv1.weight, layer[1].conv1.weight = layer[1].conv1.weight, layer[0].conv1.weight


def other_eps(model: Any) -> None:
    model.bn1.eps = 1.1e-5


@pytest.mark.parametrize("mutate", [swap, other_eps])
def test_a_wrong_copy_is_found_and_not_written(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutate: Callable[[Any], None]
) -> None:
    serialize = to_torchvision.serialize

    def wrong(model: nn.Module, suffix: str, facts: dict[str, Any]) -> bytes:
        data = serialize(model, suffix, facts)
        mutate(model)  # changes the source, so the copy differs from it
        return data

    monkeypatch.setattr(to_torchvision, "serialize", wrong)
    path = tmp_path / "out.pth"
    path.write_text("earlier")
    status, _, error = run(stock, "--to", "torchvision", "--output", path, "--overwrite")
    assert status == 2
    assert "does not reproduce" in error
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    assert "--overwrite" in run(stock, "--to", "torchvision", "--output", path)[2]
    assert path.read_text() == "earlier"
    assert run(stock, "--to", "torchvision", "--output", path, "--overwrite")[0] == 0
    assert "conv1.weight" in torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("resnet18 --to onnx --output m.pth", "--output must be a .onnx file, got m.pth"),
        ("resnet18 --to torchvision --output m.onnx", "must be a .pth or .safetensors file"),
        ("resnet18 --to torchvision --output m.pth --half", "--half requires --to onnx"),
        ("resnet18 --to onnx --output folder.onnx", "(is a folder)"),
        ("resnet18 --to onnx --output file.txt/m.onnx", "Not a directory"),
        ("resnetty --to onnx --output m.onnx", "resnetty is not a timm model"),
        ("./nowhere --to onnx --output m.onnx", "./nowhere is not a folder"),
        ("trex_resnet50 --file no.pth --to onnx --output m.onnx", "no.pth is not a file"),
        ("trex_resnet50 --file file.txt --to onnx --output m.onnx", "file.txt"),
        (
            "STOCK --file file.txt --to onnx --output m.onnx",
            "requires the name of a timm architecture",
        ),
        (
            "STOCK --to onnx --output m.onnx --features projector",
            "has none; use backbone or logits",
        ),
    ],
)
def test_bad_input_is_one_line(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.onnx").mkdir()
    Path("file.txt").write_text("text")
    status, _, error = run(*arguments.replace("STOCK", str(stock)).split())
    assert (status, error.count("\n")) == (2, 1)
    assert words in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.txt", "folder.onnx"]


def test_comparisons_use_several_sizes_and_batches() -> None:
    assert resolutions(224, 224) == [(224, 224), (160, 160), (288, 224)]
    found = list(batches(3, resolutions(SIDE, SIDE)))
    assert [tuple(b.shape) for b in found] == [(1, 3, 64, 64), (2, 3, 32, 32), (5, 3, 96, 64)]
    images = found[-1].flatten(1)
    # Every second image has flat areas.
    assert [len(image.unique()) < 100 for image in images] == [True, False, True, False, True]
    black, ones = torch.zeros(1, 3, 2, 2), torch.ones(1, 4)
    for wrong in (ones * torch.nan, ones + 1e-6):
        assert not difference(black, wrong, ones, 1e-9).is_small
