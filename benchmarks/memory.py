"""Estimate the GPU memory of a training step by batch size and options, without a GPU.

    python -m benchmarks.memory                    # five minutes
    python -m benchmarks.memory --device cuda      # measured on a GPU instead

Two steps of the trainer run on fake tensors, which have shapes but no memory. Every storage counts
from its creation to its release, in the blocks of 512 bytes of CUDA's allocator. Not included are
the CUDA context, the workspaces of cuDNN and cuBLAS, and fragmentation. tf32 needs as much as fp32,
fp16 as much as bf16. As a check, a real step on the CPU is compared with the memory that the
profiler records for its allocator.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import measure
from trex_models.method.model import TReX
from trex_models.precision import Precision, PrecisionName
from trex_models.train import build, step
from trex_models.train.config import Config
from trex_models.train.recipes import RECIPES

_BLOCK = 512  # bytes; block size of CUDA's caching allocator
_GIB = 2**30
# Usable memory of a GPU: total minus _HELD_BYTES for driver, desktop and CUDA context, divided by
# _MARGIN for workspaces and fragmentation. Both are assumptions, not measurements.
_CARDS = (8, 12, 16, 24)
_VARIANTS: dict[str, tuple[PrecisionName, bool, int]] = {
    "fp32": ("fp32", False, 8),
    "fp32, recomputed": ("fp32", True, 8),
    "bf16": ("bf16", False, 8),
    "bf16, recomputed": ("bf16", True, 8),
    "bf16, 4 local crops": ("bf16", False, 4),
    "bf16, 4 local crops, recomputed": ("bf16", True, 4),
}
_HELD_BYTES = _GIB
_MARGIN = 1.15


class Ledger(TorchDispatchMode):
    """Counter of the bytes of all live storages that operators allocate.

    Attributes:
        live: Current number of bytes.
        peak: Maximum of ``live``.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count its results."""
        del types
        result = func(*args, **(kwargs or {}))
        self.enter(*(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)))
        return result

    def enter(self, *tensors: Tensor) -> None:
        """Count the storages of tensors, unless they are already counted."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata in self._known:
                continue
            size = -(-storage.nbytes() // _BLOCK) * _BLOCK
            self._known.add(storage._cdata)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._leave, storage._cdata, size)

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def account(config: Config, classes: int, batch: int) -> dict[str, int]:
    """Compute the bytes of a step on fake tensors, by category."""
    fake, method = FakeTensorMode(), _method(config, classes, "cpu")
    with FakeCopyMode(fake):
        method = copy.deepcopy(method)
    with fake, Ledger() as ledger:
        ledger.enter(*method.parameters(), *method.buffers())
        return _two_steps(config, method, batch, "cpu", lambda: ledger.live, lambda: ledger.peak)


def measured_on_cuda(config: Config, classes: int, batch: int) -> dict[str, int]:
    """Measure the bytes of a real step with CUDA's allocator, by category."""
    torch.cuda.empty_cache()  # otherwise, `reserved` includes that of the previous row
    torch.cuda.reset_peak_memory_stats()
    row = _two_steps(
        config,
        _method(config, classes, "cuda"),
        batch,
        "cuda",
        torch.cuda.memory_allocated,
        torch.cuda.max_memory_allocated,
    )
    return row | {"reserved": torch.cuda.max_memory_reserved()}


def measured_on_cpu(config: Config, classes: int, batch: int) -> int:
    """Return the peak bytes of real steps on the CPU, recorded by the profiler."""
    method = _method(config, classes, "cpu")
    optimizer, inputs = _parts(config, method, batch, "cpu")
    held = _size([*method.parameters(), *method.buffers(), *inputs[0]])
    precision = Precision.from_name(config.precision, "cpu")
    with profile(
        activities=[ProfilerActivity.CPU], acc_events=True, profile_memory=True
    ) as profiled:
        for _ in range(2):
            step.training_step(method, method, optimizer, precision, *inputs, 0.1)
    recorded: Any = profiled.profiler
    events = recorded.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return held + max(itertools.accumulate(changes))


