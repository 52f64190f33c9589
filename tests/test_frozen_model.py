"""Frozen models: loading by name, preprocessing, and identity by weights."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.models import CHANNELS, edit_config, save_model
from trex_models.data.center_crop import PROTOCOLS
from trex_models.data.sources import ArraySource
from trex_models.evaluation import frozen_model
from trex_models.evaluation.extract import extract_features
from trex_models.evaluation.frozen_model import FrozenModel, weights_digest

load = FrozenModel.load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A timm folder of a model with a classifier and non-default normalization."""
    cfg = {
        "input_size": [3, 48, 48],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "crop_pct": 0.9,
        "interpolation": "bilinear",
        "license": "apache-2.0",
    }
    path = tmp_path_factory.mktemp("models") / "small"
    return save_model(path, "resnet10t", cfg, seed=3, num_classes=5, channels=CHANNELS)


def test_folders_load_without_classifier_and_with_their_normalization(folder: Path) -> None:
    encoder = load(str(folder))
    assert encoder.shape == (32,)
    assert encoder.metadata["architecture"] == "resnet10t"
    assert encoder.metadata["license"] == "apache-2.0"
    assert encoder.transform.size == (48, 48)
    assert encoder.transform.mean == (0.1, 0.2, 0.3)
    assert encoder.transform.std == (0.4, 0.5, 0.6)
    assert (encoder.transform.crop_pct, encoder.transform.interpolation) == (1.0, "bicubic")
    weights = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    for name, tensor in weights.state_dict().items():
        assert torch.equal(encoder.model.state_dict()[name], tensor), name
    assert not encoder.model.training


def test_preprocessing_is_chosen_by_name(folder: Path) -> None:
    validation = load(str(folder), preprocessing="validation").transform
    assert (validation.crop_pct, validation.interpolation) == (0.875, "bilinear")
    own = load(str(folder), preprocessing="model").transform
    assert (own.crop_pct, own.interpolation) == (0.9, "bilinear")
    for name in ("transfer", "validation"):
        transform = load("trex_resnet50", untrained=True, preprocessing=name).transform
        assert asdict(transform) == asdict(PROTOCOLS[name])


def test_runs_mean_their_backbones_and_files_keep_licenses(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "run" / "export" / "backbone").symlink_to(folder)
    encoder = load(str(tmp_path / "run"))
    assert encoder.metadata["source"] == str(tmp_path / "run" / "export" / "backbone")
    assert encoder.identity() == load(f"local-dir:{folder}").identity()
    model = timm.create_model("test_resnet")
    assert vars(model)["pretrained_cfg"]["license"]
    torch.save(model.state_dict(), tmp_path / "own.pth")
    facts = load("test_resnet", file=tmp_path / "own.pth").metadata
    assert (facts["license"], facts["tag"]) == ("not stated", "")


def test_weights_are_identified_by_content_and_random_ones_are_seeded(folder: Path) -> None:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    digest = weights_digest(model)
    assert weights_digest(model.to(memory_format=torch.channels_last)) == digest
    next(model.parameters()).data[0, 0, 0, 0] += 1e-6
    assert weights_digest(model) != digest
    one, two = (nn.ParameterDict({name: torch.zeros(2)}) for name in "ab")
    assert weights_digest(one) != weights_digest(two)
    half, whole = (nn.ParameterDict({"a": torch.zeros(2, dtype=d)}) for d in (torch.bfloat16, None))
    assert weights_digest(half) != weights_digest(whole)
    first, again, other = (
        load("resnet18", untrained=True, seed=seed).metadata["weights_sha256"] for seed in (0, 0, 1)
    )
    assert first == again != other
    model = load("resnet18", untrained=True).model
    assert dict(model.named_parameters())["layer1.0.bn2.weight"].abs().sum() > 0


def noise(count: int) -> ArraySource:
    pixels = np.random.default_rng(0).integers(0, 100, (count, 40, 40, 3), dtype=np.uint8)
    return ArraySource(pixels, np.zeros(count, int), ["a"])


