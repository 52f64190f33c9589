"""Run directory. Configuration and checkpoints are either complete or absent.

DIR/config.json                resolved configuration
DIR/metrics.jsonl              one line per report
DIR/checkpoints/step_N.pt      state after N steps; the last two are kept
DIR/export/backbone, .../cls   models for timm; .../proj if there are no classifier weights
DIR/unreadable.txt             images that were skipped, if any
DIR/tensorboard                metrics for TensorBoard, if enabled

A checkpoint is a zip file written by torch.save. Its checksums, one per tensor, are verified when
it is read. It contains no states of random generators: those of a step are seeded with (seed, step,
rank), those of a sample with (seed, epoch, sample).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from trex_models.atomic import replacing, sync_folder, write_text_file
from trex_models.pretrained import checkpoints
from trex_models.pretrained.checkpoints import CheckpointError, DamagedError
from trex_models.train.config import Config, config_diff, from_dict, to_json

MAX_CHECKPOINTS = 2
_ENTRIES = {
    *("config", "step", "method", "optimizer", "scaler", "classes", "images", "environment"),
    *("batchnorm_groups", "unreadable", "inherited_license"),
}
_FACTORED = ("exp_avg_sq_row", "exp_avg_sq_col")  # of adafactor: means of rows and of columns
_FAILED_STEP = {"process", "crops", "labels", "indices"}  # entries of a failed step's file


@contextmanager
def lock_run_dir(config: Config) -> Iterator[None]:
    """Create a run directory, or check that it belongs to this run, and lock it.

    The lock is also released when the process is killed.

    Raises:
        ValueError: The directory belongs to another run, contains other files, is in use by another
            process, or cannot be created. It is not changed.
    """
    folder, other = Path(config.output), "choose another --output"
    path = folder / "config.json"
    if config.output != config.output.encode(errors="replace").decode():
        raise ValueError(f"{folder} is not valid UTF-8: its exports could not be loaded; {other}")
    if path.exists():
        try:
            different = config_diff(json.loads(path.read_text()), config)
        except (AttributeError, ValueError) as error:
            raise ValueError(f"{path} is not the configuration of a run; {other}") from error
        if different:
            raise ValueError(
                f"{folder} already contains a run with other settings ({'; '.join(different)}); "
                f"{other}, or use the settings of that run to continue it"
            )
    elif folder.is_file() or (folder.is_dir() and any(map(_is_foreign, folder.iterdir()))):
        raise ValueError(f"{folder} exists, but is not the folder of a run; {other}")
    make_folder(folder / "checkpoints")
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another process is training in {folder}; wait until it ends, or {other}"
        ) from None
    except NotImplementedError:  # the file system does not support locks
        pass
    try:
        if not path.exists():
            write_text_file(path, to_json(config))
        sync_folder(folder.parent)
        # Left by a process that was killed.
        for incomplete in folder.glob("checkpoints/.step_*.tmp"):
            incomplete.unlink()
        yield
    finally:
        lock.release()


def _is_foreign(path: Path) -> bool:
    """Return False for the files that a run creates before its config.json."""
    if path.name == "checkpoints" and path.is_dir():
        return any(path.iterdir())
    return path.name not in (".lock", ".config.json.tmp")


def make_folder(folder: Path) -> None:
    """Create a folder and its parents if they do not exist; ValueError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be created ({error.strerror}); choose another --output"
        ) from error


def list_checkpoints(folder: Path) -> list[Path]:
    """Return a run's checkpoints, oldest first."""
    directory = folder / "checkpoints"
    entries = directory.iterdir() if directory.is_dir() else ()  # glob would hide errors
    return sorted((p for p in entries if re.fullmatch(r"step_\d+\.pt", p.name)), key=_step_number)


