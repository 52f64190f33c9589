"""Warm start from a checkpoint: restored parts and reports."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import trex_models  # noqa: F401  # registers the models
from tests.models import load
from tests.official_files import official_form
from tests.runs import TINY, assert_same_state, last_state, output_of, refused, run
from trex_models.method.model import TReX
from trex_models.pretrained import naver
from trex_models.train import build, checkpointing, init_from
from trex_models.train.__main__ import main, parse
from trex_models.train.config import from_dict
from trex_models.train.export import export_method


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a finished run of each objective, and its weights in the official format."""
    folder = tmp_path_factory.mktemp("sources")
    found = {}
    for objective in ("ocm", "cosine", "softmax"):
        found[objective] = folder / objective
        assert run(folder / objective, "--objective.name", objective) == 0
        found[f"official {objective}"] = folder / f"{objective}.pth"
        method = last_state(folder / objective)["method"]
        torch.save(official_form(method), found[f"official {objective}"])
    return found


def started(path: Path, folder: Path, *more: str) -> list[str]:
    """Start a run from a file; return the report of its parts."""
    lines = output_of(folder, "--init-from", str(path), *more).splitlines()
    first = lines.index(f"from {file_of(path)}:")
    *parts, last = [line.strip() for line in lines[first + 1 :] if line.startswith("  ")]
    assert last.startswith("license of the weights: ")
    return parts


def file_of(path: Path) -> Path:
    if (path / "checkpoints").is_dir():
        return checkpointing.list_checkpoints(path)[-1]
    return path / "model.safetensors" if path.is_dir() else path


UNNAMED = "not named in the file; they must be the same as the run's 4 classes, in the same order"


def init(path: Path, method: TReX, names: list[str], images: str = "images") -> dict[str, str]:
    """Load a file into a method; return the report by part."""
    lines, _ = init_from.init_from(path, method, names, images)
    return dict(line.strip().split(": ", 1) for line in lines[1:])


