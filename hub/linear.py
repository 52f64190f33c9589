"""A linear layer by SGD on frozen features, with a whole grid of settings trained at once.

The settings share batches and their order, so that the features are read once for all of them;
each is what torch.optim.SGD would make of it alone. Cross-entropy, momentum, one learning rate an
epoch: lr / 2 (1 + cos(pi e / E)) in epoch e of E.

Shapes: N samples, F features, C classes, G settings, B batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

MOMENTUM = 0.9


class Setting(NamedTuple):
    """What is searched for."""

    learning_rate: float
    """Of the first epoch."""
    weight_decay: float


class Layers(NamedTuple):
    """A linear layer of each setting."""

    weight: Tensor
    """(G, C, F)."""
    bias: Tensor
    """(G, 1, C)."""

    def logits(self, features: Tensor) -> Tensor:
        """Map (B, F) to (G, B, C)."""
        return features @ self.weight.transpose(1, 2) + self.bias


def fit(
    features: Tensor,
    labels: Tensor,
    rows: Tensor,
    settings: Sequence[Setting],
    *,
    num_classes: int,
    epochs: int,
    batch_size: int = 1024,
    seed: int = 0,
    title: str = "linear layer",
) -> Layers:
    """Train the layers, from zero weights.

    Args:
        features: (N, F), of any floating type; batches are widened to float32.
        labels: (N,).
        rows: The samples to train on, indices into N.
        settings: G of them.
        num_classes: C.
        epochs: Passes over the samples.
        batch_size: Samples of a step; the last of an epoch may be smaller.
        seed: Of the order.
        title: Of the progress bar.
    """
    device = features.device
    rates = torch.tensor([s.learning_rate for s in settings], device=device).view(-1, 1, 1)
    decays = torch.tensor([s.weight_decay for s in settings], device=device).view(-1, 1, 1)
    shapes = (len(settings), num_classes, features.shape[1]), (len(settings), 1, num_classes)
    layers = Layers(*(torch.zeros(shape, device=device) for shape in shapes))
    velocities = [torch.zeros_like(parameter) for parameter in layers]
    generator = torch.Generator().manual_seed(seed)
    for epoch in tqdm(range(epochs), desc=title, unit="epoch", dynamic_ncols=True):
        cosine = (1 + math.cos(math.pi * epoch / epochs)) / 2
        order = rows[torch.randperm(len(rows), generator=generator)]
        for batch in order.split(batch_size):
            x, y = features[batch].float(), labels[batch]
            residual = layers.logits(x).softmax(dim=2) - F.one_hot(y, num_classes)
            residual /= len(batch)
            gradients = residual.transpose(1, 2) @ x, residual.sum(1, keepdim=True)
            for parameter, gradient, velocity in zip(layers, gradients, velocities, strict=True):
                velocity.mul_(MOMENTUM).add_(gradient).addcmul_(decays, parameter)
                parameter.addcmul_(rates * cosine, velocity, value=-1)
    return layers


def accuracies(
    layers: Layers, features: Tensor, labels: Tensor, rows: Tensor, batch_size: int = 1024
) -> list[float]:
    """Return each setting's share of samples whose highest logit is that of their label."""
    correct = torch.zeros(len(layers.weight), device=features.device)
    for batch in rows.split(batch_size):
        votes = layers.logits(features[batch].float()).argmax(2)
        correct += (votes == labels[batch]).sum(1)
    return (correct / len(rows)).tolist()


def held_out(labels: np.ndarray, share: float = 0.2, seed: int = 0) -> np.ndarray:
    """Return which samples are held out for choosing a setting, (N,) bool.

    Of each class its own draw, at least one sample and not all.
    """
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        (of_class,) = np.nonzero(labels == label)
        count = min(max(1, round(share * len(of_class))), len(of_class) - 1)
        rng = np.random.default_rng((seed, int(label)))
        mask[rng.permutation(of_class)[:count]] = True
    return mask
