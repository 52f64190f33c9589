"""Compare the speed of the training step with a reference (`benchmarks.reference_step`).

    python -m benchmarks.step                                        # bf16 on the CPU, 3 minutes
    python -m benchmarks.step --device cuda --batch 256 --steps 20 --also nchw compile

Both use the same crops, labels and sizes (recipe trex: 1 x 224 and 8 x 96 pixels, three hidden
layers, 1000 classes, a memory bank of 8192). The inputs are already on the device, so loading and
augmentation are not included. `ratio` is the reference's time divided by ours, median over the
rounds. A profile then lists the time of both by kind of operator. `--losses N` also trains for N
steps in each precision, from equal weights and on equal batches, and compares the losses.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure
from benchmarks import reference_step as reference
from trex_models.distributed import Process
from trex_models.precision import Precision, PrecisionName
from trex_models.train import build
from trex_models.train.config import Config, ModelConfig, ObjectiveConfig
from trex_models.train.reporting import Meter
from trex_models.train.step import training_step

_DTYPES: dict[str, tuple[torch.dtype, PrecisionName]] = {
    "float32": (torch.float32, "fp32"),
    "bfloat16": (torch.bfloat16, "bf16"),
    "float16": (torch.float16, "fp16"),
}
_VARIANTS = ("nchw", "compile", "unfused", "recomputed")
_RATE = 0.05
_CROPS = (1, 8)  # global and local
# Kind -> substrings of operator names; the first match counts.
_KINDS = {
    "convolution": ("convolution", "conv_depthwise", "cudnn_conv", "mkldnn_conv"),
    "batch norm": ("batch_norm",),
    "matrix products": ("addmm", "mm", "linear", "matmul"),
    "optimizer": ("sgd",),
    "foreach operations": ("foreach", "lerp"),
    "activation, sum, pooling": ("relu", "threshold", "gelu", "add", "pool", "mean"),
    "casts and copies": ("copy", "_to_copy", "cat", "clone", "fill", "zero"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = _options(arguments)
    device = torch.device(options.device)
    crops, labels, indices = _inputs(options, device)
    last = [images.contiguous(memory_format=torch.channels_last) for images in crops]
    ours, theirs = our_step(options, device), reference_step(options, device)
    steps: dict[str, Callable[[], object]] = {
        "ours": lambda: ours(last, labels, indices),
        "reference": lambda: theirs(crops, labels),
    }
    for name in options.also:
        given = crops if name == "nchw" else last
        steps[name] = partial(our_step(options, device, name), given, labels, indices)
    rounds = {name: partial(_several, step, options.steps) for name, step in steps.items()}
    timed = {name: partial(measure.seconds, work, device) for name, work in rounds.items()}
    seconds = measure.alternate(timed, options.rounds)
    machine = measure.machine(options.device)
    result: dict[str, Any] = {
        "machine": machine,
        "batch": options.batch,
        "dtype": options.dtype,
        "reference_dtype": options.reference_dtype or options.dtype,
        "backbone": options.backbone,
        "steps_per_round": options.steps,
        "images_per_second": {
            name: measure.spread([options.batch * options.steps / t for t in times])
            for name, times in seconds.items()
        },
        "ratios": {
            name: measure.ratios(seconds["reference"], times) for name, times in seconds.items()
        },
    }
    result["ratio"] = result["ratios"]["ours"]["median"]
    print(f"{machine['processor']} ({machine['instructions']}), {machine.get('device', 'CPU')}")
    for name in seconds:
        rate, ratio = result["images_per_second"][name], result["ratios"][name]
        spreads = measure.format_spread(rate, " images/s"), measure.format_spread(ratio)
        print(f"{name:10} {spreads[0]}, ratio {spreads[1]}")
    if options.losses:
        result |= compare_losses(options, device)
    measure.record(options.out, result)  # in case that the profiler fails
    for name in ("ours", "reference"):
        result[f"profile_{name}"] = shares = _profile(steps[name], device)
        print(f"time of {name}: " + ", ".join(f"{kind} {s:.0%}" for kind, s in shares.items()))
    measure.record(options.out, result)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a training step."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16, help="images per step")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1, help="steps per measurement")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="dtype of autocast")
    parser.add_argument("--reference-dtype", choices=_DTYPES, help="default: same as --dtype")
    parser.add_argument("--backbone", default="resnet50", help="ResNet of torchvision and timm")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--bank", type=int, default=8192)
    parser.add_argument("--hidden-dim", type=int, default=2048)


def our_step(
    options: argparse.Namespace, device: torch.device, variant: str = ""
) -> Callable[[Sequence[Tensor], Tensor, Tensor], Tensor]:
    """Return a function of crops, labels and indices that runs a step as `train.loop` does."""
    config = _config(options)
    system = replace(config.system, checkpoint_activations=variant == "recomputed")
    method = build.build_method(replace(config, system=system), options.classes).train().to(device)
    if variant != "nchw":
        method.to(memory_format=torch.channels_last)
    if variant == "compile":
        method.encoder.compile()
    optimizer = build.build_optimizer(config.optim, method)
    if variant == "unfused":
        optimizer = torch.optim.SGD([g | {"fused": None} for g in optimizer.param_groups], lr=_RATE)
    precision = Precision.from_name(_DTYPES[options.dtype][1], device.type)
    precision.apply()
    meter = Meter(Process(0, 1, device))

    def step(crops: Sequence[Tensor], labels: Tensor, indices: Tensor) -> Tensor:
        loss, logits = training_step(
            method, method, optimizer, precision, crops, labels, indices, _RATE
        )
        meter.update(loss, logits[: len(labels)], labels)
        return loss

    return step


def compare_losses(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Train in each precision; return the losses and their mean difference relative to float32."""
    losses, differences = {}, {}
    for dtype in (name for name in _DTYPES if device.type == "cuda" or name != "float16"):
        step = our_step(argparse.Namespace(**vars(options) | {"dtype": dtype}), device)
        crops, labels, indices = _inputs(options, device)  # seeds the noise, too
        noisy = ([c + torch.randn_like(c) for c in crops] for _ in range(options.losses))
        losses[dtype] = [step(images, labels, indices).item() for images in noisy]
        pairs = zip(losses[dtype], losses["float32"], strict=True)
        differences[dtype] = sum(abs(a / b - 1) for a, b in pairs) / options.losses
    return {"losses": losses, "loss_differences": differences}


