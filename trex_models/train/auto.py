"""Settings of the recipe ``auto``, chosen from the dataset and the machine.

docs/pretraining.md has the measurements behind the rules. A field that is set on the command line
keeps its value, and the later rules use it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from trex_models.data.decode import UnreadableImageError
from trex_models.data.sources import Source, spread_indices
from trex_models.method.backbone import build_backbone
from trex_models.precision import choose_device
from trex_models.train import build
from trex_models.train.config import Config

_SAMPLES = 64  # images whose size is read
_MANY_IMAGES = 500_000  # from here on the paper's settings, which are for 1.28 million images
_FEW_STEPS = 20_000  # below, a projector and local crops do not pay (measured up to 5,900)
_CPU_CROP = 64  # largest global crop on a CPU, in pixels
_BYTES_PER_PIXEL = 890  # of the crops in a step of ResNet-50 in bf16 (docs/memory.md)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Properties of the dataset and the machine on which the choices depend."""

    images: int
    classes: int
    side: int  # median of the images' shorter sides, in pixels
    processes: int = 1
    memory: int = 0  # of the GPU of each process, in bytes; 0 on a CPU

    @classmethod
    def of(cls, source: Source, config: Config) -> Facts:
        """Read some images of a source; raise a ValueError if one is unreadable."""
        skipped = [UnreadableImageError] * config.data.skips_unreadable
        sides = list[int]()
        for index in spread_indices(source, _SAMPLES):
            with suppress(*skipped):
                sides.append(min(source.read(index).shape[:2]))
        chosen = choose_device(config.system.device)
        return cls(
            images=len(source),
            classes=len(source.classes),
            side=int(np.median(sides or [224])),  # no readable sample is an error later
            processes=int(os.environ.get("WORLD_SIZE", "1")),
            memory=torch.cuda.mem_get_info(chosen)[1] if chosen.type == "cuda" else 0,
        )


