"""Hub folders to the Hub, and what was published into the manifest.

Each model's folder becomes one commit of the files that differ. Where nothing differs there is no
commit. The manifest is written after every model, so that it is right wherever this is cut short.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoSibling

from hub import fixed_input
from hub.errors import LOG_IN, HubError, explained
from hub.folder import FILES, Model, inspect, load
from trex_models import manifest, naver
from trex_models.manifest import Manifest, Published, sha256


@dataclass(frozen=True)
class Remote:
    """A repository as it stands."""

    revision: str | None
    """The last commit; None where there is no repository."""
    files: dict[str, RepoSibling]


def publish(
    sources: Sequence[Path],
    api: HfApi,
    *,
    namespace: str,
    manifest_path: Path,
    dry_run: bool = False,
) -> None:
    """Upload Hub folders and record them; what is there already is left alone.

    Args:
        sources: Made by ``build``; a folder's name is the repository's.
        api: The Hub's client, with the token.
        namespace: Organisation or user.
        manifest_path: The manifest to write; made if it is missing.
        dry_run: Only say what would be done. Reads the Hub, sends it nothing.

    Raises:
        ValueError: A folder is not fit to be published. Nothing is sent then.
        HubError: The Hub does not do it.
        WeightsError: The manifest is damaged.
    """
    models = [_checked(folder, namespace) for folder in sources]
    for name, count in Counter(model.name for model in models).items():
        if count > 1:
            raise ValueError(f"{count} of the folders are named {name}; publish them one by one")
    recorded = load_or_new(manifest_path)
    if not os.access(manifest_path.parent, os.W_OK):
        raise ValueError(f"{manifest_path.parent} cannot be written; choose another --manifest")
    if not dry_run:
        print(f"publishing to {namespace} as {_who(api)}", flush=True)
    for model in models:
        repository = f"{namespace}/{model.name}"
        digest = sha256(model.folder / "model.safetensors")
        outputs = fixed_input.outputs(load(model.folder))
        revision = _upload(model, repository, api, dry_run)
        if revision is None:
            print(f"  would record it in {manifest_path}")
            continue
        entry = Published(repository, revision, digest, outputs)
        recorded = dataclasses.replace(recorded, models=recorded.models | {model.name: entry})
        manifest.save(recorded, manifest_path)
        print(f"  recorded {repository}@{revision} in {manifest_path}", flush=True)


def load_or_new(path: Path) -> Manifest:
    """Return the manifest at a path, or an empty one where there is no file."""
    return manifest.load(path) if path.exists() else Manifest()


def _checked(folder: Path, namespace: str) -> Model:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; make it: python -m hub build")
    for file in FILES:
        if not (folder / file).is_file():
            raise ValueError(f"{folder} has no {file}; make it: python -m hub build")
    model = inspect(folder, folder.resolve().name)
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
        stated = ModelCard(card).data.get("license")
    except Exception as error:  # of the YAML reader
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{folder / 'README.md'} is damaged ({reason}); build the folder again"
        ) from error
    wanted = naver.LICENSE if model.is_naver else model.license
    if not wanted or stated != wanted:
        raise ValueError(
            f"{folder / 'README.md'}: the licence is {stated!r}, but should be {wanted!r}; build "
            "the folder again"
        )
    if f"{namespace}/{model.name}" not in card:
        raise ValueError(
            f"{folder / 'README.md'}: its examples are not of {namespace}/{model.name}; build the "
            f"folder again with --namespace {namespace}"
        )
    return model


def _who(api: HfApi) -> str:
    if not (api.token or get_token()):
        raise HubError(f"there is no token for the Hub: {LOG_IN}")
    with explained(manifest.without_credentials(api.endpoint)):
        return str(api.whoami()["name"])


def _upload(model: Model, repository: str, api: HfApi, dry_run: bool) -> str | None:
    """Make the repository hold the folder's files; return its commit, or None on a dry run."""
    with explained(repository):
        remote = _read(repository, api)
    if foreign := sorted(remote.files.keys() - {*FILES, ".gitattributes"}):
        raise ValueError(
            f"{repository} has files on the Hub that do not belong there: {', '.join(foreign)}; "
            "delete them there, or choose another --namespace"
        )
    changed = [file for file in FILES if not _same(model.folder / file, remote.files.get(file))]
    state = "unchanged" if not changed else "new" if remote.revision is None else "changed"
    print(f"{repository}: {state}")
    for file in FILES:
        path = model.folder / file
        verb = "upload" if file in changed else "skip, is there already:"
        shown = f"would {verb}" if dry_run else verb
        print(f"  {shown} {file}, {path.stat().st_size} bytes, SHA-256 {sha256(path)}", flush=True)
    if dry_run:
        return None
    with explained(repository):
        if remote.revision is None:
            api.create_repo(repository, exist_ok=True)
        elif not changed:
            return remote.revision
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(file, str(model.folder / file)) for file in changed],
            commit_message=f"{'Update' if remote.revision else 'Add'} {', '.join(changed)}",
            parent_commit=remote.revision,
        )
    return commit.oid


def _read(repository: str, api: HfApi) -> Remote:
    try:
        info = api.model_info(repository, files_metadata=True)
    except RepositoryNotFoundError:
        return Remote(None, {})
    return Remote(info.sha, {sibling.rfilename: sibling for sibling in info.siblings or []})


def _same(path: Path, remote: RepoSibling | None) -> bool:
    if remote is None:
        return False
    if remote.lfs is not None:
        return sha256(path) == remote.lfs.sha256
    return git_hash(path.read_bytes()) == remote.blob_id


def git_hash(data: bytes) -> str:
    """Return what git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
