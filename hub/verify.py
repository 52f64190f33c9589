"""Published models against the manifest: download them, and compare everything recorded."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import HfApi
from safetensors import safe_open

from hub import fixed_input
from hub.errors import HubError, explained
from hub.folder import FILES, TIMM_FILES, load
from trex_models import manifest, naver
from trex_models.manifest import Published, sha256


def verify(names: Sequence[str], api: HfApi, manifest_path: Path) -> bool:
    """Check models and print a line about each.

    Args:
        names: Models and tags; none for all that the manifest lists.
        api: The Hub's client.
        manifest_path: The manifest.

    Returns:
        Whether all are as recorded.

    Raises:
        ValueError: The manifest does not list one.
        WeightsError: The manifest is damaged.
    """
    published = manifest.load(manifest_path).models
    for name in names:
        if name not in published:
            raise ValueError(
                f"{manifest_path} does not list {name!r}; it lists: "
                f"{', '.join(published) or 'none'}"
            )
    if not published:
        raise ValueError(f"{manifest_path} lists no model; publish some: python -m hub publish")
    all_good = True
    for name in names or published:
        entry = published[name]
        where = f"{entry.repository}@{entry.revision}"
        by_name = " and by its name" if name in naver.FILES else ""
        verdict = (
            f"good: SHA-256, keys, shapes and {len(entry.outputs)} outputs within "
            f"{fixed_input.TOLERANCE:g}, loaded from its folder{by_name}"
        )
        with tempfile.TemporaryDirectory(prefix="trex-verify-") as cache:
            try:
                if differences := _compare(name, entry, api, Path(cache), manifest_path):
                    verdict, all_good = f"DIFFERS: {'; '.join(differences)}", False
            except HubError as error:
                verdict, all_good = f"NOT CHECKED: {error}", False
        print(f"{name}: {verdict} ({where})", flush=True)
    return all_good


def _compare(
    name: str, entry: Published, api: HfApi, cache: Path, manifest_path: Path
) -> list[str]:
    """Return what differs from the manifest."""
    with explained(entry.repository):
        # Asked once: the client tries for 23 seconds to download from where nothing answers.
        info = api.model_info(entry.repository, revision=entry.revision)
        download = partial(
            api.hf_hub_download, entry.repository, revision=entry.revision, cache_dir=cache
        )
        config, weights = (Path(download(file)) for file in TIMM_FILES)
    files = {sibling.rfilename for sibling in info.siblings or []}
    if unexpected := sorted(files - {*FILES, ".gitattributes"}):
        return [f"files that do not belong there: {', '.join(unexpected)}"]
    if missing := [file for file in FILES if file not in files]:
        return [f"files that are missing: {', '.join(missing)}"]
    found = sha256(weights)
    if found != entry.sha256:
        return [f"SHA-256 of model.safetensors is {found}, recorded is {entry.sha256}"]
    folder = config.parent
    try:
        differences = _compare_keys(weights, folder)
        if not differences:
            differences = _compare_outputs(load(folder), entry, "outputs")
        if not differences and name in naver.FILES:
            model = _load_by_name(name, cache, manifest_path)
            differences = _compare_outputs(model, entry, "outputs of the model by its name")
    except Exception as error:  # timm, torch and safetensors raise many kinds
        reason = str(error).partition("\n")[0]
        return [f"it does not load ({type(error).__name__}: {reason})"]
    return differences


def _compare_keys(weights: Path, folder: Path) -> list[str]:
    built = {key: tuple(t.shape) for key, t in load(folder, pretrained=False).state_dict().items()}
    with safe_open(weights, "pt") as file:
        stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    missing, unexpected = sorted(built.keys() - stored), sorted(stored.keys() - built)
    shapes = [key for key in built if key in stored and built[key] != stored[key]]
    differences = []
    for what, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", shapes)):
        if keys:
            differences.append(f"{len(keys)} keys {what} ({', '.join(keys[:3])})")
    return differences


def _compare_outputs(model: Any, entry: Published, what: str) -> list[str]:
    found = fixed_input.outputs(model)
    error = fixed_input.difference(found, entry.outputs)
    if error <= fixed_input.TOLERANCE:
        return []
    return [
        f"{what} are off by {error:.2g} of the largest, more than {fixed_input.TOLERANCE:g}: "
        f"{found}, recorded {entry.outputs}"
    ]


def _load_by_name(name: str, cache: Path, manifest_path: Path) -> Any:
    """Load as users do, from the cache just filled: by the manifest, with its checks."""
    before = os.environ.get("TREX_MODELS_MANIFEST")
    os.environ["TREX_MODELS_MANIFEST"] = str(manifest_path)
    try:
        return timm.create_model(name, pretrained=True, cache_dir=cache).eval()
    finally:
        if before is None:
            del os.environ["TREX_MODELS_MANIFEST"]
        else:
            os.environ["TREX_MODELS_MANIFEST"] = before
