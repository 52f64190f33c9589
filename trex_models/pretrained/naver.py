"""NAVER's official weight files: downloaded once, converted once, kept in a cache.

A converted file, CACHE/naver/trex.safetensors, includes the head if the original has one.
A file must have exactly the expected keys, shapes and types, with finite values.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from torch import Tensor

from trex_models.pretrained import checkpoints
from trex_models.pretrained.download import CachedFile, RemoteFile, recorded
from trex_models.pretrained.manifest import Manifest, WeightsError

LICENSE = "cc-by-nc-sa-4.0"
BASE_URL = "https://download.europe.naverlabs.com/ComputerVision/trex_models"

# Files that contain a model's weights, smallest first. Only the full training states have the
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
ALL_FILES = tuple(dict.fromkeys(file for files in FILES.values() for file in files))


def remote_file(file: str) -> RemoteFile:
    """Return the source of a file: NAVER's server or the mirror in TREX_MODELS_NAVER_URL."""
    address = os.environ.get("TREX_MODELS_NAVER_URL") or BASE_URL
    limit = 1000 if "full" in file else 200  # backbones have 94 MB, training states 350 to 450
    with suppress(ValueError):  # whose message may contain a password
        base = urlsplit(address)
        credentials, _, host = base.netloc.rpartition("@")
        url = f"{base.scheme}://{host}{base.path.rstrip('/')}/{file}"
        if re.fullmatch(r"https?://[!-~]+", address) and base.hostname and base.port != 0:
            return RemoteFile(url, "NAVER", limit, base.query, unquote(credentials))
    raise WeightsError("TREX_MODELS_NAVER_URL must be an http(s) URL; percent-encode passwords")


def cached(name: str, cache: Path, manifest: Manifest) -> Path | None:
    """Return the cached, converted weights of a model (``name.tag``), verified, or None."""
    found = (_cached_file(file, cache, manifest).find() for file in FILES[name])
    return next(filter(None, found), None)


def known_hashes(cache: Path, manifest: Manifest) -> set[str]:
    """Return all known SHA-256 of NAVER's files and of their conversions."""
    records = sorted((cache / "naver").glob("*.json"))
    first_used = {digest for record in records for digest in recorded(record)}
    return first_used | {m.sha256 for m in manifest.models.values()} | {*manifest.naver.values()}


def obtain(name: str, cache: Path, manifest: Manifest) -> Path:
    """Convert one of NAVER's files, local or downloaded, into the cache, under a file lock."""
    placed = (file for file in FILES[name] if (cache / "naver" / file).exists())
    file = next(placed, FILES[name][0])
    return _cached_file(file, cache, manifest).obtain(remote_file(file), name)


def _cached_file(file: str, cache: Path, manifest: Manifest) -> CachedFile:
    original, read = cache / "naver" / file, partial(_read, file=file)
    weights, known = original.with_suffix(".safetensors"), manifest.naver.get(file)
    return CachedFile(original, weights, read, {"license": LICENSE}, known)


def _read(path: Path, file: str) -> dict[str, Tensor]:
    checkpoint = checkpoints.read(path)
    check_contents(checkpoint, file)
    return checkpoint.state_dict()


def check_contents(checkpoint: checkpoints.Checkpoint, file: str) -> None:
    """Raise CheckpointError unless one of NAVER's files has the parts that its name implies."""
    expected = (1 if file.startswith("trexstar") else 3) if "full" in file else None
    layers = checkpoint.proj_layers if checkpoint.projector else None
    if layers != expected or (checkpoint.classifier_weights is None) != (expected is None):
        raise checkpoints.CheckpointError(
            f"{file} must contain {_head(expected)}, got {_head(layers)}; the file was renamed or "
            "is not NAVER's: download it again"
        )


def _head(layers: int | None) -> str:
    return "only a backbone" if layers is None else f"a projector with {layers} hidden layers"
