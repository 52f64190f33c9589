"""Activations that are recomputed: the same training to the bit, in less memory."""

from __future__ import annotations

import copy
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.processes import spawn
from tests.runs import assert_same_state, last_state, logged, refused, run
from trex_models.distributed import data_parallel, process_group
from trex_models.heads import Projector
from trex_models.method.backbone import preserve_running_stats, recompute_activations
from trex_models.method.bank import MemoryBank
from trex_models.method.model import Encoder, TReX
from trex_models.method.objectives import OnlineClassMeans
from trex_models.method.optimizer import build_optimizer
from trex_models.precision import Precision
from trex_models.train import build, checkpointing
from trex_models.train.__main__ import parse
from trex_models.train.step import seed_step, training_step

OPTION = "--system.checkpoint-activations"
BACKBONES: dict[str, dict[str, Any]] = {
    "resnet10t": {"channels": (8, 8, 16, 16), "drop_path_rate": 0.3},
    "regnetx_002": {},  # timm's BatchNormAct2d
    "test_vit": {"dynamic_img_size": True, "drop_path_rate": 0.3, "proj_drop_rate": 0.2},
}


def build_method(name: str, recomputes: bool) -> TReX:
    torch.manual_seed(0)
    backbone: Any = timm.create_model(name, num_classes=0, **BACKBONES.get(name, {}))
    encoder = Encoder(backbone, Projector(backbone.num_features, 1, 12, 6))
    method = TReX(encoder, OnlineClassMeans(MemoryBank(32, 6, 3), 0.1), ema_momentum=0.9)
    if recomputes:
        recompute_activations(backbone, name)
    return method.train()


def inputs(step: int) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    sizes = ((4, 3, 64, 64), (8, 3, 32, 32))
    crops = [torch.randn(*size, generator=generator) for size in sizes]
    return crops, torch.randint(3, (4,), generator=generator), torch.arange(4)


def train(
    method: TReX, model: nn.Module, precision: str, dtype: torch.dtype, rank: int = 0
) -> tuple[dict[str, Any], list[Tensor]]:
    """Take three steps; return the end's state and gradients, and the losses."""
    optimizer = build_optimizer(method)
    types = Precision.from_name("bf16" if precision == "bf16" else "fp32", "cpu")
    losses = []
    for step in range(3):
        seed_step(0, step, rank)
        crops, labels, indices = inputs(10 * step + rank)
        crops = [c.to(dtype) for c in crops]
        loss, _ = training_step(model, method, optimizer, types, crops, labels, indices, 0.1)
        losses.append(loss)
    gradients = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
    return {"state": method.state_dict(), "gradients": gradients}, losses


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
@pytest.mark.parametrize("name", BACKBONES)
def test_training_is_the_same_to_the_bit(name: str, precision: str) -> None:
    """Losses, gradients, weights, bank, and BatchNorm's statistics with their count."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    methods = [build_method(name, recomputes).to(dtype) for recomputes in (False, True)]
    without, with_it = (train(method, method, precision, dtype) for method in methods)
    assert_same_state(without, with_it)
    state = with_it[0]["state"]
    counts = [int(v) for k, v in state.items() if k.endswith("num_batches_tracked")]
    assert {*counts} <= {3, 6}  # momentum encoder, projector; backbone


@pytest.mark.parametrize("name", ["resnet26", "regnetx_002", "test_vit"])
def test_fewer_bytes_are_kept_for_the_backward_pass(name: str) -> None:
    def kept(recomputes: bool) -> int:
        method, storages = build_method(name, recomputes), {}
        weights = {parameter.data_ptr() for parameter in method.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = method(*inputs(0))
        loss.backward()  # what was kept lived until here, so that no address was used twice
        return sum(storages.values())

    assert kept(recomputes=True) < 0.6 * kept(recomputes=False)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("recomputes", [False, True])
def test_buffers_are_kept_only_where_activations_are_recomputed(
    recomputes: bool, fails: bool
) -> None:
    backbone = build_method("resnet10t", recomputes).encoder.backbone
    before = copy.deepcopy(backbone.state_dict())
    with suppress(MemoryError), preserve_running_stats(backbone):
        backbone(torch.randn(2, 3, 32, 32))
        if fails:
            raise MemoryError
    same = all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    assert same == recomputes


def test_momentum_encoder_keeps_nothing_anyway() -> None:
    method = build.build_method(parse("smoke", ["--output", "x", OPTION]), 3)
    backbone: Any = method.encoder.backbone
    assert backbone.grad_checkpointing
    assert method.momentum_encoder is not None
    averaged: Any = method.momentum_encoder.encoder
    assert not averaged.backbone.grad_checkpointing


def train_in_a_group(recomputes: bool, _: Path) -> tuple[dict[str, Any], list[Tensor]]:
    with process_group("cpu") as process:
        method = build_method("resnet10t", recomputes).double()
        model = data_parallel(method, process, False)
        return train(method, model, "fp64", torch.float64, process.rank)


@pytest.mark.slow
def test_two_processes_train_as_without(tmp_path: Path) -> None:
    without, with_it = (
        spawn(partial(train_in_a_group, recomputes), 2, tmp_path) for recomputes in (False, True)
    )
    assert_same_state(without, with_it)


def test_run_may_change_to_it_on_the_way(tmp_path: Path) -> None:
    """A run with it, and one that switches in the middle, end bit for bit like one without."""
    without, with_it = tmp_path / "without", tmp_path / "with"
    assert run(without) == 0
    assert run(with_it, OPTION) == 0
    expected = last_state(without)["method"]
    assert_same_state(last_state(with_it)["method"], expected)
    assert logged(without) == logged(with_it)
    checkpointing.list_checkpoints(without)[-1].unlink()
    assert run(without, OPTION) == 0
    assert_same_state(last_state(without)["method"], expected)


def test_backbone_that_cannot_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = ["--model.backbone", "darknet17", "--model.backbone-args", "drop_rate=0.1"]
    error = refused(output, *options, OPTION)
    start = "error: backbone darknet17 of timm cannot recompute"
    assert error.startswith(start)
    assert not output.exists()
