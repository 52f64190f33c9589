"""Every form of checkpoint is read; damaged, foreign and unsafe files are refused."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from tests import official_files
from tests.models import tiny_method
from trex_models.pretrained.checkpoints import CheckpointError, read, split

Contents = dict[str, Any]
SMALL: Contents = {"bank_size": 1200, "optimizer": False}


@pytest.fixture(scope="module")
def star() -> Contents:
    """The smallest full training state; copy it before changing it."""
    return official_files.full_checkpoint(1, seed=5, **SMALL)


@pytest.fixture(scope="module")
def backbone() -> Contents:
    return official_files.backbone_checkpoint(seed=4)


def copied(contents: Contents) -> Contents:
    return {**contents, "model": dict(contents["model"])}


def saved(contents: object, folder: Path, name: str = "weights.pth") -> Path:
    torch.save(contents, folder / name)
    return folder / name


@pytest.mark.parametrize("numpy_names", ["new", "old"])
@pytest.mark.parametrize("legacy", [False, True])
def test_official_pickles(star: Contents, tmp_path: Path, numpy_names: Any, legacy: bool) -> None:
    path = tmp_path / "full.pth"
    official_files.write(star, path, numpy_names=numpy_names, legacy=legacy)
    assert zipfile.is_zipfile(path) is not legacy
    name = official_files.NUMPY_MODULES[numpy_names]
    assert f"{name}\n_reconstruct".encode() in path.read_bytes()
    found, expected = read(path).state_dict(), split(star).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_flat_file_and_its_wrappers(backbone: Contents, tmp_path: Path, star: Contents) -> None:
    for prefix in ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        path = saved({prefix + key: value for key, value in backbone.items()}, tmp_path)
        checkpoint = read(path)
        assert checkpoint.form == "model"
        assert (checkpoint.projector, checkpoint.classifier_weights) == ({}, None)
        assert checkpoint.backbone.keys() == backbone.keys()
        assert torch.equal(checkpoint.backbone["conv1.weight"], backbone["conv1.weight"])
    last = {
        k: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v
        for k, v in backbone.items()
    }
    assert all(value.is_contiguous() for value in split(last).state_dict().values())
    save_file(dict(backbone), tmp_path / "model.safetensors")
    assert read(tmp_path).backbone.keys() == backbone.keys()
    inside = {
        key.replace("module.model.encoder.", "_orig_mod.module.model.encoder._orig_mod."): value
        for key, value in star["model"].items()
    }
    assert split({"model": inside}).backbone.keys() == split(star).backbone.keys()


STEM = "encoder.backbone.conv1.0.weight"


@pytest.mark.parametrize("bank", [True, False])
def test_trainer_s_checkpoint(bank: bool, tmp_path: Path) -> None:
    method = tiny_method(bank).eval()
    if method.momentum_encoder is not None:
        nn.init.constant_(method.momentum_encoder.get_parameter(STEM), 0.5)
    state = {"config": {}, "classes": list("abcde"), "images": "0" * 64, "step": 3}
    state |= {"method": method.state_dict(), "optimizer": {}, "scaler": {}}
    path = saved(state, tmp_path)
    checkpoint = read(path, backbone="resnet10t")
    assert checkpoint.form == "trainer"
    assert checkpoint.proj_layers == 2
    assert set(checkpoint.key_report) == set(method.state_dict()) | set(state) - {"method"}
    if bank:
        momentum = read(path, momentum_encoder=True, backbone=None)
        assert torch.all(momentum.backbone["conv1.0.weight"] == 0.5)
    else:
        with pytest.raises(CheckpointError, match=r"weights\.pth: no momentum encoder"):
            read(path, momentum_encoder=True, backbone=None)


def rename(old: str, new: str) -> Callable[[Contents], None]:
    def change(model: Contents) -> None:
        model[new] = model.pop(old)

    return change


def put(key: Any, value: Any) -> Callable[[Contents], None]:
    return lambda model: model.__setitem__(key, value)


def drop(*parts: str) -> Callable[[Contents], None]:
    def change(model: Contents) -> None:
        for key in [key for key in model if any(part in key for part in parts)]:
            del model[key]

    return change


def fill(key: str, value: float) -> Callable[[Contents], None]:
    def change(model: Contents) -> None:
        model[key] = model[key].clone()
        model[key].view(-1)[3] = value

    return change


CONV, HEAD = "module.model.encoder.conv1.weight", "module.model.head.layers."
BN = "module.model.encoder.bn1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("model.encoder.layer4.2.conv3"), r"missing keys: 1 \(layer4\.2\.conv3\.weight\)"),
        (drop("module.model.encoder."), "no backbone in"),
        (drop(HEAD), "the projector is missing"),
        (drop(f"{HEAD}2.weight"), "projector is incomplete"),
        (drop(f"{HEAD}1.bn.bias"), r"projector of 1 hidden layers .missing keys: 1 \(1\.bn"),
        (drop("memory.labels"), "bank has no labels"),
        (drop("memory.features"), "bank has no features"),
        (put("module.clf.fc.weight", torch.ones(1000, 256)), "bank and learned classifier exc"),
        (put(3, torch.ones(1)), "key 3 must be a string"),
        (put("module.extra", torch.ones(1)), "'module.extra' is not a key of the"),
        (put("module.model.encoder.fc.bias", torch.ones(9)), r"unexpected: 1 \(fc\.bias\)"),
        (put("model.encoder.conv1.weight", torch.ones(1)), "occurs twice in the file"),
        (put(CONV, "text"), "must be a tensor, got str"),
        (put(CONV, torch.ones(64, 3, 3, 3)), r"conv1\.weight is \(64, 3, 3, 3\) torch.float32, e"),
        (put(CONV, torch.ones(64, 3, 7, 7).half()), r"\(64, 3, 7, 7\) torch.float16, expected"),
        (fill(CONV, float("nan")), r"conv1\.weight has 1 non-finite values of 9408;"),
        (fill(f"{HEAD}2.weight", float("inf")), r"projector 2\.weight has 1 non-finite values of "),
        (fill("module.memory.features", float("nan")), "bank features has 1 non-finite values"),
        (put(CONV, torch.ones(64, 3, 7, 7).char()), "got torch.int8, .* if it was quantized"),
        (put(f"{BN}.running_mean", torch.ones(64).long()), "must be a dense tensor .* torch.int64"),
        (put(f"{BN}.num_batches_tracked", torch.ones(())), "64-bit integers"),
        (put("module.memory.features", torch.ones(1200, 256).int()), "got torch.int32"),
        (
            put("module.memory.labels", torch.ones(1200)),
            "tensor of 64-bit integers, got torch.float",
        ),
        (put("module.memory.ptr", torch.tensor([1200])), r"pointer must be in \[0, 1200\), got 1"),
        (put("module.memory.ptr", "text"), "pointer must be an integer, got str"),
        (fill("module.memory.labels", 1000), r"labels must be in \[0, 1000\), got 0 to 1000; set"),
        (fill("module.memory.labels", -1), "got -1 to 999; "),
        (put("module.memory.labels", torch.zeros(1200).long()), "entries of only 1 of 1000 cl"),
        (put("module.memory.labels", torch.zeros(7).long()), "do not match the bank fea"),
        (put("module.memory.features", torch.randn(1200, 9)), "do not match D = 256"),
        (rename(CONV, "module.model.encodr.conv1.weight"), "encodr.* is not a key of"),
    ],
)
def test_refused_states(
    star: Contents, change: Callable[[Contents], None], message: str, tmp_path: Path
) -> None:
    contents = copied(star)
    change(contents["model"])
    with pytest.raises(CheckpointError, match=rf"weights\.pth: .*{message}"):
        read(saved(contents, tmp_path))


def test_banks_in_half_precision_and_of_other_classes_and_unknown_entries(star: Contents) -> None:
    contents = copied(star)
    half = contents["model"]["module.memory.features"].half()
    contents["model"]["module.memory.features"] = half
    found = split(contents).classifier_weights
    contents["model"]["module.memory.features"] = half.float()
    assert found is not None
    assert torch.equal(found, split(contents).state_dict()["fc.weight"])
    with pytest.raises(CheckpointError, match=r"unknown entries next to 'model': 1 \(surprise\)"):
        split({**star, "surprise": 1})
    fewer = official_files.full_checkpoint(1, num_classes=20, **SMALL)
    with pytest.raises(CheckpointError, match="only 20 of 1000 classes.*--num-classes"):
        split(fewer)
    checkpoint = split(fewer, num_classes=20)
    assert checkpoint.classifier_weights is not None
    assert checkpoint.classifier_weights.shape == (20, 256)


@pytest.mark.parametrize("name", ["resnet18", "resnet101", "resnet50", "convnext_atto"])
def test_other_networks(name: str, tmp_path: Path) -> None:
    state = timm.create_model(name).state_dict()
    message = r"do not match a resnet50 .missing keys: \d+.*unexpected: \d"
    if name == "resnet50":
        message = "this is a linear resnet50 classifier, not a t-ReX model"
    with pytest.raises(CheckpointError, match=message):
        read(saved(state, tmp_path))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


def test_damaged_files(
    backbone: Contents, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = saved(dict(backbone), tmp_path, "whole.pth")
    data = whole.read_bytes()

    def refused(contents: bytes | object, message: str) -> None:
        path = tmp_path / "bad.pth"
        if isinstance(contents, bytes):
            path.write_bytes(contents)
        else:
            torch.save(contents, path)
        with pytest.raises(CheckpointError, match=rf"bad\.pth.*{message}"):
            read(path)

    # Ends in the first record, the pickle, the data, and the zip directory at the end.
    for end in (0, 3, 64, 5000, len(data) // 2, -5000, -22, -1):
        refused(data[:end], "is damaged or truncated|neither a PyTorch nor")
    for at in (70, len(data) // 10, len(data) // 2, -len(data) // 100, -50):
        flipped = bytearray(data)
        flipped[at] ^= 1
        refused(bytes(flipped), "damaged or truncated")
    refused(b"\n <!DOCTYPE html><html>Not Found</html>", "a web page, not weights; download")
    refused(b"PNG....", r"neither a PyTorch nor a safetensors .*starts with b'PNG\.+'\); down")
    refused(b"PK\x03\x04 cut", r"damaged or truncated \(8 bytes\); download or copy it again")
    refused(
        {"model": backbone, "args": Evil()},
        "was not loaded: the pickle calls __builtin__.print; .*state_dict",
    )
    assert "executed" not in capfd.readouterr().out
    refused([1, 2], "must contain a state dict, got list")
    refused({"epoch": 3, "net": {}}, r"no tensors in entries: 2 \(epoch, net\); expected a s")
    refused({}, "no tensors in entries: 0")
    save_file({"a": torch.ones(9)}, tmp_path / "bad.safetensors")
    refused((tmp_path / "bad.safetensors").read_bytes()[:-5], "damaged or truncated")

    with pytest.raises(CheckpointError, match=r"none\.pth cannot be read \(No such file"):
        read(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        read(tmp_path)
    shutil.copy(whole, tmp_path / "folder.pth")
    assert read(tmp_path / "folder.pth").backbone.keys() == backbone.keys()
