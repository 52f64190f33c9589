"""Images of a reproduction: links to the user's folders, and what is missing or damaged."""

from __future__ import annotations

import csv
import io
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.reproduce.plan import SETS, Plan
from trex_models.atomic import write_text_file
from trex_models.data.image_files import FolderSource
from trex_models.transfer.datasets import DATASETS, OpenedDataset, open_checked, select
from trex_models.transfer.readers import imagenet_classes
from trex_models.transfer.robustness import real_labels


class Found(NamedTuple):
    """The datasets of a reproduction."""

    task: OpenedDataset
    transfer: dict[str, OpenedDataset]
    missing: dict[str, str]
    """Transfer datasets that are not below the data root, with the folder that each needs."""


def link(plan: Plan) -> None:
    """Link ImageNet and the folders of the data root in OUTPUT/data, without copying images."""
    plan.data.mkdir(parents=True, exist_ok=True)
    for name, target in {**folders(plan), "imagenet": plan.imagenet}.items():
        place = plan.data / name
        if place.is_symlink() and place.readlink() != target.resolve():
            place.unlink()
        if not place.is_symlink():
            place.symlink_to(target.resolve())
    if plan.scale.subset:
        for part in ("train", "val"):
            _write_subset(plan, part)


def folders(plan: Plan) -> dict[str, Path]:
    """Return the folders in the data root, by name."""
    if plan.data_root is None:
        return {}
    return {path.name: path for path in sorted(plan.data_root.iterdir()) if path.is_dir()}


def _write_subset(plan: Plan, part: str) -> None:
    """List the images of the scale's classes in OUTPUT/data/imagenet100/PART.csv."""
    path = plan.data / plan.scale.task / f"{part}.csv"
    source = FolderSource(plan.imagenet / part)
    if absent := sorted(set(plan.scale.subset) - set(source.classes)):
        raise ValueError(
            f"{plan.imagenet / part} lacks {len(absent)} of the {len(plan.scale.subset)} classes "
            f"of the subset, such as {absent[0]}; unpack ImageNet again"
        )
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(("path", "label"))
    for index, label in enumerate(source.labels.tolist()):
        if source.classes[label] in plan.scale.subset:
            # Relative, so that images and output can be moved.
            file = os.fsdecode(source.paths[index])
            rows.writerow((f"../imagenet/{part}/{file}", source.classes[label]))
    path.parent.mkdir(exist_ok=True)
    write_text_file(path, text.getvalue())


def task_datasets(plan: Plan) -> str:
    """Return the training task for ``--datasets`` of the evaluation."""
    if not plan.scale.subset:
        return plan.scale.task
    path = str(plan.data / plan.scale.task).replace(",", "\\,")
    return f"{plan.scale.task}={path}"


def find(plan: Plan) -> Found:
    """Open the training task and the transfer datasets; check all that needs no decoding.

    Raises:
        ValueError: The training task is missing, or a dataset that exists is damaged.
    """
    task = open_checked(select(task_datasets(plan))[0], plan.data)
    if not plan.is_dry and not plan.scale.subset and task.sources[0].classes != imagenet_classes():
        raise ValueError(f"{plan.imagenet}: the class folders must be named n01440764, ...")
    if any(model.is_classifier for model in plan.models):
        real: Any = open_checked(DATASETS["imagenet-real"], plan.data).sources[0]
        real_labels(real)  # requires the official file names
    opened, missing = {}, {}
    for name in SETS[15]:
        folder = _folder(name)
        if (plan.data / folder).exists():
            opened[name] = open_checked(DATASETS[name], plan.data)
        else:
            missing[name] = folder
    return Found(task, opened, missing)


def _folder(name: str) -> str:
    """Return the first folder below the data root that a dataset needs."""
    found = re.search(r"[\w.-]+(?=/)", DATASETS[name].layout)
    assert found
    return found[0]


def require_folders(plan: Plan) -> None:
    """Raise a ValueError unless the folders of the images exist."""
    for option, folder in (("--imagenet", plan.imagenet), ("--data-root", plan.data_root)):
        if folder and not folder.is_dir():
            raise ValueError(f"{option} {folder} is not a folder; pass another")
    for part in ("train", "val"):
        if not (plan.imagenet / part).is_dir():
            raise ValueError(f"{plan.imagenet} has no folder {part}; pass ImageNet's folder")
