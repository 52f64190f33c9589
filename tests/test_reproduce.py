"""``python -m benchmarks.reproduce``: the dry run with a kill in each stage, and its parts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from filelock import FileLock

from benchmarks.reproduce import compare, data, estimate, released, replica, stages, state
from benchmarks.reproduce.__main__ import main
from benchmarks.reproduce.plan import MODELS, SCALES, SETS, STAGES, Plan
from tests.images import save_image
from tests.models import CFG, tiny_folder, write_folder
from tests.processes import captured
from trex_models.train.__main__ import parse
from trex_models.train.config import to_json
from trex_models.transfer import datasets
from trex_models.transfer.published import Point
from trex_models.transfer.readers import imagenet_classes
from trex_models.transfer.report import accuracy

ROOT = Path(__file__).parents[1]
NAVER = ("trex_resnet50.in1k", "trexstar_resnet50.in1k")


def start(output: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start a dry run, with its output in OUTPUT.log."""
    command = [sys.executable, "-m", "benchmarks.reproduce", "--scale", "dry"]
    environ = os.environ | {"OMP_WAIT_POLICY": "passive"}
    with output.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [*command, "--output", str(output), *options],
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env=environ,
            start_new_session=True,
        )


def log_of(output: Path) -> str:
    return output.with_suffix(".log").read_text()


def kill_at(pattern: str, output: Path, number: int, *options: str) -> str:
    """Run until the output matches a pattern, and send a signal; return the output.

    SIGKILL is sent to all processes, other signals to the command only.
    """
    child = start(output, *options)
    while child.poll() is None and not re.search(pattern, log_of(output)):
        time.sleep(0.05)
    assert child.poll() is None, log_of(output)
    (os.killpg if number == signal.SIGKILL else os.kill)(child.pid, number)
    child.wait(120)
    return log_of(output)


def finish(output: Path, *options: str) -> str:
    assert start(output, *options).wait(600) == 0, log_of(output)
    return log_of(output)


