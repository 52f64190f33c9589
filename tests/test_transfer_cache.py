"""Cached features: complete files, resumed extraction, and no confusion between models."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from filelock import FileLock
from PIL import Image
from safetensors import safe_open
from torch import nn

from trex_models.data.center_crop import PROTOCOLS
from trex_models.data.image_files import FolderSource
from trex_models.data.sources import ArraySource
from trex_models.evaluation import frozen_model
from trex_models.evaluation.extract import extract_features
from trex_models.evaluation.frozen_model import FrozenModel, modules_digest, weights_digest
from trex_models.precision import Precision
from trex_models.transfer.cache import FeatureCache


def images(count: int = 23, seed: int = 0) -> ArraySource:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 40, 50, 3), dtype=np.uint8)
    return ArraySource(pixels, np.arange(count) % 2, ["a", "b"])


def encoder(seed: int = 0, **changes: Any) -> FrozenModel:
    return FrozenModel.load("test_resnet", untrained=True, seed=seed, **changes)


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(root=tmp_path / "features", batch_size=4)


class CutSource(ArraySource):
    """Images, one of which cannot be read until ``whole`` is set."""

    whole = False
    reads = 0

    def read(self, index: int) -> np.ndarray:
        self.reads += 1
        if index == 13 and not self.whole:
            raise ValueError("image 13 is torn")
        return super().read(index)


def cut_source() -> CutSource:
    source = images()
    return CutSource(source.images, source.labels, source.classes)


def test_features_are_those_of_the_model_and_extracted_once(cache: FeatureCache) -> None:
    model, source = encoder(), cut_source()
    source.whole = True
    features = cache.features(model, source, "set-train")
    expected = extract_features(model.model, images(), model.transform, batch_size=4)
    np.testing.assert_array_equal(features, expected)
    assert source.reads == 23
    assert isinstance(features, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        features[:] = 0
    again = cache.features(replace(encoder(), name="moved"), source, "set-train")
    np.testing.assert_array_equal(again, expected)
    assert source.reads == 23
    (path,) = cache.root.glob("*/*.safetensors")
    with safe_open(path, "np") as file:
        assert file.metadata()["weights_sha256"] == model.metadata["weights_sha256"]
        assert json.loads(file.metadata()["transform"])["crop_pct"] == 1.0
        np.testing.assert_array_equal(file.get_tensor("features"), features)
    assert path.name.startswith("set-train-")


@pytest.mark.parametrize("damage", ["none", "no mark", "mark", "header", "short"])
def test_interrupted_files_are_resumed_unless_damaged(cache: FeatureCache, damage: str) -> None:
    model, source = encoder(), cut_source()
    with pytest.raises(ValueError, match="torn"):
        cache.features(model, source, "set-train")
    assert not list(cache.root.glob("*/*.safetensors"))
    (part,), (mark,) = cache.root.glob("*/.*.part"), cache.root.glob("*/.*.rows")
    assert mark.read_text().startswith("8\n")
    if damage == "no mark":
        mark.unlink()
    elif damage == "mark":
        mark.write_text("1x")
    elif damage == "header":
        part.write_bytes(part.read_bytes().replace(b"num_images", b"num_imagez"))
    elif damage == "short":
        part.write_bytes(part.read_bytes()[:-10])
    source.whole, source.reads = True, 0
    features = cache.features(model, source, "set-train")
    # The third batch had not been written yet.
    assert source.reads == 23 - {"none": 8, "short": 7}.get(damage, 0)
    expected = extract_features(model.model, images(), model.transform, batch_size=4)
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)
    assert not [path for path in cache.root.glob("*/.*") if path.suffix != ".lock"]


def variants() -> Iterator[tuple[str, FrozenModel, ArraySource]]:
    yield "weights", encoder(seed=1), images()
    yield "preprocessing", encoder(preprocessing="validation"), images()
    yield "precision", encoder(precision="bf16"), images()
    yield "images", encoder(), images(seed=1)
    yield "device", replace(encoder(), precision=Precision.from_name("fp32", "cuda")), images()


@pytest.mark.parametrize("case", list(variants()), ids=lambda case: case[0])
def test_other_features_have_other_files(
    cache: FeatureCache, case: tuple[str, FrozenModel, ArraySource]
) -> None:
    _, other, source = case
    first = cache.features(encoder(), images(), "set-train")
    second = cache.features(other, source, "set-train")
    assert len(list(cache.root.glob("*/*.safetensors"))) == 2
    if other.precision.device_type == "cpu":
        assert first.shape != second.shape or not np.array_equal(first, second)


def test_settings_that_no_weight_shows_tell_models_apart(cache: FeatureCache) -> None:
    """The pooling of a ViT is an attribute: neither weights nor modules differ."""
    found = []
    for pool in ("token", "avg"):
        torch.manual_seed(0)
        model = timm.create_model(
            "test_vit", num_classes=0, img_size=32, global_pool=pool, fc_norm=False
        ).eval()
        crop = replace(PROTOCOLS["transfer"], size=(32, 32))
        facts = {**encoder().metadata, "weights_sha256": weights_digest(model)}
        pooled = FrozenModel(name=pool, model=model, transform=crop, shape=(64,), metadata=facts)
        found.append((pooled, cache.features(pooled, images(), "set-train")))
    (token, one), (mean, other) = found
    assert token.metadata == mean.metadata
    assert repr(token.model) == repr(mean.model)
    assert not np.array_equal(one, other)


def test_buffers_tell_models_apart_and_notes_of_their_input_do_not(cache: FeatureCache) -> None:
    class Noting(nn.Module):
        seen = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen = len(x)
            return x.mean((2, 3))

    model = replace(encoder(), model=Noting(), shape=(3,))
    before = model.identity()
    cache.features(model, images(), "set-train")
    assert model.identity() == before
    one, other = nn.Identity(), nn.Identity()
    for module, value in ((one, 0.0), (other, 1.0)):
        module.register_buffer("table", torch.full((2,), value), persistent=False)
    assert weights_digest(one) == weights_digest(other)
    assert modules_digest(one) != modules_digest(other)
    one.eval()
    assert modules_digest(one) == modules_digest(one.train())


def test_half_precision_and_another_version_have_files_of_their_own(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.features(encoder(), images(), "set-train")
    half = replace(cache, dtype="float16")
    rounded = half.features(encoder(), images(), "set-train")
    assert rounded.dtype == np.float16
    exact = cache.features(encoder(), images(), "set-train")
    assert exact.dtype == np.float32
    np.testing.assert_array_equal(rounded, exact.astype(np.float16))
    monkeypatch.setattr(frozen_model, "version", lambda package: f"{package} 99")
    cache.features(encoder(), images(), "set-train")
    assert len(list(cache.root.glob("*/*.safetensors"))) == 3


def folder_source(root: Path, side: int, written: int) -> FolderSource:
    """Return two uncompressed noise images, whose file size is independent of the pixels."""
    for seed, name in enumerate("ab"):
        (root / name).mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng((seed, written))
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name / "image.bmp")
        os.utime(root / name / "image.bmp", (written, written))
    return FolderSource(root)


@pytest.mark.parametrize("change", [(30, 10**9), (20, 10**9 + 1)], ids=["size", "time"])
def test_the_same_names_with_other_files_are_other_images(
    cache: FeatureCache, tmp_path: Path, change: tuple[int, int]
) -> None:
    source = folder_source(tmp_path / "data", 20, 10**9)
    listed = source.digest()
    first = cache.features(encoder(), source, "set-train")
    source = folder_source(tmp_path / "data", *change)
    assert source.digest() == listed
    second = cache.features(encoder(), source, "set-train")
    assert not np.array_equal(first, second)
    shutil.move(tmp_path / "data", tmp_path / "moved")
    moved = cache.features(encoder(), FolderSource(tmp_path / "moved"), "set-train")
    np.testing.assert_array_equal(moved, second)
    assert len(list(cache.root.glob("*/*.safetensors"))) == 2


def test_features_of_other_weights_under_this_name_are_refused(cache: FeatureCache) -> None:
    cache.features(encoder(), images(), "set-train")
    (path,) = cache.root.glob("*/*.safetensors")
    cache.features(encoder(seed=1), images(), "set-train")
    (other,) = set(cache.root.glob("*/*.safetensors")) - {path}
    shutil.copy(other, path)
    with pytest.raises(ValueError, match=r"differs from .* in weights_sha256.* delete"):
        cache.features(encoder(), images(), "set-train")


def test_non_finite_features_are_reported(cache: FeatureCache) -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bad = torch.arange(len(x))[:, None] == 2
            return torch.where(bad, torch.nan, x.mean((2, 3)))

    class Large(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1e6 + x.mean((2, 3))

    broken, large = (replace(encoder(), model=model(), shape=(3,)) for model in (Broken, Large))
    with pytest.raises(
        ValueError, match=r"features of a image 2 are not finite \(fp32.*--precision fp32"
    ):
        cache.features(broken, images(), "set-train")
    with pytest.raises(ValueError, match="stored as float16.*--dtype float32"):
        replace(cache, dtype="float16").features(large, images(), "set-train")
    assert not list(cache.root.glob("*/*.safetensors"))
    assert np.isfinite(cache.features(large, images(), "set-train")).all()


def test_full_disks_are_reported_first(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    source = cut_source()
    with pytest.raises(ValueError, match=r"1\.0 MB of free space, but 67\.1 MB are required"):
        cache.features(encoder(), source, "set-train")
    assert source.reads == 0


def test_extraction_waits_for_another_process(
    cache: FeatureCache, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = cache.features(encoder(), images(), "set-train")
    (path,) = cache.root.glob("*/*.safetensors")
    aside = path.rename(path.with_suffix(".aside"))
    source = cut_source()
    lock = FileLock(path.with_name(f".{path.name}.lock"), thread_local=False)
    with ThreadPoolExecutor(1) as pool:
        with lock:
            features = pool.submit(cache.features, encoder(), source, "set-train")
            while "waiting for another process" not in capsys.readouterr().out:
                assert not features.done()
                time.sleep(0.01)
            aside.rename(path)
        np.testing.assert_array_equal(features.result(), expected)
    assert source.reads == 0
