"""Top-1 accuracy of simple classifiers on frozen features, by scikit-learn.

Shapes: N training samples, M test samples, F features.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier


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

    C (scikit-learn's, it multiplies the sum of the losses) is the best of ``strengths`` on a
    stratified fifth of the training samples; the classifier is then fitted to all of them.

    Args:
        features: (N, F), not normalised.
        labels: (N,).
        test_features: (M, F).
        test_labels: (M,).
        strengths: Values of C to try.
        seed: Of the validation split.
    """
    fit_x, val_x, fit_y, val_y = train_test_split(
        features, labels, test_size=0.2, stratify=labels, random_state=seed
    )
    scores = [_fit(fit_x, fit_y, c).score(val_x, val_y) for c in strengths]
    best = strengths[int(np.argmax(scores))]
    return float(_fit(features, labels, best).score(test_features, test_labels))


def _fit(features: np.ndarray, labels: np.ndarray, strength: float) -> LogisticRegression:
    with warnings.catch_warnings():
        # On separable classes large C takes thousands of steps that hardly change the votes.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=200).fit(features, labels)
