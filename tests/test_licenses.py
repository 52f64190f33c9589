"""Licenses of weights, determined in the same way by every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from convert import export_model
from hub import build_folders
from hub.hub_folder import inspect_folder
from trex_models.evaluation.frozen_model import FrozenModel
from trex_models.pretrained import licenses, naver, timm_folder
from trex_models.pretrained.licenses import describe, license_of
from trex_models.pretrained.manifest import sha256
from trex_models.train.__main__ import main

VALUES = torch.zeros(2)
LINEAR = {"fc.weight": torch.zeros(2, 3)}
UNTOLD = "not stated"


@pytest.mark.parametrize(
    ("file", "contents", "expected"),
    [
        ("trex.pth", LINEAR, naver.LICENSE),
        ("renamed.pth", {"model": {"module.model.encoder.conv1.weight": VALUES}}, naver.LICENSE),
        ("run.pt", {"config": {"license": "mit"}, "method": {"encoder.backbone.a": VALUES}}, "mit"),
        ("run.pt", {"config": {"license": ""}, "method": {"encoder.backbone.a": VALUES}}, UNTOLD),
        ("own.pth", LINEAR, UNTOLD),
        ("own.bin", None, UNTOLD),
    ],
)
def test_the_license_of_a_file_is_its_own(
    tmp_path: Path, file: str, contents: dict[str, Any] | None, expected: str
) -> None:
    if contents is None:
        (tmp_path / file).write_bytes(b"another format")
    else:
        torch.save(contents, tmp_path / file)
    assert describe(tmp_path / file, "resnet50") == expected


def test_files_of_naver_are_known_by_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREX_MODELS_CACHE", str(tmp_path))
    path = tmp_path / "renamed.pth"
    torch.save(LINEAR, path)
    untold = describe(path, "trex_resnet50")
    assert untold == f"not stated (if the weights are NAVER's: {naver.LICENSE})"
    (tmp_path / "naver").mkdir()
    record = tmp_path / "naver" / "trex.json"
    record.write_text(json.dumps({"sha256": sha256(path), "converted_sha256": ""}))
    assert describe(path, "resnet50") == naver.LICENSE
    record.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        describe(path, "resnet50")


def test_a_license_is_read_from_metadata_and_configuration(tmp_path: Path) -> None:
    save_file(LINEAR, tmp_path / "converted.safetensors", {"license": naver.LICENSE})
    assert describe(tmp_path / "converted.safetensors", "resnet50") == naver.LICENSE
    save_file(LINEAR, tmp_path / "model.safetensors")
    assert describe(tmp_path / "model.safetensors", "resnet50") == UNTOLD
    (tmp_path / "config.json").write_text('{"pretrained_cfg": {"license": "mit"}}')
    assert describe(tmp_path / "model.safetensors", "resnet50") == "mit"


def test_one_rule_for_every_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A renamed file of NAVER's is recognized by its SHA-256 in the cache's record."""
    monkeypatch.setenv("TREX_MODELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TREX_MODELS_NO_NOTICE", raising=False)
    folder = tmp_path / "mine"
    weights_file = folder / "model.safetensors"
    cfg = {**vars(timm.create_model("test_resnet"))["pretrained_cfg"], "license": "mit"}
    model: Any = timm.create_model("test_resnet", num_classes=0, pretrained_cfg=cfg).eval()
    images = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        timm_folder.write_timm_folder(model, folder, images, model(images))
    assert license_of(folder) == "mit"

    (tmp_path / "cache/naver").mkdir(parents=True)
    record = {"sha256": "", "converted_sha256": sha256(weights_file)}
    (tmp_path / "cache/naver/trex.json").write_text(json.dumps(record))
    assert license_of(folder) == naver.LICENSE
    for name, file in (("test_resnet", weights_file), (str(folder), None)):
        assert export_model._metadata(name, model, file)["license"].startswith(naver.LICENSE)
    assert (
        FrozenModel.load(str(folder)).metadata["license"] == naver.LICENSE
    )  # features and transfer
    assert FrozenModel.load("test_resnet", file=weights_file).metadata["license"] == naver.LICENSE
    licenses.notice.cache_clear()
    overlay = {"file": str(weights_file), "license": "mit"}
    small: dict[str, Any] = {"backbone": "test_resnet", "proj_dim": 0, "num_classes": 0}
    timm.create_model("trex_resnet", pretrained=True, pretrained_cfg_overlay=overlay, **small)
    assert "not for commercial use" in caplog.text
    with pytest.raises(ValueError, match="--license mit: the weights in .*mine are licensed under"):
        build_folders._license(inspect_folder(folder, "mine"), "me", "mit")
    command = "trex --data.source fractals --data.num-classes 2 --crops.local-crops 0".split()
    command += "--objective.bank-size 64 --model.backbone test_resnet".split()
    command += ["--output", str(tmp_path / "run"), "--init-from", str(folder)]
    assert main([*command, "--license", "mit"]) == 2
    assert "the run uses weights under cc-by-nc-sa-4.0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
