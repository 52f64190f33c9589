"""Losses with one interface: softmax, cosine softmax, online class means, LOOK, distillation.

Shapes: B batch, N crops, M global crops, S side in pixels, D embedding, C classes, Q bank size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trex_models.distributed import gather
from trex_models.heads import (
    CosineClassifier,
    cosine_logits,
    require_temperature,
    widen,
    without_autocast,
)
from trex_models.method.bank import MemoryBank, check_labels

_ROWS = 256  # embeddings per chunk: 67 MB of similarities to a bank of 65536


class Objective(nn.Module):
    """Base class of the losses: cross-entropy of a subclass's logits, averaged over all crops.

    To add a loss, override ``logits``, ``classifier_weights`` and, if needed, ``forward``.

    Args:
        bank: Memory bank, if the objective has one; ``TReX.update_bank`` fills it.
    """

    predicts_labels = True
    """If False, ``forward`` returns similarities to other targets, (N * B,), not logits."""
    teacher: Callable[[Tensor], Tensor] | None = None
    """Frozen model that ``targets`` uses, of ``Distillation`` only."""

    def __init__(self, bank: MemoryBank | None = None) -> None:
        super().__init__()
        self.bank = bank

    def targets(self, crops: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
        """Return the ``labels`` argument of ``forward``: the labels themselves, (B,)."""
        del crops
        return labels

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return logits, (N * B, C), for embeddings, (N * B, D)."""
        raise NotImplementedError

    def classifier_weights(self) -> Tensor | None:
        """Return the classifier weights or prototypes, (C, D); None if there are none."""
        return None

    def forward(
        self, embeddings: Tensor, labels: Tensor, indices: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss, a scalar, and the logits, (N * B, C).

        Args:
            embeddings: Embeddings, (N * B, D), crop-major: crop 1 of all images, then crop 2.
            labels: Class labels, (B,), integers in [0, C).
            indices: Sample indices, (B,); only ``LOOK`` reads them.
        """
        del indices
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
        """Return W z + b, in float32 or float64."""
        with without_autocast(embeddings.device.type):
            return self.classifier(widen(embeddings))

    def classifier_weights(self) -> Tensor:
        """Return the learned classifier weights, without the bias."""
        return self.classifier.weight


class CosineSoftmax(Objective):
    """Cosine softmax with learned classifier weights: logits = cos(z, w_c) / tau.

    Equation 1 of t-ReX (arXiv 2206.15369), computed by ``CosineClassifier``.

        loss, logits = CosineSoftmax(256, num_classes=1000)(embeddings, labels)

    Args:
        dim: Embedding dimension, D.
        num_classes: Number of classes, C.
        temperature: Temperature, tau.

    Raises:
        ValueError: ``temperature`` is not positive.
    """

    def __init__(self, dim: int, num_classes: int, temperature: float = 0.1) -> None:
        super().__init__()
        self.classifier = CosineClassifier(dim, num_classes, temperature)

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return cosine logits for the learned classifier weights."""
        return self.classifier(embeddings)

    def classifier_weights(self) -> Tensor:
        """Return the learned classifier weights."""
        return self.classifier.weight


class OnlineClassMeans(Objective):
    """Cosine softmax with the class means of a memory bank instead of learned weights.

    OCM, equation 2 of t-ReX (arXiv 2206.15369): logits = cos(z, class mean of the bank) / tau.

        bank = MemoryBank(8192, dim=256, num_classes=1000)
        loss, logits = OnlineClassMeans(bank)(embeddings, labels)

    Args:
        bank: Memory bank, without gradient; fill it with ``enqueue`` or ``TReX.update_bank``.
        temperature: Temperature, tau.

    Raises:
        ValueError: ``temperature`` is not positive.
    """

    bank: MemoryBank

    def __init__(self, bank: MemoryBank, temperature: float = 0.1) -> None:
        super().__init__(bank)
        require_temperature(temperature)
        self.temperature = temperature

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return cosine logits for the class means; 0 for a class without entries."""
        return cosine_logits(embeddings, self.classifier_weights(), self.temperature)

    def classifier_weights(self) -> Tensor:
        """Return the class means of the memory bank."""
        return self.bank.class_means()


class LOOK(Objective):
    """Leave-one-out loss of a weighted k-NN classifier over a memory bank.

    This is a reconstruction of Feng et al., "Rethinking supervised pre-training for better
    downstream transferring" (ICLR 2022, arXiv 2110.06014), from its abstract; the authors' code is
    not public. Only the nearest neighbors of an image need to share its label, so that a class may
    have several modes. Let N_k(i) be the k entries of the bank most similar to z_i,
    excluding those of image i itself, and s_ij the cosine similarity:

        L_i = -log(sum_{j in N_k(i), y_j = y_i} exp(s_ij / tau) / sum_{j in N_k(i)} exp(s_ij / tau))

    The defaults are our choice, and so is one rule: if no neighbor shares the image's label, the
    nearest entry of the bank that does is added; if there is none, the loss is 0. With k = Q this
    is SNCA (Wu et al., ECCV 2018).

        bank = MemoryBank(65536, dim=256, num_classes=1000)
        loss, log_votes = LOOK(bank)(embeddings, labels, indices)

    Args:
        bank: Memory bank, without gradient; fill it with ``enqueue`` or ``TReX.update_bank``.
        temperature: Temperature, tau.
        neighbors: Number of neighbors, k; at most the size of the bank.

    Raises:
        ValueError: ``temperature`` is not positive, or ``neighbors`` is below 1.
    """

    bank: MemoryBank

    def __init__(self, bank: MemoryBank, temperature: float = 0.1, neighbors: int = 256) -> None:
        super().__init__(bank)
        require_temperature(temperature)
        if neighbors < 1:
            raise ValueError(f"neighbors must be at least 1, got {neighbors}")
        self.temperature = temperature
        self.neighbors = min(neighbors, len(bank.labels))

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return the log of each class's share of the votes, (N * B, C); -inf for no votes."""
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

        Arguments are those of ``Objective.forward``. Entries with the index of the sample are
        excluded. Without ``indices`` (or with -1), the bank must not contain these samples.
        """
        check_labels(labels, self.bank.num_classes)
        bank = F.normalize(self.bank.embeddings, dim=1)
        own = torch.zeros_like(labels, dtype=torch.bool)[:, None]
        if indices is not None:
            own = (indices[:, None] == self.bank.indices) & (self.bank.indices >= 0)
        of_class = labels[:, None] == self.bank.labels
        losses, votes = [], []
        for crop in embeddings.split(len(labels)):  # one crop per image bounds the memory
            loss, vote = self._compare(self._scores(crop, bank), own, of_class)
            losses.append(loss)
            votes.append(vote)
        return torch.cat(losses).mean(), torch.cat(votes)

    def _compare(self, scores: Tensor, own: Tensor, of_class: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses, (B,), and log-votes, (B, C), for one crop per image.

        ``scores`` are similarities divided by temperature; ``own`` and ``of_class`` are masks of
        the entries of the image itself and of its class. Each is (B, Q).
        """
        with torch.no_grad():
            others = scores.masked_fill(own, -math.inf)
            nearest, entries = others.topk(self.neighbors, dim=1)
            votes = self._votes(nearest, entries)
            valid = nearest > -math.inf  # excludes own entries
            same_class = valid & of_class.gather(1, entries)
            best, entry = others.masked_fill(~of_class, -math.inf).max(1)
            added = (~same_class.any(1) & (best > -math.inf))[:, None]
            entries = torch.cat([entries, entry[:, None]], 1)
            valid = torch.cat([valid, added], 1)
            same_class = torch.cat([same_class, added], 1)
            # If the bank has no entry of the class, both sums are equal, and the loss is 0.
            no_match = ~same_class.any(1, keepdim=True)
            valid, same_class = valid | no_match, same_class | no_match
        selected = scores.gather(1, entries)
        log_all = selected.masked_fill(~valid, -math.inf).logsumexp(1)
        log_same = selected.masked_fill(~same_class, -math.inf).logsumexp(1)
        return log_all - log_same, votes

    def _scores(self, embeddings: Tensor, bank: Tensor) -> Tensor:
        """Return similarities divided by temperature, (B, Q), in float32 or float64."""
        with without_autocast(embeddings.device.type):
            return F.linear(F.normalize(widen(embeddings), dim=1), bank) / self.temperature

    def _votes(self, nearest: Tensor, entries: Tensor) -> Tensor:
        """Return the log of each class's share of the votes exp(score), (B, C)."""
        shares = nearest.softmax(1).nan_to_num()  # 0 / 0 if all are the image's own entries
        votes = shares.new_zeros(len(shares), self.bank.num_classes)
        return votes.scatter_add_(1, self.bank.labels[entries], shares).log()


class Distillation(Objective):
    """Distillation of a frozen teacher: 0.5 (1 - cos(z, t)) + 0.5 smooth L1(z, t).

    The loss of UNIC (Sariyildiz et al., ECCV 2024, arXiv 2408.05088) for one teacher; t are its
    features, standardized per dimension with the mean and variance of earlier batches. UNIC's
    momentum falls from 1 to 0.001 by a cosine schedule; max(1 / batches, 0.001) needs none: up to
    1000 batches, the statistics are those of all features so far. A local crop has the mean target
    of the image's global crops, an idea of DINO (arXiv 2104.14294).

        objective = Distillation(768, teacher)
        loss, cosines = objective(embeddings, objective.targets(crops, labels))

    Args:
        dim: Width of the teacher's features and embedding dimension, D.
        teacher: Function that maps global crops, (M * B, 3, S, S), to features, (M * B, D). It is
            neither trained nor saved; only ``targets`` requires it.
    """

    predicts_labels = False
    target_mean: Tensor
    target_variance: Tensor
    num_batches_tracked: Tensor

    def __init__(self, dim: int, teacher: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.__dict__["teacher"] = teacher  # setattr would register a module
        self.register_buffer("target_mean", torch.zeros(dim))
        self.register_buffer("target_variance", torch.ones(dim))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    @torch.no_grad()
    def targets(self, crops: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
        """Return the targets of all crops, (N * B, D), and update the statistics in training mode.

        ``crops`` has one tensor per resolution, crop-major, global crops first.
        """
        assert self.teacher is not None
        crops = [crops] if isinstance(crops, Tensor) else crops
        features = widen(self.teacher(crops[0]))
        targets = (features - self.target_mean) / (self.target_variance.sqrt() + 1e-6)
        if self.training:
            self._update_statistics(gather(features))
        mean = targets.unflatten(0, (-1, len(labels))).mean(0)
        local_crops = sum(map(len, crops[1:])) // len(labels)
        return torch.cat([targets, mean.repeat(local_crops, 1)])

    def forward(
        self, embeddings: Tensor, labels: Tensor, indices: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the mean loss, and the cosines of embeddings and ``labels``, the targets."""
        del indices
        with without_autocast(embeddings.device.type):
            embeddings = widen(embeddings)
            cosines = F.cosine_similarity(embeddings, labels)
            loss = (1 - cosines.mean() + F.smooth_l1_loss(embeddings, labels)) / 2
        return loss, cosines

    def _update_statistics(self, features: Tensor) -> None:
        self.num_batches_tracked += 1
        momentum = (1 / self.num_batches_tracked.to(features.dtype)).clamp(min=0.001)
        variance, mean = torch.var_mean(features, 0, correction=0)
        variance += (1 - momentum) * (mean - self.target_mean).square()  # between old and new mean
        self.target_variance.lerp_(variance, momentum)
        self.target_mean.lerp_(mean, momentum)
