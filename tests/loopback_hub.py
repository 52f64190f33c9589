"""A Hub on 127.0.0.1 for the real huggingface_hub client, with the Hub's own error codes.

It answers what `hub` and `trex_models.pretrained.resolve` ask for. No answer makes a client that
has hf_xet upload without Xet (see `local_client`).
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
from huggingface_hub import ModelCard, constants

from tests.loopback import Content, Handler, Server, length, sha256

LFS_SUFFIXES = (".bin", ".pt", ".pth", ".safetensors")
LFS_WARNING = "ignore:Use 'content=:DeprecationWarning"  # httpx of the client, at each LFS upload
USER = "me"

RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
MODEL = re.compile(r"/api/models/([^/]+/[^/]+)(?:/([a-z-]+)/([^/]+))?")
LFS_BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
LFS_OBJECT = re.compile(r"/lfs/([0-9a-f]{64})(/verify)?")


class File(NamedTuple):
    """A file of a commit: its content, and git's hash of it; of a large (LFS) file, SHA-256."""

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


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub:
    """The repositories.

    Attributes:
        repos: Commits of main by "organization/name", the last one last.
        objects: Contents of large files by SHA-256.
    """

    def __init__(self) -> None:
        self.repos: dict[str, list[Commit]] = {}
        self.objects: dict[str, Content] = {}

    def file(self, path: str, content: Content) -> File:
        size = length(content)
        if not path.endswith(LFS_SUFFIXES):
            data = content if isinstance(content, bytes) else content.read_bytes()
            return File(content, size, git_oid(data), is_large=False)
        digest = sha256(content)
        self.objects[digest] = content
        return File(content, size, digest, is_large=True)

    def add(
        self, repo_id: str, files: Mapping[str, Content] | None = None, deleted: Iterable[str] = ()
    ) -> str:
        """Commit files to a repository, new or not; returns the commit's hash."""
        commits = self.repos.setdefault(repo_id, [])
        tree = dict(commits[-1].files) if commits else {}
        for path in deleted:
            del tree[path]
        tree |= {path: self.file(path, content) for path, content in (files or {}).items()}
        text = json.dumps([len(commits), {path: tree[path].etag for path in sorted(tree)}])
        commits.append(Commit(hashlib.sha1(text.encode()).hexdigest(), tree))
        return commits[-1].sha

    def find(self, repo_id: str, revision: str) -> Commit | None:
        commits = reversed(self.repos[repo_id])
        return next((c for c in commits if revision in ("main", c.sha)), None)

    def info(self, repo_id: str, commit: Commit) -> dict[str, Any]:
        siblings = [file.sibling(path) for path, file in commit.files.items()]
        return {"id": repo_id, "sha": commit.sha, "siblings": siblings}


class HubServer(Server):
    def __init__(self, hub: Hub) -> None:
        super().__init__(HubHandler)
        self.hub = hub


