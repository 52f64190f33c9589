"""A linear layer by SGD on frozen features, with a grid of settings trained at once.

Features are L2-normalized. Cross-entropy, momentum, one learning rate an epoch:
lr / 2 (1 + cos(pi e / E)) in epoch e of E. Each layer is the one that torch.optim.SGD would train.
The settings share batches and their order; so a step is two products of the batch, (B, F), with all
weights as one matrix, (G C, F), and features are read once for all settings that fit in memory.

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
_MEMORY = 2 * 10**9  # bytes on a CPU; on CUDA it is a quarter of the free memory


class Setting(NamedTuple):
    """Hyperparameters that are searched for; the learning rate is that of the first epoch."""

    learning_rate: float
    weight_decay: float


class Samples(NamedTuple):
    """Labeled features, or some rows of them."""

    features: Tensor
    """(N, F), of any floating type, on any device; a memory-mapped file is read in batches."""
    labels: Tensor
    """(N,) int64, in [0, C)."""
    rows: Tensor
    """Indices of the samples, (<= N,), on the CPU."""

    def batches(
        self, order: Tensor, size: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalized features, (<= size, F) float32, and labels, in an order of ``rows``."""
        for batch in self.rows[order].split(size):
            features = self.features[batch.to(self.features.device)].to(device)
            labels = self.labels[batch.to(self.labels.device)].to(device)
            yield F.normalize(features.float(), dim=1), labels


class Layers(NamedTuple):
    """A linear layer of each setting: weights, (G, C, F), and biases, (G, C)."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Map (B, F) to (B, G, C)."""
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
    """Train a layer of each setting, all at once, from zero weights, in float32.

    Too large a learning rate may end with weights that are not finite; the other settings are
    what they would be without it. ``progress`` is called after each step with its samples.
    """
    layers = Layers(
        torch.zeros(len(settings), num_classes, samples.features.shape[1], device=device),
        torch.zeros(len(settings), num_classes, device=device),
    )
    weight, bias = layers.weight.flatten(0, 1), layers.bias.flatten()
    speed, bias_speed = torch.zeros_like(weight), torch.zeros_like(bias)
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
                # The gradient is added to the velocity as it is made: it needs no memory.
                speed.addmm_(residual.T, x, beta=MOMENTUM).addcmul_(decay[:, None], weight)
                bias_speed.mul_(MOMENTUM).add_(residual.sum(0)).addcmul_(decay, bias)
                weight.addcmul_(rate[:, None], speed, value=-1)
                bias.addcmul_(rate, bias_speed, value=-1)
                del residual  # before the next batch's logits are made
                if progress is not None:
                    progress(len(x))
    return layers


@torch.no_grad()
def accuracies(layers: Layers, samples: Samples, batch_size: int = BATCH) -> list[float]:
    """Return each layer's top-1 accuracy; 0 for a layer whose weights are not all finite."""
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
    """Return each setting's accuracy, from layers that ``fit`` trains in groups that fit in memory.

    Up to rounding the groups change nothing.
    """
    options |= {"epochs": epochs, "batch_size": batch_size}
    width = train.features.shape[1]
    at_once = settings_at_once(options["num_classes"], width, batch_size, options["device"])
    groups = [settings[start : start + at_once] for start in range(0, len(settings), at_once)]
    found = []
    with progress_bar(len(groups) * epochs * len(train.rows), title, " samples") as bar:
        for group in groups:
            layers = fit(train, group, progress=bar.update, **options)
            found += accuracies(layers, test, batch_size)
            del layers  # before the next group's are made
    return found


def settings_at_once(num_classes: int, width: int, batch_size: int, device: torch.device) -> int:
    """Return for how many settings weights, velocities and logits fit in memory, at least one."""
    memory = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else _MEMORY
    floats = num_classes * (2 * (width + 1) + 2 * batch_size)  # softmax takes logits to others
    return max(1, memory // (4 * floats))
