"""Hours that a reproduction takes: by arithmetic for common GPUs, and from measured rates.

The arithmetic counts operations (two per multiply-add) and assumes which share of the GPU's peak is
reached; energy and prices are not estimated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.reproduce.plan import MODELS, SETS, Model, Scale
from trex_models.evaluation import linear
from trex_models.train.__main__ import parse
from trex_models.train.benchmark import format_number
from trex_models.train.config import Config
from trex_models.transfer.datasets import DATASETS, LARGE
from trex_models.transfer.protocol import SGD_GRID, VALIDATION_SHARE


class Gpu(NamedTuple):
    """Peak of a GPU in operations per second, dense, and its memory."""

    bf16: float
    fp32: float
    gigabytes: int


GPUS = {
    "A100": Gpu(312e12, 19.5e12, 40),
    "H100": Gpu(989e12, 67e12, 80),
    "RTX 4090": Gpu(165e12, 82.6e12, 24),
}
MACHINES = (("A100", 4), ("H100", 8), ("RTX 4090", 1))
SHARES = (0.1, 0.2, 0.3)
ASSUMPTIONS = (
    "Training reaches 10, 20 or 30 % of the GPU's dense bf16 peak (a ResNet is bound by memory "
    "traffic), and is as many times faster as there are GPUs. Loading keeps up: a core loads about "
    "340 images/s (docs/performance.md).",
    "A ResNet-50 takes 8.2 GFLOP for the forward pass of a crop of 224 pixels, others by their "
    "pixels, and three times as much with the backward pass. The heads take 0.7 GFLOP per image.",
    "The evaluation of a model runs on one GPU: features at 20 % of the bf16 peak or at 1,500 "
    "images/s, whichever is slower (decoding), and the linear layers of the large datasets at half "
    "of the fp32 peak. Logistic regression on the small ones is not counted.",
    "A GPU with less than 30 GB recomputes activations: 29 % more operations (docs/memory.md).",
)
_FORWARD, _HEADS, _FEATURES = 8.2e9, 0.7e9, 2048
_RECOMPUTED, RECOMPUTED_BELOW = 1.29, 30
_SIZES = {name: DATASETS[name].sizes for name in SETS[15]}  # a dry run changes DATASETS
_DECODED = 1500  # images per second
_COG_IMAGES, _VALIDATION_IMAGES = 1_100_000, 50  # per level; per class


def training_operations(config: Config) -> float:
    """Return the operations of training on one image with a ResNet-50."""
    crops = config.crops
    pixels = crops.global_crops * crops.global_size**2 + crops.local_crops * crops.local_size**2
    forward = _FORWARD * pixels / 224**2
    momentum = _FORWARD * bool(config.objective.resolved_bank_size)
    return 3 * forward + momentum + _HEADS


def nominal_sizes(scale: Scale) -> dict[str, tuple[int, int, int]]:
    """Return the published sizes of the training task and the transfer datasets."""
    task = scale.num_classes, scale.images, scale.num_classes * _VALIDATION_IMAGES
    return {scale.task: task} | {
        name: (size.classes or 0, size.train or _COG_IMAGES, size.test or 0)
        for name, size in _SIZES.items()
    }


def evaluation_operations(sizes: Iterable[Sequence[int]], seeds: int) -> tuple[int, float]:
    """Return the number of images, and the operations of the linear layers that SGD trains.

    ``sizes`` are the numbers of classes, training and test images of each dataset.
    """
    images, operations = 0, 0.0
    layers = len(SGD_GRID) * (1 - VALIDATION_SHARE) + 1
    for classes, train, test in sizes:
        images += train + test
        if train > LARGE:
            operations += 4 * _FEATURES * classes * train * linear.EPOCHS * layers * seeds
    return images, operations


def by_arithmetic(
    scale: Scale, models: Sequence[Model], sizes: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Return the hours of each model on each of ``MACHINES``, for each of ``SHARES``.

    Args:
        scale: Settings.
        models: Models; those without a recipe are only evaluated.
        sizes: Numbers of classes, training and test images of the datasets, by name.
    """
    images = sizes[scale.task][1]
    configs = {
        m.name: parse(m.recipe, scale.training(m, images, Path())[1:], needs_output=False)
        for m in models
        if m.recipe
    }
    counted = evaluation_operations(sizes.values(), scale.seeds)
    machines = {}
    for name, count in MACHINES:
        gpu, extra = GPUS[name], 1.0
        if gpu.gigabytes * count < RECOMPUTED_BELOW:
            extra = _RECOMPUTED
        hours = {}
        for model, config in configs.items():
            operations = config.optim.epochs * images * training_operations(config) * extra
            peak = gpu.bf16 * count * 3600
            hours[model] = [operations / (share * peak) for share in SHARES]
        rate = min(0.2 * gpu.bf16 / _FORWARD, _DECODED)
        evaluation = (counted[0] / rate + counted[1] / (gpu.fp32 / 2)) / 3600
        machines[f"{count} x {name}"] = {
            "training_hours": hours,
            "evaluation_hours_per_model": evaluation,
        }
    return {
        "assumptions": list(ASSUMPTIONS),
        "images": images,
        "epochs": {name: config.optim.epochs for name, config in configs.items()},
        "gflop_per_image": {
            name: round(training_operations(config) / 1e9, 1) for name, config in configs.items()
        },
        "evaluated_images": counted[0],
        "linear_layer_operations": counted[1],
        "shares_of_peak": list(SHARES),
        "machines": machines,
    }


def format_arithmetic(found: Mapping[str, Any]) -> str:
    """Return the hours as a Markdown table, with the assumptions."""
    machines = found["machines"]
    lines = [f"| hours on | {' | '.join(machines)} |", "|---" * (1 + len(machines)) + "|"]
    for name, gflop in found["gflop_per_image"].items():
        hours = (machine["training_hours"][name] for machine in machines.values())
        cells = [" / ".join(map(format_number, row)) for row in hours]
        title = f"{MODELS[name].title}: {found['epochs'][name]} epochs, {gflop:g} GFLOP per image"
        lines.append(f"| {title} | {' | '.join(cells)} |")
    cells = [format_number(m["evaluation_hours_per_model"]) for m in machines.values()]
    lines.append(f"| evaluation of one model | {' | '.join(cells)} |")
    shares = " / ".join(f"{share:.0%}" for share in found["shares_of_peak"])
    notes = [f"Hours at {shares} of the peak. {found['images']:,} training images;"]
    notes[0] += f" the evaluation reads {found['evaluated_images']:,} images."
    return "\n".join([*lines, "", *(f"- {note}" for note in (*notes, *found["assumptions"]))])


def parse_benchmark(output: str) -> dict[str, float]:
    """Return the rate in images/s and the hours of a run from the output of --benchmark."""
    rate = re.search(r"images at ([\d.,]+) images/s", output)
    hours = re.search(r"The complete run takes ([\d.,]+) hours", output)
    assert rate, output
    assert hours, output
    numbers = (float(text[1].replace(",", "")) for text in (rate, hours))
    return dict(zip(("images_per_second", "hours"), numbers, strict=True))


def gpus() -> list[dict[str, Any]]:
    """Describe the GPUs of this machine."""
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [{"name": g.name, "gigabytes": round(g.total_memory / 1e9)} for g in found]
