"""Top-1 accuracy of simple classifiers on frozen features.

Shapes: N training samples, M test samples, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier

from trex_models.evaluation.logistic import LogisticFit, fit, fit_path


def knn_accuracy(
    features: np.ndarray,
    labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    k: int = 10,
) -> float:
    """Return the share of test samples that their k nearest neighbours vote right.

    Neighbours are by cosine distance and vote with its inverse.

    Args:
        features: (N, F).
        labels: (N,).
        test_features: (M, F).
        test_labels: (M,).
        k: Neighbours.
    """
    classifier = KNeighborsClassifier(min(k, len(labels)), weights="distance", metric="cosine")
    return float(classifier.fit(features, labels).score(test_features, test_labels))


def logistic_accuracy(
    features: np.ndarray,
    labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    strengths: Sequence[float] = (0.03, 0.3, 3.0),
    seed: int = 0,
) -> float:
    """Return the test accuracy of multinomial logistic regression.

    C (it multiplies the sum of the losses) is the best of ``strengths`` on a stratified fifth of
    the training samples; the classifier is then fitted to all of them.

    Args:
        features: (N, F), not normalised.
        labels: (N,).
        test_features: (M, F).
        test_labels: (M,).
        strengths: Values of C to try, ascending.
        seed: Of the validation split.

    Raises:
        ValueError: As of ``trex_models.evaluation.logistic.fit_path``.
    """
    classes, targets = np.unique(labels, return_inverse=True)
    x, y = torch.as_tensor(features), torch.as_tensor(targets)
    fit_rows, val_rows = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed
    )
    fits = fit_path(x[fit_rows], y[fit_rows], strengths)
    scores = [_accuracy(tried, x[val_rows], labels[val_rows], classes) for tried in fits]
    best = fits[int(np.argmax(scores))]
    return _accuracy(fit(x, y, best.C), torch.as_tensor(test_features), test_labels, classes)


def _accuracy(
    classifier: LogisticFit, features: torch.Tensor, labels: np.ndarray, classes: np.ndarray
) -> float:
    votes = classifier.logits(features).argmax(1).numpy()
    return float((classes[votes] == labels).mean())
