"""The study's numbers as tables in Markdown."""

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
    """Write half the width of an interval of percents, if there is one."""
    return f" +- {100 * (share.high - share.mean):.1f}" if share.has_interval else ""


def cells(results: Results, measured: Sequence[str]) -> str:
    """Return measures of each cell, keys of ``MEASURES``, with intervals."""
    chosen = [MEASURES[key] for key in measured]
    rows = []
    for name, runs in results.items():
        found = [(measure, values(runs, measure)) for measure in chosen]
        shown = [measure.text(estimate(v)) if v else "-" for measure, v in found]
        rate = runs[0]["settings"]["optim.base-lr"]
        rows.append([CELLS[name].title, f"{rate:g}", str(len(runs)), *shown])
    return _table(["", "learning rate", "seeds", *(measure.title for measure in chosen)], rows)


def datasets(results: Results) -> str:
    """Return top-1 on each dataset in percent, with half the width of its interval among cells."""
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
    """Return what a change does to top-1 on each dataset, in points, with half the interval."""
    names = list_datasets(results)
    rows = []
    for title, pairs in found_effects(results).items():
        for kind, pair in pairs.items():
            found = by_dataset(results, pair).values()
            shown = [f"{100 * e.mean:+.1f}{_half(e)}" for e in found]
            rows.append([f"{title}, {kind}", *shown])
    return _table(["difference in top-1, points", *(TITLES[name] for name in names)], rows)


def claims(tested: Iterable[Tested]) -> str:
    """Return each claim, the difference that it is about, and the verdict."""
    rows = []
    for test in tested:
        measure = MEASURES[test.claim.measure]
        pooled, paired, welch = (measure.text(e, "+") for e in test[1:])
        rows.append([test.claim.text, measure.title, pooled, test.verdict, paired, welch])
    blocks = "seeds as blocks, pooled (95 %)"
    others = "blocks, the two cells alone", "runs as independent"
    return _table(["claim", "difference in", blocks, "verdict", *others], rows)


def search(searches: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what the searches for a learning rate found."""
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
    """Say how much heads know at least of their training images."""
    runs = [run for runs in results.values() for run in runs if run["head"]]
    if not runs:
        return "No run has a head."
    least = min(runs, key=lambda run: run["head"]["train"])
    return (
        f"Every head knows at least {100 * least['head']['train']:.1f} % of its training images "
        f"({CELLS[least['cell']].title}, seed {least['seed']}, has the least of {len(runs)} runs)."
    )


def core_hours(runs: Iterable[Mapping[str, Any]]) -> float:
    """Return the processor time of runs."""
    return sum(run["core_seconds"] for run in runs) / 3600
