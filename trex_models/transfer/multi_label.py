"""Task multi-label: one-vs-rest logistic regression on frozen features, scored by mAP."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from trex_models.cli import progress_bar
from trex_models.evaluation import logistic
from trex_models.evaluation.inputs import as_tensor
from trex_models.evaluation.ranking import RULES, average_precision
from trex_models.evaluation.splits import held_out
from trex_models.transfer.datasets import OpenedDataset
from trex_models.transfer.intervals import bootstrap_scores
from trex_models.transfer.protocol import C_GRID, VALIDATION_SHARE
from trex_models.transfer.task import Context, Entry, Plan, Task


class MultiLabel(Task):
    """One-vs-rest logistic regression on images with several labels."""

    name = "multi-label"
    title = "one-vs-rest logistic regression, several labels per image"
    kinds = ("labels",)

    def protocol(self, opened: OpenedDataset, plan: Plan) -> Entry:
        """Return the protocol, with the classes that the test images cannot score."""
        test: Any = opened.sources[-1]
        scored = _scored(test.targets)
        if not len(scored):
            raise ValueError(
                f"{opened.dataset.name}: no class is present in one test image and absent in "
                "another, so there is no average precision; add test images"
            )
        return {
            "classifier": "one-vs-rest logistic regression by L-BFGS, L2 penalty",
            "inputs": "features, unchanged",
            "C": list(C_GRID),
            "selection": "per class, the smallest C with the highest average precision on a fifth "
            f"of the images with and without it, averaged over the splits of {plan.seeds} seeds",
            "final": "fitted to all training images; images whose label is ignored are left out",
            "score": "mean over classes, with a bootstrap interval over test images",
            "classes_left_out": np.delete(_names(test), scored).tolist(),
        }

    def evaluate(self, opened: OpenedDataset, context: Context) -> Entry:
        """Choose C and fit a classifier for each class, and score the test images."""
        name, (train, test) = opened.dataset.name, cast("tuple[Any, Any]", opened.sources)
        plan = context.plan
        x, test_x = (as_tensor(part).to(plan.device) for part in context.features(opened))
        axes, scored, classes = logistic.principal_axes(x), _scored(test.targets), {}
        truth = test.targets[:, scored]
        scores = np.empty(truth.shape)
        with progress_bar(len(scored), f"multi-label, {name}", " classes", miniters=0) as bar:
            for column, index in enumerate(scored):
                classifier, curve = fit_class(x, train.targets[:, index], range(plan.seeds), axes)
                scores[:, column] = binary_scores(classifier, test_x)
                classes[_names(test)[index]] = {
                    **average_precision(scores[:, column], truth[:, column]),
                    "C": C_GRID[int(np.argmax(curve))],
                    "curve": curve,
                    "converged": classifier.converged,
                }
                bar.update()
        means = partial(mean_precisions, scores, truth)
        return {"scores": bootstrap_scores(means, len(truth)), "classes": classes}


def _scored(targets: np.ndarray) -> np.ndarray:
    """Return the classes that are present in a test image and absent in another."""
    return np.flatnonzero((targets == 1).any(0) & (targets == 0).any(0))


def _names(source: Any) -> Sequence[str]:
    """Return the names of the targets; the background of scenes has none."""
    return source.classes[-source.targets.shape[1] :]


def fit_class(
    x: Tensor, targets: np.ndarray, seeds: Sequence[int], axes: Tensor
) -> tuple[logistic.LogisticFit, list[float]]:
    """Return the classifier of one class and the validation curve over ``C_GRID``."""
    known = targets >= 0
    x, targets = x[torch.from_numpy(known).to(x.device)], targets[known]
    labels = torch.from_numpy(targets).to(x.device)
    Cs = [C / 2 for C in C_GRID]  # noqa: N806 - for two classes, scikit-learn's C is twice fit's
    curves = []
    for seed in seeds:
        mask = held_out(targets, VALIDATION_SHARE, seed)
        held = torch.from_numpy(mask).to(x.device)
        fits = logistic.fit_path(x[~held], labels[~held], Cs, axes=axes)
        scores = (binary_scores(fit, x[held]) for fit in fits)
        curves.append([average_precision(values, targets[mask])["mAP"] for values in scores])
    curve = np.mean(curves, axis=0)
    return logistic.fit_path(x, labels, Cs[: curve.argmax() + 1], axes=axes)[-1], curve.tolist()


def binary_scores(classifier: logistic.LogisticFit, features: Tensor) -> np.ndarray:
    """Return the differences of the logits, present minus absent, (N,)."""
    absent, present = classifier.logits(features).T.cpu().numpy()
    return present - absent


def mean_precisions(scores: np.ndarray, targets: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """Return the means over the classes that have positives in ``rows``, resampled images."""
    pairs = zip(scores[rows].T, targets[rows].T, strict=True)
    values = [[*average_precision(*pair).values()] for pair in pairs]
    present = [value for value in values if not np.isnan(value[0])] or [[np.nan] * len(RULES)]
    return dict(zip(RULES, np.mean(present, axis=0).tolist(), strict=True))
