"""Transfer protocol: comparison with scikit-learn, and bounds on memory."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from trex_models.data.samples import digits
from trex_models.evaluation import knn, logistic
from trex_models.evaluation.linear import Samples, Setting, accuracies, fit
from trex_models.evaluation.splits import held_out
from trex_models.transfer import protocol

Task = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
CS = (1e-2, 1e-1, 1.0, 10.0)
SETTINGS = (Setting(1e-6, 1e-6), Setting(1.0, 1e-6), Setting(10.0, 1e-6), Setting(10.0, 1e-4))
SCORES: list[Callable[..., Any]] = [
    partial(protocol.logistic_scores, seeds=[0], Cs=CS[1:2]),
    partial(protocol.sgd_scores, seeds=[0], settings=SETTINGS[1:2], epochs=3, batch_size=50),
    partial(protocol.knn_score, k=3),
]


@pytest.fixture(scope="module")
def task() -> Task:
    """Pixels of digits; with 300 training images, classifiers make some errors."""
    (x, y), (test_x, test_y) = (
        (np.stack([source.read(i)[..., 0].ravel() for i in range(len(source))]), source.labels)
        for source in digits(8)
    )
    rows = np.random.default_rng(0).permutation(len(x))[:300]
    return x[rows] / np.float32(255), y[rows], test_x / np.float32(255), test_y


def test_grids_are_logarithmic_and_described_in_place_of_trials() -> None:
    cs = np.array(protocol.C_GRID)
    assert len(cs) == 30
    np.testing.assert_allclose(cs[[0, -1]], [1e-5, 1e6])
    np.testing.assert_allclose(np.diff(np.log(cs)), np.log(1e11) / 29)
    rates, decays = (sorted(set(values)) for values in zip(*protocol.SGD_GRID, strict=True))
    assert len(protocol.SGD_GRID) == len(set(protocol.SGD_GRID)) == 30
    np.testing.assert_allclose(rates, np.geomspace(0.1, 100, 6))
    np.testing.assert_allclose(decays, np.geomspace(1e-12, 1e-4, 5))
    found = protocol.describe([0, 1])
    assert found["seeds"] == [0, 1]
    assert "in place of the paper's 30 TPE trials" in found["note"]


def top1(scored: Any) -> float:
    return scored if isinstance(scored, float) else scored[0].top1


def logistic_top1(strength: float, *arrays: np.ndarray) -> float:
    x, y, test_x, test_y = map(torch.from_numpy, arrays)
    votes = logistic.fit(x, y, strength).logits(test_x).argmax(1)
    return (votes == test_y).double().mean().item()


def test_logistic_selects_on_held_out_samples_and_fits_to_all(task: Task) -> None:
    x, y, test_x, test_y = task
    choices = protocol.logistic_scores(*task, seeds=[0, 1], Cs=CS)
    assert [choice.seed for choice in choices] == [0, 1]
    for choice in choices:
        mask = held_out(y, 0.2, choice.seed)
        curve = [logistic_top1(c, x[~mask], y[~mask], x[mask], y[mask]) for c in CS]
        assert choice.curve == pytest.approx(curve, abs=1.5 / mask.sum())  # one image off
        best = choice.settings["C"]
        assert choice.validation_top1 == max(choice.curve) == choice.curve[CS.index(best)]
        top1 = logistic_top1(best, x, y, test_x, test_y)
        assert choice.top1 == pytest.approx(top1, abs=1.5 / len(test_y))
        assert choice.converged
    assert choices[0].curve != choices[1].curve
    assert 0.85 < choices[0].top1 < 0.97


def test_smallest_c_wins_a_tie_and_a_path_serves_all_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.repeat([0, 1, 2], 10)
    features = np.eye(3, dtype=np.float32)[labels]
    fitted, once = [], logistic.fit_path

    def counted(x: Any, y: Any, Cs: Any, **options: Any) -> Any:  # noqa: N803
        fitted.append((len(x), *Cs))
        return once(x, y, Cs, **options)

    monkeypatch.setattr(logistic, "fit_path", counted)
    choices = protocol.logistic_scores(
        features, labels, features, labels, seeds=[0, 1, 2], Cs=(0.1, 1.0, 10.0)
    )
    assert [choice.settings for choice in choices] == [{"C": 0.1}] * 3
    assert [choice.at_end for choice in choices] == [["C"]] * 3
    assert [choice.curve for choice in choices] == [[1.0] * 3] * 3
    assert fitted == [(24, 0.1, 1.0, 10.0)] * 3 + [(30, 0.1)]


def test_sgd_selects_on_held_out_samples_and_fits_to_all(task: Task) -> None:
    x, y, test_x, test_y = task
    (choice,) = protocol.sgd_scores(*task, seeds=[4], settings=SETTINGS, epochs=8, batch_size=50)
    mask = torch.from_numpy(held_out(y, 0.2, 4))
    options: dict[str, Any] = {
        "num_classes": 10,
        "device": torch.device("cpu"),
        "epochs": 8,
        "batch_size": 50,
        "seed": 4,
    }
    samples = Samples(torch.from_numpy(x), torch.from_numpy(y), (~mask).nonzero().flatten())
    layers = fit(samples, SETTINGS, **options)
    assert choice.curve == accuracies(layers, samples._replace(rows=mask.nonzero().flatten()))
    best = SETTINGS[choice.curve.index(max(choice.curve))]
    assert choice.settings == best._asdict()
    assert choice.curve[0] < choice.validation_top1 == max(choice.curve)
    assert choice.at_end == ["learning_rate"] * (best[0] == 10.0) + ["weight_decay"]
    layers = fit(samples._replace(rows=torch.arange(300)), [best], **options)
    tests = Samples(torch.from_numpy(test_x), torch.from_numpy(test_y), torch.arange(599))
    assert [choice.top1] == accuracies(layers, tests)
    assert 0.8 < choice.top1 < 1


def test_first_setting_wins_a_tie_and_the_seed_orders_the_batches(task: Task) -> None:
    twice = SETTINGS[1:2] * 2 + SETTINGS[:1]
    scores = partial(protocol.sgd_scores, *task, epochs=3, batch_size=20)
    choices = scores(seeds=[0, 1], settings=twice)
    for choice in choices:
        assert choice.curve[0] == choice.curve[1] == choice.validation_top1
        assert choice.settings == SETTINGS[1]._asdict()
    assert scores(seeds=[1], settings=twice) == choices[1:]
    assert choices[0].top1 != choices[1].top1  # only the data order of the last fit differs


@pytest.mark.parametrize("votes", [knn._VOTES, 70])
def test_knn_votes_as_scikit_learns(
    task: Task, votes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knn, "_VOTES", votes)  # 70 means blocks of 7 queries
    x, y, test_x, test_y = task
    for k, temperature in ((20, 0.07), (50, 1.0)):
        reference = KNeighborsClassifier(
            k, metric="cosine", weights=lambda d, t=temperature: np.exp((1 - d) / t)
        ).fit(x, y)
        found = protocol.knn_score(*task, k=k, temperature=temperature)
        assert found == pytest.approx(reference.score(test_x, test_y), abs=1e-9)
    assert found != protocol.knn_score(*task)


@pytest.mark.parametrize("scores", SCORES)
def test_labels_need_not_begin_at_0_and_features_may_be_read_only_or_half(
    task: Task, scores: Callable[..., Any], tmp_path: Path
) -> None:
    x, y, test_x, test_y = task
    rows = test_y != 3  # a class may lack test images
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    # One setting is chosen from one, so that another validation split changes no score.
    expected, found, half = (
        top1(scores(features, y + offset, test_x[rows], test_y[rows] + offset))
        for features, offset in ((x, 0), (mapped, 5), (x.astype(np.float16), 0))
    )
    assert expected == found > 0.7
    assert half == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("scores", SCORES)
def test_bad_input_is_refused(task: Task, scores: Callable[..., Any]) -> None:
    x, y, test_x, test_y = task
    broken = test_x.copy()
    broken[17, 2] = np.nan
    extract = "a NaN.*delete the feature file and extract it again"
    for given, message in (
        ((x, y, broken, test_y), f"test features must be finite, but row 17 has {extract}"),
        ((broken, test_y, x, y), "training features must be finite, but row 17 has"),
        ((x[y != 4], y[y != 4], test_x, test_y), "label 4 has test images, but no training image"),
        ((x, y, test_x[:, :9], test_y), r"test features .*shape \(N, 64\) .*got \(599, 9\)"),
        ((x, y, test_x[:0], test_y[:0]), r"test features .*not empty, got \(0, 64\)"),
        ((x, y[1:], test_x, test_y), r"labels of the training features must be 300 .*\(299,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            scores(*given)


def test_terminals_show_progress(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for scores, words in zip(SCORES, ("C 0.1, iteration", "seed 0: settings", "k-NN"), strict=True):
        for stream in (Terminal(), io.StringIO()):
            monkeypatch.setattr(sys, "stderr", stream)
            scores(*task)
            seen = stream.getvalue()
            assert ("100%" in seen and words in seen) if stream.isatty() else not seen