# The official release has no model with a linear classifier.
@pytest.mark.parametrize("name", ["ocm", "cosine", "softmax", "official ocm", "official cosine"])
def test_every_part_of_the_same_method_is_restored(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    official, objective = name.startswith("official"), name.removeprefix("official ")
    saved = last_state(sources[objective])
    if objective == "ocm":  # the pointer of a finished run is 0
        saved["method"]["objective.bank._extra_state"] = {"pointer": 24, "batches": 7}
    path = tmp_path / "file.pth"
    torch.save(official_form(saved["method"]) if official else saved, path)
    method = build.build_method(from_dict(saved["config"]), 4)
    report = init(path, method, saved["classes"], saved["images"])
    assert report.pop("classes", "") == (UNNAMED if official else "")
    assert set(report.values()) == {"restored"}
    state = method.state_dict()
    if objective == "ocm":
        assert (state.pop("objective.bank.written") == -1).all()  # not written by this run
        ids = state.pop("objective.bank.indices")
        expected = saved["method"]["objective.bank.indices"]
        assert torch.equal(ids, torch.full_like(ids, -1) if official else expected)
        assert state.pop("objective.bank._extra_state") == {"pointer": 24, "batches": 0}
    assert_same_state(state, {key: saved["method"][key] for key in state})
    if objective == "ocm":  # with other images
        method = build.build_method(from_dict(saved["config"]), 4)
        init(path, method, saved["classes"], "others")
        assert (method.state_dict()["objective.bank.indices"] == -1).all()


DEEPER, PLAIN, FEW = "--model.hidden-layers 2", "--model.projector none", "--objective.bank-size 16"
COSINE, SOFTMAX = "--objective.name cosine", "--objective.name softmax"
LOST = "the projector was not restored"
PROTOTYPES = "classifier weights, from the bank's prototypes"


@pytest.mark.parametrize(
    ("source", "overrides", "expected"),
    [
        ("ocm", DEEPER, "projector: not restored .missing keys: .*, unexpected: .*.$"),
        ("ocm", DEEPER, f"momentum encoder: copy of the encoder .{LOST}.$"),
        ("ocm", DEEPER, f"memory bank: not restored .{LOST}.$"),
        ("ocm", PLAIN, "projector: not restored .the run has none.$"),
        ("ocm", PLAIN, f"memory bank: not restored .{LOST}.$"),
        ("ocm", FEW, "momentum encoder: restored"),
        ("ocm", FEW, r"memory bank: not restored .*\(32, 8\).*\(16, 8\).*--objective.bank-size"),
        ("ocm", "--data.num-classes 5", "projector: restored"),
        ("ocm", "--data.num-classes 5", "memory bank: not restored .*file's 4 classes .* run's 5"),
        ("ocm", COSINE, "momentum encoder: not used .the objective has none"),
        ("ocm", COSINE, f"{PROTOTYPES}: restored"),
        ("ocm", SOFTMAX, f"{PROTOTYPES}: not restored .*cosine"),
        ("ocm", "--objective.name look", "memory bank: restored"),
        ("cosine", "", "momentum encoder: copy of the encoder .the file has none"),
        ("cosine", "", "memory bank: not restored .the file has none"),
        ("cosine", "", "classifier weights: not used .the objective has none"),
        ("softmax", COSINE, "classifier weights: not restored .*biases"),
        ("official ocm", "--data.num-classes 9", "memory bank: not restored .* 3 .* 9 classes"),
    ],
)
def test_mismatched_parts_are_reported(
    source: str, overrides: str, expected: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    config = parse("smoke", ["--output", str(tmp_path), *TINY, *overrides.split()])
    names = [f"fractal {label:04d}" for label in range(config.data.num_classes)]
    report = init(sources[source], build.build_method(config, len(names)), names)
    assert report["backbone"] == "restored"
    assert any(re.match(expected, f"{part}: {fate}") for part, fate in report.items()), report


def test_parts_that_are_not_restored_stay_random(sources: dict[str, Path], tmp_path: Path) -> None:
    config = parse("smoke", ["--output", str(tmp_path), *TINY, "--model.hidden-layers", "2"])
    method, untouched = (build.build_method(config, 4) for _ in range(2))
    init(sources["ocm"], method, ["a", "b", "c", "d"])
    assert_same_state(
        method.encoder.projector.state_dict(), untouched.encoder.projector.state_dict()
    )
    assert_same_state(method.objective.state_dict(), untouched.objective.state_dict())
    assert method.momentum_encoder is not None
    assert_same_state(method.momentum_encoder.encoder.state_dict(), method.encoder.state_dict())
    saved = last_state(sources["ocm"])["method"]
    for key, value in method.encoder.backbone.state_dict().items():
        assert torch.equal(value, saved[f"encoder.backbone.{key}"])


@pytest.mark.parametrize("part", ["backbone", "cls"])
def test_timm_folders_are_accepted(part: str, sources: dict[str, Path], tmp_path: Path) -> None:
    options = ["--objective.name", "cosine", "--optim.epochs", "1"]
    lines = started(sources["cosine"] / "export" / part, tmp_path / "run", *options)
    fate = "restored" if part == "cls" else "not restored (the file has none)"
    assert lines == ["backbone: restored", f"projector: {fate}", f"classifier weights: {fate}"]


def test_naver_license_stays(sources: dict[str, Path], tmp_path: Path) -> None:
    """Also after an interruption, when the file is not read again."""
    command = ["--init-from", str(sources["official ocm"])]
    err = refused(tmp_path / "run", *command, "--license", "mit")
    assert "license cannot be mit: the run uses weights under cc-by-nc-sa-4.0" in err
    assert not (tmp_path / "run").exists()
    out = output_of(tmp_path / "run", *command)
    assert "weights: cc-by-nc-sa-4.0, which covers derived weights" in out
    assert f"from {sources['official ocm']}" not in output_of(tmp_path / "run", *command)
    for part in ("backbone", "cls"):
        config = json.loads((tmp_path / "run/export" / part / "config.json").read_text())
        assert config["pretrained_cfg"]["license"] == "cc-by-nc-sa-4.0"
    # It also covers models that are trained from this run, resumed or exported.
    checkpointing.list_checkpoints(tmp_path / "run")[-1].unlink()
    left = checkpointing.list_checkpoints(tmp_path / "run")
    for more in (command, ["--init-from", str(tmp_path / "run")]):
        folder = tmp_path / ("run" if more is command else "next")
        assert "license cannot be mit: the run" in refused(folder, *more, "--license", "mit")
        assert checkpointing.list_checkpoints(tmp_path / "run") == left  # refused before a step
    export = ["export", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--license"]
    assert main([*export, "mit"]) == 2
    assert main([*export, "cc-by-nc-sa-4.0"]) == 0


def test_navers_backbone_files_are_known(sources: dict[str, Path], tmp_path: Path) -> None:
    """By file name, and by the metadata of converted files."""
    saved = last_state(sources["ocm"])
    prefix = "encoder.backbone."
    backbone = {
        key.removeprefix(prefix): value.contiguous()
        for key, value in saved["method"].items()
        if key.startswith(prefix)
    }
    torch.save(backbone, tmp_path / "trexstar.pth")
    torch.save(backbone, tmp_path / "mine.pth")
    save_file(backbone, tmp_path / "x.safetensors", {"license": "cc-by-nc-sa-4.0"})
    method = build.build_method(from_dict(saved["config"]), 4)
    names = {"trexstar.pth": naver.LICENSE, "x.safetensors": naver.LICENSE, "mine.pth": ""}
    for name, expected in names.items():
        assert init_from.init_from(tmp_path / name, method, saved["classes"], "")[1] == expected


def test_weights_of_other_classes_or_another_order_are_not_restored(
    sources: dict[str, Path],
) -> None:
    """For any number of classes; exports also contain their names."""
    saved = last_state(sources["cosine"])
    other = ["another", *saved["classes"][1:]], ", such as another"
    another_order = saved["classes"][::-1], " in their order"
    for path in (sources["cosine"], sources["cosine"] / "export" / "cls"):
        for names, difference in (other, another_order):
            method, untouched = (build.build_method(from_dict(saved["config"]), 4) for _ in "ab")
            assert init(path, method, names)["classifier weights"] == (
                f"not restored (the file's 4 classes differ from the run's 4{difference})"
            )
            assert_same_state(method.objective.state_dict(), untouched.objective.state_dict())


def test_timm_classifiers_are_classifier_weights(tmp_path: Path) -> None:
    """For any name of the classifier in timm."""
    options = """--model.backbone vit_tiny_patch16_224 --model.backbone-args depth=1
        --model.projector none --objective.name softmax""".split()
    config = parse("smoke", ["--output", "x", *TINY, *options])
    names = ["a", "b", "c", "d"]
    trained, method = (build.build_method(config, 4) for _ in range(2))
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter)
    _, folder = export_method(trained, config, names, tmp_path)
    whole = load(folder)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = trained.eval().objective.logits(trained.encoder.backbone(images))
        torch.testing.assert_close(whole(images), logits)
    assert type(whole) is timm.models.VisionTransformer
    assert init(folder, method, names) == {"backbone": "restored", "classifier weights": "restored"}
    assert_same_state(method.state_dict(), trained.state_dict())


def test_unusable_files_are_rejected(sources: dict[str, Path], tmp_path: Path) -> None:
    page = tmp_path / "page.pth"
    page.write_text("<!doctype html><p>Not found")
    spoilt = last_state(sources["ocm"])
    spoilt["method"]["encoder.projector.1.fc.bias"][0] = float("nan")
    torch.save(spoilt, tmp_path / "nan.pth")
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "other.pth")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for path, reason in {
        tmp_path / "none.pth": "does not exist; pass a checkpoint",
        tmp_path: "neither the folder of a run nor a timm folder",
        page: "web page",
        tmp_path / "nan.pth": "projector.1.fc.bias has 1 non-finite values of",
        tmp_path / "other.pth": r"its backbone differs from .* \(.*missing.*set --model.backbone",
        tmp_path / "empty": "contains no checkpoint; pass another run",
    }.items():
        err = refused(tmp_path / "run", "--init-from", str(path))
        assert re.search(reason, err), err
        assert str(path) in err
        assert not (tmp_path / "run").exists()
