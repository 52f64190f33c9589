"""Locate the weights for ``pretrained=True`` by model name.

1. Cache: the Hub's cache, or a NAVER file that was converted earlier.
2. Hub: models in the manifest, at the revision stated there.
3. NAVER's server: the file is downloaded, converted and cached.

The file's SHA-256 is verified every time. HF_HUB_OFFLINE disables all downloads, which leaves the
cache and files that were placed in it manually. Explicit sources (file, state_dict, hf-hub:,
local-dir:) bypass this module.
"""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)

from trex_models.atomic import cache_folder
from trex_models.pretrained import manifest, naver
from trex_models.pretrained.checkpoints import CheckpointError
from trex_models.pretrained.manifest import Manifest, Published, WeightsError, without_credentials

_FILE = "model.safetensors"
_logger = logging.getLogger(__name__)


def fetch(name: str, cache_dir: Path | str | None = None) -> Path:
    """Return a verified safetensors file that contains the weights of ``name.tag``.

    ``cache_dir`` is the root of the Hub's cache and of ours; None selects the default folders.
    """
    if name not in naver.FILES:
        raise WeightsError(f"{name!r} has no weights; available: {', '.join(naver.FILES)}")
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


def _hub_cached(entry: Published | None, cache_dir: Path | str | None) -> Path | None:
    if entry is None:
        return None
    found = try_to_load_from_cache(entry.repository, _FILE, cache_dir, entry.revision)
    return _verified(Path(found), entry) if isinstance(found, str) else None


def _verified(path: Path, entry: Published) -> Path:
    source = f"the manifest for {entry.repository}@{entry.revision}; delete the file and try again"
    # Resolved, since deleting only the link in the Hub's cache would keep the wrong file.
    manifest.check_sha256(path.resolve(), manifest.sha256(path), entry.sha256, source)
    return path


def _from_hub(name: str, entry: Published | None, cache_dir: Path | str | None) -> Path | None:
    if entry is None or constants.HF_HUB_OFFLINE:
        return None
    repository, revision = entry.repository, entry.revision
    try:
        # One request first: hf_hub_download retries for 23 s, or minutes without any response.
        get_hf_file_metadata(hf_hub_url(repository, _FILE, revision=revision))
        found = hf_hub_download(repository, _FILE, revision=revision, cache_dir=cache_dir)
    except Exception as error:  # huggingface_hub has changed its HTTP client and errors before
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
        file, folder = naver.FILES[name][0], cache / "naver"
        hub = "see the warning above" if entry else f"{name} is not published there yet"
        if constants.HF_HUB_OFFLINE:
            hub = "skipped, HF_HUB_OFFLINE is set"
        raise WeightsError(
            f"no weights available for {name}.\n"
            f"  Cache: no weights in {cache}\n"
            f"  Hub: {hub}\n"
            f"  NAVER: {error}\n"
            f"Solutions (one is enough):\n"
            f"  - download {naver.remote_file(file).url} to {folder / file}; it is converted once\n"
            f"  - copy {folder} from a machine that has the weights\n"
            f"  - pass pretrained_cfg_overlay=dict(file={file!r}) with the path of your copy\n"
            f"  - in a checkout, run python -m convert naver {file} --output OUT, then "
            f'create_model("local-dir:OUT/{name}", pretrained=True)'
        ) from error
