"""The servers that stand in for the Hub and for NAVER's, against the real client."""

import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, errors, hf_hub_download

from tests.loopback import Fault
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
        urllib.request.urlopen(server.url)
