"""The servers that stand in for the Hub and for NAVER's, against the real client."""

import socket
import threading
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, errors, hf_hub_download

from tests.loopback import Fault, byte_span, sha256
from tests.loopback_hub import LFS_WARNING, Hub, HubServer, serving

pytestmark = pytest.mark.filterwarnings(LFS_WARNING)

REPO = "naver/trex"
WEIGHTS = bytes(range(256)) * 1000
README = b"---\nlicense: cc-by-nc-sa-4.0\ntags: [timm]\n---\n# t-ReX\n"
TOKEN = "hf_test"
NO_ENTRY = {"X-Error-Code": "EntryNotFound"}


@pytest.fixture
def hub() -> Hub:
    hub = Hub()
    hub.add(REPO, {"model.safetensors": WEIGHTS, "config.json": b"{}", "README.md": README})
    return hub


def download(
    server: HubServer, cache: Path, path: str = "model.safetensors", **options: Any
) -> Path:
    given: dict[str, Any] = {"token": False, "endpoint": server.url, "cache_dir": cache, **options}
    return Path(hf_hub_download(REPO, path, **given))


def get(url: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers, without the client."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as response:
            return response.status, response.read(), dict(response.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), dict(error.headers)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("bytes=2-5", range(2, 6)),
        ("bytes=2-", range(2, 10)),
        ("bytes=8-99", range(8, 10)),
        ("bytes=0-1,3-4", None),
        ("bytes=10-", range(10, 10)),
    ],
)
def test_byte_span(value: str | None, expected: range | None) -> None:
    assert byte_span(value, 10) == expected


def test_download(server: HubServer, hub: Hub, tmp_path: Path) -> None:
    weights = download(server, tmp_path)
    assert weights.read_bytes() == WEIGHTS
    assert weights.resolve().name == sha256(WEIGHTS)
    config = download(server, tmp_path, "config.json")
    assert config.read_bytes() == b"{}"
    assert config.resolve().name == "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # git hash-object
    assert {request.authorization for request in server.log} == {None}

    before = len(server.log)
    assert download(server, tmp_path) == weights
    assert [request.method for request in server.log[before:]] == ["HEAD"]
    assert download(server, tmp_path, revision=hub.repos[REPO][-1].sha) == weights
    assert len(server.log) == before + 1

    first = hub.repos[REPO][-1].sha
    second = hub.add(REPO, {"model.safetensors": b"new"})
    assert download(server, tmp_path, revision=first).read_bytes() == WEIGHTS
    assert download(server, tmp_path).read_bytes() == b"new"
    assert download(server, tmp_path, revision=second).read_bytes() == b"new"
    with pytest.raises(errors.RevisionNotFoundError):
        download(server, tmp_path, revision="0" * 40)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (Fault("", 401), errors.RepositoryNotFoundError, "401"),
        (Fault("", 401, headers={"X-Error-Code": "GatedRepo"}), errors.GatedRepoError, "401"),
        (Fault("", 403), errors.LocalEntryNotFoundError, "locate the file"),
        (Fault("", 404), errors.LocalEntryNotFoundError, "locate the file"),
        (Fault("", 404, headers=NO_ENTRY), errors.EntryNotFoundError, "404"),
        (Fault("^GET", 500), errors.HfHubHTTPError, "500"),
        (Fault("^GET", 503), errors.HfHubHTTPError, "503"),
        (Fault("", 0), Exception, "disconnected"),
        (Fault("^GET", 0, reset=True), Exception, "reset by peer"),
        (Fault("^GET", cut_after=1000, reset=True), Exception, "reset by peer"),
        (Fault("^GET", body=b"short"), OSError, "Consistency check failed"),
    ],
    ids=str,
)
def test_fault(
    server: HubServer, tmp_path: Path, fault: Fault, error: type[Exception], message: str
) -> None:
    server.faults = [fault]
    with pytest.raises(error, match=message):
        download(server, tmp_path)
    assert fault.hits == 1


