"""Evaluation of a model: the results of each task on each dataset, and the report.

Results are cached next to the features and reused by runs with identical settings.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trex_models import plotting
from trex_models.atomic import write_text_file
from trex_models.evaluation.frozen_model import FrozenModel, ModelOutput
from trex_models.transfer import classification, protocol
from trex_models.transfer.cache import FeatureCache
from trex_models.transfer.report import (
    describe_score,
    environment,
    format_table,
    new_report,
    summary,
)
from trex_models.transfer.task import Context, Entry, Plan
from trex_models.transfer.tasks import Job


def evaluate(
    models: Mapping[ModelOutput, FrozenModel],
    jobs: Sequence[Job],
    cache: FeatureCache,
    plan: Plan,
    output: Path,
    label: str = "",
    command: str = "",
) -> dict[str, Any]:
    """Evaluate a model on tasks; return the report, which is rewritten after each task.

    Args:
        models: Model by the kind of features that the tasks require.
        jobs: Pairs of task and dataset.
        cache: Cache of features and scores.
        plan: Settings.
        output: JSON file to write. A Markdown table and pictures are written next to it.
        label: Name of the model in tables and plots; by default its own name.
        command: Command line to report.
    """
    # With the classifier, if a task scores it: the hash of the weights identifies the report.
    model = models.get("logits") or models.get(None) or next(iter(models.values()))
    settings = {
        "protocol": protocol.describe(range(plan.seeds)),
        "cache_dtype": cache.dtype,
        "classifiers_device": plan.device,
        "training_task": plan.training_task,
        "command": command,
    }
    report = new_report(model, settings, label)
    for task, opened in jobs:
        task.protocol(opened, plan)  # errors are reported before anything is computed
    for number, job in enumerate(jobs, start=1):
        print(f"[{number}/{len(jobs)}] {job.data.summary()}, {job.task.name}", flush=True)
        context = Context(models[job.task.features], cache, plan)
        entry = evaluate_job(job, context)
        name = job.data.dataset.name
        if job.task.name == "classification":
            report["datasets"][name] = entry
            transfer = {k: v for k, v in report["datasets"].items() if k != plan.training_task}
            report["transfer"] = summary(transfer) if transfer else None
        else:
            report["tasks"].setdefault(job.task.name, {})[name] = entry
        report["complete"] = number == len(jobs)
        write_text_file(output, json.dumps(report, indent=2) + "\n")
        write_text_file(output.with_suffix(".md"), format_table([report], markdown=True))
        print(f"      {describe_score(entry)}", flush=True)
        if job.task.has_picture:
            picture = output.with_name(f"{output.stem}.{name}.{job.task.name}.png")
            plotting.save(job.task.draw(job.data, entry, context), picture)
            print(f"      wrote {picture}", flush=True)
    return report


def evaluate_job(job: Job, context: Context) -> Entry:
    """Evaluate a model on one task and dataset; return the entry of the report."""
    (task, opened), (model, cache, plan) = job, context
    description = opened.describe() | task.protocol(opened, plan)
    settings = {
        **description,
        "task": task.name,
        "features": [cache.identity(model, source) for source in opened.sources],
        "dtype": cache.dtype,
        "dependencies": task.dependencies(context),
        "device": plan.device,
        "versions": environment()["versions"],
    }

    def compute() -> Entry:
        started = time.monotonic()
        entry = task.evaluate(opened, context)
        entry.setdefault("seconds", {})["total"] = round(time.monotonic() - started, 2)
        return entry

    title = f"{opened.dataset.name}-{task.name}"
    entry = description | cache.scores(model, title, settings, compute)
    if plan.geometry and task.name == "classification":
        entry["geometry"] = classification.geometry(opened, context)
    return entry
