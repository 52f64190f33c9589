"""Claims of the papers as differences between configurations, and their statistical tests.

All intervals are 95 % intervals over seeds, for one set of images. Runs with the same seed share
their initialization, so seeds are treated as blocks: a difference is judged by the additive model
of configurations and seeds, with residuals pooled over all configurations, assuming equal variance.
The paired interval of two configurations and Welch's, for independent runs, are also reported.
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
from trex_models.transfer.intervals import student_interval

Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""Configuration -> results of its runs, one per seed."""


class Estimate(NamedTuple):
    """A mean over seeds, or a difference of means, with its interval; NaN for one seed."""

    mean: float
    low: float
    high: float

    @property
    def has_interval(self) -> bool:
        """True if the estimate has several seeds."""
        return not math.isnan(self.low)


@dataclass(frozen=True)
class Measure:
    """A score of a run."""

    title: str
    value: Callable[[Mapping[str, Any]], float | None]
    """Function that returns the score from a run's result, or None."""
    format: str
    """Format specification for tables."""
    scale: float = 1.0
    """Factor for display, such as 100 for percent."""

    def text(self, estimate: Estimate, sign: str = "") -> str:
        """Format an estimate and its interval."""
        mean, low, high = (f"{self.scale * v:{sign}{self.format}}" for v in estimate)
        return f"{mean} ({low} to {high})" if estimate.has_interval else mean


def _head(key: str, minus: str | None = None) -> Callable[[Mapping[str, Any]], float | None]:
    """Return a function that returns an accuracy of a run's head, or a difference of two."""

    def value(result: Mapping[str, Any]) -> float | None:
        head = result["head"]
        return float(head[key] - (head[minus] if minus else 0)) if head else None

    return value


def _transfer_but_hues(result: Mapping[str, Any]) -> float:
    sets = result["datasets"].items()
    return statistics.fmean(
        e["log_odds"] for name, e in sets if name not in (TRAINING_TASK, "hues")
    )


def _change(result: Mapping[str, Any]) -> float | None:
    """Return the mean change per step during training, without the first tenth."""
    change = result["curves"].get("prototype_change")
    return statistics.fmean(change[len(change) // 10 :]) if change else None


MEASURES = {
    "task": Measure("training task, top-1 %", lambda r: float(r["task_top1"]), ".1f", 100),
    "transfer": Measure("transfer, log-odds", lambda r: float(r["transfer_log_odds"]), ".3f"),
    "but_hues": Measure("transfer without hues, log-odds", _transfer_but_hues, ".3f"),
    "change": Measure("change of prototypes per step", _change, ".4f"),
    "fit": Measure("head on training images, top-1 %", _head("train"), ".1f", 100),
    "gap": Measure("head: training minus new images, points", _head("train", "test"), ".1f", 100),
    "means_gap": Measure(
        "class means: training minus new images, points",
        _head("means_train", "means_test"),
        ".1f",
        100,
    ),
}


@dataclass(frozen=True)
class Claim:
    """Claim that a measure is larger for one configuration than for another."""

    text: str
    more: str
    """Configuration with the larger value."""
    less: str
    measure: str
    """Key of ``MEASURES``."""


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
        Claim(f"OCM is above a learned classifier {where}, L = {layers}", ocm, learned, measure)
        for measure, where in (("task", "on the training task"), ("transfer", "in transfer"))
        for layers, ocm, learned in ((1, "ocm-1", "cosine-1"), (3, "ocm-3", "cosine-3"))
    ),
    Claim("t-ReX* is above plain softmax on the training task", "ocm-1", "softmax-global", "task"),
    Claim("t-ReX* is above plain softmax in transfer", "ocm-1", "softmax-global", "transfer"),
    Claim("t-ReX is above plain softmax in transfer", "ocm-3", "softmax-global", "transfer"),
    Claim("t-ReX* is above LOOK on the training task", "ocm-1", "look-1", "task"),
    Claim("t-ReX is above LOOK in transfer", "ocm-3", "look-1", "transfer"),
    Claim("OCM's prototypes change more, L = 1", "ocm-1", "cosine-1", "change"),
    Claim("OCM's prototypes change more, L = 3", "ocm-3", "cosine-3", "change"),
    Claim("OCM overfits less, L = 1", "cosine-1", "ocm-1", "gap"),
    Claim("OCM overfits less, L = 3", "cosine-3", "ocm-3", "gap"),
    Claim("OCM's embeddings overfit less, L = 1", "cosine-1", "ocm-1", "means_gap"),
    Claim("OCM's embeddings overfit less, L = 3", "cosine-3", "ocm-3", "means_gap"),
]