def test_faults_in_turn_and_other_bytes(server: HubServer, tmp_path: Path) -> None:
    server.faults = [Fault("^HEAD", 503, times=1), Fault("", 500, times=1, delay=0.1)]
    server.faults += [Fault("^GET", body=bytes(len(WEIGHTS)))]  # no client checks them
    assert download(server, tmp_path).read_bytes() == bytes(len(WEIGHTS))
    assert [fault.hits for fault in server.faults] == [1, 1, 1]
    assert [request.method for request in server.log] == ["HEAD", "HEAD", "HEAD", "GET"]


def test_missing(server: HubServer, hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(errors.RemoteEntryNotFoundError):
        download(server, tmp_path, "absent.json")
    del hub.repos[REPO]
    for token, status in ((False, 401), (TOKEN, 404)):
        with pytest.raises(errors.RepositoryNotFoundError) as error:
            download(server, tmp_path, token=token)
        assert error.value.response.status_code == status
    with pytest.raises(errors.RepositoryNotFoundError, match="404"):
        HfApi(endpoint=server.url, token=False).model_info(REPO)


def test_upload(server: HubServer, hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "nested").mkdir(parents=True)
    files = {"model.safetensors": WEIGHTS, "README.md": README, "nested/config.json": b"{}"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    api = HfApi(endpoint=server.url, token=TOKEN)
    assert api.whoami()["name"] == "me"
    assert api.create_repo("me/new").repo_id == "me/new"
    with pytest.raises(errors.HfHubHTTPError, match="already created"):
        api.create_repo("me/new")
    api.create_repo("me/new", exist_ok=True)
    hub.objects.clear()

    commit = api.upload_folder(repo_id="me/new", folder_path=folder)
    assert server.requests("^PUT /lfs/")[0].authorization is None
    assert len(server.requests("^POST /lfs/.*/verify")) == 1
    assert api.model_info("me/new").sha == commit.oid
    for name, content in files.items():
        path = hf_hub_download("me/new", name, endpoint=server.url, cache_dir=tmp_path)
        assert Path(path).read_bytes() == content

    commits = len(hub.repos["me/new"])
    puts = len(server.requests("^PUT"))
    assert api.upload_folder(repo_id="me/new", folder_path=folder).oid == commit.oid
    assert len(hub.repos["me/new"]) == commits
    assert len(server.requests("^PUT")) == puts

    put = partial(api.upload_file, path_in_repo="README.md", repo_id="me/new")
    put(path_or_fileobj=b"new")
    info = api.model_info("me/new", files_metadata=True)
    sizes = {s.rfilename: (s.size, s.lfs and s.lfs.sha256) for s in info.siblings or []}
    assert sizes["model.safetensors"] == (len(WEIGHTS), sha256(WEIGHTS))
    assert sizes["README.md"] == (3, None)
    with pytest.raises(errors.HfHubHTTPError, match="412"):
        put(path_or_fileobj=b"x", parent_commit=commit.oid)
    with pytest.raises(ValueError, match="Invalid metadata"):
        put(path_or_fileobj=b"---\nlicense: [\n---\n")


def test_upload_needs_a_token(server: HubServer, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    api = HfApi(endpoint=server.url, token=False)
    with pytest.raises(errors.HfHubHTTPError, match="401"):
        api.create_repo("me/new")
    with pytest.raises(errors.RepositoryNotFoundError, match="401"):
        api.upload_folder(repo_id=REPO, folder_path=tmp_path)
    assert len(hub.repos[REPO]) == 1
    server.faults = [
        Fault("", 401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
    ]
    with pytest.raises(errors.HfHubHTTPError) as error:
        HfApi(endpoint=server.url, token=TOKEN).model_info(REPO)
    assert not isinstance(error.value, errors.RepositoryNotFoundError)


def test_leaves_nothing_behind(hub: Hub, tmp_path: Path) -> None:
    before = threading.active_count()
    with serving(hub) as server:
        download(server, tmp_path)
        server.faults = [Fault("", delay=60)]
        with socket.create_connection(("127.0.0.1", server.server_address[1])) as idle:
            with socket.create_connection(("127.0.0.1", server.server_address[1])) as waiting:
                waiting.sendall(b"GET / HTTP/1.1\r\n\r\n")
                while not server.requests("^GET /$"):
                    time.sleep(0.01)
                server.stop()
            assert idle.recv(1) == b""
    assert threading.active_count() == before
    with pytest.raises(urllib.error.URLError, match="refused"):
        get(server.url)
