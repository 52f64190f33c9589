"""Evaluate the frozen features of timm models.

Tasks: the transfer protocol of the t-ReX paper, few-shot and multi-label classification, retrieval,
segmentation, and the robustness of ImageNet classifiers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from shlex import join
from typing import Any, Literal

from trex_models import cli, plotting
from trex_models.evaluation.frozen_model import FrozenModel, ModelOutput, Preprocessing
from trex_models.precision import PrecisionName, choose_device, free_cores
from trex_models.pretrained import figure
from trex_models.transfer import pictures
from trex_models.transfer.cache import FeatureCache, slug
from trex_models.transfer.datasets import (
    DATASETS,
    GROUPS,
    Dataset,
    OpenedDataset,
    open_checked,
    select,
    split_list,
)
from trex_models.transfer.evaluate import evaluate
from trex_models.transfer.report import format_table, read_report, require_same_images
from trex_models.transfer.task import Plan, Task
from trex_models.transfer.tasks import TASKS, Job, parse_shots, select_tasks

# Without CUDA, the model itself needs the cores.
_WORKERS = min(free_cores(), 16) if choose_device().type == "cuda" else 1


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status: 0, or 2 with a short message on bad input."""
    return cli.main(
        {"evaluate": evaluate_models, "table": print_table, "plot": plot, "list": list_datasets},
        arguments,
        prog="python -m trex_models.transfer",
        description=__doc__,
        extra="transfer",
    )


