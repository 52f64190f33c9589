"""The parts of the study, and a complete tiny study from images to figures."""

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.study import __main__ as study
from benchmarks.study import claims, runs, tables
from benchmarks.study.cells import CELLS, SCALES, Start
from benchmarks.study.claims import CLAIMS, MEASURES, Estimate
from benchmarks.study.images import REAL_SETS, TITLES, Images, Part
from benchmarks.study.runs import Run
from trex_models.method.backbone import build_backbone
from trex_models.train.__main__ import parse


@pytest.mark.parametrize(
    ("best", "tried"),
    [(0.8, [0.4, 0.8, 1.6]), (3.2, [0.8, 1.6, 3.2, 6.4]), (0.2, [0.1, 0.2, 0.4, 0.8, 1.6])],
)
def test_climb_ends_with_a_worse_rate_on_either_side(best: float, tried: list[float]) -> None:
    found = study.climb(lambda rate: -abs(np.log(rate / best)), 0.8)
    assert sorted(found) == pytest.approx(tried)
    assert max(found, key=lambda rate: found[rate]) == pytest.approx(best)
    assert sorted(study.climb(lambda _: 0.5, 0.8)) == [0.4, 0.8, 1.6]  # a plateau


def test_claims_are_of_cells_and_measures_and_tested_by_welchs_interval() -> None:
    for claim in CLAIMS:
        assert claim.more in CELLS
        assert claim.less in CELLS
        assert claim.measure in MEASURES
    found = claims.welch([3.0, 4.0, 5.0], [0.0, 1.0, 2.0])
    half = 2.7764 * (2 / 3) ** 0.5  # t of 4 degrees of freedom, times the standard error
    assert found == pytest.approx((3.0, 3 - half, 3 + half), abs=1e-3)


_ABOVE, _AROUND, _BELOW = (Estimate(mean, mean - 1, mean + 1) for mean in (2.0, 0.0, -2.0))


@pytest.mark.parametrize(
    ("intervals", "verdict"),
    [
        ((_ABOVE, _ABOVE, _AROUND), "holds"),
        ((_ABOVE, _AROUND, _ABOVE), "holds"),
        ((_ABOVE, _AROUND, _AROUND), "weakly holds"),
        ((_AROUND, _ABOVE, _ABOVE), "within noise"),
        ((_BELOW, _AROUND, _ABOVE), "weakly fails"),
        ((_BELOW, _BELOW, _BELOW), "fails"),
    ],
)
def test_verdict(intervals: tuple[Estimate, Estimate, Estimate], verdict: str) -> None:
    assert claims.Tested(CLAIMS[0], *intervals).verdict == verdict


def test_parts_of_a_set_share_no_image_and_labels_are_balanced() -> None:
    images = Images(num_classes=3, per_class=4, size=16, few_classes=2)
    parts = images.parts() | {
        "hues/train": lambda: images._hues(30_000, 3),
        "hues/test": lambda: images._hues(40_000, 2),
    }
    drawn = {name: list(part()) for name, part in parts.items()}
    for name, part in drawn.items():
        assert len(set(Counter(label for label, _ in part).values())) == 1, name
    pixels = {name: {image.tobytes() for _, image in part} for name, part in drawn.items()}
    for name in TITLES.keys() - set(REAL_SETS):
        assert not pixels[f"{name}/train"] & pixels[f"{name}/test"], name
    new = ("held-out/test", "task/test", "unseen/test", "hues/train", "hues/test")
    for name in new:
        assert not pixels["train"] & pixels[name], name
    assert not pixels["held-out/test"] & pixels["task/test"]
    labels = {name: {label for label, _ in part} for name, part in drawn.items()}
    assert len(labels["hues/train"]) == 6
    assert len(labels["turns/test"]) == len(labels["individuals/test"]) == 2 * 4
    assert not labels["unseen/train"] & labels["train"]


class _Drawn(Images):
    def parts(self) -> dict[str, Callable[[], Part]]:
        return {"set/train": lambda: iter(self._drawn())}

    def _drawn(self) -> Part:
        yield "a", np.full((4, 4, 3), 7, np.uint8)
        if self.size == 1:
            raise OSError(28, "No space left on device")


