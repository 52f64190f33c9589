"""`python -m trex_models.features`: writing, resuming and reading feature files."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import trex_models.features
from tests.images import save_image
from tests.models import CHANNELS, Args, save_model
from trex_models.data.center_crop import PROTOCOLS
from trex_models.data.decode import UnreadableImageError
from trex_models.data.image_files import FileSource
from trex_models.evaluation import feature_file
from trex_models.evaluation.extract import extract_features
from trex_models.evaluation.feature_file import Features, header_and_tail
from trex_models.evaluation.frozen_model import weights_digest
from trex_models.features.__main__ import main

CFG: Args = {"input_size": [3, 64, 64], "license": "cc-by-nc-sa-4.0"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two backbones, and a model with projector and classifier."""
    root = tmp_path_factory.mktemp("models")
    head = {"proj_layers": 1, "proj_hidden_dim": 16, "proj_dim": 12}
    backbone: Args = {"name": "resnet10t", "num_classes": 0}
    whole: Args = {"name": "trex_resnet", "backbone": "resnet10t", "num_classes": 5, **head}
    for folder, model in {"backbone": backbone, "whole": whole}.items():
        save_model(root / folder, cfg=CFG, channels=CHANNELS, **model)
    save_model(root / "other", cfg=CFG, seed=1, channels=CHANNELS, **backbone)
    save_model(root / "vit", "test_vit", {}, num_classes=0)
    return root


def run(models: Path, *arguments: str, model: str = "backbone") -> int:
    fixed = ["--model", str(models / model), "--workers", "0", "--batch-size", "4"]
    return main(["extract", *arguments, *fixed])


CROP = PROTOCOLS["transfer"].__class__(size=(64, 64), crop_pct=1.0, interpolation="bicubic")


