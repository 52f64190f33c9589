"""Multinomial logistic regression on frozen features, dominated by matrix products.

The objective is scikit-learn's for three or more classes, with weights W and intercepts b:

    C sum_i (logsumexp_k l_ik - l_i,y(i)) + ||W||^2 / 2,  l_ik = w_k . x_i + b_k

It is minimized by L-BFGS (Nocedal and Wright, Numerical Optimization, 2nd ed., algorithm 7.4) with
a line search for the strong Wolfe conditions (section 3.5). Since logits are linear in the step, a
line search needs two products with the features: one for the logits along the search direction,
one for the gradient at its end. (torch.optim.LBFGS needs two for every trial.)

Features are centered and rotated to their principal axes, which does not change the minimum: the
intercepts compensate for the centering. On these axes the Hessian is approximately diagonal,

    C h_k lambda_j + 1,  h_k = mean_i p_ik (1 - p_ik)

with N times the variances, lambda_j. Its inverse is the initial inverse Hessian in each iteration,
without which unequal variances would require many iterations.

Along a path of C, each fit first searches along the line through the last two fits, since W is
smooth in log C. The logits along this line are known, so this step costs one product and saves
many. The history of L-BFGS stores steps and changes of the losses' gradient, which apply to any C.

Shapes: N samples, F features, K classes, R = min(N, F) principal axes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from trex_models.evaluation.inputs import require_finite, require_samples
from trex_models.precision import full_float32

_HISTORY = 10
_ARMIJO, _CURVATURE = 1e-4, 0.1  # an accurate search, since its trials need no product
_TRIALS = 30

Progress = Callable[[float, int, float, float], None]
"""Called once per iteration with C, iteration, objective and its estimated excess."""

_Pair = tuple[Tensor, Tensor, Tensor]  # step, change of the gradient, their product


@dataclass(frozen=True)
class LogisticFit:
    """Linear classifier and convergence information, the result of ``fit`` or ``fit_path``.

    Args:
        C: Inverse regularization c, as in scikit-learn.
        weight: Weights, (K, F).
        intercept: Intercepts, (K,), with zero mean as in scikit-learn.
        objective: Objective of the weights and intercepts on the original features.
        gradient_norm: Norm of the objective's gradient on the centered features.
        iterations: Number of iterations, with two products with the features each.
        converged: True if the estimated excess over the minimum is within the tolerance.
    """

    C: float
    weight: Tensor
    intercept: Tensor
    objective: float
    gradient_norm: float
    iterations: int
    converged: bool

    def logits(self, features: Tensor) -> Tensor:
        """Map features, (M, F), to logits, (M, K)."""
        return torch.addmm(self.intercept, features.to(self.weight), self.weight.T)


def fit(
    features: Tensor,
    labels: Tensor,
    C: float,  # noqa: N803 - as in scikit-learn
    **options: Any,
) -> LogisticFit:
    """Fit a multinomial logistic regression with scikit-learn's objective, on any device.

        classifier = logistic.fit(features, labels, C=1.0)
        predicted = classifier.logits(queries).argmax(1)

    See ``fit_path`` for the other arguments, the result and the errors.
    """
    return fit_path(features, labels, [C], **options)[0]


@torch.no_grad()
def fit_path(
    features: Tensor,
    labels: Tensor,
    Cs: Sequence[float],  # noqa: N803 - several C
    *,
    tolerance: float = 1e-5,
    max_iterations: int = 1000,
    chunk: int = 16384,
    axes: Tensor | None = None,
    progress: Progress | None = None,
) -> list[LogisticFit]:
    """Fit classifiers for ascending values of C, each starting from the previous one.

        fits = logistic.fit_path(features, labels, [0.01, 0.1, 1.0, 10.0])

    Runs on the device of the features, in float64 if they are float64, otherwise in float32,
    regardless of autocast and TF32. In addition to the features, allocates N (R + 5 K) + 40 K R
    numbers, and a few R x F matrices to compute the principal axes (R^3 operations).

    The excess of the objective over its minimum is estimated by half the squared gradient norm (the
    penalty has curvature 1; that of the intercepts is estimated). A fit stops once this is within
    ``tolerance``. For C >= 1000 and separable classes, it may stop earlier because of float32 or
    ``max_iterations``, with ``converged`` False.

    For K = 2, scikit-learn penalizes the difference of the two classes' weights: its classifier
    for 2 C equals this one for C.

    Args:
        features: Features, (N, F). Integers and half precision are converted to float32.
        labels: Integer labels, (N,). Each class in [0, K) must occur.
        Cs: Inverse regularization strengths, as in scikit-learn, ascending.
        tolerance: Allowed excess of the objective, relative to it.
        max_iterations: Maximum number of iterations for each C.
        chunk: Number of samples per block, in steps that do not need all samples at once.
        axes: Result of ``principal_axes``, (F, R), for a superset of these samples.
        progress: Callback, called once per iteration.

    Raises:
        ValueError: Shapes do not match, a feature is not finite, a class has no samples, there is
            only one class, or the values of C are not positive, finite and ascending.
    """
    for C in Cs:  # noqa: N806
        if not 0 < C < torch.inf:
            raise ValueError(f"C must be positive and finite, got {C}")
    for lower, upper in pairwise(Cs):
        if upper < lower:
            raise ValueError(f"values of C must ascend, got {upper} after {lower}; sort them")
    counts = _class_counts(features, labels, chunk)
    labels = labels.to(features.device, torch.int64)
    with full_float32(features.device):
        axes = principal_axes(features, chunk) if axes is None else axes
        problem = _Problem(features, labels, counts, chunk, axes)
        return [problem.minimize(C, tolerance, max_iterations, progress) for C in Cs]


@torch.no_grad()
def principal_axes(features: Tensor, chunk: int = 16384) -> Tensor:
    """Return an orthonormal basis of the centered features, (F, R).

    Pass it to ``fit_path`` as ``axes`` for these samples or subsets of them. Axes with very small
    variance are inaccurate because of rounding.
    """
    require_finite("features", features, chunk)
    with full_float32(features.device):
        mean = _mean(features, chunk)
        is_wide = len(features) < features.shape[1]
        span = torch.linalg.qr((features - mean).T).Q if is_wide else None
        gram: Tensor = mean.new_zeros(())
        for block in features.split(chunk):
            centered = block - mean
            if span is not None:
                centered = centered @ span
            gram = gram + centered.T @ centered
        axes = torch.linalg.eigh(gram).eigenvectors
        return axes if span is None else span @ axes


def objective(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    intercept: Tensor,
    C: float,  # noqa: N803
    chunk: int = 16384,
) -> float:
    """Return the objective for weights, (K, F), and intercepts, (K,); runs on their device."""
    total = 0.5 * weight.double().square().sum()
    for x, y in zip(features.split(chunk), labels.long().split(chunk), strict=True):
        logits = torch.addmm(intercept, x.to(weight), weight.T)
        total += C * _losses(logits, y.to(weight.device)[:, None])[0].sum(dtype=torch.float64)
    return total.item()


class _Problem:
    """Samples rotated to their principal axes, and the current state of the fit.

    Parameters, (K, R + 1), are weights on the axes and an intercept. ``line`` is the change of
    parameters and logits in the last fit, ``history`` the latest steps and changes of ``slopes``.
    """

    def __init__(
        self, features: Tensor, labels: Tensor, counts: Tensor, chunk: int, axes: Tensor
    ) -> None:
        self.features, self.labels, self.chunk, self.axes = features, labels, chunk, axes
        self.mean = _mean(features, chunk)
        width = axes.shape[1]
        variances = self.mean.new_zeros(width)  # times N, along the axes
        # The intercept is the weight of an additional feature, which is 1.
        self.samples = self.mean.new_ones(len(features), width + 1)
        for rows, block in zip(self.samples.split(chunk), features.split(chunk), strict=True):
            rotated = (block - self.mean) @ axes
            rows[:, :width] = rotated
            variances += rotated.square().sum(0)
        one = variances.new_ones(1)
        self.variances = torch.cat([variances, one * len(features)])
        self.penalty = torch.cat([torch.ones_like(variances), one * 0])
        self.residual = self.mean.new_empty(len(features), len(counts))
        self.history: deque[tuple[Tensor, Tensor]] = deque(maxlen=_HISTORY)
        # The optimum for zero weights: probabilities are the class frequencies.
        intercept = counts.double().log()
        self.parameters = self.mean.new_zeros(len(counts), width + 1)
        self.parameters[:, -1] = intercept - intercept.mean()
        self.logits = self.samples @ self.parameters.T
        self.line = torch.zeros_like(self.parameters), torch.zeros_like(self.logits)
        self.loss = self._evaluate(self.line[1], 0.0)[0]
        self._differentiate()

    def minimize(
        self, c: float, tolerance: float, max_iterations: int, progress: Progress | None
    ) -> LogisticFit:
        """Return the fit for one C, which is the starting point of the next call."""
        pairs = deque((self._pair(*moves, c) for moves in self.history), _HISTORY)
        start = self.parameters, self.logits.clone()
        iterations = 0
        while True:
            gradient = c * self.slopes + self.penalty * self.parameters
            curvature = c * self.spread * self.variances + self.penalty
            value = c * self.loss
            value += 0.5 * _dot(self.penalty * self.parameters, self.parameters)
            # Intercepts have no penalty; their curvature is used instead.
            least = torch.where(self.penalty > 0, self.penalty, curvature)
            excess = 0.5 * _dot(gradient / least, gradient)
            if progress is not None:
                progress(c, iterations, value, excess)
            converged = excess <= tolerance * value
            if converged or iterations == max_iterations:
                break
            direction, change = self.line
            length = 0.0 if iterations else self._search(direction, change, gradient, c)
            if not length:
                direction = _descent(gradient, pairs, curvature)
                change = self.samples @ direction.T
                length = self._search(direction, change, gradient, c)
            if not length:  # further descent is below rounding
                break
            self.parameters = self.parameters + length * direction
            slopes = self.slopes
            self._differentiate()
            self.history.append((length * direction, self.slopes - slopes))
            pairs.append(self._pair(*self.history[-1], c))
            iterations += 1
        if iterations:
            self.line = self.parameters - start[0], self.logits - start[1]
        weight = self.parameters[:, :-1] @ self.axes.T
        intercept = self.parameters[:, -1] - weight @ self.mean
        intercept -= intercept.mean()
        reached = objective(self.features, self.labels, weight, intercept, c, self.chunk)
        # If features are far from the origin, the original intercept loses precision.
        converged &= abs(reached - value) <= max(tolerance, 1e-4) * value
        norm = gradient.norm().item()
        return LogisticFit(c, weight, intercept, reached, norm, iterations, converged)

    def _differentiate(self) -> None:
        """Compute the gradient of the losses and the mean p (1 - p) of each class."""
        self.slopes = self.residual.T @ self.samples
        first, second = (torch.linalg.vector_norm(self.residual, order, 0) for order in (1, 2))
        spread = (first - second.square()) / len(self.residual)  # |r| (1 - |r|) is p (1 - p)
        self.spread = spread.clamp_min(1e-6)[:, None]

    def _pair(self, step: Tensor, change: Tensor, c: float) -> _Pair:
        change = (c * change + self.penalty * step).flatten()
        return step.flatten(), change, step.flatten().dot(change)

    def _search(self, direction: Tensor, change: Tensor, gradient: Tensor, c: float) -> float:
        """Find a step length along a descent direction by the strong Wolfe conditions.

        The objective is convex, so the step is between any two steps with slopes of opposite sign.
        Adds ``length * change`` to the logits and updates the loss and the residual. Returns the
        length, or 0 if none was found or the direction is not a descent direction.
        """
        linear = _dot(self.penalty * self.parameters, direction)
        square = _dot(self.penalty * direction, direction)
        first = _dot(gradient, direction)
        if first >= 0:
            return 0.0
        low, low_slope, high, high_slope, length = 0.0, first, 0.0, 0.0, 1.0
        for _ in range(_TRIALS):
            loss, slope = self._evaluate(change, length)
            rise = c * (loss - self.loss) + length * (linear + 0.5 * length * square)
            slope = c * slope + linear + length * square
            if rise <= _ARMIJO * length * first and abs(slope) <= -_CURVATURE * first:
                self.logits.add_(change, alpha=length)
                self.loss = loss
                return length
            if slope < 0 and rise <= _ARMIJO * length * first:
                low, low_slope = length, slope
            else:
                high, high_slope = length, slope
            if not high:
                length *= 4
            else:
                # Zero of the linearly interpolated slope, kept away from both ends.
                share = low_slope / (low_slope - high_slope) if high_slope > 0 else 0.5
                length = low + min(max(share, 0.1), 0.9) * (high - low)
        return 0.0

    def _evaluate(self, change: Tensor, length: float) -> tuple[float, float]:
        """Return loss and slope at logits + length * change; update ``residual``."""
        loss = slope = torch.zeros((), dtype=torch.float64, device=change.device)
        for start in range(0, len(change), self.chunk):
            rows = slice(start, start + self.chunk)
            moved = torch.add(self.logits[rows], change[rows], alpha=length)
            losses, self.residual[rows] = _losses(moved, self.labels[rows, None])
            loss = loss + losses.sum(dtype=torch.float64)
            slopes = (self.residual[rows] * change[rows]).sum(1)
            slope = slope + slopes.sum(dtype=torch.float64)
        return loss.item(), slope.item()


def _losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses, (N, 1), and their gradient by the logits, (N, K), for labels, (N, 1).

    Computed from the differences between the logits and the label's logit, which keeps the
    relative precision of values far below 1 (separable classes, large C).
    """
    margins = logits - logits.gather(1, labels)
    margins.scatter_(1, labels, -torch.inf)
    largest = margins.amax(1, keepdim=True).clamp_min(0)
    gradient = (margins - largest).exp_()
    sums = gradient.sum(1, keepdim=True)
    losses = largest + (sums + (-largest).expm1()).log1p()
    totals = sums + (-largest).exp()
    gradient /= totals
    gradient.scatter_(1, labels, -sums / totals)
    return losses, gradient


