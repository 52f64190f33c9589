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
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from errno import EISDIR
from pathlib import Path
from tempfile import TemporaryFile

from trex_models.machine import free_cores
from trex_models.transfer.encoders import PRECISIONS, PREPROCESSING
from trex_models.transfer.published import PUBLISHED


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status: 0, or 2 with a short message on bad input."""
    commands = {"table": _table, "plot": _plot, "list": _list}
    first = arguments[0] if arguments else "--help"
    try:
        if first in commands:
            commands[first](arguments[1:])
        elif first.startswith("-"):
            _evaluate(arguments or ["--help"])
        else:
            raise ValueError(f"{first!r} is no command: {', '.join(commands)}, or --model ...")
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("TREX_TRACEBACK"):
            raise
        if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("trex_models"):
            remedy = "pip install trex-models[transfer]"
            error = ValueError(f"the evaluation needs another package, {error.name}: {remedy}")
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _evaluate(arguments: Sequence[str]) -> None:
    options = _evaluation_parser().parse_args(arguments)
    _require_writable(options.out)
    from trex_models.transfer.cache import FeatureCache
    from trex_models.transfer.data_sets import open_checked, select
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
    )
    tasks = [Task(data_set, *open_checked(data_set, options.data_root)) for data_set in data_sets]
    if options.untrained and encoder.facts["parameters"]:
        first = next((t for t in tasks if t.data_set.name == training_task), tasks[0])
        encoder = calibrated(encoder, first.train, first.data_set.name, options.workers)
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
    add("--seeds", type=_positive, default=5, help="validation splits to average over (5)")
    add("--analyses", action="store_true", help="also coding length, spectrum, sparsity, distances")
    add("--cache", type=Path, help="where features are kept (features/ beside the report)")
    add("--cache-dtype", default="float32", choices=("float32", "float16"), help="(float32)")
    add("--device", default=_default_device(), help="for model and classifiers (%(default)s)")
    add("--batch-size", type=_positive, default=256, help="images at a time (256)")
    add("--workers", type=_natural, default=_cores(), help="loader processes (%(default)s)")
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
    add("--kind", choices=("scatter", "bars", "analyses"), default="scatter", help="(scatter)")
    add("--data-set", help="analyses: whose spectra are drawn (the first one that all have)")
    add(
        "--published",
        nargs="?",
        const="paper",
        choices=tuple(PUBLISHED),
        help="scatter: also points that the authors published (paper)",
    )
    options = parser.parse_args(arguments)
    from trex_models.transfer import pictures
    from trex_models.transfer.report import read_report, require_same_images

    reports = [read_report(path) for path in options.reports]
    require_same_images(reports)
    figure = {
        "scatter": lambda: pictures.scatter(reports, options.published),
        "bars": lambda: pictures.bars(reports),
        "analyses": lambda: pictures.analyses(reports, options.data_set),
    }[options.kind]()
    pictures.save(figure, options.out)
    print(f"wrote {options.out}")


def _list(arguments: Sequence[str]) -> None:
    argparse.ArgumentParser(prog="python -m trex_models.transfer list").parse_args(arguments)
    from trex_models.transfer.data_sets import DATA_SETS, GROUPS

    for data_set in DATA_SETS.values():
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


def _require_writable(out: Path) -> None:
    if out.suffix != ".json":
        raise ValueError(f"--out {out}: give a file that ends in .json")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out.parent):
            pass
        if out.is_dir():
            raise IsADirectoryError(EISDIR, "it is a folder")
    except OSError as error:
        reason = error.strerror
        raise ValueError(
            f"--out {out} cannot be written ({reason}); choose another place"
        ) from error


def _cache_folder(options: argparse.Namespace) -> Path:
    folder: Path = options.cache or options.out.parent / "features"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
        raise ValueError(f"--cache {folder} cannot be used ({reason}); name a folder") from error
    return folder


def _positive(text: str) -> int:
    return _at_least(1, text)


def _natural(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at least {least}, not {text!r}"
        )
    return int(text)


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _cores() -> int:
    """Return how many loader processes: a core each, but one where the cores compute the model."""
    return min(free_cores(), 16) if _default_device() == "cuda" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