def test_written_images_are_complete_or_absent(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space"):
        _Drawn(num_classes=1, per_class=1, size=1).write(tmp_path / "full")
    assert not (tmp_path / "full" / "set" / "train").exists()
    _Drawn(num_classes=1, per_class=1, size=4).write(tmp_path)
    [file] = (tmp_path / "set" / "train").rglob("*.bmp")
    assert file.parent.name == "a"
    with Image.open(file) as image:
        assert np.asarray(image).tolist() == np.full((4, 4, 3), 7).tolist()
    written = file.stat().st_mtime_ns
    _Drawn(num_classes=1, per_class=1, size=4).write(tmp_path)  # keeps existing files
    with pytest.raises(ValueError, match=r"'size': 4, .*, not .*'size': 1, .*use another"):
        _Drawn(num_classes=1, per_class=1, size=1).write(tmp_path)
    (tmp_path / "images.json").unlink()
    with pytest.raises(ValueError, match=r"has images but no images\.json; use another"):
        _Drawn(num_classes=1, per_class=1, size=4).write(tmp_path)
    assert file.stat().st_mtime_ns == written


@pytest.mark.parametrize("scale", SCALES)
def test_the_trainer_takes_every_cell(scale: str, tmp_path: Path) -> None:
    for name in SCALES[scale].cells:
        run = new_run(tmp_path, name, rate=0.2, seed=3, scale=SCALES[scale])
        config = parse("demo", run.training()[1:])
        cell = CELLS[name]
        assert config.objective.name == cell.objective
        assert config.model.projector == ("none" if cell.layers is None else "mlp")
        assert bool(config.crops.local_crops) == cell.local
        assert config.precision == cell.precision
        assert (config.seed, config.optim.epochs, config.optim.base_lr) == (3, 20, 0.2)
        train = SCALES[scale].images
        assert config.objective.resolved_bank_size <= train.num_classes * train.per_class
        build_backbone(config.model.backbone, config.model.parsed_backbone_args(), [32])


HEAD = ("train", "test", "means_train", "means_test")


def _result(cell: str, seed: int, **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng((len(cell), seed))
    geometry = {"coding_length": 10.0 + seed, "effective_rank": 3.0 + seed}
    entry: dict[str, Any] = {"log_odds": float(rng.normal()), "knn": 0.5}
    entry |= {"test_images": 100, "geometry": {**geometry, "singular_values": [0.5, 0.2, 0.1]}}
    steps = [20.0 * (line + 1) for line in range(60)]
    curves = {"step": steps, "loss": [3.0] * 60, "accuracy": [0.1] * 60}
    head = None
    if CELLS[cell].objective != "look":
        curves["prototype_change"] = rng.uniform(0.01, 0.02, 60).tolist()
        head = dict(zip(HEAD, rng.random(4).tolist(), strict=True))
    return {
        "cell": cell,
        "seed": seed,
        "settings": {**CELLS[cell].settings(), "optim.base-lr": 0.8, "optim.epochs": 3},
        "task_top1": float(rng.uniform(0.5, 0.9)),
        "transfer_log_odds": float(rng.uniform(0, 1)),
        "datasets": {
            name: {"top1": float(rng.uniform(0.2, 0.9)), **entry}
            for name in ("task", "unseen", "digits")
        },
        "head": head,
        "curves": curves,
        "core_seconds": 1800.0,
        **changes,
    }


def _write(folder: Path, *results: dict[str, Any]) -> None:
    for result in results:
        (folder / f"{result['cell']}-{result['seed']}.json").write_text(json.dumps(result))


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path, *(_result(cell, seed) for cell in CELLS for seed in range(2)))
    found = {"settings": {"optim.base-lr": 0.8}, "core_seconds": 3600.0}
    found |= {"top1": {"0.4": 0.5, "0.8": 0.7, "1.6": 0.6}}
    for cell in CELLS:
        (tmp_path / f"search-{cell}.json").write_text(json.dumps(found))
    command = ["report", "--results", str(tmp_path), "--output", str(tmp_path / "out")]
    assert study.main(command) == 0
    printed = capsys.readouterr().out
    assert f"{len(CELLS)}.0 core hours of runs, {len(CELLS)}.0 of searches" in printed
    assert "**0.8: 70.0**" in printed
    assert f"(minimum of {2 * len(CELLS) - 2} runs: " in printed
    for claim in CLAIMS:
        assert f"| {claim.text} |" in printed
    for name in ("tradeoff", "claims", "datasets", "effects", "geometry", "change"):
        with Image.open(tmp_path / "out" / f"study_{name}.png") as picture:
            assert picture.width > 800
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50


def test_one_seed_gives_no_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path, *(_result(cell, 0) for cell in ("cosine-1", "ocm-3", "look-1")))
    assert claims.tested(claims.read_results(tmp_path), CLAIMS) == []
    command = ["report", "--results", str(tmp_path), "--output", str(tmp_path / "out")]
    assert study.main(command) == 0
    printed = capsys.readouterr().out
    assert "nan" not in printed
    assert " to " not in printed
    assert "(minimum of 2 runs: " in printed
    assert (tmp_path / "out" / "study_tradeoff.png").exists()
    assert not (tmp_path / "out" / "study_claims.png").exists()
    assert not (tmp_path / "out" / "study_effects.png").exists()


