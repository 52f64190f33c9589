"""Heads on top of the backbone: projector and cosine classifier.

t-ReX (Sariyildiz et al., "No Reason for No Supervision", ICLR 2023, arXiv 2206.15369),
section 3: z = g(f(x)), logits = cos(z, w_c) / tau.

Shapes: B batch, D embedding, C classes, Q bank size.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

# Leaves of an FX graph: these functions branch on dtype and device, which a proxy does not have.
fx.wrap("widen")
fx.wrap("cosine_logits")


def widen(x: Tensor) -> Tensor:
    """Convert float16 and bfloat16 to float32; return other tensors unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def cosine_logits(embeddings: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Return cos(z, w_c) / tau, (B, C), for z (B, D) and w (C, D), in float32 or float64.

    This holds under autocast, too. The logits of a zero vector are exactly 0.
    """
    if torch.jit.is_scripting():  # TorchScript does not support the context manager
        logits = _cosine_logits(embeddings, weight, temperature)
    else:
        with without_autocast(embeddings.device.type):
            logits = _cosine_logits(embeddings, weight, temperature)
    return logits


def _cosine_logits(embeddings: Tensor, weight: Tensor, temperature: float) -> Tensor:
    embeddings = F.normalize(widen(embeddings), dim=-1)
    return F.linear(embeddings, F.normalize(widen(weight), dim=-1)) / temperature


def require_temperature(temperature: float) -> None:
    """Raise ValueError unless the temperature is positive."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def class_means(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return L2-normalized class means, (C, D), of embeddings, (Q, D): the prototypes of Eq. 2.

    They are unit vectors, or zero for a class without embeddings.
    """
    sums = embeddings.new_zeros(num_classes, embeddings.shape[1])
    sums.index_add_(0, labels, embeddings)
    return F.normalize(sums, dim=1)  # sum and mean have the same direction


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """Return a context manager that disables autocast for a type of device."""
    # A no-op if autocast is off, which keeps exported graphs simple. torch 2.11 cannot trace
    # is_autocast_enabled, and meta tensors have no autocast.
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class Projector(nn.Sequential):
    """MLP head g between backbone and loss: t-ReX (arXiv 2206.15369), section 3.1.

    L2-normalizes its input, then applies ``hidden_layers`` times
    [Linear with bias -> BatchNorm1d -> GELU], then a bias-free Linear (the bottleneck). Maps
    features, (B, in_dim), to embeddings, (B, D), which are not normalized. In training mode
    BatchNorm requires B >= 2.

        projector = Projector(backbone.num_features)
        embeddings = projector(backbone(images))

    Args:
        in_dim: Width of the backbone's pooled features.
        hidden_layers: Number of hidden layers, L: 3 for t-ReX, 1 for t-ReX*; with 0 only L2
            normalization and bottleneck remain.
        hidden_dim: Width of the hidden layers.
        out_dim: Embedding dimension, D.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: A width is below 1 or ``hidden_layers`` is negative.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_layers: int = 3,
        hidden_dim: int = 2048,
        out_dim: int = 256,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if hidden_layers < 0 or min(in_dim, hidden_dim, out_dim) < 1:
            raise ValueError(
                "the projector needs hidden_layers >= 0 and widths >= 1, got "
                f"{in_dim=}, {hidden_layers=}, {hidden_dim=}, {out_dim=}"
            )
        widths = [in_dim] + [hidden_dim] * hidden_layers
        hidden = [
            HiddenLayer(d_in, d_out, device=device, dtype=dtype) for d_in, d_out in pairwise(widths)
        ]
        bottleneck = nn.Linear(widths[-1], out_dim, bias=False, device=device, dtype=dtype)
        nn.init.trunc_normal_(bottleneck.weight, std=0.02)
        super().__init__(L2Norm(), *hidden, bottleneck)
        self.out_dim = out_dim


class L2Norm(nn.Module):
    """L2 normalization of rows, (B, D) -> (B, D), computed in float32 or float64."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with rows of unit length, in its own dtype."""
        return F.normalize(widen(x), dim=-1).to(x.dtype)


class HiddenLayer(nn.Module):
    """Linear with bias -> BatchNorm1d -> GELU, (B, in_dim) -> (B, out_dim)."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc = nn.Linear(in_dim, out_dim, device=device, dtype=dtype)
        self.bn = nn.BatchNorm1d(out_dim, device=device, dtype=dtype)
        self.act = nn.GELU()
        nn.init.trunc_normal_(self.fc.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, (B, out_dim)."""
        return self.act(self.bn(self.fc(x)))


class CosineClassifier(nn.Module):
    """Cosine softmax with learned classifier weights: logits = cos(z, w_c) / tau.

    Equation 1 of t-ReX (arXiv 2206.15369); ``weight``, (C, D), may also hold the class
    prototypes of Eq. 2. A drop-in replacement for the last layer of a classifier:

        model.fc = CosineClassifier(model.num_features, num_classes=10)

    It has the attributes and the initialization of nn.Linear, but is not a subclass: tools that
    adapt or quantize linear layers replace W x, which this module does not compute.

    Args:
        in_features: Embedding dimension, D.
        num_classes: Number of classes, C.
        temperature: Temperature, tau > 0.
        device: Device of the weight.
        dtype: Data type of the weight.

    Raises:
        ValueError: ``temperature`` is not positive.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        temperature: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require_temperature(temperature)
        super().__init__()
        self.in_features = in_features
        self.out_features = num_classes
        self.temperature = temperature
        weight = torch.empty(num_classes, in_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the weight as nn.Linear does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def init_non_persistent_buffers(self) -> None:
        """Initialize a weight that is missing from the file that transformers loads."""
        # The only hook that transformers' TimmWrapper calls on unknown modules. timm calls it on
        # loaded models, too, so that weights must not change there. transformers patches the
        # functions of torch.nn.init during the call: its own leave loaded weights unchanged.
        if nn.init.kaiming_uniform_.__module__.startswith("transformers."):
            self.reset_parameters()

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return logits, (B, C), for embeddings, (B, D), in the dtype of the weight."""
        logits = cosine_logits(embeddings, self.weight, self.temperature)
        return logits.to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Return sizes and temperature for ``repr``."""
        return f"{self.in_features}, {self.out_features}, temperature={self.temperature}"
