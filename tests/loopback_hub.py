"""A Hub on 127.0.0.1 for the real huggingface_hub client, with the Hub's own error codes.

It supports the requests of `hub` and `trex_models.pretrained.resolve`, and everybody may write. It
does not support uploads with Xet, which `serving` disables in clients that have hf_xet.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock
from urllib.parse import unquote

import huggingface_hub
from huggingface_hub import constants

from tests.loopback import Content, Handler, Server, read, sha256

LFS_SUFFIXES = (".bin", ".pt", ".pth", ".safetensors")
LFS_WARNING = "ignore:Use 'content=:DeprecationWarning"  # httpx of the client, at each LFS upload

RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
MODEL = re.compile(r"/api/models/([^/]+/[^/]+)(?:/([a-z-]+)/([^/]+))?")


class File(NamedTuple):
    """A file of a commit: its content and git's hash, or SHA-256 for large (LFS) files."""

    content: Content
    size: int
    etag: str
    is_large: bool

    def sibling(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = {"rfilename": path, "size": self.size, "blobId": self.etag}
        if self.is_large:
            found["lfs"] = {"sha256": self.etag, "size": self.size, "pointerSize": 134}
        return found


class Commit(NamedTuple):
    sha: str
    files: Mapping[str, File]


class Hub:
    """State of the Hub.

    Attributes:
        repos: "organization/name" -> commits of main, oldest first.
        objects: SHA-256 -> contents of large files.
    """

    def __init__(self) -> None:
        self.repos: dict[str, list[Commit]] = {}
        self.objects: dict[str, Content] = {}

    def file(self, path: str, content: Content) -> File:
        data = read(content)
        if not path.endswith(LFS_SUFFIXES):
            oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            return File(content, len(data), oid, is_large=False)
        digest = sha256(data)
        self.objects[digest] = content
        return File(content, len(data), digest, is_large=True)

    def add(self, repo_id: str, files: Mapping[str, Content], deleted: Iterable[str] = ()) -> str:
        """Commit files to a new or existing repository and return the commit's hash."""
        commits = self.repos.setdefault(repo_id, [])
        tree = dict(commits[-1].files) if commits else {}
        for path in deleted:
            del tree[path]
        tree |= {path: self.file(path, content) for path, content in files.items()}
        text = json.dumps([len(commits), {path: tree[path].etag for path in sorted(tree)}])
        commits.append(Commit(hashlib.sha1(text.encode()).hexdigest(), tree))
        return commits[-1].sha

    def find(self, repo_id: str, revision: str) -> Commit | None:
        commits = reversed(self.repos[repo_id])
        return next((c for c in commits if revision in ("main", c.sha)), None)


class HubServer(Server):
    def __init__(self, hub: Hub) -> None:
        super().__init__(HubHandler)
        self.hub = hub


class HubHandler(Handler):
    server: HubServer

    def answer(self, path: str) -> None:
        self.hub = self.server.hub
        path = unquote(path)
        if match := RESOLVE.fullmatch(path) or MODEL.fullmatch(path):
            repo_id, kind, rest = match.groups()
            is_file = match.re is RESOLVE
            revision = kind if is_file else rest or "main"
            commit = self.hub.find(repo_id, revision) if repo_id in self.hub.repos else None
            if commit is None:
                what = "Revision" if repo_id in self.hub.repos else "Repo"
                self._error(404, f"{what}NotFound")
            elif is_file:
                self._resolve(commit, rest)
            else:
                self._model(repo_id, kind or "", commit)
        elif path.startswith("/lfs/"):
            self.hub.objects[path.removeprefix("/lfs/")] = self.body
            self.send(200)
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [self._upload(wanted) for wanted in json.loads(self.body)["objects"]]
            self._json({"transfer": "basic", "objects": objects})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "/api/whoami-v2":
            self._json({"name": "me", "type": "user", "orgs": []})
        elif path == "/api/repos/create":
            wanted = json.loads(self.body)
            repo_id = f"{wanted['organization']}/{wanted['name']}"
            self.hub.add(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"})
            self._json({"url": f"{self.server.url}/{repo_id}", "name": repo_id})
        else:
            self._error(404)

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        fields = {name.replace("_", "-"): text for name, text in headers.items()}
        fields["Content-Type"] = "application/json; charset=utf-8"
        self.send(status, json.dumps(value).encode(), fields)

    def _error(self, status: int, code: str = "") -> None:
        self._json({"error": code}, status, X_Error_Message=code, X_Error_Code=code)

    def _resolve(self, commit: Commit, path: str) -> None:
        if path not in commit.files:
            self._error(404, "EntryNotFound")
            return
        file = commit.files[path]
        headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": commit.sha}
        if file.is_large:
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(file.size)}
        self.send(200, file.content, headers, ranges=True)

    def _model(self, repo_id: str, kind: str, commit: Commit) -> None:
        if kind == "preupload":
            wanted = json.loads(self.body)["files"]
            self._json({"files": [self._upload_mode(file["path"], commit) for file in wanted]})
        elif kind == "commit":
            self._commit(repo_id, commit)
        else:
            siblings = [file.sibling(path) for path, file in commit.files.items()]
            self._json({"id": repo_id, "sha": commit.sha, "siblings": siblings})

    def _upload_mode(self, path: str, commit: Commit) -> dict[str, Any]:
        mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
        answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        if path in commit.files:  # the client uses it to detect unchanged files
            answer["oid"] = commit.files[path].etag
        return answer

    def _commit(self, repo_id: str, parent: Commit) -> None:
        files: dict[str, Content] = {}
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif value.get("parentCommit", parent.sha) != parent.sha:  # of the header
                self._error(412)
                return
        sha = self.hub.add(repo_id, files)
        url = f"{self.server.url}/{repo_id}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def _upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in self.hub.objects:
            href = f"{self.server.url}/lfs/{wanted['oid']}"
            answer["actions"] = {"upload": {"href": href}}
        return answer


@contextmanager
def serving(hub: Hub) -> Iterator[HubServer]:
    """Serve a Hub for the client in this process."""
    # If hf_xet is installed, the client uploads with Xet even if the Hub does not support it. Its
    # telemetry contacts huggingface.co regardless of the endpoint.
    switches: dict[str, Any] = {"HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True}
    with HubServer(hub) as server, mock.patch.multiple(constants, **switches):
        yield server
        huggingface_hub.close_session()


def environment(url: str, home: Path) -> dict[str, str]:
    """Return environment variables for a client that uses the Hub at a URL, with an empty cache."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    switches = ("DISABLE_XET", "DISABLE_TELEMETRY", "DISABLE_PROGRESS_BARS")
    ours = {f"HF_HUB_{switch}": "1" for switch in switches}
    return {**kept, **ours, "HF_ENDPOINT": url, "HF_HOME": str(home)}
