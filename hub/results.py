"""Measured results for model cards, from reports of `python -m trex_models.transfer evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from hub.hub_folder import HubModel, load_folder
from trex_models.evaluation.frozen_model import FrozenModel, ModelOutput, weights_digest
from trex_models.transfer.report import named_scores, read_report, results_by_task

_HUB_TASKS = {"retrieval": "image-feature-extraction", "segmentation": "image-segmentation"}
Results = Sequence[tuple[EvalResult, Mapping[str, Any]]]  # each with its report


def match_reports(models: Sequence[HubModel], paths: Sequence[Path]) -> dict[str, list[Any]]:
    """Return the reports by the names of the models that have the evaluated weights."""
    digests = {model.name: _digests(model.folder) for model in models if paths}
    matched: dict[str, list[Any]] = {model.name: [] for model in models}
    for path in paths:
        report = read_report(path)
        evaluated, digest = report["model"], report["model"]["weights_sha256"]
        names = [name for name, known in digests.items() if digest in known]
        problem = "" if names else f"has weights {digest[:12]}, not those of {', '.join(digests)}"
        if not report["complete"]:
            problem = f"is not completely evaluated (to continue, run {report['command']})"
        if evaluated["untrained"]:
            problem = "is untrained (random weights or pixels)"
        if problem:
            raise ValueError(f"{path}: {evaluated['label']} {problem}; evaluate again, or omit it")
        for name in names:
            public = evaluated | {"label": name, "source": "this repository"}
            matched[name].append(report | {"model": public, "path": path})
    return matched


def _digests(folder: Path) -> set[str]:
    """Return the digests in reports on a model: of all weights, and of those of some outputs."""
    digests = {weights_digest(load_folder(folder))}
    outputs: tuple[ModelOutput, ...] = (None, "features_only")
    for output in outputs:
        with suppress(ValueError):  # timm's features_only does not support all models
            frozen = FrozenModel.load(str(folder.resolve()), features=output)
            digests.add(frozen.metadata["weights_sha256"])
    return digests


def merge_results(reports: Sequence[Any], repository: str) -> Results:
    """Return the results on a model; raise ValueError if reports contain different values."""
    merged: dict[str, tuple[EvalResult, Any]] = {}
    for report in reports:
        for (task, dataset), entry in results_by_task(report).items():
            for name, value in _scores(entry).items():
                # The Hub's client merges the results on a dataset and keeps only their metrics.
                result = EvalResult(
                    task_type=_HUB_TASKS.get(task, "image-classification"),
                    dataset_type=dataset,
                    dataset_name=entry["title"],
                    dataset_split="validation" if dataset == "imagenet" else "test",
                    metric_type="accuracy" if task in ("classification", "few-shot") else name,
                    metric_name=f"{task}: {name} (%)",
                    metric_value=round(100 * value, 2),
                    source_name="Model card",
                    source_url=f"https://huggingface.co/{repository}",
                )
                key = f"{dataset}, {result.metric_name}"
                first, other = merged.setdefault(key, (result, report))
                if first.metric_value != result.metric_value:
                    raise ValueError(
                        f"{report['path']}: {key} is {result.metric_value}, but "
                        f"{first.metric_value} in {other['path']}; pass only one of the two"
                    )
    return list(merged.values())


def _scores(entry: Mapping[str, Any]) -> dict[str, float]:
    if "top1" in entry:
        top1, knn = entry["top1"]["mean"], entry["knn"]["top1"]
        return {"top-1 of a linear classifier": top1, "top-1 of k-NN": knn}
    return {name: score["value"] for name, score in named_scores(entry).items()}


def benchmark_yaml(results: Results, benchmarks: Sequence[str]) -> str:
    """Return the first results on datasets as entries of benchmarks of the Hub."""
    first = {r.dataset_type: (r, report["created"]) for r, report in reversed(results)}
    found = []
    for text in benchmarks:
        dataset, _, target = text.partition("=")
        name, _, task_id = target.rpartition("/")
        if dataset not in first or name.count("/") != 1:
            raise ValueError(
                f"--benchmark {text} must be DATASET=OWNER/NAME/TASK_ID with a dataset of the "
                f"reports on the model: {', '.join(first) or 'none'}"
            )
        result, date = first[dataset]
        notes = f"{result.metric_name}; protocol and versions in the model card"
        found.append(EvalResultEntry(name, task_id, result.metric_value, date=date, notes=notes))
    return yaml_dump(eval_result_entries_to_yaml(found))
