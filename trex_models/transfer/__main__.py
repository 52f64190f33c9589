"""Evaluate the frozen features of any timm model with the protocol of the t-ReX paper."""

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

# Without CUDA, the model itself needs the cores.
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
    """Evaluate a model on datasets. The same command resumes an interrupted evaluation.

    Example: python -m trex_models.transfer evaluate --model pixels --datasets small --output r.json

    Args:
        model: A timm model, hf-hub:OWNER/NAME, a timm folder, a run directory, or "pixels".
        datasets: Comma-separated names and groups, see the command "list", and NAME=PATH for your
            own class folders. The group "offline" needs no data.
        output: Report to write, .json. A table, .md, is written next to it.
        data_root: Folder that contains the datasets.
        training_task: Dataset that the model was trained on; it is excluded from the transfer
            score. Defaults to imagenet, if that is among the datasets.
        label: Name of the model in tables and plots. Defaults to the value of --model.
        preprocessing: Resize the shorter side to the crop size (transfer), to 256 for a crop of
            224 (validation), or as in the model's configuration (model).
        precision: Floating-point precision of the model.
        untrained: Use random weights, with BatchNorm statistics of training images.
        seeds: Number of validation splits to average over.
        geometry: Also report coding length, spectrum, sparsity and class distances.
        cache: Folder of the cached features. Defaults to features/ next to the report.
        dtype: Data type of cached features. float16 halves their size and rounds by up to 5e-4.
        device: Device of the model and the classifiers: auto, cpu, cuda, ...
        batch_size: Images per batch.
        workers: Number of loader workers.
    """
    command = _command_line(locals())
    cli.require_writable(output, ".json")
    cli.require_at_least(1, seeds=seeds, batch_size=batch_size)
    cli.require_at_least(0, workers=workers)
    chosen_device = choose_device(device)
    device = chosen_device.type if device == "auto" else device
    chosen = select(datasets)
    names = [dataset.name for dataset in chosen]
    if training_task is None and "imagenet" in names:
        training_task = "imagenet"
    if training_task not in (None, *names):
        raise ValueError(f"--training-task {training_task} is not in --datasets; add it there")
    frozen = FrozenModel.load(
        model,
        preprocessing=preprocessing,
        precision=precision,
        untrained=untrained,
        device=device,
        hint="" if untrained else "--untrained evaluates the architecture with random weights",
    )
    tasks = [Task(dataset, *open_checked(dataset, data_root)) for dataset in chosen]
    if untrained and frozen.metadata["parameters"]:
        first = next((task for task in tasks if task.dataset.name == training_task), tasks[0])
        frozen = frozen.recalibrate_batchnorm(first.train, first.dataset.name, workers)
    root = cache or output.parent / "features"
    if root.exists() and not root.is_dir():
        raise ValueError(f"--cache {root} is not a folder; pass a folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    features = FeatureCache(root=root, dtype=dtype, batch_size=batch_size, workers=workers)
    plan = Plan(seeds=seeds, training_task=training_task, geometry=geometry, device=device)
    report = evaluate(frozen, tasks, features, plan, output, label, command)
    print(f"\n{format_table([report])}\n")
    print(f"wrote {output} and {output.with_suffix('.md')}")


def _command_line(options: Mapping[str, Any]) -> str:
    words = ["python", "-m", "trex_models.transfer", "evaluate"]
    for name, parameter in signature(evaluate_model).parameters.items():
        if options[name] != parameter.default:
            words.append(f"--{name.replace('_', '-')}")
            words += [] if options[name] is True else [str(options[name])]
    return join(words)


def print_table(reports: list[Path], /, *, markdown: bool = False) -> None:
    """Print the scores of one or more models, one row per dataset.

    Example: python -m trex_models.transfer table trex.json pixels.json --markdown

    Args:
        reports: Reports written by the command "evaluate".
        markdown: Format the table as Markdown.
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
    """Plot the scores of one or more models.

    Example: python -m trex_models.transfer plot trex.json pixels.json --output scatter.png

    Args:
        reports: Reports written by the command "evaluate"; optional with --published.
        output: Image to write, .png, .svg or .pdf.
        kind: Scatter plot as in the paper, bars of accuracies, or geometry of the features.
        dataset: Dataset of the spectra in --kind geometry. Defaults to the first with geometry.
        published: Add the authors' results to the scatter plot, from the paper's figure (13
            datasets) or from the table of released models (15 datasets).
    """
    plotting.require_picture(output)
    if not (published or reports) or (published and kind != "scatter"):
        raise ValueError("pass one or more reports, or use --published with --kind scatter")
    loaded = [read_report(path) for path in reports]
    require_same_images(loaded)
    draw = {
        "scatter": partial(pictures.scatter, loaded, published),
        "bars": partial(pictures.bars, loaded),
        "geometry": partial(pictures.geometry, loaded, dataset),
    }[kind]
    plotting.save(draw(), output)
    print(f"wrote {output}")


def list_datasets() -> None:
    """List the datasets with their required files, and the groups of datasets.

    Example: python -m trex_models.transfer list
    """
    for dataset in DATASETS.values():
        print(f"{dataset.name:<18}{dataset.title}; {dataset.layout}")
    print()
    for group, names in GROUPS.items():
        print(f"{group:<18}{', '.join(names)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
