"""What a finished run has come to, in a few lines, from what it wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trex_models.train.reporting import duration


def summarize(folder: Path, images_per_step: int, exported: Sequence[Path]) -> list[str]:
    """Sum up a run.

    Args:
        folder: Of the run.
        images_per_step: Global batch size.
        exported: The folders of its export.

    Returns:
        Lines to print: time of training (without validation and checkpoints) and rate over all
        lives of the run, last and best figures, images that were passed over, and what to do next.
    """
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = []
    if metrics:
        images = [line["step"] * images_per_step for line in metrics]
        # By the rates: what an interruption cost is no time of training.
        spans = [
            (after - before) / line["images_per_second"]
            for before, after, line in zip([0, *images], images, metrics, strict=False)
        ]
        waited = sum(
            span * line["waiting_for_data"] for span, line in zip(spans, metrics, strict=True)
        )
        lines.append(
            f"finished: {metrics[-1]['step']} steps, {metrics[-1]['epoch']:g} epochs, "
            f"{images[-1]:,} images in {duration(sum(spans))} ({images[-1] / sum(spans):.0f} "
            f"images/s, {waited / sum(spans):.0%} waiting for data)"
        )
        lines += _figures(metrics)
    listed = folder / "unreadable.txt"
    if listed.exists():
        count = len(listed.read_text().splitlines())
        lines.append(f"{count} images could not be read and were passed over: see {listed}")
    lines.append(f"curves: python -m trex_models.plot {folder}")
    lines += [f"exported {path}" for path in exported]
    backbone = exported[0]
    lines.append(f'use it: timm.create_model("local-dir:{backbone}", pretrained=True)')
    lines.append(
        f"for the Hub, in a checkout: python -m hub build {backbone} --output HUB --name NAME "
        "--owner YOU --namespace YOU [--license ID]"
    )
    return lines


def _figures(metrics: list[dict[str, Any]]) -> list[str]:
    """Return lines with the last loss and accuracy, and the last and best validation."""
    trained = [line for line in metrics if "loss" in line]
    validated = [line for line in metrics if "val_top1" in line]
    lines = []
    if trained:
        last = trained[-1]
        lines.append(
            f"training: loss {last['loss']:.4g}, accuracy {last['accuracy']:.1%} (global crop)"
        )
    if validated:
        last = validated[-1]
        best = max(validated, key=lambda line: line["val_top1"])
        nearest = f", k-NN {last['val_knn']:.1%}" if "val_knn" in last else ""
        lines.append(
            f"validation: top-1 {last['val_top1']:.1%} (best {best['val_top1']:.1%} at epoch "
            f"{best['epoch']:g}), top-5 {last['val_top5']:.1%}{nearest}"
        )
    return lines
