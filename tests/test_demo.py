"""The demo from end to end, on a tiny configuration."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import timm
from PIL import Image

from trex_models import demo
from trex_models.data.sources import ArraySource, Source
from trex_models.evaluation.frozen_model import weights_digest
from trex_models.train.build import open_source
from trex_models.train.recipes import demo as recipe
from trex_models.train.recipes import smoke
from trex_models.train.signals import StoppedBySignal
from trex_models.transfer import datasets
from trex_models.transfer.datasets import DATASETS, GROUPS, Dataset, Sizes, select


def part_of(source: Source, per_class: int) -> Source:
    """Return the first images of each class."""
    classes = range(len(source.classes))
    rows = [row for c in classes for row in np.flatnonzero(source.labels == c)[:per_class]]
    return ArraySource([source.read(row) for row in rows], source.labels[rows], source.classes)


@pytest.mark.slow
def test_demo_reports_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def few(dataset: Dataset, root: Path) -> tuple[Source, Source]:
        train, test = (part_of(source, 8) for source in dataset.open(root))
        return train, test

    def select_small(names: str) -> list[Dataset]:
        chosen = select(names)
        return [replace(each, sizes=Sizes(), open=partial(few, each)) for each in chosen]

    monkeypatch.setattr(datasets, "NUM_CLASSES", 4)
    monkeypatch.setattr(demo, "select", select_small)
    config = smoke(str(tmp_path))
    config = replace(
        config,
        data=replace(config.data, num_classes=4, images_per_class=16),
        objective=replace(config.objective, bank_size=64),
        optim=replace(config.optim, epochs=2, batch_size=16),
        system=replace(config.system, workers=0, log_every=3),
    )
    reports = demo.run(config)
    out = capsys.readouterr().out
    assert json.loads((tmp_path / "demo.json").read_text()) == {
        "reports": json.loads(json.dumps(reports))
    }
    labels = [report["model"]["label"] for report in reports]
    assert labels == ["pixels", "untrained", "t-ReX*"]
    for report in reports:
        assert f"{report['model']['label']}: top-1, %" in out
        assert report["complete"]
        assert list(report["datasets"]) == list(GROUPS["offline"])
        assert report["transfer"]["datasets"] == list(GROUPS["offline"][1:])
        for name, scores in report["datasets"].items():
            assert scores["title"] in out
            assert 0 <= scores["knn"]["top1"] <= 1, name
    pixels, untrained, trained = (report["model"] for report in reports)
    assert pixels["architecture"] == "pixels"
    assert untrained["architecture"] == trained["architecture"] == "resnet10t"
    assert untrained["weights_sha256"] != trained["weights_sha256"]
    assert "32 training images of fractals" in untrained["batchnorm"]
    assert "batchnorm" not in trained
    exported = timm.create_model(f"local-dir:{tmp_path / 'export' / 'backbone'}", pretrained=True)
    assert trained["weights_sha256"] == weights_digest(exported)
    with Image.open(tmp_path / "demo.png") as picture:
        assert min(picture.size) > 600
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 1000


def test_evaluated_fractals_are_those_of_the_recipe_and_new() -> None:
    def names(source: Source) -> list[str]:
        return [source.name(i) for i in range(len(source))]

    trained = open_source(recipe("unused").data)
    (seen, new), unseen = (DATASETS[name].open(Path()) for name in ("fractals", "fractals-unseen"))
    assert {*names(seen)} < {*names(trained)}
    for index in (0, len(seen) - 1):
        place = names(trained).index(seen.name(index))
        np.testing.assert_array_equal(seen.read(index), trained.read(place))
    assert seen.classes == new.classes == trained.classes
    for one, other in ((new, trained), *((part, trained) for part in unseen), (seen, new), unseen):
        assert not {*names(one)} & {*names(other)}


def test_a_signal_stops_it_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = StoppedBySignal(signal.SIGTERM, 3, 9)
    monkeypatch.setattr(demo, "train", Mock(side_effect=stopped))
    assert demo.main(["--output", str(tmp_path / "run")]) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 3 of 9 (saved)" in capsys.readouterr().out
