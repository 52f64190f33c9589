"""Manifest of the published weights: repository, revision and SHA-256.

manifest.json is in the package; the maintainers' tools write it. The environment variable
TREX_MODELS_MANIFEST names another one, for mirrors and tests.
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
    """Weights are not available, or not the expected ones; the message says what to do."""


@dataclass(frozen=True)
class Published:
    """A model's folder on the Hub."""

    repository: str  # organization and name
    revision: str  # the commit, 40 hexadecimal digits
    sha256: str  # of model.safetensors
    outputs: tuple[float, ...] = ()  # the first for the fixed input of ``python -m hub verify``

    def __post_init__(self) -> None:
        # JSON has lists.
        object.__setattr__(self, "outputs", tuple(float(value) for value in self.outputs))
        for value, pattern in (
            (self.repository, r"[\w.-]+/[\w.-]+"),
            (self.revision, r"[0-9a-f]{40}"),
            (self.sha256, r"[0-9a-f]{64}"),
        ):
            if not re.fullmatch(pattern, value):
                raise ValueError(f"{value!r} is not like {pattern}")


@dataclass(frozen=True)
class Manifest:
    """What is published."""

    # By model and tag, such as trex_resnet50.in1k.
    models: dict[str, Published] = field(default_factory=dict)
    # SHA-256 of NAVER's files, by name, as the first maintainer who fetched them found it.
    naver: dict[str, str] = field(default_factory=dict)


def manifest_path() -> Path:
    """Return the path of the manifest: TREX_MODELS_MANIFEST, or the package's own."""
    return Path(os.environ.get("TREX_MODELS_MANIFEST") or PACKAGED).expanduser()


def load_manifest(path: Path | None = None, *, missing_ok: bool = False) -> Manifest:
    """Read a manifest, of `manifest_path` by default; empty if missing and ``missing_ok``."""
    path = path or manifest_path()
    if missing_ok and not path.exists():
        return Manifest()
    try:
        contents: dict[str, Any] = json.loads(path.read_text())
        models = {name: Published(**entry) for name, entry in contents["models"].items()}
        return Manifest(models, dict(contents["naver"]))
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise WeightsError(f"{path} is no manifest of weights ({reason}); correct it") from error


def save_manifest(manifest: Manifest, path: Path) -> None:
    """Write a manifest."""
    write_text_file(path, json.dumps(dataclasses.asdict(manifest), indent=2, sort_keys=True) + "\n")


def without_credentials(text: str) -> str:
    """Remove users and passwords from the addresses in a message."""
    return re.sub(r"//[^/\s]*@", "//", text)


def sha256(path: Path) -> str:
    """Return a file's SHA-256, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(file: Path | str, found: str, expected: str, source: str) -> None:
    """Require a file's SHA-256; ``source`` is the place of the record, and the remedy."""
    if found != expected:
        raise WeightsError(f"refused: the SHA-256 of {file} is {found}, not {expected} of {source}")
