"""From a model and datasets to a report: features, classifiers and scores, a dataset at a time.

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
"""Training images above which a dataset of the user's own gets the SGD layer."""


class Task(NamedTuple):
    """A dataset that has been opened and checked."""

    dataset: Dataset
    train: Source
    test: Source

    @property
    def classifier(self) -> str:
        """Its classifier: logistic or sgd."""
        return self.dataset.classifier or ("sgd" if len(self.train) > LARGE else "logistic")


@dataclass(frozen=True, kw_only=True)
class FeatureCache:
    """A folder of features, ROOT/<architecture>-<hash>/<dataset>-<split>-<hash>.safetensors.

    Its settings are those of ``Extraction``. The names are for people: a file is used only if its
    metadata match.
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
        """Return features, (N, F), mapped into memory, extracting them if they are missing.

        ``title`` names dataset and split in the file's name and the progress bar; ``identity`` is
        the result of ``feature_identity``, if it is known, since it reads every file's size.
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
    """Settings of the scores."""

    seeds: int = 5
    """Number of validation splits, from seed 0; for the SGD layer also orders of the samples."""
    training_task: str | None = None
    """Dataset that the model was trained on, which does not count as transfer."""
    geometry: bool = False
    """Whether to measure the geometry of the training images' features."""
    device: str = "cpu"
    """Device that fits the classifiers."""


def evaluate(
    model: FrozenModel,
    tasks: Sequence[Task],
    cache: FeatureCache,
    plan: Plan,
    output: Path,
    label: str = "",
    command: str = "",
) -> dict[str, Any]:
    """Score a model on datasets; write the report after each of them, and return it.

    ``output`` is JSON; a table in Markdown is written next to it. ``label`` is the model's name in
    tables and pictures, empty for its own, and ``command`` the command line that repeats this.
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
    """Return a dataset's entry of the report."""
    name = task.dataset.name
    started = time.monotonic()
    identities = [feature_identity(model, source) for source in (task.train, task.test)]
    train = cache.features(model, task.train, f"{name}-train", identities[0])
    test = cache.features(model, task.test, f"{name}-test", identities[1])
    seconds = time.monotonic() - started
    about = {
        "title": task.dataset.title,
        "classifier": task.classifier,
        "num_classes": len(task.train.classes),
        "train": {"images": len(task.train), "sha256": task.train.digest()},
        "test": {"images": len(task.test), "sha256": task.test.digest()},
    }
    asked = {
        **about,
        "features": identities,
        "dtype": cache.dtype,
        "protocol": protocol.describe(range(plan.seeds)),
        "device": plan.device,
        "versions": environment()["versions"],
    }
    key = digest(as_text(asked))
    path = cache.folder(model) / f"{name}-scores-{key[:12]}.json"
    scores = _read_scores(path, key)
    if scores is None:
        scores = _scores(task, train, test, plan)
        scores["seconds"]["features"] = round(seconds, 2)
        try:
            write_text_file(path, json.dumps({"key": key, "scores": scores}, indent=2) + "\n")
        except OSError as error:  # the report has them in any case
            print(f"      the scores are not cached for other runs ({error})", flush=True)
    entry = {**about, **scores}
    if plan.geometry:
        try:
            with progress_bar(len(train), "geometry", " images") as bar:
                found = analyze(train, task.train.labels, device=plan.device, progress=bar.update)
            entry["geometry"] = {"train": asdict(found)}
        except ValueError as error:  # such as constant features
            print(f"      no geometry: {error}", flush=True)
            entry["geometry"] = {"train": None, "reason": str(error)}
    return entry


def _read_scores(path: Path, key: str) -> dict[str, Any] | None:
    """Return cached scores; None if there are none with this key."""
    try:
        kept = json.loads(path.read_text())
        return dict(kept["scores"]) if kept["key"] == key else None
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
