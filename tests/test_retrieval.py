"""Retrieval: metrics against plain loops and scikit-learn, memory, landmarks, and the task."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.metrics import average_precision_score

from tests import replicas
from tests.images import save_image
from trex_models.evaluation import ranking
from trex_models.evaluation.ranking import class_retrieval, landmark_metrics, rankings, whiten
from trex_models.transfer.__main__ import main
from trex_models.transfer.datasets import DATASETS, open_checked


def samples(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """60 images of 7 classes, one of which has a single image; three are equal."""
    rng = np.random.default_rng(seed)
    labels = np.append(rng.integers(6, size=59), 6)
    features = rng.normal(size=(60, 5)).astype(np.float32) + labels[:, None] / 4
    features[[20, 40]] = features[0]
    return features, labels


def expected(similarity: np.ndarray, relevant: np.ndarray) -> tuple[list[float], float, float]:
    """Return recall, average precision and MAP@R of one query by plain loops."""
    order = sorted(range(len(similarity)), key=lambda index: (-similarity[index], index))
    total, found, average, at_r = int(relevant.sum()), 0, 0.0, 0.0
    for rank, index in enumerate(order, start=1):
        if relevant[index]:
            found += 1
            average += found / rank / total
            at_r += found / rank / total * (rank <= total)
    return [float(any(relevant[order[:k]])) for k in (1, 5, 10)], average, at_r


@pytest.mark.parametrize("pairs", [1 << 24, 130])
@pytest.mark.parametrize("separate", [False, True])
def test_class_retrieval_equals_plain_loops(
    monkeypatch: pytest.MonkeyPatch, pairs: int, separate: bool
) -> None:
    monkeypatch.setattr(ranking, "PAIRS", pairs)  # 130: two queries per block
    monkeypatch.setattr(ranking, "BLOCK", 17)
    gallery, labels = samples()
    queries, targets = samples(1) if separate else (gallery, labels)
    own = (queries, targets) if separate else (None, None)
    counts: list[int] = []
    result = class_retrieval(gallery, labels, own[0], own[1], 4, progress=counts.append)
    assert sum(counts) == 60
    unit = gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
    for query in range(60):
        similarity = unit @ (queries[query] / np.linalg.norm(queries[query]))
        others = np.ones(60, bool)
        if not separate:
            others[query] = False
        relevant = labels[others] == targets[query]
        if not relevant.any():
            assert np.isnan(result.average_precision[query])
            assert np.isnan(result.recall[query]).all()
            continue
        recall, average, at_r = expected(similarity[others].round(6), relevant)
        assert result.recall[query].tolist() == recall
        assert result.average_precision[query] == pytest.approx(average, abs=1e-9)
        assert result.map_at_r[query] == pytest.approx(at_r, abs=1e-9)
        if len(set(similarity.round(6))) == 60:  # scikit-learn treats ties as one threshold
            truth = average_precision_score(relevant, similarity[others])
            assert result.average_precision[query] == pytest.approx(truth)
    if not separate:
        assert not (result.neighbors == np.arange(60)[:, None]).any()  # by index: 0 finds 20, 40
        assert {*result.neighbors[0, :2]} == {20, 40}


def test_landmark_precision_by_hand() -> None:
    order = np.array([4, 0, 3, 1, 5, 2])
    average, *precisions = landmark_metrics(order, [4, 3, 2], [])
    assert average == pytest.approx((1 + (1 / 2 + 2 / 3) / 2 + (2 / 5 + 3 / 6) / 2) / 3)
    assert average == pytest.approx(0.6778, abs=1e-4)  # not 0.7222
    assert precisions == [1.0, pytest.approx(2 / 5), pytest.approx(3 / 6)]
    # Without images 0 and 5, the positives have ranks 0, 1 and 3; the last one ends the precision.
    average, *precisions = landmark_metrics(order, [4, 3, 2], [0, 5])
    assert average == pytest.approx((1 + 1 + (2 / 3 + 3 / 4) / 2) / 3)
    assert precisions == [1.0, 3 / 4, 3 / 4]
    assert np.isnan(landmark_metrics(order, [], [0])[0])


def test_whitening_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    train, test = (rng.normal(size=(n, 6)) @ rng.normal(size=(6, 8)) + 2 for n in (200, 9))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test)]
    pca = PCA(whiten=True).fit(unit[0])
    kept = pca.explained_variance_ > 1e-6 * pca.explained_variance_[0]
    whitened = whiten(train, test)[0].numpy()
    theirs = pca.transform(unit[1])[:, kept] * np.sqrt(200 / 199)
    assert whitened.shape == theirs.shape
    np.testing.assert_allclose(whitened @ whitened.T, theirs @ theirs.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_must_be_finite(bad: float) -> None:
    features = np.ones((3, 2), np.float32)
    features[1, 0] = bad
    with pytest.raises(ValueError, match="gallery must be finite, but row 1"):
        next(rankings(features))
    with pytest.raises(ValueError, match="queries must be finite, but row 1"):
        next(rankings(np.ones((3, 2), np.float32), features))


@pytest.fixture(scope="module")
def oxford(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("landmarks")
    replicas.landmarks(root, "roxford5k")
    return root


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = DATASETS["roxford5k"]
    sizes = dataset.sizes._replace(train=6, test=2)
    monkeypatch.setitem(vars(dataset), "sizes", sizes)


def test_landmarks_are_scored_by_difficulty(
    oxford: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    gallery, queries = open_checked(DATASETS["roxford5k"], oxford).sources
    assert queries.read(0).shape == (20, 10, 3)  # cropped: the right half of 20 x 20 pixels
    assert len(gallery) == 6
    output = tmp_path / "r.json"
    arguments = ["--model", "pixels", "--datasets", "roxford5k", "--data-root", str(oxford)]
    assert main(["evaluate", *arguments, "--workers", "0", "--output", str(output)]) == 0
    entry = json.loads(output.read_text())["tasks"]["retrieval"]["roxford5k"]
    values = {name: score["value"] for name, score in entry["scores"].items()}
    # Ranking of both queries: 0, 1, 2, 3, 4, 5. Query 0: easy 1, hard 3, junk 0. Query 1: easy 0.
    assert values["mAP (easy)"] == pytest.approx((1 + 1) / 2)
    medium = (1 + (1 / 2 + 2 / 3) / 2) / 2
    assert values["mAP (medium)"] == pytest.approx((medium + 1) / 2)
    assert values["mAP (hard)"] == pytest.approx((0 / 1 + 1 / 2) / 2)  # only query 0 has any
    assert values["mP@1 (hard)"] == 0
    assert entry["train"]["images"] == 6
    assert (tmp_path / "r.roxford5k.retrieval.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"gnd": [{"bbx": [0, 0, 1, 1], "easy": [9], "hard": [], "junk": []}]},
            "lists image 9",
        ),
        ({"gnd": []}, "2 queries have 0 boxes"),
        ({"qimlist": None}, "TypeError|not iterable"),
        ({"imlist": print}, r"the pickle calls builtins\.print"),
    ],
)
def test_damaged_ground_truth_is_reported(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    replicas.landmarks(tmp_path, "roxford5k")
    path = tmp_path / "roxford5k" / "gnd_roxford5k.pkl"
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()) | change))
    with pytest.raises(ValueError, match=message) as caught:
        open_checked(DATASETS["roxford5k"], tmp_path)
    assert str(path) in str(caught.value)


def write_classes(root: Path, counts: dict[str, int]) -> None:
    for number, (name, count) in enumerate(counts.items()):
        for index in range(count):
            save_image(root / name / f"{index}.png", 40 + 150 * number + index)


def test_queries_and_gallery_in_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_classes(tmp_path / "own" / "gallery", {"ant": 3, "bee": 4})
    write_classes(tmp_path / "own" / "query", {"bee": 2, "ant": 1})
    arguments = ["evaluate", "--model", "pixels", "--workers", "0"]
    own, output = f"own={tmp_path / 'own'}", tmp_path / "r.json"
    assert main([*arguments, "--datasets", own, "--output", str(output)]) == 0
    entry = json.loads(output.read_text())["tasks"]["retrieval"]["own"]
    assert (entry["train"]["images"], entry["test"]["images"], entry["queries"]) == (7, 3, 3)
    assert entry["whitening"] is None
    whitened = [*arguments, "--datasets", own, "--output", str(output), "--whiten"]
    write_classes(tmp_path / "other" / "train", {"ant": 3, "bee": 4})
    write_classes(tmp_path / "other" / "test", {"ant": 1, "bee": 1})
    results = [entry["scores"]]
    for seed in range(2):  # new pixels under the same names
        save_image(tmp_path / "other" / "train" / "ant" / "0.png", seed, size=(9, 50))
        assert main([*whitened, f"other={tmp_path / 'other'}"]) == 0
        again = json.loads(output.read_text())["tasks"]["retrieval"]["own"]
        assert again["whitening"]["images"] == 7
        results.append(again["scores"])
    assert results[0] != results[1] != results[2]
    names = [path.name[:9] for path in (tmp_path / "features").rglob("other-*.safetensors")]
    assert names == ["other-tra"] * 2  # of the training images, once for each content
    assert "retrieval, own: mAP, PCA whitening on other" in output.with_suffix(".md").read_text()
    assert main([*whitened, "own"]) == 2
    assert "--whiten own is also ranked; choose a dataset with" in capsys.readouterr().err
    write_classes(tmp_path / "one" / "query", {"bee": 2})
    write_classes(tmp_path / "one" / "gallery", {"bee": 2, "cow": 2})
    assert main([*arguments, "--datasets", f"one={tmp_path / 'one'}", "--output", str(output)]) == 0
    capsys.readouterr()
    write_classes(tmp_path / "two" / "train", {"bee": 2, "cow": 2})
    write_classes(tmp_path / "two" / "test", {"bee": 1, "cow": 1})
    alone = ["--datasets", f"two={tmp_path / 'two'}", "--task", "retrieval"]
    assert main([*arguments, *alone, "--output", str(output)]) == 2
    assert "two: retrieval requires two classes, and two test images" in capsys.readouterr().err
