"""Upload of Hub folders and their record in the manifest.

Each model's changed files become one commit. The manifest is written after every model and thus
remains correct if the command is interrupted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoSibling
from tyro.conf import Positional

from hub import fixed_input
from hub.build_folders import NAMESPACE
from hub.errors import LOG_IN, HubError, explain_errors
from hub.hub_folder import EVAL_RESULTS, FILES, HubModel, inspect_folder, load_folder
from trex_models.cli import first_line
from trex_models.pretrained import naver
from trex_models.pretrained.manifest import (
    Published,
    load_manifest,
    manifest_path,
    save_manifest,
    sha256,
    without_credentials,
)


def publish(
    folders: Positional[tuple[Path, ...]],
    *,
    namespace: str = NAMESPACE,
    manifest: Path | None = None,
    dry_run: bool = False,
) -> None:
    """Upload Hub folders to the Hub and record them in a manifest. Unchanged files are skipped.

    Example: python -m hub publish HUB/* --dry-run

    Args:
        folders: Folders created by "python -m hub build", named after their repositories.
        namespace: Organization or user on the Hub.
        manifest: Manifest that records the models; created if missing. The default is
            TREX_MODELS_MANIFEST or the file in the package.
        dry_run: Print all actions without uploading or recording anything.
    """
    if not folders:
        raise ValueError("no Hub folder given; pass folders created by python -m hub build")
    api = HfApi()
    path = manifest or manifest_path()
    models = [_checked(folder, namespace) for folder in folders]
    for name, count in Counter(model.name for model in models).items():
        if count > 1:
            raise ValueError(f"{count} folders have the name {name}; publish them one by one")
    recorded = load_manifest(path, missing_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path.parent} is not writable; choose another --manifest")
    if not dry_run:
        print(f"publishing to {namespace} as {_user_name(api)}", flush=True)
    for model in models:
        repository = f"{namespace}/{model.name}"
        digest = sha256(model.folder / "model.safetensors")
        outputs = fixed_input.fixed_outputs(load_folder(model.folder))
        revision = _upload(model, repository, api, dry_run)
        if revision is None:
            print(f"  would record the model in {path}")
            continue
        entry = Published(repository, revision, digest, outputs)
        recorded = dataclasses.replace(recorded, models=recorded.models | {model.name: entry})
        save_manifest(recorded, path)
        print(f"  recorded {repository}@{revision} in {path}", flush=True)


def _checked(folder: Path, namespace: str) -> HubModel:
    """Inspect a folder and check the license and the examples in its model card."""
    for file in FILES:
        if not (folder / file).is_file():
            raise ValueError(f"{folder} has no {file}; create it with python -m hub build")
    model = inspect_folder(folder, folder.resolve().name)
    path = folder / "README.md"
    try:
        card = path.read_text(encoding="utf-8")
        stated = ModelCard(card).data.get("license")
    except Exception as error:  # the YAML reader raises many types
        raise ValueError(
            f"{path} is damaged ({first_line(error)}); build the folder again"
        ) from error
    expected = naver.LICENSE if model.is_naver else model.license
    if not expected or stated != expected:
        raise ValueError(
            f"{path}: license must be {expected!r}, got {stated!r}; build the folder again"
        )
    if f"{namespace}/{model.name}" not in card:
        raise ValueError(
            f"{path}: the examples do not use {namespace}/{model.name}; build the folder again "
            f"with --namespace {namespace}"
        )
    return model


def _user_name(api: HfApi) -> str:
    if not (api.token or get_token()):
        raise HubError(f"no token for the Hub: {LOG_IN}")
    with explain_errors(without_credentials(api.endpoint)):
        return str(api.whoami()["name"])


def _upload(model: HubModel, repository: str, api: HfApi, dry_run: bool) -> str | None:
    """Upload changed files to a repository; return the last commit, or None for a dry run."""
    with explain_errors(repository):
        last, files = _read(repository, api)
    local = [*FILES, *[EVAL_RESULTS] * (model.folder / EVAL_RESULTS).exists()]
    if unexpected := sorted(files.keys() - {*local, ".gitattributes"}):
        raise ValueError(
            f"{repository} has unexpected files on the Hub: {', '.join(unexpected)}; delete them "
            "there or choose another --namespace"
        )
    changed = [file for file in local if not _same(model.folder / file, files.get(file))]
    state = "unchanged" if not changed else "new" if last is None else "changed"
    print(f"{repository}: {state}")
    for file in local:
        path = model.folder / file
        verb = "upload" if file in changed else "skip (unchanged)"
        shown = f"would {verb}" if dry_run else verb
        print(f"  {shown} {file}, {path.stat().st_size} bytes, SHA-256 {sha256(path)}", flush=True)
    if dry_run:
        return None
    with explain_errors(repository):
        if last is None:
            api.create_repo(repository, exist_ok=True)
        elif not changed:
            return last
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(file, str(model.folder / file)) for file in changed],
            commit_message=f"{'Update' if last else 'Add'} {', '.join(changed)}",
            parent_commit=last,
        )
    return commit.oid


def _read(repository: str, api: HfApi) -> tuple[str | None, dict[str, RepoSibling]]:
    """Return a repository's last commit and its files by name; None and {} if it does not exist."""
    try:
        info = api.model_info(repository, files_metadata=True)
    except RepositoryNotFoundError:
        return None, {}
    return info.sha, {sibling.rfilename: sibling for sibling in info.siblings or []}


def _same(path: Path, remote: RepoSibling | None) -> bool:
    if remote is None:
        return False
    if remote.lfs is not None:
        return sha256(path) == remote.lfs.sha256
    data = path.read_bytes()  # the Hub reports git's blob hash for small files
    digest = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return digest == remote.blob_id
