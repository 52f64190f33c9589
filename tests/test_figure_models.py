"""Models of the paper's figure: replicas of their files, served, placed by hand, or wrong."""

from __future__ import annotations

import argparse
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor

from tests.file_server import FileServer
from tests.loopback import Fault, sha256
from trex_models.evaluation.frozen_model import FrozenModel
from trex_models.pretrained import figure

# Entry with the state dict, prefix of the backbone, keys of other parts; the other files are flat.
LAYOUTS = {
    "swav_resnet50": ("", "module.", "projection_head.0.weight prototypes.weight"),
    "paws_resnet50": ("encoder", "module.", "fc.fc1.weight fc.bn2.bias pred.fc1.weight"),
    "supcon_resnet50": ("model", "module.encoder.", "head.0.weight head.0.bias head.2.weight"),
    "mocov3_resnet50": ("state_dict", "module.base_encoder.", "base_encoder.fc.0.weight"),
    "obow_resnet50": ("network", "", "fc.weight fc.bias"),
}
OBOW_FILE = "tochvision_resnet50_student_K8192_epoch200.pth.tar"
PAWS, SUPCON = "paws_imgnt_10percent_300ep.pth.tar", "supcon_resnet50"
BIAS, WEIGHT = "module.layer1.0.bn1.bias", "module.layer1.0.conv1.weight"
ONE = torch.ones(2)


def backbone() -> dict[str, Tensor]:
    with torch.device("meta"):
        own = timm.create_model(figure.ARCHITECTURE, num_classes=0).state_dict()
    return {key: torch.full_like(own[key], i, device="cpu") for i, key in enumerate(own)}


def replica(name: str, state: dict[str, Tensor]) -> dict[str, Any]:
    entry, prefix, others = LAYOUTS.get(name, ("", "", ""))
    weights = {prefix + key: value for key, value in state.items()}
    weights |= {prefix[: len("module.")] + key: ONE for key in others.split()}
    if name == "mocov3_resnet50":
        weights |= {f"module.momentum_encoder.{key}": state[key] + 1 for key in state}
        weights["module.predictor.0.weight"] = ONE
    optimizer = {"state": {0: {"momentum_buffer": ONE}}, "param_groups": [{"params": [0]}]}
    rest = {"opt": argparse.Namespace(lr=0.1), "optimizer": optimizer, "epoch": 9, "amp": {}}
    return {**rest, entry: weights} if entry else weights


def write(path: Path, contents: object, legacy: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(contents, path, _use_new_zipfile_serialization=not legacy)
    if path.suffix == ".zip":
        data = path.read_bytes()
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{path.stem}/{OBOW_FILE}", data)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TREX_MODELS_CACHE", str(tmp_path))
    monkeypatch.setattr(figure, "ARCHITECTURE", "test_resnet")
    return tmp_path / "figure"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A server at the address of every file; the first connection breaks."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    with FileServer({}) as server:
        server.faults = [Fault("GET", cut_after=400_000, times=1)]
        for name, (title, license_, url) in figure.MODELS.items():
            local = server.url + "/".join(url.split("/")[-2:])
            monkeypatch.setitem(figure.MODELS, name, (title, license_, local))
        yield server


@pytest.mark.parametrize("name", figure.MODELS)
def test_every_layout(server: FileServer, cache: Path, name: str, monkeypatch: Any) -> None:
    if name == "obow_resnet50":  # one file has its full size
        monkeypatch.setattr(figure, "ARCHITECTURE", "resnet50")
    state = backbone()
    assert name != "obow_resnet50" or len(state) == 318
    _, license_, url = figure.MODELS[name]
    remote = url.removeprefix(server.url).removesuffix("?dl=1")
    path = cache.parent / "served" / Path(remote).name
    write(path, replica(name, state), legacy=name in ("dino_resnet50", "obow_resnet50"))
    server.files = {remote: path}

    frozen = FrozenModel.load(name)
    found: dict[str, Tensor] = frozen.model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    file = path.name.replace("resnet50.pth", f"{name}.pth")
    assert frozen.metadata["source"] == f"{url} ({file}, SHA-256 {sha256(path)})"
    assert (frozen.metadata["license"], frozen.metadata["tag"]) == (license_, "")
    with safe_open(cache / f"{name}.safetensors", "pt") as converted:
        assert converted.metadata() == {"format": "pt", "license": license_, "source": url}
    own = FrozenModel.load(name, preprocessing="model").transform
    assert (own.interpolation == "bicubic") == (name == "dino_resnet50")
    assert (own.crop_pct, own.std[0]) == (0.875, 0.228 if name == "swav_resnet50" else 0.229)
    assert [request.range for request in server.log] == [None, "bytes=400000-"]


