"""From an encoder and data sets to a report: features, classifiers, scores, one set at a time.

What is found for a data set is kept beside the features, and taken over by a later run that asks
for the same: same features, classifier, grids, seeds and versions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from trex_models.atomic import write_whole
from trex_models.data.sources import Source, digest
from trex_models.evaluation.geometry import Geometry, analyze
from trex_models.transfer import protocol
from trex_models.transfer.cache import FeatureCache
from trex_models.transfer.datasets import Dataset
from trex_models.transfer.encoders import Encoder
from trex_models.transfer.report import environment, new_report, table, with_entry
from trex_models.transfer.scores import accuracy, knn_scores

LARGE = 100_000
"""Training images from which on a data set of the user's own gets the SGD layer."""


@dataclass(frozen=True)
class Task:
    """A data set that has been opened and checked."""

    data_set: Dataset
    train: Source
    test: Source

    @property
    def classifier(self) -> str:
        """Which classifier it gets: logistic or sgd."""
        by_size = "sgd" if len(self.train) > LARGE else "logistic"
        return self.data_set.classifier or by_size


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the data sets are scored."""

    seeds: int = 5
    """Validation splits, from seed 0; for the SGD layer also orders of the samples."""
    training_task: str | None = None
    """Name of the data set that the model was trained on; it does not count as transfer."""
    analyses: bool = False
    """Whether to analyse the geometry of the training images' features."""
    device: str = "cpu"
    """Where classifiers are fitted."""


def evaluate(
    encoder: Encoder,
    tasks: Sequence[Task],
    cache: FeatureCache,
    plan: Plan,
    out: Path,
    label: str = "",
    command: str = "",
) -> dict[str, Any]:
    """Score an encoder on data sets, and write the report after each of them.

    Args:
        encoder: What maps images to features.
        tasks: Data sets.
        cache: Of features and of scores.
        plan: How they are scored.
        out: The report's file, JSON; a table in Markdown goes beside it.
        label: What tables and pictures call the model.
        command: What repeats it.

    Returns:
        The report.

    Raises:
        ValueError: An image cannot be read, features are not finite, or a cached file is not what
            its name says.
        OSError: A file cannot be written.
    """
    settings = {
        "protocol": protocol.describe(range(plan.seeds)),
        "cache_dtype": cache.dtype,
        "classifiers_device": plan.device,
        "training_task": plan.training_task,
        "command": command,
    }
    report = new_report(encoder, settings, label)
    for number, task in enumerate(tasks, start=1):
        name = task.data_set.name
        print(
            f"[{number}/{len(tasks)}] {task.data_set.title}: {len(task.train):,} training and "
            f"{len(task.test):,} test images of {len(task.train.classes):,} classes",
            flush=True,
        )
        entry = score(encoder, task, cache, plan)
        report = with_entry(report, name, entry, complete=number == len(tasks))
        write_whole(out, json.dumps(report, indent=2) + "\n")
        write_whole(out.with_suffix(".md"), table([report], markdown=True))
        print(
            f"      top-1 {100 * entry['top1']['mean']:.2f} %, "
            f"k-NN {100 * entry['knn']['top1']:.2f} %",
            flush=True,
        )
    return report


def score(encoder: Encoder, task: Task, cache: FeatureCache, plan: Plan) -> dict[str, Any]:
    """Return a data set's entry of the report; arguments and errors as of ``evaluate``."""
    name = task.data_set.name
    started = time.monotonic()
    identities = [cache.identity(encoder, source) for source in (task.train, task.test)]
    train = cache.features(encoder, task.train, f"{name}-train", identities[0])
    test = cache.features(encoder, task.test, f"{name}-test", identities[1])
    seconds = time.monotonic() - started
    about = {
        "title": task.data_set.title,
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
    key = digest(json.dumps(asked, sort_keys=True))
    path = cache.folder(encoder) / f"{name}-scores-{key[:12]}.json"
    scores = _read_scores(path, key)
    if scores is None:
        scores = _scores(task, train, test, plan)
        scores["seconds"]["features"] = round(seconds, 2)
        try:
            write_whole(path, json.dumps({"key": key, "scores": scores}, indent=2) + "\n")
        except OSError as error:  # the report has them all the same
            print(f"      the scores are not kept for another run ({error})", flush=True)
    entry = {**about, **scores}
    if plan.analyses:
        try:
            found = _analysis(train, task.train.labels, plan.device)
            entry["geometry"] = {"train": found.to_dict()}
        except ValueError as error:  # such as constant features
            print(f"      no analyses: {error}", flush=True)
            entry["geometry"] = {"train": None, "reason": str(error)}
    return entry


def _analysis(features: np.ndarray, labels: np.ndarray, device: str) -> Geometry:
    bar = tqdm(
        total=len(features),
        desc="analyses",
        unit=" images",
        unit_scale=True,
        dynamic_ncols=True,
        disable=None,  # where stderr is no terminal
    )
    with bar:
        return analyze(features, labels, device=device, progress=bar.update)


def _read_scores(path: Path, key: str) -> dict[str, Any] | None:
    """Return scores that were found before; None where there are none of this key."""
    try:
        kept = json.loads(path.read_text())
        return dict(kept["scores"]) if kept["key"] == key else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _scores(task: Task, train: np.ndarray, test: np.ndarray, plan: Plan) -> dict[str, Any]:
    samples = train, task.train.labels, test, task.test.labels
    fit = protocol.sgd_scores if task.classifier == "sgd" else protocol.logistic_scores
    started = time.monotonic()
    choices = fit(*samples, range(plan.seeds), device=plan.device)
    fitted = time.monotonic()
    knn = protocol.knn_score(*samples, device=plan.device)
    seconds = {"classifiers": fitted - started, "knn": time.monotonic() - fitted}
    return {
        **accuracy([choice.top1 for choice in choices], len(task.test)),
        "choices": [asdict(choice) for choice in choices],
        "knn": knn_scores(knn, len(task.test)),
        "seconds": {key: round(value, 2) for key, value in seconds.items()},
    }
