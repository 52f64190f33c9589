"""`python -m trex_models.transfer`: evaluation, reports, tables and plots."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image

from tests.models import CHANNELS, save_model
from trex_models.atomic import write_text_file
from trex_models.transfer import cache as cache_module
from trex_models.transfer import protocol
from trex_models.transfer import report as report_module
from trex_models.transfer.__main__ import main, plot
from trex_models.transfer.published import PUBLISHED
from trex_models.transfer.report import accuracy, knn_scores, read_report, summary

CLASSES = {"dark": 60, "gray": 120, "light": 180}


def write_images(root: Path, per_class: int, seed: int, noise: float) -> None:
    """Write class folders of noisy squares; the mean brightness depends on the class."""
    rng = np.random.default_rng(seed)
    for name, level in CLASSES.items():
        (root / name).mkdir(parents=True)
        for index in range(per_class):
            pixels = level + noise * rng.normal() + 10 * rng.normal(size=(24, 24, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(root / name / f"{index}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and two datasets, an easy and a hard one."""
    root = tmp_path_factory.mktemp("transfer")
    for number, (name, noise) in enumerate({"easy": 0.0, "hard": 40.0}.items()):
        write_images(root / name / "train", 15, 2 * number, noise)
        write_images(root / name / "test", 12, 2 * number + 1, noise)
    cfg = {"input_size": [3, 32, 32], "license": "apache-2.0"}
    save_model(root / "model", "resnet10t", cfg, num_classes=0, channels=CHANNELS)
    return root


def run(place: Path, out: Path, *extra: str, model: str = "") -> int:
    sets = f"easy={place / 'easy'},hard={place / 'hard'}"
    given = ["--model", model or str(place / "model"), "--datasets", sets, "--output", str(out)]
    return main(["evaluate", *given, "--seeds", "2", "--workers", "0", *extra])


@pytest.fixture(scope="module")
def report(place: Path) -> dict[str, Any]:
    assert run(place, place / "out" / "report.json", "--geometry", "--label", "Small") == 0
    return read_report(place / "out" / "report.json")


def test_reports_contain_the_command_that_repeats_them(report: dict[str, Any], place: Path) -> None:
    json.dumps(report, allow_nan=False)
    assert report["complete"]
    model = {"label": "Small", "source": str(place / "model"), "license": "apache-2.0"}
    assert report["model"].items() >= model.items()
    assert len(report["model"]["weights_sha256"]) == 64
    assert report["transform"]["size"] == [32, 32]
    assert report["protocol"]["seeds"] == [0, 1]
    assert len(report["protocol"]["logistic"]["C"]) == 30
    assert "in place of the paper's 30 TPE trials" in report["protocol"]["note"]
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0]
    command = shlex.split(report["command"])
    assert command[:5] == ["python", "-m", "trex_models.transfer", "evaluate", "--model"]
    assert command[-7:] == [*"--label Small --seeds 2 --geometry --workers 0".split()]
    assert report["cache_dtype"] == "float32"
    assert report["classifiers_device"] == "cpu"
    entry = report["datasets"]["hard"]
    assert (entry["classifier"], entry["num_classes"]) == ("logistic", 3)
    assert (entry["train"]["images"], entry["test"]["images"]) == (45, 36)
    assert entry["train"]["sha256"] != entry["test"]["sha256"]
    assert [choice["seed"] for choice in entry["choices"]] == [0, 1]
    assert entry["geometry"]["train"]["num_images"] == 45


def test_scores_are_those_of_the_chosen_classifiers(report: dict[str, Any]) -> None:
    assert report["transfer"] == json.loads(json.dumps(summary(report["datasets"])))
    assert report["transfer"]["datasets"] == ["easy", "hard"]
    for entry in report["datasets"].values():
        seeds = [choice["top1"] for choice in entry["choices"]]
        scores = accuracy(seeds, 36) | {"knn": knn_scores(entry["knn"]["top1"], 36)}
        assert entry.items() >= json.loads(json.dumps(scores)).items()
    easy, hard = (report["datasets"][name]["top1"] for name in ("easy", "hard"))
    assert (easy["seeds"], easy["clipped"]) == ([1.0, 1.0], True)
    assert 0.4 < hard["mean"] < 0.95


