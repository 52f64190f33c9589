"""NAVER's own files of the weights: downloaded once, converted once, kept in a cache.

CACHE/naver/trex.safetensors   the converted weights, complete with the head where there is one
CACHE/naver/trex.json          where they came from, and the SHA-256 of both files
CACHE/naver/trex.pth           optional: a file placed there by hand is taken, not downloaded

NAVER publishes no hashes: a file must hold exactly the keys, shapes and types that it should, with
finite values, and its SHA-256 is recorded when it is first used. A later change is refused.
"""

from __future__ import annotations

import io
import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import constants
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError
from safetensors.torch import save_file

from trex_models import checkpoints
from trex_models.files import write_whole
from trex_models.manifest import Manifest, WeightsError, check_sha256, sha256

LICENSE = "cc-by-nc-sa-4.0"
BASE_URL = "https://download.europe.naverlabs.com/ComputerVision/trex_models"

# The files that hold a model's weights, the smallest first. Full training states alone have the
# projector and the class prototypes.
FILES = {
    "trex_resnet50.in1k": ("trex.pth",),
    "trexstar_resnet50.in1k": ("trexstar.pth",),
    "trex_resnet50.in1k_r2": ("trex_2.pth", "trex_2_checkpoint_full.pth"),
    "trexstar_resnet50.in1k_r2": ("trexstar_2.pth", "trexstar_2_checkpoint_full.pth"),
    "trex_resnet50_proj.in1k_r2": ("trex_2_checkpoint_full.pth",),
    "trexstar_resnet50_proj.in1k_r2": ("trexstar_2_checkpoint_full.pth",),
    "trex_resnet50_cls.in1k_r2": ("trex_2_checkpoint_full.pth",),
    "trexstar_resnet50_cls.in1k_r2": ("trexstar_2_checkpoint_full.pth",),
}

_logger = logging.getLogger(__name__)


def url(file: str) -> str:
    """Return a file's address; TREX_MODELS_NAVER_URL names a mirror of the folder."""
    base = os.environ.get("TREX_MODELS_NAVER_URL") or BASE_URL
    return f"{base.rstrip('/')}/{file}"


def cached(name: str, cache: Path, manifest: Manifest) -> Path | None:
    """Return the converted weights of a model if the cache has them.

    Args:
        name: Model and tag.
        cache: The cache's folder.
        manifest: SHA-256 of files that are known.

    Raises:
        WeightsError: They are not what was once written there.
    """
    for file in FILES[name]:
        weights, record = _places(file, cache)
        if weights.exists() and record.exists():
            _check_known(file, _recorded(record, "sha256"), manifest)
            check_sha256(
                weights,
                _recorded(record, "converted_sha256"),
                f"{record}; delete both, and they will be made again",
            )
            return weights
    return None


def known(cache: Path, manifest: Manifest) -> set[str]:
    """Return the SHA-256 of NAVER's files and of what was made of them, as far as they are known.

    Args:
        cache: The cache's folder.
        manifest: SHA-256 of files that are known.

    Raises:
        WeightsError: A record in the cache is damaged.
    """
    records = sorted((cache / "naver").glob("*.json"))
    fields = ("sha256", "converted_sha256")
    first_used = {_recorded(record, name) for record in records for name in fields}
    published = {entry.sha256 for entry in manifest.models.values()}
    return first_used | published | set(manifest.naver.values())


def obtain(name: str, cache: Path, manifest: Manifest) -> Path:
    """Convert a file of NAVER's into the cache, placed by hand or downloaded.

    Safe among processes: the first converts, the others wait and take what it made.

    Args:
        name: Model and tag.
        cache: The cache's folder.
        manifest: SHA-256 of files that are known.

    Returns:
        The converted weights.

    Raises:
        CheckpointError: The file is damaged, unsafe or another one.
        WeightsError: It cannot be had, or its SHA-256 is not the recorded one.
    """
    folder = cache / "naver"
    placed = [file for file in FILES[name] if (folder / file).exists()]
    if constants.HF_HUB_OFFLINE and not placed:
        raise WeightsError("HF_HUB_OFFLINE is set")
    file = placed[0] if placed else FILES[name][0]
    original = folder / file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder / f".{file}.lock"):
            made = cached(name, cache, manifest)
            if made is not None:
                return made
            if placed:
                return _convert(original, file, cache, manifest)
            part = folder / f".{file}.part"
            try:
                with _Part(io.FileIO(part, "w")) as stream:
                    _logger.warning("downloading %s for %s, once", url(file), name)
                    download(url(file), stream)
                return _convert(part, file, cache, manifest)
            finally:
                part.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:  # safetensors has its own for the disk's
        reason = getattr(error, "strerror", None) or error
        raise WeightsError(
            f"{folder} cannot be written ({reason}); set TREX_MODELS_CACHE to a "
            "folder with room that can"
        ) from error


