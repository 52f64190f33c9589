"""The classification losses that compare with one vector per class, behind one interface.

An objective turns embeddings of all crops into the mean loss over all crops and into logits.
``look`` has another one of this interface.
Shapes: B batch, N crops, D embedding, C classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from trex_models.heads import (
    CosineClassifier,
    cosine_logits,
    require_temperature,
    widen,
    without_autocast,
)
from trex_models.train.bank import MemoryBank, check_labels


class Objective(nn.Module):
    """Base of the losses: mean cross-entropy over crops and batch of a subclass's logits.

    To train on a loss of your own, define ``logits`` (or ``forward``) and ``class_weights``.

    Args:
        bank: The memory bank, where the objective has one; ``TReX.update_bank`` fills it.
    """

    def __init__(self, bank: MemoryBank | None = None) -> None:
        super().__init__()
        self.bank = bank

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return logits, (N * B, C), for embeddings, (N * B, D)."""
        raise NotImplementedError

    def class_weights(self) -> Tensor | None:
        """Return the vectors that classes are compared with, (C, D); None if there are none."""
        raise NotImplementedError

    def forward(
        self, embeddings: Tensor, labels: Tensor, ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss, a scalar, and the logits, (N * B, C).

        Args:
            embeddings: (N * B, D), crop-major: the first crop of every image, then the second.
            labels: (B,) integers in [0, C), shared by all crops of an image.
            ids: Which samples the images are, (B,); only ``LOOK`` asks.

        Raises:
            ValueError: ``labels`` are not as ``check_labels`` wants them.
        """
        del ids  # only neighbours need to know their own
        logits = self.logits(embeddings)
        check_labels(labels, logits.shape[1])
        return F.cross_entropy(logits, labels.repeat(len(logits) // len(labels))), logits


class LinearSoftmax(Objective):
    """Softmax over a linear classifier with bias: the plain baseline. No temperature, no norm.

        loss, logits = LinearSoftmax(2048, num_classes=1000)(features, labels)

    Args:
        dim: D, width of the embeddings.
        num_classes: C.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(dim, num_classes)

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return W z + b, in float32 at least."""
        with without_autocast(embeddings.device.type):
            return self.classifier(widen(embeddings))

    def class_weights(self) -> Tensor:
        """Return the learned weights, without the bias."""
        return self.classifier.weight


class CosineSoftmax(Objective):
    """Softmax over cosines with learned class weights: logits = cos(z, w_c) / tau.

    Equation 1 of t-ReX (arXiv 2206.15369), around ``CosineClassifier``.

        loss, logits = CosineSoftmax(256, num_classes=1000)(embeddings, labels)

    Args:
        dim: D, width of the embeddings.
        num_classes: C.
        temperature: tau.

    Raises:
        ValueError: ``temperature`` is not above 0.
    """

    def __init__(self, dim: int, num_classes: int, temperature: float = 0.1) -> None:
        super().__init__()
        self.classifier = CosineClassifier(dim, num_classes, temperature)

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return cosine logits against the learned weights."""
        return self.classifier(embeddings)

    def class_weights(self) -> Tensor:
        """Return the learned weights."""
        return self.classifier.weight


class OnlineClassMeans(Objective):
    """Softmax over cosines with the class means of a memory bank, in place of learned weights.

    OCM, equation 2 of t-ReX (arXiv 2206.15369): logits = cos(z, mean of the bank's c) / tau.

        bank = MemoryBank(8192, dim=256, num_classes=1000)
        loss, logits = OnlineClassMeans(bank)(embeddings, labels)

    Args:
        bank: The memory bank. No gradient flows through it; who trains fills it.
        temperature: tau.

    Raises:
        ValueError: ``temperature`` is not above 0.
    """

    bank: MemoryBank

    def __init__(self, bank: MemoryBank, temperature: float = 0.1) -> None:
        super().__init__(bank)
        require_temperature(temperature)
        self.temperature = temperature

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return cosine logits against the class means; 0 for a class without entries."""
        return cosine_logits(embeddings, self.class_weights(), self.temperature)

    def class_weights(self) -> Tensor:
        """Return the bank's class means."""
        return self.bank.class_means()
