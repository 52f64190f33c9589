"""Few-shot classification, and evaluations of several tasks and models in one call."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from tests.images import save_image
from trex_models.data.sources import ArraySource
from trex_models.evaluation.frozen_model import FrozenModel
from trex_models.pretrained import figure
from trex_models.transfer import __main__ as main_module
from trex_models.transfer import few_shot
from trex_models.transfer.__main__ import main
from trex_models.transfer.cache import FeatureCache
from trex_models.transfer.datasets import Dataset, OpenedDataset, Sizes
from trex_models.transfer.few_shot import FewShot
from trex_models.transfer.task import Context, Plan


def source(per_class: list[int], seed: int) -> ArraySource:
    """Noisy images of 16 pixels; the color depends on the class."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(per_class)), per_class)
    colors = np.random.default_rng(0).integers(60, 190, (len(per_class), 1, 1, 3))
    noise = rng.normal(scale=150, size=(len(labels), 16, 16, 3))
    images = (colors[labels] + noise).clip(0, 255).astype(np.uint8)
    return ArraySource(images, labels, [f"class {label}" for label in range(len(per_class))])


def opened(per_class: list[int]) -> OpenedDataset:
    dataset = Dataset("own", "own", lambda _: (), Sizes(), "", "")
    return OpenedDataset(dataset, (source(per_class, 1), source([30] * len(per_class), 2)))


def test_episodes_equal_scikit_learn(tmp_path: Path) -> None:
    data, plan = opened([4, 6, 6]), Plan(shots=(1, 5, 7), episodes=3)
    cache = FeatureCache(root=tmp_path)
    entry = FewShot().evaluate(data, Context(FrozenModel.load("pixels"), cache, plan))
    images = [np.stack([part.read(i) for i in range(len(part))]) for part in data.sources]
    x, queries = (part.reshape(len(part), -1) / 255.0 for part in images)
    x, queries = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, queries))
    labels, targets = (part.labels for part in data.sources)
    drawn = set()
    for episode in range(3):
        ranks = few_shot.image_ranks(data.sources[0], episode)
        for column, k in enumerate((1, 5)):
            rows = np.flatnonzero(ranks < k)
            assert np.bincount(labels[rows]).tolist() == [min(k, 4), k, k]
            theirs = LogisticRegression(C=few_shot.C, max_iter=1000, tol=1e-8)
            accuracy = theirs.fit(x[rows], labels[rows]).score(queries, targets)
            assert entry["accuracies"][0][column][episode] == pytest.approx(accuracy, abs=1e-9)
            means = np.stack([x[rows][labels[rows] == label].mean(0) for label in range(3)])
            means /= np.linalg.norm(means, axis=1, keepdims=True)
            nearest = KNeighborsClassifier(1).fit(means, range(3)).score(queries, targets)
            assert entry["accuracies"][1][column][episode] == pytest.approx(nearest)
        assert {*np.flatnonzero(ranks < 1)} < {*np.flatnonzero(ranks < 5)}  # nested
        drawn.add((ranks < 1).tobytes())
    assert len(drawn) > 1  # other images in other episodes
    score = entry["scores"]["logistic regression, 5-shot"]
    assert score["value"] == pytest.approx(np.mean(entry["accuracies"][0][1]))
    assert score["interval"][0] < score["value"] < score["interval"][1]
    description = FewShot().protocol(data, plan)
    assert description["classes_with_fewer_images"] == {"1": 0, "5": 1}


def test_draws_do_not_depend_on_other_classes() -> None:
    few, more = opened([6, 6]).sources[0], opened([6, 6, 6]).sources[0]
    assert few_shot.image_ranks(few, 0).tolist() == few_shot.image_ranks(more, 0)[:12].tolist()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    for number, (split, count) in enumerate({"train": 4, "test": 3}.items()):
        for label in range(3):
            for index in range(count):
                path = root / "own" / split / f"class{label}" / f"{index}.png"
                save_image(path, 100 * number + 10 * label + index)
    return root


def run(place: Path, output: Path, *extra: str, model: str = "pixels") -> int:
    arguments = ["--model", model, "--datasets", f"own={place / 'own'}", "--output", str(output)]
    return main(["evaluate", *arguments, "--workers", "0", "--seeds", "1", *extra])


