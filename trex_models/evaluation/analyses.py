"""What frozen features look like: coding length, spectrum, sparsity, distances of classes.

All of it is of Z, the features with every row at unit length. With row z_i of label y_i:

- coding length, R(Z) = 1/2 logdet(I + F / (N eps^2) Z^T Z) in nats: MCR2 (Yu et al. 2020, arXiv
  2006.08558, section 2.1), which also takes rows of unit length. What eps and normalisation the
  t-ReX paper used is unverified, so a result says its own;
- singular values of Z less its mean row, over sqrt(N): their squares are the variances along the
  principal axes; and the effective rank, exp(entropy of sigma_i / sum_j sigma_j), Roy and
  Vetterli 2007;
- cosine distances 1 - z_i . z_j, over all pairs without listing them: a class of n_c rows with
  sum S_c has ||S_c||^2 - n_c = the sum of z_i . z_j over its ordered pairs i != j.

Shapes: N images, F features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Numbers of one set of features; those of different F do not compare."""

    normalisation: str = "rows of unit length"
    """Of the features, before anything else."""
    num_images: int
    """N: images whose features are not all zero."""
    zero_images: int
    """Images left out, as features that are all zero have no direction."""
    num_features: int
    """F."""
    num_classes: int
    """K, among the N images."""
    eps: float
    """Of the coding length: the distortion allowed for a row of unit length."""
    coding_length: float
    """R(Z) in nats; F / 2 log(1 + 1 / eps^2) where the features are the same in all directions."""
    singular_values: tuple[float, ...]
    """Of the centred features over sqrt(N), descending, (F,); 0 where only rounding is left."""
    effective_rank: float
    """From 1 to F; 0 where all images have the same direction."""
    axes_of_95_percent: int
    """Principal axes that hold 95 % of the variance; 0 as above."""
    threshold: float
    """Of the sparsity."""
    sparsity: float
    """Share of |z| <= threshold among all images and features."""
    dead_features: int
    """Features that are zero for every image."""
    within_class_distance: float
    """Mean cosine distance of two images of a class; mean over the classes of two and more."""
    between_class_distance: float
    """Mean cosine distance of two images of two classes; mean over the pairs of classes."""
    distance_ratio: float | None
    """Within over between; None where no class is away from another."""

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for JSON."""
        return asdict(self) | {"singular_values": list(self.singular_values)}


@torch.no_grad()
def analyse(
    features: np.ndarray,
    labels: np.ndarray,
    eps: float = 0.5,
    threshold: float = 1e-5,
    chunk: int = 8192,
    device: str | torch.device = "cpu",
    progress: Callable[[int], object] | None = None,
) -> Analysis:
    """Analyse features in one pass, in float64.

    Takes 2 N F^2 operations, and some F^3 at the end. Holds 8 (5 F^2 + 4 K F + 4 chunk F) bytes
    at most, whatever N: a memory-mapped array may be larger than the memory. On CUDA the last
    digits may differ from one call to the next.

    Args:
        features: (N, F), of any floating type.
        labels: (N,), of any type that sorts.
        eps: Of the coding length.
        threshold: |z| up to which a feature counts as zero in the sparsity.
        chunk: Images at a time.
        device: Where to compute; it must know float64.
        progress: Called after each chunk with its number of images.

    Raises:
        ValueError: Shapes do not match, a feature is not finite, a number is out of range, or
            there are fewer than two classes, or no class of two images, among the images whose
            features are not all zero.
    """
    _require_arguments(features, labels, eps, threshold, chunk)
    names, targets = np.unique(labels, return_inverse=True)
    images, width = features.shape
    gram = torch.zeros(width, width, dtype=torch.float64, device=device)
    sums = gram.new_zeros(len(names), width)
    alive = torch.zeros(width, dtype=torch.bool, device=device)
    counts = torch.zeros(len(names), dtype=torch.float64)
    zeros = 0
    for start in range(0, images, chunk):
        # A copy: torch warns of arrays that it may not write to, such as a mapped file's.
        block = torch.from_numpy(np.array(features[start : start + chunk])).to(device).double()
        finite = block.isfinite().all(1)
        if not finite.all():
            row = start + _count(finite.cumprod(0))
            raise ValueError(f"features must be finite, but row {row} has a NaN or an infinity")
        norms = torch.linalg.vector_norm(block, dim=1, keepdim=True)
        block /= norms.clamp_min(torch.finfo(torch.float64).tiny)  # zeros stay zeros
        index = torch.from_numpy(targets[start : start + chunk]).to(device)
        directed = norms[:, 0] > 0
        counts += torch.bincount(index[directed], minlength=len(names)).cpu()
        zeros += _count(block.abs() <= threshold) - width * _count(~directed)
        alive |= (block != 0).any(0)
        gram.addmm_(block.T, block)
        sums.index_add_(0, index, block)
        if progress is not None:
            progress(len(block))

    kept = counts > 0
    if kept.sum() < 2 or counts.max() < 2:
        raise ValueError(
            "analyses need two classes and a class of two images; among the images whose features "
            f"are not all zero there are {int(kept.sum())} classes, the largest of "
            f"{int(counts.max())} images"
        )
    count = int(counts.sum())
    gram /= count
    mean = sums.sum(0) / count
    singular, rank, axes = _spectrum(gram - torch.outer(mean, mean))
    within, between = _distances(sums[kept.to(device)].cpu(), counts[kept])
    inner = gram.mul_(width / eps**2)
    inner.diagonal().add_(1)
    return Analysis(
        num_images=count,
        zero_images=images - count,
        num_features=width,
        num_classes=int(kept.sum()),
        eps=eps,
        coding_length=torch.linalg.cholesky(inner).diagonal().log().sum().item(),
        singular_values=tuple(singular.tolist()),
        effective_rank=rank,
        axes_of_95_percent=axes,
        threshold=threshold,
        sparsity=zeros / (count * width),
        dead_features=_count(~alive),
        within_class_distance=within,
        between_class_distance=between,
        distance_ratio=within / between if between else None,
    )


def _spectrum(covariance: Tensor) -> tuple[Tensor, float, int]:
    """Return singular values, effective rank, and the axes that hold 95 % of the variance.

    Args:
        covariance: (F, F), of rows of unit length.
    """
    variances = torch.linalg.eigvalsh(covariance).flip(0).cpu()
    # Rows have unit length, so rounding leaves this much, however small the variances are.
    variances[variances <= len(variances) * torch.finfo(torch.float64).eps] = 0
    singular = variances.sqrt()
    if not singular.any():
        return singular, 0.0, 0
    entropy = torch.special.entr(singular / singular.sum()).sum()
    held = variances.cumsum(0) / variances.sum()
    return singular, entropy.exp().item(), 1 + _count(held < 0.95)


def _distances(sums: Tensor, counts: Tensor) -> tuple[float, float]:
    """Return the mean cosine distances within and between classes.

    Args:
        sums: Of the classes' rows of unit length, (K, F).
        counts: Of the classes' rows, (K,), at least 1 each.
    """
    squares = sums.square().sum(1)
    several = counts > 1
    cosines = (squares - counts)[several] / (counts * (counts - 1))[several]
    means = sums / counts[:, None]
    pairs = len(means) * (len(means) - 1)
    between = (means.sum(0).square().sum() - (squares / counts.square()).sum()) / pairs
    return _distance(cosines.mean()), _distance(between)


def _distance(cosine: Tensor) -> float:
    distance = 1 - cosine.item()
    return distance if distance > 1e-13 else 0.0  # rounding


def _count(mask: Tensor) -> int:
    return int(mask.sum())


def _require_arguments(
    features: np.ndarray, labels: np.ndarray, eps: float, threshold: float, chunk: int
) -> None:
    if features.ndim != 2 or not features.size or labels.shape != features.shape[:1]:
        raise ValueError(
            "features and labels must be of shapes (N, F) and (N,) and not empty, "
            f"got {features.shape} and {labels.shape}"
        )
    if not 0 < eps < np.inf or not 0 <= threshold < np.inf or chunk < 1:
        raise ValueError(
            "eps must be above 0, threshold at least 0, both finite, and chunk at least 1, "
            f"got {eps}, {threshold} and {chunk}"
        )
