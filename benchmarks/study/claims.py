"""The papers' claims as differences between cells, and the results of our runs.

Intervals are of 95 %, over seeds and for one set of images. Runs of one seed share their
initialization, so seeds are blocks: a difference is judged by the additive model of cells and
seeds, with residuals pooled over all cells as if their variances were equal. The paired interval
of the two cells, and Welch's, which assumes independent runs, are reported next to it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t, ttest_ind

from benchmarks.study.cells import CELLS
from benchmarks.study.runs import TRAINING_TASK, differing, read
from trex_models.transfer.report import student_interval

Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""By cell, what its runs found, a seed each."""


class Estimate(NamedTuple):
    """A mean over seeds, or a difference of two, with its interval; NaN of one seed."""

    mean: float
    low: float
    high: float

    @property
    def has_interval(self) -> bool:
        """Whether it is of several seeds."""
        return not math.isnan(self.low)


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
        return f"{mean} ({low} to {high})" if estimate.has_interval else mean


def _head(known: str, less: str | None = None) -> Callable[[Mapping[str, Any]], float | None]:
    """Return what takes an accuracy of a run's head, or the difference of two."""

    def of(result: Mapping[str, Any]) -> float | None:
        head = result["head"]
        return float(head[known] - (head[less] if less else 0)) if head else None

    return of


def _transfer_but_hues(result: Mapping[str, Any]) -> float:
    sets = result["datasets"].items()
    return statistics.fmean(
        e["log_odds"] for name, e in sets if name not in (TRAINING_TASK, "hues")
    )


