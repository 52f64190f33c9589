"""Images of a reproduction: links to the user's folders, and what is missing or damaged."""

from __future__ import annotations

import csv
import io
import os
import re
from pathlib import Path
from typing import Any

from benchmarks.reproduce.plan import SETS, Plan
from trex_models.atomic import write_text_file
from trex_models.data.image_files import FolderSource
from trex_models.transfer.datasets import DATASETS, OpenedDataset, open_checked, select
from trex_models.transfer.readers import imagenet_classes
from trex_models.transfer.robustness import real_labels


def link(plan: Plan) -> None:
    """Link ImageNet and the folders of the data root in OUTPUT/data, without copying images."""
    plan.data.mkdir(parents=True, exist_ok=True)
    for place in plan.data.iterdir():
        if place.is_symlink():
            place.unlink()
    targets = {**folders(plan), "imagenet": plan.imagenet}
    if plan.scale.subset:
        targets.pop(plan.scale.task, None)
    for name, target in targets.items():
        (plan.data / name).symlink_to(target.resolve())
    for part in ("train", "val") if plan.scale.subset else ():
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


def argument(plan: Plan, name: str) -> str:
    """Return a dataset's name as argument of ``--datasets``, with the path of a subset."""
    if name in DATASETS:
        return name
    path = str(plan.data / name).replace(",", "\\,")
    return f"{name}={path}"


def find(plan: Plan) -> tuple[dict[str, OpenedDataset], dict[str, list[str]]]:
    """Open the training task and the transfer datasets; check all that needs no decoding.

    Returns the datasets by name, and the folders that each missing transfer dataset lacks.

    Raises:
        ValueError: The training task is missing, or a dataset that exists is damaged.
    """
    task = open_checked(select(argument(plan, plan.scale.task))[0], plan.data)
    if plan.scale_name == "full" and task.sources[0].classes != imagenet_classes():
        raise ValueError(f"{plan.imagenet}: the class folders must be named n01440764, ...")
    if any(model.is_classifier for model in plan.models):
        real: Any = open_checked(DATASETS["imagenet-real"], plan.data).sources[0]
        real_labels(real)  # requires the official file names
    opened, missing = {plan.scale.task: task}, {}
    for name in SETS[15]:
        layout = re.sub(r"\(.*?\)", "", DATASETS[name].layout)
        needed = re.findall(r"(?<![\w/.-])[\w.-]+(?=/)", layout)  # folders in the data root
        absent = [folder for folder in {*needed} if not (plan.data / folder).exists()]
        if absent:
            missing[name] = sorted(absent)
        else:
            opened[name] = open_checked(DATASETS[name], plan.data)
    return opened, missing


def require_folders(plan: Plan) -> None:
    """Raise a ValueError unless the folders of the images exist."""
    for option, folder in (("--imagenet", plan.imagenet), ("--data-root", plan.data_root)):
        if folder and not folder.is_dir():
            raise ValueError(f"{option} {folder} is not a folder; pass another")
    for part in ("train", "val"):
        if not (plan.imagenet / part).is_dir():
            raise ValueError(f"{plan.imagenet} has no folder {part}; pass ImageNet's folder")
