"""What the papers claim, as differences between cells, and what our runs say of it.

Intervals are of 95 %, over seeds: Student's of one cell, Welch's of a difference.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import ttest_ind

from benchmarks.study.cells import CELLS
from trex_models.transfer.scores import student_interval

Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""By cell, what its runs found, a seed each."""


class Estimate(NamedTuple):
    """A mean over seeds, or a difference of two, with its interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Measure:
    """A number that every run has."""

    title: str
    of: Callable[[Mapping[str, Any]], float | None]
    """Takes a run's result; None where the run has none."""
    form: str
    """Of a value in tables."""
    scale: float = 1.0
    """What a value is multiplied by to be written."""

    def text(self, estimate: Estimate, sign: str = "") -> str:
        """Write an estimate and its interval."""
        mean, low, high = (f"{self.scale * v:{sign}{self.form}}" for v in estimate)
        return f"{mean} ({low} to {high})"


def _fit(result: Mapping[str, Any]) -> float | None:
    head = result["head"]
    return float(head["train"]) if head else None


def _gap(result: Mapping[str, Any]) -> float | None:
    head = result["head"]
    return head["train"] - head["test"] if head else None


def _change(result: Mapping[str, Any]) -> float | None:
    """Return the mean change a step over the training, without its first tenth."""
    change = result["curves"].get("prototype_change")
    return statistics.fmean(change[len(change) // 10 :]) if change else None


MEASURES = {
    "task": Measure("training task, top-1 %", lambda r: float(r["task_top1"]), ".1f", 100),
    "transfer": Measure("transfer, log-odds", lambda r: float(r["transfer_log_odds"]), ".3f"),
    "change": Measure("change of class vectors a step", _change, ".4f"),
    "fit": Measure("head on its training images, top-1 %", _fit, ".1f", 100),
    "gap": Measure("head: training less new images, points", _gap, ".1f", 100),
}


@dataclass(frozen=True)
class Claim:
    """That one cell has more of something than another."""

    text: str
    more: str
    """Name of a cell."""
    less: str
    measure: str
    """A key of ``MEASURES``."""


CLAIMS = [
    *(
        Claim(f"Local crops help the training task, L = {layers}", cell, f"{cell}-global", "task")
        for layers, cell in ((1, "cosine-1"), (3, "cosine-3"))
    ),
    *(
        Claim(f"Local crops help transfer, L = {layers}", cell, f"{cell}-global", "transfer")
        for layers, cell in ((1, "cosine-1"), (3, "cosine-3"))
    ),
    Claim("Depth costs accuracy on the training task, learned", "cosine-1", "cosine-3", "task"),
    Claim("Depth costs accuracy on the training task, OCM", "ocm-1", "ocm-3", "task"),
    Claim("Depth helps transfer, learned", "cosine-3", "cosine-1", "transfer"),
    Claim("Depth helps transfer, OCM", "ocm-3", "ocm-1", "transfer"),
    Claim("t-ReX* is above plain softmax on the training task", "ocm-1", "softmax-global", "task"),
    Claim("t-ReX* is above plain softmax in transfer", "ocm-1", "softmax-global", "transfer"),
    Claim("t-ReX is above plain softmax in transfer", "ocm-3", "softmax-global", "transfer"),
    Claim("t-ReX* is above LOOK on the training task", "ocm-1", "look-1", "task"),
    Claim("t-ReX is above LOOK in transfer", "ocm-3", "look-1", "transfer"),
    Claim("OCM's class vectors change more, L = 1", "ocm-1", "cosine-1", "change"),
    Claim("OCM's class vectors change more, L = 3", "ocm-3", "cosine-3", "change"),
    Claim("OCM overfits less, L = 1", "cosine-1", "ocm-1", "gap"),
    Claim("OCM overfits less, L = 3", "cosine-3", "ocm-3", "gap"),
]


def read_results(folder: Path) -> Results:
    """Read the results of all runs, in the order of ``CELLS`` and of the seeds.

    Raises:
        ValueError: There are none, or runs differ in their images or length.
    """
    results = {
        name: [
            json.loads(path.read_text())
            for path in sorted(folder.glob(f"{name}-[0-9]*.json"))
            if path.stem.removeprefix(f"{name}-").isdigit()
        ]
        for name in CELLS
    }
    results = {name: runs for name, runs in results.items() if runs}
    if not results:
        raise ValueError(f"{folder} has no results; python -m benchmarks.study run makes them")
    first, *others = [run for runs in results.values() for run in runs]
    for run in others:
        for what in ("epochs", "images"):
            if _conditions(run)[what] != _conditions(first)[what]:
                raise ValueError(
                    f"{folder}: {run['cell']}-{run['seed']}.json differs in its {what} from "
                    f"{first['cell']}-{first['seed']}.json; delete what is of another study"
                )
    return results


def _conditions(run: Mapping[str, Any]) -> dict[str, Any]:
    images = {name: entry["images"] for name, entry in run["data_sets"].items()}
    return {"epochs": run["settings"]["optim.epochs"], "images": images}


def values(runs: Sequence[Mapping[str, Any]], measure: Measure) -> list[float]:
    """Return a number of a cell's runs; empty if they have none."""
    found = [measure.of(run) for run in runs]
    return [value for value in found if value is not None]


def estimate(numbers: Sequence[float]) -> Estimate:
    """Return the mean; of a single number the interval is the number."""
    mean = statistics.fmean(numbers)
    return Estimate(mean, *(student_interval(numbers) or (mean, mean)))


def difference(more: Sequence[float], less: Sequence[float]) -> Estimate:
    """Return a difference of means, with Welch's interval; NaN where there is one seed alone."""
    interval = ttest_ind(more, less, equal_var=False).confidence_interval(0.95)
    mean = statistics.fmean(more) - statistics.fmean(less)
    return Estimate(mean, float(interval.low), float(interval.high))


def verdict(found: Estimate) -> str:
    """Return what an interval says of a claim that the difference is above 0."""
    if found.low > 0:
        return "holds"
    return "fails" if found.high < 0 else "within noise"


def tested(results: Results) -> list[tuple[Claim, Estimate]]:
    """Return the claims whose cells have been run at least twice, with their differences."""
    found = []
    for claim in CLAIMS:
        measure = MEASURES[claim.measure]
        more, less = (values(results.get(n, ()), measure) for n in (claim.more, claim.less))
        if min(len(more), len(less)) > 1:
            found.append((claim, difference(more, less)))
    return found
