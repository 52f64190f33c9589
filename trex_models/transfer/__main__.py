"""Evaluate frozen features of any timm model by the protocol of the t-ReX paper.

    python -m trex_models.transfer --model NAME_OR_DIR --data-sets A,B --out REPORT.json
    python -m trex_models.transfer table REPORT... [--markdown]
    python -m trex_models.transfer plot REPORT... --out PICTURE [--kind KIND] [--published]
    python -m trex_models.transfer list

The first writes REPORT.json and REPORT.md. The same command goes on where one was interrupted.
"list" tells the data sets, what must lie where, and the groups: offline needs no data.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from trex_models.cli import default_device, natural, positive, require_writable, run
from trex_models.machine import free_cores
from trex_models.transfer.encoders import PRECISIONS, PREPROCESSING
from trex_models.transfer.published import PUBLISHED


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status: 0, or 2 with a short message on bad input."""
    return run(_command, arguments, "transfer")


def _command(arguments: Sequence[str]) -> None:
    commands = {"table": _table, "plot": _plot, "list": _list}
    first = arguments[0] if arguments else "--help"
    if first in commands:
        commands[first](arguments[1:])
    elif first.startswith("-"):
        _evaluate(arguments or ["--help"])
    else:
        raise ValueError(f"{first!r} is no command: {', '.join(commands)}, or --model ...")


def _evaluate(arguments: Sequence[str]) -> None:
    options = _evaluation_parser().parse_args(arguments)
    require_writable(options.out, ".json")
    from trex_models.transfer.cache import FeatureCache
    from trex_models.transfer.datasets import open_checked, select
    from trex_models.transfer.encoders import calibrated, load
    from trex_models.transfer.evaluate import Plan, Task, evaluate
    from trex_models.transfer.report import table

    data_sets = select(options.data_sets)
    training_task = _training_task([data_set.name for data_set in data_sets], options.training_task)
    encoder = load(
        options.model,
        prepare=options.preprocessing,
        precision=options.precision,
        untrained=options.untrained,
        device=options.device,
        hint="--untrained evaluates the architecture without weights",
    )
    tasks = [Task(data_set, *open_checked(data_set, options.data_root)) for data_set in data_sets]
    if options.untrained and encoder.facts["parameters"]:
        first = next((t for t in tasks if t.data_set.name == training_task), tasks[0])
        encoder = calibrated(encoder, first.train, first.data_set.name, options.workers)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    cache = FeatureCache(
        root=_cache_folder(options),
        dtype=options.cache_dtype,
        batch_size=options.batch_size,
        workers=options.workers,
    )
    plan = Plan(
        seeds=options.seeds,
        training_task=training_task,
        analyses=options.analyses,
        device=options.device,
    )
    command = f"python -m trex_models.transfer {shlex.join(arguments)}"
    report = evaluate(encoder, tasks, cache, plan, options.out, options.label, command)
    print(f"\n{table([report])}\n")
    print(f"wrote {options.out} and {options.out.with_suffix('.md')}")


def _evaluation_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trex_models.transfer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help='timm model, folder of one, finished run, or "pixels"')
    add("--data-sets", required=True, help='names and groups, as "list" tells, or NAME=FOLDER')
    add("--out", type=Path, required=True, help="the report, a .json file")
    add("--data-root", type=Path, default=Path("data"), help="where data sets lie (data)")
    add("--training-task", help="what the model was trained on (imagenet, if it is asked for)")
    add("--label", help="what tables and pictures call the model")
    add("--preprocessing", default="transfer", choices=PREPROCESSING, help="(transfer)")
    add("--precision", default="fp32", choices=PRECISIONS, help="of the model (fp32)")
    add("--untrained", action="store_true", help="random weights, BatchNorm of the first images")
    add("--seeds", type=positive, default=5, help="validation splits to average over (5)")
    add("--analyses", action="store_true", help="also coding length, spectrum, sparsity, distances")
    add("--cache", type=Path, help="where features are kept (features/ beside the report)")
    add("--cache-dtype", default="float32", choices=("float32", "float16"), help="(float32)")
    add("--device", default=default_device(), help="for model and classifiers (%(default)s)")
    add("--batch-size", type=positive, default=256, help="images at a time (256)")
    add("--workers", type=natural, default=_cores(), help="loader processes (%(default)s)")
    return parser


def _table(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m trex_models.transfer table")
    parser.add_argument("reports", type=Path, nargs="+", help="reports of models")
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table")
    options = parser.parse_args(arguments)
    from trex_models.transfer.report import read_report, table

    print(table([read_report(path) for path in options.reports], options.markdown))


def _plot(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m trex_models.transfer plot")
    add = parser.add_argument
    add("reports", type=Path, nargs="+", help="reports of models")
    add("--out", type=Path, required=True, help="picture, .png, .svg or .pdf")
    add("--kind", choices=("scatter", "bars", "geometry"), default="scatter", help="(scatter)")
    add("--data-set", help="geometry: whose spectra are drawn (the first one that all have)")
    add(
        "--published",
        nargs="?",
        const="paper",
        choices=tuple(PUBLISHED),
        help="scatter: also points that the authors published (paper)",
    )
    options = parser.parse_args(arguments)
    from trex_models import plotting
    from trex_models.transfer import pictures
    from trex_models.transfer.report import read_report, require_same_images

    plotting.require_picture(options.out)
    reports = [read_report(path) for path in options.reports]
    require_same_images(reports)
    figure = {
        "scatter": lambda: pictures.scatter(reports, options.published),
        "bars": lambda: pictures.bars(reports),
        "geometry": lambda: pictures.geometry(reports, options.data_set),
    }[options.kind]()
    plotting.save(figure, options.out)
    print(f"wrote {options.out}")


def _list(arguments: Sequence[str]) -> None:
    argparse.ArgumentParser(prog="python -m trex_models.transfer list").parse_args(arguments)
    from trex_models.transfer.datasets import DATASETS, GROUPS

    for data_set in DATASETS.values():
        print(f"{data_set.name:<18}{data_set.title}; {data_set.layout}")
    print()
    for group, names in GROUPS.items():
        print(f"{group:<18}{', '.join(names)}")


def _training_task(names: Sequence[str], asked: str | None) -> str | None:
    if asked is None:
        return "imagenet" if "imagenet" in names else None
    if asked not in names:
        raise ValueError(
            f"--training-task {asked} is not among the data sets ({', '.join(names)}); add it to "
            "--data-sets"
        )
    return asked


def _cache_folder(options: argparse.Namespace) -> Path:
    folder: Path = options.cache or options.out.parent / "features"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
        raise ValueError(f"--cache {folder} cannot be used ({reason}); name a folder") from error
    return folder


def _cores() -> int:
    """Return how many loader processes: a core each, but one where the cores compute the model."""
    return min(free_cores(), 16) if default_device() == "cuda" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
