"""Weight files of other authors: downloaded once, converted once, kept in a cache.

FOLDER/NAME.safetensors   converted weights
FOLDER/NAME.json          origin of the weights, and SHA-256 of both files
FOLDER/FILE               optional: manual copy, used instead of a download

The authors publish no hashes. The SHA-256 of a file is therefore recorded at its first use, and
later changes are refused.
"""

from __future__ import annotations

import json
import logging
import os
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock, tqdm
from torch import Tensor

from trex_models.atomic import open_new, replacing, write_safetensors, write_text_file
from trex_models.pretrained.manifest import WeightsError, check_sha256, sha256

# A connection that delivers fewer bytes in this time (10 kB/s) has stalled and is reopened.
STALL_BYTES, STALL_SECONDS = 300_000, 30
ATTEMPTS = 3  # consecutive stalled or broken connections before the download fails

_logger = logging.getLogger(__name__)


class RemoteFile(NamedTuple):
    """A file on a server."""

    url: str  # address in messages and records, without credentials
    owner: str  # its authors or their method, in messages
    limit: int  # largest accepted size, MB
    query: str = ""  # of a mirror's address; may contain credentials
    credentials: str = ""  # user:password for this server only


class CachedFile(NamedTuple):
    """A weight file in the cache, and its conversion."""

    original: Path  # optional: manual copy of the file, used instead of a download
    weights: Path  # converted weights, .safetensors
    read: Callable[[Path], dict[str, Tensor]]  # reads the file and checks its contents
    metadata: Mapping[str, str]  # of the converted weights, with their license
    known: str | None = None  # SHA-256 of the file in the manifest

    @property
    def record(self) -> Path:
        """Path of the record: origin of the weights, and SHA-256 of both files."""
        return self.weights.with_suffix(".json")

    def find(self) -> Path | None:
        """Return the path of the converted weights, verified, or None."""
        if not self.weights.exists() or not self.record.exists():
            return None
        original, converted = recorded(self.record)
        self._check_known(original)
        source = f"{self.record}; delete both files to convert the weights again"
        check_sha256(self.weights, sha256(self.weights), converted, source)
        return self.weights

    def obtain(self, remote: RemoteFile, name: str) -> Path:
        """Convert the file of the model ``name``, local or downloaded, under a file lock."""
        folder, file = self.original.parent, self.original.name
        placed = self.original.exists()
        if constants.HF_HUB_OFFLINE and not placed:
            raise WeightsError("HF_HUB_OFFLINE is set")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(folder / f".{file}.lock"):
                if found := self.find():
                    return found
                part = folder / f".{file}.part"
                try:
                    if not placed:
                        _logger.warning("downloading %s for %s, once", remote.url, name)
                        download(remote, part)
                    return self._convert(self.original if placed else part, remote)
                finally:
                    part.unlink(missing_ok=True)
        except OSError as error:
            reason = f"{folder} cannot be written ({error.strerror or error})"
            raise WeightsError(f"{reason}; set TREX_MODELS_CACHE to another folder") from error

    def _convert(self, path: Path, remote: RemoteFile) -> Path:
        file, digest = self.original.name, sha256(path)
        self._check_known(digest)
        if self.record.exists():
            remedy = f"if {remote.owner} has replaced the file, delete that record"
            source = f"{self.record} (first use); {remedy}"
            check_sha256(file, digest, recorded(self.record)[0], source)
        state = self.read(path)
        with replacing(self.weights) as stream:
            write_safetensors(stream, state, {"format": "pt", **self.metadata})
            stream.flush()
            contents = {
                "file": file,
                "url": remote.url,
                "sha256": digest,
                "converted_sha256": sha256(Path(stream.name)),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            write_text_file(self.record, json.dumps(contents, indent=2) + "\n")
        message = "converted %s (SHA-256 %s) to %s, license %s"
        _logger.warning(message, file, digest, self.weights, self.metadata["license"])
        return self.weights

    def _check_known(self, digest: str) -> None:
        source = "the manifest; delete the file and its conversion from the cache and try again"
        check_sha256(self.original.name, digest, self.known or digest, source)


def recorded(record: Path) -> tuple[str, str]:
    """Return the SHA-256 of an original and of its conversion from a record."""
    try:
        contents = json.loads(record.read_text())
        return str(contents["sha256"]), str(contents["converted_sha256"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{record} is damaged ({error}); delete it") from error


@contextmanager
def _network_errors(remote: RemoteFile) -> Iterator[None]:
    """Raise ConnectionError if a new connection may resume the download."""
    try:
        yield
    except HTTPError as error:
        error.close()
        raise _unavailable(remote, f"the server answered {error.code} {error.reason}") from None
    except (OSError, HTTPException) as error:
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise ConnectionError(reason) from None


def download(remote: RemoteFile, path: Path) -> None:
    """Download a file with a progress bar; resume after a broken connection.

    An existing ``path`` is replaced; symbolic links are not followed.
    """
    failures = 0
    with open_new(path) as stream:
        while True:
            start = stream.tell()
            try:
                _receive(remote, stream)
                break
            except ConnectionError as error:
                failures = 0 if stream.tell() - start >= STALL_BYTES else failures + 1
                if failures == ATTEMPTS:
                    raise _unavailable(remote, error) from None
                _logger.warning("%s: %s; resuming at byte %d", remote.url, error, stream.tell())
                time.sleep(1)
        stream.flush()
        os.fsync(stream.fileno())


def _receive(remote: RemoteFile, stream: BinaryIO) -> None:
    with _open(remote, stream.tell()) as response:
        if response.headers.get("Content-Range", "").partition("-")[0] != f"bytes {stream.tell()}":
            stream.seek(0)  # the server cannot resume
            stream.truncate()
        start, file = stream.tell(), remote.url.rpartition("/")[2]
        total = None if response.length is None else start + response.length
        units = {"unit": "B", "unit_scale": True, "disable": None}  # None: only in a terminal
        with tqdm(desc=file, total=total, initial=start, **units) as bar:  # type: ignore[no-untyped-call]
            for piece in _pieces(remote, response):
                stream.write(piece)
                bar.update(len(piece))
                if max(total or 0, stream.tell()) > remote.limit * 10**6:
                    size = f"larger than {remote.limit} MB"
                    raise _unavailable(remote, f"{size}, not {remote.owner}'s file")
        if total is not None and stream.tell() < total:
            raise ConnectionError("connection closed early")


def _pieces(remote: RemoteFile, response: HTTPResponse) -> Iterator[bytes]:
    """Yield a response's body as it arrives; raise if the connection stalls."""
    received, since = 0, time.monotonic()
    while True:
        with _network_errors(remote):
            piece = response.read1(1 << 20)
        if not piece:
            return
        yield piece
        received += len(piece)
        if time.monotonic() > since + STALL_SECONDS:
            if received < STALL_BYTES:
                raise ConnectionError(f"only {received} bytes in {STALL_SECONDS} s")
            received, since = 0, time.monotonic()


def _open(remote: RemoteFile, start: int) -> HTTPResponse:
    """Send the request. Credentials never appear in messages."""
    request = Request(remote.url + (f"?{remote.query}" if remote.query else ""))
    request.add_header("User-Agent", "trex_models")
    if start:
        request.add_header("Range", f"bytes={start}-")
    if remote.credentials:
        encoded = b64encode(remote.credentials.encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {encoded}")
    with _network_errors(remote):
        response: HTTPResponse = urlopen(request, timeout=STALL_SECONDS)
    if remote.url.startswith("https:") and urlsplit(response.url).scheme != "https":
        response.close()
        raise _unavailable(remote, "the server redirects from https to http")
    return response


def _unavailable(remote: RemoteFile, reason: object) -> WeightsError:
    return WeightsError(f"{remote.url} is not available: {reason}")
