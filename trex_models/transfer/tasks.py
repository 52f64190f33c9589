"""The tasks of the evaluation, and selecting them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from trex_models.transfer.classification import Classification
from trex_models.transfer.datasets import Dataset, OpenedDataset, split_list
from trex_models.transfer.few_shot import FewShot
from trex_models.transfer.multi_label import MultiLabel
from trex_models.transfer.retrieval import Retrieval
from trex_models.transfer.robustness import Robustness
from trex_models.transfer.segmentation import Segmentation
from trex_models.transfer.task import SHOTS, Task


class Job(NamedTuple):
    """Task on an opened dataset."""

    task: Task
    data: OpenedDataset


# The default task of a dataset is the first one that supports its kind.
_ALL = (Classification(), FewShot(), Retrieval(), MultiLabel(), Segmentation(), Robustness())
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def select_tasks(
    names: str, datasets: Sequence[Dataset], shots: str = ""
) -> list[tuple[Task, Dataset]]:
    """Return the tasks to evaluate, dataset by dataset.

    Args:
        names: Comma-separated tasks; empty for the default task of each dataset.
        datasets: Datasets; each must have at least one of the tasks.
        shots: Argument of --shots; adds the task few-shot unless it is empty.

    Raises:
        ValueError: A task is unknown, or a task or a dataset is in no pair.
    """
    words = split_list(names)
    if unknown := [word for word in words if word not in TASKS]:
        raise ValueError(f"--task {unknown[0]} is not a task; choose from {', '.join(TASKS)}")
    pairs = []
    for dataset in datasets:
        known = [task for task in TASKS.values() if dataset.kind in task.kinds]
        chosen = [task for task in known if task.name in words] if words else known[:1]
        if shots and TASKS["few-shot"] in known and TASKS["few-shot"] not in chosen:
            chosen.append(TASKS["few-shot"])
        if not chosen:
            raise ValueError(
                f"--task {names}: {dataset.name} has only the tasks "
                f"{', '.join(task.name for task in known)}; add one of them, or omit the dataset"
            )
        pairs += [(task, dataset) for task in chosen]
    done = {task.name for task, _ in pairs}
    if unused := [word for word in (*words, *["few-shot"] * bool(shots)) if word not in done]:
        raise ValueError(
            f"none of the datasets has the task {unused[0]}; omit it, or add a dataset that has "
            "it, see the command list"
        )
    return pairs


def parse_shots(text: str) -> tuple[int, ...]:
    """Return the distinct numbers in a comma-separated list, ascending; SHOTS if it is empty."""
    words = [word.strip() for word in text.split(",")] if text else map(str, SHOTS)
    numbers = sorted({int(word) if word.isdecimal() else 0 for word in words})
    if not numbers[0]:
        raise ValueError(f"--shots must be positive integers such as 1,2,5,10, got {text}")
    return tuple(numbers)
