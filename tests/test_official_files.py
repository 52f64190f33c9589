"""The builders of release files and the reference that says what such files compute."""

from __future__ import annotations

import ast
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from tests import official_files, reference_resnet

GOLDEN = json.loads(official_files.KEYS.read_text())
ABSENT = (3, 998)


@pytest.fixture(scope="module")
def trex() -> dict[str, Any]:
    return official_files.full_checkpoint(3, absent=ABSENT)


@pytest.fixture(scope="module")
def trexstar() -> dict[str, Any]:
    return official_files.full_checkpoint(1, bank_size=512, optimizer=False)


@pytest.fixture(scope="module")
def learned() -> dict[str, Any]:
    return official_files.full_checkpoint(1, memory=False)


def described(tensors: dict[str, Tensor]) -> list[tuple[str, list[int], str]]:
    return [(name, list(t.shape), str(t.dtype)) for name, t in tensors.items()]


def test_depth_3_and_backbones_are_as_recorded(trex: dict[str, Any]) -> None:
    assert described(trex["model"]) == [(name, *entry) for name, entry in GOLDEN.items()]
    expected = described(torchvision.models.resnet50().state_dict())[:-2]  # the last two are fc's
    for backbone in (official_files.backbone_checkpoint(), official_files.backbone_of(trex)):
        assert type(backbone) is OrderedDict
        assert described(backbone) == expected
    for name, tensor in trex["model"].items():
        assert tensor.isfinite().all(), name
        # A view would drag its whole storage into the file.
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
        if name.endswith(("running_var", "num_batches_tracked", "bn.weight", "bn1.weight")):
            assert (tensor > 0).all(), name
    model = trex["model"]
    assert not torch.equal(
        model["module.model.encoder.conv1.weight"], model["module.model_ema.encoder.conv1.weight"]
    )


def test_depth_1_has_one_hidden_layer(trexstar: dict[str, Any]) -> None:
    names = dict.fromkeys(trexstar["model"])
    expected = [name for name in GOLDEN if not any(f".layers.{i}." in name for i in (2, 3))]
    assert list(names) == [name.replace(".head.layers.4.", ".head.layers.2.") for name in expected]
    for encoder in ("model", "model_ema"):
        weight = trexstar["model"][f"module.{encoder}.head.layers.2.weight"]
        assert weight.shape == (256, 2048)
    assert trexstar["model"]["module.memory.features"].shape == (512, 256)
    assert trexstar["model"]["module.memory.labels"].shape == (512,)
    assert trexstar["optimizer"]["state"] == {}  # no momentum
    assert len(trexstar["optimizer"]["param_groups"]) == 2


def test_without_memory_there_are_class_weights(learned: dict[str, Any]) -> None:
    names = list(learned["model"])
    depth_1 = official_files.layout(1)
    assert names[:-1] == [name for name in depth_1 if name.startswith("module.model.")]
    assert described(learned["model"])[-1] == ("module.clf.fc.weight", [1000, 256], "torch.float32")


def test_bank_and_other_entries_are_as_the_official(trex: dict[str, Any]) -> None:
    memory = reference_resnet.under(trex["model"], "module.memory.")
    present = set(range(1000)) - set(ABSENT)
    assert set(memory["labels"].tolist()) == present
    assert 0 <= memory["ptr"].item() < len(memory["labels"])
    features = torch.nn.functional.normalize(memory["features"])
    means = reference_resnet.prototypes(memory["features"], memory["labels"], 1000)
    nearest = (features @ means.T).argmax(1)
    assert (nearest == memory["labels"]).float().mean() > 0.99
    assert list(trex) == ["model", "optimizer", "epoch", "args", "fp16_scaler"]
    assert type(trex["epoch"]) is int
    fields = vars(trex["args"])
    schedule = fields["lr_schedule"]
    assert schedule.dtype == np.float64
    assert schedule.shape == (500_400,)
    assert schedule.max() == 0.1
    kinds = {type(value) for name, value in fields.items() if name != "lr_schedule"}
    assert kinds == {str, int, float, bool, tuple, list}


def test_reference_tells_images_apart(trex: dict[str, Any]) -> None:
    images = reference_resnet.pictures(4, 64)
    online = reference_resnet.outputs(trex, images)
    average = reference_resnet.outputs(trex, images, momentum=True)
    for values in (*online[:2], *average[:2]):
        assert values is not None
        assert values.isfinite().all()
        assert values.dtype == torch.float64
        cosines = torch.nn.functional.normalize(values) @ torch.nn.functional.normalize(values).T
        assert cosines.fill_diagonal_(0).max() < 0.99
    assert online.features.shape == (4, 2048)
    assert online.embeddings is not None
    assert online.embeddings.shape == (4, 256)
    assert not torch.allclose(online.features, average.features, rtol=0.1)
    for logits in (online.logits, average.logits):
        assert logits is not None
        assert logits.shape == (4, 1000)
        assert logits.isfinite().all()
        assert logits.abs().max() <= 10
        zero = (logits == 0).all(0).nonzero().flatten()
        assert zero.tolist() == list(ABSENT)


def test_reference_is_independent() -> None:
    tree = ast.parse(Path(reference_resnet.__file__).read_text())
    imported = {
        a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names
    }
    imported |= {n.module or "." for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    standard = {"__future__", "collections", "math", "typing"}
    assert {name.partition(".")[0] for name in imported} == standard | {"torch", "torchvision"}
