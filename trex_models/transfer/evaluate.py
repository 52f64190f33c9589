"""Evaluation of a model: features, classifiers and scores of each dataset, and the report.

Scores are cached next to the features and reused by runs with identical settings.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trex_models.atomic import write_text_file
from trex_models.cli import progress_bar
from trex_models.data.sources import Source, digest
from trex_models.evaluation.extract import Extraction, as_text, feature_identity
from trex_models.evaluation.feature_file import load
from trex_models.evaluation.frozen_model import FrozenModel
from trex_models.evaluation.geometry import analyze
from trex_models.transfer import protocol
from trex_models.transfer.datasets import Dataset
from trex_models.transfer.report import (
    accuracy,
    environment,
    format_table,
    knn_scores,
    new_report,
    summary,
)

LARGE = 100_000
"""Number of training images above which the user's own datasets use the SGD classifier."""


class Task(NamedTuple):
    """Dataset whose training and test images were opened and checked."""

    dataset: Dataset
    train: Source
    test: Source

    @property
    def classifier(self) -> str:
        """Classifier of the dataset, logistic or sgd."""
        return self.dataset.classifier or ("sgd" if len(self.train) > LARGE else "logistic")


@dataclass(frozen=True, kw_only=True)
class FeatureCache:
    """Cached features, ROOT/<architecture>-<hash>/<dataset>-<split>-<hash>.safetensors.

    See ``Extraction`` for the settings. File names are only for readability: a file is reused if
    its metadata match.
    """

    root: Path
    dtype: str = "float32"
    batch_size: int = 256
    workers: int = 0

    def features(
        self,
        model: FrozenModel,
        source: Source,
        title: str,
        identity: Mapping[str, str] | None = None,
    ) -> np.ndarray:
        """Return memory-mapped features, (N, F); extract them first if they are not cached.

        ``title`` is the dataset and split, for the file name and the progress bar. ``identity`` is
        the result of ``feature_identity``; pass it if known, as it reads all file sizes.
        """
        identity = identity or feature_identity(model, source)
        key = digest(as_text({**identity, "dtype": self.dtype}))
        path = self.folder(model) / f"{_slug(title)}-{key[:12]}.safetensors"
        Extraction(
            model=model,
            source=source,
            path=path,
            identity=identity,
            title=title,
            dtype=self.dtype,
            batch_size=self.batch_size,
            workers=self.workers,
        ).run()
        return load(path).features

    def folder(self, model: FrozenModel) -> Path:
        """Return the folder of a model's features."""
        name = _slug(str(model.metadata["architecture"]))
        return self.root / f"{name}-{digest(as_text(model.identity()))[:12]}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Evaluation settings."""

    seeds: int = 5
    """Number of validation splits, with seeds 0, 1, ...; the seed also sets the order of SGD."""
    training_task: str | None = None
    """Dataset that the model was trained on; it is excluded from the transfer score."""
    geometry: bool = False
    """If True, also measure the geometry of the training images' features."""
    device: str = "cpu"
    """Device of the classifiers."""


def evaluate(
    model: FrozenModel,
    tasks: Sequence[Task],
    cache: FeatureCache,
    plan: Plan,
    output: Path,
    label: str = "",
    command: str = "",
) -> dict[str, Any]:
    """Evaluate a model on datasets; return the report, which is rewritten after each dataset.

    ``output`` is a JSON file; a Markdown table is written next to it. ``label`` is the name of the
    model in tables and plots (by default its own name), ``command`` the command line to report.
    """
    settings = {
        "protocol": protocol.describe(range(plan.seeds)),
        "cache_dtype": cache.dtype,
        "classifiers_device": plan.device,
        "training_task": plan.training_task,
        "command": command,
    }
    report = new_report(model, settings, label)
    for number, task in enumerate(tasks, start=1):
        name = task.dataset.name
        print(
            f"[{number}/{len(tasks)}] {task.dataset.title}: {len(task.train):,} training and "
            f"{len(task.test):,} test images of {len(task.train.classes):,} classes",
            flush=True,
        )
        entry = report["datasets"][name] = score(model, task, cache, plan)
        transfer = {k: v for k, v in report["datasets"].items() if k != plan.training_task}
        report["transfer"] = summary(transfer) if transfer else None
        report["complete"] = number == len(tasks)
        write_text_file(output, json.dumps(report, indent=2) + "\n")
        write_text_file(output.with_suffix(".md"), format_table([report], markdown=True))
        top1, knn = 100 * entry["top1"]["mean"], 100 * entry["knn"]["top1"]
        print(f"      top-1 {top1:.2f} %, k-NN {knn:.2f} %", flush=True)
    return report


def score(model: FrozenModel, task: Task, cache: FeatureCache, plan: Plan) -> dict[str, Any]:
    """Evaluate a model on one dataset; return the entry of the report."""
    name = task.dataset.name
    started = time.monotonic()
    identities = [feature_identity(model, source) for source in (task.train, task.test)]
    train = cache.features(model, task.train, f"{name}-train", identities[0])
    test = cache.features(model, task.test, f"{name}-test", identities[1])
    seconds = time.monotonic() - started
    description = {
        "title": task.dataset.title,
        "classifier": task.classifier,
        "num_classes": len(task.train.classes),
        "train": {"images": len(task.train), "sha256": task.train.digest()},
        "test": {"images": len(task.test), "sha256": task.test.digest()},
    }
    settings = {
        **description,
        "features": identities,
        "dtype": cache.dtype,
        "protocol": protocol.describe(range(plan.seeds)),
        "device": plan.device,
        "versions": environment()["versions"],
    }
    key = digest(as_text(settings))
    path = cache.folder(model) / f"{name}-scores-{key[:12]}.json"
    scores = _read_scores(path, key)
    if scores is None:
        scores = _scores(task, train, test, plan)
        scores["seconds"]["features"] = round(seconds, 2)
        try:
            write_text_file(path, json.dumps({"key": key, "scores": scores}, indent=2) + "\n")
        except OSError as error:  # the report contains the scores in any case
            print(f"      the scores were not cached for other runs ({error})", flush=True)
    entry = {**description, **scores}
    if plan.geometry:
        try:
            with progress_bar(len(train), "geometry", " images") as bar:
                result = analyze(train, task.train.labels, device=plan.device, progress=bar.update)
            entry["geometry"] = {"train": asdict(result)}
        except ValueError as error:  # such as constant features
            print(f"      geometry is not available: {error}", flush=True)
            entry["geometry"] = {"train": None, "reason": str(error)}
    return entry


def _read_scores(path: Path, key: str) -> dict[str, Any] | None:
    try:
        cached = json.loads(path.read_text())
        return dict(cached["scores"]) if cached["key"] == key else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _scores(task: Task, train: np.ndarray, test: np.ndarray, plan: Plan) -> dict[str, Any]:
    samples = train, task.train.labels, test, task.test.labels
    fit = protocol.sgd_scores if task.classifier == "sgd" else protocol.logistic_scores
    started = time.monotonic()
    choices = fit(*samples, seeds=range(plan.seeds), device=plan.device)
    fitted = time.monotonic()
    knn = protocol.knn_score(*samples, device=plan.device)
    seconds = {"classifiers": fitted - started, "knn": time.monotonic() - fitted}
    return {
        **accuracy([choice.top1 for choice in choices], len(task.test)),
        "choices": [asdict(choice) for choice in choices],
        "knn": knn_scores(knn, len(task.test)),
        "seconds": {key: round(value, 2) for key, value in seconds.items()},
    }


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[-60:] or "model"
