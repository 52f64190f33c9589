"""NAVER's official weight files: downloaded once, converted once, kept in a cache.

CACHE/naver/trex.safetensors   converted weights, including the head if the file has one
CACHE/naver/trex.json          origin of the weights, and SHA-256 of both files
CACHE/naver/trex.pth           optional: manual copy, used instead of a download

NAVER publishes no hashes. A file must therefore have exactly the expected keys, shapes and types
with finite values, and its SHA-256 is recorded at its first use. Later changes are refused.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import Request, urlopen

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock, tqdm

from trex_models.atomic import open_new, replacing, write_safetensors, write_text_file
from trex_models.pretrained import checkpoints
from trex_models.pretrained.manifest import Manifest, WeightsError, check_sha256, sha256

LICENSE = "cc-by-nc-sa-4.0"
BASE_URL = "https://download.europe.naverlabs.com/ComputerVision/trex_models"
# A connection that delivers fewer bytes in this time (10 kB/s) has stalled and is reopened.
STALL_BYTES, STALL_SECONDS = 300_000, 30
ATTEMPTS = 3  # consecutive stalled or broken connections before the download fails

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

_logger = logging.getLogger(__name__)


def url(file: str) -> str:
    """Return a file's URL without the credentials that a mirror may need."""
    base = _base()
    return f"{base.scheme}://{base.netloc.rpartition('@')[2]}{base.path.rstrip('/')}/{file}"


def _base() -> SplitResult:
    address = os.environ.get("TREX_MODELS_NAVER_URL") or BASE_URL
    with suppress(ValueError):  # whose message may contain a password
        base = urlsplit(address)
        if re.fullmatch(r"https?://[!-~]+", address) and base.hostname and base.port != 0:
            return base
    raise WeightsError("TREX_MODELS_NAVER_URL must be an http(s) URL; percent-encode passwords")


def cached(name: str, cache: Path, manifest: Manifest) -> Path | None:
    """Return the cached, converted weights of a model (``name.tag``), verified, or None."""
    for file in FILES[name]:
        weights, record = _cache_paths(file, cache)
        if weights.exists() and record.exists():
            original, converted = _recorded(record)
            _check_known(file, original, manifest)
            source = f"{record}; delete both files to convert the weights again"
            check_sha256(weights, sha256(weights), converted, source)
            return weights
    return None


def known_hashes(cache: Path, manifest: Manifest) -> set[str]:
    """Return all known SHA-256 of NAVER's files and of their conversions."""
    records = sorted((cache / "naver").glob("*.json"))
    first_used = {digest for record in records for digest in _recorded(record)}
    return first_used | {m.sha256 for m in manifest.models.values()} | {*manifest.naver.values()}


def obtain(name: str, cache: Path, manifest: Manifest) -> Path:
    """Convert one of NAVER's files, local or downloaded, into the cache, under a file lock."""
    folder = cache / "naver"
    placed = next((file for file in FILES[name] if (folder / file).exists()), None)
    if constants.HF_HUB_OFFLINE and not placed:
        raise WeightsError("HF_HUB_OFFLINE is set")
    file = placed or FILES[name][0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder / f".{file}.lock"):
            if found := cached(name, cache, manifest):
                return found
            if placed:
                return _convert(folder / file, file, cache, manifest)
            part = folder / f".{file}.part"
            try:
                _logger.warning("downloading %s for %s, once", url(file), name)
                download(file, part)
                return _convert(part, file, cache, manifest)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error})"
        raise WeightsError(f"{folder} {reason}; set TREX_MODELS_CACHE to another folder") from error


class _BrokenConnectionError(Exception):
    """The connection broke or stalled; a new one may resume the download."""


@contextmanager
def _network_errors(file: str) -> Iterator[None]:
    try:
        yield
    except HTTPError as error:
        error.close()
        raise _unavailable(file, f"the server answered {error.code} {error.reason}") from None
    except (OSError, HTTPException) as error:
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise _BrokenConnectionError(reason) from None


def download(file: str, path: Path) -> None:
    """Download one of NAVER's files with a progress bar; resume after a broken connection.

    An existing ``path`` is replaced; symbolic links are not followed.
    """
    failures = 0
    with open_new(path) as stream:
        while True:
            start = stream.tell()
            try:
                _receive(file, stream)
                break
            except _BrokenConnectionError as error:
                failures = 0 if stream.tell() - start >= STALL_BYTES else failures + 1
                if failures == ATTEMPTS:
                    raise _unavailable(file, error) from None
                _logger.warning("%s: %s; resuming at byte %d", url(file), error, stream.tell())
                time.sleep(1)
        stream.flush()
        os.fsync(stream.fileno())


