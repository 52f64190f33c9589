"""How every command runs: its arguments, what it prints, its errors and exit status."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from errno import EISDIR
from pathlib import Path
from tempfile import TemporaryFile


def prepare(arguments: Sequence[str]) -> list[str]:
    """Expand ``~`` in arguments, and make stdout escape characters that its encoding lacks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does by itself
    return [_expand_home(argument) for argument in arguments]


def _expand_home(argument: str) -> str:
    """Expand ``~`` where shells do not: --output=~/x, and quoted."""
    named = argument.startswith("--")
    option, equals, value = argument.partition("=") if named else ("", "", argument)
    return f"{option}{equals}{os.path.expanduser(value)}"  # noqa: PTH111 - the rest of the text stays


def run(
    work: Callable[[list[str]], bool | None],
    arguments: Sequence[str],
    extra: str,
    errors: tuple[type[Exception], ...] = (),
) -> int:
    """Run a command; return its exit status.

    0; 1 if ``work`` returns False; 2 with a short message on bad input.

    Args:
        work: The command, called with its arguments.
        arguments: The command line.
        extra: The extra of trex-models that the command needs.
        errors: Further errors that a user can act on.
    """
    expected: tuple[type[Exception], ...] = (ValueError, OSError, ImportError, *errors)
    try:
        passed = work(prepare(arguments))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except expected as error:
        if os.environ.get("TREX_TRACEBACK"):
            raise
        if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("trex_models"):
            remedy = f"pip install trex-models[{extra}]"
            error = ValueError(f"this command needs another package, {error.name}: {remedy}")
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again", file=sys.stderr)
        return 128 + signal.SIGINT
    return 1 if passed is False else 0


def require_writable(out: Path, *suffixes: str) -> None:
    """Check a file's name, and that its folder can be written, or made.

    Raises:
        ValueError: It ends in none of the suffixes, or cannot be written.
    """
    if out.suffix not in suffixes:
        raise ValueError(f"--out {out}: give a file that ends in {' or '.join(suffixes)}")
    try:
        folder = next(place for place in out.absolute().parents if place.exists())
        with TemporaryFile(dir=folder):
            pass
        if out.is_dir():
            raise IsADirectoryError(EISDIR, "it is a folder")
    except OSError as error:
        reason = error.strerror
        raise ValueError(
            f"--out {out} cannot be written ({reason}); choose another place"
        ) from error


def positive(text: str) -> int:
    """Return an option's number, 1 at least."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """Return an option's number, 0 at least."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at least {least}, not {text!r}"
        )
    return int(text)


def default_device() -> str:
    """Return cuda where there is such a device, otherwise cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
