"""Geometry of frozen features: coding length, spectrum, sparsity and class distances.

Every measure is computed from Z, the features with each row z_i scaled to unit length:

- coding length, R(Z) = 1/2 logdet(I + F / (N eps^2) Z^T Z) in nats: MCR2 (Yu et al. 2020, arXiv
  2006.08558, section 2.1). The eps and the normalization of the t-ReX paper are unverified;
- singular values of the centered Z, divided by sqrt(N), and effective rank, exp(entropy of
  sigma_i / sum_j sigma_j), Roy and Vetterli 2007;
- cosine distances 1 - z_i . z_j, averaged over all pairs without enumerating them: in a class of
  n_c rows with sum S_c, z_i . z_j adds up to ||S_c||^2 - n_c over the ordered pairs i != j.

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
    """Measures of one set of features. Sets with different F are not comparable."""

    normalization: str = "rows of unit length"
    num_images: int
    """Number of images whose features are not all zero, N."""
    zero_images: int
    """Number of excluded images: features that are all zero have no direction."""
    num_features: int
    num_classes: int
    """Number of classes of the N images, K."""
    eps: float
    """Allowed distortion in the coding length, relative to rows of unit length."""
    coding_length: float
    """R(Z) in nats; F / 2 log(1 + 1 / eps^2) for isotropic features."""
    singular_values: list[float]
    """Singular values of the centered Z over sqrt(N), descending, (F,); 0 if below rounding."""
    effective_rank: float
    """Effective rank, from 1 to F; 0 if all images have the same direction."""
    axes_of_95_percent: int
    """Number of principal axes that explain 95 % of the variance; 0 if there is no variance."""
    threshold: float
    sparsity: float
    """Fraction of values |z| <= threshold, over all images and features."""
    dead_features: int
    """Number of features that are zero for every image."""
    within_class_distance: float
    """Mean cosine distance of images of the same class, averaged over classes of two or more."""
    between_class_distance: float
    """Mean cosine distance of images of different classes, averaged over pairs of classes."""
    distance_ratio: float | None
    """Within-class over between-class distance; None if the latter is 0."""


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
    """Measure the geometry of features, (N, F), with labels, (N,), in one pass in float64.

    Needs 2 N F^2 operations, and O(F^3) at the end. Allocates at most 8 (5 F^2 + 4 K F +
    4 chunk F) bytes for any N, so a memory-mapped array may be larger than the memory. On CUDA,
    the last digits may differ between calls. ``progress`` is called after each chunk with the
    number of images in it.

    Raises:
        ValueError: A feature is not finite; or, without the images whose features are all zero,
            there are fewer than two classes, or no class has two images.
    """
    require_samples(features, labels)
    classes, targets = np.unique(labels, return_inverse=True)
    images, width = features.shape
    gram = torch.zeros(width, width, dtype=torch.float64, device=device)
    sums, counts = gram.new_zeros(len(classes), width), gram.new_zeros(len(classes))
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
    present = counts > 0
    if present.sum() < 2 or counts.max() < 2:
        raise ValueError(
            "geometry requires two classes and a class of two images; excluding all-zero features "
            f"there are {int(present.sum())} classes, the largest of {int(counts.max())} images"
        )
    count = int(counts.sum())
    gram /= count
    mean = sums.sum(0) / count
    singular, rank, axes = _spectrum(gram - torch.outer(mean, mean))
    within, between = _distances(sums[present.to(device)].cpu(), counts[present])
    inner = gram.mul_(width / eps**2)
    inner.diagonal().add_(1)
    return Geometry(
        num_images=count,
        zero_images=images - count,
        num_features=width,
        num_classes=int(present.sum()),
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


def rankme(gram: Tensor) -> float:
    """Return the effective rank of features Z from their Gram matrix, Z^T Z, (F, F) float64.

    RankMe (Garrido et al., ICML 2023, arXiv 2210.02885): exp(entropy of sigma_i / sum_j sigma_j)
    of Z, unlike ``Geometry.effective_rank`` neither centered nor normalized. It is at most
    min(N, F); 1 if all features are multiples of one vector, and 0 if all are zero or one is not
    finite.
    """
    if not gram.isfinite().all():
        return 0.0
    return _effective_rank(torch.linalg.eigvalsh(gram).clamp_min(0).sqrt())


def _effective_rank(singular: Tensor) -> float:
    if not singular.any():
        return 0.0
    return torch.special.entr(singular / singular.sum()).sum().exp().item()


def _spectrum(covariance: Tensor) -> tuple[Tensor, float, int]:
    variances = torch.linalg.eigvalsh(covariance).flip(0).cpu()
    # Rounding errors are relative to the rows of unit length, not to the variances.
    variances[variances <= len(variances) * torch.finfo(torch.float64).eps] = 0
    singular = variances.sqrt()
    if not singular.any():
        return singular, 0.0, 0
    explained = variances.cumsum(0) / variances.sum()
    return singular, _effective_rank(singular), 1 + _count(explained < 0.95)


def _distances(sums: Tensor, counts: Tensor) -> tuple[float, float]:
    squares = sums.square().sum(1)
    several = counts > 1
    cosines = (squares - counts)[several] / (counts * (counts - 1))[several]
    means = sums / counts[:, None]
    pairs = len(means) * (len(means) - 1)
    between = (means.sum(0).square().sum() - (squares / counts.square()).sum()) / pairs
    distances = (1 - cosine.item() for cosine in (cosines.mean(), between))
    within, across = (distance if distance > 1e-13 else 0.0 for distance in distances)  # rounding
    return within, across


def _count(mask: Tensor) -> int:
    return int(mask.sum())