def test_a_table_is_written_next_to_the_report(report: dict[str, Any], place: Path) -> None:
    text = (place / "out" / "report.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["dataset", "easy", "hard", "mean log-odds of 2 datasets"]
    hard = report["datasets"]["hard"]
    mean, *ends = (100 * value for value in (hard["top1"]["mean"], *hard["top1"]["test_interval"]))
    assert rows[2][2] == f"{mean:.1f} ({ends[0]:.1f} to {ends[1]:.1f})"
    assert rows[3][-1].startswith(f"{report['transfer']['mean_log_odds']:.3f} (")
    assert "are clipped by half a test image" in text
    assert report["protocol"]["note"] in text
    assert "INCOMPLETE" not in text


def test_the_same_command_reuses_scores(
    report: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("fitted again")

    monkeypatch.setattr(protocol, "logistic_scores", never)
    out = place / "out" / "again.json"
    assert run(place, out, "--geometry", "--label", "Small") == 0
    again = read_report(out)
    told_apart = {key: report[key] for key in ("created", "command")}
    assert again | told_apart == report
    for other in ("--seeds 3", "--preprocessing validation", "--dtype float16"):
        with pytest.raises(AssertionError, match="fitted again"):
            run(place, out, *other.split())
    monkeypatch.setattr(report_module, "version", lambda package: f"{package} 99")
    with pytest.raises(AssertionError, match="fitted again"):
        run(place, out)


def test_a_run_that_was_cut_leaves_a_report_that_says_so(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = protocol.logistic_scores
    calls = []

    def cut(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return found(*args, **options)

    monkeypatch.setattr(protocol, "logistic_scores", cut)
    out = tmp_path / "report.json"
    assert run(place, out) == 130
    assert not read_report(out)["complete"]
    assert list(read_report(out)["datasets"]) == ["easy"]
    assert "INCOMPLETE" in out.with_suffix(".md").read_text()
    assert run(place, out) == 0
    assert read_report(out)["complete"]
    assert len(calls) == 3  # easy, the interrupted one, hard


def test_scores_that_cannot_be_kept_are_reported_and_repeat_from_nothing(
    report: dict[str, Any],
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(path: Path, text: str) -> None:
        if "-scores-" in path.name:
            raise OSError(30, "Read-only file system", str(path))
        write_text_file(path, text)

    monkeypatch.setattr(cache_module, "write_text_file", refuse)
    assert run(place, tmp_path / "report.json") == 0
    assert "the scores were not cached for other runs" in capsys.readouterr().out
    again = read_report(tmp_path / "report.json")
    assert again["complete"]
    for name, entry in again["datasets"].items():
        for key in ("top1", "choices", "knn", "train", "test"):
            assert entry[key] == report["datasets"][name][key]


def test_features_of_zeros_have_no_geometry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part, count in (("train", 5), ("test", 2)):
        for name in [f"{label}/{index}.png" for label in "ab" for index in range(count)]:
            path = tmp_path / "black" / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9)).save(path)
    out = tmp_path / "out" / "report.json"
    sets = f"black={tmp_path / 'black'}"
    given = ["--model", "pixels", "--datasets", sets, "--output", str(out), "--geometry"]
    assert main(["evaluate", *given, "--seeds", "1", "--workers", "0"]) == 0
    assert "geometry is not available: " in capsys.readouterr().out
    entry = read_report(out)["datasets"]["black"]
    assert entry["geometry"]["train"] is None
    assert entry["top1"]["mean"] == 0.5
    assert "over 1 seed (" in out.with_suffix(".md").read_text()
    assert main(["plot", str(out), "--kind", "geometry", "--output", str(tmp_path / "a.png")]) == 2


def test_incomparable_reports_are_rejected_or_noted(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "easy", tmp_path / "easy")
    (tmp_path / "easy" / "test" / "gray" / "0.png").unlink()
    one, two, other = (str(tmp_path / name) for name in ("one.json", "two.json", "other.json"))
    assert run(place, Path(one), "--training-task", "easy", "--label", "a | b", model="pixels") == 0
    assert run(place, Path(two), "--training-task", "hard", model="pixels") == 0
    sets = f"easy={tmp_path / 'easy'}"
    assert run(place, Path(other), "--datasets", sets, model="pixels") == 0
    capsys.readouterr()
    assert main(["table", one, two, "--markdown"]) == 0
    text = capsys.readouterr().out
    assert "not comparable: they are over different datasets" in text
    assert "a \\| b: top-1" in text
    for command in (["table"], ["plot", "--kind", "bars", "--output", str(tmp_path / "x.png")]):
        assert main([*command, one, other]) == 2
        assert "used different images" in capsys.readouterr().err


@pytest.mark.usefixtures("report")
def test_a_reader_that_has_seen_enough_is_no_error(place: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream, redirect_stdout(stream):  # noqa: PTH123 - a descriptor
        status = main(["table", str(place / "out" / "report.json")])
    assert status == 128 + signal.SIGPIPE  # and closing the stream raises no error


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_cuda_scores_are_those_of_the_cpu(
    report: dict[str, Any], place: Path, tmp_path: Path, precision: str
) -> None:
    out = tmp_path / "report.json"
    assert run(place, out, "--device", "cuda", "--precision", precision, "--geometry") == 0
    found = read_report(out)
    assert found["classifiers_device"] == "cuda"
    for name, entry in found["datasets"].items():
        expected = report["datasets"][name]
        images = (1 if precision == "fp32" else 3) / expected["test"]["images"]
        assert entry["top1"]["mean"] == pytest.approx(expected["top1"]["mean"], abs=images)
        assert entry["knn"]["top1"] == pytest.approx(expected["knn"]["top1"], abs=images)


def test_random_weights_are_calibrated_on_the_training_task(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    assert run(place, out, "--untrained", "--training-task", "hard") == 0
    found = read_report(out)
    assert found["model"]["untrained"]
    assert found["model"]["batchnorm"] == "statistics of 45 training images of hard"
    assert found["training_task"] == "hard"
    assert found["transfer"]["datasets"] == ["easy"]
    assert "hard (training task)" in out.with_suffix(".md").read_text()


def test_models_share_a_table_and_a_picture(
    report: dict[str, Any], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = (str(place / "out" / f"{name}.json") for name in ("report", "pixels"))
    assert run(place, Path(other), "--training-task", "easy", model="pixels") == 0
    capsys.readouterr()
    assert main(["table", one, other]) == 0
    text = capsys.readouterr().out
    hard = f"{report['datasets']['hard']['log_odds']:.3f}"
    assert all(words in text for words in ("Small: top-1, %", "pixels: top-1, %", hard))
    assert main(["table", one, other, "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| dataset | test images | Small: top-1, % |")
    for kind in ("bars", "geometry"):
        picture = tmp_path / f"{kind}.png"
        assert main(["plot", one, other, "--kind", kind, "--output", str(picture)]) == 0
        with Image.open(picture) as image:
            assert image.width > 500
    asked = ["--kind", "geometry", "--dataset", "nowhere", "--output", str(picture)]
    assert main(["plot", one, *asked]) == 2
    assert "no report has geometry of 'nowhere'" in capsys.readouterr().err
    picture = tmp_path / "scatter.svg"
    assert main(["plot", other, "--output", str(picture)]) == 0
    assert picture.stat().st_size > 10_000
    capsys.readouterr()
    assert main(["plot", other, "--output", str(picture), "--published", "paper"]) == 2
    assert "trained on ImageNet-1K, pixels on easy" in capsys.readouterr().err
    assert main(["plot", "--output", str(picture)]) == 2
    assert "reports, or use --published with --kind scatter" in capsys.readouterr().err
    for options, message in (
        ("--published paper --kind bars --output x.png", "--published with --kind scatter"),
        ("--published paper --output x.gif", "must be a .png or .svg or .pdf file, got x.gif"),
        ("--published paper --output /proc/y/y.png", "--output /proc/y/y.png cannot be written"),
    ):
        assert main(["plot", *options.split()]) == 2
        assert message in capsys.readouterr().err


def test_the_list_tells_sets_and_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert "fgvc-aircraft-2013b" in text
    assert "\noffline" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--datasets", "imagenett"], "'imagenett' is not a known dataset"),
        (["--datasets", "aircraft", "--data-root", "/nowhere"], "aircraft: .*fgvc-aircraft-2013b"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--batch-size", "-1"], "--batch-size must be at least 1, got -1"),
        (["--training-task", "digits"], "--training-task digits is not a dataset of the task"),
        (["--model", "resnet5O"], "is not a timm model; .*resnet50"),
        (["--output", "report.txt"], "--output must be a .json file, got report.txt"),
        (["--cache", "{place}/easy/test/gray/0.png"], "0.png is not a folder; pass a folder"),
        (["--output", "/proc/report.json"], "--output /proc/report.json cannot be written"),
    ],
)
def test_bad_input_is_one_clear_line(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    message: str,
) -> None:
    changes = [change.format(place=place) for change in changes]
    assert run(place, tmp_path / "report.json", *changes) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(message, err)
    assert not list(tmp_path.iterdir())


def test_unreadable_images_are_reported(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "easy", tmp_path / "easy")
    torn = tmp_path / "easy" / "test" / "gray" / "3.png"
    torn.write_bytes(torn.read_bytes()[:60])
    sets = f"easy={tmp_path / 'easy'}"
    assert run(place, tmp_path / "out" / "report.json", "--datasets", sets) == 2
    assert str(torn) in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 1, "data_sets": {}}'])
def test_other_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    assert main(["table", str(path)]) == 2
    err = capsys.readouterr().err
    assert str(path) in err
    assert ("report format 1, expected 3; evaluate" in err) == ("format" in text)
    assert main(["table", str(tmp_path / "none.json")]) == 2


def test_every_table_of_published_figures_can_be_drawn() -> None:
    [choices, _] = get_args(get_type_hints(plot)["published"])
    assert get_args(choices) == tuple(PUBLISHED)
