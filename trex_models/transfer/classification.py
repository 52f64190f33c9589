"""Task classification: the transfer protocol of the paper on a dataset of class labels."""

from __future__ import annotations

import time
from dataclasses import asdict

from trex_models.cli import progress_bar
from trex_models.evaluation.geometry import analyze
from trex_models.transfer import protocol
from trex_models.transfer.datasets import OpenedDataset
from trex_models.transfer.report import accuracy, knn_scores
from trex_models.transfer.task import Context, Entry, Plan, Task


class Classification(Task):
    """Linear classifiers and k-NN on a dataset of class labels."""

    name = "classification"
    title = "linear classifiers and k-NN, the transfer protocol of the paper"
    kinds = ("classes",)

    def protocol(self, opened: OpenedDataset, _: Plan) -> Entry:
        """Return the classifier of the dataset."""
        return {"classifier": opened.classifier}

    def dependencies(self, context: Context) -> Entry:
        """Return the protocol, which the report describes once for all datasets."""
        return protocol.describe(range(context.plan.seeds))

    def evaluate(self, opened: OpenedDataset, context: Context) -> Entry:
        """Choose and fit the linear classifiers, and score them and k-NN on the test images."""
        started, plan = time.monotonic(), context.plan
        features, (train, test) = context.features(opened), opened.sources
        samples = features[0], train.labels, features[1], test.labels
        extracted = time.monotonic()
        fit = protocol.sgd_scores if opened.classifier == "sgd" else protocol.logistic_scores
        choices = fit(*samples, seeds=range(plan.seeds), device=plan.device)
        fitted = time.monotonic()
        knn = protocol.knn_score(*samples, device=plan.device)
        seconds = {"features": extracted - started, "classifiers": fitted - extracted}
        seconds["knn"] = time.monotonic() - fitted
        return {
            **accuracy([choice.top1 for choice in choices], len(test)),
            "choices": [asdict(choice) for choice in choices],
            "knn": knn_scores(knn, len(test)),
            "seconds": {key: round(value, 2) for key, value in seconds.items()},
        }


def geometry(opened: OpenedDataset, context: Context) -> Entry:
    """Return the geometry of the training images' features, or the reason why it has none."""
    source = opened.sources[0]
    features, _ = context.features(opened)
    try:
        with progress_bar(len(source), "geometry", " images") as bar:
            result = analyze(
                features, source.labels, device=context.plan.device, progress=bar.update
            )
    except ValueError as error:  # such as constant features
        print(f"      geometry is not available: {error}", flush=True)
        return {"train": None, "reason": str(error)}
    return {"train": asdict(result)}
