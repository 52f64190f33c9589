"""Feature extraction and classifiers for the evaluation of frozen models.

The names in ``__all__`` are the public API; docs/library.md shows how to use them.
"""

from trex_models.evaluation import logistic
from trex_models.evaluation.extract import extract_features
from trex_models.evaluation.frozen_model import preprocessing
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
