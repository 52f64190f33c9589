"""Replay a recorded training trajectory of the official implementation on our modules.

    python -m tests.golden FILE

Prints the error of every recorded quantity, max|ours - recorded| / max|recorded| over all of
its numbers in a case, and exits with status 1 if one exceeds 1e-6. Everything random is a
function of a name (``draw``), so the file holds results alone; tests/data/README.md describes
the format. Runs in float64 on one CPU thread in the default memory format: deep networks
amplify rounding, about thirty-fold a step for a ResNet-50 with random weights.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from torch import Tensor, nn

from tests.processes import spawn
from trex_models.distributed import Process, data_parallel, process_group
from trex_models.heads import Projector
from trex_models.method.bank import MemoryBank
from trex_models.method.model import Encoder, TReX
from trex_models.method.objectives import CosineSoftmax, Objective, OnlineClassMeans
from trex_models.method.optimizer import build_optimizer, learning_rates
from trex_models.precision import Precision
from trex_models.train.step import training_step

LIMIT = 1e-6
ALONE = Process(0, 1, torch.device("cpu"))
SGD_MOMENTUM = 0.9
FINAL_LR = 1e-6


def draw(name: str, *shape: int) -> Tensor:
    """Standard normal numbers that are a function of a name, float64."""
    return torch.randn(*shape, generator=_generator(name), dtype=torch.float64)


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def build_method(case: dict[str, Any]) -> TReX:
    """Build the method of a case, with its initial values, in float64."""
    backbone = timm.create_model(case["arch"], num_classes=0, zero_init_last=False)
    projector = Projector(
        cast("int", backbone.num_features),
        case["hidden_layers"],
        case["hidden_dim"],
        case["bottleneck_dim"],
    )
    encoder = Encoder(backbone, projector).double()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if parameter.ndim > 1:
                scale = math.sqrt(2 / parameter[0].numel())
                parameter.copy_(draw(official_name(name), *parameter.shape) * scale)
    return TReX(encoder, build_objective(case), case["ema_momentum"])


def official_name(name: str) -> str:
    """Translate a parameter name of ours into the one that the draws are seeded with."""
    part, _, rest = name.partition(".")
    return {"backbone": "encoder.", "projector": "head.layers."}[part] + rest


def build_objective(case: dict[str, Any]) -> Objective:
    """Build the objective of a case: learned weights where it has no memory."""
    num_classes, dim, size = case["num_classes"], case["bottleneck_dim"], case["memory_size"]
    if size == 0:
        cosine = CosineSoftmax(dim, num_classes, case["tau"]).double()
        with torch.no_grad():
            cosine.classifier.weight.copy_(draw("clf.fc.weight", num_classes, dim))
        return cosine
    bank = MemoryBank(size, dim, num_classes, torch.float64)
    bank.embeddings.copy_(draw("memory.features", size, dim))
    bank.labels.copy_(torch.arange(size) % num_classes)
    return OnlineClassMeans(bank, case["tau"])


def step_inputs(
    case: dict[str, Any], step: int, rank: int, world_size: int
) -> tuple[list[Tensor], Tensor]:
    """Return this rank's crops, one tensor a resolution, and its labels."""
    batch = case["batch_size"] * world_size
    own = slice(rank * case["batch_size"], (rank + 1) * case["batch_size"])
    crops = []
    for kind in ("global", "local"):
        side = case[f"{kind}_size"]
        views = [
            draw(f"step{step}.{kind}{j}", batch, 3, side, side)[own]
            for j in range(case[f"{kind}_crops"])
        ]
        crops += [torch.cat(views)] if views else []
    generator = _generator(f"step{step}.label")
    return crops, torch.randint(0, case["num_classes"], (batch,), generator=generator)[own]


