"""Timm folders: model.safetensors and config.json, verified by reloading the model."""

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
except ImportError:  # Windows, where temporary folders of killed processes remain
    fcntl = None  # type: ignore[assignment]


def find_timm_folder(name: str) -> Path | None:
    """Return the timm folder at a path (or ``local-dir:`` path) or in a run directory, if any."""
    path = Path(name.removeprefix("local-dir:")).expanduser()
    for folder in (path, path / "export" / "backbone"):
        if (folder / "config.json").is_file() and any(folder.glob("*model*")):
            return folder
    return None


@torch.no_grad()
def write_timm_folder(model: nn.Module, folder: Path, images: Tensor, expected: Tensor) -> Path:
    """Save a timm model, reload the copy and compare its outputs for images, (B, 3, S, S).

    An existing folder is replaced atomically. Nothing is written if an output differs from the
    expected one by more than 1e-4 of the largest absolute value.
    """
    others = {path.name for path in folder.glob("*")} - {"config.json", "model.safetensors"}
    if others:
        listed = ", ".join(sorted(others)[:3])
        raise FileExistsError(f"{folder} contains other files ({listed}); choose another folder")
    with replaced_folder(folder) as new_folder:
        try:
            save_for_hf(model, str(new_folder), safe_serialization=True)
        except SafetensorError as problem:  # also raised for a full disk
            raise OSError(f"{folder} cannot be written ({problem})") from problem
        config_path = new_folder / "config.json"
        config = json.loads(config_path.read_text())
        # Also present at the top level, and transformers refuses duplicates.
        config.get("model_args", {}).pop("num_classes", None)
        config_path.write_text(json.dumps(config, indent=2) + "\n")
        _write_license(new_folder / "model.safetensors", config["pretrained_cfg"].get("license"))
        reloaded = timm.create_model(f"local-dir:{new_folder}", pretrained=True).eval()
        error = (reloaded(images) - expected).abs().max().item()
        if not error <= 1e-4 * expected.abs().max().item():
            raise RuntimeError(f"the copy in {folder} differs from the model: max error {error:g}")
    return folder


def _write_license(weights: Path, license_: str | None) -> None:
    metadata = {"format": "pt"} | ({"license": license_} if license_ else {})
    copy = weights.with_name("licensed")
    with weights.open("rb") as old, copy.open("wb") as new:  # copies bytes, parses no tensors
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        new.write(safetensors_header({**header, "__metadata__": metadata}))
        shutil.copyfileobj(old, new)
    copy.replace(weights)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder that replaces ``folder`` on exit, unless an error is raised."""
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file; choose another folder")
    with temporary_folder(folder.parent, folder.name) as private:
        new_folder = private / "new"
        new_folder.mkdir()  # with the umask's permissions, unlike a temporary directory
        yield new_folder
        if folder.exists():
            folder.replace(private / "old")
        new_folder.replace(folder)


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield a hidden folder in ``parent``, locked; delete the folders of killed processes."""
    for stale in parent.glob(f".{name}.*.tmp"):
        with suppress(OSError, AttributeError), _locked(stale):  # not in use by another process
            shutil.rmtree(stale)
    with TemporaryDirectory(".tmp", f".{name}.", parent) as private, ExitStack() as stack:
        with suppress(OSError, AttributeError):  # file systems without locks
            stack.enter_context(_locked(Path(private)))
        yield Path(private)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder until exit or the end of the process; raise OSError if it is locked."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