def _descent(gradient: Tensor, history: Sequence[_Pair], curvature: Tensor) -> Tensor:
    """Return the L-BFGS direction, -H^-1 times the gradient, by the two-loop recursion."""
    direction = -gradient.flatten()
    scales = []
    for step, change, product in reversed(history):
        scales.append(step.dot(direction) / product)
        direction.addcmul_(change, scales[-1], value=-1)
    direction /= curvature.flatten()
    for (step, change, product), scale in zip(history, reversed(scales), strict=True):
        direction.addcmul_(step, scale - change.dot(direction) / product)
    return direction.view_as(gradient)


def _mean(features: Tensor, chunk: int) -> Tensor:
    dtype = torch.promote_types(features.dtype, torch.float32)
    sums = (block.sum(0, dtype=torch.float64) for block in features.split(chunk))
    return (sum(sums, torch.zeros((), device=features.device)) / len(features)).to(dtype)


def _dot(a: Tensor, b: Tensor) -> float:
    return (a * b).sum(1).sum(dtype=torch.float64).item()


def _class_counts(features: Tensor, labels: Tensor, chunk: int) -> Tensor:
    require_samples(features, labels)
    classes, counts = labels.to(torch.int64).unique(return_counts=True)
    low, high = int(classes[0]), int(classes[-1])
    if low != 0 or not 1 <= high == len(classes) - 1:
        raise ValueError(
            "labels must be 0 to K - 1, for K at least 2, and each must occur, got "
            f"{len(classes)} different labels from {low} to {high}; use the inverse of torch.unique"
        )
    require_finite("features", features, chunk)
    largest = max(abs(bound.item()) for bound in torch.aminmax(features))
    dtype = torch.promote_types(features.dtype, torch.float32)
    if largest > torch.finfo(dtype).max ** 0.4:  # sums of squares must not overflow
        raise ValueError(f"features reach {largest:.0e}, too large for {dtype}; scale them")
    return counts