def test_one_call_mixes_tasks_and_models(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = "pixels,resnet10t"
    tasks = ["--task", "retrieval,classification", "--shots", "2,1,2", "--episodes", "3"]
    arguments = [*tasks, "--untrained", "--device", "cpu"]
    assert run(place, tmp_path / "out", *arguments, model=models) == 0
    printed = capsys.readouterr().out
    assert "few-shot, own: nearest class mean, 2-shot" in printed
    assert "retrieval, own: Recall@10" in printed
    paths = [tmp_path / "out" / f"{name}.json" for name in ("pixels", "resnet10t")]
    reports: list[dict[str, Any]] = [json.loads(path.read_text()) for path in paths]
    for report, path in zip(reports, paths, strict=True):
        assert report["complete"]
        assert {*report["tasks"]} == {"retrieval", "few-shot"}
        assert report["tasks"]["few-shot"]["own"]["shots"] == [1, 2]
        assert "own" in report["datasets"]
        assert "| retrieval, own: mAP | 9 | " in path.with_suffix(".md").read_text()
    assert reports[1]["model"]["batchnorm"] == "statistics of 12 training images of own"
    for kind in ("shots", "tasks"):
        picture = tmp_path / f"{kind}.png"
        assert main(["plot", *map(str, paths), "--kind", kind, "--output", str(picture)]) == 0
        assert picture.stat().st_size > 10_000
    # Nothing is computed twice: neither by the same call, nor by one of its tasks.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("features/*/*")}
    assert run(place, tmp_path / "out", *arguments, model=models) == 0
    assert run(place, tmp_path / "out" / "one.json", "--shots", "1,2", "--episodes", "3") == 0
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("features/*/*")}
    assert {path: after.pop(path) for path in before} == before
    assert not after


def test_the_group_figure_names_its_models(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    def load(name: str, **_: Any) -> FrozenModel:
        loaded.append(name)
        return FrozenModel.load("pixels")

    monkeypatch.setattr(main_module, "FrozenModel", SimpleNamespace(load=load))
    assert run(place, tmp_path, "--shots", "1", "--episodes", "2", model="figure,pixels") == 0
    assert {*loaded[:8]} == {*figure.FIGURE, "pixels"}  # all, before anything is computed
    reports = [json.loads((tmp_path / f"{name}.json").read_text()) for name in figure.FIGURE]
    labels = [report["model"]["label"] for report in reports]
    assert labels == ["DINO", "SwAV", "PAWS", "SupCon", "RSB-A1", "t-ReX", "t-ReX*"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--task sorting", "--task sorting is not a task; choose from classification, few-shot"),
        ("--shots 0,1", "--shots must be positive integers such as 1,2,5,10, got 0,1"),
        ("--shots 5", "--shots 5: the largest class of own has 4 training images; pass fewer"),
        ("--whiten digits", "--whiten digits is for the task retrieval; add --task retrieval"),
        ("--whiten own", "--whiten own is for the task retrieval; add --task retrieval"),
        ("--task retrieval --whiten pets,dtd", "--whiten pets,dtd must be one dataset"),
        (
            "--task retrieval --training-task own",
            "--training-task own is not a dataset of the task classification",
        ),
        ("--episodes 0", "--episodes must be at least 1"),
        ("--model pixels,resnet10t --label x", "--label names one model, but --model lists 2"),
        ("--datasets roxford5k --task few-shot", "roxford5k has only the tasks retrieval; add"),
        ("--datasets roxford5k --shots 1", "none of the datasets has the task few-shot"),
    ],
)
def test_problems_are_reported_before_features_are_computed(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert run(place, tmp_path / "r.json", *arguments.split()) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_list_shows_tasks_and_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert "--task few-shot        logistic regression and nearest class mean" in printed
    assert "DTD (47 classes, 3,760 training, 1,880 test); dtd/dtd/" in printed
    assert "classification, few-shot, retrieval" in printed


@pytest.mark.cuda
def test_cuda_scores_are_those_of_the_cpu(place: Path, tmp_path: Path) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        output, tasks = tmp_path / f"{device}.json", ["--task", "retrieval", "--shots", "1,2"]
        options = ["--episodes", "3", "--untrained", "--device", device]
        assert run(place, output, *tasks, *options, model="resnet10t") == 0
        found[device] = json.loads(output.read_text())["tasks"]
    for task, entries in found["cpu"].items():
        for name, score in entries["own"]["scores"].items():
            value = found["cuda"][task]["own"]["scores"][name]["value"]
            assert value == pytest.approx(score["value"], abs=1.5 / 9)  # of nine test images
