"""Verification of published models: download them and compare them with the manifest."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import HfApi
from safetensors.torch import load_file
from tyro.conf import Positional

from hub import fixed_input
from hub.errors import HubError, explain_errors
from hub.hub_folder import EVAL_RESULTS, FILES, TIMM_FILES, load_folder
from trex_models.cli import first_line
from trex_models.pretrained import naver
from trex_models.pretrained.checkpoints import mismatch
from trex_models.pretrained.manifest import Published, load_manifest, manifest_path, sha256


def verify(names: Positional[tuple[str, ...]] = (), *, manifest: Path | None = None) -> bool:
    """Download published models, compare them with the manifest and print one line per model.

    Example: python -m hub verify trex_resnet50.in1k

    Args:
        names: Names and tags of models. The default is all models in the manifest.
        manifest: Manifest file. The default is TREX_MODELS_MANIFEST or the file in the package.

    Returns:
        True if all models match the manifest.
    """
    api = HfApi()
    path = manifest or manifest_path()
    published = load_manifest(path).models
    for name in names:
        if name not in published:
            raise ValueError(
                f"{path} does not list {name!r}; choose from: {', '.join(published) or 'none'}"
            )
    if not published:
        raise ValueError(f"{path} lists no model; publish one with python -m hub publish")
    all_good = True
    for name in names or published:
        entry = published[name]
        by_name = " and by name" if name in naver.FILES else ""
        verdict = (
            f"OK: SHA-256, keys, shapes and {len(entry.outputs)} outputs within "
            f"{fixed_input.TOLERANCE:g}, loaded from its folder{by_name}"
        )
        with tempfile.TemporaryDirectory(prefix="trex-verify-") as cache:
            try:
                if difference := _compare(name, entry, api, Path(cache), path):
                    verdict, all_good = f"DIFFERS: {difference}", False
            except HubError as error:
                verdict, all_good = f"NOT CHECKED: {error}", False
        print(f"{name}: {verdict} ({entry.repository}@{entry.revision})", flush=True)
    return all_good


def _compare(name: str, entry: Published, api: HfApi, cache: Path, manifest: Path) -> str:
    """Return the first difference from the manifest, "" if there is none."""
    with explain_errors(entry.repository):
        # One request first: without a connection, hf_hub_download retries for 23 seconds.
        info = api.model_info(entry.repository, revision=entry.revision)
        download = partial(
            api.hf_hub_download, entry.repository, revision=entry.revision, cache_dir=cache
        )
        config, weights = (Path(download(file)) for file in TIMM_FILES)
    files = {sibling.rfilename for sibling in info.siblings or []}
    if unexpected := sorted(files - {*FILES, EVAL_RESULTS, ".gitattributes"}):
        return f"unexpected files: {', '.join(unexpected)}"
    if missing := [file for file in FILES if file not in files]:
        return f"missing files: {', '.join(missing)}"
    digest = sha256(weights)
    if digest != entry.sha256:
        return f"SHA-256 of model.safetensors is {digest}, not {entry.sha256} as in the manifest"
    folder = config.parent
    try:
        built = load_folder(folder, pretrained=False).state_dict()
        difference = mismatch(load_file(weights), built, exact=True)
        if not difference:
            difference = _compare_outputs(load_folder(folder), entry, "outputs")
        if not difference and name in naver.FILES:
            model = _load_by_name(name, cache, manifest)
            difference = _compare_outputs(model, entry, "outputs of the model loaded by name")
    except Exception as error:  # timm, torch and safetensors raise many types
        return f"the model does not load ({type(error).__name__}: {first_line(error)})"
    return difference


def _compare_outputs(model: Any, entry: Published, title: str) -> str:
    outputs = fixed_input.fixed_outputs(model)
    error = fixed_input.relative_error(outputs, entry.outputs)
    if error <= fixed_input.TOLERANCE:
        return ""
    return (
        f"{title} have a relative error of {error:.2g} (tolerance {fixed_input.TOLERANCE:g}): "
        f"{outputs}, not {entry.outputs} as in the manifest"
    )


def _load_by_name(name: str, cache: Path, manifest: Path) -> Any:
    """Load a model by name as users do: from the filled cache, verified with the manifest."""
    before = os.environ.get("TREX_MODELS_MANIFEST")
    os.environ["TREX_MODELS_MANIFEST"] = str(manifest)
    try:
        return timm.create_model(name, pretrained=True, cache_dir=cache).eval()
    finally:
        if before is None:
            del os.environ["TREX_MODELS_MANIFEST"]
        else:
            os.environ["TREX_MODELS_MANIFEST"] = before
