"""The parts of a run against values computed by hand from unusual settings."""

from __future__ import annotations

import json
import math
import pickle
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.runs import assert_same_state
from trex_models import distributed
from trex_models.data.multicrop import CropSpec, MultiCropDataset, augment
from trex_models.data.photometric import GLOBAL_AUGMENTATION, LOCAL_AUGMENTATION
from trex_models.distributed import Process
from trex_models.method import LOOK, CosineSoftmax, MomentumEncoder, OnlineClassMeans
from trex_models.train import checkpointing, loop
from trex_models.train.__main__ import parse
from trex_models.train.config import Config, ValidationConfig
from trex_models.train.setup import build_run, setup_run
from trex_models.train.step import training_step

# No value is a default, or equal to a value that it could be confused with.
CONFIG = parse(
    "smoke",
    """--output unused --seed 11 --system.device cpu --system.workers 0
    --system.log-every 3 --system.save-minutes 1 --system.save-steps 0
    --data.source fractals --data.num-classes 3 --data.images-per-class 9 --data.image-size 44
    --data.decode exact
    --crops.global-crops 2 --crops.global-size 40 --crops.global-scale 0.3 0.9
    --crops.local-crops 3 --crops.local-size 24 --crops.local-scale 0.07 0.2
    --model.backbone resnet10t --model.backbone-args channels=(8,8,16,20)
    --model.hidden-layers 2 --model.hidden-dim 12 --model.embedding-dim 7
    --objective.temperature 0.25 --objective.bank-size 18 --objective.neighbors 5
    --objective.ema-momentum 0.75
    --optim.epochs 5 --optim.batch-size 6 --optim.base-lr 0.7 --optim.final-lr 0.003
    --optim.warmup-epochs 2 --optim.momentum 0.6 --optim.weight-decay 0.02 --optim.clip-grad 9
    --crops.global-augmentation.flip 0.25 --crops.local-augmentation.hue 0.05
    --validation.every 2 --validation.images-per-class 2 --validation.neighbors 4
    --validation.neighbors-among 8""".split(),
)
SPECS = [
    CropSpec(2, 40, (0.3, 0.9), replace(GLOBAL_AUGMENTATION, flip=0.25)),
    CropSpec(3, 24, (0.07, 0.2), replace(LOCAL_AUGMENTATION, hue=0.05)),
]
# 27 images in batches of 6: 4 steps an epoch, 20 steps. The peak is 0.7 * 6 / 256.
PEAK, WARMUP, TOTAL = 0.01640625, 8, 20
RATES = [PEAK * step / (WARMUP - 1) for step in range(WARMUP)] + [
    0.003 + (PEAK - 0.003) * (1 + math.cos(math.pi * step / 12)) / 2 for step in range(12)
]
LOGGED = [3, 6, 9, 12, 15, 18, 20]
CPU = torch.device("cpu")
ALONE = Process(0, 1, CPU)

Trained = tuple[Path, list[dict[str, Any]]]


def batch_keys(step: int) -> list[tuple[int, int]]:
    """Return the (epoch, index) keys of a global batch; stream 1 of the seed is the order."""
    epoch, within = divmod(step, 4)
    order = np.random.default_rng((1, 11, epoch)).permutation(27)
    return [(epoch, int(index)) for index in order[6 * within : 6 * within + 6]]


