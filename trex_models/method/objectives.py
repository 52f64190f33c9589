"""Losses with one interface: softmax, cosine softmax, online class means (OCM) and LOOK.

Shapes: B batch, N crops, D embedding, C classes, Q bank size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trex_models.heads import (
    CosineClassifier,
    cosine_logits,
    require_temperature,
    widen,
    without_autocast,
)
from trex_models.method.bank import MemoryBank, check_labels

_ROWS = 256  # queries at a time: their similarities take 67 MB with a bank of 65536


class Objective(nn.Module):
    """Base class of the losses: cross-entropy of a subclass's logits, averaged over all crops.

    For your own loss, define ``logits`` (or ``forward``) and ``class_weights``.

    Args:
        bank: Memory bank of objectives that have one; ``TReX.update_bank`` fills it.
    """

    def __init__(self, bank: MemoryBank | None = None) -> None:
        super().__init__()
        self.bank = bank

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return logits, (N * B, C), for embeddings, (N * B, D)."""
        raise NotImplementedError

    def class_weights(self) -> Tensor | None:
        """Return the class weights or prototypes, (C, D); None if there are none."""
        raise NotImplementedError

    def forward(
        self, embeddings: Tensor, labels: Tensor, indices: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss, a scalar, and the logits, (N * B, C).

        Args:
            embeddings: Embeddings, (N * B, D), crop-major: first crop of all images, then second.
            labels: Class labels, (B,), integers in [0, C).
            indices: Sample indices, (B,); only ``LOOK`` reads them.
        """
        del indices  # only LOOK reads them
        logits = self.logits(embeddings)
        check_labels(labels, logits.shape[1])
        return F.cross_entropy(logits, labels.repeat(len(logits) // len(labels))), logits


class LinearSoftmax(Objective):
    """Softmax of a linear classifier with bias: the baseline, without temperature or normalization.

        loss, logits = LinearSoftmax(2048, num_classes=1000)(features, labels)

    Args:
        dim: Embedding dimension, D.
        num_classes: Number of classes, C.
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
    """Cosine softmax with learned class weights: logits = cos(z, w_c) / tau.

    Equation 1 of t-ReX (arXiv 2206.15369), around ``CosineClassifier``.

        loss, logits = CosineSoftmax(256, num_classes=1000)(embeddings, labels)

    Args:
        dim: Embedding dimension, D.
        num_classes: Number of classes, C.
        temperature: Temperature, tau.

    Raises:
        ValueError: ``temperature`` is not above 0.
    """

    def __init__(self, dim: int, num_classes: int, temperature: float = 0.1) -> None:
        super().__init__()
        self.classifier = CosineClassifier(dim, num_classes, temperature)

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return cosine logits of the learned weights."""
        return self.classifier(embeddings)

    def class_weights(self) -> Tensor:
        """Return the learned weights."""
        return self.classifier.weight


class OnlineClassMeans(Objective):
    """Cosine softmax with the class means of a memory bank instead of learned weights.

    OCM, equation 2 of t-ReX (arXiv 2206.15369): logits = cos(z, class mean of the bank) / tau.

        bank = MemoryBank(8192, dim=256, num_classes=1000)
        loss, logits = OnlineClassMeans(bank)(embeddings, labels)

    Args:
        bank: Memory bank, without gradient; the training loop fills it by ``TReX.update_bank``.
        temperature: Temperature, tau.

    Raises:
        ValueError: ``temperature`` is not above 0.
    """

    bank: MemoryBank

    def __init__(self, bank: MemoryBank, temperature: float = 0.1) -> None:
        super().__init__(bank)
        require_temperature(temperature)
        self.temperature = temperature

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return cosine logits of the class means; 0 for a class without entries."""
        return cosine_logits(embeddings, self.class_weights(), self.temperature)

    def class_weights(self) -> Tensor:
        """Return the bank's class means."""
        return self.bank.class_means()


class LOOK(Objective):
    """Leave-one-out loss of a weighted k-NN classifier over a memory bank.

    This is a reconstruction of Feng et al., "Rethinking supervised pre-training for better
    downstream transferring" (ICLR 2022, arXiv 2110.06014): only the abstract could be verified, and
    the code is not public. An image needs the label of most of its nearest neighbors only, so a
    class may have several modes. With N_k(i) the k entries of the bank most similar to z_i, without
    the image's own entries, and s = cosine:

        L_i = -log(sum_{j in N_k(i), y_j = y_i} exp(s_ij / tau) / sum_{j in N_k(i)} exp(s_ij / tau))

    Our choices: if none of the k entries has the image's label, the nearest one that does is
    added; if the bank has none, the loss is 0; the defaults. With k = Q it is SNCA (Wu et al.,
    ECCV 2018).

        bank = MemoryBank(65536, dim=256, num_classes=1000)
        loss, votes = LOOK(bank)(embeddings, labels, indices)

    Args:
        bank: Memory bank, without gradient; the training loop fills it by ``TReX.update_bank``.
        temperature: Temperature, tau.
        neighbors: Number of neighbors, k; at most the size of the bank.

    Raises:
        ValueError: ``temperature`` is not above 0, or ``neighbors`` is below 1.
    """

    bank: MemoryBank

    def __init__(self, bank: MemoryBank, temperature: float = 0.1, neighbors: int = 256) -> None:
        super().__init__(bank)
        require_temperature(temperature)
        if neighbors < 1:
            raise ValueError(f"neighbors must be at least 1, got {neighbors}")
        self.temperature = temperature
        self.neighbors = min(neighbors, len(bank.labels))

    def class_weights(self) -> None:
        """Return None: classes have no vectors."""

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return the logarithm of each class's share of the votes, -inf without votes."""
        bank = F.normalize(self.bank.embeddings, dim=1)
        votes = []
        for part in embeddings.detach().split(_ROWS):
            nearest, entries = self._scores(part, bank).topk(self.neighbors, dim=1)
            votes.append(self._votes(nearest, entries))
        return torch.cat(votes)

    def forward(
        self, embeddings: Tensor, labels: Tensor, indices: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the mean loss over all crops, and the log-votes of their neighbors, (N * B, C).

        Arguments are those of ``Objective``. Entries with the index of the sample are excluded;
        without ``indices`` (or with -1) none is, which is correct if the bank holds no such entry.
        """
        check_labels(labels, self.bank.num_classes)
        bank = F.normalize(self.bank.embeddings, dim=1)
        own = torch.zeros_like(labels, dtype=torch.bool)[:, None]
        if indices is not None:
            own = (indices[:, None] == self.bank.indices) & (self.bank.indices >= 0)
        of_class = labels[:, None] == self.bank.labels
        losses, votes = [], []
        for crop in embeddings.split(
            len(labels)
        ):  # one crop of each image at a time: bounds the memory
            loss, vote = self._compare(self._scores(crop, bank), own, of_class)
            losses.append(loss)
            votes.append(vote)
        return torch.cat(losses).mean(), torch.cat(votes)

    def _compare(self, scores: Tensor, own: Tensor, of_class: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses, (B,), and the votes, (B, C), of one crop of every image.

        ``scores`` are similarities over temperature; ``own`` and ``of_class`` mark entries of the
        image itself and of its class; (B, Q) each.
        """
        with torch.no_grad():
            others = scores.masked_fill(own, -math.inf)
            nearest, entries = others.topk(self.neighbors, dim=1)
            votes = self._votes(nearest, entries)
            counts = nearest > -math.inf  # own entries are -inf
            alike = counts & of_class.gather(1, entries)
            best, entry = others.masked_fill(~of_class, -math.inf).max(1)
            joins = (~alike.any(1) & (best > -math.inf))[:, None]
            entries = torch.cat([entries, entry[:, None]], 1)
            counts = torch.cat([counts, joins], 1)
            alike = torch.cat([alike, joins], 1)
            # If the bank has none of the class, both sums are equal, and the loss is 0.
            none = ~alike.any(1, keepdim=True)
            counts, alike = counts | none, alike | none
        chosen = scores.gather(1, entries)
        every = chosen.masked_fill(~counts, -math.inf).logsumexp(1)
        same = chosen.masked_fill(~alike, -math.inf).logsumexp(1)
        return every - same, votes

    def _scores(self, embeddings: Tensor, bank: Tensor) -> Tensor:
        """Return similarity over temperature, (B, Q), in float32 at least."""
        with without_autocast(embeddings.device.type):
            return F.linear(F.normalize(widen(embeddings), dim=1), bank) / self.temperature

    def _votes(self, nearest: Tensor, entries: Tensor) -> Tensor:
        """Return the logarithm of the classes' shares in exp(score), (B, C)."""
        shares = nearest.softmax(1).nan_to_num()  # 0 / 0 if all entries are the image's own
        votes = shares.new_zeros(len(shares), self.bank.num_classes)
        return votes.scatter_add_(1, self.bank.labels[entries], shares).log()