def test_calibration_gives_batchnorm_the_statistics_of_images_all_over_the_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frozen_model, "_CALIBRATION_IMAGES", 32)
    encoder, source = load("test_resnet", untrained=True), noise(64)
    after = encoder.recalibrate_batchnorm(source, "dark noise")
    digest = after.metadata["weights_sha256"]
    assert encoder.metadata["weights_sha256"] != digest == weights_digest(after.model)
    assert after.metadata["batchnorm"] == "statistics of 32 training images of dark noise"
    assert not after.model.training
    even = ArraySource(source.images[::2], source.labels[::2], source.classes)
    stem = extract_features(after.model.get_submodule("conv1"), even, after.transform)
    channels = torch.from_numpy(stem).transpose(0, 1).flatten(1)
    mean = after.model.get_buffer("bn1.running_mean")
    torch.testing.assert_close(mean, channels.mean(1), rtol=1e-3, atol=1e-3)
    twin = load("test_resnet", untrained=True).recalibrate_batchnorm(source, "dark noise")
    assert twin.identity() == after.identity()


def test_pixels_are_an_encoder() -> None:
    encoder = load("pixels")
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    source = ArraySource([image, image], [0, 0], ["a"])
    features = extract_features(encoder.model, source, encoder.transform)
    assert features.shape == (2, *encoder.shape)
    expected = image.transpose(2, 0, 1).reshape(-1) / 255
    np.testing.assert_allclose(features[0], expected, rtol=1e-6)
    assert encoder.metadata["parameters"] == 0
    assert encoder.metadata["license"] == "none (no weights)"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5O", "is not a timm model; choose from .*resnet50"),
        ("resnet50.no_such_tag", "resnet50.no_such_tag cannot be loaded: .*no_such_tag"),
        ("no/such/folder", "is not a folder with a config.json"),
        ("resnet200", "resnet200 cannot be loaded: No pretrained .*; --untrained evaluates"),
    ],
)
def test_models_that_cannot_be_loaded_are_reported(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(name, hint="--untrained evaluates")


@pytest.mark.parametrize("damage", ["weights", "channels", "keys"])
def test_damaged_or_other_weights_are_refused(folder: Path, tmp_path: Path, damage: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    if damage == "weights":
        data = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif damage == "keys":  # normalization layers may be missing, as in timm's FCMAE weights
        state = load_file(copy / "model.safetensors")
        del state["conv1.0.weight"]
        save_file(state, copy / "model.safetensors", {"format": "pt"})
    else:
        edit_config(copy, lambda config: config.update(model_args={"channels": [8, 16, 24, 40]}))
    with pytest.raises(ValueError, match=f"{copy} cannot be loaded"):
        load(str(copy))


def test_a_file_of_other_weights_is_refused(tmp_path: Path) -> None:
    torch.save({"backbone": torch.ones(2)}, tmp_path / "other.pth")
    message = "resnet18 cannot be loaded from .*other.pth: .* do not match .* .missing keys: 20"
    with pytest.raises(ValueError, match=message):
        load("resnet18", file=tmp_path / "other.pth")
    assert nn.Module.load_state_dict.__module__ == "torch.nn.modules.module"


def test_wrong_choices_are_refused(tmp_path: Path) -> None:
    for device in ("tpu9", "meta"):
        with pytest.raises(ValueError, match=f"--device: '{device}' is not an available torch"):
            load("test_resnet", untrained=True, device=device)
    with pytest.raises(ValueError, match="precision tf32 requires CUDA, got cpu"):
        load("test_resnet", untrained=True, precision="tf32", device="cpu")
    device = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ValueError, match=f"--device: {device} is not avail"):
        load("test_resnet", untrained=True, device=device)
    (tmp_path / "w.pth").write_bytes(b"x")
    with pytest.raises(ValueError, match="--file requires the name of a timm architecture"):
        load("pixels", file=tmp_path / "w.pth")
