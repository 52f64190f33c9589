"""Transfer protocol of the paper: from frozen features to scores.

t-ReX (arXiv 2206.15369), section 4.1 and appendix: on each dataset, the hyperparameters of a linear
classifier are chosen on a held-out fifth of the training images; then it is fitted to all of them.
Small datasets use logistic regression, large ones a linear layer and SGD. We add k-NN scores.

The ``samples`` of each function are training features, (N, F) float32 or float16, which may be
memory-mapped; training labels, (N,) integers; test features, (M, F); and test labels, (M,).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trex_models.cli import progress_bar
from trex_models.evaluation import linear, logistic
from trex_models.evaluation.inputs import as_tensor, require_finite, require_samples
from trex_models.evaluation.knn import knn_accuracy
from trex_models.evaluation.linear import Samples, Setting
from trex_models.evaluation.logistic import LogisticFit
from trex_models.evaluation.splits import held_out

C_GRID = tuple(10 ** (-5 + 11 * i / 29) for i in range(30))
SGD_GRID = tuple(
    Setting(10 ** (-1 + 3 * i / 5), 10 ** (-12 + 8 * j / 4)) for i in range(6) for j in range(5)
)
VALIDATION_SHARE = 0.2
K, TEMPERATURE = 20, 0.07

PROTOCOL: dict[str, Any] = {
    "note": "The classifiers' settings are chosen from a deterministic logarithmic grid of 30 in "
    "place of the paper's 30 TPE trials.",
    "validation": "a fifth of each class of the training images, drawn from the seed",
    "logistic": {
        "classifier": "multinomial logistic regression by L-BFGS, L2 penalty",
        "features": "unchanged",
        "C": list(C_GRID),
        "final": "fitted to all training images along the values of C, up to the chosen one",
    },
    "sgd": {
        "classifier": "a linear layer by SGD, cosine learning rate",
        "features": "L2-normalized",
        "momentum": linear.MOMENTUM,
        "epochs": linear.EPOCHS,
        "batch_size": linear.BATCH,
        "learning_rate": sorted({setting.learning_rate for setting in SGD_GRID}),
        "weight_decay": sorted({setting.weight_decay for setting in SGD_GRID}),
    },
    "knn": {
        "classifier": "k nearest neighbors by cosine similarity s, voting with exp(s / T)",
        "k": K,
        "temperature": TEMPERATURE,
    },
    "score": "mean over datasets of ln(p / (1 - p)), p the top-1 accuracy on the test images",
}
"""Description of the protocol in reports."""
_REMEDY = "; delete the feature file and extract it again, or check the image and the weights"


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Hyperparameters chosen on the validation samples of one seed, and their test score."""

    seed: int
    """Seed of the validation split and, for SGD, of the data order."""
    settings: dict[str, float]
    validation_top1: float
    top1: float
    """Top-1 accuracy on the test samples, after fitting to all training samples."""
    curve: list[float]
    """Validation top-1 accuracies, in the order of the grid."""
    at_end: list[str]
    """Hyperparameters chosen at an end of the grid: values beyond it might be better."""
    converged: bool
    """True if the last fit reached its tolerance; always True for SGD, which has none."""


def logistic_scores(
    *samples: np.ndarray,
    seeds: Sequence[int],
    Cs: Sequence[float] = C_GRID,  # noqa: N803 - several C
    device: torch.device | str = "cpu",
) -> list[SearchResult]:
    """Choose C and evaluate a logistic regression, once per seed of the validation split.

    If several values of C are equally good, the smallest is chosen. The features must fit in the
    memory of the device, see ``trex_models.evaluation.logistic.fit_path``.
    """
    task = _Task(*samples, device=device)
    x, y, test_x = (t.to(task.device) for t in (task.train, task.labels, task.test))
    axes = logistic.principal_axes(x)
    total = (len(seeds) + 1) * len(Cs)
    with progress_bar(total, "logistic regression", "fit", miniters=0) as bar:

        def watch(C: float, iterations: int, *_: float) -> None:  # noqa: N803
            bar.set_postfix_str(f"C {C:.2g}, iteration {iterations}", refresh=False)
            bar.update(iterations == 0)  # counts fits when they start

        def path(rows: Tensor, stop: int) -> list[LogisticFit]:
            return logistic.fit_path(x[rows], y[rows], Cs[:stop], axes=axes, progress=watch)

        curves = []
        for seed in seeds:
            mask = torch.from_numpy(held_out(samples[1], VALIDATION_SHARE, seed)).to(task.device)
            fits = path(~mask, len(Cs))
            curves.append([_top1(fit.logits(x[mask]), y[mask]) for fit in fits])
            del fits
        best = [int(np.argmax(curve)) for curve in curves]
        # Also a path, since a large C converges faster from a similar C than from zero weights.
        finals = path(torch.ones_like(y, dtype=torch.bool), max(best) + 1)
        bar.update(len(Cs) - len(finals))
    grid, chosen = [{"C": C} for C in Cs], [finals[index] for index in best]
    scores = [_top1(fitted.logits(test_x), task.test_labels) for fitted in chosen]
    return [
        _choice(seed, grid, curve, top1, fitted.converged)
        for seed, curve, top1, fitted in zip(seeds, curves, scores, chosen, strict=True)
    ]


