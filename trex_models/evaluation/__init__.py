"""Extraction of features, and classifiers on frozen features.

The names below are stable; docs/library.md shows their use.
"""

from trex_models.evaluation import logistic
from trex_models.evaluation.features import extract_features, preprocessing
from trex_models.evaluation.knn import knn_accuracy, knn_votes, nearest_neighbors
from trex_models.evaluation.logistic import LogisticFit

__all__ = [
    "LogisticFit",
    "extract_features",
    "knn_accuracy",
    "knn_votes",
    "logistic",
    "nearest_neighbors",
    "preprocessing",
]
