"""pretrained=True by name: the cache, the Hub, NAVER's files, and all errors."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor

from tests import official_files
from tests.file_server import PREFIX, FileServer
from tests.loopback import Fault, sha256
from tests.loopback_hub import Hub, HubServer, environment, serving
from tests.models import tiny_method
from tests.processes import Forked, run_python
from tests.reference_resnet import outputs, pictures
from trex_models import CheckpointError, WeightsError
from trex_models.pretrained import download, licenses, manifest, naver, resolve

ROOT = Path(__file__).parents[1]
# Model -> the corresponding tensor of the reference's outputs, and the file with its weights.
MODELS = {
    "trex_resnet50.in1k": (0, "trex.pth"),
    "trexstar_resnet50.in1k": (0, "trexstar.pth"),
    "trex_resnet50.in1k_r2": (0, "trex_2.pth"),
    "trexstar_resnet50.in1k_r2": (0, "trexstar_2.pth"),
    "trex_resnet50_proj.in1k_r2": (1, "trex_2_checkpoint_full.pth"),
    "trexstar_resnet50_proj.in1k_r2": (1, "trexstar_2_checkpoint_full.pth"),
    "trex_resnet50_cls.in1k_r2": (2, "trex_2_checkpoint_full.pth"),
    "trexstar_resnet50_cls.in1k_r2": (2, "trexstar_2_checkpoint_full.pth"),
}
IMAGES = pictures(2, 64)
MIB = 1 << 20


@pytest.fixture(scope="module")
def expected(release: Path) -> dict[str, Tensor]:
    """Outputs of every model for IMAGES, (2, ...) float64, from the independent reference."""
    loaded = {
        path.name: outputs(torch.load(path, weights_only=False), IMAGES)
        for path in release.iterdir()
    }
    found = {name: loaded[file][part] for name, (part, file) in MODELS.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@pytest.fixture
def server(release: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """NAVER's release; models skip their initialization, which takes most of the time."""
    for name in ("kaiming_normal_", "kaiming_uniform_", "trunc_normal_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
    with FileServer({path.name: path for path in release.iterdir()}) as server:
        yield server


@pytest.fixture
def cache(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, an empty manifest, and the loopback server instead of NAVER's."""
    manifest.save_manifest(manifest.Manifest(), tmp_path / "manifest.json")
    monkeypatch.setenv("TREX_MODELS_MANIFEST", str(tmp_path / "manifest.json"))
    monkeypatch.setenv("TREX_MODELS_NAVER_URL", server.url)
    monkeypatch.setenv("TREX_MODELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield tmp_path / "cache"
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)


def visible(cache: Path) -> list[str]:
    """Return the files in our cache, except lock files."""
    return sorted(p.name for p in (cache / "naver").glob("*") if p.suffix != ".lock")


@torch.no_grad()
def assert_outputs(model: Any, reference: Tensor) -> None:
    assert_close(model.double().eval()(IMAGES.double()), reference)


def assert_close(found: Tensor, reference: Tensor) -> None:
    error = (found - reference).abs().max() / reference.abs().max()
    assert error < 1e-6, error


def assert_refused(message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        resolve.fetch("trex_resnet50.in1k")


# NAVER's files, in this process


def test_every_name_from_naver(
    cache: Path, server: FileServer, expected: dict[str, Tensor], tmp_path: Path
) -> None:
    for name, reference in expected.items():
        model: Any = timm.create_model(name, pretrained=True)
        assert "file" not in model.pretrained_cfg
        assert_outputs(model, reference)
    assert sorted(r.path for r in server.log) == sorted(
        naver.remote_file(file).url.removeprefix(server.url.removesuffix(PREFIX))
        for file in {file for _, file in MODELS.values()}
    )
    assert all(request.authorization is None for request in server.log)
    save_for_hf(model, str(tmp_path / "saved"), safe_serialization=True)
    assert str(tmp_path) not in (tmp_path / "saved" / "config.json").read_text()
    bare: Any = timm.create_model("trex_resnet50", pretrained=True, features_only=True)
    assert "file" not in bare.pretrained_cfg
    tuned: Any = timm.create_model("trex_resnet50_cls", pretrained=True, num_classes=10, in_chans=1)
    assert tuned.fc.weight.shape == (10, 256)
    assert len(server.log) == 6

    found = {path.suffix for path in (cache / "naver").iterdir()}
    assert found == {".json", ".safetensors", ".lock"}
    for path in (cache / "naver").glob("*.safetensors"):
        assert path.stat().st_mode & 0o777 == path.with_suffix(".json").stat().st_mode & 0o777
        record = json.loads(path.with_suffix(".json").read_text())
        assert record["sha256"] == sha256(server.files[record["file"]])
        assert record["converted_sha256"] == sha256(path)


@pytest.mark.usefixtures("cache")
def test_a_full_file_serves_the_backbone_and_a_changed_one_is_refused(server: FileServer) -> None:
    whole = resolve.fetch("trexstar_resnet50_cls.in1k_r2")
    assert resolve.fetch("trexstar_resnet50.in1k_r2") == whole
    assert len(server.log) == 1
    assert timm.create_model("trexstar_resnet50.in1k_r2", pretrained=True).num_classes == 0
    path = resolve.fetch("trex_resnet50.in1k")
    state = load_file(path)
    state["conv1.weight"] += 1
    save_file(state, path)
    assert_refused(rf"SHA-256 of {path} is .*trex\.json; delete both")
    path.with_suffix(".json").write_text("{}")
    assert_refused(r"trex\.json is damaged .*delete it")


@pytest.mark.usefixtures("cache")
def test_messages(server: FileServer, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    licenses.notice.cache_clear()
    for _ in range(2):
        timm.create_model("trex_resnet50", pretrained=True)
    said = [record.getMessage() for record in caplog.records if "trex" in record.name]
    digest = sha256(server.files["trex.pth"])
    assert said[0] == f"downloading {server.url}trex.pth for trex_resnet50.in1k, once"
    assert f"converted trex.pth (SHA-256 {digest}) to" in said[1]
    assert "not for commercial use" in said[2]
    assert len(said) == 3
    caplog.clear()
    licenses.notice.cache_clear()
    monkeypatch.setenv("TREX_MODELS_NO_NOTICE", "1")
    timm.create_model("trex_resnet50", pretrained=True)
    timm.create_model("trex_resnet50")
    assert not [record for record in caplog.records if "trex" in record.name]
    licenses.notice.cache_clear()


@pytest.mark.usefixtures("cache")
def test_connection_that_breaks_is_resumed(server: FileServer, release: Path) -> None:
    server.faults = [Fault("GET", cut_after=31_000_000, times=2)]
    found = load_file(resolve.fetch("trex_resnet50.in1k"))
    starts = [request.range for request in server.log]
    assert starts == [None, "bytes=31000000-", "bytes=62000000-"]
    original = torch.load(release / "trex.pth", weights_only=True)
    assert all(torch.equal(found[key], original[key]) for key in original)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault("GET", status=404), r"trex\.pth is not available: the server answered 404 Not"),
        (Fault("GET", status=500), r"trex\.pth is not available: the server answered 500 Int"),
        (Fault("GET", cut_after=0), r"trex\.pth is not available: connection closed early"),
        (Fault("GET", delay=60), "trex.pth is not available: timed out"),
        (Fault("GET", endless=(b"x", 60)), "trex.pth is not available: timed out"),
        (Fault("GET", endless=(b"x", 0.1)), "trex.pth is not available: only . bytes in "),
        (Fault("GET", endless=(bytes(MIB), 0)), "larger than 200 MB, not NAVER's file"),
        (Fault("GET", body=b"<!DOCTYPE html><p>moved"), r"trex\.pth\.part is a web page"),
        (Fault("GET", body=b"PK\x03\x04 cut"), "damaged or truncated"),
    ],
    ids="404 500 cut silent hang drip endless page damaged".split(),
)
def test_missing_files_of_naver_are_reported(
    cache: Path, server: FileServer, fault: Fault, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults = [fault]
    monkeypatch.setattr(download, "STALL_SECONDS", 0.5)
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(WeightsError, match=reason) as caught:
        timm.create_model("trex_resnet50", pretrained=True)
    message = str(caught.value)
    assert message.startswith("no weights available for trex_resnet50.in1k.\n")
    assert "Hub: trex_resnet50.in1k is not published there yet" in message
    for remedy in (f"download {server.url}trex.pth to {cache}/naver/trex.", "file=", "convert nav"):
        assert remedy in message
    assert visible(cache) == []


@pytest.mark.parametrize(
    ("name", "served", "reason"),
    [
        ("trex_resnet50_cls", "trexstar_2_checkpoint_full.pth", "got a projector with 1 hidden"),
        ("trex_resnet50_cls", "trex_2.pth", "must contain a projector with 3.*got only a backb"),
        ("trex_resnet50", "trex_2_checkpoint_full.pth", "must contain only a backbone, got a pro"),
        ("trex_resnet50", "nan.pth", r"layer1\.0\.conv1\.weight has 1 non-finite values"),
    ],
)
def test_renamed_and_damaged_files(
    cache: Path, release: Path, tmp_path: Path, name: str, served: str, reason: str
) -> None:
    state = official_files.backbone_checkpoint()
    state["layer1.0.conv1.weight"][0, 0] = float("nan")
    official_files.write(state, tmp_path / "nan.pth")
    file = "trex_2_checkpoint_full.pth" if name.endswith("cls") else "trex.pth"
    (cache / "naver").mkdir(parents=True)
    (cache / "naver" / file).symlink_to((tmp_path if served == "nan.pth" else release) / served)
    with pytest.raises(WeightsError, match=reason):
        timm.create_model(name, pretrained=True)
    assert visible(cache) == [file]


def test_changed_files(cache: Path, server: FileServer, release: Path, tmp_path: Path) -> None:
    empty = (tmp_path / "manifest.json").read_text()
    first = resolve.fetch("trex_resnet50.in1k")
    digest = sha256(server.files["trex.pth"])
    first.unlink()
    server.files["trex.pth"] = server.files["trexstar.pth"]
    assert_refused(rf"refused: .* not {digest} as in .*trex.json .first use.; if NAVER")
    assert visible(cache) == ["trex.json"]
    shutil.rmtree(cache)
    known = manifest.Manifest(naver={"trex.pth": digest})
    manifest.save_manifest(known, tmp_path / "manifest.json")
    assert_refused(rf"refused: .* not {digest} as in the manifest; delete the")
    assert visible(cache) == []
    # First use of a file that differs from the manifest.
    (tmp_path / "manifest.json").write_text(empty)
    resolve.fetch("trex_resnet50.in1k")
    manifest.save_manifest(known, tmp_path / "manifest.json")
    assert_refused(rf"refused: .* not {digest} as in the manifest; delete the")
    shutil.rmtree(cache)
    server.files["trex.pth"] = release / "trex.pth"
    assert resolve.fetch("trex_resnet50.in1k").exists()


@pytest.mark.usefixtures("cache")
def test_servers_that_are_not_there_or_cannot_resume(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setenv("TREX_MODELS_NAVER_URL", "http://127.0.0.1:9")
    assert_refused(r"trex\.pth is not available: .*refused")
    # One message per attempt; the last one is the error.
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == download.ATTEMPTS
    monkeypatch.setenv("TREX_MODELS_NAVER_URL", server.url)
    server.ranges = False
    server.faults = [Fault("GET", cut_after=31_000_000)]
    assert_refused("is not available: connection closed early")
    assert len(server.log) == 4
    server.faults = [Fault("GET", cut_after=31_000_000, times=2)]
    assert resolve.fetch("trex_resnet50.in1k").exists()


def test_links_and_remains_of_killed_processes(cache: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (cache / "naver").mkdir(parents=True)
    for name in (".trex.pth.part", ".trex.safetensors.tmp", ".trex.json.tmp"):
        (cache / "naver" / name).symlink_to(victim)
    (cache / "naver" / ".trex_2.pth.part").touch()  # of another file, maybe still downloading
    header = resolve.fetch("trex_resnet50.in1k").read_bytes()[8:72]  # contains no time
    assert header == b'{"__metadata__": {"format": "pt", "license": "cc-by-nc-sa-4.0"},'
    assert victim.read_bytes() == b"precious"
    assert visible(cache) == [".trex_2.pth.part", "trex.json", "trex.safetensors"]


@pytest.mark.parametrize("template", ["http://ada:s%2Fcret@{}", "http://{}?sig=s%2Fcret"])
def test_credentials_of_a_mirror(
    cache: Path,
    server: FileServer,
    template: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("TREX_MODELS_NAVER_URL", template.format(server.url.partition("//")[2]))
    server.faults = [Fault("GET", status=404, times=1)]
    with pytest.raises(WeightsError) as caught:
        resolve.fetch("trex_resnet50.in1k")
    resolve.fetch("trex_resnet50.in1k")
    assert json.loads((cache / "naver" / "trex.json").read_text())["url"] == f"{server.url}trex.pth"
    assert "cret" not in "".join(traceback.format_exception(caught.value)) + caplog.text
    sent = "Basic YWRhOnMvY3JldA==" if "ada" in template else None
    assert {r.authorization for r in server.log} == {sent}

    with FileServer({"trex.pth": b""}) as other:
        location = {"Location": f"{other.url}trex.pth"}
        server.faults = [Fault("GET", status=302, headers=location)]
        shutil.rmtree(cache)
        with pytest.raises(WeightsError):
            resolve.fetch("trex_resnet50.in1k")
        assert [r.authorization for r in other.log] == [None]


@pytest.mark.parametrize(
    "address",
    ["http://ada:s/cret@host", "http://ada:s[cret@host", "http://host?s cret", "s://cret"],
)
def test_malformed_addresses(cache: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREX_MODELS_NAVER_URL", address)
    with pytest.raises(WeightsError, match="TREX_MODELS_NAVER_URL must be an http") as caught:
        resolve.fetch("trex_resnet50.in1k")
    assert "cret" not in "".join(traceback.format_exception(caught.value))
    assert visible(cache) == []
    monkeypatch.setenv("TREX_MODELS_NAVER_URL", "https://127.0.0.1")
    response = SimpleNamespace(headers={}, url="http://127.0.0.1/trex.pth", close=lambda: None)
    monkeypatch.setattr(download, "urlopen", lambda *_, **__: response)
    assert_refused("the server redirects from https to http")


def test_files_placed_by_hand_and_cache_dir_of_the_call(
    cache: Path, server: FileServer, release: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="skipped, HF_HUB_OFFLINE is set"):
        resolve.fetch("trexstar_resnet50_proj.in1k_r2")
    file = "trexstar_2_checkpoint_full.pth"
    (cache / "naver").mkdir(parents=True)
    shutil.copy(release / file, cache / "naver" / file)
    assert resolve.fetch("trexstar_resnet50_proj.in1k_r2").stem == Path(file).stem
    assert resolve.fetch("trexstar_resnet50.in1k_r2").stem == Path(file).stem
    assert (cache / "naver" / file).exists()
    assert server.log == []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    timm.create_model("trex_resnet50", pretrained=True, cache_dir=tmp_path / "other")
    assert (tmp_path / "other" / "trex_models" / "naver" / "trex.safetensors").exists()


@pytest.mark.usefixtures("cache")
def test_manifests(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    entry: dict[str, Any] = {"repository": "a/b", "revision": "0" * 40, "sha256": "0" * 64}
    for contents in (
        "",
        "[]",
        "{}",
        '{"models": {"x": {}}, "naver": {}}',
        json.dumps({"models": {"x": entry | {"revision": "main"}}, "naver": {}}),
        json.dumps({"models": {"x": entry | {"sha256": None}}, "naver": {}}),
    ):
        path.write_text(contents)
        with pytest.raises(WeightsError, match=r"manifest\.json is not a valid manifest"):
            timm.create_model("trex_resnet50", pretrained=True)
    path.unlink()
    assert_refused("No such file")
    with pytest.raises(WeightsError, match=r"'trex_resnet50' has no weights; available: trex"):
        resolve.fetch("trex_resnet50")
    written = manifest.Published(**entry, outputs=(1.5, -2.0))
    known = manifest.Manifest({"trex_resnet50.in1k": written}, {"trex.pth": "2" * 64})
    manifest.save_manifest(known, path)
    assert manifest.load_manifest(path) == known
    packaged = manifest.load_manifest(manifest.PACKAGED)
    assert packaged.models.keys() <= naver.FILES.keys()
    assert packaged.naver.keys() <= {file for _, file in MODELS.values()}


# Explicit files and state dicts


def from_file(name: str, file: Path, **kwargs: Any) -> Any:
    overlay = {"file": str(file)}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def test_explicit_files(
    cache: Path, server: FileServer, release: Path, expected: dict[str, Tensor], tmp_path: Path
) -> None:
    full = release / "trexstar_2_checkpoint_full.pth"
    for part in ("_cls", "_proj", ""):
        name = f"trexstar_resnet50{part}"
        assert_outputs(from_file(name, full), expected[f"{name}.in1k_r2"])
    assert from_file("trexstar_resnet50_cls", full, num_classes=3).fc.weight.shape == (3, 256)
    assert_outputs(
        from_file("trex_resnet50", release / "trexstar.pth"), expected["trexstar_resnet50.in1k"]
    )
    with pytest.raises(RuntimeError, match="do not match trex_resnet50_proj: .*missing"):
        from_file("trex_resnet50_proj", release / "trex.pth")
    with pytest.raises(RuntimeError, match="do not match trex_resnet50_cls: .*missing"):
        from_file("trex_resnet50_cls", full)
    with pytest.raises(CheckpointError, match=r"none\.pth cannot be read"):
        from_file("trex_resnet50", release / "none.pth")
    state = torch.load(release / "trex.pth", weights_only=True)
    for wrapped in (state, {f"module.{key}": value for key, value in state.items()}):
        given: Any = timm.create_model(
            "trex_resnet50", pretrained=True, pretrained_cfg_overlay={"state_dict": wrapped}
        )
        assert "state_dict" not in given.pretrained_cfg
        assert_outputs(given, expected["trex_resnet50.in1k"])
    for key, dtype, message in (
        ("layer1.0.conv1.weight", None, "layer1.0.conv1.weight has .* non-finite values"),
        ("bn1.running_mean", torch.int64, "bn1.running_mean' must .* got torch.int64"),
    ):
        bad = torch.full_like(state[key], 0 if dtype else torch.nan, dtype=dtype)
        torch.save({**state, key: bad}, tmp_path / "bad.pth")
        with pytest.raises((CheckpointError, RuntimeError), match=message):
            from_file("trex_resnet50", tmp_path / "bad.pth")
    empty: list[dict[str, Any]] = [{"state_dict": {}}, {"file": ""}]
    for nothing in empty:
        with pytest.raises(CheckpointError):
            timm.create_model("trex_resnet50", pretrained=True, pretrained_cfg_overlay=nothing)
    assert server.log == []
    overlay = {"url": f"{server.url}trexstar.pth"}
    at_url = timm.create_model(
        "trex_resnet50", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / "url"
    )
    assert_outputs(at_url, expected["trexstar_resnet50.in1k"])
    assert not cache.exists()


def test_file_of_timm_s_trainer(release: Path, tmp_path: Path) -> None:
    state = torch.load(release / "trex.pth", weights_only=True)
    average = torch.load(release / "trexstar.pth", weights_only=True)
    checkpoint = {"arch": "trex_resnet50", "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    checkpoint |= {"state_dict": state, "metric": 0.5}
    for extra, weight in ({}, state), ({"state_dict_ema": average}, average):
        torch.save(checkpoint | extra, tmp_path / "last.pth.tar")
        model = from_file("trex_resnet50", tmp_path / "last.pth.tar")
        assert torch.equal(model.conv1.weight, weight["conv1.weight"])


@pytest.mark.parametrize("bank", [True, False])
def test_trainer_s_checkpoint(bank: bool, tmp_path: Path) -> None:
    method = tiny_method(bank).eval()
    state = {"config": {"license": "mit"}, "classes": list("abcde"), "images": "9", "step": 3}
    state |= {"method": method.state_dict(), "optimizer": {}, "scaler": {}}
    torch.save(state, tmp_path / "step_3.pt")
    args: dict[str, Any] = {"proj_layers": 2, "proj_hidden_dim": 32, "proj_dim": 16}
    args["backbone"] = "resnet10t"
    load = partial(from_file, "trex_resnet", tmp_path / "step_3.pt", **args)
    with torch.no_grad():
        logits = method.objective.logits(method.encoder([IMAGES]))
        for model in (load().eval(), load(num_classes=5).eval()):
            assert torch.allclose(model(IMAGES), logits, atol=1e-5)
            assert model.pretrained_cfg["license"] == "mit"
            assert "origin_url" not in model.pretrained_cfg
    assert load(num_classes=3).fc.weight.shape == (3, 16)


# Against the loopback Hub

CHILD = """
import signal, sys
import timm, torch, trex_models
from tests.reference_resnet import pictures

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
for i, name in enumerate(sys.argv[2:]):
    model = timm.create_model(name, pretrained=True).eval()
    with torch.no_grad():
        torch.save(model.double()(pictures(2, 64).double()), f"{sys.argv[1]}/{i}.pt")
"""


class Place:
    def __init__(
        self, hub: HubServer, server: FileServer, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.hub = hub
        self.server = server
        self.folder = folder
        self.home = folder / "home"
        self.monkeypatch = monkeypatch
        variables = {
            "TREX_MODELS_MANIFEST": str(folder / "manifest.json"),
            "TREX_MODELS_NAVER_URL": server.url,
        }
        self.environment = environment(hub.url, self.home) | {"PYTHONPATH": str(ROOT)} | variables
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        # The client reads its environment variables only once, when imported.
        monkeypatch.setattr(constants, "HF_HOME", str(self.home))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(self.home / "hub"))
        self.set_endpoint(hub.url)

    def set_endpoint(self, url: str) -> None:
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        self.monkeypatch.setattr(constants, "ENDPOINT", url)
        self.monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    def create(self, expected: dict[str, Tensor], *names: str) -> None:
        for name in names:
            model = timm.create_model(name, pretrained=True)
            assert_outputs(model, expected[plain(name)])

    def error(self, name: str) -> str:
        with pytest.raises(WeightsError) as caught:
            timm.create_model(name, pretrained=True)
        return str(caught.value)

    def start(self, name: str) -> Forked:
        """Load a model in a process whose client has the same constants as in this process."""
        names = "HF_HOME", "HF_HUB_CACHE", "ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"
        values = {name: getattr(constants, name) for name in names}
        code = f"from huggingface_hub import constants\nvars(constants).update({values!r})\n{CHILD}"
        out = tempfile.mkdtemp(dir=self.folder, prefix="out")
        return Forked("-c", code, out, name, environment=self.environment)

    def finish(self, process: Forked, expected: dict[str, Tensor]) -> None:
        assert process.end() == 0, process.err
        *_, out, name = process.command
        assert_close(torch.load(Path(out) / "0.pt"), expected[plain(name)])


def plain(name: str) -> str:
    return name.removeprefix("hf-hub:trex-models/").partition("@")[0]


@pytest.fixture(scope="module")
def converted(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """model.safetensors of every model, written directly from the release's tensors."""
    folder = tmp_path_factory.mktemp("converted")
    found = {}
    for name, (_, file) in MODELS.items():
        if file.endswith("full.pth"):
            continue
        state = torch.load(release / file, weights_only=True)
        found[name] = folder / f"{name}.safetensors"
        save_file(state, found[name], {"format": "pt"})
    yield found
    shutil.rmtree(folder)


@pytest.fixture
def place(
    server: FileServer, converted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    hub = Hub()
    published = {}
    for name, path in converted.items():
        config = f'{{"architecture": "{name.partition(".")[0]}", "num_classes": 0}}'.encode()
        files: dict[str, Path | bytes] = {"model.safetensors": path, "config.json": config}
        revision = hub.add(f"trex-models/{name}", files)
        hub.add(f"trex-models/{name}", {"later": b"commit"})
        published[name] = manifest.Published(f"trex-models/{name}", revision, sha256(path))
    manifest.save_manifest(manifest.Manifest(published), tmp_path / "manifest.json")
    with serving(hub) as hub_server:
        yield Place(hub_server, server, tmp_path, monkeypatch)
    shutil.rmtree(tmp_path / "home", ignore_errors=True)


BACKBONES = tuple(name for name in MODELS if "resnet50." in name)


def test_from_the_hub_then_offline(place: Place, expected: dict[str, Tensor]) -> None:
    """Load offline as users do, in a new interpreter."""
    place.create(expected, *BACKBONES)
    revisions = {request.path.split("/")[4] for request in place.hub.requests("/resolve/")}
    pinned = manifest.load_manifest(place.folder / "manifest.json").models.values()
    assert revisions == {entry.revision for entry in pinned}
    assert place.server.log == []
    before = len(place.hub.log)
    place.create(expected, BACKBONES[0])
    env = place.environment | {"HF_HUB_OFFLINE": "1"}
    names = *BACKBONES[:2], "trex_resnet50_cls"
    offline = run_python("-c", CHILD, place.folder, *names, env=env, fails=True)
    assert offline.returncode == 1
    assert "Hub: skipped, HF_HUB_OFFLINE is set" in offline.stderr
    assert offline.stderr.count("not for commercial use") == 1
    for i, name in enumerate(BACKBONES[:2]):
        assert_close(torch.load(place.folder / f"{i}.pt"), expected[name])
    assert len(place.hub.log) == before


def test_hub_or_its_cache_has_other_weights(
    place: Place, expected: dict[str, Tensor], converted: dict[str, Path]
) -> None:
    name = "trex_resnet50.in1k"
    place.create(expected, name)
    (path,) = (place.home / "hub").glob(f"models--*{name}/snapshots/*/*.safetensors")
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    error = place.error(name)
    assert f"SHA-256 of {path.resolve()} is" in error
    assert "delete the file and try again" in error
    path.resolve().unlink()
    place.create(expected, name)
    assert place.server.log == []
    shutil.rmtree(place.home)
    other = converted["trexstar_resnet50.in1k"]
    repo = place.hub.hub.repos[f"trex-models/{name}"]
    # The pinned commit was overwritten.
    repo[0] = repo[0]._replace(
        files={"model.safetensors": place.hub.hub.file("model.safetensors", other)}
    )
    for _ in range(2):
        error = place.error(name)
        assert f"is {sha256(other)}, not {sha256(converted[name])} as in the manifest" in error
        assert "delete the file and try again" in error
    assert place.server.log == []


def test_the_hub_s_cache_comes_first(place: Place, expected: dict[str, Tensor]) -> None:
    """The Hub's cache has priority over the conversion of NAVER's file, here a different one."""
    name = "trex_resnet50.in1k"
    listed = (place.folder / "manifest.json").read_text()
    manifest.save_manifest(manifest.Manifest(), place.folder / "manifest.json")
    place.server.files["trex.pth"] = place.server.files["trexstar.pth"]
    other = {name: expected["trexstar_resnet50.in1k"]}
    place.create(other, name)
    (place.folder / "manifest.json").write_text(listed)
    place.create(other, name)  # caches have priority over the network
    shutil.move(place.home / "trex_models", place.folder / "aside")
    place.create(expected, name)
    shutil.move(place.folder / "aside", place.home / "trex_models")
    place.create(expected, name)


def test_explicit_hub_folder_and_password_in_the_hub_s_address(
    place: Place, expected: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """Load with timm's hf-hub:, from any organization's repository."""
    name = "hf-hub:trex-models/trex_resnet50.in1k"
    revision = place.hub.hub.repos["trex-models/trex_resnet50.in1k"][0].sha
    place.create(expected, name, f"{name}@{revision}")
    assert not (place.home / "trex_models").exists()
    assert place.server.log == []
    shutil.rmtree(place.home)
    place.set_endpoint(place.hub.url.replace("//", "//ada:secret@"))
    place.hub.faults = [Fault("", status=500)]
    resolve.fetch("trex_resnet50.in1k")
    said = "".join(r.getMessage() for r in caplog.records if r.name.startswith("trex_models"))
    assert f"for url '{place.hub.url}/" in said
    assert "secret" not in said


def test_hub_fails_and_naver_serves(
    place: Place, expected: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    del place.hub.hub.repos["trex-models/trex_resnet50.in1k"]
    place.hub.faults = [
        Fault("trexstar_resnet50.in1k/", status=404),
        Fault("trex_resnet50.in1k_r2/", status=403),
        Fault(r"GET.*trexstar_resnet50.in1k_r2/", cut_after=0),
    ]
    place.create(expected, *BACKBONES)
    # Warnings reach stderr even if logging is not configured.
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    for name in BACKBONES:
        assert any(f"{name} is not available from the Hub (" in message for message in said)
        wanted = re.compile(rf"downloading {re.escape(place.server.url)}\w+\.pth for {name}")
        assert any(map(wanted.match, said))
    assert len(place.server.log) == 4
    asked = len(place.hub.log)
    place.create(expected, BACKBONES[0])
    assert (len(place.server.log), len(place.hub.log)) == (4, asked)


def test_hub_is_down(place: Place, expected: dict[str, Tensor]) -> None:
    place.hub.faults = [Fault("", status=500)]
    place.create(expected, "trex_resnet50.in1k")
    assert len(place.hub.requests("/resolve/")) == 1
    place.set_endpoint("http://127.0.0.1:9")
    place.create(expected, "trexstar_resnet50.in1k")
    assert len(place.hub.log) == 1
    # Unpublished models cause no request.
    place.set_endpoint(place.hub.url)
    published = manifest.load_manifest(place.folder / "manifest.json").models
    del published["trex_resnet50.in1k_r2"]
    manifest.save_manifest(manifest.Manifest(published), place.folder / "manifest.json")
    place.create(expected, "trex_resnet50.in1k_r2")
    assert len(place.hub.log) == 1
    assert len(place.server.log) == 3


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_token_of_the_hub_stays_there(
    place: Place, converted: dict[str, Path], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "trex_resnet50.in1k"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    commit = place.hub.hub.repos[f"trex-models/{name}"][0]
    with FileServer({"weights": converted[name]}) as other:
        headers = {
            "Location": f"{other.url}weights",
            "X-Repo-Commit": commit.sha,
            "X-Linked-ETag": f'"{commit.files["model.safetensors"].etag}"',
        }
        place.hub.faults = [Fault(rf"^{method} .*safetensors$", status=302, headers=headers)]
        assert resolve.fetch(name).is_relative_to(place.home / "hub")
        assert {r.authorization for r in place.hub.log} == {"Bearer hf_secret"}
        assert [(r.method, r.authorization) for r in other.log] == [("GET", None)]
    assert place.server.log == []


def test_two_processes_at_once(place: Place, expected: dict[str, Tensor]) -> None:
    manifest.save_manifest(manifest.Manifest(), place.folder / "manifest.json")
    place.server.faults = [Fault("GET", delay=3)]
    processes = [place.start("trexstar_resnet50.in1k") for _ in range(2)]
    for process in processes:
        place.finish(process, expected)
    assert len(place.server.log) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted(place: Place, expected: dict[str, Tensor], number: int) -> None:
    manifest.save_manifest(manifest.Manifest(), place.folder / "manifest.json")
    place.server.faults = [Fault("GET", cut_after=50_000_000, times=1, headers={"X": "1"})]
    process = place.start("trex_resnet50.in1k")
    folder = place.home / "trex_models" / "naver"
    deadline = time.monotonic() + 60
    while not place.server.log and time.monotonic() < deadline:
        time.sleep(0.05)
    part = folder / ".trex.pth.part"
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send(number)
    assert process.end() != 0
    left = [path.name for path in folder.iterdir() if path.suffix != ".lock"]
    assert left == ([] if number == signal.SIGINT else [part.name])
    place.create(expected, "trex_resnet50.in1k")
    found = {path.name for path in folder.iterdir() if path.suffix != ".lock"}
    assert found == {"trex.json", "trex.safetensors"}


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that other users can enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        folder.chmod(0o755)
        yield folder


def test_read_only_cache(server: FileServer, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest.save_manifest(manifest.Manifest(), shared / "manifest.json")
    home = shared / "home"
    monkeypatch.setenv("TREX_MODELS_MANIFEST", str(shared / "manifest.json"))
    monkeypatch.setenv("TREX_MODELS_NAVER_URL", server.url)
    monkeypatch.setenv("TREX_MODELS_CACHE", str(home / "trex_models"))
    resolve.fetch("trex_resnet50.in1k")
    code = (
        "import os, sys; from trex_models.pretrained import resolve\n"
        "os.geteuid() or os.setresuid(65534, 65534, 65534)  # permissions do not stop root\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(resolve.fetch(name))\n"
        "    except resolve.WeightsError as error: print(str(error).replace('\\n', ' '))\n"
    )
    folders = [home, *[path for path in home.rglob("*") if path.is_dir()]]
    for folder in folders:
        folder.chmod(0o555)
    done = Forked("-c", code, "trex_resnet50.in1k", "trexstar_resnet50.in1k", cwd=shared)
    assert done.end() == 0, done.err
    for folder in folders:
        folder.chmod(0o755)
    path, message = done.out.splitlines()
    assert path.endswith("trex_models/naver/trex.safetensors")
    assert "naver cannot be written (Permission denied); set TREX_MODELS_CACHE" in message


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Writes fail at 20 MB, as on a full disk; Python ignores the signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("release", "small_disk")
def test_disk_is_full(cache: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        resolve.fetch("trex_resnet50.in1k")
    message = "cannot be written (File too large); set TREX_MODELS_CACHE to another"
    assert message in str(caught.value)
    assert visible(cache) == []
