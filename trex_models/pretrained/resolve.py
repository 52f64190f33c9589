"""Find the file of ``pretrained=True``, by name.

1. The cache: the Hub's own, or NAVER's file converted earlier.
2. The Hub: models that the manifest lists, at its revision.
3. NAVER's file: downloaded, converted, cached.

The file's SHA-256 is checked each time. Under HF_HUB_OFFLINE the network is not used: 1 remains,
and of 3 a file placed by hand. Explicit sources (file, state_dict, hf-hub:, local-dir:) bypass
this module.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)

from trex_models.pretrained import manifest, naver
from trex_models.pretrained.checkpoints import CheckpointError
from trex_models.pretrained.manifest import Manifest, Published, WeightsError, without_credentials

_FILE = "model.safetensors"
_logger = logging.getLogger(__name__)


def fetch(name: str, cache_dir: Path | str | None = None) -> Path:
    """Return a verified safetensors file of a model, by name and tag, or of one that contains it.

    ``cache_dir`` is the folder of the Hub's cache and ours; None for the default ones.
    """
    if name not in naver.FILES:
        raise WeightsError(f"no weights are known for {name!r}, only for {', '.join(naver.FILES)}")
    published = manifest.load_manifest()
    entry = published.models.get(name)
    cache = cache_folder(cache_dir)
    try:
        path = _hub_cached(entry, cache_dir) or naver.cached(name, cache, published)
    except OSError as error:
        reason = f"{error.filename} cannot be read ({error.strerror})"
        raise WeightsError(
            f"{reason}; set TREX_MODELS_CACHE or HF_HOME to another folder"
        ) from error
    if path is not None:
        return path
    return _from_hub(name, entry, cache_dir) or _from_naver(name, cache, published, entry)


def cache_folder(cache_dir: Path | str | None = None) -> Path:
    """Return our cache's folder: TREX_MODELS_CACHE, or one next to the Hub's own cache."""
    chosen = os.environ.get("TREX_MODELS_CACHE")
    if cache_dir is None and chosen:
        return Path(chosen).expanduser()
    return Path(cache_dir or constants.HF_HOME) / "trex_models"


def _hub_cached(entry: Published | None, cache_dir: Path | str | None) -> Path | None:
    if entry is None:
        return None
    found = try_to_load_from_cache(entry.repository, _FILE, cache_dir, entry.revision)
    return _verified(Path(found), entry) if isinstance(found, str) else None


def _verified(path: Path, entry: Published) -> Path:
    source = f"the manifest for {entry.repository}@{entry.revision}; delete the file and try again"
    # The Hub's cache links to its files, and would link to a wrong one again.
    manifest.check_sha256(path.resolve(), manifest.sha256(path), entry.sha256, source)
    return path


def _from_hub(name: str, entry: Published | None, cache_dir: Path | str | None) -> Path | None:
    if entry is None or constants.HF_HUB_OFFLINE:
        return None
    repository, revision = entry.repository, entry.revision
    try:
        # Asked once: hf_hub_download tries for 23 seconds, or minutes where nothing answers.
        get_hf_file_metadata(hf_hub_url(repository, _FILE, revision=revision))
        found = hf_hub_download(repository, _FILE, revision=revision, cache_dir=cache_dir)
    except Exception as error:  # of the HTTP client, which huggingface_hub has changed before
        reason = without_credentials(str(error).partition("\n")[0])
        _logger.warning(
            "%s is not available from the Hub (%s: %s); trying NAVER's file",
            *(name, type(error).__name__, reason),
        )
        return None
    return _verified(Path(found), entry)


def _from_naver(name: str, cache: Path, published: Manifest, entry: Published | None) -> Path:
    try:
        return naver.obtain(name, cache, published)
    except (CheckpointError, WeightsError) as error:
        file = naver.FILES[name][0]
        hub = "see the warning above" if entry else f"{name} is not published there yet"
        if constants.HF_HUB_OFFLINE:
            hub = "not asked: HF_HUB_OFFLINE is set"
        raise WeightsError(
            f"no weights for {name}.\n"
            f"  cache: none under {cache}\n"
            f"  Hub: {hub}\n"
            f"  NAVER: {error}\n"
            f"Any one of these helps:\n"
            f"  - place {naver.url(file)} at {cache / 'naver' / file}; it is converted once\n"
            f"  - copy {cache / 'naver'} here from a machine where this works\n"
            f"  - pretrained_cfg_overlay=dict(file={file!r}), with the path of your copy\n"
            f"  - in a checkout: python -m convert naver {file} --output OUT, then "
            f'create_model("local-dir:OUT/{name}", pretrained=True)'
        ) from error