def _step_number(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint, and delete all but the last two."""
    write(folder / "checkpoints" / f"step_{state['step']}.pt", state)
    prune(folder)


def prune(folder: Path) -> None:
    """Delete all but the last two checkpoints; a process that was killed may have left three."""
    for old in list_checkpoints(folder)[:-MAX_CHECKPOINTS]:
        old.unlink()


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state to a file atomically; ValueError if writing fails."""
    try:
        with replacing(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        # torch's own message hides the reason.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise ValueError(
            f"{path} cannot be written ({reason.strerror}); fix this, for example free disk space, "
            "then run the same command to continue from the last checkpoint"
        ) from error


def load_newest(
    folder: Path, on_damaged: Callable[[Path, DamagedError], object]
) -> tuple[Path, dict[str, Any]] | None:
    """Read the last intact checkpoint of a run; None if the run has no checkpoint yet.

    ``on_damaged`` is called for each damaged file, before an earlier file is read.

    Raises:
        ValueError: A file is not a checkpoint of this trainer, or all checkpoints are damaged.
    """
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, load(path)
        except DamagedError as error:
            on_damaged(path, error)
    if any((folder / "checkpoints").glob("step_*.pt*")):
        raise ValueError(
            f"all checkpoints of {folder} are damaged; delete {folder}/checkpoints to start over"
        )
    return None


def load_last(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Read the last intact checkpoint of a run, which must have one; no file is renamed."""
    found = load_newest(folder, lambda _, error: print(error))
    if found is None:
        raise ValueError(f"{folder} contains no checkpoint; pass another run or a checkpoint file")
    return found


def rename_damaged(path: Path, error: DamagedError) -> None:
    """Rename a corrupt checkpoint to ``*.damaged``: it is neither resumed from nor counted."""
    renamed = path.replace(path.with_name(f"{path.name}.damaged"))
    print(f"{error}; it was renamed to {renamed.name}")


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of the trainer, onto the CPU, and verify its checksums and contents.

    Raises:
        DamagedError: The file is truncated or damaged.
        ValueError: The file is missing, is no checkpoint, or contains non-finite values.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; pass the folder of a run or a checkpoint file")
    try:
        state = checkpoints.load_checkpoint(path)
    except DamagedError as error:
        raise DamagedError(f"{path} cannot be read as a checkpoint: it is damaged") from error
    except CheckpointError as error:
        raise ValueError(str(error)) from error
    if not state.keys() >= _ENTRIES:
        raise ValueError(f"{path} is not a checkpoint of this trainer; pass a run's step_N.pt")
    try:
        parts = checkpoints.sort_keys(state).parts
        if not state.keys() >= _FAILED_STEP:  # the file of a failed step may be non-finite
            checkpoints.check_finite(parts)
        from_dict(state["config"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return dict(state)


def check_belongs(
    path: Path, state: Mapping[str, Any], config: Config, data_fingerprint: Mapping[str, Any]
) -> None:
    """Raise ValueError if a checkpoint belongs to another run, or to other data."""
    reject_failed_step(path, state)
    different = config_diff(state["config"], config)
    if state["step"] != _step_number(path):
        different.append(f"its step is {state['step']}")
    if different:
        raise ValueError(
            f"{path} belongs to another run ({'; '.join(different)}); move it to another folder"
        )
    changed = [name for name, value in data_fingerprint.items() if state.get(name) != value]
    if changed:
        names = " and ".join(changed).replace("teacher", "weights of the teacher")
        raise ValueError(
            f"{path} was saved with different {names}; restore those that the run started with, "
            "or choose another --output"
        )


def reject_failed_step(path: Path, state: Mapping[str, Any]) -> None:
    """Raise ValueError if a file contains a step with a non-finite loss, not a checkpoint."""
    if "crops" in state:
        raise ValueError(f"{path} is a failed step, not a checkpoint; pass a run or its step_N.pt")


def restore(parts: Mapping[str, Any], state: Mapping[str, Any], path: Path) -> None:
    """Load a checkpoint's contents into the parts of a run; ValueError if one does not match."""
    for name, part in parts.items():
        try:
            if isinstance(part, nn.Module):  # load_state_dict would convert other types silently
                difference = checkpoints.mismatch(state[name], part.state_dict())
                if difference:
                    raise ValueError(difference)
            part.load_state_dict(state[name])
            if isinstance(part, torch.optim.Optimizer):
                _check_optimizer(part)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = shorten(str(error), 200)  # torch lists every key
            raise ValueError(
                f"the {name} in {path} does not match its configuration ({reason})"
            ) from error


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            has_shape = isinstance(value, Tensor) and value.ndim and name not in _FACTORED
            if has_shape and value.shape != parameter.shape:
                raise ValueError(f"{name}: {tuple(value.shape)}, not {tuple(parameter.shape)}")
        checkpoints.check_finite({"optimizer": state})
