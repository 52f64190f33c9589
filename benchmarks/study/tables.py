"""The study's numbers as tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scipy.stats import spearmanr

from benchmarks.study.cells import CELLS
from benchmarks.study.claims import MEASURES, Claim, Estimate, Results, estimate, values, verdict
from benchmarks.study.pictures import TITLES


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tradeoff(results: Results) -> str:
    """Return the two scores of each cell and what else is measured of it, with intervals."""
    head = ["", "learning rate", "seeds", *(measure.title for measure in MEASURES.values())]
    rows = []
    for name, runs in results.items():
        found = [(measure, values(runs, measure)) for measure in MEASURES.values()]
        cells = [measure.text(estimate(v)) if v else "-" for measure, v in found]
        rates = sorted({f"{run['settings']['optim.base-lr']:g}" for run in runs})
        rows.append([CELLS[name].title, ", ".join(rates), str(len(runs)), *cells])
    return _table(head, rows)


def data_sets(results: Results) -> str:
    """Return top-1 on each data set in percent, with half the width of its interval."""
    names = list(next(iter(results.values()))[0]["data_sets"])
    rows = []
    for cell, runs in results.items():
        cells = []
        for name in names:
            found = estimate([100 * run["data_sets"][name]["top1"] for run in runs])
            cells.append(f"{found.mean:.1f} +- {found.high - found.mean:.1f}")
        rows.append([CELLS[cell].title, *cells])
    return _table(["top-1, %", *(TITLES[name] for name in names)], rows)


def claims(tested: Sequence[tuple[Claim, Estimate]]) -> str:
    """Return each claim, the difference that it is about, and the verdict."""
    rows = []
    for claim, found in tested:
        measure = MEASURES[claim.measure]
        rows.append([claim.text, measure.title, measure.text(found, "+"), verdict(found)])
    return _table(["claim", "difference in", "difference (95 % interval)", "verdict"], rows)


def search(tried: Mapping[str, Mapping[str, float]]) -> str:
    """Return what the searches for a learning rate found."""
    rows = []
    for name, scores in tried.items():
        best = max(scores, key=lambda rate: scores[rate])
        shown = [
            f"**{rate}: {100 * top1:.1f}**" if rate == best else f"{rate}: {100 * top1:.1f}"
            for rate, top1 in scores.items()
        ]
        rows.append([CELLS[name].title, ", ".join(shown)])
    return _table(["", "learning rate: top-1 on held-out images, %"], rows)


def fit(results: Results) -> str:
    """Say how the two scores go with what a head knows of its training images, over all runs."""
    runs = [run for runs in results.values() for run in runs if run["head"]]
    known = [run["head"]["train"] for run in runs]
    ranks = [
        f"{spearmanr(known, [run[score] for run in runs]).statistic:.2f} with {title}"
        for score, title in (("task_top1", "the training task"), ("transfer_log_odds", "transfer"))
    ]
    return (
        "Spearman's rank correlation of the head's top-1 on its training images: "
        f"{', '.join(ranks)} ({len(runs)} runs)."
    )


def core_hours(runs: Iterable[Mapping[str, Any]]) -> float:
    """Return the processor time of runs."""
    return sum(run["core_seconds"] for run in runs) / 3600
