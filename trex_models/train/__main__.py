"""Train t-ReX models from the command line.

    python -m trex_models.train RECIPE --output DIR [--OPTION VALUE ...]
    python -m trex_models.train RUN/config.json --output DIR [--OPTION VALUE ...]
    python -m trex_models.train RECIPE --benchmark [--OPTION VALUE ...]
    python -m trex_models.train export RUN_OR_CHECKPOINT --output DIR

``python -m trex_models.train RECIPE --help`` lists the options. The settings of a run are in its
config.json, which can be edited and takes the place of a recipe. To resume an interrupted run from
its last checkpoint, run the same command again. --benchmark measures the speed of loading and
training on this machine in about a minute, without training a model. To train on several GPUs:

    torchrun --nproc-per-node 4 -m trex_models.train trex --data.path IMAGES --output DIR
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from trex_models import cli
from trex_models.train import auto
from trex_models.train.config import Config, load_config
from trex_models.train.recipes import RECIPES

_PROGRAM = "python -m trex_models.train"
_BENCHMARK = "--benchmark"
_ABOUT_BENCHMARK = f"""
Add {_BENCHMARK} to measure the speed of loading and training on this machine in about a minute.
No model is trained, no file is written, and --output is not needed.
"""


def main(arguments: Sequence[str], exits: bool = False) -> int:
    """Run the command; return its exit status. Set ``exits`` if the process exits afterwards."""
    return cli.run(partial(_command, exits=exits), arguments, "train")


def _command(arguments: list[str], exits: bool) -> None:
    command, *rest = arguments or [""]
    if command in ("", "-h", "--help"):
        about = {name: inspect.getdoc(recipe) or "" for name, recipe in RECIPES.items()}
        recipes = [f"  {name:<20}{doc.partition(chr(10))[0]}" for name, doc in about.items()]
        print("\n".join([(__doc__ or "").strip(), "", "Recipes:", *recipes]))
        if not arguments:
            raise SystemExit(2)
    elif command == "export":
        cli.call(export, rest, prog=f"{_PROGRAM} export")
    elif command.startswith("-"):
        raise ValueError(f"the recipe must come first: {_PROGRAM} RECIPE {command} ...")
    elif command not in RECIPES and not command.endswith(".json"):
        names = f"{', '.join(RECIPES)}, or export"
        raise ValueError(f"unknown recipe {command!r}; choose from {names}, or a config.json")
    elif _BENCHMARK in rest:
        from trex_models.train.benchmark import benchmark

        benchmark(parse(command, [a for a in rest if a != _BENCHMARK], needs_output=False))
    else:
        from trex_models.train.loop import train

        train(parse(command, rest), exits)


def parse(recipe: str, arguments: Sequence[str], needs_output: bool = True) -> Config:
    """Apply command-line options to a recipe or file, and print usage errors once for all ranks."""
    import tyro

    output: Any = tyro.MISSING if needs_output else ""
    if recipe in RECIPES:
        default, about = RECIPES[recipe](output), inspect.getdoc(RECIPES[recipe]) or ""
    else:
        # Its license may be that of other initial weights or of another teacher.
        default = replace(load_config(Path(recipe)), output=output, license="")
        about = f"Settings of {recipe}."
    with ExitStack() as stack:
        if cli.rank():  # every rank parses, and rank 0 prints usage errors for all
            silence = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(redirect_stdout(silence))
            stack.enter_context(redirect_stderr(silence))
        config: Config = cli.call(
            Config,
            arguments,
            prog=f"{_PROGRAM} {recipe}",
            description=f"{about}\n{_ABOUT_BENCHMARK}",
            default=default,
            config=(tyro.conf.AvoidSubcommands,),
        )
    if recipe != "auto":
        return config
    return auto.choose(config, arguments, (lambda _: None) if cli.rank() else print)


def export(checkpoint: Path, /, *, output: Path, license: str | None = None) -> None:  # noqa: A002
    """Export a checkpoint, or the last checkpoint of a run, as timm folders.

    Example: python -m trex_models.train export runs/trex --output exported --license mit

    Args:
        checkpoint: Folder of a run, or checkpoint file.
        output: Folder for the exported models.
        license: License of the exported models. If unset: the license of the run.
    """
    from trex_models.train.export import export_checkpoint

    for folder in export_checkpoint(checkpoint, output, license):
        print(f"exported {folder}")


if __name__ == "__main__":
    status = main(sys.argv[1:], exits=True)
    if status and cli.process_prefix():
        # Skip Python's shutdown: NCCL would wait for the other ranks, and they for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
