"""Evaluate frozen features of any timm model by the protocol of the t-ReX paper."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from shlex import join
from typing import Any, Literal

from trex_models import cli, plotting
from trex_models.evaluation.frozen_model import FrozenModel, Preprocessing
from trex_models.precision import PrecisionName, choose_device, free_cores
from trex_models.transfer import pictures
from trex_models.transfer.datasets import DATASETS, GROUPS, open_checked, select
from trex_models.transfer.evaluate import FeatureCache, Plan, Task, evaluate
from trex_models.transfer.report import format_table, read_report, require_same_images

# On a CPU, the cores compute the model.
_WORKERS = min(free_cores(), 16) if choose_device().type == "cuda" else 1


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status: 0, or 2 with a short message on bad input."""
    return cli.main(
        {"evaluate": evaluate_model, "table": print_table, "plot": plot, "list": list_datasets},
        arguments,
        prog="python -m trex_models.transfer",
        description=__doc__,
        extra="transfer",
    )


def evaluate_model(
    *,
    model: str,
    datasets: str,
    output: Path,
    data_root: Path = Path("data"),
    training_task: str | None = None,
    label: str = "",
    preprocessing: Preprocessing = "transfer",
    precision: PrecisionName = "fp32",
    untrained: bool = False,
    seeds: int = 5,
    geometry: bool = False,
    cache: Path | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    device: str = "auto",
    batch_size: int = 256,
    workers: int = _WORKERS,
) -> None:
    """Score a model on datasets. The same command continues an interrupted one.

    Example: python -m trex_models.transfer evaluate --model pixels --datasets small --output r.json

    Args:
        model: A timm model, a timm folder, a finished run, hf-hub:OWNER/NAME, or "pixels".
        datasets: Comma-separated names and groups, as "list" prints them, and NAME=FOLDER for
            class folders of your own. The group offline needs no data.
        output: The report, .json; a table, .md, is written next to it.
        data_root: Folder of the datasets.
        training_task: Dataset that the model was trained on, which does not count as transfer. By
            default imagenet, if it is among the datasets.
        label: Name of the model in tables and pictures. By default its own.
        preprocessing: Resize the shorter side to the crop's, to 256 for 224 (validation), or as
            the model's own configuration says (model).
        precision: Number formats of the model.
        untrained: Random weights, with BatchNorm statistics of the first images.
        seeds: Number of validation splits to average over.
        geometry: Report coding length, spectrum, sparsity and distances of the features, too.
        cache: Folder of the features. By default features/ next to the report.
        dtype: Type of the features in their files. float16 halves them and rounds by up to 5e-4.
        device: Device of model and classifiers: auto, cpu, cuda, ...
        batch_size: Images per batch.
        workers: Loader processes.
    """
    command = _command_line(locals())
    cli.require_writable(output, ".json")
    cli.require_at_least(1, seeds=seeds, batch_size=batch_size)
    cli.require_at_least(0, workers=workers)
    place = choose_device(device)
    device = place.type if device == "auto" else device
    chosen = select(datasets)
    names = [dataset.name for dataset in chosen]
    if training_task is None and "imagenet" in names:
        training_task = "imagenet"
    if training_task not in (None, *names):
        raise ValueError(f"--training-task {training_task} is not in --datasets {','.join(names)}")
    frozen = FrozenModel.load(
        model,
        preprocessing=preprocessing,
        precision=precision,
        untrained=untrained,
        device=device,
        hint="" if untrained else "--untrained evaluates the architecture without weights",
    )
    tasks = [Task(dataset, *open_checked(dataset, data_root)) for dataset in chosen]
    if untrained and frozen.metadata["parameters"]:
        first = next((task for task in tasks if task.dataset.name == training_task), tasks[0])
        frozen = frozen.recalibrate_batchnorm(first.train, first.dataset.name, workers)
    root = cache or output.parent / "features"
    if root.exists() and not root.is_dir():
        raise ValueError(f"--cache {root} is no folder; name one")
    output.parent.mkdir(parents=True, exist_ok=True)
    kept = FeatureCache(root=root, dtype=dtype, batch_size=batch_size, workers=workers)
    settings = Plan(seeds=seeds, training_task=training_task, geometry=geometry, device=device)
    report = evaluate(frozen, tasks, kept, settings, output, label, command)
    print(f"\n{format_table([report])}\n")
    print(f"wrote {output} and {output.with_suffix('.md')}")


def _command_line(options: Mapping[str, Any]) -> str:
    """Return the command that repeats an evaluation, without options at their defaults."""
    words = ["python", "-m", "trex_models.transfer", "evaluate"]
    for name, parameter in signature(evaluate_model).parameters.items():
        if options[name] != parameter.default:
            words.append(f"--{name.replace('_', '-')}")
            words += [] if options[name] is True else [str(options[name])]
    return join(words)


def print_table(reports: list[Path], /, *, markdown: bool = False) -> None:
    """Print the scores of models, a line per dataset.

    Example: python -m trex_models.transfer table trex.json pixels.json --markdown

    Args:
        reports: Reports of models.
        markdown: Print a Markdown table.
    """
    print(format_table([read_report(path) for path in reports], markdown))


def plot(
    reports: tuple[Path, ...] = (),
    /,
    *,
    output: Path,
    kind: Literal["scatter", "bars", "geometry"] = "scatter",
    dataset: str | None = None,
    published: Literal["paper", "released"] | None = None,
) -> None:
    """Draw the scores of models.

    Example: python -m trex_models.transfer plot trex.json pixels.json --output scatter.png

    Args:
        reports: Reports of models; may be omitted with --published.
        output: The picture, .png, .svg or .pdf.
        kind: The paper's scatter plot, accuracies, or the geometry of features (--geometry).
        dataset: Dataset whose spectra are drawn (geometry). By default the first that all have.
        published: Points that the authors published, drawn too (scatter): of the paper's figure,
            over 13 datasets, or of the released models, over 15.
    """
    plotting.require_picture(output)
    if not (published or reports) or (published and kind != "scatter"):
        raise ValueError("give reports, or --published with --kind scatter for the authors' points")
    found = [read_report(path) for path in reports]
    require_same_images(found)
    draw = {
        "scatter": partial(pictures.scatter, found, published),
        "bars": partial(pictures.bars, found),
        "geometry": partial(pictures.geometry, found, dataset),
    }[kind]
    plotting.save(draw(), output)
    print(f"wrote {output}")


def list_datasets() -> None:
    """Print the datasets, their files, and the groups.

    Example: python -m trex_models.transfer list
    """
    for dataset in DATASETS.values():
        print(f"{dataset.name:<18}{dataset.title}; {dataset.layout}")
    print()
    for group, names in GROUPS.items():
        print(f"{group:<18}{', '.join(names)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
