"""The classification losses that compare with one vector per class, behind one interface.

An objective turns embeddings of all crops into the mean loss over all crops and into logits.
``look`` has another one of this interface.
Shapes: B batch, N crops, D embedding, C classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from trex_models.heads import CosineClassifier, cosine_logits, widen, without_autocast
from trex_models.train.bank import Bank


class Objective(nn.Module):
    """Mean cross-entropy over crops and batch of the logits that a subclass defines.

    Args:
        bank: The memory bank, where the objective has one; the trainer fills it.
    """

    def __init__(self, bank: Bank | None = None) -> None:
        super().__init__()
        self.bank = bank

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return logits, (N * B, C), for embeddings, (N * B, D)."""
        raise NotImplementedError

    def class_weights(self) -> Tensor | None:
        """Return the vectors that classes are compared with, (C, D); None if there are none."""
        raise NotImplementedError

    def forward(self, embeddings: Tensor, labels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and the logits.

        Args:
            embeddings: (N * B, D), crop-major: the first crop of every image, then the second.
            labels: (B,), shared by all crops of an image.
            ids: Which samples the images are, (B,).
        """
        del ids  # only neighbours need to know their own
        logits = self.logits(embeddings)
        return F.cross_entropy(logits, labels.repeat(len(logits) // len(labels))), logits


class LinearSoftmax(Objective):
    """A linear classifier with bias: the plain baseline. No temperature, no norm.

    Args:
        dim: D.
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
    """Learned class weights: logits = cos(z, w_c) / tau, t-ReX Eq. 1.

    Args:
        dim: D.
        num_classes: C.
        temperature: tau.
    """

    def __init__(self, dim: int, num_classes: int, temperature: float) -> None:
        super().__init__()
        self.classifier = CosineClassifier(dim, num_classes, temperature)

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return cosine logits against the learned weights."""
        return self.classifier(embeddings)

    def class_weights(self) -> Tensor:
        """Return the learned weights."""
        return self.classifier.weight


class OnlineClassMeans(Objective):
    """Class means of the memory bank in place of learned weights (OCM), t-ReX Eq. 2.

    Args:
        bank: The memory bank. No gradient flows through it.
        temperature: tau.
    """

    bank: Bank

    def __init__(self, bank: Bank, temperature: float) -> None:
        super().__init__(bank)
        self.temperature = temperature

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return cosine logits against the class means; 0 for a class without entries."""
        return cosine_logits(embeddings, self.class_weights(), self.temperature)

    def class_weights(self) -> Tensor:
        """Return the bank's class means."""
        return self.bank.class_means()
