"""Licenses of weights, determined in the same way by every command."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from trex_models.atomic import cache_folder
from trex_models.pretrained import naver
from trex_models.pretrained.checkpoints import CheckpointError, load_checkpoint, sort_keys
from trex_models.pretrained.manifest import WeightsError, load_manifest, sha256

_ARCHITECTURES = {name.partition(".")[0] for name in naver.FILES}
_logger = logging.getLogger(__name__)


def license_of(path: Path | None, contents: Mapping[str, Any] | None = None, form: str = "") -> str:
    """Return the license of a file, a folder or loaded contents, "" if no license is stated.

    NAVER's files are recognized by name, by the layout of their training states, and by SHA-256
    (from the manifest or recorded in the cache). Weights trained from them inherit their license.
    Other files state their own: in the run's configuration in a trainer's checkpoint, in the
    metadata of a safetensors file, or in config.json next to the weights. Callers that have already
    read and sorted the file pass ``contents`` and ``form`` to save a second read.
    """
    if path is not None and path.is_dir():
        path = path / "model.safetensors"
    if path is not None and path.name in naver.ALL_FILES:
        return naver.LICENSE
    if not form:
        with suppress(CheckpointError):  # weights of another kind
            if contents is None and path is not None:
                contents = load_checkpoint(path)
            form = sort_keys(contents or {}).form
    if form == "official":
        return naver.LICENSE
    if contents is not None and form == "trainer":
        return _chosen(contents.get("config", {}).get("license"), contents.get("inherited_license"))
    if path is None or not path.is_file():
        return ""
    published = load_manifest(missing_ok=True)  # maintainers have none before the first release
    if sha256(path) in naver.known_hashes(cache_folder(), published):
        return naver.LICENSE
    return _stated(path)


def _stated(path: Path) -> str:
    stated: list[Any] = []
    with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
        stated.append((file.metadata() or {}).get("license"))
    if path.name.startswith(("model.", "pytorch_model.")):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            config = json.loads(path.with_name("config.json").read_text())
            stated.append(config["pretrained_cfg"].get("license"))
    return _chosen(*stated)


def _chosen(*stated: object) -> str:
    names = [name for name in stated if isinstance(name, str) and name]
    is_naver = any(name.lower() == naver.LICENSE for name in names)
    return naver.LICENSE if is_naver else next(iter(names), "")


def describe(path: Path, architecture: str) -> str:
    """Return the license of a file or a timm folder for display, or "not stated"."""
    try:
        found = license_of(path)
    except WeightsError as error:
        raise ValueError(str(error)) from error
    if not found and architecture in _ARCHITECTURES:
        return f"not stated (if the weights are NAVER's: {naver.LICENSE})"
    return found or "not stated"


def combine(*stated: str) -> str:
    """Return the license of weights derived from others: NAVER's if it is one, otherwise all."""
    names = dict.fromkeys(name for name in stated if name and not name.startswith("not stated"))
    return naver.LICENSE if naver.LICENSE in names else " and ".join(names)


def resolve_license(chosen: str, inherited: str) -> str:
    """Return the license of weights trained from others: ``chosen``, unless NAVER's applies."""
    if inherited == naver.LICENSE and chosen not in ("", naver.LICENSE):
        raise ValueError(
            f"license cannot be {chosen}: the run uses weights under {naver.LICENSE}, "
            "which also covers the trained weights; remove --license"
        )
    return chosen or inherited


@functools.cache
def notice() -> None:
    """Warn once per process that NAVER's weights are not for commercial use."""
    if not os.environ.get("TREX_MODELS_NO_NOTICE"):
        _logger.warning(
            "these t-ReX weights are NAVER's, license CC BY-NC-SA 4.0: not for commercial use "
            "(TREX_MODELS_NO_NOTICE=1 hides this message)"
        )