def _tops(folder: Path, **tops: tuple[float, ...]) -> claims.Results:
    for cell, found in tops.items():
        name = cell.replace("_", "-")
        _write(folder, *(_result(name, seed, task_top1=top) for seed, top in enumerate(found)))
    return claims.read_results(folder)


def test_seeds_are_blocks(tmp_path: Path) -> None:
    task = MEASURES["task"]
    weights = {"cosine-1": 1.0, "cosine-1-global": -1.0}
    two = _tops(tmp_path, cosine_1=(0.5, 0.6, 0.8), cosine_1_global=(0.4, 0.5, 0.6))
    # Two configurations give the paired interval: t with 2 degrees of freedom, standard error.
    half = 4.3027 * (0.01 / 3) ** 0.5 / 3**0.5
    expected = pytest.approx((0.4 / 3, 0.4 / 3 - half, 0.4 / 3 + half), abs=1e-4)
    assert claims.contrast(two, task, weights) == expected
    # A seed that one of them lacks does not change their difference.
    less = {"cosine-1": two["cosine-1"][:2], "cosine-1-global": two["cosine-1-global"]}
    assert claims.contrast(less, task, weights) == pytest.approx((0.1, 0.1, 0.1))
    one = {**_result("cosine-1", 7), "task_top1": 0.7}
    apart = {"cosine-1": [one, {**one, "seed": 8}], "cosine-1-global": two["cosine-1-global"]}
    assert not claims.contrast(apart, task, weights).has_interval
    # A third configuration adds degrees of freedom: two-way analysis of variance.
    three = _tops(tmp_path, ocm_1=(0.4, 0.5, 0.65))
    table = np.array([[0.5, 0.6, 0.8], [0.4, 0.5, 0.6], [0.4, 0.5, 0.65]])
    rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    half = 2.7764 * (2 / 3 * (rest**2).sum() / 4) ** 0.5  # t of 4 degrees of freedom
    expected = pytest.approx((0.4 / 3, 0.4 / 3 - half, 0.4 / 3 + half), abs=1e-4)
    assert claims.contrast(three, task, weights) == expected
    half = 2.7764 * ((1 - 1 / 3) / 3 * (rest**2).sum() / 4) ** 0.5
    mean = table[1].mean()
    assert claims.among_cells(three, task, "cosine-1-global") == pytest.approx(
        (mean, mean - half, mean + half), abs=1e-4
    )


def test_results_of_other_conditions_are_refused(tmp_path: Path) -> None:
    other = {"optim.base-lr": 0.8, "optim.epochs": 4}
    _write(tmp_path, _result("ocm-1", 0), _result("ocm-3", 1, settings=other))
    differs = r"ocm-3-1\.json and ocm-1-0\.json have different optim\.epochs;"
    with pytest.raises(ValueError, match=differs):
        claims.read_results(tmp_path)
    (tmp_path / "ocm-3-1.json").unlink()
    settings = {**_result("ocm-1", 10)["settings"], "optim.base-lr": 0.4}
    _write(tmp_path, _result("ocm-1", 2), _result("ocm-1", 10, settings=settings))
    differs = r"ocm-1-10\.json and ocm-1-0\.json have different optim\.base-lr"
    with pytest.raises(ValueError, match=differs):
        claims.read_results(tmp_path)
    _write(tmp_path, _result("ocm-1", 10))
    assert [run["seed"] for run in claims.read_results(tmp_path)["ocm-1"]] == [0, 2, 10]