def _receive(file: str, stream: BinaryIO) -> None:
    # Backbone files are 94 MB, full training states 350 to 450 MB.
    limit = 1_000_000_000 if "full" in file else 200_000_000
    with _open(file, stream.tell()) as response:
        if response.headers.get("Content-Range", "").partition("-")[0] != f"bytes {stream.tell()}":
            stream.seek(0)  # the server cannot resume
            stream.truncate()
        start = stream.tell()
        total = None if response.length is None else start + response.length
        units = {"unit": "B", "unit_scale": True, "disable": None}  # None: only in a terminal
        with tqdm(desc=file, total=total, initial=start, **units) as bar:  # type: ignore[no-untyped-call]
            for piece in _pieces(file, response):
                stream.write(piece)
                bar.update(len(piece))
                if max(total or 0, stream.tell()) > limit:
                    raise _unavailable(file, f"larger than {limit // 10**6} MB, not NAVER's file")
        if total is not None and stream.tell() < total:
            raise _BrokenConnectionError("connection closed early")


def _pieces(file: str, response: HTTPResponse) -> Iterator[bytes]:
    """Yield a response's body as it arrives; raise if the connection stalls."""
    received, since = 0, time.monotonic()
    while True:
        with _network_errors(file):
            piece = response.read1(1 << 20)
        if not piece:
            return
        yield piece
        received += len(piece)
        if time.monotonic() > since + STALL_SECONDS:
            if received < STALL_BYTES:
                raise _BrokenConnectionError(f"only {received} bytes in {STALL_SECONDS} s")
            received, since = 0, time.monotonic()


def _open(file: str, start: int) -> HTTPResponse:
    """Send the request. Credentials are sent to the mirror only and never appear in messages."""
    base = _base()
    request = Request(url(file) + (f"?{base.query}" if base.query else ""))
    request.add_header("User-Agent", "trex_models")
    if start:
        request.add_header("Range", f"bytes={start}-")
    if "@" in base.netloc:
        credentials = unquote(base.netloc.rpartition("@")[0]).encode()
        request.add_unredirected_header("Authorization", f"Basic {b64encode(credentials).decode()}")
    with _network_errors(file):
        response: HTTPResponse = urlopen(request, timeout=STALL_SECONDS)
    if base.scheme == "https" and urlsplit(response.url).scheme != "https":
        response.close()
        raise _unavailable(file, "the server redirects from https to http")
    return response


def _unavailable(file: str, reason: object) -> WeightsError:
    return WeightsError(f"{url(file)} is not available: {reason}")


def _convert(path: Path, file: str, cache: Path, manifest: Manifest) -> Path:
    weights, record = _cache_paths(file, cache)
    digest = sha256(path)
    _check_known(file, digest, manifest)
    if record.exists():
        source = f"{record} (first use); if NAVER has replaced the file, delete that record"
        check_sha256(file, digest, _recorded(record)[0], source)
    checkpoint = checkpoints.read(path)
    check_contents(checkpoint, file)
    with replacing(weights) as stream:
        metadata = {"format": "pt", "license": LICENSE}
        write_safetensors(stream, checkpoint.state_dict(), metadata)
        stream.flush()
        contents = {
            "file": file,
            "url": url(file),
            "sha256": digest,
            "converted_sha256": sha256(Path(stream.name)),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_text_file(record, json.dumps(contents, indent=2) + "\n")
    _logger.warning("converted %s (SHA-256 %s) to %s", file, digest, weights)
    return weights


def _check_known(file: str, digest: str, manifest: Manifest) -> None:
    source = "the manifest; delete the file and its conversion from the cache and try again"
    check_sha256(file, digest, manifest.naver.get(file, digest), source)


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


def _cache_paths(file: str, cache: Path) -> tuple[Path, Path]:
    weights = cache / "naver" / Path(file).with_suffix(".safetensors")
    return weights, weights.with_suffix(".json")


def _recorded(record: Path) -> tuple[str, str]:
    try:
        contents = json.loads(record.read_text())
        return str(contents["sha256"]), str(contents["converted_sha256"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{record} is damaged ({error}); delete it") from error
