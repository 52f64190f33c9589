"""``python -m hub build`` for every kind of model that the trainer exports: card and examples."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import ModelCard

from hub.__main__ import main
from hub.build_folders import build_folders
from hub.hub_folder import FILES
from tests.documentation import python_blocks
from tests.models import CFG, TINY, edit_config, tiny_classifier, write_folder
from trex_models.pretrained import naver
from trex_models.train.build import build_method
from trex_models.train.config import from_dict
from trex_models.train.export import export_method
from trex_models.train.recipes import RECIPES

OWNER: dict[str, Any] = {"owner": "Ada", "license": "cc-by-4.0"}
CLASSES = ["ant", "bee`s", "na\u00efve cat", "dog"]
TREX_WORDS = ("memory bank", "ImageNet-1K", "t-ReX*", "ResNet-50", "NAVER Corporation", "1.17")
RESNET = {"backbone": "resnet10t", "backbone_args": ("channels=(8,8,16,16)",)}
VIT = {"backbone": "vit_tiny_patch16_224", "backbone_args": ("depth=1",)}
WIDER = {"backbone": "mobilenetv3_small_050", "backbone_args": ()}


def export(folder: Path, objective: str, projector: str, **model: Any) -> Path:
    """Export an untrained method as the trainer does."""
    settings = dataclasses.asdict(RECIPES["smoke"]("unused"))
    settings["model"] |= {"projector": projector, "hidden_dim": 16, "embedding_dim": 8, **model}
    settings["objective"] |= {"name": objective, "bank_size": 32, "temperature": 0.2}
    settings["crops"] |= {"global_size": 32, "local_size": 16}
    config = from_dict(settings)
    method = build_method(config, len(CLASSES))
    export_method(method, config, CLASSES, folder)
    return folder


def own(source: Path, output: Path) -> tuple[Path, str]:
    """Build a model that Ada owns; return its folder and its card."""
    (folder,) = build_folders(source, output, name="own", **OWNER, namespace="ada")
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert not re.search(r"\{\{|\{%|(?<!\[)None\b(?! are)|Undefined| +$|\n\n\n", card, re.MULTILINE)
    return folder, card


def run_here(folder: Path, card: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a card's examples on the folder, and compare the output with the comments."""
    capsys.readouterr()
    blocks = [
        block.replace("hf-hub:ada/own", f"local-dir:{folder}") for block in python_blocks(card)
    ]
    assert len(blocks) == 3
    for index, block in enumerate(blocks):
        exec(compile(block, f"block {index}", "exec"), {})
    printed = capsys.readouterr().out
    shapes = re.findall(r"^print\(\w+\.shape\)  # \(([\d, ]+)\)", card, re.MULTILINE)
    assert shapes
    for shape in shapes:
        assert f"torch.Size([{shape}])" in printed
    return printed