def replay(case: dict[str, Any], process: Process = ALONE) -> dict[str, Any]:
    """Train through a case and return what the file records of it, of this rank."""
    rank, world_size = process.rank, process.world_size
    method = build_method(case)
    model = data_parallel(method, process, sync_batchnorm=False)
    optimizer = build_optimizer(method, momentum=SGD_MOMENTUM, weight_decay=case["weight_decay"])
    precision = Precision.from_name("fp32", "cpu")
    rates = learning_rates(
        peak=case["lr"] * case["batch_size"] * world_size / 256,
        final=FINAL_LR,
        warmup_steps=case["warmup_epochs"] * case["steps_per_epoch"],
        total_steps=case["epochs"] * case["steps_per_epoch"],
    )
    bank = method.objective.bank
    seen: dict[str, Any] = {
        "lr": rates.tolist(),
        **{name: [] for name in ("loss", "logits_abs_sum", "ptr", "prototype_abs_sum")},
    }
    for step, rate in enumerate(rates):
        crops, labels = step_inputs(case, step, rank, world_size)
        indices = torch.arange(len(labels))  # no matter: no recorded objective looks at them
        loss, logits = training_step(
            model, method, optimizer, precision, crops, labels, indices, float(rate)
        )
        seen["loss"].append(loss.item())
        seen["logits_abs_sum"].append(logits.abs().sum().item())
        if bank is not None:
            seen["ptr"].append(bank.pointer)
            seen["prototype_abs_sum"].append(bank.class_means().abs().sum().item())
    return seen | evaluate(method, case)


@torch.no_grad()
def evaluate(method: TReX, case: dict[str, Any]) -> dict[str, Any]:
    """Return what the file records at the end of a case, in eval mode."""
    method.eval()
    side = case["global_size"]
    features = method.encoder.backbone(draw("eval.image", 3, 3, side, side))
    seen: dict[str, Any] = {
        "eval_logits": method.objective.logits(method.encoder.projector(features)).tolist(),
        "eval_features_abs_sum": features.abs().sum().item(),
        "param_abs_sum": parameter_sum(method.encoder),
        "bn_running_mean_abs_sum": running_mean_sum(method.encoder),
    }
    if method.momentum_encoder is not None:
        seen["ema_param_abs_sum"] = parameter_sum(method.momentum_encoder)
        seen["ema_bn_running_mean_abs_sum"] = running_mean_sum(method.momentum_encoder)
    return seen


def parameter_sum(module: nn.Module) -> float:
    return sum(p.abs().sum().item() for p in module.parameters())


def running_mean_sum(module: nn.Module) -> float:
    return sum(
        b.abs().sum().item() for name, b in module.named_buffers() if name.endswith("running_mean")
    )


def replay_ranks(case: dict[str, Any], world_size: int) -> dict[str, Any]:
    """Replay a case on that many gloo processes; return what rank 0 saw."""
    with tempfile.TemporaryDirectory() as folder:
        seen: dict[str, Any] = spawn(partial(_replay_rank, case), world_size, Path(folder))[0]
    return seen


def _replay_rank(case: dict[str, Any], _: Path) -> dict[str, Any]:
    with process_group("cpu") as process:
        return replay(case, process)


def error(ours: Any, recorded: Any) -> float:
    """Return max|ours - recorded| / max|recorded|; infinite where shapes or finiteness differ."""
    if ours is None:
        return math.inf
    a, b = np.asarray(ours), np.asarray(recorded)
    if a.shape != b.shape or b.dtype.kind not in "iuf":
        return math.inf
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.inf
    difference, scale = np.abs(a - b).max(initial=0), np.abs(b).max(initial=0)
    return float(difference / scale) if scale else float(difference)


def compare(entry: dict[str, Any]) -> dict[str, float]:
    """Replay an entry of a trajectory file; return the error of each quantity in it."""
    case, world_size = entry["case"], entry["world_size"]
    seen = replay(case) if world_size == 1 else replay_ranks(case, world_size)
    return {
        name: error(seen.get(name), recorded)
        for name, recorded in entry.items()
        if name not in ("case", "world_size")
    }


def main(path: str) -> int:
    torch.set_num_threads(1)
    worst = 0.0
    for entry in json.loads(Path(path).read_text()):
        case = entry["case"]
        print(f"{case.get('name', 'case')}: {case['arch']}, world size {entry['world_size']}")
        for name, value in compare(entry).items():
            print(f"  {name:<30} {value:.2e}{'' if value <= LIMIT else '  TOO LARGE'}", flush=True)
            worst = max(worst, value)
    print(f"largest error {worst:.2e}, limit {LIMIT:g}: {'ok' if worst <= LIMIT else 'FAILED'}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
