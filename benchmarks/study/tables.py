"""Markdown tables of the study's results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.study.cells import CELLS
from benchmarks.study.claims import (
    MEASURES,
    Estimate,
    Results,
    Tested,
    accuracy,
    among_cells,
    by_dataset,
    estimate,
    found_effects,
    list_datasets,
    values,
)
from benchmarks.study.images import TITLES


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _half(share: Estimate) -> str:
    """Format half the width of an interval in percent, if there is one."""
    return f" +- {100 * (share.high - share.mean):.1f}" if share.has_interval else ""


def cells(results: Results, measured: Sequence[str]) -> str:
    """Format a table of measures (keys of ``MEASURES``) with intervals, by configuration."""
    chosen = [MEASURES[key] for key in measured]
    rows = []
    for name, runs in results.items():
        found = [(measure, values(runs, measure)) for measure in chosen]
        shown = [measure.text(estimate(v)) if v else "-" for measure, v in found]
        rate = runs[0]["settings"]["optim.base-lr"]
        rows.append([CELLS[name].title, f"{rate:g}", str(len(runs)), *shown])
    return _table(["", "learning rate", "seeds", *(measure.title for measure in chosen)], rows)


def datasets(results: Results) -> str:
    """Format a table of top-1 in percent by dataset, with half the width of the interval."""
    names = list_datasets(results)
    rows = []
    for cell in results:
        shown = []
        for name in names:
            found = among_cells(results, accuracy(name), cell)
            shown.append(f"{100 * found.mean:.1f}{_half(found)}")
        rows.append([CELLS[cell].title, *shown])
    return _table(["top-1, %", *(TITLES[name] for name in names)], rows)


def effects(results: Results) -> str:
    """Format a table of the effects of changes on top-1 by dataset, in percentage points."""
    names = list_datasets(results)
    rows = []
    for title, pairs in found_effects(results).items():
        for kind, pair in pairs.items():
            found = by_dataset(results, pair).values()
            shown = [f"{100 * e.mean:+.1f}{_half(e)}" for e in found]
            rows.append([f"{title}, {kind}", *shown])
    return _table(["difference in top-1, points", *(TITLES[name] for name in names)], rows)


def claims(tested: Iterable[Tested]) -> str:
    """Format a table of claims with their differences and verdicts."""
    rows = []
    for test in tested:
        measure = MEASURES[test.claim.measure]
        pooled, paired, welch = (measure.text(e, "+") for e in test[1:])
        rows.append([test.claim.text, measure.title, pooled, test.verdict, paired, welch])
    blocks = "pooled 95 % interval"
    others = "paired interval", "Welch's interval"
    return _table(["claim", "difference in", blocks, "verdict", *others], rows)


def search(searches: Mapping[str, Mapping[str, Any]]) -> str:
    """Format a table of the searches for learning rates; the best learning rate is bold."""
    rows = []
    for name, found in searches.items():
        best = f"{found['settings']['optim.base-lr']:g}"
        shown = [
            f"**{rate}: {100 * top1:.1f}**" if rate == best else f"{rate}: {100 * top1:.1f}"
            for rate, top1 in found["top1"].items()
        ]
        rows.append([CELLS[name].title, ", ".join(shown)])
    return _table(["", "learning rate: top-1 on held-out images, %"], rows)


def fit(results: Results) -> str:
    """Return a sentence with the lowest accuracy of a head on its training images."""
    runs = [run for runs in results.values() for run in runs if run["head"]]
    if not runs:
        return "No run has a head."
    least = min(runs, key=lambda run: run["head"]["train"])
    return (
        f"Every head has at least {100 * least['head']['train']:.1f} % on its training images "
        f"(minimum of {len(runs)} runs: {CELLS[least['cell']].title}, seed {least['seed']})."
    )


def core_hours(runs: Iterable[Mapping[str, Any]]) -> float:
    """Return the total CPU time of runs, in core hours."""
    return sum(run["core_seconds"] for run in runs) / 3600
