"""Our modules against the official implementation's recorded trajectories."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
import torchvision

from tests import golden

DATA = Path(__file__).parent / "data"
ENTRIES = [
    entry
    for name in ("golden_trajectory", "golden_depth3")
    for entry in json.loads((DATA / f"{name}.json").read_text())
]


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES, ids=[entry["case"]["name"] for entry in ENTRIES])
def test_trajectory_is_reproduced(entry: dict[str, object]) -> None:
    torch.set_num_threads(1)
    errors = golden.compare(entry)
    assert set(errors) == set(entry) - {"case", "world_size"}
    assert max(errors.values()) <= golden.LIMIT, errors


def test_exit_status_tells_agreement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = copy.deepcopy(ENTRIES[0])
    entry["case"] |= {"epochs": 1, "steps_per_epoch": 1}
    entry |= golden.replay(entry["case"])
    path = tmp_path / "one_step.json"
    path.write_text(json.dumps([entry]))
    assert golden.main(str(path)) == 0
    path.write_text(json.dumps([entry | {"loss": [2.9119]}]))
    assert golden.main(str(path)) == 1
    assert "TOO LARGE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ours", "recorded", "expected"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([], [], 0.0),
        (None, [1.0], float("inf")),
        (["1.0"], ["1.0"], float("inf")),
        ([1.0], [1.0, 2.0], float("inf")),
        ([float("nan")], [1.0], float("inf")),
    ],
)
def test_error_of_a_quantity(ours: object, recorded: object, expected: float) -> None:
    assert golden.error(ours, recorded) == expected


@pytest.mark.client
@pytest.mark.parametrize("arch", ["resnet34", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_backbones_have_torchvisions_names_and_outputs(arch: str) -> None:
    with torch.device("meta"):  # drawing initial values takes longer than all the rest
        theirs = torchvision.models.get_model(arch).eval()
        ours = timm.create_model(arch, num_classes=0).eval()
    theirs.fc = torch.nn.Identity()
    theirs.to_empty(device="cpu")
    for module in theirs.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.reset_parameters()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    ours = copy.deepcopy(ours)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))
    for model in (ours, theirs):
        model.train()(images).square().mean().backward()
    assert_close = torch.testing.assert_close
    for name, tensor in theirs.named_buffers():
        assert_close(ours.get_buffer(name), tensor, msg=name)
    for name, parameter in theirs.named_parameters():
        assert_close(ours.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