@pytest.mark.client
@pytest.mark.slow
def test_a_dry_run_that_is_killed_in_each_stage_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    output, both = tmp_path / "out", ("--models", "trex", "look")
    kills = {
        "check": (r"\[1/8\] check", signal.SIGKILL),
        "estimate": ("loader only", signal.SIGKILL),
        "train": (r"step 2\d/120", signal.SIGTERM),
        "the next model": (r"(?s)objective.name look.*step 4\d/120", signal.SIGKILL),
        "linear": (r"\[4/8\] linear", signal.SIGKILL),
        "transfer": (r"\[7/16\]", signal.SIGKILL),
        "compare": (r"\[6/8\] compare", signal.SIGKILL),
        "figure": (r"\[7/8\] figure", signal.SIGKILL),
        "folders": (r"\[8/8\] folders", signal.SIGKILL),
    }
    seen, shown = {}, {}
    for name, (pattern, number) in kills.items():
        seen[name] = kill_at(pattern, output, number, *both)
        shown[name] = state.describe(output) if name != "check" else ""
    assert "SIGTERM: stopping once the state is saved" in seen["train"]
    assert "interrupted; run the same command again to continue" in seen["train"]
    assert re.search(r"dry: interrupted; .*; at least \d:\d\d left\n", shown["train"])
    assert re.search(r"train +trex +epoch [12]\.\d+ of 10, \d+ images/s\n", shown["train"])
    assert re.search(r"train +look +not started\n", shown["train"])
    assert re.search(r"train +trex +done in \d:\d\d\n", shown["the next model"])
    assert re.search(r"transfer +trex +6 datasets done\n", shown["transfer"])
    assert re.search(r"compare +done\nfigure +not done\n", shown["figure"])
    assert re.search(r"figure +done\nfolders +not done", shown["folders"])
    finish(output, *both)
    assert "dry: finished\n" in state.describe(output)
    out = finish(output, *both)
    assert [out.count(f"already {word}") for word in ("passed", "trained", "evaluated")] == [
        1,
        2,
        4,
    ]
    found = json.loads((output / "reproduce.json").read_text())
    assert found["note"].startswith("DRY RUN on generated images: the numbers are meaningless")
    assert {row["verdict"] for row in found["compare"]["published"]} == {"meaningless"}
    text = (output / "report.md").read_text()
    assert "**DRY RUN on generated images: the numbers are meaningless.**" in text
    assert "| mean log-odds, 15 of the 15 datasets |" in text
    assert (output / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert not list((output / "features").rglob("*.safetensors"))
    cards = {path.parent.name: path.read_text() for path in output.glob("hub/*/README.md")}
    kinds = ("trex_resnet50", "trex_resnet50_cls", "look_resnet50", "look_resnet50_proj")
    assert cards.keys() == {f"{name}.dry_meaningless" for name in kinds}
    assert (
        "trex_resnet50.dry_meaningless: this repository" in cards["trex_resnet50.dry_meaningless"]
    )

    # Without interruption, but with a dataset and a model that are added later.
    other = tmp_path / "other"
    replica.create(other / "replica")
    (other / "replica" / "dtd").rename(tmp_path / "dtd")
    finish(other, "--models", "trex", "--skip", "estimate", "figure", "folders")
    (tmp_path / "dtd").rename(other / "replica" / "dtd")
    finish(other, "--models", "baseline", "--skip", "estimate", "transfer", "folders")
    finish(other, "--models", "trex", "--skip", "estimate", "figure", "folders")
    found = json.loads((other / "reproduce.json").read_text())
    assert found["compare"]["results"].keys() == {"trex", "baseline"}
    assert found["compare"]["claims"] == []
    ours, theirs = (
        json.loads((folder / "transfer" / "trex.json").read_text()) for folder in (output, other)
    )
    assert ours["model"]["weights_sha256"] == theirs["model"]["weights_sha256"]
    assert ours["transfer"] == theirs["transfer"]


# Settings


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", MODELS)
def test_settings_of_each_model(scale: Any, name: str) -> None:
    settings, model = SCALES[scale], MODELS[name]
    images = settings.images or 192
    recipe, *options = settings.training(model, images, Path("images"))
    config = parse(recipe, options, needs_output=False)
    assert config.optim.batch_size == settings.batch_size
    bank, steps = config.objective.resolved_bank_size, config.optim.epochs * (images // 256)
    if scale == "full":
        expected = parse(recipe, [*options[:4], *model.options], needs_output=False)
        assert config == expected  # the recipe's own settings
        assert (config.data.path, config.validation.path) == ("images/train", "images/val")
    elif scale == "in100":
        assert bank == {"ocm": 1024, "look": 6656}.get(config.objective.name, 0)
        assert (config.data.path, config.data.source) == ("images/train.csv", "csv")
        assert (config.optim.epochs, config.optim.warmup_epochs) == (200, 20)
        if bank:  # the average covers a 500th of the run, as the paper's 1,000 of 500,400 steps
            assert (1 - config.objective.ema_momentum) * steps == pytest.approx(500, rel=0.02)


@pytest.mark.parametrize(("gigabytes", "gpus", "used"), [(24, 1, 1), (80, 8, 8), (80, 7, 4)])
def test_commands_of_a_machine(
    gigabytes: int, gpus: int, used: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "gpus", lambda: [{"name": "GPU", "gigabytes": gigabytes}] * gpus)
    plan = plan_of(tmp_path, scale_name="full")
    launcher, (recipe, *options) = stages.command(plan, MODELS["trex"], 1281167)
    assert launcher[-2:] == (["-m", "trex_models.train"])
    assert ("--nproc-per-node" in launcher) is (used > 1)
    assert used == 1 or launcher[-3] == str(used)
    config = parse(recipe, options)
    assert config.system.checkpoint_activations is (gigabytes == 24)

    # A run that the trainer has started, whose file has resolved values, is continued.
    folder = plan.run(MODELS["trex"])
    folder.mkdir(parents=True)
    started = replace(config, objective=config.objective.resolved(), precision="bf16")
    (folder / "config.json").write_text(to_json(started))
    stages._check_run(plan, MODELS["trex"], 1281167)
    (folder / "config.json").write_text(to_json(replace(started, seed=1)))
    with pytest.raises(ValueError, match=r"trex is a run with other settings \(seed: 1 -> 0\)"):
        stages._check_run(plan, MODELS["trex"], 1281167)


def test_arithmetic_of_the_paper() -> None:
    settings = SCALES["full"]
    sizes = estimate.nominal_sizes(settings)
    found = estimate.by_arithmetic(settings, list(MODELS.values()), sizes)
    # 3 x (8.2 + 8 x 8.2 x (96 / 224)^2) + 8.2 + 0.7 GFLOP; docs/memory.md counts 69.
    assert found["gflop_per_image"]["trex"] == pytest.approx(69.6, abs=0.1)
    hours = found["machines"]["4 x A100"]["training_hours"]["trex"]
    assert hours[0] == pytest.approx(100 * 1281167 * 69.65e9 / (0.1 * 4 * 312e12) / 3600, rel=0.01)
    assert hours == pytest.approx([hours[0], hours[0] / 2, hours[0] / 3])
    one = found["machines"]["1 x RTX 4090"]["training_hours"]["trex"][0]
    assert one / hours[0] == pytest.approx(4 * 312 / 165 * 1.29)  # activations are recomputed
    # ImageNet: 4 operations per weight and image, 100 epochs, 24 + 1 layers, 5 seeds.
    evaluated, operations = estimate.evaluation_operations([sizes["imagenet"]], 5)
    assert evaluated == 1331167
    assert operations == pytest.approx(1.31e17, rel=0.01)
    status_, out, _ = captured(main, "estimate", "--scale", "full")
    assert not status_
    assert "| t-ReX: 100 epochs, 69.6 GFLOP per image | 19.9 / 9.93 / 6.62 | 3.13 /" in out


# Images


def images(root: Path, classes: int, per_class: int = 2) -> Path:
    for part in ("train", "val"):
        for name in SCALES["in100"].subset[:classes]:
            for index in range(per_class):
                save_image(root / part / name / f"{part}, {index}.jpg", seed=index)
    return root


def plan_of(tmp_path: Path, **changes: Any) -> Plan:
    plan = Plan(
        scale_name="in100",
        imagenet=tmp_path / "imagenet",
        data_root=None,
        output=tmp_path / "out",
        models=[MODELS["trex"]],
    )
    return replace(plan, **changes)


def test_a_subset_is_listed_and_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tmp_path)
    images(plan.imagenet, classes=5)
    with pytest.raises(ValueError, match="train lacks 95 of the 100 classes .*, such as n0"):
        data.link(plan)
    few = SCALES["in100"].subset[1:4]
    monkeypatch.setitem(SCALES, "in100", replace(SCALES["in100"], subset=few, num_classes=3))
    own = tmp_path / "data" / "imagenet100"  # of the user, and not ours to write
    own.mkdir(parents=True)
    plan = replace(plan, data_root=own.parent)
    for _ in range(2):
        data.link(plan)
        opened, missing = data.find(plan)
    assert not list(own.iterdir())
    rows = (plan.data / "imagenet100" / "train.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 * 2
    assert rows[0] == "path,label"
    train, test = opened["imagenet100"].sources
    assert (len(train), len(test), list(opened)) == (6, 6, ["imagenet100"])
    assert train.classes == sorted(few)
    assert Path(train.name(0)).resolve().is_relative_to(plan.imagenet)
    assert list(missing) == list(SETS[15])
    assert missing["cog-l1"] == ["cog", "imagenet21k"]
    folders = {path.name for path in plan.data.iterdir()}
    assert folders == {"imagenet", "imagenet100"}


@pytest.mark.client
@pytest.mark.slow
def test_a_subset_is_trained_and_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, dry = SCALES["in100"].subset[:3], SCALES["dry"]
    monkeypatch.setitem(SCALES, "in100", replace(dry, epochs=2, subset=few, num_classes=3))
    monkeypatch.setattr(Plan, "is_dry", property(lambda _: True))  # a slim network on the CPU
    images(tmp_path / "imagenet", classes=5, per_class=16)
    plan = plan_of(tmp_path, skip=("estimate", "figure"), owner="Ada", license="mit")
    (tmp_path / "data").mkdir()
    assert stages.run(replace(plan, data_root=tmp_path / "data"))
    report = json.loads(plan.report("transfer", MODELS["trex"]).read_text())
    entry = report["datasets"]["imagenet100"]
    assert (entry["num_classes"], entry["train"]["images"], entry["test"]["images"]) == (3, 48, 48)
    assert (report["training_task"], report["transfer"]) == ("imagenet100", None)
    config = json.loads((plan.run(MODELS["trex"]) / "config.json").read_text())
    assert config["data"]["source"] == "csv"
    assert "The authors have no results at this scale." in (plan.output / "report.md").read_text()
    card = (plan.output / "hub" / "trex_resnet50.in100" / "README.md").read_text()
    assert "| imagenet100 (training task) | 48 |" in card

    moved = replace(plan, output=(tmp_path / "out").rename(tmp_path / "moved"))
    (tmp_path / "imagenet").rename(tmp_path / "moved images")
    moved = replace(moved, imagenet=tmp_path / "moved images", models=[MODELS["baseline"]])
    assert stages.run(moved)
    state_ = json.loads((moved.output / "reproduce.json").read_text())
    assert state_["reports"].keys() == {"trex", "baseline"}


def test_models_of_the_figure_are_added_if_their_files_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TREX_MODELS_CACHE", str(tmp_path))
    monkeypatch.setattr("trex_models.pretrained.figure.try_to_load_from_cache", lambda *_: "file")
    (tmp_path / "figure").mkdir()
    (tmp_path / "figure" / "dino_resnet50_pretrain.pth").touch()
    dino, rsb = released.figure_models()
    assert (dino.source, dino.paper) == ("dino_resnet50", Point("DINO", 0.748, 1.256))
    assert (rsb.source, rsb.paper) == ("resnet50.a1_in1k", Point("RSB-A1", 0.7972, 0.978))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Converted models under NAVER's names."""
    for seed, name in enumerate(NAVER):
        tiny_folder(tmp_path / "weights" / name, seed)
    return tmp_path / "weights"


@pytest.fixture
def dry(tmp_path: Path, weights: Path) -> list[str]:
    """Arguments of a dry run without training."""
    output = tmp_path / "out"
    return ["--scale", "dry", "--output", str(output), "--from-released", str(weights)]


def test_released_models_are_compared_and_missing_datasets_are_named(
    dry: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    replica.create(output / "replica")
    for folder in ("dtd", "inat2018"):
        (output / "replica" / folder).rename(tmp_path / folder)
    code, out, err = captured(main, *dry)
    assert not code, err
    missing = re.findall(r"MISSING (\S+): .*replica has no folder (\S+)", out)
    assert missing == [("dtd", "dtd"), ("inat2018", "inat2018")]
    found = json.loads((output / "reproduce.json").read_text())
    for name in NAVER:
        result = found["compare"]["results"][name]
        assert (result["15"]["count"], result["15"]["missing"]) == (13, ["dtd", "inat2018"])
        assert (result["13"]["count"], result["13"]["missing"]) == (12, ["dtd"])
    assert {row["model"] for row in found["compare"]["published"]} == set(NAVER)
    text = (output / "report.md").read_text()
    assert "**Missing; excluded from all means: dtd, inat2018** (2 of 15)." in text
    assert "| mean log-odds, 13 of the 15 datasets |" in text

    # With all datasets, only the new ones are evaluated.
    for folder in ("dtd", "inat2018"):
        (tmp_path / folder).rename(output / "replica" / folder)
    code, out, err = captured(main, *dry)
    assert not code, err
    again = json.loads((output / "reproduce.json").read_text())["compare"]["results"]
    assert again[NAVER[0]]["15"]["count"] == 15
    names = re.findall(r"^(\S+)-train: \d+ images", out, re.M)
    assert set(names) == {"dtd", "inat2018"}
    assert "scale dry: finished\n" in state.describe(output)
    assert re.search(r"transfer +trex_resnet50.in1k +done in 0:\d\d\n", state.describe(output))


def test_models_are_evaluated_in_parallel_on_several_devices(
    dry: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "devices", lambda: ["cpu", "cpu"])
    code, _, err = captured(main, *dry, "--skip", "transfer", "figure")
    assert not code, err
    for name in NAVER:
        assert json.loads((tmp_path / "out" / "linear" / f"{name}.json").read_text())["complete"]
    monkeypatch.setattr(stages, "devices", lambda: ["cpu", "nowhere"])
    code, _, err = captured(main, *dry, "--skip", "linear", "figure")
    assert (code, err) == (2, "error: the evaluation failed; its messages are above\n")


def test_released_files_are_found_and_converted(
    release: Path, naver_cache: Path, tmp_path: Path
) -> None:
    del naver_cache
    folder = tmp_path / "files"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"files has none of trex.pth, .*; download them"):
        released.find(folder, tmp_path)
    (folder / "trex.pth").symlink_to(release / "trex.pth")
    for _ in range(2):
        (model,) = released.find(folder, tmp_path)
        assert (model.name, model.released) == (NAVER[0], Point("t-ReX", 0.78, 1.1704))
        assert model.source == str(tmp_path / "converted" / NAVER[0])
    with pytest.raises(ValueError, match="cache has none"):
        released.find(released.CACHE, tmp_path)
    timm.create_model("trex_resnet50.in1k", pretrained=True)
    (model,) = released.find(released.CACHE, tmp_path)
    assert model.source == model.name == NAVER[0]


# Comparison


def report_of(top1: float, datasets: dict[str, float], n: int = 1000) -> dict[str, Any]:
    entries = {
        name: accuracy([p, p], n) | {"test": {"images": n}, "knn": {"top1": p}, "title": name}
        for name, p in {"imagenet": top1, **datasets}.items()
    }
    return {
        "model": {"label": "x"},
        "training_task": "imagenet",
        "datasets": entries,
        "tasks": {},
        "complete": True,
    }


def test_verdicts() -> None:
    half = dict.fromkeys(SETS[15], 0.5)
    better = dict.fromkeys(SETS[13], 0.6)
    reports = {"trex": report_of(0.784, half), "trexstar": report_of(0.79, better)}
    results = {name: compare.scores(report) for name, report in reports.items()}
    mean = results["trex"]["15"]
    assert (mean["mean"], mean["count"], mean["missing"]) == (0, 15, [])
    # 15 independent log-odds with standard error 1 / sqrt(1000 x 0.25).
    assert mean["half_width"] == pytest.approx(1.96 * (1 / 250) ** 0.5 / 15**0.5)
    rows = compare.published([MODELS["trex"], MODELS["trexstar"]], results)
    verdicts = {(row["model"], row["score"], row["source"][:5]): row["verdict"] for row in rows}
    assert verdicts == {
        ("trex", "top1", "relea"): "within tolerance",
        ("trex", "transfer", "relea"): compare.OUTSIDE,
        ("trex", "top1", "paper"): "within tolerance",
        ("trex", "transfer", "paper"): compare.OUTSIDE,
        ("trexstar", "top1", "relea"): compare.OUTSIDE,
        ("trexstar", "transfer", "relea"): "not comparable: 13 of 15 datasets",
        ("trexstar", "top1", "paper"): compare.OUTSIDE,
        ("trexstar", "transfer", "paper"): compare.OUTSIDE,
    }


def test_claims() -> None:
    better, worse = dict.fromkeys(SETS[15], 0.6), dict.fromkeys(SETS[15], 0.5)
    pair = {"plain3": report_of(0.75, better), "plain1": report_of(0.78, worse)}
    models = [MODELS["plain3"], MODELS["plain1"]]

    def verdicts() -> dict[str, str]:
        results = {name: compare.scores(report) for name, report in pair.items()}
        return {row["claim"]: row["verdict"] for row in compare.claims(models, results)}

    depth = "Depth costs accuracy on the training task", "Depth helps transfer, over 13 datasets"
    assert verdicts() == dict(zip(depth, ("within noise", "holds"), strict=True))
    pair["plain3"] = report_of(0.70, dict.fromkeys(SETS[15], 0.4))
    assert verdicts() == dict(zip(depth, ("holds", "fails"), strict=True))
    pair["plain3"] = report_of(0.70, {"dtd": 0.4})
    different = verdicts()["Depth helps transfer, over 1 datasets"]
    assert different == "not comparable: different datasets"
    pair["plain1"] = report_of(0.70, {"dtd": 0.5})
    results = {name: compare.scores(report) for name, report in pair.items()}
    row = compare.claims(models, results)[1]
    assert (row["claim"], row["authors"]) == ("Depth helps transfer, over 1 datasets", None)
    assert row["verdict"] == "fails"
    assert not compare.claims(models, {"plain3": compare.scores(pair["plain3"])})


def test_the_exit_status_is_1_outside_the_tolerance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path, scale_name="full", skip=tuple(set(STAGES) - {"compare"}))
    path = plan.report("transfer", MODELS["trex"])
    for top1, passed in ((0.779, True), (0.76, False)):
        monkeypatch.setattr(state, "read_report", lambda _, p=top1: report_of(p, {}))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert stages.run(plan) is passed


# Errors


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("_no_gpu")
def test_what_would_fail_later_is_reported_by_the_check(tmp_path: Path, dry: list[str]) -> None:
    output, imagenet = tmp_path / "out", images(tmp_path / "imagenet", classes=2)

    def error(*arguments: object) -> str:
        code, _, err = captured(main, *map(str, arguments))
        assert code == 2
        assert err.startswith("error: ")
        return err

    own = ("--output", output, "--imagenet", imagenet)
    assert "--scale dry generates its images" in error("--scale", "dry", *own)
    assert "--imagenet is not set" in error("--scale", "full", "--output", output)
    full = ("--scale", "full", *own)
    assert "no CUDA device is available; use --slurm" in error(*full)
    assert "expected 1000 classes, got 2" in error(*full, "--slurm")
    subset = error(
        "--scale", "in100", "--output", tmp_path / "o2", "--imagenet", imagenet, "--slurm"
    )
    assert "lacks 98 of the 100 classes" in subset
    missing = ("--scale", "full", "--output", tmp_path / "o3", "--imagenet", tmp_path)
    assert f"{tmp_path} has no folder train" in error(*missing)
    assert "the stage check has not passed" in error(*full, "--skip", "check")
    (output / "reproduce.json").write_text('{"scale": "full", "models": {}, "check": {}}')
    assert "contains a reproduction at scale full; choose another folder" in error(*dry)
    assert "is not the state of a reproduction" in error("status", tmp_path)
    with FileLock(output / ".lock"):
        assert "another process is working in" in error(*full)
        assert ": running" in state.describe(output)


def test_a_run_that_another_process_trains_is_awaited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(tmp_path)
    found = stages.State(plan)
    found.results["check"] = {"datasets": {"imagenet100": (100, 126689, 5000)}, "missing": {}}
    folder = plan.run(MODELS["trex"])
    folder.mkdir(parents=True)
    lock = FileLock(folder / ".lock")
    lock.acquire()

    def sleep(_: float) -> None:
        tiny_folder(folder / "export" / "backbone")
        lock.release()

    monkeypatch.setattr("time.sleep", sleep)
    stages.train(plan, found)
    expected = "t-ReX: waiting for the training of an earlier command\nt-ReX: already trained\n"
    assert capsys.readouterr().out == expected


def test_a_damaged_dataset_is_an_error(dry: list[str], tmp_path: Path) -> None:
    root = tmp_path / "out" / "replica"
    replica.create(root)
    (root / "food-101" / "meta" / "test.json").unlink()
    code, out, err = captured(main, *dry)
    assert (code, "food101: " in err, "linear" in out) == (2, True, False)


@pytest.mark.usefixtures("_no_gpu")
def test_slurm_jobs_are_submitted_by_a_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = SCALES["in100"].subset[:3]
    monkeypatch.setitem(SCALES, "in100", replace(SCALES["in100"], subset=few, num_classes=3))
    imagenet, output = images(tmp_path / "image net", 3, per_class=90), tmp_path / "out"
    command = ["--scale", "in100", "--imagenet", str(imagenet), "--output", str(output)]
    code, out, err = captured(main, *command, "--slurm", "--models", "trex", "plain1")
    assert not code, err
    assert f"2 models are not trained: run bash {output}/submit.sh, and when" in out
    assert json.loads((output / "reproduce.json").read_text())["train"].keys() == {"trex", "plain1"}
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\ntest -f "$1"\n')
    sbatch.chmod(0o755)
    environ = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", output / "submit.sh"], env=environ, capture_output=True, text=True, check=True
    )
    jobs = done.stdout.split("docs/slurm.sh\n")[1:]
    for job, recipe in zip(jobs, ("trex", "plain1"), strict=True):
        first, *options = job.splitlines()
        config = parse(first, options)
        assert (first, config.output) == (recipe, str(output / "runs" / recipe))
        assert config.data.path == str(output / "data" / "imagenet100" / "train.csv")