def _change(result: Mapping[str, Any]) -> float | None:
    """Return the mean change a step over the training, without its first tenth."""
    change = result["curves"].get("prototype_change")
    return statistics.fmean(change[len(change) // 10 :]) if change else None


def _last_change(result: Mapping[str, Any]) -> float | None:
    """Return the change a step at the end, where the learning rate is near 0."""
    change = result["curves"].get("prototype_change")
    return float(change[-1]) if change else None


MEASURES = {
    "task": Measure("training task, top-1 %", lambda r: float(r["task_top1"]), ".1f", 100),
    "transfer": Measure("transfer, log-odds", lambda r: float(r["transfer_log_odds"]), ".3f"),
    "but_hues": Measure("transfer without hues, log-odds", _transfer_but_hues, ".3f"),
    "change": Measure("change of class vectors a step", _change, ".4f"),
    "last": Measure("the same at the end", _last_change, ".4f"),
    "fit": Measure("head on its training images, top-1 %", _head("train"), ".1f", 100),
    "new": Measure("head on new ones, top-1 %", _head("test"), ".1f", 100),
    "gap": Measure("head: training less new images, points", _head("train", "test"), ".1f", 100),
    "means_gap": Measure(
        "class means: training less new images, points",
        _head("means_train", "means_test"),
        ".1f",
        100,
    ),
}


def accuracy(dataset: str) -> Measure:
    """Return the measure of top-1 on a dataset."""
    return Measure("top-1, %", lambda run: float(run["datasets"][dataset]["top1"]), ".1f", 100)


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
    Claim(
        "Depth costs accuracy on the training task, no local crops",
        "cosine-1-global",
        "cosine-3-global",
        "task",
    ),
    Claim("Depth costs accuracy on the training task, OCM", "ocm-1", "ocm-3", "task"),
    Claim("Depth helps transfer, learned", "cosine-3", "cosine-1", "transfer"),
    Claim("Depth helps transfer, no local crops", "cosine-3-global", "cosine-1-global", "transfer"),
    Claim("Depth helps transfer, OCM", "ocm-3", "ocm-1", "transfer"),
    *(
        Claim(f"OCM is above learned class vectors {where}, L = {layers}", ocm, learned, measure)
        for measure, where in (("task", "on the training task"), ("transfer", "in transfer"))
        for layers, ocm, learned in ((1, "ocm-1", "cosine-1"), (3, "ocm-3", "cosine-3"))
    ),
    Claim("t-ReX* is above plain softmax on the training task", "ocm-1", "softmax-global", "task"),
    Claim("t-ReX* is above plain softmax in transfer", "ocm-1", "softmax-global", "transfer"),
    Claim("t-ReX is above plain softmax in transfer", "ocm-3", "softmax-global", "transfer"),
    Claim("t-ReX* is above LOOK on the training task", "ocm-1", "look-1", "task"),
    Claim("t-ReX is above LOOK in transfer", "ocm-3", "look-1", "transfer"),
    Claim("OCM's class vectors change more, L = 1", "ocm-1", "cosine-1", "change"),
    Claim("OCM's class vectors change more, L = 3", "ocm-3", "cosine-3", "change"),
    Claim("OCM overfits less, L = 1", "cosine-1", "ocm-1", "gap"),
    Claim("OCM overfits less, L = 3", "cosine-3", "ocm-3", "gap"),
    Claim("OCM's embeddings overfit less, L = 1", "cosine-1", "ocm-1", "means_gap"),
    Claim("OCM's embeddings overfit less, L = 3", "cosine-3", "ocm-3", "means_gap"),
]


BUT_HUES = [replace(c, measure="but_hues") for c in CLAIMS if c.measure == "transfer"]
"""The claims on transfer without the dataset on which every cell is at chance."""
LOCAL_CROPS, DEPTH = "Local crops", "Three hidden layers for one"
EFFECTS = {
    LOCAL_CROPS: {
        "L = 1": ("cosine-1", "cosine-1-global"),
        "L = 3": ("cosine-3", "cosine-3-global"),
    },
    DEPTH: {
        "learned, no local crops": ("cosine-3-global", "cosine-1-global"),
        "learned": ("cosine-3", "cosine-1"),
        "OCM": ("ocm-3", "ocm-1"),
    },
    "OCM for learned class vectors": {
        "L = 1": ("ocm-1", "cosine-1"),
        "L = 3": ("ocm-3", "cosine-3"),
    },
}
"""What a change does, by the cells with it and without."""


def found_effects(results: Results) -> dict[str, dict[str, tuple[str, str]]]:
    """Return those of ``EFFECTS`` whose cells have been run."""
    found = {
        title: {kind: pair for kind, pair in pairs.items() if set(pair) <= results.keys()}
        for title, pairs in EFFECTS.items()
    }
    return {title: pairs for title, pairs in found.items() if pairs}


def by_dataset(results: Results, pair: tuple[str, str]) -> dict[str, Estimate]:
    """Return the difference of two cells in top-1 on each dataset, with seeds as blocks."""
    with_it, without = pair
    weights = {with_it: 1.0, without: -1.0}
    return {name: contrast(results, accuracy(name), weights) for name in list_datasets(results)}


def list_datasets(results: Results) -> list[str]:
    """Return the names of the datasets, the training task first."""
    return list(next(iter(results.values()))[0]["datasets"])


def read_results(folder: Path) -> Results:
    """Read the results of all runs, in the order of ``CELLS`` and of the seeds."""
    results = {
        name: sorted(
            (
                read(path)
                for path in folder.glob(f"{name}-[0-9]*.json")
                if path.stem.removeprefix(f"{name}-").isdigit()
            ),
            key=lambda run: int(run["seed"]),
        )
        for name in CELLS
    }
    results = {name: runs for name, runs in results.items() if runs}
    if not results:
        raise ValueError(f"{folder} has no results; python -m benchmarks.study run makes them")
    first = next(iter(results.values()))[0]
    for runs in results.values():
        for run in runs:
            for other, own in ((runs[0], {"seed"}), (first, _OWN)):
                _require_alike(run, other, own, folder)
    return results


_OWN = {"optim.base-lr", "seed", *(field for cell in CELLS.values() for field in cell.settings())}


def _require_alike(
    run: Mapping[str, Any], other: Mapping[str, Any], own: Set[str], folder: Path
) -> None:
    """Check that two runs have the same settings but those of their own."""
    if what := differing(run["settings"], other["settings"], own):
        raise ValueError(
            f"{folder}: {run['cell']}-{run['seed']}.json differs in its {what} from "
            f"{other['cell']}-{other['seed']}.json; delete what is of another study"
        )


def values(runs: Sequence[Mapping[str, Any]], measure: Measure) -> list[float]:
    """Return a number of a cell's runs; empty if they have none."""
    found = [measure.of(run) for run in runs]
    return [value for value in found if value is not None]


def estimate(numbers: Sequence[float]) -> Estimate:
    """Return the mean and its interval."""
    interval = student_interval(numbers) or (math.nan, math.nan)
    return Estimate(statistics.fmean(numbers), *interval)


def welch(more: Sequence[float], less: Sequence[float]) -> Estimate:
    """Return a difference of means, with Welch's interval; NaN where there is one seed alone."""
    interval = ttest_ind(more, less, equal_var=False).confidence_interval(0.95)
    mean = statistics.fmean(more) - statistics.fmean(less)
    return Estimate(mean, float(interval.low), float(interval.high))


def contrast(results: Results, measure: Measure, weights: Mapping[str, float]) -> Estimate:
    """Return a weighted sum of the cells' effects in the additive model of cells and seeds.

    By least squares, with Student's interval; cells need not have been run with the same seeds, but
    where no seeds connect them there is no interval. For results of two cells alone with the same
    seeds it is the paired t-interval.
    """
    found = [
        (cell, run["seed"], value)
        for cell, runs in results.items()
        for run in runs
        if (value := measure.of(run)) is not None
    ]
    cells = sorted({cell for cell, _, _ in found})
    seeds = sorted({seed for _, seed, _ in found})
    design = np.array(
        [[cell == c for c in cells] + [seed == s for s in seeds] for cell, seed, _ in found], float
    )
    wanted = np.array([weights.get(cell, 0.0) for cell in cells] + [0.0] * len(seeds))
    numbers = np.array([value for _, _, value in found])
    gram = design.T @ design
    inverse = np.linalg.pinv(gram)
    fit = inverse @ design.T @ numbers
    freedom = len(numbers) - int(np.linalg.matrix_rank(design))
    mean = float(wanted @ fit)
    connected = np.allclose(gram @ inverse @ wanted, wanted)
    if not freedom or not connected:
        return Estimate(mean, math.nan, math.nan)
    variance = float(((numbers - design @ fit) ** 2).sum()) / freedom
    half = float(t.ppf(0.975, freedom)) * math.sqrt(variance * (wanted @ inverse @ wanted))
    return Estimate(mean, mean - half, mean + half)


def among_cells(results: Results, measure: Measure, cell: str) -> Estimate:
    """Return a cell's mean with the interval of its distance from the mean of all cells.

    It does not contain the effect of a seed on all cells.
    """
    names = [name for name, runs in results.items() if values(runs, measure)]
    weights = {name: (name == cell) - 1 / len(names) for name in names}
    distance = contrast(results, measure, weights)
    mean = statistics.fmean(values(results[cell], measure))
    return Estimate(mean, *(mean + end - distance.mean for end in distance[1:]))


def side(found: Estimate) -> int:
    """Return on which side of 0 an interval lies: 1, -1, or 0 if it takes 0 in."""
    return (found.low > 0) - (found.high < 0)


class Tested(NamedTuple):
    """A claim, and the difference that it is about, by three intervals."""

    claim: Claim
    difference: Estimate
    """Seeds as blocks, the residuals of all cells pooled."""
    paired: Estimate
    """Seeds as blocks, of the two cells alone."""
    welch: Estimate
    """Runs as independent."""

    @property
    def verdict(self) -> str:
        """What they say; weakly where only the pooled one leaves 0 out."""
        pooled = side(self.difference)
        if not pooled:
            return "within noise"
        firm = pooled in (side(self.paired), side(self.welch))
        return f"{'' if firm else 'weakly '}{'holds' if pooled > 0 else 'fails'}"


def tested(results: Results, claims: Sequence[Claim]) -> list[Tested]:
    """Return the claims whose cells have been run at least twice, with their differences."""
    found = []
    for claim in claims:
        measure = MEASURES[claim.measure]
        two = {name: results.get(name, ()) for name in (claim.more, claim.less)}
        more, less = (values(runs, measure) for runs in two.values())
        if min(len(more), len(less)) > 1:
            weights = {claim.more: 1.0, claim.less: -1.0}
            pooled, paired = (contrast(runs, measure, weights) for runs in (results, two))
            found.append(Tested(claim, pooled, paired, welch(more, less)))
    return found
