"""What commands on images share: exit status and errors, and the types of options."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from errno import EISDIR
from pathlib import Path
from tempfile import TemporaryFile


def run(work: Callable[[], None], what: str, extra: str, *, resumes: bool = True) -> int:
    """Do a command's work; return its exit status: 0, or 2 with a short message on bad input.

    Args:
        work: All of it.
        what: What needs the packages, if one is missing.
        extra: The extra of ours that brings them.
        resumes: Whether the same command goes on where it was interrupted.
    """
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("TREX_TRACEBACK"):
            raise
        if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("trex_models"):
            remedy = f"pip install trex-models[{extra}]"
            error = ValueError(f"{what} needs another package, {error.name}: {remedy}")
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted{'; the same command goes on' if resumes else ''}", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


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