def train(config: Config, process: Process = ALONE) -> list[dict[str, Any]]:
    """Train as one of several processes, without the others; the clock advances 20 s per step.

    Returns:
        Inputs and outputs of each step, its seed, and the checkpoints on disk before it.
    """
    steps: list[dict[str, Any]] = []

    def recording(model: Any, method: Any, optimizer: Any, *args: Any) -> tuple[Tensor, Tensor]:
        names = ("precision", "crops", "labels", "indices", "rate", "clip_grad")
        seen = dict(zip(names, args, strict=True))
        seen["seed"] = torch.initial_seed()
        seen["files"] = {path.name for path in checkpointing.list_checkpoints(Path(config.output))}
        loss, logits = training_step(model, method, optimizer, *args)
        seen["group_rates"] = {group["lr"] for group in optimizer.param_groups}
        steps.append(seen | {"loss": loss, "logits": logits})
        return loss, logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "training_step", recording)
        patch.setattr(distributed, "process_group", lambda *_: nullcontext(process))
        patch.setattr(distributed, "data_parallel", lambda module, *_: module)
        patch.setattr(time, "monotonic", lambda: 20.0 * len(steps))
        loop.train(config)
    return steps


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return the folder and the steps of a finished run."""
    folder = tmp_path_factory.mktemp("setup") / "run"
    return folder, train(replace(CONFIG, output=str(folder)))


def test_every_part_of_a_run_follows_the_config() -> None:
    run = build_run(CONFIG, ALONE)
    method, objective = run.method, run.method.objective
    assert method.training
    assert isinstance(objective, OnlineClassMeans)
    assert objective.temperature == 0.25
    assert objective.bank.embeddings.shape == (18, 7)
    assert objective.bank.num_classes == 3
    linear = [layer for layer in method.encoder.modules() if isinstance(layer, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(20, 12), (12, 12), (12, 7)]
    assert isinstance(method.momentum_encoder, MomentumEncoder)
    assert method.momentum_encoder.momentum == 0.75

    # Weights of convolutions and linear layers decay; biases and norms do not. Nothing else is
    # trained: neither the momentum encoder nor the bank.
    weights, others = run.optimizer.param_groups
    layers = [m for m in method.encoder.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    decaying = {id(layer.weight) for layer in layers}
    assert {id(p) for p in weights["params"]} == decaying
    assert {id(p) for p in others["params"]} == {*map(id, method.encoder.parameters())} - decaying
    assert (weights["weight_decay"], others["weight_decay"]) == (0.02, 0)
    assert isinstance(run.optimizer, torch.optim.SGD)
    for group in (weights, others):
        assert (group["momentum"], group["dampening"], group["nesterov"]) == (0.6, 0, False)

    assert run.lr_schedule.tolist() == pytest.approx(RATES, rel=1e-12)
    assert run.lr_schedule.argmax() == WARMUP - 1
    assert run.dataset.specs == SPECS
    assert list(run.sampler) == [batch_keys(step) for step in range(TOTAL)]
    assert (run.dataset.seed, run.dataset.substitute) == (11, False)
    assert run.dataset.decode == "exact"
    assert run.precision.name == "fp32"

    assert run.validation is not None
    assert run.validation.source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert run.neighbors is not None
    drawn = np.random.default_rng(11).permutation(27)[:8].tolist()
    assert (run.neighbors.k, list(run.neighbors.indices)) == (4, drawn)
    global_only = replace(CONFIG, crops=replace(CONFIG.crops, local_crops=0))
    assert build_run(global_only, ALONE).dataset.specs == SPECS[:1]


def test_initial_weights_are_a_function_of_the_seed() -> None:
    states: list[dict[str, Any]] = []
    for seed in (11, 11, 12):
        torch.manual_seed(len(states))
        states.append(build_run(replace(CONFIG, seed=seed), ALONE).method.state_dict())
    assert_same_state(states[0], states[1])
    for key in ("encoder.backbone.conv1.0.weight", "objective.bank.features"):
        assert not torch.equal(states[0][key], states[2][key])


def test_other_objectives_follow_the_config() -> None:
    options = CONFIG.objective
    look, cosine = (
        build_run(replace(CONFIG, objective=replace(options, name=name)), ALONE).method
        for name in ("look", "cosine")
    )
    assert isinstance(look.objective, LOOK)
    assert (look.objective.temperature, look.objective.neighbors) == (0.25, 5)
    assert len(look.objective.bank.labels) == 18
    assert cosine.momentum_encoder is None
    assert isinstance(cosine.objective, CosineSoftmax)
    assert cosine.objective.classifier.weight.shape == (3, 7)
    assert cosine.objective.classifier.temperature == 0.25


def test_steps_use_the_runs_rates_order_and_crops(trained: Trained) -> None:
    _, steps = trained
    assert [seen["rate"] for seen in steps] == pytest.approx(RATES, rel=1e-12)
    assert [seen["group_rates"] for seen in steps] == [{seen["rate"]} for seen in steps]
    assert {seen["clip_grad"] for seen in steps} == {9}
    source = build_run(CONFIG, ALONE).dataset.source
    for step, seen in enumerate(steps):
        keys = batch_keys(step)
        assert seen["indices"].tolist() == [index for _, index in keys]
        assert seen["labels"].tolist() == [index // 9 for _, index in keys]
        batch = MultiCropDataset(source, SPECS, seed=11).__getitems__(keys)
        for crops, expected in zip(seen["crops"], augment(batch), strict=True):
            assert torch.equal(crops, expected)


def test_metrics_are_those_of_the_steps(trained: Trained) -> None:
    folder, steps = trained
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == LOGGED
    for name in ("val_top1", "val_knn"):
        assert [line["step"] for line in lines if name in line] == [0, 8, 16, 20]
    # Accuracies of the first global crop, and of the last local one.
    first: list[float] = []
    last: list[float] = []
    for line, start in zip((line for line in lines if "loss" in line), [0, *LOGGED], strict=False):
        part = steps[start : line["step"]]
        assert line["learning_rate"] == pytest.approx(RATES[line["step"] - 1], rel=1e-12)
        assert line["loss"] == pytest.approx(sum(float(s["loss"]) for s in part) / len(part))
        for accuracies, rows in ((first, slice(6)), (last, slice(-6, None))):
            right = [(s["logits"][rows].argmax(1) == s["labels"]).sum().item() for s in part]
            accuracies.append(sum(right) / (6 * len(part)))
        assert line["accuracy"] == pytest.approx(first[-1])
    assert first != last


def test_checkpoints_come_every_so_many_minutes(trained: Trained) -> None:
    """A minute is three steps of 20 s, and the last two checkpoints are kept."""
    folder, steps = trained
    for done, seen in enumerate(steps):
        saved = [f"step_{step}.pt" for step in (3, 6, 9, 12, 15, 18) if step <= done]
        assert seen["files"] == set(saved[-2:])
    assert {p.name for p in checkpointing.list_checkpoints(folder)} == {"step_18.pt", "step_20.pt"}


def test_processes_have_separate_parts_of_a_batch_and_seeds(tmp_path: Path) -> None:
    seeds = {}
    short = replace(CONFIG, optim=replace(CONFIG.optim, epochs=2), validation=ValidationConfig())
    for rank in (0, 1):
        steps = train(replace(short, output=str(tmp_path / f"{rank}")), Process(rank, 2, CPU))
        assert len(steps) == 8
        for step, seen in enumerate(steps):
            own = batch_keys(step)[3 * rank : 3 * rank + 3]
            assert seen["indices"].tolist() == [index for _, index in own]
        seeds[rank] = [seen["seed"] for seen in steps]
        assert seeds[rank] == [
            int(np.random.SeedSequence((11, step, rank)).generate_state(1)[0]) for step in range(8)
        ]
    assert not {*seeds[0]} & {*seeds[1]}


def test_all_processes_start_from_the_weights_of_init_from(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only rank 0 reads the file; its broadcasts are replayed to rank 1."""
    folder, _ = trained
    config = replace(CONFIG, init_from=str(folder), output=str(tmp_path / "run"), seed=12)
    sent: list[bytes] = []

    def send(value: Any) -> Any:
        sent.append(pickle.dumps(value))
        return value

    monkeypatch.setattr(distributed, "broadcast", send)
    first = build_run(config, Process(0, 2, CPU)).method.state_dict()
    monkeypatch.setattr(distributed, "broadcast", lambda _: pickle.loads(sent.pop(0)))
    second = build_run(config, Process(1, 2, CPU)).method.state_dict()
    assert not sent
    assert_same_state(second, first)
    saved = checkpointing.load(checkpointing.list_checkpoints(folder)[-1])["method"]
    key = "encoder.backbone.conv1.0.weight"
    assert torch.equal(first[key], saved[key])
    # 20 batches of 6 in a bank of 18.
    assert second["objective.bank._extra_state"]["pointer"] == 12


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    config = replace(CONFIG, output=str(tmp_path / "run"))
    with setup_run(config, ALONE) as run:
        assert run.method.momentum_encoder is not None
        assert run.method.objective.bank is not None
        for tensor in (
            next(run.method.encoder.parameters()),
            next(run.method.momentum_encoder.parameters()),
            next(run.method.encoder.buffers()),
            run.method.objective.bank.embeddings,
        ):
            value = tensor.data[0].clone()
            tensor.data[0] = torch.nan
            with pytest.raises(ValueError, match="no longer finite after step 4 and were not sav"):
                run.save(4)
            tensor.data[0] = value
        assert not checkpointing.list_checkpoints(run.folder)
        run.save(4)
        assert [path.name for path in checkpointing.list_checkpoints(run.folder)] == ["step_4.pt"]