class _Choices:
    """A configuration whose fields are chosen one after the other, unless they are ``given``."""

    def __init__(self, config: Config, given: Set[str], log: Callable[[str], object]) -> None:
        self.config, self.given, self.log = config, given, log

    def steps(self, facts: Facts) -> int:
        """Return the number of steps of the run."""
        return self.config.optim.epochs * (facts.images // self.config.optim.batch_size)

    def choose(self, field: str, value: Any, reason: str) -> None:
        """Set a field, unless it is given, and log its value and the reason."""
        section, name = field.split(".")
        part = getattr(self.config, section)
        if field in self.given:
            value, reason = getattr(part, name), "as given"
        self.config = replace(self.config, **{section: replace(part, **{name: value})})
        self.log(f"  --{field.replace('_', '-')} {value}: {reason}")


def choose(config: Config, arguments: Sequence[str], log: Callable[[str], object]) -> Config:
    """Choose the settings that the command line's ``arguments`` do not set.

    ``log`` receives a line with the value and the reason of each choice.

    Raises:
        ValueError: The dataset or the backbone cannot be opened, or an image cannot be read.
    """
    options = (text.partition("=")[0] for text in arguments if text.startswith("--"))
    given = {option[2:].replace("-", "_") for option in options}
    facts = Facts.of(build.open_source(config.data), config)
    log(f"auto: {facts.images:,} images of {facts.classes:,} classes, {facts.side} pixels")
    choices = _Choices(config, given, log)
    for rule in (_crop_sizes, _schedule, _objective, _optimizer, _bank):
        rule(choices, facts)
    validation = config.validation
    if validation.path or validation.split or validation.images_per_class:
        choices.choose("validation.neighbors", 20, "compares features with the starting weights")
    crops = choices.config.crops
    for kind, part in (("global", crops.global_augmentation), ("local", crops.local_augmentation)):
        log(f"  --crops.{kind}-augmentation.flip {part.flip:g}: set 0 for text, signs or anatomy")
    return choices.config


def _crop_sizes(choices: _Choices, facts: Facts) -> None:
    size = 32 * min(max(round(0.8 * facts.side / 32), 1), 7)
    reason = "about 0.8 times the side of the images, at most 224"
    if not facts.memory and size > _CPU_CROP:
        size, reason = _CPU_CROP, "on a CPU, larger crops take hours"
    choices.choose("crops.global_size", size, reason)
    size = 16 * max(round(choices.config.crops.global_size * 3 / 112), 1)
    choices.choose("crops.local_size", size, "3/7 of a global crop, as in the paper")


def _schedule(choices: _Choices, facts: Facts) -> None:
    size = _power_of_two(facts.images / 50, 32, 256)
    reason = f"{facts.images // size:,} steps per epoch; from 32 to 256"
    if facts.memory:
        crops = choices.config.crops
        pixels = crops.global_crops * crops.global_size**2 + crops.local_crops * crops.local_size**2
        fits = facts.processes * 0.8 * (facts.memory - 1e9) / (_BYTES_PER_PIXEL * pixels)
        if fits < size:
            size, reason = _power_of_two(fits / 2**0.5, 8, 256), "more may not fit on the GPU"
    # A multiple of the number of processes, and no more than there are images.
    size = min(-(-size // facts.processes), facts.images // facts.processes) * facts.processes
    choices.choose("optim.batch_size", size, reason)
    epochs = min(300, 100 * (1_281_167 / facts.images) ** 0.25)
    reason = "100 for ImageNet, up to 300 for fewer images"
    if not facts.memory:
        epochs, reason = epochs / 3, "a third of those for a GPU"
    choices.choose("optim.epochs", round(epochs), reason)
    epochs = choices.config.optim.epochs
    choices.choose("optim.warmup_epochs", min(epochs, max(1, epochs // 20)), "5 % of the epochs")


def _objective(choices: _Choices, facts: Facts) -> None:
    steps, is_large = choices.steps(facts), facts.images >= _MANY_IMAGES
    is_short = steps < _FEW_STEPS
    short = f"{steps:,} steps, {'fewer than' if is_short else 'at least'} {_FEW_STEPS:,}"
    large = f"{facts.images:,} images, {'at least' if is_large else 'fewer than'} {_MANY_IMAGES:,}"
    name, reason = ("ocm", f"class means, for {large}") if is_large else ("cosine", large)
    if is_short:
        name, reason = "softmax", short
    choices.choose("objective.name", name, reason)
    if choices.config.objective.name == "softmax":
        choices.choose("model.projector", "none", "learned class weights on the features")
    else:
        choices.choose("model.hidden_layers", 3 if is_large else 1, large)
    is_small = choices.config.crops.global_size <= _CPU_CROP
    count = 0 if is_short else 4 if is_small else 8
    reason = "half of the paper's, for small crops" if is_small and count else short
    choices.choose("crops.local_crops", count, reason)


def _optimizer(choices: _Choices, facts: Facts) -> None:
    config = choices.config
    sizes = config.crops.global_size, config.crops.local_size
    with torch.device("meta"):
        backbone, _ = build_backbone(
            config.model.backbone, config.model.parsed_backbone_args(), sizes
        )
    has_batchnorm = any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    reason = str(config.objective.name) if has_batchnorm else "a network without BatchNorm"
    is_adamw = not has_batchnorm or config.objective.name in ("softmax", "distill")
    choices.choose("optim.name", "adamw" if is_adamw else "sgd", f"for {reason}")
    name, is_large = choices.config.optim.name, facts.images >= _MANY_IMAGES
    if name == "adamw":
        peak = 2e-3 if has_batchnorm else 5e-4
        rate = round(peak * 256 / config.optim.batch_size, 6)
        choices.choose("optim.base_lr", rate, f"a peak of {peak:g}")
        choices.choose("optim.weight_decay", 0.05, "as in DeiT and ConvNeXt")
    elif name == "sgd":
        reason = "as in the paper" if is_large else f"fewer than {_MANY_IMAGES:,} images"
        choices.choose("optim.base_lr", 0.1 if is_large else 0.4, reason)
    elif "optim.base_lr" not in choices.given:
        build.build_optimizer(choices.config.optim, nn.Linear(1, 1))  # rejects unknown names
        raise ValueError(f"auto knows no learning rate for {name}; set --optim.base-lr, too")


def _bank(choices: _Choices, facts: Facts) -> None:
    objective = choices.config.objective
    if not objective.resolved_bank_size:
        return
    size, reason = min(8 * facts.classes, facts.images), "8 entries per class, as in the paper"
    if objective.name == "look":
        size, reason = min(facts.images // 2, 65536), "half of the images, at most 65536"
    steps = choices.steps(facts)
    size = max(min(size, steps * choices.config.optim.batch_size // 10), facts.classes)
    choices.choose("objective.bank_size", size, f"{reason}, or a tenth of the images seen")
    momentum = round(1 - max(50 / max(steps, 100), 0.001), 4)
    reason = f"averages over {1 / (1 - momentum):.0f} of {steps:,} steps"
    choices.choose("objective.ema_momentum", momentum, reason)


def _power_of_two(value: float, least: int, most: int) -> int:
    return int(min(max(2 ** round(math.log2(value)), least), most))