def assert_right(found: Features, place: Path, models: Path) -> None:
    """Compare with features of the same images from ``extract_features``."""
    model = timm.create_model(f"local-dir:{models / 'backbone'}", pretrained=True)
    source = FileSource(place / "images", found.names, [0] * len(found.names), ["x"])
    expected = extract_features(model.to(memory_format=torch.channels_last), source, CROP)
    np.testing.assert_allclose(found.features, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    read = FileSource.read

    def noting(self: FileSource, index: int) -> np.ndarray:
        found.append(Path(self.name(index)).name)
        return read(self, index)

    monkeypatch.setattr(FileSource, "read", noting)
    return found


@pytest.mark.parametrize("out", ["out/f.safetensors", "f.npy"])
def test_feature_files_contain_features_names_and_metadata(
    place: Path, models: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(models, "images", "--output", out) == 0
    output = capsys.readouterr().out
    assert "11 images x 32 float32" in output
    assert "license of the weights: cc-by-nc-sa-4.0" in output
    found = trex_models.features.load(out)
    assert found.names == sorted(found.names)
    assert found.names[:2] == ["a/0.png", "a/10.png"]
    assert isinstance(found.features, np.memmap)
    assert_right(found, place, models)
    about = found.metadata
    assert len(about["weights_sha256"]) == 64
    assert (about["architecture"], about["output"]) == ("resnet10t", "backbone")
    assert (about["license"], about["skipped"]) == ("cc-by-nc-sa-4.0", "0")
    assert json.loads(about["transform"])["size"] == [64, 64]
    assert about["root"] == str(place / "images")
    assert not [path for path in Path(out).parent.glob(".*") if path.suffix != ".lock"]


@pytest.mark.usefixtures("place")
def test_other_tools_read_the_files(models: Path) -> None:
    for out in ("f.safetensors", "f.npy"):
        assert run(models, "images", "--output", out, "--dtype", "float16") == 0
    with safe_open("f.safetensors", "np") as file:
        features, metadata = file.get_tensor("features"), file.metadata()
        names = json.loads(file.get_tensor("names").tobytes())
    array = np.load("f.npy", mmap_mode="r")
    beside = json.loads(Path("f.npy.json").read_text())
    assert array.dtype == features.dtype == np.float16
    np.testing.assert_array_equal(array, features)
    assert beside == {"metadata": metadata, "names": names}


@pytest.mark.usefixtures("place")
def test_a_finished_file_is_kept_and_another_not_replaced_unasked(
    models: Path, capsys: pytest.CaptureFixture[str], reads: list[str]
) -> None:
    assert run(models, "images", "--output", "f.npy") == 0
    before = Path("f.npy").read_bytes()
    assert len(reads) == 11
    assert run(models, "images", "--output", "f.npy") == 0
    assert "f.npy already contains these features" in capsys.readouterr().out
    assert len(reads) == 11
    for arguments, model, other in (
        ("images", "other", "weights_sha256"),
        ("images/a", "backbone", "images_sha256"),
        ("images --precision bf16", "backbone", "precision"),
        ("images --dtype float16", "backbone", "dtype"),
    ):
        assert run(models, *arguments.split(), "--output", "f.npy", model=model) == 2
        errors = capsys.readouterr().err
        assert re.search(rf"differs from the .* features in .*{other}.*--overwrite", errors)
    assert Path("f.npy").read_bytes() == before
    assert run(models, "images", "--output", "bf16.npy", "--precision", "bf16") == 0
    assert not np.array_equal(np.load("bf16.npy"), np.load("f.npy"))
    assert run(models, "images", "--output", "f.npy", "--overwrite", model="other") == 0
    assert Path("f.npy").read_bytes() != before


def test_changed_images_with_the_same_names_are_extracted_again(
    place: Path, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(models, "images", "--output", "f.npy") == 0
    before = np.load("f.npy")
    with monkeypatch.context() as patch:
        interrupted_at(patch, "9.png")
        assert run(models, "images", "--output", "cut.npy") == 130
    assert "interrupted; run the same command again" in capsys.readouterr().err
    save_image(place / "images" / "a" / "0.png", 99)
    os.utime(place / "images" / "a" / "0.png", (10**9, 10**9))
    assert run(models, "images", "--output", "f.npy") == 2
    assert "differs from the requested features in images_sha256" in capsys.readouterr().err
    assert run(models, "images", "--output", "cut.npy") == 0
    assert "continuing" not in capsys.readouterr().out
    changed = (np.load("cut.npy") != before).any(1)
    assert changed.tolist() == [True] + 10 * [False]


@pytest.mark.usefixtures("place")
def test_other_files_are_not_replaced_unasked(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = b'{"metadata": {"mine": "precious"}}'
    for out, contents in (
        ("f.safetensors", {"f.safetensors": note}),
        ("f.npy", {"f.npy.json": note}),
        ("g.npy", {"g.npy": b"an array", "g.npy.json": note}),
    ):
        for name, data in contents.items():
            Path(name).write_bytes(data)
        assert run(models, "images", "--output", out) == 2
        assert f"{min(contents)} exists, but is not a feature file" in capsys.readouterr().err
        assert {name: Path(name).read_bytes() for name in contents} == contents
        assert run(models, "images", "--output", out, "--overwrite") == 0
        assert len(trex_models.features.load(out).names) == 11


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("out", ["f.npy", "f.safetensors", "empty.npy", "shorter.npy"])
def test_damaged_files_do_not_count_as_finished(
    models: Path, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    assert run(models, "images", "--output", out) == 0
    data = Path(out).read_bytes()
    Path(out).write_bytes(b"" if out.startswith("empty") else data[:-1])
    if out.startswith("shorter"):
        np.save(out, np.zeros((10, 32), np.float32))
    assert run(models, "images", "--output", out) == 2
    error = capsys.readouterr().err
    assert "is damaged: it is truncated, or its names do not match its features" in error
    assert "--overwrite" in error
    assert run(models, "images", "--output", out, "--overwrite") == 0
    assert Path(out).read_bytes() == data


def test_a_killed_command_continues(
    place: Path,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reads: list[str],
) -> None:
    (place / "images" / "a" / "0.png").write_bytes(b"torn")
    given = ["images", "--output", "out/f.npy", "--unreadable", "skip"]
    read = FileSource.read

    def killed(self: FileSource, index: int) -> np.ndarray:
        if index == 9:
            shutil.copytree("out", "left")  # files on disk if the process were killed now
            raise KeyboardInterrupt
        return read(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(feature_file, "_MARK_SECONDS", 0.0)
        patch.setattr(FileSource, "read", killed)
        assert run(models, *given) == 130
    shutil.rmtree("out")
    Path("left").rename("out")
    assert not Path("out/f.npy").exists()
    reads.clear()
    assert run(models, *given) == 0
    assert "continuing from image 4 of 11" in capsys.readouterr().out
    assert reads == ["6.png", "8.png", "1.png", "3.png", "5.png", "7.png", "9.png"]
    found = trex_models.features.load("out/f.npy")
    assert len(found.names) == 10
    assert "a/0.png" not in found.names
    assert_right(found, place, models)
    assert found.metadata["skipped"] == "1"


def interrupted_at(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    read = FileSource.read

    def cut(self: FileSource, index: int) -> np.ndarray:
        if self.name(index).endswith(name):
            raise KeyboardInterrupt
        return read(self, index)

    monkeypatch.setattr(FileSource, "read", cut)


def test_an_image_that_was_skipped_is_looked_at_again_when_it_must_be_read(
    place: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = FileSource.read

    def unreadable(self: FileSource, index: int) -> np.ndarray:
        if index == 2:
            raise UnreadableImageError(f"{self.name(index)} cannot be read")
        if index == 9:
            raise KeyboardInterrupt
        return read(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(FileSource, "read", unreadable)
        assert run(models, "images", "--output", "f.npy", "--unreadable", "skip") == 130
    assert run(models, "images", "--output", "f.npy") == 0
    found = trex_models.features.load("f.npy")
    assert len(found.names) == 11
    assert_right(found, place, models)


def test_unreadable_images_raise_or_are_skipped_and_listed(
    place: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = "f.safetensors"
    torn = [place / "images" / "a" / "2.png", place / "images" / "b" / "9.png"]
    torn[0].write_bytes(b"torn")
    assert run(models, "images", "--output", out) == 2
    error = capsys.readouterr().err
    assert f"error: {torn[0]} cannot be read as an image" in error
    assert "or skip unreadable images with --unreadable skip" in error
    torn[1].write_bytes(b"")  # detected without reading
    assert run(models, "images", "--output", out) == 2
    errors = capsys.readouterr().err
    assert "1 of 11 image files are missing or empty" in errors
    assert "skip unreadable images with --unreadable skip" in errors
    assert run(models, "images", "--output", out, "--unreadable", "skip") == 0
    assert "skipped 2 of 11 images" in capsys.readouterr().out
    listed = Path(f"{out}.skipped.txt").read_text().splitlines()
    assert [line.split()[0] for line in listed] == [str(path) for path in torn]
    found = trex_models.features.load(out)
    assert len(found.names) == len(found.features) == 9
    assert not {"a/2.png", "b/9.png"} & set(found.names)
    assert_right(found, place, models)
    with safe_open(out, "np") as file:
        assert file.get_tensor("features").shape == (9, 32)
    (place / "one").mkdir()
    (place / "one" / "x.png").write_bytes(b"torn")
    assert run(models, "one", "--output", "none.npy", "--unreadable", "skip") == 2
    assert "all 1 images are unreadable" in capsys.readouterr().err
    assert not Path("none.npy").exists()


@pytest.mark.parametrize(
    ("output", "shape"),
    [("backbone", (32,)), ("projector", (12,)), ("dense", (32, 2, 2)), ("logits", (5,))],
)
def test_outputs_of_a_model(place: Path, models: Path, output: str, shape: tuple[int, ...]) -> None:
    assert run(models, "images", "--output", "f.npy", "--features", output, model="whole") == 0
    found = trex_models.features.load("f.npy")
    assert found.features.shape == (11, *shape)
    model: Any = timm.create_model(f"local-dir:{models / 'whole'}", pretrained=True).eval()
    pixels = CROP.empty(1)
    source = FileSource(place / "images", found.names, [0] * 11, ["x"])
    CROP.crop_into(source.read(3), pixels[0])
    with torch.inference_mode():
        maps = model.forward_features(CROP.normalize(pixels))
        outputs = {
            "dense": maps,
            "backbone": maps.mean((2, 3)),
            "projector": model.forward_head(maps, pre_logits=True),
            "logits": model.forward_head(maps),
        }
    np.testing.assert_allclose(found.features[3], outputs[output][0], rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--features", "projector"], "has no projector (trex_resnet50_proj"),
        (["--features", "logits"], "has no classifier"),
        (["--output", "f.txt"], r"must be a .safetensors or .npy file, got f.txt"),
        (["--output", "images/a/0.png/f.npy"], "cannot be written"),
        (["--file", "missing.pth"], "missing.pth is not a file"),
        (["--file", "images/a/0.png"], "--file requires the name of a timm architecture"),
        (["--output", "new/f.npy", "--features", "logits"], "has no classifier"),
        (["nothing"], "nothing: there is no such file or folder"),
    ],
)
def test_impossible_requests_are_reported_in_one_line(
    models: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = [] if "--output" in arguments else ["--output", "f.npy"]
    assert run(models, "images", *arguments, *out) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert message in errors
    assert not Path("new").exists()


@pytest.mark.usefixtures("place")
def test_own_weights_are_loaded(tmp_path: Path) -> None:
    torch.manual_seed(7)
    model = timm.create_model("test_resnet", num_classes=0)
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    given = ["--file", "own.safetensors", "--model", "test_resnet", "--workers", "0"]
    assert main(["extract", "images", "--output", "f.npy", *given]) == 0
    about = trex_models.features.load("f.npy").metadata
    assert about["weights_sha256"] == weights_digest(model)
    assert about["file"] == str(tmp_path / "own.safetensors")


@pytest.mark.usefixtures("place")
def test_missing_packages_and_feature_maps_are_reported(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = ["images", "--output", "f.npy", "--features", "dense"]
    assert run(models, *dense, model="vit") == 2
    assert "expected (C, H, W)" in capsys.readouterr().err
    missing = ModuleNotFoundError("no simplejpeg", name="simplejpeg")
    monkeypatch.setattr("trex_models.features.images.find_images", Mock(side_effect=missing))
    assert run(models, *dense) == 2
    assert "simplejpeg: pip install '.[features]' in a clone" in capsys.readouterr().err


@pytest.mark.usefixtures("place")
def test_models_without_weights_are_reported_with_a_remedy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("f.pth").write_bytes(b"nothing")
    for own in ([], ["--file", "f.pth"]):
        assert main(["extract", "images", "--model", "resnet200", "--output", "f.npy", *own]) == 2
        error = capsys.readouterr().err
        assert "resnet200 cannot be loaded" in error
        assert "--untrained" not in error
        assert ("--file loads your own weights" in error) == (not own)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow UTF-8 names alone")
def test_images_with_non_utf8_names_are_skipped_and_reported(
    models: Path, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode(b"gr\xfcn.png")
    (place / "images" / name).write_bytes(b"torn")
    assert run(models, "images", "--output", "f.npy", "--unreadable", "skip") == 0
    assert r"gr\udcfcn.png' cannot be read" in capfd.readouterr().out


def test_many_names_do_not_fill_the_header(tmp_path: Path) -> None:
    """A million names can be read, although safetensors limits headers to 100 MB."""
    names = [f"class_{row % 1000:04d}/image_{row:07d}.jpg" for row in range(100_000)]
    path = tmp_path / "f.safetensors"
    rows = np.zeros((len(names), 1), np.float16)
    header, tail = header_and_tail(path, rows.shape, rows.dtype, {"model": "x"}, names)
    assert len(header) < 1000
    path.write_bytes(header + rows.tobytes() + tail)
    found = trex_models.features.load(path)
    assert found.names == names
    with safe_open(path, "np") as file:
        assert json.loads(file.get_tensor("names").tobytes()) == names


@pytest.mark.usefixtures("place")
def test_damaged_feature_files_are_reported(models: Path) -> None:
    path, array = Path("f.safetensors"), Path("f.npy")
    for out in (path, array):
        assert run(models, "images", "--output", str(out)) == 0
    beside = json.loads(Path("f.npy.json").read_text())
    Path("f.npy.json").write_text(json.dumps({**beside, "names": beside["names"][1:]}))
    Path("f.bin").write_bytes(path.read_bytes())
    Path("short.safetensors").write_bytes(path.read_bytes()[:-1])
    path.write_bytes(b"\xff" * 64)
    for name in (path, array, "f.bin", "short.safetensors", "missing.safetensors"):
        with pytest.raises(ValueError, match=f"{name}.*(feature|wrote)"):
            trex_models.features.load(name)
