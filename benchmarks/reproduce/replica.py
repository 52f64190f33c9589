"""Replicas of ImageNet and of all transfer datasets, for a dry run: their layouts, few images."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torchvision
from PIL import Image

from benchmarks.reproduce.plan import SCALES, SETS
from tests.replicas import REPLICAS
from trex_models.evaluation import logistic
from trex_models.transfer import readers
from trex_models.transfer.datasets import DATASETS, Sizes

TITLES = {name: DATASETS[name].title for name in ("imagenet", *SETS[15])}
_TRAIN, _VALIDATION, _SIDE = 24, 4, 48  # images per class; pixels


def create(data_root: Path) -> None:
    """Write the replicas unless they exist. Each class has a color; the images are noisy."""
    if data_root.exists():
        return
    new = data_root.with_name(f".{data_root.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    for number, name in enumerate(readers.imagenet_classes()[: SCALES["dry"].num_classes]):
        for index in range(_TRAIN):
            _save(new / "imagenet" / "train" / name / f"{name}_{index}.JPEG", name)
        for index in range(_VALIDATION):
            file = f"ILSVRC2012_val_{number * _VALIDATION + index + 1:08}.JPEG"
            _save(new / "imagenet" / "val" / name / file, name)
    for name in SETS[15]:
        for part in REPLICAS[name](new):
            for path, label in part.items():
                _save(new / path, label)
    new.replace(data_root)


def _save(path: Path, label: str) -> None:
    seed = int.from_bytes(hashlib.sha256(path.name.encode()).digest()[:8], "big")
    color = np.frombuffer(hashlib.sha256(label.encode()).digest()[:3], np.uint8)
    noise = np.random.default_rng(seed).normal(0, 60, (_SIDE, _SIDE, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((color + noise).clip(0, 255).astype(np.uint8)).save(path)


@contextmanager
def relaxed() -> Iterator[None]:
    """Accept the replicas' sizes and lists in the block, and end the fits of classifiers early."""
    small = {
        name: replace(DATASETS[name], sizes=Sizes(), title=f"{TITLES[name]} (meaningless)")
        for name in TITLES
    }
    short = partial(logistic.fit_path, max_iterations=30)  # Flowers has more classes than features
    flowers = torchvision.datasets.flowers102
    with (
        patch.dict(DATASETS, small),
        patch.object(readers, "EUROSAT_TEST_PER_CLASS", 2),
        patch.object(logistic, "fit_path", short),
        # torchvision checks the MD5 of the official lists of Flowers-102.
        patch.object(flowers, "check_integrity", lambda path, _: Path(path).exists()),
    ):
        yield
