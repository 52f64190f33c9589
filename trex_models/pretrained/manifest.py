"""Manifest of the published weights: repository, revision and SHA-256.

The package contains manifest.json, which the maintainers' tools write. The environment variable
TREX_MODELS_MANIFEST selects another file, for mirrors and tests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trex_models.atomic import write_text_file

PACKAGED = Path(__file__).with_name("manifest.json")


class WeightsError(RuntimeError):
    """Weights are not available or not the expected ones; the message says what to do."""


@dataclass(frozen=True)
class Published:
    """A model's repository on the Hub."""

    repository: str  # organization/name
    revision: str  # commit, 40 hexadecimal digits
    sha256: str  # SHA-256 of model.safetensors
    outputs: tuple[float, ...] = ()  # first outputs for the fixed input of ``python -m hub verify``

    def __post_init__(self) -> None:
        # JSON stores tuples as lists.
        object.__setattr__(self, "outputs", tuple(float(value) for value in self.outputs))
        for value, pattern in (
            (self.repository, r"[\w.-]+/[\w.-]+"),
            (self.revision, r"[0-9a-f]{40}"),
            (self.sha256, r"[0-9a-f]{64}"),
        ):
            if not re.fullmatch(pattern, value):
                raise ValueError(f"{value!r} does not match {pattern}")


@dataclass(frozen=True)
class Manifest:
    """Published models and SHA-256 of NAVER's files."""

    # Model and tag, such as trex_resnet50.in1k -> repository.
    models: dict[str, Published] = field(default_factory=dict)
    # Name of a NAVER file -> SHA-256, as recorded by the first maintainer who downloaded it.
    naver: dict[str, str] = field(default_factory=dict)


def manifest_path() -> Path:
    """Return the path of the manifest: TREX_MODELS_MANIFEST, or the file in the package."""
    return Path(os.environ.get("TREX_MODELS_MANIFEST") or PACKAGED).expanduser()


def load_manifest(path: Path | None = None, *, missing_ok: bool = False) -> Manifest:
    """Read a manifest (default: `manifest_path`); empty if it is missing and ``missing_ok``."""
    path = path or manifest_path()
    if missing_ok and not path.exists():
        return Manifest()
    try:
        contents: dict[str, Any] = json.loads(path.read_text())
        models = {name: Published(**entry) for name, entry in contents["models"].items()}
        return Manifest(models, dict(contents["naver"]))
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise WeightsError(f"{path} is not a valid manifest ({reason}); correct it") from error


def save_manifest(manifest: Manifest, path: Path) -> None:
    """Write a manifest."""
    write_text_file(path, json.dumps(dataclasses.asdict(manifest), indent=2, sort_keys=True) + "\n")


def without_credentials(text: str) -> str:
    """Remove user names and passwords from URLs in a message."""
    return re.sub(r"//[^/\s]*@", "//", text)


def sha256(path: Path) -> str:
    """Return a file's SHA-256, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(file: Path | str, actual: str, expected: str, source: str) -> None:
    """Require a file's SHA-256; ``source`` names the record of the expected one and the remedy."""
    if actual != expected:
        raise WeightsError(f"refused: SHA-256 of {file} is {actual}, not {expected} as in {source}")
