"""Entry points of torch.hub, loaded from a clone."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import timm
import torch

from tests.documentation import ROOT
from trex_models.trex import default_cfgs


def test_entry_points_are_the_zoo_and_explain_themselves() -> None:
    names = run_path(str(ROOT / "hubconf.py"))
    zoo = {name for name in default_cfgs if name != "trex_resnet"}  # which has no weights
    assert set(names["__all__"]) == zoo
    assert all(callable(names[name]) for name in zoo)
    assert all("t-ReX" in names[name].__doc__ for name in zoo)  # which torch.hub.help shows


def test_weights_load_as_by_timm(release: Path) -> None:
    images = torch.rand(1, 3, 64, 64)
    overlay = {"file": str(release / "trex.pth")}
    options: dict[str, Any] = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    model = torch.hub.load(str(ROOT), "trex_resnet50", source="local", **options).eval()
    expected = timm.create_model("trex_resnet50", **options).eval()
    with torch.inference_mode():
        assert torch.equal(model(images), expected(images))
    tuned = torch.hub.load(str(ROOT), "trexstar_resnet50", source="local", num_classes=7)
    assert tuned(images).shape == (1, 7)
    with pytest.raises(RuntimeError, match="Cannot find callable resnet50"):
        torch.hub.load(str(ROOT), "resnet50", source="local")
