"""``python -m hub``: Hub folders, publication, verification and import of NAVER's files."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file

from convert.official import convert_official
from hub import cards, fixed_input, notices
from hub.__main__ import main
from hub.build_folders import build_folders
from hub.errors import HubError
from hub.hub_folder import FILES, HubModel, inspect_folder, load_folder
from hub.import_naver import import_naver
from hub.publish import publish
from hub.verify import verify
from tests.documentation import python_blocks
from tests.file_server import FileServer
from tests.loopback import Fault
from tests.loopback_hub import LFS_WARNING, Commit, HubServer, environment
from tests.models import CFG, COLORS, TINY, edit_config, tiny_classifier, tiny_folder, write_folder
from tests.processes import run_python
from trex_models.pretrained import naver
from trex_models.pretrained.manifest import (
    Manifest,
    WeightsError,
    load_manifest,
    save_manifest,
    sha256,
)
from trex_models.transfer.published import reported
from trex_models.trex import default_cfgs

pytestmark = pytest.mark.filterwarnings(LFS_WARNING)

ROOT = Path(__file__).parents[1]
OWNER: dict[str, Any] = {"owner": "Ada", "license": "cc-by-4.0"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Timm folders of two models of our own."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_folder(folder / "small_trex")
    tiny_classifier(folder / "small_trex_cls")
    return folder


@pytest.fixture
def built(tiny: Path, tmp_path: Path) -> Path:
    """Hub folders of the two models."""
    build_folders(tiny, tmp_path / "hub", **OWNER)
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def official(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("official")
    convert_official(release / "trexstar_2_checkpoint_full.pth", folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Environment variables that redirect all default paths to an empty folder."""
    variables = {
        "TREX_MODELS_MANIFEST": str(tmp_path / "manifest.json"),
        "TREX_MODELS_NAVER_URL": "http://127.0.0.1:9/",
        "TREX_MODELS_CACHE": str(tmp_path / "cache"),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


@pytest.fixture
def api(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> HfApi:
    """Hub client for the test and for the commands."""
    api = HfApi(endpoint=server.url, token="hf_write")
    for module in ("publish", "verify"):
        monkeypatch.setattr(f"hub.{module}.HfApi", lambda: api)
    return api


@dataclasses.dataclass
class Desk:
    """Everything that publishing needs: Hub folders, client, manifest and captured output."""

    built: Path
    server: HubServer
    api: HfApi
    manifest: Path
    capsys: pytest.CaptureFixture[str]

    def push(self, *sources: str | Path, **options: Any) -> Manifest:
        publish(tuple(self.built / s for s in sources), manifest=self.manifest, **options)
        return load_manifest(self.manifest, missing_ok=True)

    def verify(self, *names: str) -> str:
        self.printed()
        good = verify(names, manifest=self.manifest)
        out = self.printed()
        assert good is (": OK: " in out)
        return out

    def printed(self) -> str:
        return self.capsys.readouterr().out

    def commits(self, name: str = "small_trex") -> list[Commit]:
        return self.server.hub.repos[f"trex-models/{name}"]

    def sent(self) -> list[str]:
        return [f"{r.method} {r.path}" for r in self.server.requests("^(POST|PUT|DELETE) ")]

    def record(self, **changes: Any) -> None:
        published = load_manifest(self.manifest)
        entry = dataclasses.replace(published.models["small_trex"], **changes)
        changed = dataclasses.replace(published, models={"small_trex": entry})
        save_manifest(changed, self.manifest)


@pytest.fixture
def desk(
    built: Path, server: HubServer, api: HfApi, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Desk:
    return Desk(built, server, api, tmp_path / "manifest.json", capsys)


# build


def test_own_model_becomes_a_hub_folder(tiny: Path, tmp_path: Path) -> None:
    (folder,) = build_folders(tiny / "small_trex", tmp_path / "out", name="ada-trex", **OWNER)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ada-trex"]
    config = json.loads((folder / "config.json").read_text())
    assert config["pretrained_cfg"]["license"] == "cc-by-4.0"
    assert "SPDX-License-Identifier: CC-BY-4.0" in (folder / "LICENSE").read_text()
    notice = (folder / "NOTICE").read_text()
    assert "Ada's" in notice
    assert "NAVER" not in notice
    card = ModelCard.load(folder / "README.md")
    data: Any = card.data
    assert data.to_dict() == {
        "license": "cc-by-4.0",
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["image-feature-extraction", "timm", "trex"],
    }
    for word in ("non-commercial", "not for commercial", "1.17", "78.0", "authors' results"):
        assert word not in card.text
    weights_files = (path / "model.safetensors" for path in (folder, tiny / "small_trex"))
    assert len(set(map(sha256, weights_files))) == 1


def test_owners_choose_the_license_of_their_models(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "export"
    shutil.copytree(tiny / "small_trex", source)
    with pytest.raises(ValueError, match=r"states no license for export; choose one with --li"):
        build_folders(source, tmp_path / "out", owner="Ada")
    with pytest.raises(ValueError, match="unknown license 'gpl-9'; choose one of apache-2.0"):
        build_folders(source, tmp_path / "out", owner="Ada", license="gpl-9")
    with pytest.raises(ValueError, match="--owner NAME"):
        build_folders(source, tmp_path / "out", license="mit")
    assert not (tmp_path / "out").exists()
    edit_config(source, lambda config: config["pretrained_cfg"].update(license="cc0-1.0"))
    with pytest.raises(ValueError, match="licensed under cc0-1.0; remove --licens"):
        build_folders(source, tmp_path / "out", **OWNER)
    (folder,) = build_folders(source, tmp_path / "out", owner="Ada")
    assert ModelCard.load(folder / "README.md").data.license == "cc0-1.0"
    first = build_folders(tiny, tmp_path / "both", **OWNER)
    second = build_folders(tiny, tmp_path / "both", owner="Ada", license="mit")
    assert first == second
    assert sorted(p.name for p in (tmp_path / "both").iterdir()) == ["small_trex", "small_trex_cls"]
    assert "MIT" in (first[0] / "LICENSE").read_text()
    # A Hub folder can be rebuilt, and now states its license.
    (again,) = build_folders(first[0], tmp_path / "again", owner="Ada")
    assert (again / "LICENSE").read_text() == (first[0] / "LICENSE").read_text()


def put(name: str, data: bytes | None) -> Callable[[Path], object]:
    """Return a change that writes a file in a folder; None deletes it."""
    return lambda folder: (
        (folder / name).unlink() if data is None else (folder / name).write_bytes(data)
    )


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return spoil


def configured(**values: Any) -> Callable[[Path], object]:
    """Return a change of config.json entries; names with prefix cfg_ are in pretrained_cfg."""

    def change(config: dict[str, Any]) -> None:
        for name, value in values.items():
            key = name.removeprefix("cfg_")
            part = config if key == name else config["pretrained_cfg"]
            part[key] = value
            if value is None:
                del part[key]

    return lambda folder: edit_config(folder, change)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (put("pytorch_model.bin", b"\x80\x02."), r"pytorch_model.bin is not a file of"),
        (put("config.json", None), "has no config.json"),
        (put("model.safetensors", b"\x80\x02."), "model.safetensors is not a safetensors"),
        (weights(lambda state: state["bn1.bias"].fill_(torch.nan)), "bn1.bias has non-finite va"),
        (weights(lambda state: state.pop("layer1.0.conv1.weight")), "timm cannot load "),
        (put("config.json", b"[1]"), "config.json is not a model configuration"),
        (put("config.json", b"{"), "config.json is not a model configuration"),
        (configured(cfg_file="/home/a.pth"), "cfg.file is a local path, '/home/a.pth'"),
        (configured(cfg_file="runs/a.pth"), "cfg.file is a local path, 'runs/a.pth'"),
        (configured(num_features=None), "config.json has no num_features; convert"),
        (configured(cfg_input_size=None), "json has no pretrained_cfg.input_size; convert"),
        (configured(model_args={"num_classes": 0}), "num_classes in model_args"),
        (configured(architecture="resnet_9000"), "timm cannot load "),
        (configured(cfg_origin_url=notices.ORIGIN), "origin_url says that the weights are NAV"),
    ],
)
def test_unfit_folder_is_refused(
    spoil: Callable[[Path], object], message: str, tiny: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny, tmp_path / "in")
    spoil(tmp_path / "in" / "small_trex")
    with pytest.raises(ValueError, match=message) as error:
        build_folders(tmp_path / "in", tmp_path / "out", **OWNER)
    assert "small_trex" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_names_are_refused(tiny: Path, tmp_path: Path) -> None:
    naver_name = "trex_resnet50.in1k"
    cfg = CFG | {"num_classes": 3}
    model = timm.create_model("resnet10t", num_classes=3, pretrained_cfg=cfg, **TINY)
    stock = write_folder(model, tmp_path / "stock")
    model = timm.create_model("resnet50", num_classes=0, pretrained_cfg=CFG)
    own = write_folder(model, tmp_path / "own")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    for folder, name, owner, message in (
        (stock, naver_name, {}, "num_classes of a backbone must be 0, got 3"),
        (own, naver_name, {}, "origin_url or tag do not match"),
        (tiny / "small_trex", naver_name, {}, r"architecture of trex_resnet50.in1k must be 'res"),
        (tiny / "small_trex", "a/b", OWNER, "not a valid repository name"),
        (tiny, "one", OWNER, "--name requires one model, but .* has 2"),
        (tmp_path / "run" / "checkpoints", None, OWNER, "contains no timm folder"),
        (tmp_path / "run", None, OWNER, r"is a run directory; pass .*export/backbone or"),
        (tmp_path / "nowhere", None, OWNER, "is not a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            build_folders(folder, tmp_path / "hub", name=name, **owner)
    assert not (tmp_path / "hub").exists()


@pytest.mark.slow
def test_official_file_becomes_hub_folders(official: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--license mit: the license of trexstar_resnet50"):
        build_folders(official, tmp_path / "hub", license="mit")
    with pytest.raises(ValueError, match="--owner Ada: trexstar_resnet50"):
        build_folders(official, tmp_path / "hub", owner="Ada")
    # The conversion report next to the folders is skipped.
    built = build_folders(official, tmp_path / "hub")
    assert [path.name for path in built] == [
        f"trexstar_resnet50{part}.in1k_r2" for part in ("", "_cls", "_proj")
    ]
    for folder in built:
        assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
        config = json.loads((folder / "config.json").read_text())
        assert config["pretrained_cfg"]["license"] == naver.LICENSE
        assert "num_classes" not in config["model_args"]
        notice = (folder / "NOTICE").read_text()
        for words in ("NAVER Corporation's", "trexstar_2", "must not be used", "Changes:"):
            assert words in " ".join(notice.split())
    backbone = json.loads((built[0] / "config.json").read_text())
    assert (backbone["architecture"], backbone["num_classes"]) == ("resnet50", 0)
    assert "these classes have none: 7." in (built[1] / "README.md").read_text()
    with pytest.raises(ValueError, match="'my-model' is not one of their na"):
        build_folders(built[0], tmp_path / "other", name="my-model", **OWNER)
    edit_config(built[0], lambda config: config["pretrained_cfg"].update(license="mit"))
    with pytest.raises(ValueError, match="license of NAVER's weights must be cc-by-nc-sa-4.0, got"):
        inspect_folder(built[0], built[0].name)


# cards


def naver_model(name: str) -> HubModel:
    """One of NAVER's models, without its weights."""
    architecture, _, tag = name.partition(".")
    part = (re.findall("_(proj|cls)", architecture) or ["backbone"])[0]
    cfg = default_cfgs[architecture].cfgs[tag].to_dict()
    config = {
        "architecture": "resnet50" if part == "backbone" else architecture,
        "num_classes": cfg["num_classes"],
        "num_features": 2048,
        "pretrained_cfg": cfg,
    }
    return HubModel(name, Path("unused"), config, part, part == "backbone")


@pytest.mark.parametrize("name", naver.FILES)
def test_card_of_naver_model(name: str) -> None:
    card = cards.render(naver_model(name), naver.LICENSE, None, "trex-models")
    data: Any = ModelCard(card).data
    header = data.to_dict()
    task = "image-classification" if "_cls" in name else "image-feature-extraction"
    assert card.startswith("---\n")
    assert {"image-feature-extraction", "timm", "trex", task} <= set(header.pop("tags"))
    assert header == {
        "license": "cc-by-nc-sa-4.0",
        "library_name": "timm",
        "datasets": ["imagenet-1k"],
        "pipeline_tag": task,
    }

    text = card.split("---\n", 2)[2]
    opening = text.split("## What it is")[0]
    said = "not for commercial use", "keep this license", "NAVER Corporation's", "only conv"
    assert all(words in opening for words in said)
    assert not re.search(r"\{\{|\{%|(?<!\[)None|Undefined| +$|\n\n\n", card, re.MULTILINE)
    assert card.isascii()

    own = reported(name)
    shown = re.findall(r"^\| (\d.*) % \| (.*) \|$", card, re.MULTILINE)
    assert shown == [(f"{100 * own.top1:.1f}", f"{own.mean_log_odds:.4f}")]
    assert "**authors' results**" in text
    assert "**Not measured by us yet.**" in text
    assert f"**This is {'t-ReX*' if 'star' in name else 't-ReX'}.**" in text

    blocks = python_blocks(card)
    assert len(blocks) == 4
    for block in blocks:
        compile(block, name, "exec")
    assert ["import trex_models" in block for block in blocks] == [True, True, True, False]
    backbone = f"{name.partition('_')[0]}_resnet50.{name.partition('.')[2]}"
    assert f'"hf-hub:trex-models/{backbone}"' in blocks[3]
    assert ("It needs the package trex_models" in text) is (backbone != name)


def test_reported_results_are_the_published_ones() -> None:
    assert reported("trex_resnet50.in1k") == ("t-ReX", 0.780, 1.1704)
    assert reported("trexstar_resnet50.in1k") == ("t-ReX*", 0.802, 0.8829)
    for part in ("", "_proj", "_cls"):
        assert reported(f"trex_resnet50{part}.in1k_r2")[1:] == (0.779, 1.1664)
        assert reported(f"trexstar_resnet50{part}.in1k_r2")[1:] == (0.802, 0.8800)
    cfg = timm.get_pretrained_cfg("trex_resnet50")
    assert cfg is not None
    assert cfg.origin_url == notices.ORIGIN


def run_blocks(blocks: list[str], environ: Mapping[str, str], *, bare: bool = False) -> str:
    """Run a card's examples unchanged in separate processes; ``bare``: without trex_models."""
    code = [
        f"exec(compile({block!r}, 'block {i}', 'exec'), {{}})" for i, block in enumerate(blocks)
    ]
    if bare:
        code.insert(0, "import sys; sys.modules['trex_models'] = None")
    environ = {**environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    command = ["-W", "error::DeprecationWarning:__main__", "-c", "\n".join(code)]
    return run_python(*command, env=environ).stdout


@pytest.mark.client
def test_from_publication_to_the_examples_in_the_cards(
    nowhere: dict[str, str], official: Path, desk: Desk, tmp_path: Path
) -> None:
    """Run all examples in the cards of backbones and classifiers, NAVER's and our own."""
    names = "trexstar_resnet50.in1k_r2", "trexstar_resnet50_cls.in1k_r2"
    built = desk.built
    backbone, cls = (build_folders(official / name, tmp_path / "official")[0] for name in names)
    published = desk.push(backbone, cls, *built.iterdir())
    assert len(published.models) == 4
    assert "and by name" in desk.verify(backbone.name)

    blocks = {
        folder: python_blocks((folder / "README.md").read_text())
        for folder in (backbone, cls, built / "small_trex", built / "small_trex_cls")
    }
    environ = environment(desk.server.url, tmp_path / "home") | nowhere
    fetch = f"from trex_models.pretrained import resolve; print(resolve.fetch({backbone.name!r}))"
    out = run_blocks(
        [fetch, *blocks[backbone][:3], *blocks[cls][:3], *blocks[built / "small_trex_cls"]], environ
    )
    assert Path(out.partition("\n")[0]).is_relative_to(tmp_path / "home")
    for shape in ("[1, 2048]", "[2, 2048, 7, 7]", "[1, 256]", "[1, 16]"):
        assert f"torch.Size({shape})" in out
    assert out.count("32 torch.Size([2, 2048, 7, 7])") == 2
    assert all(re.search(rf"^0\.\d+ {name}$", out, re.MULTILINE) for name in COLORS)

    plain = [blocks[backbone][3], blocks[cls][3], *blocks[built / "small_trex"]]
    out = run_blocks(plain, environ, bare=True)
    assert out.count("torch.Size([1, 2048])") == 2
    assert "torch.Size([1, 32])" in out


# publish


def test_publish_records_files_and_uploads_them_once(desk: Desk) -> None:
    published = desk.push("small_trex")
    entry, folder = published.models["small_trex"], desk.built / "small_trex"
    (_, commit) = desk.commits()
    assert entry.repository == "trex-models/small_trex"
    assert entry.revision == commit.sha
    assert entry.sha256 == sha256(folder / "model.safetensors")
    assert tuple(entry.outputs) == fixed_input.fixed_outputs(load_folder(folder))
    assert len(entry.outputs) == 8
    assert sorted(commit.files) == sorted([".gitattributes", *FILES])
    assert commit.files["model.safetensors"].etag == entry.sha256
    assert not list(desk.manifest.parent.glob(".*"))

    desk.server.log.clear()
    desk.printed()
    assert desk.push("small_trex") == published
    assert desk.sent() == []
    out = desk.printed()
    assert "trex-models/small_trex: unchanged" in out
    assert all(f"skip (unchanged) {file}" in out for file in FILES)
    with pytest.raises(ValueError, match="build the folder again with --namespace ada"):
        desk.push("small_trex", namespace="ada")


def test_only_changed_files_are_committed(desk: Desk) -> None:
    folder = desk.built / "small_trex"
    first = desk.push(folder).models["small_trex"]
    desk.server.log.clear()
    with (folder / "NOTICE").open("a") as file:
        file.write("Ada has moved.\n")
    second = desk.push(folder).models["small_trex"]
    _, before, after = desk.commits()
    assert {path for path in after.files if after.files[path] != before.files[path]} == {"NOTICE"}
    assert second == dataclasses.replace(first, revision=after.sha)
    assert not desk.server.requests("/lfs/")

    tiny_folder(folder.parent / "new", seed=5)
    shutil.copy(folder.parent / "new" / "model.safetensors", folder)
    third = desk.push(folder).models["small_trex"]
    assert desk.commits()[-1].files["model.safetensors"].etag == third.sha256 != second.sha256
    assert third.outputs != second.outputs


def test_a_commit_by_others_in_between_is_not_overwritten(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.push("small_trex")
    (desk.built / "small_trex" / "NOTICE").write_text("Ada has moved.\n")
    commit = desk.api.create_commit

    def late(*args: Any, **options: Any) -> Any:
        desk.server.hub.add("trex-models/small_trex", {"NOTICE": b"Charles was faster.\n"})
        return commit(*args, **options)

    monkeypatch.setattr(desk.api, "create_commit", late)
    with pytest.raises(HubError, match="answered 412"):
        desk.push("small_trex")
    assert len(desk.commits()) == 3


def test_dry_run_sends_nothing(desk: Desk) -> None:
    assert desk.push(*desk.built.iterdir(), dry_run=True) == Manifest()
    assert desk.sent() == []
    assert desk.server.hub.repos == {}
    assert not desk.manifest.exists()
    out = desk.printed()
    for folder in desk.built.iterdir():
        assert f"trex-models/{folder.name}: new" in out
        for file in FILES:
            path = folder / file
            size = path.stat().st_size
            assert f"would upload {file}, {size} bytes, SHA-256 {sha256(path)}\n" in out
    desk.push("small_trex")
    desk.server.log.clear()
    desk.push("small_trex", dry_run=True)
    assert desk.sent() == []
    assert "would skip (unchanged) README.md" in desk.printed()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (put("pytorch_model.bin", b""), r"pytorch_model.bin is not a file"),
        (put("README.md", b"---\nlicense: [\n---\n"), r"README\.md is damaged .*; build the fol"),
        (put("NOTICE", None), "has no NOTICE; create"),
        (put("README.md", b"---\nlicense: mit\n---\n"), "license must be 'cc-by-4.0', got 'mit'"),
    ],
)
def test_unfit_hub_folder_is_not_published(
    spoil: Callable[[Path], object], message: str, desk: Desk
) -> None:
    spoil(desk.built / "small_trex_cls")
    with pytest.raises(ValueError, match=message):
        desk.push("small_trex", "small_trex_cls")
    assert desk.server.log == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("whoami", 401), "answered 401.*the token is invalid; run `hf auth"),
        (Fault("POST .*commit", 409), "answered 409.*run the command again"),
        (Fault("POST .*commit", 500), "answered 500.*server error; run the command"),
        (Fault("POST .*commit", 429), "answered 429.*wait some minutes"),
        (Fault("POST .*commit", 400), "answered 400.*the request is invalid"),
        (Fault("PUT /lfs", 403), "answered 403.*no write access; ask an owner of trex"),
        (Fault("PUT /lfs", 0), "is not reachable.*check the network and HF_ENDPOINT"),
        (Fault("whoami", 0), "is not reachable.*check the network and HF_ENDPOINT"),
    ],
    ids=lambda value: str(value.status or "cut") if isinstance(value, Fault) else "",
)
def test_errors_of_the_hub_are_one_line(
    fault: Fault, message: str, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client sleeps between attempts
    desk.server.faults.append(fault)
    with pytest.raises(HubError, match=message) as error:
        desk.push("small_trex")
    assert "\n" not in str(error.value)
    assert not desk.manifest.exists()
    desk.server.faults.clear()
    assert list(desk.push("small_trex").models) == ["small_trex"]  # a second command continues


def test_models_that_cannot_be_recorded_are_not_uploaded(desk: Desk) -> None:
    with pytest.raises(ValueError, match="2 folders have the name small_trex"):
        desk.push("small_trex", "small_trex")
    with pytest.raises(ValueError, match="none is not writable; choose another --manifest"):
        publish((desk.built / "small_trex",), manifest=desk.built / "none" / "manifest.json")
    with pytest.raises(ValueError, match="no Hub folder given"):
        desk.push()
    assert desk.server.log == []
    desk.server.hub.add("trex-models/small_trex", {"pytorch_model.bin": b"pickle"})
    with pytest.raises(ValueError, match=r"unexpected files on the Hub: pytorch_model\.bin; del"):
        desk.push("small_trex")
    assert not desk.manifest.exists()
    assert desk.server.requests("^(POST|PUT) .*(commit|lfs)") == []


def test_interruption_leaves_a_correct_manifest(desk: Desk) -> None:
    sources = ["small_trex", "small_trex_cls"]
    desk.server.faults.append(Fault("POST .*small_trex_cls/commit", 500))
    with pytest.raises(HubError, match="trex-models/small_trex_cls: the Hub answered 500"):
        desk.push(*sources)
    assert list(load_manifest(desk.manifest).models) == ["small_trex"]
    desk.server.faults.clear()
    assert sorted(desk.push(*sources).models) == sources
    assert len(desk.commits()) == 2


def test_bad_input_is_one_line_with_status_2(
    tmp_path: Path, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    desk.api.token = None
    no_token = r"no token for the Hub: run `hf auth login` or set HF_TOKEN.*"
    for arguments, message in (
        (["build", tmp_path / "nothing", "--output", tmp_path / "out"], ".*is not a folder.*"),
        (["publish", tmp_path / "nothing"], ".*nothing has no config.json.*"),
        (["publish", desk.built / "small_trex"], no_token),
        (["verify", "--manifest", tmp_path / "nothing.json"], ".*nothing.json is not a valid.*"),
        (["import-naver", "other.pth", "--output", tmp_path / "out"], ".*not a file of NAVER's.*"),
    ):
        assert main([str(argument) for argument in arguments]) == 2
        assert re.fullmatch(f"error: {message}\n", desk.capsys.readouterr().err)
    assert desk.server.log == []
    monkeypatch.setenv("TREX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="is not a folder"):
        main(["build", str(tmp_path / "nothing"), "--output", str(tmp_path / "out")])


# verify


def test_verify(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, name = desk.server.hub, "trex-models/small_trex"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    entry = desk.push("small_trex").models["small_trex"]
    assert re.fullmatch(rf"small_trex: OK: .*{name}@{entry.revision}\)\n", desk.verify())
    assert desk.verify("small_trex") == desk.verify()
    assert not (tmp_path / "home").exists()

    far = (*entry.outputs[:-1], entry.outputs[-1] * 2)
    for outputs, line in (
        (tuple(value * (1 + 5e-4) for value in entry.outputs), "small_trex: OK: "),
        (tuple(value * (1 + 2e-3) for value in entry.outputs), ".*DIFFERS: .* error of 0.002 \\("),
        (far, "small_trex: DIFFERS: outputs have a relative error of 0.5 "),
        ((), ".*relative error of inf"),
    ):
        desk.record(outputs=outputs)
        assert re.match(line, desk.verify())
    desk.record(outputs=entry.outputs)

    tiny_folder(tmp_path / "other", seed=9)
    changed = hub.add(name, {"model.safetensors": tmp_path / "other" / "model.safetensors"})
    assert ": OK: " in desk.verify()  # the revision is pinned
    desk.record(revision=changed)
    found = sha256(tmp_path / "other" / "model.safetensors")
    line = f"SHA-256 of model.safetensors is {found}, not {entry.sha256} as in the manifest"
    assert f"small_trex: DIFFERS: {line} " in desk.verify()

    desk.record(revision="0" * 40)
    assert "NOT CHECKED: trex-models/small_trex: the Hub answered 404" in desk.verify()
    desk.record(repository="trex-models/gone", revision=entry.revision)
    assert re.search("NOT CHECKED: trex-models/gone: .*repository or file does", desk.verify())
    desk.record(repository=name)
    desk.server.faults.append(Fault("GET /api/models/", 503))
    assert re.search("NOT CHECKED: .*answered 503.*run the command again later", desk.verify())
    desk.server.faults.clear()
    desk.record(revision=hub.add(name, {"pytorch_model.bin": b"\x80\x02."}, ["NOTICE"]))
    assert "DIFFERS: unexpected files: pytorch_model.bin (" in desk.verify()
    save_manifest(Manifest(), desk.manifest)
    with pytest.raises(ValueError, match="lists no model; publish one"):
        desk.verify()
    with pytest.raises(ValueError, match="does not list 'trex_resnet50.in1k'; choose from: n"):
        desk.verify("trex_resnet50.in1k")


def test_commands_publish_and_verify(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--manifest", str(desk.manifest)]
    assert main(["publish", str(desk.built / "small_trex"), *options]) == 0
    assert str(desk.api.token) not in "".join(desk.capsys.readouterr())
    assert main(["verify", *options]) == 0
    printed = desk.printed()
    assert printed.startswith("small_trex: OK: ")
    assert "by name" not in printed
    monkeypatch.setitem(naver.FILES, "small_trex", ())  # timm has no model with this name
    assert main(["verify", *options]) == 1
    assert re.search(r"DIFFERS: the model does not load .*Unknown model \(small_", desk.printed())


def test_verify_compares_keys_and_shapes(desk: Desk, tmp_path: Path) -> None:
    desk.push("small_trex")
    config = json.loads((desk.built / "small_trex" / "config.json").read_text())
    state = load_file(desk.built / "small_trex" / "model.safetensors")

    def changed(config: dict[str, Any], state: dict[str, torch.Tensor]) -> str:
        save_file(state, tmp_path / "weights")
        files: dict[str, bytes | Path] = {
            "config.json": json.dumps(config).encode(),
            "model.safetensors": tmp_path / "weights",
        }
        revision = desk.server.hub.add("trex-models/small_trex", files)
        desk.record(revision=revision, sha256=sha256(tmp_path / "weights"))
        return desk.verify()

    wider = config | {"model_args": config["model_args"] | {"channels": [4, 8, 16, 64]}}
    line = changed(wider, state)
    assert re.search(r"DIFFERS: layer4\S+ is \(.*\) torch.float32, expected \(", line)
    other = {key: tensor for key, tensor in state.items() if key != "bn1.bias"}
    other["extra"] = torch.zeros(1)
    assert ": missing keys: 1 (bn1.bias), unexpected: 1 (extra)" in changed(config, other)
    assert "the model does not load" in changed(config | {"architecture": "resnet_9000"}, state)


def test_fixed_input_is_the_formula() -> None:
    images = fixed_input.images((3, 4, 5))
    assert images.shape == (1, 3, 4, 5)
    assert images.dtype == torch.float32
    for c, y, x in ((0, 0, 0), (2, 3, 4), (1, 0, 3)):
        expected = 2 * np.sin((c + 1) * (x + 2 * y) / 17)
        assert images[0, c, y, x].item() == pytest.approx(expected, abs=1e-7)
    assert fixed_input.relative_error((1.0, -2.0), (1.0, -2.5)) == pytest.approx(0.2)


# import-naver


@pytest.fixture
def files(release: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A server that replaces NAVER's, with some of the files; two contain the same backbone."""
    names = "trexstar_2.pth", "trexstar_2_checkpoint_full.pth", "trex.pth"
    with FileServer({name: release / name for name in names}) as server:
        monkeypatch.setenv("TREX_MODELS_NAVER_URL", server.url)
        yield server


STARS = [f"trexstar_resnet50{part}.in1k_r2" for part in ("", "_cls", "_proj")]


@pytest.mark.slow
def test_import_fetches_converts_and_measures_once(
    files: FileServer,
    release: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, path = tmp_path / "out", tmp_path / "manifest.json"
    names = tuple(files.files)[:2]
    converted = out / "converted"
    assert import_naver(names, output=out, manifest=path)
    assert load_manifest(path).naver == {name: sha256(release / name) for name in names}
    assert sorted(p.name for p in (out / "files").iterdir()) == sorted(names)
    assert sorted(p.name for p in converted.iterdir() if p.is_dir()) == STARS

    files.log.clear()
    before = {p: p.stat().st_mtime_ns for p in converted.rglob("*")}
    evaluate = Mock(side_effect=[False, True])  # within tolerance
    monkeypatch.setattr("hub.import_naver.stages.run", evaluate)
    once = partial(import_naver, names, output=out, manifest=path, imagenet=tmp_path)
    assert not once()
    assert once()
    plan = evaluate.call_args.args[0]
    assert [model.source for model in plan.models] == [str(converted / name) for name in STARS[:2]]
    assert (plan.imagenet, plan.data_root, plan.is_dry) == (tmp_path, None, False)
    printed = capsys.readouterr().out
    for name in names:
        assert printed.count(f"{name}: already downloaded") == 2
        assert printed.count(f"{name}: already converted") == 2
    assert before == {p: p.stat().st_mtime_ns for p in converted.rglob("*")}
    assert files.log == []

    # Missing files are converted again.
    convert = Mock(return_value=True)
    monkeypatch.setattr("hub.import_naver._convert", convert)
    for name in ("config.json", "model.safetensors"):
        (converted / STARS[2] / name).unlink()
        import_naver(names, output=out, manifest=path)
    assert convert.mock_calls == [call(out / "files" / names[1], converted)] * 2


def test_import_keeps_no_other_file(
    files: FileServer, tmp_path: Path, release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "manifest.json"
    fetch = partial(import_naver, ("trex.pth",), output=tmp_path / "out", manifest=path)
    right = files.files["trex.pth"]
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 200_000_001)
    for content, message in (
        (b"<!doctype html><p>Not here any more", "is a web page"),
        (tmp_path / "large", "larger than 200 MB, not NAVER's"),
    ):
        files.files["trex.pth"] = content
        with pytest.raises((ValueError, WeightsError), match=message):
            fetch()
    del files.files["trex.pth"]
    with pytest.raises(WeightsError, match=r"trex.pth is not available: .*404"):
        fetch()
    assert list((tmp_path / "out" / "files").iterdir()) == []
    assert not path.exists()
    files.files["trex.pth"] = right
    with pytest.raises(ValueError, match="'trex.zip' is not a file of NAVER's; choose from tr"):
        import_naver(("trex.zip",), output=tmp_path / "out", manifest=path)
    save_manifest(Manifest(naver={"trex.pth": "0" * 64}), path)
    digest = sha256(release / "trex.pth")
    with pytest.raises(WeightsError, match=f"refused: SHA-256 of .*is {digest}, not 0000") as e:
        fetch()
    assert "\n" not in str(e.value)
    assert list((tmp_path / "out" / "files").iterdir()) == []
    assert load_manifest(path).naver == {"trex.pth": "0" * 64}
    path.unlink()
    shutil.copy(release / "trex.pth", tmp_path / "out" / "files")
    files.log.clear()
    monkeypatch.setattr("hub.import_naver._convert", lambda *_: True)
    assert fetch()  # a manual copy
    assert files.log == []
    assert load_manifest(path).naver == {"trex.pth": digest}
    with (tmp_path / "out" / "files" / "trex.pth").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(WeightsError, match=f"refused: .*files/trex.pth is .*, not {digest}"):
        fetch()


def test_import_continues_and_rebuilds_damaged_folders(
    files: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "manifest.json", tmp_path / "out"
    weights = out / "converted" / STARS[0] / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"other weights")  # as if converted from the full file
    files.faults.append(Fault("trex.pth", 404))
    with pytest.raises(WeightsError, match=r"1 of 2 files failed: .*404.*copy it to .*trex\.p"):
        import_naver(("trex.pth", "trexstar_2.pth"), output=out, manifest=path)
    warning = (
        "WARNING: trexstar_resnet50.in1k_r2 from trexstar_2.pth differs from the earlier "
        "conversion of trexstar_2_checkpoint_full.pth; find out"
    )
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"x")
    assert warning in capsys.readouterr().out
    assert not import_naver(("trexstar_2.pth",), output=out, manifest=path)
    assert warning in capsys.readouterr().out
    assert weights.read_bytes() == whole
    assert import_naver(("trexstar_2.pth",), output=out, manifest=path)
    assert "already converted" in capsys.readouterr().out