def fits(rows: Sequence[Mapping[str, Any]], cards: Sequence[int] = _CARDS) -> list[dict[str, Any]]:
    """Return the largest batch size, a multiple of 8, that fits each GPU for each variant."""
    found = []
    for name in dict.fromkeys(row["options"] for row in rows):
        first, *_, last = (row for row in rows if row["options"] == name)
        per_image = (last["peak"] - first["peak"]) / (last["batch"] - first["batch"])
        fixed = first["peak"] - per_image * first["batch"]
        batches = {
            f"{card} GB": int(((card * _GIB - _HELD_BYTES) / _MARGIN - fixed) / per_image) // 8 * 8
            for card in cards
        }
        sizes = {"fixed": round(fixed), "per_image": round(per_image)}
        found.append({"options": name, **sizes, "batch": batches})
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = _options(arguments)
    measure_row = measured_on_cuda if options.device == "cuda" else account
    config = _config(options)
    rows: list[dict[str, Any]] = []
    for name in options.options:
        precision, checkpoint, local_crops = _VARIANTS[name]
        variant = replace(
            config,
            precision=precision,
            crops=replace(config.crops, local_crops=local_crops),
            system=replace(config.system, checkpoint_activations=checkpoint),
        )
        for batch in options.batches:
            sizes = measure_row(variant, options.classes, batch)
            per_image = {
                "peak_per_image": round(sizes["peak"] / batch),
                "activations_per_image": round(sizes["activations"] / batch),
            }
            row = {"options": name, "local_crops": local_crops, "batch": batch}
            rows.append(row | sizes | per_image)
            print(
                f"{name:31} batch {batch:3d}: peak {sizes['peak'] / _GIB:6.2f} GiB, including "
                f"activations {sizes['activations'] / _GIB:6.2f} GiB, "
                f"{per_image['activations_per_image'] / 1e6:.1f} MB per image",
                flush=True,
            )
    result: dict[str, Any] = {
        "machine": measure.machine(options.device),
        "how": "measured on a GPU" if options.device == "cuda" else "accounting; no GPU measured",
        "backbone": options.backbone,
        "peaks": {f"{row['options']}, batch {row['batch']}, bytes": row["peak"] for row in rows},
        "rows": rows,
        "fits": fits(rows),
    }
    for fit in result["fits"]:
        batches = ", ".join(f"{card}: {batch}" for card, batch in fit["batch"].items())
        print(f"{fit['options']:31} largest batch {batches}")
    if options.device == "cpu":
        result["check"] = _check(replace(config, precision="fp32"), options)
    measure.record(options.out, result)


def _check(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """Compare the computed peak with that of real steps on the CPU in float32."""
    batch = options.check_batch
    counted = account(config, options.classes, batch)["peak"]
    seen = measured_on_cpu(config, options.classes, batch)
    print(
        f"check, float32 on the CPU, batch {batch}: counted {counted / 1e6:.1f} MB, allocated "
        f"{seen / 1e6:.1f} MB, ratio {counted / seen:.4f}"
    )
    return {"batch": batch, "counted": counted, "allocated": seen, "ratio": counted / seen}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = measure.parser("memory", __doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--options", nargs="+", choices=_VARIANTS, default=tuple(_VARIANTS))
    parser.add_argument("--batches", type=int, nargs="+", default=(16, 32, 64, 128, 256))
    parser.add_argument("--check-batch", type=int, default=4, help="batch size of the CPU check")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--sizes", type=int, nargs=2, default=(224, 96), help="crop sizes, pixels")
    parser.add_argument("--hidden-dim", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--bank", type=int, default=8192)
    return parser.parse_args(arguments)


def _config(options: argparse.Namespace) -> Config:
    config = RECIPES["trex"]("")
    global_size, local_size = options.sizes
    return replace(
        config,
        crops=replace(config.crops, global_size=global_size, local_size=local_size),
        model=replace(config.model, backbone=options.backbone, hidden_dim=options.hidden_dim),
        objective=replace(config.objective, bank_size=options.bank),
    )


def _method(config: Config, classes: int, device: str) -> TReX:
    method = build.build_method(config, classes).train()
    return method.to(device).to(memory_format=torch.channels_last)


def _parts(
    config: Config, method: TReX, batch: int, device: str
) -> tuple[torch.optim.Optimizer, tuple[list[Tensor], Tensor, Tensor]]:
    optimizer = build.build_optimizer(config.optim, method)
    crops = [
        torch.zeros(spec.count * batch, 3, spec.size, spec.size, device=device).to(
            memory_format=torch.channels_last
        )
        for spec in build.crop_specs(config.crops)
    ]
    labels, indices = torch.zeros(2, batch, dtype=torch.int64, device=device)
    return optimizer, (crops, labels, indices)


def _two_steps(
    config: Config,
    method: TReX,
    batch: int,
    device: str,
    live: Callable[[], int],
    peak: Callable[[], int],
) -> dict[str, int]:
    """Run two steps, since the first allocates the optimizer state; return bytes by category."""
    optimizer, inputs = _parts(config, method, batch, device)
    precision = Precision.from_name(config.precision, device)
    trained = [p for p in method.parameters() if p.requires_grad]
    after_forward = []

    def read_later(scalar: Tensor) -> Callable[[], float]:
        """Record the memory where the step reads the loss, right after the forward pass."""
        del scalar
        after_forward.append(live())
        return float

    with mock.patch.object(step, "_read_later", read_later):
        for _ in range(2):
            before = live()
            step.training_step(method, method, optimizer, precision, *inputs, 0.1)
    own = {
        "parameters": _size(trained),
        "gradients": _size(p.grad for p in trained if p.grad is not None),
        "optimizer": _size(
            v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)
        ),
        "inputs": _size(inputs[0]),
    }
    everything = _size([*method.parameters(), *method.buffers()])
    return {
        **own,
        "averages": everything - own["parameters"],
        "activations": after_forward[-1] - before,
        "peak": peak(),
    }


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


if __name__ == "__main__":
    main()