class _Part(io.BufferedWriter):
    """A file that is being downloaded; it is not begun anew for ever."""

    restarts = 0

    def truncate(self, size: int | None = None) -> int:
        """Drop what a server that cannot resume will send again."""
        self.restarts += 1
        if self.restarts > 5:
            raise WeightsError("the connection breaks each time, and the server cannot resume")
        return super().truncate(size)


def download(address: str, stream: BinaryIO) -> None:
    """Download a file with progress; a connection that breaks is taken up where it broke.

    Raises:
        WeightsError: It cannot be had.
    """
    while True:
        start = stream.tell()
        try:
            name = address.rpartition("/")[2]
            http_get(address, stream, resume_size=start, displayed_filename=name)
            break
        except WeightsError:
            raise
        except Exception as error:  # of the HTTP client, which huggingface_hub has changed before
            if isinstance(error, OSError) and error.errno is not None:  # of the disk
                raise
            reason = (str(error) or type(error).__name__).partition("\n")[0]
            if stream.tell() == start:
                raise WeightsError(f"{address} cannot be had: {reason}") from error
            _logger.warning("%s: %s; going on from %d bytes", address, reason, stream.tell())
    stream.flush()
    os.fsync(stream.fileno())


def _convert(path: Path, file: str, cache: Path, manifest: Manifest) -> Path:
    weights, record = _places(file, cache)
    digest = sha256(path)
    _check_known(file, digest, manifest)
    if record.exists():
        first = _recorded(record, "sha256")
        if digest != first:
            raise WeightsError(
                f"refused: the SHA-256 of {file} is {digest}, but {first} was recorded when it "
                f"was first used; if NAVER has really replaced it, delete {record}"
            )
    checkpoint = checkpoints.read(path)
    check_contents(checkpoint, file)
    beside = weights.with_name(f".{weights.name}.tmp")
    try:
        save_file(checkpoint.state_dict(), beside, {"format": "pt", "license": LICENSE})
        with beside.open("rb") as stream:
            os.fsync(stream.fileno())
        facts = {
            "file": file,
            "url": url(file),
            "sha256": digest,
            "converted_sha256": sha256(beside),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_whole(record, json.dumps(facts, indent=2) + "\n")
        beside.chmod(record.stat().st_mode)  # save_file's are private; a cache may be shared
        beside.replace(weights)
    finally:
        beside.unlink(missing_ok=True)
    _logger.warning(
        "converted %s (SHA-256 %s, %s) to %s",
        file,
        digest,
        "as the manifest says" if file in manifest.naver else "recorded at first use",
        weights,
    )
    return weights


def _check_known(file: str, digest: str, manifest: Manifest) -> None:
    known = manifest.naver.get(file)
    if known not in (None, digest):
        raise WeightsError(
            f"refused: the SHA-256 of {file} is {digest}, but the manifest says {known}; delete "
            "what was made of it from the cache, and download it again"
        )


def check_contents(checkpoint: checkpoints.Checkpoint, file: str) -> None:
    """Require of one of NAVER's files what its name promises.

    Raises:
        CheckpointError: It is another one.
    """
    wanted = None
    if "full" in file:
        wanted = 1 if file.startswith("trexstar") else 3
    found = checkpoint.proj_layers if checkpoint.projector else None
    if found != wanted or (checkpoint.class_weights is None) != (wanted is None):
        raise checkpoints.CheckpointError(
            f"{file}: expected {_head(wanted)}, found {_head(found)}; it is another file, or "
            "renamed: download it again"
        )


def _head(layers: int | None) -> str:
    return "a backbone alone" if layers is None else f"a projector of {layers} hidden layers"


def _places(file: str, cache: Path) -> tuple[Path, Path]:
    weights = cache / "naver" / Path(file).with_suffix(".safetensors")
    return weights, weights.with_suffix(".json")


def _recorded(record: Path, field: str) -> str:
    try:
        value: str = json.loads(record.read_text())[field]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{record} is damaged ({error}); delete it") from error
    return value
