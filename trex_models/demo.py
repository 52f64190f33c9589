"""Train a small t-ReX, load it through timm, and see what its features are worth.

    python -m trex_models.demo [--output DIR]

Trains the recipe ``demo`` (a ResNet-10-T on fractals, full method, about five minutes on two
cores), reloads the export by ``timm.create_model`` and compares its features, by k-NN and
logistic regression, with those of the same network untrained and with plain pixels: on new
images of the training classes, on classes never seen, and on real images. Prints a table and
writes DIR/demo.json and DIR/demo.png. A run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from trex_models import cli
from trex_models.data.fractals import FractalSource
from trex_models.data.multicrop import MultiCropDataset, augment
from trex_models.data.samples import digits, photographs
from trex_models.data.sources import ArraySource, Source
from trex_models.evaluation.extract import extract_features
from trex_models.evaluation.frozen_model import PIXELS, FrozenModel
from trex_models.train.build import crop_specs, open_source
from trex_models.train.config import Config, demo
from trex_models.train.loop import train
from trex_models.train.signals import Stopped
from trex_models.transfer.offline import TEST_PER_CLASS, TRAIN_PER_CLASS
from trex_models.transfer.protocol import knn_score, logistic_scores

Accuracy = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], float]
STRENGTHS = (0.03, 0.3, 3.0)  # values of C; the transfer evaluation searches 30, five times


def logistic_score(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> float:
    """Return the top-1 of logistic regression with the best of few values of C."""
    (choice,) = logistic_scores(train, train_labels, test, test_labels, [0], STRENGTHS)
    return choice.top1


CLASSIFIERS: dict[str, Accuracy] = {"k-NN": knn_score, "logistic regression": logistic_score}


@dataclass(frozen=True)
class Task:
    """A data set to classify on frozen features."""

    name: str
    train: Source
    test: Source


def tasks(config: Config) -> list[Task]:
    """Return the data sets: fractals of the training classes and of others, and real images."""
    data = config.data

    # The first image that neither the network nor the classifiers are trained on.
    new = max(data.images_per_class, TRAIN_PER_CLASS)

    def fractals(first_class: int, first_image: int, count: int) -> FractalSource:
        return FractalSource(
            data.num_classes,
            count,
            data.image_size,
            first_class=first_class,
            first_image=first_image,
            variation=data.variation,
        )

    return [
        Task(
            "training classes, new images",
            fractals(0, 0, TRAIN_PER_CLASS),
            fractals(0, new, TEST_PER_CLASS),
        ),
        Task(
            "unseen fractal classes",
            fractals(data.num_classes, 0, TRAIN_PER_CLASS),
            fractals(data.num_classes, new, TEST_PER_CLASS),
        ),
        Task("digits", *digits(data.image_size)),
        Task("photograph patches", *photographs(data.image_size)),
    ]


def in_memory(source: Source) -> ArraySource:
    """Render a source's images once, for several encoders."""
    images = [source.read(index) for index in range(len(source))]
    return ArraySource(images, source.labels, source.classes)


def evaluate(encoders: dict[str, FrozenModel], task: Task) -> dict[str, Any]:
    """Return the accuracy of each classifier on each encoder's features of a task."""
    scores: dict[str, Any] = {"train_images": len(task.train), "test_images": len(task.test)}
    for name, encoder in encoders.items():
        features, test_features = (
            extract_features(encoder.model, source, encoder.transform)
            for source in (task.train, task.test)
        )
        scores[name] = {
            classifier: accuracy(features, task.train.labels, test_features, task.test.labels)
            for classifier, accuracy in CLASSIFIERS.items()
        }
    return scores


def table(results: dict[str, Any]) -> str:
    """Render the accuracies as text, in percent."""
    encoders = [name for name in next(iter(results.values())) if not name.endswith("_images")]
    lines = ["top-1 accuracy, %".ljust(30) + "".join(name.rjust(20) for name in encoders)]
    lines.append(" " * 30 + "k-NN   log.reg.".rjust(20) * len(encoders))
    for task, scores in results.items():
        cells = (
            f"{100 * scores[name]['k-NN']:.1f}{100 * scores[name]['logistic regression']:10.1f}"
            for name in encoders
        )
        lines.append(task.ljust(30) + "".join(cell.rjust(20) for cell in cells))
    return "\n".join(lines)


def crop_sheet(config: Config, source: Source, indices: Sequence[int]) -> list[list[np.ndarray]]:
    """Return rows of images, (S, S, 3) uint8: a training image, then its crops as they are seen."""
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


