"""The demo from end to end, on a tiny configuration."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trex_models import demo
from trex_models.train.build import open_source
from trex_models.train.recipes import smoke
from trex_models.train.signals import StoppedBySignal


@pytest.mark.slow
def test_demo_reports_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = smoke(str(tmp_path))
    config = replace(
        config,
        data=replace(config.data, num_classes=4, images_per_class=16),
        objective=replace(config.objective, bank_size=64),
        optim=replace(config.optim, epochs=2, batch_size=16),
        system=replace(config.system, workers=0, log_every=3),
    )
    report = demo.run(config)
    out = capsys.readouterr().out
    saved = json.loads((tmp_path / "demo.json").read_text())
    assert saved == json.loads(json.dumps(report))
    assert list(saved["results"]) == [task.name for task in demo.tasks(config)]
    for name, scores in saved["results"].items():
        assert name in out
        for encoder in ("pixels", "untrained", "t-ReX*"):
            assert set(scores[encoder]) == set(demo.CLASSIFIERS)
            assert all(0 <= value <= 1 for value in scores[encoder].values())
    with Image.open(tmp_path / "demo.png") as picture:
        assert min(picture.size) > 600
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 1000


def test_unseen_classes_and_new_images_are_new() -> None:
    config = smoke("unused")
    new, unseen, *_ = demo.tasks(config)
    for task in (new, unseen):
        names = [{p.name(i) for i in range(len(p))} for p in (task.train, task.test)]
        assert not names[0] & names[1]
    trained = {open_source(config.data).name(i) for i in range(len(open_source(config.data)))}
    assert not trained & {new.test.name(i) for i in range(len(new.test))}
    for part in (unseen.train, unseen.test):
        assert not trained & {part.name(i) for i in range(len(part))}


def test_a_signal_stops_it_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(_: object) -> None:
        raise StoppedBySignal(signal.SIGTERM, 3, 9)

    monkeypatch.setattr(demo, "train", stopped)
    assert demo.main(["--output", str(tmp_path / "run")]) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 3 of 9, saved" in capsys.readouterr().out
