"""Reports of evaluations, as JSON with accuracies in [0, 1], and their tables."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import trex_models
from trex_models.cli import align_columns
from trex_models.evaluation.frozen_model import FrozenModel
from trex_models.precision import free_cores, processor
from trex_models.transfer.intervals import student_interval, wilson_interval

FORMAT = 3
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "simplejpeg", "scipy")
_LABEL_WIDTH = 40  # maximum number of characters of a model name in a table


def new_report(model: FrozenModel, settings: Mapping[str, Any], label: str = "") -> dict[str, Any]:
    """Return a report without results; ``settings``, such as ``protocol``, become entries."""
    return {
        "format": FORMAT,
        "complete": False,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {"name": model.name, "label": label or model.name, **model.metadata},
        "transform": asdict(model.transform),
        "precision": model.precision.name,
        **settings,
        "datasets": {},
        "transfer": None,
        "tasks": {},
        **environment(),
    }


def environment() -> dict[str, Any]:
    """Return the versions and the machine properties that may affect results."""
    versions = {"trex_models": trex_models.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    machine = {
        "system": platform.system(),
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": free_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    return {"versions": versions, "machine": machine}


def read_report(path: Path) -> dict[str, Any]:
    """Read a report; raise ValueError if the file is not a report of the current format."""
    try:
        report = dict(json.loads(path.read_text()))
        actual = report["format"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not the JSON of a report"
        raise ValueError(
            f"{path} cannot be read ({reason}); pass a report written by the command evaluate"
        ) from error
    if actual != FORMAT:
        raise ValueError(f"{path} has report format {actual}, expected {FORMAT}; evaluate again")
    return report


def results_by_task(report: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Return the results of a report by task and dataset."""
    tasks = {"classification": report["datasets"], **report["tasks"]}
    return {(task, name): entry for task in tasks for name, entry in tasks[task].items()}