@pytest.mark.parametrize("text", ["{", "[]", "{}", "", '{"settings": {}}'])
def test_damaged_or_no_results(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study.main(["report", "--results", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "has no results" in capsys.readouterr().err
    (tmp_path / "ocm-1-0.json").write_text(text)
    with pytest.raises(ValueError, match=r"ocm-1-0\.json is damaged \(.*\); delete it"):
        claims.read_results(tmp_path)


def new_run(folder: Path, name: str = "ocm-1", **changes: Any) -> Run:
    given = {"rate": 0.8, "seed": 0, "epochs": 20, "scale": SCALES["cpu"], **changes}
    return Run(name=name, folder=folder, **given)


def put_python(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Replace the Python interpreter with a shell script."""
    script = folder / "python"
    script.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def test_a_failed_command_names_its_log_and_one_that_diverges_scores_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(tmp_path)
    with pytest.raises(runs.FailedError, match=r"trex_models\.train failed with exit status 2; s"):
        run.search()
    assert "error: " in (tmp_path / "runs" / "ocm-1-20-0.8-0.log").read_text()
    error = "echo error: the loss of step 3 is no longer finite"
    put_python(tmp_path, monkeypatch, error, "exit 2")
    assert run.search() == 0
    with pytest.raises(runs.DivergedError, match=r"status 2; see .*log"):
        run.complete(tmp_path / "result.json")
    assert new_run(tmp_path, "look-1")._head() is None  # no classifier weights


def test_results_and_searches_of_other_conditions_are_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = SCALES["cpu"]
    run = new_run(tmp_path, rate=0.4, epochs=100)
    result = tmp_path / "ocm-1-0.json"
    assert not run.is_done(result)
    runs.write(result, {"settings": run.conditions()})
    assert run.is_done(result)
    other = replace(run, scale=replace(scale, images=replace(scale.images, variation=7.0)))
    with pytest.raises(ValueError, match=r"ocm-1-0\.json has images\.variation .*, expected 7\.0"):
        other.is_done(result)
    assert scale.start
    other = replace(run, scale=replace(scale, start=replace(scale.start, epochs=7)))
    with pytest.raises(ValueError, match=r"ocm-1-0\.json has start\.epochs .*, expected 7"):
        other.is_done(result)
    trial = new_run(tmp_path, rate=0.2, epochs=9)
    out = tmp_path / "search-ocm-1.json"
    assert study.best_rate(trial, out) is None
    monkeypatch.setattr(Run, "search", lambda run: {0.2: 0.5, 0.4: 0.75, 0.8: 0.625}[run.rate])
    assert study.search(trial, out) == "ocm-1: learning rates 0.2: 50.0 %, 0.4: 75.0 %, 0.8: 62.5 %"
    assert study.best_rate(trial, out) == 0.4
    with pytest.raises(ValueError, match=r"search-ocm-1\.json has optim\.epochs 9, expected 8"):
        study.best_rate(replace(trial, epochs=8), out)


def test_mean_head_excludes_the_images_own_embedding() -> None:
    # The second image is classified correctly only if its own embedding counts: its score is
    # 0.89 with it and 0.6 without, and that of the other class is 0.8.
    known = np.array([[1, 0], [0.6, 0.8], [0, 1], [0, 1]], np.float32)
    labels = np.array([0, 0, 1, 1])
    assert runs.mean_head(known, labels, known, labels) == (3 / 4, 1)
    assert runs.mean_head(2 * known, labels, 3 * known[:3], np.array([0, 1, 1])) == (3 / 4, 2 / 3)


def test_a_failed_task_does_not_end_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> str:
        raise runs.FailedError("ended with status 2")

    with pytest.raises(runs.FailedError, match="status 2"):
        study.in_parallel([fail, lambda: "second", lambda: "third"], 1)
    printed = capsys.readouterr().out
    assert printed.index("[1/3] failed: ended with status 2") < printed.index("[3/3] third")


def test_sigterm_reaches_running_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = "trap 'echo saved; exit 3' TERM"
    put_python(tmp_path, monkeypatch, trap, "echo on", "while :; do sleep 0.1; done")
    run = new_run(tmp_path)
    log = tmp_path / "runs" / "ocm-1-20-0.8-0.log"

    def interrupt() -> str:
        while not (log.exists() and log.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        assert runs._stopped.wait(60)
        return "sent"

    def train() -> str:
        run.train()
        return "trained"

    with pytest.raises(KeyboardInterrupt), runs.sigterm_stops():
        study.in_parallel([train, interrupt, train], 2)
    assert log.read_text().split() == ["on", "saved"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_cell_is_named_twice_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Images, "write", lambda *_: None)
    completed: list[str] = []

    def complete(run: Run, _: Path) -> str:
        completed.append(f"{run.name}-{run.seed}-{run.rate:g}")
        return "done"

    monkeypatch.setattr(study, "_search_all", lambda cells, *_: dict.fromkeys(cells, 0.2))
    monkeypatch.setattr(study, "make_start", lambda *_: "started")
    monkeypatch.setattr(study, "complete", complete)
    command = ["run", "--folder", str(tmp_path), "--results", str(tmp_path / "results")]
    assert study.main([*command, "--jobs", "1", "--seeds", "2", "--cells", "ocm-1", "ocm-1"]) == 0
    assert completed == ["ocm-1-0-0.2", "ocm-1-1-0.2"]
    assert study.main([*command, "--cells", "ocm-1-fp16"]) == 2
    assert "--scale cpu has no configuration ocm-1-fp16" in capsys.readouterr().err


def test_the_page_shows_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["report", "--output", str(tmp_path)]) == 0
    page = (Path(__file__).parents[1] / "docs" / "study.md").read_text()
    lines = capsys.readouterr().out.split("wrote")[0].splitlines()
    assert len(lines) > 30
    for line in lines:
        assert line in page, line


@pytest.mark.client
def test_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = Images(num_classes=4, per_class=20, size=32, few_classes=2)
    settings = {**SCALES["cpu"].settings, "objective.bank-size": 64}
    settings["optim.warmup-epochs"] = 1
    begin = Start(cell="cosine-1-global", epochs=1, rate=0.2)
    small = replace(
        SCALES["cpu"], images=images, epochs=2, search_epochs=1, start=begin, settings=settings
    )
    monkeypatch.setitem(SCALES, "cpu", small)
    monkeypatch.setattr(study, "climb", lambda score, first: {first: score(first)})
    folder, results = tmp_path / "study", tmp_path / "results"
    command = ["run", "--folder", str(folder), "--results", str(results), "--seeds", "1"]
    command += ["--cells", "ocm-1", "--jobs", "1"]
    assert study.main(command) == 0
    ocm = json.loads((results / "ocm-1-0.json").read_text())
    start = folder / "runs" / "start-cosine-1-global-1-0.2-10000" / "export" / "backbone"
    assert f"--init-from {start} " in f"{ocm['commands']['train']} "
    assert str(start) in (folder / "runs" / "ocm-1-2-0.4-0.log").read_text()
    assert list(ocm["datasets"]) == list(TITLES)
    assert set(ocm["head"]) == set(HEAD)
    assert len(ocm["curves"]["prototype_change"]) == len(ocm["curves"]["step"])
    assert ocm["core_seconds"] > 1
    assert tables.cells(claims.read_results(results), ["task"]).count("\n") == 2
    before = {path: path.stat().st_mtime_ns for path in results.iterdir()}
    assert study.main(command) == 0  # everything is done
    assert {path: path.stat().st_mtime_ns for path in results.iterdir()} == before
    changed = replace(small, settings={**settings, "objective.ema-momentum": 0.5})
    monkeypatch.setitem(SCALES, "cpu", changed)
    capsys.readouterr()
    assert study.main(command) == 2
    assert "has objective.ema-momentum 0.9, expected 0.5; delete" in capsys.readouterr().err