@pytest.mark.parametrize(
    ("objective", "projector", "part", "text"),
    [
        ("ocm", "mlp", "backbone", "images to 16 features. It is a standard timm model, with"),
        ("look", "mlp", "proj", "images to 8-dimensional embeddings, without a classifier."),
        ("ocm", "mlp", "cls", "backbone, projector and cosine classifier. It maps images to "
         "4 logits. They are the cosines of the projector's 8-dimensional embeddings with one "
         "vector per class, divided by the temperature 0.2."),
        ("cosine", "none", "cls", "backbone and cosine classifier. It maps images to 4 logits. "
         "They are the cosines of the backbone's 16 features with one vector per class, d"),
        ("softmax", "mlp", "cls", "backbone, projector and linear classifier. It maps images to "
         "4 logits. The classifier is a linear layer on the projector's 8-dimensional embeddings."),
        ("softmax", "none", "cls", "backbone and linear classifier. It maps images to 4 logits. "
         "The classifier is a linear layer on the backbone's 16 features."),
    ],
)  # fmt: skip
def test_every_export_of_a_resnet(
    objective: str,
    projector: str,
    part: str,
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    exported = export(tmp_path / "export", objective, projector, **RESNET)
    folder, card = own(exported / part, tmp_path / "hub")
    words = " ".join(card.split())
    assert "`resnet10t` " in words
    assert text in words
    assert not [word for word in TREX_WORDS if word in card.split("## Citation")[0]]
    assert ("projector" in words) is (projector == "mlp" and part != "backbone")
    assert ("The logits come from a linear classifier" in words) is (objective == "softmax")
    assert ("The logits are cosines" in words) is (part == "cls" and objective != "softmax")

    classifies = part == "cls"
    data = ModelCard(card).data
    task = "image-classification" if classifies else "image-feature-extraction"
    assert (data.get("pipeline_tag"), data.get("license")) == (task, "cc-by-4.0")
    assert ("`ant`, `bee's`, `na\u00efve cat`, `dog`." in words) is classifies
    stock = json.loads((folder / "config.json").read_text())["architecture"] == "resnet10t"
    assert stock is (part == "backbone" or (objective, projector) == ("softmax", "none"))
    assert ("import trex_models" in card) is ("It needs the package" in card) is not stock

    printed = run_here(folder, card, capsys)
    assert all(f" {name}\n" in printed for name in CLASSES) is classifies
    assert "32 torch.Size([2, 16, 1, 1])" in printed  # last level of the pyramid


@pytest.mark.parametrize(
    ("objective", "layers", "architecture"),
    [("ocm", 3, "trex_resnet50_cls"), ("look", 1, "trexstar_resnet50_proj")],
)
def test_exports_of_the_papers_models_have_their_names(
    objective: str, layers: int, architecture: str, tmp_path: Path
) -> None:
    own = {"backbone": "resnet50", "backbone_args": (), "hidden_layers": layers}
    export(tmp_path, objective, "mlp", **own)
    config = json.loads((tmp_path / architecture[-4:].strip("_") / "config.json").read_text())
    assert config["architecture"] == architecture


@pytest.mark.parametrize(
    ("model", "part", "width"), [(VIT, "backbone", 192), (VIT, "cls", 192), (WIDER, "cls", 1024)]
)
def test_exports_of_other_architectures(
    model: dict[str, Any], part: str, width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = export(tmp_path / "export", "softmax", "none", **model)
    folder, card = own(exported / part, tmp_path / "hub")
    words = " ".join(card.split())
    assert f"`{model['backbone']}` " in words
    assert f"{width} features" in words
    assert "Only timm is needed" in words
    for word in (*TREX_WORDS, "ResNet", "projector", "cosine", "trex_models  #"):
        assert word not in card.split("## Citation")[0]
    # timm cannot build a pyramid from a single block.
    assert ("features_only" in card) is (model is WIDER)
    assert f"Other sizes work if `{model['backbone']}` supports them" in words
    printed = run_here(folder, card, capsys)
    assert all(f" {name}\n" in printed for name in CLASSES) is (part == "cls")


def test_long_lists_of_classes_and_naver_s_license(tmp_path: Path) -> None:
    source = tiny_classifier(
        tmp_path / "own", torch.eye(4, 16) * torch.tensor([[1], [0], [1], [1]])
    )
    card = own(source, tmp_path / "hub")[1]
    assert "These classes have no prototype, and their logits are always 0: 1." in card
    assert "mean (0.5, 0.5, 0.5) and standard deviation (0.5, 0.5, 0.5)" in card
    edit_config(
        source, lambda c: c["pretrained_cfg"].update(crop_pct=0.8, interpolation="bilinear")
    )
    card = own(source, tmp_path / "hub")[1]
    assert "32 x 32 pixels: the shorter side resized to 40 (bilinear)" in card
    names = [f"class {index}" for index in range(30)]
    cfg = {"num_classes": 30, "label_names": names, "input_size": (3, 32, 32)}
    model = timm.create_model("resnet10t", num_classes=30, pretrained_cfg=cfg, **TINY)
    write_folder(model, tmp_path / "many")
    card = " ".join(own(tmp_path / "many", tmp_path / "hub")[1].split())
    assert '`class 19` and 10 more, all in `model.pretrained_cfg["label_names"]`.' in card
    assert "class 20" not in card
    # Names are ignored unless there is one per class.
    edit_config(tmp_path / "many", lambda c: c["pretrained_cfg"].update(label_names=names[:3]))
    card = own(tmp_path / "many", tmp_path / "hub")[1]
    assert "names = range(30)" in card
    assert "Its classes" not in card
    # As for an export initialized from NAVER's weights: the card must not deny their origin.
    source = tiny_classifier(tmp_path / "mine")
    (folder,) = build_folders(source, tmp_path / "theirs", owner="Ada", license=naver.LICENSE)
    for file in ("README.md", "NOTICE"):
        text = " ".join((folder / file).read_text().split())
        assert re.search("if (the )?training started from those", text.lower())
        assert "not NAVER's" not in text


def test_models_that_do_not_run_and_runs_are_refused(tmp_path: Path) -> None:
    model = timm.create_model(
        "resnet10t", num_classes=0, global_pool="", pretrained_cfg=CFG, **TINY
    )
    write_folder(model, tmp_path / "maps")
    with pytest.raises(ValueError, match=r"maps: the model's output is not a vector; export"):
        build_folders(tmp_path / "maps", tmp_path / "hub", **OWNER)
    exported = export(tmp_path / "export", "softmax", "none", **VIT)
    edit_config(exported / "cls", lambda c: c["pretrained_cfg"].update(input_size=[3, 50, 50]))
    with pytest.raises(ValueError, match=r"cls: the model fails for images of its input_size, "):
        build_folders(exported / "cls", tmp_path / "hub", **OWNER)
    assert not (tmp_path / "hub").exists()
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for part in ("backbone", "proj"):
        (run / "export" / part).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"directory; pass \S+export/backbone or \S+export/proj$"):
        build_folders(run, tmp_path / "hub", **OWNER)


def test_build_says_how_to_publish_or_that_the_disk_is_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tiny_classifier(tmp_path / "own"), tmp_path / "hub"
    command = ["build", str(source), "--output", str(out), "--owner", "Ada", "--license", "mit"]
    assert main([*command, "--namespace", "ada", "--name", "mine"]) == 0
    publish = f"python -m hub publish {out}/mine --namespace"
    printed = capsys.readouterr().out
    assert printed.startswith(f"built {out / 'mine'}\n")
    assert f"to publish your models: {publish} ada --manifest manifest.json\n" in printed
    assert "hf-hub:ada/mine" in (out / "mine" / "README.md").read_text()
    assert main(command) == 0
    publish = publish.replace("mine", "own")
    hint = f"models: build again with --namespace YOU, then {publish} YOU --manifest"
    assert hint in capsys.readouterr().out

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    assert main(command) == 2
    assert capsys.readouterr().err == (
        f"error: {out / 'own'} cannot be written (No space left on device); fix this, or "
        "choose another --output\n"
    )
    assert {path.name for path in out.iterdir()} == {"mine", "own"}
    shutil.rmtree(out)
    out.write_text("")
    assert main(command) == 2
    assert f"error: {out} cannot be written (File exists)" in capsys.readouterr().err
