"""Geometry of frozen features: coding length, spectrum, sparsity, distances of classes.

All of it is of Z, the features with every row z_i at unit length:

- coding length, R(Z) = 1/2 logdet(I + F / (N eps^2) Z^T Z) in nats: MCR2 (Yu et al. 2020, arXiv
  2006.08558, section 2.1). The t-ReX paper's eps and normalization are unverified;
- singular values of Z less its mean row, over sqrt(N), and the effective rank, exp(entropy of
  sigma_i / sum_j sigma_j), Roy and Vetterli 2007;
- cosine distances 1 - z_i . z_j, over all pairs without listing them: a class of n_c rows with
  sum S_c has ||S_c||^2 - n_c = the sum of z_i . z_j over its ordered pairs i != j.

Shapes: N images, F features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trex_models.evaluation.inputs import as_tensor, require_finite, require_samples


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Numbers of one set of features; those of different F do not compare."""

    normalization: str = "rows of unit length"
    num_images: int
    """N: images whose features are not all zero."""
    zero_images: int
    """Images left out, as features that are all zero have no direction."""
    num_features: int
    num_classes: int
    """K, among the N images."""
    eps: float
    """Distortion that the coding length allows for a row of unit length."""
    coding_length: float
    """R(Z) in nats; F / 2 log(1 + 1 / eps^2) where the features are the same in all directions."""
    singular_values: list[float]
    """Those of the centered features over sqrt(N), descending, (F,); 0 if only rounding is left."""
    effective_rank: float
    """From 1 to F; 0 where all images have the same direction."""
    axes_of_95_percent: int
    """Principal axes that hold 95 % of the variance; 0 as above."""
    threshold: float
    sparsity: float
    """Share of |z| <= threshold among all images and features."""
    dead_features: int
    """Features that are zero for every image."""
    within_class_distance: float
    """Mean cosine distance of two images of a class; mean over the classes of two and more."""
    between_class_distance: float
    """Mean cosine distance of two images of two classes; mean over the pairs of classes."""
    distance_ratio: float | None
    """Within over between; None if the distance between classes is 0."""


@torch.no_grad()
def analyze(
    features: np.ndarray,
    labels: np.ndarray,
    eps: float = 0.5,
    threshold: float = 1e-5,
    chunk: int = 8192,
    device: str | torch.device = "cpu",
    progress: Callable[[int], object] | None = None,
) -> Geometry:
    """Analyze features, (N, F), of labels, (N,), in one pass, in float64.

    Takes 2 N F^2 operations, and some F^3 at the end. Holds 8 (5 F^2 + 4 K F + 4 chunk F) bytes
    at most, whatever N: a memory-mapped array may be larger than the memory. On CUDA the last
    digits may differ from one call to the next. ``progress`` is called after each chunk with its
    number of images.

    Raises:
        ValueError: A feature is not finite, or there are fewer than two classes, or no class of
            two images, among the images whose features are not all zero.
    """
    require_samples(features, labels)
    names, targets = np.unique(labels, return_inverse=True)
    images, width = features.shape
    gram = torch.zeros(width, width, dtype=torch.float64, device=device)
    sums, counts = gram.new_zeros(len(names), width), gram.new_zeros(len(names))
    alive = torch.zeros(width, dtype=torch.bool, device=device)
    near_zero = 0
    for start in range(0, images, chunk):
        z = as_tensor(features[start : start + chunk]).to(device, torch.float64, copy=True)
        require_finite("features", z, first=start)
        norms = torch.linalg.vector_norm(z, dim=1, keepdim=True)
        z /= norms.clamp_min(torch.finfo(torch.float64).tiny)  # zeros stay zeros
        directed = norms[:, 0] > 0
        members = torch.from_numpy(targets[start : start + chunk]).to(device)
        counts += torch.bincount(members[directed], minlength=len(counts))
        near_zero += _count(z.abs() <= threshold) - width * _count(~directed)
        alive |= (z != 0).any(0)
        gram.addmm_(z.T, z)
        sums.index_add_(0, members, z)
        if progress is not None:
            progress(len(z))

    counts = counts.cpu()
    kept = counts > 0
    if kept.sum() < 2 or counts.max() < 2:
        raise ValueError(
            "the geometry needs two classes and a class of two images; without features of zeros "
            f"there are {int(kept.sum())} classes, the largest of {int(counts.max())} images"
        )
    count = int(counts.sum())
    gram /= count
    mean = sums.sum(0) / count
    singular, rank, axes = _spectrum(gram - torch.outer(mean, mean))
    within, between = _distances(sums[kept.to(device)].cpu(), counts[kept])
    inner = gram.mul_(width / eps**2)
    inner.diagonal().add_(1)
    return Geometry(
        num_images=count,
        zero_images=images - count,
        num_features=width,
        num_classes=int(kept.sum()),
        eps=eps,
        coding_length=torch.linalg.cholesky(inner).diagonal().log().sum().item(),
        singular_values=singular.tolist(),
        effective_rank=rank,
        axes_of_95_percent=axes,
        threshold=threshold,
        sparsity=near_zero / (count * width),
        dead_features=_count(~alive),
        within_class_distance=within,
        between_class_distance=between,
        distance_ratio=within / between if between else None,
    )


def _spectrum(covariance: Tensor) -> tuple[Tensor, float, int]:
    """Return singular values, effective rank, and the axes that hold 95 % of the variance."""
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
    """Return mean cosine distances within and between classes, from sums of their unit rows."""
    squares = sums.square().sum(1)
    several = counts > 1
    cosines = (squares - counts)[several] / (counts * (counts - 1))[several]
    means = sums / counts[:, None]
    pairs = len(means) * (len(means) - 1)
    between = (means.sum(0).square().sum() - (squares / counts.square()).sum()) / pairs
    distances = (1 - cosine.item() for cosine in (cosines.mean(), between))
    within, apart = (distance if distance > 1e-13 else 0.0 for distance in distances)  # rounding
    return within, apart


def _count(mask: Tensor) -> int:
    return int(mask.sum())
