"""Pre-training on small datasets: recipe auto, the paper's settings, softmax, and a teacher.

    python -m benchmarks.package_images --output DATA
    python -m benchmarks.own_images --data DATA --output RUNS

trains a small network on clip art, emoji and fractals with each setting of `CELLS` and three seeds.
Features are evaluated on held-out images of the same dataset and on another dataset. Each result is
a line of RUNS/results.jsonl; an interrupted benchmark continues. Docs: docs/pretraining.md.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from trex_models import cli
from trex_models.atomic import append
from trex_models.data.center_crop import image_batches
from trex_models.data.fractals import FractalSource
from trex_models.data.image_files import FolderSource
from trex_models.data.sources import Source
from trex_models.evaluation.frozen_model import FrozenModel
from trex_models.evaluation.splits import hashed_order
from trex_models.transfer import protocol

SIDE, SEEDS = 64, (0, 1, 2)
EPOCHS = {"clipart": 20, "emoji": 32, "fractals": 5}  # about 31,000 images each
OTHER = {"clipart": "emoji", "emoji": "clipart", "fractals": "clipart"}
NETWORK = [
    *("--model.backbone", "resnet10t", "--model.backbone-args", "channels=(24, 48, 96, 192)"),
    *["--model.hidden-dim", "192", "--model.embedding-dim", "48", "--system.workers", "0"],
    *["--system.save-minutes", "0", "--system.log-every", "50"],
]
SMALL = "--crops.global-size 32 --crops.local-size 16"
LOCAL = "--crops.local-crops 4"
ONE_CROP = "--crops.local-crops 0"
LARGE = f"--crops.global-size 64 {ONE_CROP}"
PLAIN = "--objective.name softmax --model.projector none --optim.name sgd --optim.base-lr 0.4"
CELLS = {
    "auto": f"auto {SMALL}",
    "t-ReX-1": f"auto {SMALL} {LOCAL} --objective.name cosine --model.projector mlp",
    "paper": f"trexstar {SMALL} {LOCAL} --optim.warmup-epochs 2 --objective.bank-size BANK",
    "softmax": f"auto {SMALL} {ONE_CROP} {PLAIN} --optim.weight-decay 1e-4",
    "labels, 64 pixels": f"auto {LARGE}",
    "lite0 as teacher": f"auto {LARGE} --objective.name distill --objective.teacher DATA/lite0 "
    "--objective.teacher-size 128",
}
"""Recipe and options by name. BANK is the paper's 8192, or the number of images if it is lower."""
FIRST = ("auto", "t-ReX-1", "paper", "softmax", "untrained")
SECOND = ("labels, 64 pixels", "lite0 as teacher", "untrained, 64 pixels")
LONGER = ("auto, 6 times longer", "t-ReX-1, 6 times longer")


def copy_images(source: Path, target: Path, test_share: float) -> None:
    """Copy class folders with images of SIDE pixels, and a share of each class for testing."""
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        files = sorted(folder.iterdir())
        order = hashed_order([file.name for file in files])
        count = round(test_share * len(files))
        for position, index in enumerate(order):
            part = "test" if position < count else "train"
            path = target / part / folder.name / files[index].name
            path.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(files[index]) as image:
                scale = SIDE / min(image.size)
                size = [max(SIDE, round(side * scale)) for side in image.size]
                image.convert("RGB").resize((size[0], size[1]), Image.Resampling.LANCZOS).save(path)


def prepare(data: Path, output: Path) -> None:
    """Write the images of clip art and emoji."""
    if not (output / "clipart").exists():
        copy_images(data / "clipart", output / "clipart", 0.2)
        copy_images(data / "emoji/train", output / "emoji-train", 0.0)
        copy_images(data / "emoji/test", output / "emoji-test", 0.0)


def open_images(images: Path, dataset: str, part: str) -> Source:
    """Open the training or test images of a dataset."""
    if dataset == "fractals":
        is_train = part == "train"
        return FractalSource(40, 150 if is_train else 30, SIDE, first_image=0 if is_train else 150)
    roots = {p: images / "clipart" / p for p in ("train", "test")}
    if dataset == "emoji":
        roots = {p: images / f"emoji-{p}" / "train" for p in ("train", "test")}
    training = FolderSource(roots["train"])
    return training if part == "train" else FolderSource(roots["test"], training.classes)


@torch.no_grad()
def features_of(model: FrozenModel, source: Source) -> np.ndarray:
    """Return the features of all images, (N, F)."""
    batches = image_batches(source, model.transform, 64)
    return np.concatenate([model.model(batch).numpy() for batch in batches])