def evaluate_models(
    *,
    model: str,
    datasets: str,
    output: Path,
    task: str = "",
    shots: str = "",
    episodes: int = 20,
    whiten: str = "",
    iterations: int = 0,
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
    """Evaluate models on datasets. The same command resumes an interrupted evaluation.

    Example: python -m trex_models.transfer evaluate --model pixels --datasets small --output r.json

    Args:
        model: Comma-separated models: a timm model, hf-hub:OWNER/NAME, a timm folder, a run
            directory, a model of the paper's figure, such as dino_resnet50, "figure" for all of
            these, or "pixels".
        datasets: Comma-separated names and groups, see the command "list", and NAME=PATH for your
            own images. The group "offline" needs no data.
        output: Report to write, .json, with a table, .md, and pictures next to it. For several
            models, the folder of their reports.
        task: Comma-separated tasks, see the command "list". Defaults to each dataset's first task.
        shots: Comma-separated numbers of images per class for the task few-shot, which they add.
        episodes: Number of random draws of these images.
        whiten: Dataset from whose training images PCA whitening is learned, for retrieval.
        iterations: Training iterations of the segmentation head; 0 for the dataset's default.
        data_root: Folder that contains the datasets.
        training_task: Dataset that the model was trained on, excluded from the transfer score.
            Defaults to imagenet, if that is among the datasets.
        label: Name of the model in tables and plots. Defaults to its name.
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
    cli.require_at_least(1, seeds=seeds, batch_size=batch_size, episodes=episodes)
    cli.require_at_least(0, workers=workers, iterations=iterations)
    outputs, pairs = _outputs(model, label, output), select_tasks(task, select(datasets), shots)
    root = cache or (output if len(outputs) > 1 else output.parent) / "features"
    if root.exists() and not root.is_dir():
        raise ValueError(f"--cache {root} is not a folder; pass a folder")
    device = choose_device().type if device == "auto" else device
    features = FeatureCache(root=root, dtype=dtype, batch_size=batch_size, workers=workers)
    plan = Plan(seeds=seeds, geometry=geometry, device=device, episodes=episodes)
    plan = replace(plan, shots=parse_shots(shots), iterations=iterations)
    plan = replace(plan, training_task=_training_task(training_task, pairs))
    load = partial(_load, pairs, preprocessing, precision, untrained, device)
    open_dataset = partial(open_checked, root=data_root)
    _evaluate(outputs, pairs, plan, features, load, open_dataset, whiten, label, command)


def _evaluate(
    outputs: dict[str, Path],
    pairs: Sequence[tuple[Task, Dataset]],
    plan: Plan,
    features: FeatureCache,
    load: Callable[[str], dict[ModelOutput, FrozenModel]],
    open_dataset: Callable[[Dataset], OpenedDataset],
    whiten: str,
    label: str,
    command: str,
) -> None:
    """Open the datasets, evaluate the models one after the other, and print their table."""
    for name in reversed(outputs):  # invalid models are reported before the data are opened
        loaded, first = load(name), name
    opened = {dataset.name: open_dataset(dataset) for _, dataset in pairs}
    if whiten:
        dataset = _whitening(whiten, pairs)
        plan = replace(plan, whiten=opened.get(whiten) or open_dataset(dataset))
    jobs = [Job(task, opened[dataset.name]) for task, dataset in pairs]
    calibration = opened.get(plan.training_task or "", jobs[0].data)
    reports = []
    for name, path in outputs.items():
        models = loaded if name == first else load(name)
        for kind, frozen in models.items():
            if frozen.metadata["untrained"] and frozen.metadata["parameters"]:
                title, source = calibration.dataset.name, calibration.sources[0]
                models[kind] = frozen.recalibrate_batchnorm(source, title, features.workers)
        title = label or figure.TITLES.get(name, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        reports.append(evaluate(models, jobs, features, plan, path, title, command))
    print(f"\n{format_table(reports)}\n")
    for path in outputs.values():
        print(f"wrote {path} and {path.with_suffix('.md')}")


def _outputs(model: str, label: str, output: Path) -> dict[str, Path]:
    """Return the report of each model of the list; check that they can be written."""
    listed = [figure.FIGURE if name == "figure" else [name] for name in split_list(model)]
    names = list(dict.fromkeys(name for part in listed for name in part))
    outputs = {name: output / f"{slug(name)}.json" for name in names}
    if len(names) == 1:
        outputs = {names[0]: output}
    elif label:
        raise ValueError(f"--label names one model, but --model lists {len(names)}; omit --label")
    elif output.suffix == ".json":
        raise ValueError(f"--output {output} must be a folder for several models")
    if not names or len(set(outputs.values())) < len(names):
        raise ValueError(f"--model {model} names no model, or two whose reports have one name")
    for path in outputs.values():
        cli.require_writable(path, ".json")
    return outputs


def _training_task(name: str | None, pairs: Sequence[tuple[Task, Dataset]]) -> str | None:
    known = {dataset.name for task, dataset in pairs if task.name == "classification"}
    if name is None and "imagenet" in known:
        return "imagenet"
    if name not in (None, *known):
        raise ValueError(
            f"--training-task {name} is not a dataset of the task classification; add it"
        )
    return name


def _load(
    pairs: Sequence[tuple[Task, Dataset]],
    preprocessing: Preprocessing,
    precision: PrecisionName,
    untrained: bool,
    device: str,
    name: str,
) -> dict[ModelOutput, FrozenModel]:
    """Load a model once for each kind of features that the tasks require."""
    tasks = [task for task, _ in pairs]
    if untrained and any(task.features == "logits" for task in tasks):
        raise ValueError("--untrained has no classifier for the task robustness; omit one of them")
    hint = "--untrained evaluates the architecture with random weights"
    models = {
        kind: FrozenModel.load(
            name,
            features=kind,
            preprocessing=preprocessing,
            precision=precision,
            untrained=untrained,
            device=device,
            hint="" if untrained or kind == "logits" else hint,
        )
        for kind in dict.fromkeys(task.features for task in tasks)
    }
    for task in tasks:
        task.check_model(models[task.features])
    return models


def _whitening(name: str, pairs: Sequence[tuple[Task, Dataset]]) -> Dataset:
    ranked = [dataset for task, dataset in pairs if task.name == "retrieval"]
    if not ranked:
        raise ValueError(f"--whiten {name} is for the task retrieval; add --task retrieval")
    own = {dataset.name: dataset for _, dataset in pairs}
    chosen = [own[name]] if name in own else select(name)
    if len(chosen) > 1 or chosen[0].kind == "imagenet":
        raise ValueError(f"--whiten {name} must be one dataset with training images or a gallery")
    if chosen[0].kind != "classes" and chosen[0].name in {dataset.name for dataset in ranked}:
        raise ValueError(f"--whiten {name} is also ranked; choose a dataset with other images")
    return chosen[0]


def _command_line(options: Mapping[str, Any]) -> str:
    words = ["python", "-m", "trex_models.transfer", "evaluate"]
    for name, parameter in signature(evaluate_models).parameters.items():
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
    kind: Literal["scatter", "bars", "geometry", "shots", "tasks"] = "scatter",
    dataset: str | None = None,
    published: Literal["paper", "released"] | None = None,
) -> None:
    """Plot the scores of one or more models.

    Example: python -m trex_models.transfer plot trex.json pixels.json --output scatter.png

    Args:
        reports: Reports written by the command "evaluate"; optional with --published.
        output: Image to write, .png, .svg or .pdf.
        kind: Scatter plot as in the paper, bars of accuracies, geometry of the features, few-shot
            accuracies over the number of shots, or bars of the first score of the other tasks.
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
        "shots": partial(pictures.shots, loaded),
        "tasks": partial(pictures.tasks, loaded),
    }[kind]
    plotting.save(draw(), output)
    print(f"wrote {output}")


def list_datasets() -> None:
    """List the tasks, the datasets with sizes and required files, and the groups of datasets.

    Example: python -m trex_models.transfer list
    """
    for task in TASKS.values():
        print(f"--task {task.name:<16}{task.title}")
    print()
    for dataset in DATASETS.values():
        tasks = [task.name for task in TASKS.values() if dataset.kind in task.kinds]
        counts = zip(dataset.sizes, ("classes", "training", "test"), strict=True)
        sizes = ", ".join(f"{count:,} {name}" for count, name in counts if (count or 1) > 1)
        print(f"{dataset.name:<18}{dataset.title} ({sizes}); {dataset.layout}; {', '.join(tasks)}")
    print()
    for group, names in GROUPS.items():
        print(f"{group:<18}{', '.join(names)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
