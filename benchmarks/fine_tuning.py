"""Compare fine-tuning from t-ReX weights with training from scratch.

    python -m trex_models.demo --output runs/demo      # or any run on small images
    python -m benchmarks.fine_tuning --run runs/demo --output DIR

The images are real and were not used in the run: handwritten digits and patches of 20 photographs
(``trex_models.data.samples``), gray, 32 x 32. Tasks use all training images, or a tenth or a fifth
of them. Both variants share network, images, batches, schedule (AdamW, cosine) and seeds. Their
learning rates are selected from the same list on held-out training images, never on test images,
before training on all training images. Writes fine_tuning.json and fine_tuning.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from benchmarks import measure
from trex_models import plotting
from trex_models.atomic import write_text_file
from trex_models.cli import run
from trex_models.data.samples import digits, photographs
from trex_models.data.sources import Source
from trex_models.transfer.intervals import student_interval

STARTS = {"pretrained": "t-ReX weights", "scratch": "from scratch"}
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
_SIZE = 32  # pixels, as in the demo
_TASKS = ("digits:110", "digits:11", "photographs:60", "photographs:12")
_MOST = {"digits": 110, "photographs": 60}  # available training images per class
_BATCH = 32
_WEIGHT_DECAY = 0.05
_SEARCH_SEEDS = (1000, 1001)  # different from those of the reported runs


@dataclass(frozen=True)
class Images:
    """Preprocessed images in memory: N square images of S x S pixels."""

    pixels: Tensor
    """(N, 3, S, S) float32, normalized."""
    labels: Tensor
    """(N,) int64."""

    @classmethod
    def of(cls, source: Source, cfg: Mapping[str, Any]) -> Images:
        """Read a source and normalize its images with a model's ``pretrained_cfg``."""
        images = np.stack([source.read(index) for index in range(len(source))])
        mean, std = (torch.tensor(cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        return cls((pixels - mean) / std, torch.from_numpy(source.labels))

    def of_each_class(self, start: int, stop: int) -> Images:
        """Return images ``start`` to ``stop - 1`` of each class."""
        chosen = torch.cat(
            [(self.labels == label).nonzero()[start:stop, 0] for label in self.labels.unique()]
        )
        return Images(self.pixels[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Task:
    """A classification task."""

    name: str
    per_class: int
    """Number of training images per class."""
    train: Images
    test: Images
    fitted: Images
    """Training images for the selection of the learning rate."""
    held_out: Images
    """Remaining training images, on which the learning rate is selected."""


def task(name: str, per_class: int, cfg: Mapping[str, Any]) -> Task:
    """Load the images of a task."""
    if name == "digits":
        train, test = (Images.of(source, cfg) for source in digits(_SIZE))
        subset, cut = train.of_each_class(0, per_class), round(per_class * 2 / 3)
        fitted, held_out = subset.of_each_class(0, cut), subset.of_each_class(cut, per_class)
        return Task(name, per_class, subset, test, fitted, held_out)
    # Patches of one tile overlap, so complete tiles are held out, as in the test set.
    fitted, held_out, train, test = (
        Images.of(source, cfg)
        for validation in (True, False)
        for source in photographs(_SIZE, per_class, validation=validation)
    )
    return Task(name, per_class, train, test, fitted, held_out)


def build(backbone: Path, start: str, num_classes: int, seed: int) -> nn.Module:
    """Build a run's network with a new classifier, with pretrained or with random weights."""
    if not (backbone / "config.json").is_file():
        raise ValueError(
            f"{backbone} is not an exported backbone; pass a finished run, such as that of "
            "python -m trex_models.demo --output runs/demo"
        )
    torch.manual_seed(seed)
    return timm.create_model(
        f"local-dir:{backbone}", pretrained=start == "pretrained", num_classes=num_classes
    )


def learn(
    model: nn.Module, train: Images, test: Images, rate: float, steps: int, every: int, seed: int
) -> list[float]:
    """Fine-tune all layers in place; return the test accuracies every ``every`` steps."""
    optimizer = create_optimizer_v2(model, "adamw", lr=rate, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    accuracies = [top1(model, test)]
    for step in range(1, steps + 1):
        chosen = torch.randint(len(train.labels), (_BATCH,), generator=generator)
        mirrored = torch.rand(_BATCH, 1, 1, 1, generator=generator) < 0.5
        pixels = train.pixels[chosen]
        logits = model.train()(torch.where(mirrored, pixels.flip(-1), pixels))
        F.cross_entropy(logits, train.labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % every == 0 or step == steps:
            accuracies.append(top1(model, test))
    return accuracies


@torch.inference_mode()
def top1(model: nn.Module, images: Images) -> float:
    """Return the top-1 accuracy of a model, in [0, 1]."""
    model.eval()
    predictions = [model(batch).argmax(1) for batch in images.pixels.split(256)]
    return (torch.cat(predictions) == images.labels).double().mean().item()


def compare(
    backbone: Path,
    task: Task,
    *,
    steps: int,
    every: int,
    seeds: int,
    rates: Sequence[float] = RATES,
) -> dict[str, Any]:
    """Select a learning rate for each variant, then train it with every seed."""
    num_classes = len(task.train.labels.unique())
    result: dict[str, Any] = {"task": task.name, "per_class": task.per_class}
    for start in STARTS:
        new = partial(build, backbone, start, num_classes)
        validation = {
            rate: statistics.fmean(
                learn(new(seed), task.fitted, task.held_out, rate, steps, steps, seed)[-1]
                for seed in _SEARCH_SEEDS
            )
            for rate in rates
        }
        rate = max(validation, key=lambda rate: validation[rate])
        curves = [
            learn(new(seed), task.train, task.test, rate, steps, every, seed)
            for seed in range(seeds)
        ]
        result[start] = {"rate": rate, "validation": validation, "curves": curves}
        title = f"{task.name}, {task.per_class} per class, {STARTS[start]}"
        print(f"{title}: {format_curves(curves)}, learning rate {rate:g}", flush=True)
    pairs = zip(result["pretrained"]["curves"], result["scratch"]["curves"], strict=True)
    gains = [ours[-1] - theirs[-1] for ours, theirs in pairs]
    result["gain"] = {"mean": statistics.fmean(gains), "interval": student_interval(gains)}
    return result


def format_curves(curves: Sequence[Sequence[float]]) -> str:
    """Format the last values of curves in percent: mean and 95 % interval."""
    last = [curve[-1] for curve in curves]
    low, high = student_interval(last) or (float("nan"), float("nan"))
    return f"{100 * statistics.fmean(last):.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def draw(results: Sequence[Mapping[str, Any]], steps: Sequence[int], path: Path) -> None:
    """Plot accuracy by step with 95 % intervals over seeds, in one panel per task."""
    colors = dict(zip(STARTS, plotting.PALETTE, strict=False))
    with plotting.new_figure(3.2 * len(results) + 1, 3.4) as figure:
        axes: Any = figure.subplots(1, len(results), sharey=True, squeeze=False)
        for axis, result in zip(axes[0], results, strict=True):
            for start, label in STARTS.items():
                values = 100 * np.array(result[start]["curves"])  # (seeds, measurements)
                axis.plot(steps, values.mean(0), color=colors[start], label=label)
                bounds = [student_interval(list(column)) or (column[0],) * 2 for column in values.T]
                axis.fill_between(
                    steps, *np.array(bounds).T, color=colors[start], alpha=0.25, linewidth=0
                )
            axis.set(xlabel="step", title=f"{result['task']}, {result['per_class']} per class")
            axis.set_ylim(0, 100)
        axes[0, 0].set_ylabel("top-1 test accuracy, %")
        axes[0, 0].legend(loc="lower right")
    plotting.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fine_tuning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--output", type=Path, required=True, help="output folder")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--tasks", nargs="+", default=_TASKS, metavar="NAME:PER_CLASS", help="images per class"
    )

    def work(arguments: Sequence[str]) -> None:
        report(parser.parse_args(arguments))

    return run(work, sys.argv[1:] if arguments is None else arguments, "transfer")


def report(options: argparse.Namespace) -> None:
    """Run the comparison, print the results and write them to files."""
    for name, least in (("seeds", 2), ("steps", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(options, name)}")
    tasks = [_parse_task(text) for text in options.tasks]
    backbone = options.run / "export" / "backbone"
    cfg: Any = build(backbone, "scratch", 0, seed=0).pretrained_cfg
    options.output.mkdir(parents=True, exist_ok=True)
    every = max(1, options.steps // 10)
    results = [
        compare(
            backbone,
            task(name, per_class, cfg),
            steps=options.steps,
            every=every,
            seeds=options.seeds,
        )
        for name, per_class in tasks
    ]
    steps = [*range(0, options.steps, every), options.steps]
    print(table(results))
    record = {
        "machine": measure.machine(),
        "seeds": options.seeds,
        "steps": steps,
        "results": results,
    }
    write_text_file(options.output / "fine_tuning.json", json.dumps(record, indent=2) + "\n")
    draw(results, steps, options.output / "fine_tuning.png")
    print(f"wrote {options.output / 'fine_tuning.json'} and {options.output / 'fine_tuning.png'}")


def _parse_task(text: str) -> tuple[str, int]:
    """Return name and images per class from an option such as digits:11."""
    name, _, number = text.partition(":")
    if name not in _MOST or not number.isdigit() or not 3 <= int(number) <= _MOST[name]:
        known = " or ".join(f"{name}:3 to {name}:{most}" for name, most in _MOST.items())
        raise ValueError(f"--tasks must be {known}, got {text}")
    return name, int(number)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Format the accuracies after the last step as a Markdown table."""
    lines = [
        f"| task, images per class | {' | '.join(STARTS.values())} | gain, points |",
        "|---|---|---|---|",
    ]
    for result in results:
        cells = [format_curves(result[start]["curves"]) for start in STARTS]
        gain = result["gain"]
        low, high = (100 * bound for bound in gain["interval"])
        cells.append(f"{100 * gain['mean']:+.1f} ({low:+.1f} to {high:+.1f})")
        lines.append(f"| {result['task']}, {result['per_class']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