def test_manual_copies_and_changed_files(cache: Path, caplog: Any, monkeypatch: Any) -> None:
    path, converted = cache / "supcon.pth", cache / f"{SUPCON}.safetensors"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"HF_HUB_OFFLINE is set; to use .*dl=1 to {path}"):
        FrozenModel.load(SUPCON)
    assert FrozenModel.load(SUPCON, untrained=True).metadata["source"] == SUPCON
    write(path, replica(SUPCON, backbone()))
    with pytest.raises(ValueError, match="--file requires the name of a timm architecture"):
        FrozenModel.load(SUPCON, file=path)
    FrozenModel.load(SUPCON)
    assert f"{sha256(path)}) to {converted}, license bsd-2-clause" in caplog.text
    converted.unlink()
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match="if SupCon has replaced the file, delete that record"):
        FrozenModel.load(SUPCON)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (WEIGHT, None, rf"missing keys: 1 \({WEIGHT}\), unexpected: 0"),
        ("module.fcx", ONE, r"missing keys: 0, unexpected: 1 \(module.fcx\)"),
        ("conv1.weight", ONE, r"unexpected: 1 \(conv1.weight\)"),
        (7, ONE, r"unexpected: 1 \(7\)"),
        (WEIGHT, ONE, rf"{WEIGHT} is \(2,\) torch.float32, expected "),
        (BIAS, torch.zeros(32).half(), rf"{BIAS} is \(32,\) torch.float16, expected"),
        (BIAS, torch.full([32], torch.nan), f"{BIAS} has 32 non-finite values"),
        (WEIGHT, [1], f"'{WEIGHT}' must be a tensor, got list"),
        (WEIGHT, os.system, "the pickle calls posix.system"),
        ("entry", None, "the file must have a state dict under 'encoder'"),
        ("end", None, "damaged or truncated"),
    ],
)
def test_wrong_files_are_refused(cache: Path, key: Any, value: Any, message: str) -> None:
    path, contents = cache / PAWS, replica("paws_resnet50", backbone())
    state = {**contents.pop("encoder"), key: value}
    state = {key: value for key, value in state.items() if value is not None}
    contents["model" if key == "entry" else "encoder"] = state
    write(path, contents)
    os.truncate(path, path.stat().st_size - 9999 * (key == "end"))
    with pytest.raises(ValueError, match=message) as caught:
        FrozenModel.load("paws_resnet50")
    url = figure.MODELS["paws_resnet50"][2]
    assert str(caught.value).startswith(f"paws_resnet50 cannot be loaded: {PAWS}: ")
    assert f"; to use a manual copy, download {url} to {path}" in str(caught.value)
    assert [p for p in cache.iterdir() if p.suffix != ".lock"] == [path]


def test_a_damaged_archive_is_refused(cache: Path) -> None:
    path = cache / Path(figure.MODELS["obow_resnet50"][2]).name
    write(path, replica("obow_resnet50", backbone()))
    data = path.read_bytes()
    path.write_bytes(data[:9999] + b"x" + data[10_000:])
    with pytest.raises(ValueError, match=f"{path.name}: Bad CRC-32 .*; to use a manual copy, "):
        FrozenModel.load("obow_resnet50")


def test_the_figure_lists_the_models_of_the_paper() -> None:
    titles = [figure.TITLES[name] for name in figure.FIGURE]
    assert titles == ["DINO", "SwAV", "PAWS", "SupCon", "RSB-A1", "t-ReX", "t-ReX*"]
    assert all(timm.is_model(name.partition(".")[0]) for name in figure.FIGURE[4:])