def draw(
    metrics: list[dict[str, float]],
    sheet: list[list[np.ndarray]],
    results: dict[str, Any],
    path: Path,
) -> None:
    """Draw the training curve, the crops and the accuracies into one picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    colors = {"pixels": "#b8bec6", "untrained": "#6f8fb3", "t-ReX*": "#d1495b"}
    figure = plt.figure(figsize=(14, 8.4), layout="constrained")
    rows: Any = figure.subfigures(2, 1, height_ratios=(1, 1.05))
    top, bottom = rows
    halves: Any = top.subfigures(1, 2, width_ratios=(1, 1.25))
    left, right = halves

    metrics = [line for line in metrics if "loss" in line]  # the others are of a validation alone
    axis = left.subplots()
    epochs = [line["epoch"] for line in metrics]
    axis.plot(epochs, [line["loss"] for line in metrics], color="#333333")
    axis.set(xlabel="epoch", ylabel="training loss, all crops", title="Training")
    other = axis.twinx()
    other.plot(epochs, [100 * line["accuracy"] for line in metrics], color=colors["t-ReX*"])
    other.set_ylabel("accuracy on the global crop, %", color=colors["t-ReX*"])
    other.set_ylim(0, 100)

    right.suptitle("Fractals, and their crops as the network sees them", fontsize="large")
    cells: Any = right.subplots(len(sheet), len(sheet[0]))
    for row, images in zip(cells, sheet, strict=True):
        for cell, image in zip(row, images, strict=True):
            cell.imshow(image, interpolation="nearest")
            cell.axis("off")
    titles = ["image", "global", *("local" for _ in sheet[0][2:])]
    for cell, title in zip(cells[0], titles, strict=True):
        cell.set_title(title, fontsize="small")

    panels: Any = bottom.subplots(1, len(CLASSIFIERS), sharey=True)
    for panel, classifier in zip(panels, CLASSIFIERS, strict=True):
        for offset, (name, color) in enumerate(colors.items()):
            positions = np.arange(len(results)) + 0.27 * (offset - 1)
            heights = [100 * scores[name][classifier] for scores in results.values()]
            bars = panel.bar(positions, heights, 0.25, color=color, label=name)
            panel.bar_label(bars, fmt="%.0f", fontsize="small", padding=1)
        names = [task.replace(", ", ",\n").replace(" ", "\n", 1) for task in results]
        panel.set_xticks(np.arange(len(results)), names)
        panel.set_title(f"Frozen features: {classifier}")
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_ylim(0, 119)
        panel.set_yticks(range(0, 101, 20))
    panels[0].set_ylabel("top-1 accuracy, %")
    panels[0].legend(frameon=False, ncols=3, loc="upper left", bbox_to_anchor=(0, 1.0))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(config: Config) -> dict[str, Any]:
    """Train, evaluate, and write demo.json and demo.png into the run's folder."""
    folder = Path(config.output)
    started = time.monotonic()
    train(config)
    seconds = {"training_this_time": time.monotonic() - started}

    benchmarks = [
        Task(task.name, in_memory(task.train), in_memory(task.test)) for task in tasks(config)
    ]
    backbone = str(folder / "export" / "backbone")
    twin = FrozenModel.load(backbone, untrained=True, seed=config.seed)
    encoders = {
        "pixels": FrozenModel.load(PIXELS),
        "untrained": twin.calibrated(benchmarks[0].train, benchmarks[0].name),
        "t-ReX*": FrozenModel.load(backbone),
    }
    started = time.monotonic()
    results = {}
    for task in benchmarks:
        print(f"evaluating on {task.name}: {len(task.test)} test images", flush=True)
        results[task.name] = evaluate(encoders, task)
    seconds["evaluation"] = time.monotonic() - started

    print(f"\n{table(results)}\n")
    report = {"results": results, "seconds": {k: round(v, 1) for k, v in seconds.items()}}
    (folder / "demo.json").write_text(json.dumps(report, indent=2) + "\n")
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    images_per_class = config.data.images_per_class
    sheet = crop_sheet(
        config, open_source(config.data), [images_per_class * label for label in range(4)]
    )
    draw(metrics, sheet, results, folder / "demo.png")
    print(f"wrote {folder / 'demo.json'} and {folder / 'demo.png'}")
    return report


def main(arguments: Sequence[str]) -> int:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(prog="python -m trex_models.demo", description=__doc__)
    parser.add_argument("--output", default="runs/demo", help="folder of the run")

    def work(arguments: Sequence[str]) -> None:
        run(demo(parser.parse_args(arguments).output))

    try:
        return cli.run(work, arguments, "transfer")
    except Stopped as stopped:
        print(stopped)
        return 128 + stopped.received


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
