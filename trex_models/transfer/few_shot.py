"""Task few-shot: classifiers fitted to k training images per class, over random episodes.

The images of an episode are those with the smallest hashes of class, file and episode, so that
every model uses the same ones, and those of 1 shot are among those of 2. Two classifiers:

- multinomial logistic regression on L2-normalized features with a fixed C, since so few images
  cannot be split to choose it;
- the nearest class mean of the L2-normalized features by cosine similarity (Snell et al., arXiv
  1703.05175; Wang et al., "SimpleShot", arXiv 1911.04623, named L2N there).

All classes and all test images are used in each episode. Classes with fewer than k images
contribute all that they have; a k that no class has is left out.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trex_models.cli import progress_bar
from trex_models.data.image_files import FileSource
from trex_models.data.sources import Source
from trex_models.evaluation import logistic
from trex_models.evaluation.inputs import as_tensor
from trex_models.evaluation.splits import hashed_order
from trex_models.transfer.datasets import OpenedDataset
from trex_models.transfer.intervals import score, student_interval
from trex_models.transfer.task import Context, Entry, Plan, Task

C = 100.0  # from 1, 10, 100 and 1000, the best on drawings and digits with 1 and 5 images
CLASSIFIERS = {
    "logistic regression": f"L2-normalized features, C = {C:g}",
    "nearest class mean": "L2-normalized features, cosine similarity",
}


class FewShot(Task):
    """Classifiers fitted to a few images per class."""

    name = "few-shot"
    title = "logistic regression and nearest class mean on a few images per class"
    kinds = ("classes",)

    def protocol(self, opened: OpenedDataset, plan: Plan) -> Entry:
        """Return the protocol; raise a ValueError if no class has as many images as shots."""
        counts = np.bincount(opened.sources[0].labels)
        if not (shots := _shots(opened, plan)):
            raise ValueError(
                f"--shots {plan.shots[0]}: the largest class of {opened.dataset.name} has "
                f"{counts.max()} training images; pass fewer shots"
            )
        return {
            "classifiers": CLASSIFIERS,
            "shots": shots,
            "episodes": plan.episodes,
            "images": "the smallest hashes of class, file and episode",
            "interval": "Student's t over episodes",
            "classes_with_fewer_images": {str(k): int((counts < k).sum()) for k in shots},
        }

    def evaluate(self, opened: OpenedDataset, context: Context) -> Entry:
        """Fit and score both classifiers for each number of shots and each episode."""
        plan, (train, test) = context.plan, opened.sources
        train_features, test_features = map(as_tensor, context.features(opened))
        labels, targets = (
            torch.from_numpy(source.labels).to(plan.device) for source in (train, test)
        )
        queries = _normalize(test_features, plan.device)
        numbers, title = _shots(opened, plan), f"few-shot, {opened.dataset.name}"
        accuracies = np.empty((len(CLASSIFIERS), len(numbers), plan.episodes))
        with progress_bar(plan.episodes * len(numbers), title, "fit") as bar:
            for episode in range(plan.episodes):
                ranks = image_ranks(train, episode)
                for column, shots in enumerate(numbers):
                    rows = torch.from_numpy(np.flatnonzero(ranks < shots))
                    x, y = _normalize(train_features[rows], plan.device), labels[rows]
                    for row, predict in enumerate((_logistic, _class_means)):
                        correct = predict(x, y, queries) == targets
                        accuracies[row, column, episode] = correct.double().mean().item()
                    bar.update()
        scores = {
            f"{classifier}, {k}-shot": score(values.mean(), student_interval(values.tolist()))
            for classifier, rows in zip(CLASSIFIERS, accuracies, strict=True)
            for k, values in zip(numbers, rows, strict=True)
        }
        return {"scores": scores, "accuracies": accuracies.tolist()}


def _shots(opened: OpenedDataset, plan: Plan) -> list[int]:
    """Return the numbers of shots that the largest class has."""
    largest = np.bincount(opened.sources[0].labels).max()
    return [shots for shots in plan.shots if shots <= largest]


def _normalize(features: Tensor, device: str) -> Tensor:
    return F.normalize(features.to(device).float())


def image_ranks(source: Source, episode: int) -> np.ndarray:
    """Return the rank of each image, (N,), from 0, in the random order of its class.

    The order is that of the hashes of episode, class and name, which do not depend on where the
    files are stored.
    """
    numbers = [b"%d" % index for index in range(len(source))]
    names = source.paths.tolist() if isinstance(source, FileSource) else numbers
    classes = [name.encode(errors="surrogateescape") for name in source.classes]
    pairs = zip(source.labels.tolist(), names, strict=True)
    order = hashed_order([classes[label] + b"/" + name for label, name in pairs], seed=episode)
    by_class = order[np.argsort(source.labels[order], kind="stable")]
    _, starts, counts = np.unique(source.labels[by_class], return_index=True, return_counts=True)
    ranks = np.empty(len(source), np.int64)
    ranks[by_class] = np.arange(len(source)) - np.repeat(starts, counts)
    return ranks


def _logistic(x: Tensor, y: Tensor, queries: Tensor) -> Tensor:
    return logistic.fit(x, y, C, tolerance=1e-7).logits(queries).argmax(1)


def _class_means(x: Tensor, y: Tensor, queries: Tensor) -> Tensor:
    means = torch.zeros(int(y.max()) + 1, x.shape[1], device=x.device).index_add_(0, y, x)
    return (queries @ F.normalize(means).T).argmax(1)