def reference_step(
    options: argparse.Namespace, device: torch.device
) -> Callable[[Sequence[Tensor], Tensor], tuple[float, float]]:
    """Return a function of crops and labels that runs the reference's step."""
    model = _config(options).model
    encoder = reference.Encoder(
        model.backbone, model.hidden_layers, model.hidden_dim, model.embedding_dim
    )
    dtype = _DTYPES[options.reference_dtype or options.dtype][0]
    return reference.Step(
        encoder.train().to(device), options.classes, options.bank, model.embedding_dim, dtype
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = measure.parser("step", __doc__)
    add_options(parser)
    parser.add_argument("--sizes", type=int, nargs=2, default=(224, 96), help="crop sizes, pixels")
    parser.add_argument("--also", nargs="*", choices=_VARIANTS, default=(), help="further variants")
    parser.add_argument("--losses", type=int, default=0, help="training steps in each precision")
    return parser.parse_args(arguments)


def _config(options: argparse.Namespace) -> Config:
    return Config(
        output="",
        model=ModelConfig(backbone=options.backbone, hidden_dim=options.hidden_dim),
        objective=ObjectiveConfig(bank_size=options.bank),
    )


def _inputs(
    options: argparse.Namespace, device: torch.device
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return random crops, labels and indices."""
    torch.manual_seed(0)
    crops = [
        torch.randn(count * options.batch, 3, size, size, device=device)
        for count, size in zip(_CROPS, options.sizes, strict=True)
    ]
    labels = torch.randint(options.classes, (options.batch,), device=device)
    return crops, labels, torch.arange(options.batch, device=device)


def _several(step: Callable[[], object], count: int) -> None:
    for _ in range(count):
        step()


def _profile(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Return fractions of the device's time by kind of operator, in descending order."""
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities, acc_events=True) as recorded:
        step()
        measure.wait(device)
    spent: dict[str, float] = {}
    for event in recorded.key_averages():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel, whose time also counts for the operator that started it
        kind = next(
            (kind for kind, parts in _KINDS.items() if any(p in event.key.lower() for p in parts)),
            "other",
        )
        own = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        spent[kind] = spent.get(kind, 0.0) + own
    total = sum(spent.values())
    shares = {kind: round(time / total, 4) for kind, time in spent.items()}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


if __name__ == "__main__":
    main()
