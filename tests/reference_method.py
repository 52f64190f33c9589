"""The method once more, from torchvision and plain formulas, to compare ours with.

One process with a memory bank, in float64, with none of the package's modules.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from tests.golden import draw, step_inputs


class Encoder(nn.Module):
    """Backbone and projector under the names that the draws are seeded with."""

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        self.encoder: Any = torchvision.models.get_model(case["arch"])
        width = self.encoder.fc.in_features
        self.encoder.fc = nn.Identity()
        layers: list[nn.Module] = [nn.Identity()]  # the norm stands in forward
        for _ in range(case["hidden_layers"]):
            hidden = nn.Module()
            hidden.fc = nn.Linear(width, case["hidden_dim"])
            hidden.bn = nn.BatchNorm1d(case["hidden_dim"])
            nn.init.zeros_(hidden.fc.bias)
            layers.append(hidden)
            width = case["hidden_dim"]
        layers.append(nn.Linear(width, case["bottleneck_dim"], bias=False))
        self.head: Any = nn.Module()
        self.head.layers = nn.ModuleList(layers)

    def forward(self, crops: list[Tensor]) -> Tensor:
        x = torch.cat([self.encoder(images) for images in crops])
        x = x / x.norm(dim=1, keepdim=True)
        for layer in self.head.layers[1:-1]:
            x = F.gelu(layer.bn(layer.fc(x)))
        return self.head.layers[-1](x)


def train(case: dict[str, Any]) -> dict[str, Any]:
    """Train through a case with memory; return what a trajectory file records of it."""
    encoder = Encoder(case).double()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if parameter.ndim > 1:
                scale = math.sqrt(2 / parameter[0].numel())
                parameter.copy_(draw(name, *parameter.shape) * scale)
    average = copy.deepcopy(encoder)
    memory = draw("memory.features", case["memory_size"], case["bottleneck_dim"])
    owners = torch.arange(case["memory_size"]) % case["num_classes"]
    pointer = 0

    def prototypes() -> Tensor:
        sums = [memory[owners == c].sum(0) for c in range(case["num_classes"])]
        return torch.stack([s / s.norm() if s.norm() > 0 else s for s in sums])

    def logits_of(embeddings: Tensor) -> Tensor:
        return embeddings / embeddings.norm(dim=1, keepdim=True) @ prototypes().T / case["tau"]

    parameters = list(encoder.parameters())
    velocities = [torch.zeros_like(p) for p in parameters]
    seen: dict[str, Any] = {k: [] for k in ("lr", "loss", "logits_abs_sum", "prototype_abs_sum")}
    for step, rate in enumerate(schedule(case)):
        crops, labels = step_inputs(case, step, rank=0, world_size=1)
        logits = logits_of(encoder(crops))
        targets = labels.repeat(len(logits) // len(labels))
        loss = (logits.logsumexp(1) - logits[torch.arange(len(targets)), targets]).mean()
        with torch.no_grad():
            m = case["ema_momentum"]
            for a, b in zip(average.parameters(), parameters, strict=True):
                a.copy_(m * a + (1 - m) * b)
            keys = average([crops[0][: len(labels)]])
            written = min(len(labels), case["memory_size"] - pointer)
            memory[pointer : pointer + written] = keys[:written]
            owners[pointer : pointer + written] = labels[:written]
            pointer = (pointer + written) % case["memory_size"]
            gradients = torch.autograd.grad(loss, parameters)
            for p, v, g in zip(parameters, velocities, gradients, strict=True):
                v.mul_(0.9).add_(g + case["weight_decay"] * p if p.ndim > 1 else g)
                p.sub_(rate * v)
        seen["lr"].append(rate)
        seen["loss"].append(loss.item())
        seen["logits_abs_sum"].append(logits.abs().sum().item())
        seen["prototype_abs_sum"].append(prototypes().abs().sum().item())
    encoder.eval()
    images = draw("eval.image", 3, 3, case["global_size"], case["global_size"])
    with torch.no_grad():
        seen["eval_logits"] = logits_of(encoder([images])).tolist()
        seen["eval_features_abs_sum"] = encoder.encoder(images).abs().sum().item()
    seen["param_abs_sum"] = sum(p.abs().sum().item() for p in parameters)
    seen["ema_param_abs_sum"] = sum(p.abs().sum().item() for p in average.parameters())
    return seen


def schedule(case: dict[str, Any]) -> list[float]:
    """Learning rate of every step."""
    peak = case["lr"] * case["batch_size"] / 256
    warmup = case["warmup_epochs"] * case["steps_per_epoch"]
    decay = case["epochs"] * case["steps_per_epoch"] - warmup
    rates = [peak * step / (warmup - 1) for step in range(warmup)]
    cosine = (0.5 * (1 + math.cos(math.pi * step / decay)) for step in range(decay))
    return rates + [1e-6 + (peak - 1e-6) * share for share in cosine]
