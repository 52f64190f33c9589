"""Reference training step in plain PyTorch, as commonly written.

The computation is the same as ours, but in NCHW layout, with torchvision's ResNet-50, torch's SGD,
a loop over the averaged parameters, one-hot class means, and metrics that synchronize every step.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


class Encoder(nn.Module):
    """Backbone and projector."""

    def __init__(
        self, backbone: str, hidden_layers: int, hidden_dim: int, embedding_dim: int
    ) -> None:
        super().__init__()
        self.backbone = torchvision.models.get_model(backbone)
        width = self.backbone.fc.in_features
        self.backbone.fc = nn.Identity()
        layers: list[nn.Module] = []
        for _ in range(hidden_layers):
            layers += [nn.Linear(width, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.GELU()]
            width = hidden_dim
        self.projector = nn.Sequential(*layers, nn.Linear(width, embedding_dim, bias=False))

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """Embed crops, (N_r * B, 3, S_r, S_r) per resolution r, to (N * B, D)."""
        features = torch.empty(0, device=crops[0].device)
        for images in crops:
            features = torch.cat([features, self.backbone(images)])
        return self.projector(F.normalize(features.float(), dim=1))


class Step:
    """OCM's training step: forward, momentum encoder, memory bank, backward, optimizer."""

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        bank_size: int,
        embedding_dim: int,
        dtype: torch.dtype,
        temperature: float = 0.1,
        momentum: float = 0.999,
    ) -> None:
        self.device = next(encoder.parameters()).device
        self.encoder = encoder
        self.average = copy.deepcopy(encoder).requires_grad_(False)
        self.bank = torch.randn(bank_size, embedding_dim, device=self.device)
        self.bank_labels = torch.randint(num_classes, (bank_size,), device=self.device)
        self.pointer = torch.zeros(1, dtype=torch.long, device=self.device)
        self.num_classes = num_classes
        self.temperature = temperature
        self.momentum = momentum
        self.dtype = dtype
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        decayed = [p for p in encoder.parameters() if p.ndim > 1]
        others = [p for p in encoder.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": 1e-4},
            {"params": others},
        ]
        self.optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    def autocast(self) -> torch.autocast:
        """Return the autocast context of the forward passes."""
        return torch.autocast(
            self.device.type, self.dtype, enabled=self.dtype in (torch.float16, torch.bfloat16)
        )

    def __call__(self, crops: Sequence[Tensor], labels: Tensor) -> tuple[float, float]:
        """Run one step and return its loss and top-1 accuracy."""
        with self.autocast():
            embeddings = self.encoder(crops)
        one_hot = F.one_hot(self.bank_labels, self.num_classes).float()
        means = F.normalize(one_hot.T @ self.bank, dim=1)
        logits = F.normalize(embeddings.float(), dim=1) @ means.T / self.temperature
        targets = labels.repeat(len(logits) // len(labels))
        loss = F.cross_entropy(logits, targets)

        with torch.no_grad():
            for average, online in zip(
                self.average.parameters(), self.encoder.parameters(), strict=True
            ):
                average.data.mul_(self.momentum).add_((1 - self.momentum) * online.data)
            with self.autocast():
                keys = self.average([crops[0][: len(labels)]])
            start = int(self.pointer)
            count = min(len(keys), len(self.bank) - start)
            self.bank[start : start + count] = keys[:count].float()
            self.bank_labels[start : start + count] = labels[:count]
            self.pointer[0] = (start + count) % len(self.bank)

        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        accuracy = (logits[: len(labels)].argmax(1) == labels).float().mean()
        return loss.item(), accuracy.item()