def task_scores(report: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Return the results of all tasks but classification, by task and dataset."""
    return {key: entry for key, entry in results_by_task(report).items() if "scores" in entry}


def require_same_images(reports: Sequence[Mapping[str, Any]]) -> None:
    """Check that datasets with the same name have the same images in all reports."""
    first: dict[tuple[str, str], tuple[str, Any]] = {}
    for report in reports:
        label = report["model"]["label"]
        for (task, name), entry in results_by_task(report).items():
            images = [entry[part]["sha256"] for part in ("train", "test") if part in entry]
            other, expected = first.setdefault((task, name), (label, images))
            if images != expected:
                both = f"{label} and {other}"
                raise ValueError(f"{name}: {both} used different images; evaluate on the same copy")


def format_table(reports: Sequence[Mapping[str, Any]], markdown: bool = False) -> str:
    """Return the scores of models as text or Markdown tables.

    The first table has one row per dataset with the protocol of the paper, the second one row per
    score of the other tasks.
    """
    require_same_images(reports)
    tables = [_rows(reports)] if any(report["datasets"] for report in reports) else []
    tables += [_task_rows(reports)] if any(report["tasks"] for report in reports) else []
    notes = _notes(reports)
    if markdown:
        text = "\n\n".join(map(_markdown, tables))
        return "\n".join([text, "", *(f"{_escaped(note)}  " for note in notes)]) + "\n"
    blocks = []
    for rows in tables:
        lines = align_columns(rows)
        lines.insert(1, "-" * len(lines[0]))
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, "\n".join(notes)])


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(map(_escaped, row)) + " |" for row in rows]
    lines.insert(1, "|" + "---|" + "---:|" * (len(rows[0]) - 1))
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _rows(reports: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = [["dataset", "test images"]]
    for report in reports:
        name = f"{report['model']['label'][:_LABEL_WIDTH]}: " if len(reports) > 1 else ""
        rows[0] += [f"{name}top-1, %", "k-NN, %", "log-odds"]
    for name in dict.fromkeys(name for report in reports for name in report["datasets"]):
        entries = [report["datasets"].get(name) for report in reports]
        known = next(filter(None, entries))
        training = all(report["training_task"] == name for report in reports)
        row = [known["title"] + " (training task)" * training, f"{known['test']['images']:,}"]
        for entry in entries:
            row.append(_cell(entry and entry["top1"], "mean", "test_interval"))
            row.append(_cell(entry and entry["knn"], "top1"))
            row.append(_cell(entry, "log_odds", scale=1))
        rows.append(row)
    counts = {len(report["transfer"]["datasets"]) for report in reports if report["transfer"]}
    count = str(*counts) if len(counts) == 1 else "transfer"
    last = [f"mean log-odds of {count} dataset{'s' * (count != '1')}", ""]
    for scores in (report["transfer"] for report in reports):
        mean = _cell(scores, "mean_log_odds", "interval", scale=1)
        last += ["", _cell(scores, "knn_mean_log_odds", scale=1), mean]
    return [*rows, last]


def _task_rows(reports: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return one row per task, dataset and score, with a column per model."""
    labels = [report["model"]["label"][:_LABEL_WIDTH] for report in reports]
    rows = [["task, dataset: score, %", "test images", *labels]]
    found = [task_scores(report) for report in reports]
    for key in dict.fromkeys(key for part in found for key in part):
        known = [part.get(key, {"scores": {}}) for part in found]
        first = next(entry for entry in known if "title" in entry)
        title, images = f"{key[0]}, {first['title']}", f"{first['test']['images']:,}"
        scores = [named_scores(entry) for entry in known]
        for name in dict.fromkeys(name for part in scores for name in part):
            cells = [_cell(part.get(name), "value", "interval") for part in scores]
            rows.append([f"{title}: {name}", images, *cells])
    return rows


def named_scores(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scores of a task; the names state the whitening."""
    whitening = entry.get("whitening")
    suffix = f", PCA whitening on {whitening['dataset']}" if whitening else ""
    return {f"{name}{suffix}": score for name, score in entry["scores"].items()}


def _cell(scores: Any, name: str, interval: str = "", scale: int = 100) -> str:
    """Return a score and its interval as text, with one digit if it is a percentage."""
    if scores is None:
        return "-"
    numbers = scores[name], *((interval and scores[interval]) or ())
    text, *ends = (f"{scale * number:.{1 if scale == 100 else 3}f}" for number in numbers)
    return f"{text} ({' to '.join(ends)})" if ends else text


def describe_score(entry: Mapping[str, Any]) -> str:
    """Return the first scores of a task as text, for the progress messages."""
    if "top1" in entry:
        top1, knn = 100 * entry["top1"]["mean"], 100 * entry["knn"]["top1"]
        return f"top-1 {top1:.2f} %, k-NN {knn:.2f} %"
    first = list(entry["scores"].items())[:4]
    return ", ".join(f"{name} {100 * score['value']:.2f} %" for name, score in first)


def _notes(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = []
    for report in reports:
        model = report["model"]
        notes.append(
            f"{model['label']}: {model['source']}, weights {model['weights_sha256'][:12]}, "
            f"preprocessing {model['preprocessing']}, {report['precision']}, features in "
            f"{report['cache_dtype']}"
        )
    if any(report["datasets"] for report in reports):
        notes += _protocol_notes(reports)
    if any(report["tasks"] for report in reports):
        notes.append(
            "Other tasks: 95 % intervals over test images, queries or, for few-shot, episodes; "
            "protocols are in the reports."
        )
    if not all(report["complete"] for report in reports):
        notes.append("INCOMPLETE: the evaluation is unfinished; rerun the command to continue.")
    return notes


def _protocol_notes(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the notes on the classification table."""
    seeds = sorted({len(report["protocol"]["seeds"]) for report in reports})
    notes = [
        f"top-1: mean over {' or '.join(map(str, seeds))} seed{'s' * (seeds != [1])} (95 % "
        "interval due to the test set size); mean log-odds: 95 % interval over the seeds.",
        reports[0]["protocol"]["note"],
    ]
    means = {frozenset(report["transfer"]["datasets"]) for report in reports if report["transfer"]}
    if len(means) > 1:
        notes.append("The mean log-odds are not comparable: they are over different datasets.")
    results = [entry for report in reports for entry in report["datasets"].values()]
    ends = [e["title"] for e in results if any("C" in c["at_end"] for c in e["choices"])]
    if ends:
        notes.append(f"C is at an end of its search range on {', '.join(dict.fromkeys(ends))}.")
    loose = [e["title"] for e in results if not all(c["converged"] for c in e["choices"])]
    if loose:
        notes.append(f"The last fit did not reach its tolerance on {', '.join(loose)}.")
    if any(entry[score]["clipped"] for entry in results for score in ("top1", "knn")):
        notes.append("For the log-odds, accuracies of 0 and 1 are clipped by half a test image.")
    return notes


def accuracy(top1: Sequence[float], images: int) -> dict[str, Any]:
    """Return the scores of a dataset from the accuracies of all seeds and the test set size.

    ``interval`` is the 95 % interval of the mean over seeds, ``test_interval`` the 95 % interval
    due to the test set size; ``clipped`` is True if an accuracy is 0 or 1.
    """
    mean = statistics.fmean(top1)
    return {
        "top1": {
            "mean": mean,
            "seeds": list(top1),
            "interval": student_interval(top1),
            "test_interval": wilson_interval(mean, images),
            "clipped": any(p in (0, 1) for p in top1),
        },
        "log_odds": statistics.fmean(log_odds(p, images) for p in top1),
    }


def knn_scores(top1: float, images: int) -> dict[str, Any]:
    """Return the k-NN scores of a dataset; ``clipped`` is True if the accuracy is 0 or 1."""
    return {"top1": top1, "log_odds": log_odds(top1, images), "clipped": top1 in (0, 1)}


def log_odds(top1: float, images: int) -> float:
    """Return ln(p / (1 - p)) of an accuracy p, clipped to half an image from 0 and 1."""
    p = min(max(top1, 0.5 / images), 1 - 0.5 / images)
    return math.log(p / (1 - p))


def summary(datasets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean scores over datasets, which must have the same number of seeds."""
    entries = datasets.values()
    odds = [
        [log_odds(p, entry["test"]["images"]) for p in entry["top1"]["seeds"]] for entry in entries
    ]
    seeds = [statistics.fmean(values) for values in zip(*odds, strict=True)]
    return {
        "mean_log_odds": statistics.fmean(seeds),
        "seeds": seeds,
        "interval": student_interval(seeds),
        "knn_mean_log_odds": statistics.fmean(
            log_odds(entry["knn"]["top1"], entry["test"]["images"]) for entry in entries
        ),
        "datasets": list(datasets),
    }
