"""``python -m hub``: Hub folders, publishing, verifying, and importing NAVER's files."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo

from convert.official import convert_official
from hub import cards, fixed_input, imagenet, notices
from hub.__main__ import main
from hub.build_folders import build_folders
from hub.errors import HubError
from hub.hub_folder import FILES, Model, inspect_folder, load_folder
from hub.import_naver import import_naver
from hub.publish import publish
from hub.verify import verify
from tests.documentation import python_blocks
from tests.file_server import FileServer
from tests.loopback import Fault
from tests.loopback_hub import LFS_WARNING, Hub, HubServer, environment
from tests.models import CFG, COLOURS, TINY, edit_config, tiny_classifier, tiny_folder
from trex_models import naver, timm_folder
from trex_models.evaluation.feature_file import load as load_features
from trex_models.evaluation.linear import Samples, Setting, fitted_accuracies
from trex_models.manifest import Manifest, WeightsError, load_manifest, save_manifest, sha256
from trex_models.transfer.protocol import sgd_scores
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
    """Their Hub folders."""
    build_folders(tiny, tmp_path / "hub", **OWNER)
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def official(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Timm folders of the three models of a full file."""
    folder = tmp_path_factory.mktemp("official")
    convert_official(release / "trexstar_2_checkpoint_full.pth", folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def loopback_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not told where to look finds nothing."""
    for name, value in nowhere(tmp_path).items():
        monkeypatch.setenv(name, value)


def nowhere(tmp_path: Path) -> dict[str, str]:
    return {
        "TREX_MODELS_MANIFEST": str(tmp_path / "manifest.json"),
        "TREX_MODELS_NAVER_URL": "http://127.0.0.1:9/",
        "TREX_MODELS_CACHE": str(tmp_path / "cache"),
    }


@pytest.fixture
def api(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> HfApi:
    """The client, of the commands too."""
    api = HfApi(endpoint=server.url, token="hf_write")
    for module in ("publish", "verify"):
        monkeypatch.setattr(f"hub.{module}.HfApi", lambda: api)
    return api


@pytest.fixture
def push(api: HfApi, tmp_path: Path) -> Callable[..., Manifest]:
    """Publish folders; the manifest is tmp_path / manifest.json."""

    assert api.token

    def run(*sources: Path, **options: Any) -> Manifest:
        publish(sources, manifest=tmp_path / "manifest.json", **options)
        return load_manifest(tmp_path / "manifest.json", missing_ok=True)

    return run


def sent(server: HubServer) -> list[str]:
    """The requests that can change something."""
    return [f"{r.method} {r.path}" for r in server.requests("^(POST|PUT|DELETE) ")]


# build


def test_own_model_becomes_a_hub_folder(tiny: Path, tmp_path: Path) -> None:
    (folder,) = build_folders(tiny / "small_trex", tmp_path / "out", name="ada-trex", **OWNER)
    assert folder == tmp_path / "out" / "ada-trex"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert [path.name for path in folder.parent.iterdir()] == ["ada-trex"]
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
    for word in ("non-commercial", "not for commercial", "1.17", "78.0", "authors' figures"):
        assert word not in card.text
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert sum(p.sum() for p in model.parameters()) == sum(
        p.sum() for p in load_folder(tiny / "small_trex").parameters()
    )


def test_licence_of_own_model_is_its_owners_choice(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "export"
    shutil.copytree(tiny / "small_trex", source)
    with pytest.raises(ValueError, match=r"no license is stated for export; choose one: --lic"):
        build_folders(source, tmp_path / "out", owner="Ada")
    with pytest.raises(ValueError, match="unknown license 'gpl-9'; choose one of apache-2.0"):
        build_folders(source, tmp_path / "out", owner="Ada", license="gpl-9")
    with pytest.raises(ValueError, match="--owner NAME"):
        build_folders(source, tmp_path / "out", license="mit")
    assert not (tmp_path / "out").exists()
    edit_config(source, lambda config: config["pretrained_cfg"].update(license="cc0-1.0"))
    with pytest.raises(ValueError, match="are under cc0-1.0; leave --license out"):
        build_folders(source, tmp_path / "out", **OWNER)
    (folder,) = build_folders(source, tmp_path / "out", owner="Ada")
    assert ModelCard.load(folder / "README.md").data.license == "cc0-1.0"


def put(name: str, data: bytes = b"") -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_bytes(data))


def void(_: object) -> None:
    pass


def spoil_weights(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["layer1.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    save_file(state, folder / "model.safetensors")


def drop_weight(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["layer1.0.conv1.weight"]
    save_file(state, folder / "model.safetensors")


def configured(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, change)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (put("pytorch_model.bin", b"\x80\x02."), r"pytorch_model.bin does not belong"),
        (put("notes.txt"), r"notes.txt does not belong"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (put("model.safetensors", b"\x80\x02."), "model.safetensors is no safetensors file"),
        (spoil_weights, r"layer1.0.conv1.weight has values that are not finite"),
        (drop_weight, "timm cannot load it"),
        (put("config.json", b"[1]"), "config.json is no model's configuration"),
        (put("config.json", b"{"), "config.json is no model's configuration"),
        (
            configured(lambda c: c["pretrained_cfg"].update(file="/home/ada/x.pth")),
            r"pretrained_cfg.file is a path of this machine, '/home/ada/x.pth'",
        ),
        (
            configured(lambda c: c["pretrained_cfg"].update(file="runs/model.safetensors")),
            r"pretrained_cfg.file is a path of this machine, 'runs/model.safetensors'",
        ),
        (configured(lambda c: c.pop("num_features")), "config.json lacks num_features; convert"),
        (
            configured(lambda c: c["pretrained_cfg"].pop("input_size")),
            "config.json lacks pretrained_cfg.input_size; convert",
        ),
        (configured(lambda c: c["model_args"].update(num_classes=0)), "model_args has num_classes"),
        (configured(lambda c: c.update(architecture="resnet_9000")), "timm cannot load it"),
        (
            configured(lambda c: c["pretrained_cfg"].update(origin_url=notices.ORIGIN)),
            "the weights are NAVER's by its origin_url",
        ),
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


def test_stock_classifier_is_none_of_naver_s(tmp_path: Path) -> None:
    torch.manual_seed(0)
    cfg = CFG | {"num_classes": 3}
    model = timm.create_model("resnet10t", num_classes=3, pretrained_cfg=cfg, **TINY).eval()
    images = torch.randn(2, 3, 32, 32)
    timm_folder.write_timm_folder(model, tmp_path / "mine", images, model(images).detach())
    for name in ("trex_resnet50.in1k", "trex_resnet50_cls.in1k_r2"):
        with pytest.raises(ValueError, match="num_classes is 3; a backbone is published with 0"):
            build_folders(tmp_path / "mine", tmp_path / "out", name=name)
    assert not (tmp_path / "out").exists()


def test_naver_name_binds_architecture_and_licence(tiny: Path, tmp_path: Path) -> None:
    name = "trex_resnet50.in1k"
    with pytest.raises(ValueError, match=r"architecture of trex_resnet50.in1k is 'resnet10t', not"):
        build_folders(tiny / "small_trex", tmp_path / "out", name=name)
    with pytest.raises(ValueError, match="cannot be a repository's name"):
        build_folders(tiny / "small_trex", tmp_path / "out", name="a/b", **OWNER)
    with pytest.raises(ValueError, match="holds 2 models, but --name names one"):
        build_folders(tiny, tmp_path / "out", name="one", **OWNER)
    with pytest.raises(ValueError, match="holds no model; make some"):
        build_folders(tmp_path, tmp_path / "out", **OWNER)
    with pytest.raises(ValueError, match="is no folder"):
        build_folders(tmp_path / "nowhere", tmp_path / "out", **OWNER)


def test_own_weights_do_not_take_naver_s_names(tmp_path: Path) -> None:
    model = timm.create_model("resnet50", num_classes=0).eval()
    images = torch.ones(1, 3, 64, 64)
    timm_folder.write_timm_folder(model, tmp_path / "own", images, model(images).detach())
    edit_config(tmp_path / "own", lambda config: config["pretrained_cfg"].pop("license", None))
    with pytest.raises(ValueError, match=r"weights of NAVER's, which these are not"):
        build_folders(tmp_path / "own", tmp_path / "hub", name="trex_resnet50.in1k")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is a training run; give .*export/backbone or"):
        build_folders(tmp_path / "run", tmp_path / "hub", owner="Ada", license="mit")
    assert not (tmp_path / "hub").exists()


def test_build_again_replaces_the_folder(tiny: Path, tmp_path: Path) -> None:
    first = build_folders(tiny, tmp_path / "out", **OWNER)
    second = build_folders(tiny, tmp_path / "out", owner="Ada", license="mit")
    assert first == second
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["small_trex", "small_trex_cls"]
    assert "MIT" in (first[0] / "LICENSE").read_text()
    # A Hub folder can be built again; its licence is known now.
    (again,) = build_folders(first[0], tmp_path / "again", owner="Ada")
    assert (again / "LICENSE").read_text() == (first[0] / "LICENSE").read_text()


@pytest.mark.slow
def test_official_file_becomes_hub_folders(official: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--license mit: the license of trexstar_resnet50"):
        build_folders(official, tmp_path / "hub", license="mit")
    with pytest.raises(ValueError, match="--owner Ada: trexstar_resnet50"):
        build_folders(official, tmp_path / "hub", owner="Ada")
    # The report of the conversion beside the folders is no model.
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
    assert "these have none: 7." in (built[1] / "README.md").read_text()
    with pytest.raises(ValueError, match="'my-model' is none of their names"):
        build_folders(built[0], tmp_path / "other", name="my-model", **OWNER)
    edit_config(built[0], lambda config: config["pretrained_cfg"].update(license="mit"))
    with pytest.raises(ValueError, match="the license of NAVER's weights is cc-by-nc-sa-4.0, not"):
        inspect_folder(built[0], built[0].name)


# cards


def naver_model(name: str) -> Model:
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
    return Model(name, Path("unused"), config, part, part == "backbone")


@pytest.mark.parametrize("name", naver.FILES)
def test_card_of_naver_model(name: str) -> None:
    card = cards.render(naver_model(name), naver.LICENSE, None, "trex-models")
    data: Any = ModelCard(card).data
    header = data.to_dict()
    task = "image-classification" if "_cls" in name else "image-feature-extraction"
    assert card.startswith("---\n")
    assert header["license"] == "cc-by-nc-sa-4.0"
    assert header["library_name"] == "timm"
    assert header["datasets"] == ["imagenet-1k"]
    assert header["pipeline_tag"] == task
    assert {"image-feature-extraction", "timm", "trex", task} <= set(header["tags"])
    assert "model-index" not in header

    text = card.split("---\n", 2)[2]
    opening = text.split("## What it is")[0]
    for words in (
        "not for commercial use",
        "keep this license",
        "NAVER Corporation's",
        "only conv",
    ):
        assert words in opening
    assert not re.search(r"\{\{|\{%|(?<!\[)None|Undefined| +$|\n\n\n", card, re.MULTILINE)
    assert card.isascii()

    own = reported(name)
    shown = re.findall(r"^\| (\d.*) % \| (.*) \|$", card, re.MULTILINE)
    assert shown == [(f"{100 * own.top1:.1f}", f"{own.mean_log_odds:.4f}")]
    assert "**authors' figures**" in text
    assert "**Measured here: nothing yet.**" in text
    assert f"**This is {'t-ReX*' if 'star' in name else 't-ReX'}.**" in text

    blocks = python_blocks(card)
    assert len(blocks) == 4
    for block in blocks:
        compile(block, name, "exec")
    assert ["import trex_models" in block for block in blocks] == [True, True, True, False]
    backbone = f"{name.partition('_')[0]}_resnet50.{name.partition('.')[2]}"
    assert f'"hf-hub:trex-models/{backbone}"' in blocks[3]
    assert ("Plain timm cannot load this model" in text) is (backbone != name)


def test_card_says_what_was_measured_here() -> None:
    measured = {"images": 50000, "top1": 77.3456, "protocol": imagenet.LINEAR}
    render = partial(cards.render, identifier=naver.LICENSE, owner=None, namespace="x")
    card = render(naver_model("trex_resnet50.in1k"), measured=measured)
    assert "top-1 77.35 % by a linear layer on the features" in card
    assert "nothing yet" not in card
    card = render(
        naver_model("trex_resnet50_cls.in1k_r2"),
        measured=measured | {"protocol": imagenet.PROTOTYPES},
    )
    assert "top-1 77.35 % by its own prototypes" in card
    assert "another protocol" in " ".join(card.split())


def test_results_must_be_of_the_same_weights(tiny: Path, tmp_path: Path) -> None:
    results = tmp_path / "imagenet.json"
    results.write_text(json.dumps({"small_trex": {"sha256": "0" * 64}}))
    with pytest.raises(ValueError, match=r"imagenet.json: small_trex was measured with another"):
        build_folders(tiny / "small_trex", tmp_path / "out", **OWNER, results=results)
    results.write_text("[")
    with pytest.raises(ValueError, match=r"imagenet.json holds no results .*; delete it"):
        build_folders(tiny / "small_trex", tmp_path / "out", **OWNER, results=results)


def test_figures_are_those_of_the_specification() -> None:
    assert reported("trex_resnet50.in1k") == ("t-ReX", 0.780, 1.1704)
    assert reported("trexstar_resnet50.in1k") == ("t-ReX*", 0.802, 0.8829)
    for part in ("", "_proj", "_cls"):
        assert reported(f"trex_resnet50{part}.in1k_r2")[1:] == (0.779, 1.1664)
        assert reported(f"trexstar_resnet50{part}.in1k_r2")[1:] == (0.802, 0.8800)


def test_origin_is_that_of_the_zoo() -> None:
    cfg = timm.get_pretrained_cfg("trex_resnet50")
    assert cfg is not None
    assert cfg.origin_url == notices.ORIGIN


def run_blocks(blocks: list[str], environ: Mapping[str, str], *, bare: bool = False) -> str:
    """Run a card's examples as they stand, each by itself; ``bare`` without trex_models."""
    code = [
        f"exec(compile({block!r}, 'block {i}', 'exec'), {{}})" for i, block in enumerate(blocks)
    ]
    if bare:
        code.insert(0, "import sys; sys.modules['trex_models'] = None")
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", "\n".join(code)],
        env={**environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.client
def test_from_publication_to_the_examples_in_the_cards(
    official: Path,
    built: Path,
    server: HubServer,
    push: Callable[..., Manifest],
    api: HfApi,
    tmp_path: Path,
) -> None:
    """Every example of a backbone's and a classifier's card, of NAVER's and of our own."""
    names = "trexstar_resnet50.in1k_r2", "trexstar_resnet50_cls.in1k_r2"
    backbone, cls = (build_folders(official / name, tmp_path / "official")[0] for name in names)
    published = push(backbone, cls, *built.iterdir())
    assert len(published.models) == 4
    assert api.token
    assert verify(manifest=tmp_path / "manifest.json")

    blocks = {
        folder: python_blocks((folder / "README.md").read_text())
        for folder in (backbone, cls, built / "small_trex", built / "small_trex_cls")
    }
    environ = environment(server.url, tmp_path / "home") | nowhere(tmp_path)
    fetch = f"from trex_models import weights; print(weights.fetch({backbone.name!r}))"
    out = run_blocks(
        [fetch, *blocks[backbone][:3], *blocks[cls][:3], *blocks[built / "small_trex_cls"]], environ
    )
    assert Path(out.partition("\n")[0]).is_relative_to(tmp_path / "home")
    for shape in ("[1, 2048]", "[2, 2048, 7, 7]", "[1, 256]", "[1, 16]"):
        assert f"torch.Size({shape})" in out
    assert out.count("32 torch.Size([2, 2048, 7, 7])") == 2
    assert all(re.search(rf"^0\.\d+ {name}$", out, re.MULTILINE) for name in COLOURS)

    plain = [blocks[backbone][3], blocks[cls][3], *blocks[built / "small_trex"]]
    out = run_blocks(plain, environ, bare=True)
    assert out.count("torch.Size([1, 2048])") == 2
    assert "torch.Size([1, 32])" in out


# publish


def test_publish_records_what_a_user_then_fetches(
    built: Path, hub: Hub, push: Callable[..., Manifest], tmp_path: Path
) -> None:
    published = push(built / "small_trex")
    entry = published.models["small_trex"]
    (_, commit) = hub.repos["trex-models/small_trex"].commits
    assert entry.repository == "trex-models/small_trex"
    assert entry.revision == commit.sha
    assert entry.sha256 == sha256(built / "small_trex" / "model.safetensors")
    assert tuple(entry.outputs) == fixed_input.fixed_outputs(load_folder(built / "small_trex"))
    assert len(entry.outputs) == 8
    assert sorted(commit.files) == sorted([".gitattributes", *FILES])
    assert commit.files["model.safetensors"].sha256 == entry.sha256
    assert not list(tmp_path.glob(".*"))


def test_publish_again_sends_nothing(
    built: Path,
    hub: Hub,
    server: HubServer,
    push: Callable[..., Manifest],
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = push(built / "small_trex")
    server.log.clear()
    capsys.readouterr()
    assert push(built / "small_trex") == first
    assert sent(server) == []
    assert len(hub.repos["trex-models/small_trex"].commits) == 2
    out = capsys.readouterr().out
    assert "trex-models/small_trex: unchanged" in out
    assert all(f"skip, is there already: {file}" in out for file in FILES)


def test_a_changed_file_alone_is_committed(
    built: Path, hub: Hub, server: HubServer, push: Callable[..., Manifest]
) -> None:
    folder = built / "small_trex"
    first = push(folder)
    server.log.clear()
    with (folder / "NOTICE").open("a") as file:
        file.write("Ada has moved.\n")
    second = push(folder)
    _, before, after = hub.repos["trex-models/small_trex"].commits
    assert {path for path in after.files if after.files[path] != before.files[path]} == {"NOTICE"}
    assert second.models["small_trex"] == dataclasses.replace(
        first.models["small_trex"], revision=after.sha
    )
    assert not server.requests("/lfs/")

    tiny_folder(folder.parent / "new", seed=5)
    shutil.copy(folder.parent / "new" / "model.safetensors", folder)
    third = push(folder).models["small_trex"]
    *_, last = hub.repos["trex-models/small_trex"].commits
    assert last.files["model.safetensors"].sha256 == third.sha256
    assert third.sha256 != second.models["small_trex"].sha256
    assert third.outputs != second.models["small_trex"].outputs


def test_a_commit_by_others_in_between_is_not_overwritten(
    built: Path,
    hub: Hub,
    api: HfApi,
    push: Callable[..., Manifest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    push(built / "small_trex")
    (built / "small_trex" / "NOTICE").write_text("Ada has moved.\n")
    commit = api.create_commit

    def late(*args: Any, **options: Any) -> Any:
        hub.add("trex-models/small_trex", {"NOTICE": b"Charles was faster.\n"})
        return commit(*args, **options)

    monkeypatch.setattr(api, "create_commit", late)
    with pytest.raises(HubError, match="answered 412"):
        push(built / "small_trex")
    assert len(hub.repos["trex-models/small_trex"].commits) == 3


def test_dry_run_sends_nothing(
    built: Path,
    hub: Hub,
    server: HubServer,
    push: Callable[..., Manifest],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert push(*built.iterdir(), dry_run=True) == Manifest()
    assert sent(server) == []
    assert hub.repos == {}
    assert not (tmp_path / "manifest.json").exists()
    out = capsys.readouterr().out
    for folder in built.iterdir():
        assert f"trex-models/{folder.name}: new" in out
        for file in FILES:
            path = folder / file
            size = path.stat().st_size
            assert f"would upload {file}, {size} bytes, SHA-256 {sha256(path)}\n" in out
    push(built / "small_trex")
    server.log.clear()
    push(built / "small_trex", dry_run=True)
    assert sent(server) == []
    assert "would skip, is there already: README.md" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (put("pytorch_model.bin"), r"pytorch_model.bin does not belong"),
        (lambda folder: (folder / "README.md").unlink(), "has no README.md; make it"),
        (lambda folder: (folder / "NOTICE").unlink(), "has no NOTICE; make it"),
        (
            lambda folder: void(
                (folder / "README.md").write_text("---\nlicense: mit\n---\ntrex-models/x")
            ),
            "the license is 'mit', but should be 'cc-by-4.0'",
        ),
        (lambda folder: shutil.rmtree(folder), "has no config.json; make it"),
    ],
)
def test_unfit_hub_folder_is_not_published(
    spoil: Callable[[Path], object],
    message: str,
    built: Path,
    server: HubServer,
    push: Callable[..., Manifest],
) -> None:
    spoil(built / "small_trex_cls")
    with pytest.raises(ValueError, match=message):
        push(built / "small_trex", built / "small_trex_cls")
    assert server.log == []


def test_card_must_name_its_repository(built: Path, push: Callable[..., Manifest]) -> None:
    with pytest.raises(ValueError, match="build the folder again with --namespace ada"):
        push(built / "small_trex", namespace="ada")


ONE_LINE = r"[^\n]*"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("whoami", 401), f"answered 401{ONE_LINE}refuses the token; `hf auth login`"),
        (
            Fault("repos/create", 403),
            f"answered 403{ONE_LINE}ask an owner of trex-models for write",
        ),
        (Fault("POST .*commit", 409), f"answered 409{ONE_LINE}run the same command again"),
        (Fault("POST .*commit", 412), f"answered 412{ONE_LINE}run the same command again"),
        (Fault("POST .*commit", 500), f"answered 500{ONE_LINE}a fault of its own; run the same"),
        (Fault("POST .*commit", 429), f"answered 429{ONE_LINE}wait some minutes"),
        (Fault("POST .*commit", 400), f"answered 400{ONE_LINE}correct the request"),
        (Fault("PUT /lfs", 403), f"answered 403{ONE_LINE}ask an owner of trex-models for write"),
        (Fault("PUT /lfs", 0), f"cannot be reached{ONE_LINE}check the network and HF_ENDPOINT"),
        (Fault("whoami", 0), f"cannot be reached{ONE_LINE}check the network and HF_ENDPOINT"),
    ],
    ids=lambda value: str(value.status or "cut") if isinstance(value, Fault) else "",
)
def test_errors_of_the_hub_are_one_line(
    fault: Fault,
    message: str,
    built: Path,
    server: HubServer,
    push: Callable[..., Manifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's attempts
    server.faults.append(fault)
    with pytest.raises(HubError, match=message) as error:
        push(built / "small_trex")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "manifest.json").exists()
    server.faults.clear()
    assert list(push(built / "small_trex").models) == ["small_trex"]  # and then it goes on


def test_foreign_files_on_the_hub_are_refused(
    built: Path, server: HubServer, push: Callable[..., Manifest], tmp_path: Path
) -> None:
    server.hub.add("trex-models/small_trex", {"pytorch_model.bin": b"pickle"})
    with pytest.raises(ValueError, match=r"do not belong there: pytorch_model\.bin; delete them"):
        push(built / "small_trex")
    assert not (tmp_path / "manifest.json").exists()
    assert server.requests("^(POST|PUT) .*(commit|lfs)") == []


def test_what_cannot_be_recorded_is_not_sent(
    built: Path, server: HubServer, push: Callable[..., Manifest], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="2 of the folders are named small_trex"):
        push(built / "small_trex", built / "small_trex")
    copy = tmp_path / "small_trex"
    shutil.copytree(built / "small_trex", copy)
    (copy / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(ValueError, match=r"README\.md is damaged .*; build the folder again"):
        push(copy)
    with pytest.raises(ValueError, match="none cannot be written; choose another --manifest"):
        publish((built / "small_trex",), manifest=tmp_path / "none" / "manifest.json")
    with pytest.raises(ValueError, match="give one folder or more"):
        push()
    assert server.log == []


def test_interruption_leaves_a_correct_manifest(
    built: Path, hub: Hub, server: HubServer, push: Callable[..., Manifest], tmp_path: Path
) -> None:
    sources = built / "small_trex", built / "small_trex_cls"
    server.faults.append(Fault("POST .*small_trex_cls/commit", 500))
    with pytest.raises(HubError, match="trex-models/small_trex_cls: the Hub answered 500"):
        push(*sources)
    assert list(load_manifest(tmp_path / "manifest.json").models) == ["small_trex"]
    server.faults.clear()
    push(*sources)
    assert sorted(load_manifest(tmp_path / "manifest.json").models) == [p.name for p in sources]
    assert len(hub.repos["trex-models/small_trex"].commits) == 2


def rewrite(path: Path, **changes: Any) -> None:
    """Change the manifest's entry of small_trex."""
    published = load_manifest(path)
    entry = dataclasses.replace(published.models["small_trex"], **changes)
    save_manifest(dataclasses.replace(published, models={"small_trex": entry}), path)


def test_commands_publish_and_verify(
    built: Path,
    api: HfApi,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--manifest", str(tmp_path / "manifest.json")]
    assert main(["publish", str(built / "small_trex"), *options]) == 0
    captured = capsys.readouterr()
    assert str(api.token) not in captured.out + captured.err
    assert main(["verify", *options]) == 0
    assert capsys.readouterr().out.startswith("small_trex: good: ")
    rewrite(tmp_path / "manifest.json", outputs=(1.0,))
    assert main(["verify", *options]) == 1


def test_without_a_token_nothing_is_asked(built: Path, server: HubServer, tmp_path: Path) -> None:
    environ = environment(server.url, tmp_path / "home") | {"OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, "-m", "hub", "publish", str(built / "small_trex")],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    message = r"error: there is no token for the Hub: `hf auth login`, or set HF_TOKEN.*\n"
    assert re.fullmatch(message, done.stderr)
    assert server.log == []


def test_command_build(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["build", str(tiny / "small_trex"), "--output", str(out), "--name", "mine"]
    assert main([*arguments, "--license", "mit", "--owner", "Ada", "--namespace", "ada"]) == 0
    assert capsys.readouterr().out.startswith(f"built {out / 'mine'}\n")
    assert "hf-hub:ada/mine" in (out / "mine" / "README.md").read_text()


def test_bad_input_is_one_line_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TREX_TRACEBACK", raising=False)
    for arguments in (
        ["build", tmp_path / "nothing", "--output", tmp_path / "out"],
        ["publish", tmp_path / "nothing"],
        ["verify", "--manifest", tmp_path / "nothing.json"],
        ["import-naver", "other.pth", "--output", tmp_path / "out"],
    ):
        assert main([str(argument) for argument in arguments]) == 2
        assert re.fullmatch(r"error: [^\n]+\n", capsys.readouterr().err)
    monkeypatch.setenv("TREX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="is no folder"):
        main(["build", str(tmp_path / "nothing"), "--output", str(tmp_path / "out")])


# verify


@pytest.fixture
def check(api: HfApi, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Verify, and return the line."""

    def run(*names: str) -> str:
        capsys.readouterr()
        assert api.token
        good = verify(names, manifest=tmp_path / "manifest.json")
        out = capsys.readouterr().out
        assert good is (": good: " in out)
        return out

    return run


def test_verify(
    built: Path,
    hub: Hub,
    server: HubServer,
    push: Callable[..., Manifest],
    check: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, name = tmp_path / "manifest.json", "trex-models/small_trex"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    entry = push(built / "small_trex").models["small_trex"]
    assert re.fullmatch(rf"small_trex: good: .*{name}@{entry.revision}\)\n", check())
    assert check("small_trex") == check()
    assert not (tmp_path / "home").exists()

    near = tuple(value * (1 + 5e-4) for value in entry.outputs)
    rewrite(path, outputs=near)
    assert ": good: " in check()
    rewrite(path, outputs=tuple(value * (1 + 2e-3) for value in entry.outputs))
    assert "DIFFERS: outputs are off by 0.002 of the largest" in check()
    far = (*entry.outputs[:-1], entry.outputs[-1] * 2)
    rewrite(path, outputs=far)
    assert re.match(r"small_trex: DIFFERS: outputs are off by 0.5 of the largest, more", check())
    rewrite(path, outputs=())
    assert "outputs are off by inf" in check()
    rewrite(path, outputs=entry.outputs)

    tiny_folder(tmp_path / "other", seed=9)
    changed = hub.add(name, {"model.safetensors": tmp_path / "other" / "model.safetensors"})
    assert ": good: " in check()  # the revision is pinned
    rewrite(path, revision=changed)
    found = sha256(tmp_path / "other" / "model.safetensors")
    line = f"SHA-256 of model.safetensors is {found}, recorded is {entry.sha256}"
    assert f"small_trex: DIFFERS: {line} " in check()

    rewrite(path, revision="0" * 40)
    assert "NOT CHECKED: trex-models/small_trex: the Hub answered 404" in check()
    rewrite(path, repository="trex-models/gone", revision=entry.revision)
    assert re.search("NOT CHECKED: trex-models/gone: .*there is no such repository", check())
    rewrite(path, repository=name)
    server.faults.append(Fault("GET /api/models/", 503))
    assert re.search("NOT CHECKED: .*answered 503.*run the same command again later", check())
    server.faults.clear()
    rewrite(path, revision=hub.add(name, {"pytorch_model.bin": b"\x80\x02."}, ["NOTICE"]))
    assert "DIFFERS: files that do not belong there: pytorch_model.bin (" in check()


def test_verify_loads_models_of_the_zoo_by_name(
    built: Path,
    push: Callable[..., Manifest],
    check: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    push(built / "small_trex")
    assert "by its name" not in check()
    monkeypatch.setitem(naver.FILES, "small_trex", ())  # timm knows no model of this name
    assert re.search(r"DIFFERS: it does not load .*Unknown model \(small_trex\)", check())


def test_verify_compares_keys_and_shapes(
    built: Path, hub: Hub, push: Callable[..., Manifest], check: Callable[..., str], tmp_path: Path
) -> None:
    path, name = tmp_path / "manifest.json", "trex-models/small_trex"
    push(built / "small_trex")
    config = json.loads((built / "small_trex" / "config.json").read_text())
    state = load_file(built / "small_trex" / "model.safetensors")

    def changed(config: dict[str, Any], state: dict[str, torch.Tensor]) -> str:
        save_file(state, tmp_path / "weights")
        files: dict[str, bytes | Path] = {
            "config.json": json.dumps(config).encode(),
            "model.safetensors": tmp_path / "weights",
        }
        rewrite(path, revision=hub.add(name, files), sha256=sha256(tmp_path / "weights"))
        return check()

    wider = config | {"model_args": config["model_args"] | {"channels": [4, 8, 16, 64]}}
    assert re.search(
        r"DIFFERS: layer4\S+ is \(.*\) torch.float32, expected \(", changed(wider, state)
    )
    less = {key: tensor for key, tensor in state.items() if key != "bn1.bias"}
    more = less | {"extra": torch.zeros(1)}
    line = changed(config, more)
    assert "DIFFERS: 1 (bn1.bias) missing, 1 (extra) unexpected" in line
    assert "DIFFERS: it does not load" in changed(config | {"architecture": "resnet_9000"}, state)


def test_verify_what_is_not_listed(check: Callable[..., str], tmp_path: Path) -> None:
    save_manifest(Manifest(), tmp_path / "manifest.json")
    with pytest.raises(ValueError, match="lists no model; publish some"):
        check()
    with pytest.raises(ValueError, match="does not list 'trex_resnet50.in1k'; it lists: none"):
        check("trex_resnet50.in1k")


def test_fixed_input_is_the_formula() -> None:
    images = fixed_input.images((3, 4, 5))
    assert images.shape == (1, 3, 4, 5)
    assert images.dtype == torch.float32
    for c, y, x in ((0, 0, 0), (2, 3, 4), (1, 0, 3)):
        expected = 2 * np.sin((c + 1) * (x + 2 * y) / 17)
        assert images[0, c, y, x].item() == pytest.approx(expected, abs=1e-7)
    assert fixed_input.relative_error((1.0, -2.0), (1.0, -2.5)) == pytest.approx(0.2)


# ImageNet


def picture(colour: tuple[int, int, int], seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-8, 9, (40, 48, 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet in small: a colour is a class, and 2 of 16 images in val are in a wrong folder."""
    root = tmp_path_factory.mktemp("imagenet")
    for split, count in (("train", 5), ("val", 4)):
        for c, (name, colour) in enumerate(COLOURS.items()):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture(colour, 100 * c + i).save(folder / f"{split}_{i}.png")
    for name, other in (("ant", "bee"), ("cat", "dog")):
        picture(COLOURS[other], 999).save(root / "val" / name / "val_0.png")
    return root


@pytest.fixture(scope="module")
def rightful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, and a classifier whose prototypes are the embeddings of the classes' colours.

    They have the names of NAVER's, so that they are measured.
    """
    folder = tmp_path_factory.mktemp("rightful")
    tiny_folder(folder / "trex_resnet50.in1k")
    embedder: Any = load_folder(tiny_classifier(folder / "first"))
    shutil.rmtree(folder / "first")
    embedder.reset_classifier(0)
    colours = torch.tensor(list(COLOURS.values())) / 127.5 - 1
    with torch.inference_mode():
        embeddings = embedder(colours.view(4, 3, 1, 1).expand(4, 3, 32, 32))
    tiny_classifier(folder / "trex_resnet50_cls.in1k_r2", F.normalize(embeddings).clone())
    shutil.copytree(folder / "trex_resnet50.in1k", folder / "trex_resnet50_proj.in1k_r2")
    return folder


SMALL = tuple(COLOURS)


@pytest.fixture
def two_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose between a bad and a good setting: by 4 images the choice among 30 is chance."""
    settings = (Setting(1e-3, 1e-4), Setting(10.0, 1e-6))
    monkeypatch.setattr(imagenet, "sgd_scores", partial(sgd_scores, settings=settings, epochs=300))


@pytest.mark.usefixtures("two_settings")
def test_measured_top1_is_the_known_one(
    rightful: Path, replica: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = imagenet.measure(rightful, replica, tmp_path, SMALL)
    assert json.loads((tmp_path / "imagenet.json").read_text()) == results
    assert sorted(results) == ["trex_resnet50.in1k", "trex_resnet50_cls.in1k_r2"]
    for result in results.values():
        assert result["top1"] == 100 * 14 / 16
        assert result["within_tolerance"] is False
    linear, prototypes = results.values()
    assert (linear["tolerance"], prototypes["tolerance"]) == (0.5, 1.5)
    assert (linear["reported_top1"], prototypes["reported_top1"]) == (78.0, 77.9)
    assert prototypes["protocol"] == "its own prototypes"
    assert prototypes["reported_protocol"] == linear["protocol"] == "a linear layer on the features"
    assert linear["learning_rate"] == 10.0

    kept = sorted((tmp_path / "features").rglob("*.safetensors"))
    found = [load_features(path).features for path in kept]
    shapes = {(array.shape, str(array.dtype)) for array in found}
    assert shapes == {((20, 32), "float16"), ((16, 32), "float16"), ((16, 4), "float32")}

    text = imagenet.format_results(results)
    assert re.search(r"trex_resnet50\.in1k +87\.50 +78\.0 +\+9\.50  NO \(0\.5\)", text)
    assert re.search(r"trex_resnet50_cls\.in1k_r2 \(\*\) +87\.50 +77\.9", text)
    assert "another protocol" in text

    capsys.readouterr()
    before = [path.stat().st_mtime_ns for path in kept]
    assert imagenet.measure(rightful, replica, tmp_path, SMALL) == results
    out = capsys.readouterr().out
    assert out.count("measured already, 87.50 %") == 2
    # With the features kept, only the layers are fitted again.
    (tmp_path / "imagenet.json").unlink()
    assert imagenet.measure(rightful, replica, tmp_path, SMALL) == results
    assert [path.stat().st_mtime_ns for path in kept] == before


@pytest.mark.usefixtures("two_settings")
def test_as_many_other_images_are_measured_again(
    rightful: Path, replica: Path, tmp_path: Path
) -> None:
    root, features = tmp_path / "images", tmp_path / "features"
    shutil.copytree(replica, root)
    imagenet.measure(rightful, root, tmp_path, SMALL)
    for file, kept in (("val/ant/val_0.png", 5), ("train/ant/train_0.png", 6)):
        picture(COLOURS["ant"], 7).save(root / file)
        os.utime(root / file, (10**9, 10**9))
        found = imagenet.measure(rightful, root, tmp_path, SMALL)
        assert [result["top1"] for result in found.values()] == [100 * 15 / 16] * 2
        assert len(list(features.rglob("*.safetensors"))) == kept


@pytest.mark.usefixtures("two_settings")
def test_other_weights_of_the_same_name_are_measured_again(
    replica: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setting is chosen on a fifth of train, and the last layer fitted to all of it."""
    sizes = []

    def noting(train: Samples, test: Samples, settings: Sequence[Setting], **options: Any) -> Any:
        sizes.append((len(train.rows), len(test.rows), len(settings)))
        return fitted_accuracies(train, test, settings, **options)

    monkeypatch.setattr("trex_models.evaluation.linear.fitted_accuracies", noting)
    folder = tmp_path / "models" / "trex_resnet50.in1k"
    for seed in (0, 1):
        tiny_folder(folder, seed)
        [result] = imagenet.measure(tmp_path / "models", replica, tmp_path, SMALL).values()
        assert result["sha256"] == sha256(folder / "model.safetensors")
        assert len(list((tmp_path / "features").rglob("*.safetensors"))) == 2 * (seed + 1)
    assert sizes == [(16, 4, 2), (20, 16, 1)] * 2


def test_images_must_be_of_the_classes(rightful: Path, replica: Path, tmp_path: Path) -> None:
    names = tuple(ImageNetInfo().label_names())
    assert imagenet.CLASSES == names == tuple(sorted(names))
    with pytest.raises(ValueError, match="4 class folders are not the 1000 expected.*: ant"):
        imagenet.measure(rightful, replica, tmp_path)
    shutil.copytree(replica / "val", tmp_path / "three" / "val")
    shutil.rmtree(tmp_path / "three" / "val" / "dog")
    three = ("ant", "bee", "cat")
    with pytest.raises(ValueError, match="has 4 classes, but the images have 3"):
        imagenet.measure(rightful, tmp_path / "three", tmp_path, three)
    with pytest.raises(ValueError, match="cannot be listed"):
        imagenet.measure(rightful, tmp_path / "nothing", tmp_path, SMALL)


def test_backbones_need_train(
    rightful: Path, replica: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(replica / "val", tmp_path / "val")
    assert list(imagenet.measure(rightful, tmp_path, tmp_path, SMALL)) == [
        "trex_resnet50_cls.in1k_r2"
    ]
    assert f"not measured, for {tmp_path / 'train'} is missing" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_one_line(
    workers: int, rightful: Path, replica: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(replica / "val", tmp_path / "val")
    (tmp_path / "val" / "bee" / "val_1.png").write_bytes(b"not an image")
    monkeypatch.setattr(imagenet, "free_cores", lambda: workers)
    with pytest.raises(ValueError, match=r"^[^\n]*bee/val_1.png cannot be read[^\n]*$"):
        imagenet.measure(rightful, tmp_path, tmp_path, SMALL)
    assert not (tmp_path / "imagenet.json").exists()


# import-naver


@pytest.fixture
def files(release: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A server in NAVER's place, with some of the files; two hold the same backbone."""
    names = "trex.pth", "trexstar_2.pth", "trexstar_2_checkpoint_full.pth"
    with FileServer({name: release / name for name in names}) as server:
        monkeypatch.setenv("TREX_MODELS_NAVER_URL", server.url)
        yield server


@pytest.mark.slow
def test_import_fetches_converts_and_measures_once(
    files: FileServer,
    release: Path,
    replica: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, path = tmp_path / "out", tmp_path / "manifest.json"
    converted = out / "converted"
    assert import_naver(tuple(files.files), output=out, manifest=path)
    assert load_manifest(path).naver == {name: sha256(release / name) for name in files.files}
    assert sorted(p.name for p in (out / "files").iterdir()) == sorted(files.files)
    stars = [f"trexstar_resnet50{part}.in1k_r2" for part in ("", "_cls", "_proj")]
    assert sorted(p.name for p in converted.iterdir() if p.is_dir()) == sorted(
        ["trex_resnet50.in1k", *stars]
    )

    files.log.clear()
    before = {p: p.stat().st_mtime_ns for p in converted.rglob("*")}
    assert import_naver(tuple(files.files), output=out, manifest=path)
    printed = capsys.readouterr().out
    for name in files.files:
        assert f"{name}: here already" in printed
        assert f"{name}: converted already" in printed
    assert before == {p: p.stat().st_mtime_ns for p in converted.rglob("*")}

    for name in stars:
        shutil.rmtree(converted / name)
    once = partial(import_naver, ("trex.pth",), output=out, manifest=path)
    small = partial(imagenet.measure, classes=SMALL)
    monkeypatch.setattr("hub.import_naver.measure", small)
    assert not once(imagenet=replica)  # it is not 78 %
    assert "trex_resnet50.in1k " in capsys.readouterr().out
    assert not once(imagenet=replica)
    assert "trex_resnet50.in1k: measured already" in capsys.readouterr().out
    # What is missing is made again.
    shutil.rmtree(converted / "trex_resnet50.in1k")
    assert once()
    assert (converted / "trex_resnet50.in1k" / "config.json").exists()
    assert files.log == []


def test_import_refuses_a_changed_file(files: FileServer, release: Path, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    fetch = partial(import_naver, ("trex.pth",), output=tmp_path / "out", manifest=path)
    save_manifest(Manifest(naver={"trex.pth": "0" * 64}), path)
    digest = sha256(release / "trex.pth")
    with pytest.raises(WeightsError, match=f"refused: the SHA-256 of .*is {digest}, not 0000") as e:
        fetch()
    assert "\n" not in str(e.value)
    assert list((tmp_path / "out" / "files").iterdir()) == []
    assert load_manifest(path).naver == {"trex.pth": "0" * 64}

    path.unlink()
    shutil.copy(release / "trex.pth", tmp_path / "out" / "files")
    files.log.clear()
    assert fetch()  # placed by hand
    assert files.log == []
    assert load_manifest(path).naver == {"trex.pth": digest}
    with (tmp_path / "out" / "files" / "trex.pth").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(WeightsError, match=f"refused: .*files/trex.pth is .*, not {digest}"):
        fetch()


def test_import_keeps_no_wrong_file(files: FileServer, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    fetch = partial(import_naver, ("trex.pth",), output=tmp_path / "out", manifest=path)
    right = files.files["trex.pth"]
    for content, message in (
        (b"<!doctype html><p>Not here any more", "it is a web page"),
        (files.files["trexstar_2_checkpoint_full.pth"], "it has more than 200 MB: another"),
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
    with pytest.raises(ValueError, match="NAVER has no file 'trex.zip'; choose from trex.pth"):
        import_naver(("trex.zip",), output=tmp_path / "out", manifest=path)


def test_import_goes_on_and_makes_again_what_is_damaged(
    files: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "manifest.json", tmp_path / "out"
    files.faults.append(Fault("trex.pth", 404))
    with pytest.raises(WeightsError, match=r"1 of 2 files: .*404.*place it at .*trex\.pth by"):
        import_naver(("trex.pth", "trexstar_2.pth"), output=out, manifest=path)
    weights = out / "converted" / "trexstar_resnet50.in1k_r2" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"x")
    capsys.readouterr()
    import_naver(("trexstar_2.pth",), output=out, manifest=path)
    assert "converted already" not in capsys.readouterr().out
    assert weights.read_bytes() == whole
    assert import_naver(("trexstar_2.pth",), output=out, manifest=path)
    assert "converted already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has no folder val"):
        import_naver(("trexstar_2.pth",), output=out, manifest=path, imagenet=tmp_path)


@pytest.mark.usefixtures("files")
def test_import_warns_where_two_files_disagree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # As if the full file had given other weights.
    earlier = tmp_path / "out" / "converted" / "trexstar_resnet50.in1k_r2"
    earlier.mkdir(parents=True)
    (earlier / "model.safetensors").write_bytes(b"other weights")
    path = tmp_path / "manifest.json"
    assert not import_naver(("trexstar_2.pth",), output=tmp_path / "out", manifest=path)
    warning = (
        "WARNING: trexstar_resnet50.in1k_r2 from trexstar_2.pth is not what it was before, from "
        "trexstar_2_checkpoint_full.pth: find out"
    )
    assert warning in capsys.readouterr().out