def test_a_released_classifier_is_evaluated_by_its_prototypes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "trex_resnet50_cls.in1k_r2"
    args: dict[str, Any] = {
        "backbone": "resnet10t",
        "channels": (4, 8, 16, 32),
        "proj_hidden_dim": 32,
    }
    cfg = CFG | {"num_classes": 1000}
    model = timm.create_model("trex_resnet", num_classes=1000, pretrained_cfg=cfg, **args).eval()
    write_folder(model, tmp_path / "weights" / name)
    imagenet = tmp_path / "imagenet"
    for number, label in enumerate(imagenet_classes(), start=1):
        save_image(imagenet / "val" / label / f"ILSVRC2012_val_{number:08}.JPEG", size=(8, 8))
    (imagenet / "train").symlink_to(imagenet / "val")
    none = {
        key: replace(datasets.DATASETS[key], sizes=datasets.Sizes())
        for key in ("imagenet", "imagenet-real")
    }
    for key, dataset in none.items():
        monkeypatch.setitem(datasets.DATASETS, key, dataset)
    monkeypatch.setattr(datasets, "_check", lambda *_: None)
    found = released.find(tmp_path / "weights", tmp_path)
    skip = ("estimate", "train", "transfer", "figure", "folders")
    plan = plan_of(tmp_path, scale_name="full", models=found, skip=skip)
    assert not stages.run(plan)
    (row,) = json.loads((plan.output / "reproduce.json").read_text())["compare"]["published"]
    assert (row["model"], row["score"], row["authors"]) == (name, "prototypes", 0.779)
    assert (row["tolerance"], row["verdict"]) == (0.015, "OUTSIDE tolerance")
    assert row["ours"] < 0.1
