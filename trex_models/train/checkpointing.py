"""A run's folder on disk: its configuration and its checkpoints. Every file is whole or absent.

DIR/config.json                the resolved configuration
DIR/metrics.jsonl              one line per report
DIR/checkpoints/step_N.pt      the state after N steps; the last two are kept
DIR/export/backbone, .../cls   the trained model for timm
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol

import torch

from trex_models.train.config import Config, differences, to_json

_KEPT = 2


class Stateful(Protocol):
    """A module, an optimiser, or a gradient scaler."""

    def state_dict(self) -> Any:
        """Return the state: tensors and plain values."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take on a state."""
        ...


def claim_folder(config: Config) -> None:
    """Make ``config.output`` this run's folder.

    Raises:
        ValueError: It holds another run, or files that are no run; nothing is touched then.
    """
    folder = Path(config.output)
    path = folder / "config.json"
    if path.exists():
        try:
            saved = json.loads(path.read_text())
            different = differences(saved, config)
        except (AttributeError, ValueError) as error:
            raise ValueError(f"{path} is no configuration; choose another --output") from error
        if different:
            raise ValueError(
                f"{folder} already holds another run ({'; '.join(different)}); choose another "
                "--output, or the run's own settings to continue it"
            )
        return
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} is in use and holds no run; choose another --output")
    make_folder(folder)
    beside = path.with_suffix(".tmp")
    beside.write_text(to_json(config))
    beside.replace(path)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, where they are missing.

    Raises:
        ValueError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be made ({error.strerror}); choose another --output"
        ) from error


def latest(folder: Path) -> Path | None:
    """Return the run's last checkpoint, or None."""
    return next(reversed(_checkpoints(folder)), None)


def _checkpoints(folder: Path) -> list[Path]:
    found = [p for p in (folder / "checkpoints").glob("step_*.pt") if re.search(r"_\d+$", p.stem)]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("step_")))


def save(folder: Path, step: int, parts: Mapping[str, Stateful], facts: Mapping[str, Any]) -> None:
    """Write a checkpoint beside its place, move it there, and drop the oldest ones.

    Args:
        folder: The run's folder.
        step: Steps done.
        parts: What has a state, by name.
        facts: Plain values that describe the run.
    """
    state = {**facts, "step": step} | {name: part.state_dict() for name, part in parts.items()}
    path = folder / "checkpoints" / f"step_{step}.pt"
    path.parent.mkdir(exist_ok=True)
    beside = path.with_suffix(".tmp")
    with beside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    for torn in path.parent.glob("*.tmp"):  # of a process that was killed
        torn.unlink()
    for old in _checkpoints(folder)[:-_KEPT]:
        old.unlink()


def restore(path: Path, parts: Mapping[str, Stateful], facts: Mapping[str, Any]) -> int:
    """Load a checkpoint into the parts; return the steps done.

    Args:
        path: The checkpoint.
        parts: What ``save`` was given.
        facts: As they are now.

    Raises:
        ValueError: The file is damaged or foreign, or a fact is another one now, such as the
            classes of a data folder that has changed.
    """
    state = load(path)
    changed = [name for name, value in facts.items() if state.get(name) != value]
    if changed:
        raise ValueError(
            f"{path} was saved with other {' and '.join(changed)}; restore the data that the run "
            "began with, or choose another --output"
        )
    for name, part in parts.items():
        load_part(part, state, name, path)
    step: int = state["step"]
    return step


def load_part(part: Stateful, state: Mapping[str, Any], name: str, path: Path) -> None:
    """Load one part of a checkpoint's state.

    Raises:
        ValueError: It does not fit.
    """
    try:
        part.load_state_dict(state[name])
    except (KeyError, RuntimeError, ValueError) as error:
        reason = shorten(str(error), 200)  # torch lists every key
        raise ValueError(
            f"the {name} in {path} does not fit its configuration ({reason}); it belongs to "
            "another architecture"
        ) from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of the trainer, onto the CPU.

    Raises:
        ValueError: The file is missing, damaged, or something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({reason}); delete it to go on from the one "
            "before it"
        ) from error
    if not isinstance(state, dict) or not {"config", "step", "method"} <= state.keys():
        raise ValueError(f"{path} is no checkpoint of this trainer (no config, step and method)")
    return state
