"""Train t-ReX models from the command line.

    python -m trex_models.train RECIPE --output DIR [--FIELD VALUE ...]
    python -m trex_models.train RECIPE --benchmark [--FIELD VALUE ...]
    python -m trex_models.train export RUN_OR_CHECKPOINT --output DIR

``python -m trex_models.train RECIPE --help`` lists the fields. The same command continues a run
that was interrupted, from its last checkpoint. --benchmark measures for a minute how fast the
loader and the step are on this machine, trains nothing and writes nothing. On several GPUs:

    torchrun --nproc-per-node 4 -m trex_models.train trex --data.path IMAGES --output DIR
"""

from __future__ import annotations

import argparse
import inspect
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from trex_models.cli import prepare
from trex_models.train.config import RECIPES, Config

_BENCHMARK = "--benchmark"
_ABOUT_BENCHMARK = f"""
With {_BENCHMARK} beside these fields it measures for a minute how fast the loader and the step
are on this machine; it trains nothing, writes nothing, and needs no --output.
"""


def main(arguments: Sequence[str], exits: bool = False) -> int:
    """Run the command; return its exit status: 0, or 2 with a short message on bad input.

    Args:
        arguments: Those of the command line.
        exits: Whether the process exits afterwards, as ``loop.train``.
    """
    arguments = prepare(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    command, *rest = arguments
    if command == _BENCHMARK:
        return _fail(f"the recipe comes first: python -m trex_models.train RECIPE {_BENCHMARK}")
    measures = command in RECIPES and _BENCHMARK in rest
    if command != "export" and command not in RECIPES:
        return _fail(f"unknown recipe {command!r}; choose from {', '.join(RECIPES)}, or export")
    try:
        if command == "export":
            return _export(rest)
        with _first_process_speaks():
            config = parse(command, [a for a in rest if a != _BENCHMARK], measures)
        return _benchmark(config) if measures else _train(config, exits)
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("TREX_TRACEBACK"):
            raise
        status = _explain(error)
        if status is None:
            raise
        return status
    except KeyboardInterrupt:
        with _first_process_speaks():
            hope = "" if measures else "; the same command continues from the last checkpoint"
            print(f"interrupted{hope}")
        return 128 + signal.SIGINT


def _train(config: Config, exits: bool) -> int:
    from trex_models.train.loop import train
    from trex_models.train.signals import Stopped

    try:
        train(config, exits)
    except Stopped as stopped:
        if stopped.on_all_ranks:
            with _first_process_speaks():
                print(stopped)
        else:
            print(f"{_process()}{stopped}")
        return stopped.status
    return 0


def _benchmark(config: Config) -> int:
    from trex_models.train.benchmark import benchmark

    benchmark(config)
    return 0


def _explain(error: Exception) -> int | None:
    """Print an error that a user can do something about; None for a defect of ours."""
    import torch

    from trex_models.train.distributed import PeerError, SharedError

    if isinstance(error, SharedError):
        with _first_process_speaks():
            return _fail(str(error))
    if isinstance(error, PeerError):
        _fail(str(error), _process())
        return 1
    if isinstance(error, torch.OutOfMemoryError):
        reason = str(error).partition("\n")[0]
        return _fail(f"{reason} Lower optim.batch_size, or use more processes", _process())
    return _fail(str(error), _process()) if isinstance(error, (ValueError, OSError)) else None


@contextmanager
def _first_process_speaks() -> Iterator[None]:
    """Silence the others where all would print the same."""
    with ExitStack() as stack:
        if _rank() > 0:
            silence = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(redirect_stdout(silence))
            stack.enter_context(redirect_stderr(silence))
        yield


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _process() -> str:
    """Return which process this is, as the start of a message, where there are many."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return f"process {_rank()} of {processes}: " if processes > 1 else ""


def parse(recipe: str, arguments: Sequence[str], measures: bool = False) -> Config:
    """Apply command-line overrides to a recipe; exits with status 2 on an unknown field.

    Args:
        recipe: Its name.
        arguments: What overrides its fields.
        measures: Whether the run is for a benchmark, which needs no output.
    """
    try:
        import tyro
    except ImportError:
        raise ValueError(
            "the trainer needs more packages: pip install trex-models[train]"
        ) from None
    return tyro.cli(
        Config,
        default=RECIPES[recipe]("" if measures else tyro.MISSING),
        args=list(arguments),
        prog=f"python -m trex_models.train {recipe}",
        description=f"{inspect.getdoc(RECIPES[recipe]) or ''}\n{_ABOUT_BENCHMARK}",
        config=(tyro.conf.AvoidSubcommands,),
    )


def _export(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trex_models.train export",
        description="Export a run's last checkpoint, or any one, as timm folders.",
    )
    parser.add_argument("checkpoint", type=Path, help="a run's folder or a checkpoint file")
    parser.add_argument("--output", type=Path, required=True, help="where to write the folders")
    parser.add_argument("--license", help="licence to state; the run's own if it is not given")
    options = parser.parse_args(arguments)
    from trex_models.train.saved import export_checkpoint

    for folder in export_checkpoint(options.checkpoint, options.output, options.license):
        print(f"exported {folder}")
    return 0


def _usage() -> str:
    lines = [(__doc__ or "").strip(), "", "Recipes:"]
    for name, recipe in RECIPES.items():
        lines.append(f"  {name:<10}{(recipe.__doc__ or '').strip().partition(chr(10))[0]}")
    return "\n".join(lines)


def _fail(message: str, who: str = "") -> int:
    for line in message.splitlines():
        print(f"error: {who}{line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    status = main(sys.argv[1:], exits=True)
    if status and _process():
        # No tidy end: nccl would wait for the other processes, and they for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