class HubHandler(Handler):
    server: HubServer

    def answer(self, path: str) -> None:
        self.hub = self.server.hub
        self.authorized = self.headers.get("Authorization", "").startswith("Bearer ")
        if match := RESOLVE.fullmatch(path):
            self._resolve(*map(unquote, match.groups()))
        elif match := LFS_OBJECT.fullmatch(path):
            self._large_file(match[1], verify=match[2] is not None)
        elif match := LFS_BATCH.fullmatch(path):
            self._announce(unquote(match[1]))
        elif match := MODEL.fullmatch(path):
            repo_id, kind, revision = (unquote(group or "") for group in match.groups())
            self._model(repo_id, kind, revision or "main")
        elif path == "/api/validate-yaml":
            self._validate_card()
        elif not self.authorized:
            self._error(401, message="Invalid username or password.")
        elif path == "/api/whoami-v2":
            access = {"accessToken": {"role": "write"}}
            self._json({"name": USER, "type": "user", "orgs": [], "auth": access})
        elif path == "/api/repos/create":
            self._create()
        else:
            self._error(404, message="not found")

    def fail(self, status: int) -> None:
        self._error(status)

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        fields = {"Content-Type": "application/json; charset=utf-8"}
        fields |= {name.replace("_", "-"): text for name, text in headers.items()}
        self.send(status, json.dumps(value).encode(), fields)

    def _error(self, status: int, code: str = "", message: str = "") -> None:
        # Over https the client takes a repository's every 401 without a message about the token for
        # a missing repository; over http only if told so.
        faulty = self.fault is not None and self.fault.headers
        if status == 401 and not faulty and re.match("/api/models/|.*/resolve/", self.path):
            code = code or "RepoNotFound"
        message = message or code or f"status {status}"
        headers = {"X_Error_Message": message}
        if code:
            headers["X_Error_Code"] = code
        self._json({"error": message}, status, **headers)

    def _may_read(self, repo_id: str, missing: int) -> bool:
        if repo_id in self.hub.repos:
            return True
        self._error(404 if self.authorized else missing, "RepoNotFound", "Repository not found")
        return False

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        if not self._may_read(repo_id, 401):
            return
        commit = self.hub.find(repo_id, revision)
        if commit is None:
            self._error(404, "RevisionNotFound")
        elif path not in commit.files:
            headers = {"X_Error_Code": "EntryNotFound", "X_Error_Message": "Entry not found"}
            self._json({"error": "Entry not found"}, 404, X_Repo_Commit=commit.sha, **headers)
        else:
            file = commit.files[path]
            headers = {
                "ETag": f'"{file.etag}"',
                "X-Repo-Commit": commit.sha,
                "Content-Type": "application/octet-stream",
            }
            if file.is_large:
                headers["X-Linked-ETag"] = headers["ETag"]
                headers["X-Linked-Size"] = str(file.size)
            self.send(200, file.content, headers, ranges=True)

    def _model(self, repo_id: str, kind: str, revision: str) -> None:
        if kind in ("preupload", "commit") and not self.authorized:
            self._error(401, message="Invalid username or password.")
            return
        if not self._may_read(repo_id, 404):
            return
        commit = self.hub.find(repo_id, revision)
        if commit is None:
            self._error(404, "RevisionNotFound")
        elif kind in ("", "revision"):
            self._json(self.hub.info(repo_id, commit))
        elif kind == "preupload":
            wanted = json.loads(self.body)["files"]
            self._json({"files": [self._upload_mode(file, commit) for file in wanted]})
        elif kind == "commit":
            self._commit(repo_id, commit)
        else:
            self._error(404, message="not found")

    def _upload_mode(self, file: dict[str, Any], commit: Commit) -> dict[str, Any]:
        path = file["path"]
        mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
        answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        if path in commit.files:  # by it the client knows a file that has not changed
            answer["oid"] = commit.files[path].etag
        return answer

    def _commit(self, repo_id: str, parent: Commit) -> None:
        files: dict[str, Content] = {}
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header" and value.get("parentCommit", parent.sha) == parent.sha:
                continue
            if key == "header":
                self._error(412, message="A commit has happened since. Please refresh.")
                return
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in self.hub.objects:
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                self._error(400, message=f"cannot commit {key} {value['path']}")
                return
        sha = self.hub.add(repo_id, files)
        url = f"{self.server.url}/{repo_id}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def _announce(self, repo_id: str) -> None:
        if not self.authorized:
            self._error(401, message="Invalid username or password.")
        elif self._may_read(repo_id, 404):
            wanted = json.loads(self.body)["objects"]
            self._json({"transfer": "basic", "objects": [self._upload(w) for w in wanted]})

    def _upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        oid = wanted["oid"]
        answer = {"oid": oid, "size": wanted["size"]}
        if oid not in self.hub.objects:
            href = f"{self.server.url}/lfs/{oid}"
            answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        return answer

    def _large_file(self, oid: str, *, verify: bool) -> None:
        if verify and not self.authorized:
            self._error(401, message="Invalid username or password.")
        elif verify:
            known = self.hub.objects.get(oid)
            right = known is not None and length(known) == json.loads(self.body)["size"]
            self._json({}, 200 if right else 404)
        elif sha256(self.body) != oid:  # the client sends no token along with the bytes
            self._error(400, message="the bytes do not have this hash")
        else:
            self.hub.objects[oid] = self.body
            self.send(200)

    def _create(self) -> None:
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        answer = {"url": f"{self.server.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            message = "You already created this model repo"
            self._json({**answer, "error": message}, 409, X_Error_Message=message)
            return
        lines = [f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES]
        self.hub.add(repo_id, {".gitattributes": "".join(lines).encode()})
        self._json(answer)

    def _validate_card(self) -> None:
        try:
            ModelCard(json.loads(self.body)["content"])
        except Exception as error:  # whatever the client's own YAML reader raises
            self._json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        else:
            self._json({"errors": [], "warnings": []})


@contextmanager
def serving(hub: Hub) -> Iterator[HubServer]:
    with HubServer(hub) as server, local_client():
        yield server


@contextmanager
def local_client() -> Iterator[None]:
    """Keep the client in this process to LFS and to the endpoint given; close its connections.

    Where hf_xet is installed, the client uploads by Xet without asking which way the Hub takes, and
    no answer makes it fall back. For its telemetry it asks huggingface.co, whatever the endpoint.
    """
    with (
        mock.patch.object(constants, "HF_HUB_DISABLE_XET", True),
        mock.patch.object(constants, "HF_HUB_DISABLE_TELEMETRY", True),
    ):
        try:
            yield
        finally:
            huggingface_hub.close_session()


def environment(url: str, home: Path) -> dict[str, str]:
    """Variables for a process whose client is to use the Hub at a URL, with an empty cache."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    switches = ("DISABLE_XET", "DISABLE_TELEMETRY", "DISABLE_PROGRESS_BARS")
    ours = {f"HF_HUB_{switch}": "1" for switch in switches}
    return {**kept, **ours, "HF_ENDPOINT": url, "HF_HOME": str(home)}
