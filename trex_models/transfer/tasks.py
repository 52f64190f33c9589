"""Tasks of the evaluation: names, required datasets and model outputs; selecting them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from trex_models.evaluation.frozen_model import FeaturesName
from trex_models.transfer import classification, few_shot, retrieval, segmentation
from trex_models.transfer.datasets import Dataset, OpenedDataset


@dataclass(frozen=True, kw_only=True)
class Task:
    """Task on frozen features."""

    name: str
    title: str
    kinds: tuple[str, ...]
    """Kinds of datasets that have this task."""
    settings: Callable[..., dict[str, Any]]
    """Function from the dataset and the plan to the protocol, for the report."""
    run: Callable[..., dict[str, Any]]
    """Function from model, dataset, cache and plan to the results, with ``scores``."""
    draw: Callable[..., Any] | None = None
    """Function from model, dataset, results and cache to a figure."""
    features: FeaturesName | None = None
    """Output of the model that the task requires; see ``FrozenModel.load``."""


class Job(NamedTuple):
    """Task on an opened dataset."""

    task: Task
    data: OpenedDataset


# The default task of a dataset is the first one that supports its kind.
_ALL = [
    Task(
        name="classification",
        title="linear classifiers and k-NN, the transfer protocol of the paper",
        kinds=("classes",),
        settings=classification.settings,
        run=classification.run,
    ),
    Task(
        name="few-shot",
        title="logistic regression and nearest class mean on a few images per class",
        kinds=("classes",),
        settings=few_shot.settings,
        run=few_shot.run,
    ),
    Task(
        name="retrieval",
        title="ranking of images by cosine similarity",
        kinds=("gallery", "landmarks", "classes"),
        settings=retrieval.settings,
        run=retrieval.run,
        draw=retrieval.draw,
    ),
    Task(
        name="segmentation",
        title="a linear head on the last feature map, DINOv2's protocol",
        kinds=("masks",),
        settings=segmentation.settings,
        run=segmentation.run,
        draw=segmentation.draw,
        features="features_only",
    ),
]
TASKS = {task.name: task for task in _ALL}


def select_tasks(
    names: str, datasets: Sequence[Dataset], few_shot: bool = False
) -> list[tuple[Task, Dataset]]:
    """Return the tasks to evaluate, dataset by dataset.

    Args:
        names: Comma-separated tasks; empty for the default task of each dataset.
        datasets: Datasets; each must have at least one of the tasks.
        few_shot: If True, add the task few-shot.

    Raises:
        ValueError: A task is unknown, or a task or a dataset is in no pair.
    """
    words = list(dict.fromkeys(filter(None, map(str.strip, names.split(",")))))
    if unknown := [word for word in words if word not in TASKS]:
        raise ValueError(f"--task {unknown[0]} is not a task; choose from {', '.join(TASKS)}")
    pairs = []
    for dataset in datasets:
        known = [task for task in TASKS.values() if dataset.kind in task.kinds]
        chosen = [task for task in known if task.name in words] if words else known[:1]
        if few_shot and TASKS["few-shot"] in known and TASKS["few-shot"] not in chosen:
            chosen.append(TASKS["few-shot"])
        if not chosen:
            raise ValueError(
                f"--task {names}: {dataset.name} has only the tasks "
                f"{', '.join(task.name for task in known)}; add one of them, or omit the dataset"
            )
        pairs += [(task, dataset) for task in chosen]
    done = {task.name for task, _ in pairs}
    if unused := [word for word in (*words, *["few-shot"] * few_shot) if word not in done]:
        raise ValueError(
            f"none of the datasets has the task {unused[0]}; omit it, or add a dataset that has "
            "it, see the command list"
        )
    return pairs
