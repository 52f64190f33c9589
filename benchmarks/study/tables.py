"""Markdown tables of the study's results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.study.cells import CELLS
from benchmarks.study.claims import MEASURES, Results, Tested, estimate, values


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def scores(results: Results) -> str:
    """Format a table of the two scores and the heads' training accuracy, with intervals."""
    chosen = [MEASURES[key] for key in ("task", "transfer", "fit")]
    rows = []
    for name, runs in results.items():
        found = [(measure, values(runs, measure)) for measure in chosen]
        shown = [measure.text(estimate(v)) if v else "-" for measure, v in found]
        rate = runs[0]["settings"]["optim.base-lr"]
        rows.append([CELLS[name].title, f"{rate:g}", str(len(runs)), *shown])
    return _table(["", "learning rate", "seeds", *(measure.title for measure in chosen)], rows)


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