def evaluate(model: FrozenModel, images: Path, dataset: str) -> dict[str, float]:
    """Return the accuracy of logistic regression and k-NN on a dataset's held-out images."""
    samples: list[np.ndarray] = []
    for part in ("train", "test"):
        source = open_images(images, dataset, part)
        samples += [features_of(model, source), source.labels]
    (logistic,) = protocol.logistic_scores(*samples, seeds=[0], Cs=protocol.C_GRID[9:26:2])
    return {"logistic": logistic.top1, "knn": protocol.knn_score(*samples)}


def train(cell: str, dataset: str, seed: int, data: Path, folder: Path) -> float:
    """Train a cell in another process; return the seconds."""
    source = open_images(folder.parent / "images", dataset, "train")
    where = ["--data.path", str(getattr(source, "root", ""))]
    if dataset == "fractals":
        where = ["--data.source", "fractals", "--data.image-size", str(SIDE)]
    name, longer, _ = cell.partition(", 6 times longer")
    options = CELLS[name].replace("BANK", str(min(8192, len(source)))).replace("DATA", str(data))
    command = [sys.executable, "-m", "trex_models.train", *options.split(), *where, *NETWORK]
    epochs = EPOCHS[dataset] * (6 if longer else 1)
    command += ["--optim.epochs", str(epochs), "--seed", str(seed)]
    command += ["--output", str(folder)]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    shutil.rmtree(folder / "checkpoints")
    return time.monotonic() - started


def run(cell: str, dataset: str, seed: int, data: Path, output: Path) -> dict[str, Any]:
    """Train and evaluate a cell, or evaluate the network without training."""
    name, _, size = cell.partition(", ")
    trained = "auto" if name == "untrained" else cell
    folder = output / f"{cell.replace(', ', '-').replace(' ', '-')}-{dataset}-{seed}"
    seconds = 0.0
    if name == "untrained":
        folder = output / f"{'labels-64-pixels' if size else trained}-{dataset}-{seed}"
    else:
        seconds = train(cell, dataset, seed, data, folder)
    backbone = str(folder / "export/backbone")
    images = output / "images"
    model = FrozenModel.load(backbone, untrained=name == "untrained", seed=seed)
    if name == "untrained":
        model = model.recalibrate_batchnorm(open_images(images, dataset, "train"), dataset)
    scores = {where: evaluate(model, images, where) for where in (dataset, OTHER[dataset])}
    result = {"cell": cell, "dataset": dataset, "seed": seed, "seconds": round(seconds)}
    result["scores"] = scores
    append(output / "results.jsonl", json.dumps(result) + "\n")
    print(json.dumps(result), flush=True)
    return result


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of means over seeds and their standard deviations, in percent."""
    lines = ["| trained on | setting | same dataset | k-NN | other dataset | k-NN | seconds |"]
    lines.append("|---" * 7 + "|")
    for dataset in EPOCHS:
        for cell in dict.fromkeys(row["cell"] for row in results):
            rows = [row for row in results if (row["cell"], row["dataset"]) == (cell, dataset)]
            if not rows:
                continue
            cells = []
            for where in (dataset, OTHER[dataset]):
                for score in ("logistic", "knn"):
                    values = [100 * row["scores"][where][score] for row in rows]
                    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                    cells.append(f"{statistics.fmean(values):.1f}{spread}")
            cells.append(f"{statistics.median(row['seconds'] for row in rows):.0f}")
            lines.append(f"| {dataset} | {cell} | {' | '.join(cells)} |")
    return "\n".join(lines)


def own_images(*, data: Path, output: Path, jobs: int = 2) -> None:
    """Train and evaluate all settings on all datasets, and print the table.

    Args:
        data: Folder written by ``python -m benchmarks.package_images``.
        output: Folder of the runs and their results.
        jobs: Number of runs at the same time, with one thread each.
    """
    prepare(data, output / "images")
    path = output / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    done = {(row["cell"], row["dataset"], row["seed"]) for row in map(json.loads, lines)}
    photographs = [d for d in EPOCHS if d != "fractals"]
    wanted = [(cell, d, seed) for seed in SEEDS for d in EPOCHS for cell in FIRST]
    wanted += [(cell, d, seed) for seed in SEEDS for d in photographs for cell in SECOND + LONGER]
    wanted.sort(key=lambda key: key[2])  # stable: complete tables early
    left = [key for key in wanted if key not in done]
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for future in [pool.submit(run, *key, data, output) for key in left]:
            future.result()
    print(table([json.loads(line) for line in path.read_text().splitlines()]))


if __name__ == "__main__":
    sys.exit(
        cli.main(own_images, sys.argv[1:], prog="python -m benchmarks.own_images", extra="train")
    )
