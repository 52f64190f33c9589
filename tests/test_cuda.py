"""Training on CUDA: two processes and one, resume, asynchronous steps, non-finite losses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models import batch, make_bank
from tests.runs import TINY, assert_same_state, last_state, logged, run
from trex_models.data.loading import to_device
from trex_models.data.multicrop import MultiCropDataset, augment
from trex_models.data.sources import ArraySource
from trex_models.distributed import Process
from trex_models.method.objectives import LOOK
from trex_models.method.optimizer import build_optimizer
from trex_models.precision import Precision, PrecisionName
from trex_models.train import build, checkpointing, export
from trex_models.train.config import Config, CropsConfig, ModelConfig
from trex_models.train.reporting import Meter
from trex_models.train.step import training_step

pytestmark = pytest.mark.cuda

STEP = Config(
    output="",
    crops=CropsConfig(global_size=64, local_crops=2, local_size=32),
    model=ModelConfig(backbone="resnet18", hidden_layers=1, hidden_dim=32, embedding_dim=16),
)
CUDA = ["--system.device", "cuda:0", "--system.save-steps", "3"]


def assert_close_runs(a: Path, b: Path) -> None:
    one, two = last_state(a)["method"], last_state(b)["method"]
    assert one.keys() == two.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(two[key], value, rtol=2e-3, atol=2e-4, msg=key)
        else:
            assert_same_state(two[key], value, key)
    for line, other in zip(logged(a), logged(b), strict=True):
        assert other == pytest.approx(line, rel=1e-3)


def test_two_synchronized_processes_equal_one_of_the_double_batch(tmp_path: Path) -> None:
    """Both processes use the same GPU, which nccl does not support: with gloo."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "-m", "trex_models.train", "smoke", *TINY, *CUDA]
    command += ["--precision", "fp32", "--system.backend", "gloo"]
    output = ["--output", str(tmp_path / "two")]
    subprocess.run([*command, *output], check=True, env=os.environ, timeout=600)
    assert run(tmp_path / "one", *CUDA, "--precision", "fp32") == 0
    assert_close_runs(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "auto"])
def test_resumed_run_ends_like_an_uninterrupted_one(tmp_path: Path, precision: str) -> None:
    """Equal up to rounding, as the order of atomic additions varies on CUDA."""
    options = [*CUDA, "--precision", precision]
    assert run(tmp_path / "whole", *options) == 0
    config = json.loads((tmp_path / "whole/config.json").read_text())
    assert config["precision"] == precision.replace("auto", "bf16")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    checkpointing.list_checkpoints(tmp_path / "cut")[-1].unlink()
    assert run(tmp_path / "cut", *options) == 0
    assert logged(tmp_path / "cut")[-1]["loss"] == pytest.approx(
        logged(tmp_path / "whole")[-1]["loss"], rel=0.05
    )
    assert last_state(tmp_path / "cut")["scaler"] == last_state(tmp_path / "whole")["scaler"]


def test_step_that_diverged_is_kept(tmp_path: Path) -> None:
    assert run(tmp_path / "run", *CUDA, "--precision", "fp16", "--optim.base-lr", "1e30") == 2
    (path,) = (tmp_path / "run").glob("nonfinite_step_*.pt")
    method, inputs, precision = export.load_step(path)
    assert inputs[0][0].is_cuda
    with precision.autocast():
        loss, _ = method(*inputs)
    assert not loss.isfinite()


@pytest.mark.parametrize("objective", ["look", "cosine", "softmax"])
def test_every_objective_with_its_validation(tmp_path: Path, objective: str) -> None:
    validation = ["--validation.images-per-class", "4", "--validation.neighbors", "3"]
    options = ["--objective.name", objective, "--precision", "bf16", *validation]
    assert run(tmp_path / "run", *CUDA, *options) == 0
    last = logged(tmp_path / "run")[-1]
    assert 0 < last["loss"] < 10
    assert {"val_top1", "val_top5", "val_knn"} <= last.keys()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_distillation_with_adamw_and_clipping(tmp_path: Path, precision: str) -> None:
    """The loss falls: gradients are unscaled before they are clipped."""
    assert run(tmp_path / "teacher", *CUDA) == 0
    optimizer = ["--optim.name", "adamw", "--optim.base-lr", "0.03", "--optim.clip-grad", "0.1"]
    options = ["--objective.name", "distill", "--objective.teacher", str(tmp_path / "teacher")]
    options += ["--precision", precision, "--optim.epochs", "20"]
    assert run(tmp_path / "student", *CUDA, *optimizer, *options) == 0
    trained = [line for line in logged(tmp_path / "student") if "cosine" in line]
    assert trained[-1]["loss"] < trained[1]["loss"]
    assert {"val_rank"} == {name for name in trained[-1] if name.startswith("val_")}


def test_look_is_that_of_the_cpu() -> None:
    """The scores are float32 without TF32, also under autocast."""
    bank, (z, labels, indices) = make_bank().float(), batch()
    expected, votes = LOOK(bank, 0.1, 7)(z.float(), labels, indices)
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.autocast("cuda", torch.bfloat16):
        loss, on_cuda = LOOK(bank.cuda(), 0.1, 7)(z.float().cuda(), labels.cuda(), indices.cuda())
    torch.testing.assert_close(loss.cpu(), expected)
    torch.testing.assert_close(on_cuda.cpu(), votes)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_no_step_waits_for_the_device(precision: PrecisionName) -> None:
    """Nothing else waits for the device; the event after the loss is not waited for here."""
    device = torch.device("cuda:0")
    method = build.build_method(STEP, 5).train().to(device)
    method.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(method)
    types = Precision.from_name(precision, "cuda")
    meter = Meter(Process(0, 1, device))
    source = ArraySource(np.full((8, 60, 80, 3), 90, np.uint8), np.arange(8) % 5, list("abcde"))
    dataset = MultiCropDataset(source, build.crop_specs(STEP.crops), 0)
    try:
        for number in range(6):
            pinned = dataset.__getitems__([(number, index) for index in range(8)]).pin_memory()
            torch.cuda.set_sync_debug_mode("error" if number > 2 else "default")
            crops = augment(pinned, device)
            labels, indices = to_device([pinned.labels, pinned.indices], device)
            loss, logits = training_step(
                method, method, optimizer, types, crops, labels, indices, 0.01
            )
            meter.update(loss, logits[: len(labels)], labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0 < meter.read()["loss"] < 10


def test_copies_on_a_separate_stream_are_complete() -> None:
    device = torch.device("cuda:0")
    busy = torch.randn(4096, 4096, device=device)
    sums = []
    for number in range(50):
        pinned = torch.full((1 << 22,), number % 200, dtype=torch.uint8).pin_memory()
        for _ in range(3):
            busy = (busy @ busy).clamp(-1, 1)
        (copy,) = to_device([pinned], device)
        sums.append(copy.long().sum())
        del copy, pinned  # so that the next ones may use their memory
    assert [int(s) for s in sums] == [(number % 200) << 22 for number in range(50)]
