"""A model as a timm folder: model.safetensors and config.json, checked by reloading."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import Tensor, nn

from trex_models.atomic import safetensors_header

try:
    import fcntl
except ImportError:  # Windows, where folders of killed processes are kept
    fcntl = None  # type: ignore[assignment]


def find_timm_folder(name: str) -> Path | None:
    """Return the timm folder of a path, ``local-dir:`` or not: itself, or a run's backbone."""
    path = Path(name.removeprefix("local-dir:")).expanduser()
    for folder in (path, path / "export" / "backbone"):
        if (folder / "config.json").is_file() and any(folder.glob("*model*")):
            return folder
    return None


@torch.no_grad()
def write_timm_folder(model: nn.Module, folder: Path, images: Tensor, expected: Tensor) -> Path:
    """Save a model of timm, reload the copy, and compare its outputs for (B, 3, S, S) images.

    An earlier folder is replaced in one move. Nothing is written if an output is off from the
    expected one by more than 1e-4 of the largest.
    """
    others = {path.name for path in folder.glob("*")} - {"config.json", "model.safetensors"}
    if others:
        listed = ", ".join(sorted(others)[:3])
        raise FileExistsError(f"{folder} holds other files ({listed}); choose another folder")
    with replaced_folder(folder) as beside:
        try:
            save_for_hf(model, str(beside), safe_serialization=True)
        except SafetensorError as problem:  # its own, also for the disk's
            raise OSError(f"{folder} cannot be written ({problem})") from problem
        config_path = beside / "config.json"
        config = json.loads(config_path.read_text())
        # It is at the top level too, and transformers refuses two of them.
        config.get("model_args", {}).pop("num_classes", None)
        config_path.write_text(json.dumps(config, indent=2) + "\n")
        _state_license(beside / "model.safetensors", config["pretrained_cfg"].get("license"))
        reloaded = timm.create_model(f"local-dir:{beside}", pretrained=True).eval()
        error = (reloaded(images) - expected).abs().max().item()
        if not error <= 1e-4 * expected.abs().max().item():
            raise RuntimeError(f"the copy in {folder} does not reproduce the model: off by {error}")
    return folder


def _state_license(weights: Path, license_: str | None) -> None:
    """Write the license into the metadata of the file, which may be passed on alone."""
    metadata = {"format": "pt"} | ({"license": license_} if license_ else {})
    fresh = weights.with_name("licensed")
    with weights.open("rb") as old, fresh.open("wb") as new:  # without reading the tensors
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        new.write(safetensors_header({**header, "__metadata__": metadata}))
        shutil.copyfileobj(old, new)
    fresh.replace(weights)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Give a fresh folder next to ``folder``, which takes its place unless an error is raised."""
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file; choose another folder")
    with temporary_folder(folder.parent, folder.name) as private:
        beside = private / "new"
        beside.mkdir()  # with the permissions of the umask
        yield beside
        if folder.exists():
            folder.replace(private / "old")
        beside.replace(folder)


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """Give a hidden folder in ``parent`` for this process alone; delete those of killed ones."""
    for left in parent.glob(f".{name}.*.tmp"):
        with suppress(OSError, AttributeError), _locked(left):  # no other process is using it
            shutil.rmtree(left)
    with TemporaryDirectory(".tmp", f".{name}.", parent) as private, ExitStack() as end:
        with suppress(OSError, AttributeError):  # the file system has no locks
            end.enter_context(_locked(Path(private)))
        yield Path(private)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder, or raise OSError; the end of the process unlocks it, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