def sgd_scores(
    *samples: np.ndarray,
    seeds: Sequence[int],
    settings: Sequence[Setting] = SGD_GRID,
    device: torch.device | str = "cpu",
    epochs: int = linear.EPOCHS,
    batch_size: int = linear.BATCH,
) -> list[SearchResult]:
    """Choose learning rate and weight decay and evaluate a linear layer, once per seed.

    If several settings are equally good, the first one is chosen. Features stay in their file, or
    are moved to CUDA if they fit in half of its free memory, so only the layers need memory.
    """
    task = _Task(*samples, device=device)
    everything, tests = (
        Samples(task.placed(features), labels.to(task.device), torch.arange(len(labels)))
        for features, labels in ((task.train, task.labels), (task.test, task.test_labels))
    )
    grid = [setting._asdict() for setting in settings]
    score = partial(linear.fitted_accuracies, num_classes=task.num_classes, device=task.device)
    score = partial(score, epochs=epochs, batch_size=batch_size)
    choices = []
    for seed in seeds:
        mask = torch.from_numpy(held_out(samples[1], VALIDATION_SHARE, seed))
        fitted, held = (everything._replace(rows=m.nonzero().flatten()) for m in (~mask, mask))
        title = f"linear layer, seed {seed}"
        curve = score(fitted, held, settings, seed=seed, title=f"{title}: settings")
        best = settings[int(np.argmax(curve))]
        (top1,) = score(everything, tests, [best], seed=seed, title=f"{title}: fit to all")
        choices.append(_choice(seed, grid, curve, top1, True))
    return choices


def knn_score(
    *samples: np.ndarray,
    k: int = K,
    temperature: float = TEMPERATURE,
    device: torch.device | str = "cpu",
) -> float:
    """Return the top-1 accuracy of the k-NN classifier.

    Runs on the CPU if the training features exceed half of the free memory of the CUDA device.
    """
    task = _Task(*samples, device=device)
    references = task.placed(task.train)
    with progress_bar(len(task.train) * len(task.test), "k-NN", " pairs") as bar:
        return knn_accuracy(
            references, task.labels, task.test, task.test_labels, k, temperature, bar.update
        )


def describe(seeds: Sequence[int]) -> dict[str, Any]:
    """Return the description of the protocol for a report."""
    return {**PROTOCOL, "seeds": list(seeds)}


class _Task:
    """Features and labels as tensors, with classes numbered from 0."""

    def __init__(self, *samples: np.ndarray, device: torch.device | str) -> None:
        train, train_labels, test, test_labels = samples
        require_samples(train, train_labels, "training features")
        require_samples(test, test_labels, "test features", train.shape[1])
        self.train, self.test = as_tensor(train), as_tensor(test)
        require_finite("training features", self.train, remedy=_REMEDY)
        require_finite("test features", self.test, remedy=_REMEDY)
        classes, labels = np.unique(train_labels, return_inverse=True)
        absent = np.setdiff1d(test_labels, classes)
        if len(absent):
            raise ValueError(f"label {absent[0]} has test images, but no training images; add some")
        self.device, self.num_classes = torch.device(device), len(classes)
        self.labels = torch.from_numpy(labels)
        self.test_labels = torch.from_numpy(np.searchsorted(classes, test_labels))

    def placed(self, features: Tensor) -> Tensor:
        """Move features to the CUDA device if they fit in half of its free memory."""
        if self.device.type != "cuda":
            return features
        fits = features.nbytes < torch.cuda.mem_get_info(self.device)[0] / 2
        return features.to(self.device) if fits else features


def _choice(
    seed: int, grid: Sequence[dict[str, float]], curve: list[float], top1: float, converged: bool
) -> SearchResult:
    best = int(np.argmax(curve))  # the first one in case of ties
    values = {name: [settings[name] for settings in grid] for name in grid[best]}
    return SearchResult(
        seed=seed,
        settings=grid[best],
        validation_top1=curve[best],
        top1=top1,
        curve=curve,
        at_end=[n for n, v in values.items() if v[best] in (min(v), max(v))],
        converged=converged,
    )


def _top1(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels.to(logits.device)).double().mean().item()
