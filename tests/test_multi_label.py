"""Task multi-label: average precision, one-vs-rest classifiers, and readers of several labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from tests import replicas
from tests.replicas import own, refused, touch, write
from trex_models.evaluation import logistic
from trex_models.evaluation.ranking import RULES, average_precision
from trex_models.evaluation.splits import held_out
from trex_models.transfer import multi_label
from trex_models.transfer.__main__ import main
from trex_models.transfer.datasets import DATASETS, Sizes, open_checked
from trex_models.transfer.protocol import C_GRID
from trex_models.transfer.readers import VOC_CLASSES, LabelsSource
from trex_models.transfer.report import read_report


@pytest.mark.parametrize("digits", [0, 1, 8])
@pytest.mark.parametrize("count", [5, 40, 200])
def test_three_rules_with_ties_and_ignored_images(digits: int, count: int) -> None:
    rng = np.random.default_rng(digits)
    targets = rng.choice([-1, 0, 1], count, p=(0.2, 0.5, 0.3))
    targets[:2] = 0, 1
    scores = (rng.normal(size=count) + targets).round(digits)
    s, y = scores[targets >= 0], targets[targets >= 0]
    hits = [y[s >= threshold] for threshold in sorted(set(s), reverse=True)]
    points = [(found.sum() / y.sum(), found.mean()) for found in hits]  # recall, precision
    best = [max(p for r, p in points if r >= recall) for recall, _ in points]
    area = np.diff([0, *(recall for recall, _ in points)]) @ best
    eleven = [max(p for r, p in points if r > k / 10 - 1e-9) for k in range(11)]
    expected = average_precision_score(y, s), np.mean(eleven), area
    assert average_precision(scores, targets) == pytest.approx(dict(zip(RULES, expected)))  # noqa: B905
    absent = average_precision(scores, np.minimum(targets, 0))
    assert np.isnan(list(absent.values())).all()


def test_the_classifier_is_scikit_learns_on_the_known_images() -> None:
    rng = np.random.default_rng(0)
    targets = rng.choice([-1, 0, 1], 150, p=(0.2, 0.5, 0.3)).astype(np.int8)
    x = rng.normal(size=(150, 8)) + 0.4 * targets[:, None]
    features, known = torch.from_numpy(x), targets >= 0
    axes = logistic.principal_axes(features)
    found, curve = multi_label.fit_class(features, targets, range(2), axes)
    x, y = x[known], targets[known]
    expected = np.zeros(len(C_GRID))
    for seed in range(2):
        mask = held_out(y, 0.2, seed)
        for row, c in enumerate(C_GRID):
            fit = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(x[~mask], y[~mask])
            expected[row] += average_precision_score(y[mask], fit.decision_function(x[mask])) / 2
    np.testing.assert_allclose(curve, expected, atol=0.02)
    c = C_GRID[int(np.argmax(curve))]
    fit = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(x, y)
    scores = multi_label.binary_scores(found, features[known])
    np.testing.assert_allclose(scores, fit.decision_function(x), atol=0.01 * np.abs(scores).max())


def test_voc2007(tmp_path: Path) -> None:
    expected = replicas.voc2007(tmp_path)
    assert "expected 5011 training images, got 9" in refused(DATASETS["voc2007"], tmp_path)
    small = replace(DATASETS["voc2007"], sizes=Sizes(20, 9, 9))
    for source, part in zip(open_checked(small, tmp_path).sources, expected.values(), strict=True):
        assert isinstance(source, LabelsSource)
        assert source.classes == list(VOC_CLASSES)
        assert [Path(source.name(i)).stem for i in range(9)] == list(part)
        values = np.array(list(part.values()))
        assert np.array_equal(source.targets, np.select([values == 1, values == 0], [1, -1], 0))
        other = LabelsSource(source.root, source.paths, 1 - source.targets, source.classes)
        assert other.digest() != source.digest()
    path = tmp_path / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / "sofa_test.txt"
    write(path, "000010 2")
    assert "KeyError: '2'" in refused(small, tmp_path)
    path.unlink()
    assert "sofa_test.txt" in refused(small, tmp_path)


NAMES = ("a.jpg,cat; dog", "b.jpg,", "c.jpg,dog", "d.jpg,cat", "e.jpg,dog;cat")
COLUMNS = ("a.jpg,1,1", "b.jpg,0,0", "c.jpg,0, 1", "d.jpg,1,0", "e.jpg,1,1", "f.jpg,-1,")


@pytest.mark.parametrize(
    ("head", "rows", "test"),
    [("labels", NAMES, [[0, 0], [0, 1]]), ("cat,dog", COLUMNS, [[-1, -1], [-1, 1]])],
)
def test_csv_files(tmp_path: Path, head: str, rows: tuple[str, ...], test: list[list[int]]) -> None:
    touch(tmp_path, [f"{name}.jpg" for name in "abcdefgh"])
    write(tmp_path / "train.csv", f"path,{head}", *rows)
    last = head.split(",")[-1]  # val.csv has no column cat
    write(
        tmp_path / "val.csv", f"path,{last}", "g.jpg,", f"h.jpg,{'dog' if test[0][0] == 0 else 1}"
    )
    expected = [[[1, 1], [0, 0], [0, 1], [1, 0], [1, 1], [-1, -1]][: len(rows)], test]
    for source, targets in zip(
        open_checked(own(tmp_path), tmp_path).sources, expected, strict=True
    ):
        assert isinstance(source, LabelsSource)
        assert source.classes == ["cat", "dog"]
        assert source.targets.tolist() == targets
    parts = own(tmp_path / "train.csv").open(tmp_path)
    assert [len(part) for part in parts] == [len(rows) - 1, 1]


def test_csv_files_with_one_label_are_datasets_of_classes(tmp_path: Path) -> None:
    rows = [f"{name}{i}.jpg,{name}" for name in ("ant", "bee") for i in range(10)]
    touch(tmp_path, [row.partition(",")[0] for row in rows])
    write(tmp_path / "mine.csv", "path,label", *rows)
    dataset = own(tmp_path / "mine.csv")
    assert dataset.kind == "classes"
    counts = [np.bincount(part.labels).tolist() for part in open_checked(dataset, tmp_path).sources]
    assert counts == [[8, 8], [2, 2]]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("path,labels\n", "", r"train.csv has no rows with labels; add"),
        ("path,labels\na.jpg,\n", "", r"train.csv has no rows with labels; add"),
        ("path,a\nx.jpg,2\n", "", r"train.csv, line 2: 'a' is '2'; use 1 \(present\), 0 \(absent"),
        ("path,a\nx.jpg,1\nx.jpg,1\n", "", "train.csv, line 3: x.jpg is listed above; remove"),
        ("path,a\n,1\n", "", "train.csv, line 2: no value for 'path'; add one"),
        ("path,a,a\nx.jpg,1,0\n", "", "2 columns named 'a' .*; rename all but one"),
        ("file,a\nx.jpg,1\n", "", r"train.csv: .* has 0 columns named 'path' \(.*\); add a header"),
        ("path,a\nx,1\n", "path,b\ny,1\n", "test.csv, line 2: 'b' is not in train.csv; fix"),
        ("path,labels\nx,a\n", "path,labels\ny,a;b\n", "test.csv, line 2: 'b' is not in train"),
        ("path,a\nx,1\ny,0\nw,0\n", "path,a\nz,1\n", "1 classes have fewer than 2 training images"),
        ("path,label\nx,a\ny,b\n", "path,label\nz,c\n", "has the label 'c', which is none"),
        (
            "path,label\nx,a\ny,b\n",
            "path,labels\nz,c\n",
            "test.csv: .* has 0 columns named 'label' ",
        ),
        ("path,a\nx.jpg,1\n", None, "has 0 of the files test.csv and val.csv; keep one"),
    ],
)
def test_bad_csv_files(tmp_path: Path, train: str, test: str | None, message: str) -> None:
    (tmp_path / "train.csv").write_text(train)
    if test is not None:
        (tmp_path / "test.csv").write_text(test)
    with pytest.raises(ValueError, match=message) as caught:
        open_checked(own(tmp_path), tmp_path)
    assert "--data" not in str(caught.value)  # options of training


def test_scores_in_the_report(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = ["path,red,blue,rare"]
    for index in range(60):
        red, blue = index % 2, index // 2 % 2
        pixels = rng.integers(0, 40, (20, 20, 3)) + 180 * np.array([red, 0, blue])
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{index}.png")
        rows.append(f"{index}.png,{red},{blue},{'' if index >= 40 else index % 3 // 2}")
    write(tmp_path / "train.csv", *rows[:41])
    write(tmp_path / "test.csv", rows[0], *rows[41:])
    output = tmp_path / "report.json"
    given = f"evaluate --model pixels --datasets mine={tmp_path} --output {output} --workers 0"
    assert main([*given.split(), "--seeds", "2"]) == 0
    entry = read_report(output)["tasks"]["multi-label"]["mine"]
    assert entry["scores"] == {rule: {"value": 1.0, "interval": [1.0, 1.0]} for rule in RULES}
    assert entry["classes_left_out"] == ["rare"]
    assert list(entry["classes"]) == ["blue", "red"]
    assert entry["classes"]["red"].items() >= {"mAP": 1.0, "converged": True}.items()
    write(tmp_path / "test.csv", *rows[0::41])
    assert main(given.split()) == 2  # one test image
