"""Linear layers trained by SGD on frozen features, one per setting of a grid, in parallel.

Features are L2-normalized, the loss is cross-entropy, and the learning rate is constant within an
epoch: lr / 2 (1 + cos(pi e / E)) in epoch e of E. Each layer equals the result of torch.optim.SGD.
All settings share the batches, so a step is two products of the batch, (B, F), with the weights of
all settings as one matrix, (G C, F), and all settings that fit in memory read the features once.

Shapes: N samples, F features, C classes, G settings, B batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trex_models.cli import progress_bar
from trex_models.precision import full_float32

MOMENTUM = 0.9
EPOCHS = 100
BATCH = 1024
_MEMORY = 2 * 10**9  # bytes, on a CPU; on CUDA, a quarter of the free memory is used


class Setting(NamedTuple):
    """Hyperparameters of a layer; the learning rate is the initial one."""

    learning_rate: float
    weight_decay: float


class Samples(NamedTuple):
    """Labeled features, or a subset of their rows."""

    features: Tensor
    """Features, (N, F), of any floating-point dtype, on any device; may be memory-mapped."""
    labels: Tensor
    """Labels, (N,) int64, in [0, C)."""
    rows: Tensor
    """Indices of the subset, (<= N,), on the CPU."""

    def batches(
        self, order: Tensor, size: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalized features, (<= size, F) float32, and labels, in ``order``."""
        for batch in self.rows[order].split(size):
            features = self.features[batch.to(self.features.device)].to(device)
            labels = self.labels[batch.to(self.labels.device)].to(device)
            yield F.normalize(features.float(), dim=1), labels


class Layers(NamedTuple):
    """Linear layers, one per setting: weights, (G, C, F), and biases, (G, C)."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Map features, (B, F), to logits, (B, G, C)."""
        flat = torch.addmm(self.bias.flatten(), features, self.weight.flatten(0, 1).T)
        return flat.view(-1, *self.bias.shape)


@torch.no_grad()
def fit(
    samples: Samples,
    settings: Sequence[Setting],
    *,
    num_classes: int,
    device: torch.device,
    epochs: int = EPOCHS,
    batch_size: int = BATCH,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Layers:
    """Train one layer per setting, all in parallel, from zero weights, in float32.

    Weights may become non-finite if a learning rate is too large, which does not affect the other
    settings. ``progress`` is called after each step with the number of samples.
    """
    layers = Layers(
        torch.zeros(len(settings), num_classes, samples.features.shape[1], device=device),
        torch.zeros(len(settings), num_classes, device=device),
    )
    weight, bias = layers.weight.flatten(0, 1), layers.bias.flatten()
    velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    rates, decays = torch.tensor(settings, dtype=torch.float64).repeat_interleave(num_classes, 0).T
    decay = decays.to(device, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with full_float32(device):
        for epoch in range(epochs):
            cosine = (1 + math.cos(math.pi * epoch / epochs)) / 2
            rate = (rates * cosine).to(device, torch.float32)
            order = torch.randperm(len(samples.rows), generator=generator)
            for x, y in samples.batches(order, batch_size, device):
                residual = layers.logits(x).softmax(2)
                target = y.view(-1, 1, 1).expand(-1, len(settings), 1)
                residual.scatter_add_(2, target, residual.new_full(target.shape, -1.0))
                residual = residual.flatten(1).div_(len(x))
                # addmm_ adds the gradient to the velocity without storing it in between.
                velocity.addmm_(residual.T, x, beta=MOMENTUM).addcmul_(decay[:, None], weight)
                bias_velocity.mul_(MOMENTUM).add_(residual.sum(0)).addcmul_(decay, bias)
                weight.addcmul_(rate[:, None], velocity, value=-1)
                bias.addcmul_(rate, bias_velocity, value=-1)
                del residual  # before the next batch's logits are allocated
                if progress is not None:
                    progress(len(x))
    return layers


@torch.no_grad()
def accuracies(layers: Layers, samples: Samples, batch_size: int = BATCH) -> list[float]:
    """Return the top-1 accuracy of each layer; 0 for layers with non-finite weights."""
    device = layers.weight.device
    correct = torch.zeros(len(layers.weight), dtype=torch.int64, device=device)
    with full_float32(device):
        for x, y in samples.batches(torch.arange(len(samples.rows)), batch_size, device):
            correct += (layers.logits(x).argmax(2) == y[:, None]).sum(0)
    correct *= layers.weight.isfinite().flatten(1).all(1) & layers.bias.isfinite().all(1)
    return (correct.double() / len(samples.rows)).tolist()


def fitted_accuracies(
    train: Samples,
    test: Samples,
    settings: Sequence[Setting],
    *,
    epochs: int = EPOCHS,
    batch_size: int = BATCH,
    title: str = "linear layer",
    **options: Any,
) -> list[float]:
    """Train all settings with ``fit``, in groups that fit in memory; return their accuracies.

    The groups do not change the result beyond rounding.
    """
    options |= {"epochs": epochs, "batch_size": batch_size}
    width = train.features.shape[1]
    at_once = settings_at_once(options["num_classes"], width, batch_size, options["device"])
    groups = [settings[start : start + at_once] for start in range(0, len(settings), at_once)]
    scores = []
    with progress_bar(len(groups) * epochs * len(train.rows), title, " samples") as bar:
        for group in groups:
            layers = fit(train, group, progress=bar.update, **options)
            scores += accuracies(layers, test, batch_size)
            del layers  # before the next group's are allocated
    return scores


def settings_at_once(num_classes: int, width: int, batch_size: int, device: torch.device) -> int:
    """Return the number of settings that can be trained within the memory, at least one."""
    memory = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else _MEMORY
    floats = num_classes * (2 * (width + 1) + 2 * batch_size)  # softmax copies the logits
    return max(1, memory // (4 * floats))
