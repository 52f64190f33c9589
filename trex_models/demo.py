"""Train, reload and evaluate a small t-ReX model: ``python -m trex_models.demo``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from trex_models import cli, plot, plotting
from trex_models.atomic import write_text_file
from trex_models.data.multicrop import MultiCropDataset, augment
from trex_models.data.sources import Source
from trex_models.evaluation.frozen_model import PIXELS, FrozenModel
from trex_models.train.build import crop_specs, open_source
from trex_models.train.config import Config
from trex_models.train.loop import train
from trex_models.train.recipes import RECIPES
from trex_models.transfer import pictures
from trex_models.transfer.cache import FeatureCache
from trex_models.transfer.datasets import open_checked, select
from trex_models.transfer.evaluate import evaluate
from trex_models.transfer.report import format_table
from trex_models.transfer.task import Plan
from trex_models.transfer.tasks import TASKS, Job


def run(config: Config) -> list[dict[str, Any]]:
    """Train, evaluate, write demo.json and demo.png into the run folder; return the reports."""
    folder = Path(config.output)
    train(config)
    reports = evaluate_offline(folder, config.seed)
    print(f"\n{format_table(reports)}\n")
    write_text_file(folder / "demo.json", json.dumps({"reports": reports}, indent=2) + "\n")
    starts = [config.data.images_per_class * label for label in range(4)]  # one image per class
    sheet = crop_sheet(config, open_source(config.data), starts)
    plotting.save(draw_demo(plot.read_run(folder), sheet, reports), folder / "demo.png")
    print(f"wrote {folder / 'demo.json'} and {folder / 'demo.png'}")
    return reports


def evaluate_offline(folder: Path, seed: int) -> list[dict[str, Any]]:
    """Evaluate pixels and the untrained and trained backbone on the offline datasets.

    Writes one report per model to FOLDER/transfer; finished parts are not computed again.
    """
    output = folder / "transfer"
    output.mkdir(exist_ok=True)
    opened = [open_checked(dataset, Path()) for dataset in select("offline")]
    backbone = str(folder / "export" / "backbone")
    untrained = FrozenModel.load(backbone, untrained=True, seed=seed)
    name = opened[0].dataset.name
    models = {
        "pixels": FrozenModel.load(PIXELS),
        "untrained": untrained.recalibrate_batchnorm(opened[0].sources[0], name),
        "t-ReX*": FrozenModel.load(backbone),
    }
    # A single validation split; the five of the protocol would take minutes longer.
    plan = Plan(seeds=1, training_task=name)
    features = FeatureCache(root=output / "features")
    jobs = [Job(TASKS["classification"], dataset) for dataset in opened]
    return [
        evaluate({None: model}, jobs, features, plan, output / f"{label.strip('*')}.json", label)
        for label, model in models.items()
    ]


def crop_sheet(config: Config, source: Source, indices: Sequence[int]) -> list[list[np.ndarray]]:
    """Return rows of images, (S, S, 3) uint8: a training image and its augmented crops."""
    dataset = MultiCropDataset(source, crop_specs(config.crops), config.seed)
    batch = dataset.__getitems__([(0, index) for index in indices])
    rows = [[source.read(index)] for index in indices]
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
    )
    for images in augment(batch, torch.device("cpu")):
        levels = ((images * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
        for position, crop in enumerate(levels.numpy()):  # crop-major
            rows[position % len(rows)].append(crop)
    return rows


def draw_demo(
    trained: plot.RunMetrics, sheet: list[list[np.ndarray]], reports: list[dict[str, Any]]
) -> Any:
    """Draw the training curves, the crops and the accuracies."""
    with plotting.new_figure(14, 8.4) as figure:
        top, bottom = figure.subfigures(2, 1)
        curves, crops = top.subfigures(1, 2, width_ratios=(1.5, 1))
        for axis, panel in zip(curves.subplots(1, 2), plot.LARGE, strict=False):
            plot.draw_panel(axis, panel, [trained])
        crops.suptitle("fractals and their augmented crops", fontsize=11)
        titles = ["image", "global", *("local" for _ in sheet[0][2:])]
        cells = crops.subplots(len(sheet), len(titles))
        for cell, image in zip(cells.flat, (i for row in sheet for i in row), strict=True):
            cell.imshow(image, interpolation="nearest")
            cell.axis("off")
        for cell, title in zip(cells[0], titles, strict=True):
            cell.set_title(title, fontsize=8, loc="center")
        pictures.draw_bars(bottom, reports)
    return figure


def demo(*, output: Path = Path("runs/demo")) -> None:
    """Train a small t-ReX model, load it with timm, and evaluate its features.

    Trains the recipe demo (a ResNet-10-T on fractals, about five minutes on two cores) and compares
    its features with those of the untrained backbone and with raw pixels, on generated and on real
    images. If interrupted, run the same command again to continue.

    Example: python -m trex_models.demo --output runs/demo

    Args:
        output: Folder for the run, demo.json and demo.png.
    """
    run(RECIPES["demo"](str(output)))


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status; see `cli.main`."""
    return cli.main(demo, arguments, prog="python -m trex_models.demo", extra="transfer")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