BUT_HUES = [replace(c, measure="but_hues") for c in CLAIMS if c.measure == "transfer"]
"""Claims on transfer without the dataset on which all configurations are at chance level."""


def read_results(folder: Path) -> Results:
    """Read the results of all runs, ordered as in ``CELLS`` and by seed."""
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
        raise ValueError(f"{folder} has no results; run python -m benchmarks.study run")
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
    """Check that two runs have the same settings, except for those in ``own``."""
    if field := differing(run["settings"], other["settings"], own):
        raise ValueError(
            f"{folder}: {run['cell']}-{run['seed']}.json and {other['cell']}-{other['seed']}.json "
            f"have different {field}; delete the results of other studies"
        )


def values(runs: Sequence[Mapping[str, Any]], measure: Measure) -> list[float]:
    """Return a measure of a configuration's runs, without runs that do not have it."""
    all_values = [measure.value(run) for run in runs]
    return [value for value in all_values if value is not None]


def estimate(numbers: Sequence[float]) -> Estimate:
    """Return the mean and Student's interval."""
    interval = student_interval(numbers) or (math.nan, math.nan)
    return Estimate(statistics.fmean(numbers), *interval)


def welch(more: Sequence[float], less: Sequence[float]) -> Estimate:
    """Return a difference of means with Welch's interval; NaN for a single seed."""
    interval = ttest_ind(more, less, equal_var=False).confidence_interval(0.95)
    mean = statistics.fmean(more) - statistics.fmean(less)
    return Estimate(mean, float(interval.low), float(interval.high))


def contrast(results: Results, measure: Measure, weights: Mapping[str, float]) -> Estimate:
    """Estimate a weighted sum of effects in the additive model of configurations and seeds.

    The model is fitted by least squares, with Student's interval. Configurations may have different
    seeds, but without common seeds there is no interval. For two configurations with the same
    seeds, the interval is the paired t-interval.
    """
    rows = [
        (cell, run["seed"], value)
        for cell, runs in results.items()
        for run in runs
        if (value := measure.value(run)) is not None
    ]
    cells = sorted({cell for cell, _, _ in rows})
    seeds = sorted({seed for _, seed, _ in rows})
    design = np.array(
        [[cell == c for c in cells] + [seed == s for s in seeds] for cell, seed, _ in rows], float
    )
    target = np.array([weights.get(cell, 0.0) for cell in cells] + [0.0] * len(seeds))
    numbers = np.array([value for _, _, value in rows])
    gram = design.T @ design
    inverse = np.linalg.pinv(gram)
    fit = inverse @ design.T @ numbers
    freedom = len(numbers) - int(np.linalg.matrix_rank(design))
    mean = float(target @ fit)
    connected = np.allclose(gram @ inverse @ target, target)
    if not freedom or not connected:
        return Estimate(mean, math.nan, math.nan)
    variance = float(((numbers - design @ fit) ** 2).sum()) / freedom
    half = float(t.ppf(0.975, freedom)) * math.sqrt(variance * (target @ inverse @ target))
    return Estimate(mean, mean - half, mean + half)


def among_cells(results: Results, measure: Measure, cell: str) -> Estimate:
    """Return a configuration's mean, with the interval of its difference from the overall mean.

    The interval excludes effects of a seed that all configurations share.
    """
    names = [name for name, runs in results.items() if values(runs, measure)]
    weights = {name: (name == cell) - 1 / len(names) for name in names}
    distance = contrast(results, measure, weights)
    mean = statistics.fmean(values(results[cell], measure))
    return Estimate(mean, *(mean + end - distance.mean for end in distance[1:]))


def side(found: Estimate) -> int:
    """Return 1 for an interval above 0, -1 for one below 0, and 0 if the interval contains 0."""
    return (found.low > 0) - (found.high < 0)


class Tested(NamedTuple):
    """A claim and its difference between two configurations, with three intervals."""

    claim: Claim
    difference: Estimate
    """Estimate with seeds as blocks and residuals pooled over all configurations."""
    paired: Estimate
    """Estimate with seeds as blocks, from only these two configurations."""
    welch: Estimate
    """Estimate for independent runs."""

    @property
    def verdict(self) -> str:
        """Verdict on the claim; "weakly" if only the pooled interval excludes 0."""
        pooled = side(self.difference)
        if not pooled:
            return "within noise"
        firm = pooled in (side(self.paired), side(self.welch))
        return f"{'' if firm else 'weakly '}{'holds' if pooled > 0 else 'fails'}"


def tested(results: Results, claims: Sequence[Claim]) -> list[Tested]:
    """Test the claims whose configurations have at least two runs each."""
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
