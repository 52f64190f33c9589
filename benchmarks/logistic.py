"""Time a path of logistic regressions: ours, warm started, against scikit-learn's, one by one.

    python -m benchmarks.logistic --out benchmarks/results/logistic.json

Takes minutes. Features are synthetic: classes around centres, variances that fall as a power
of their rank, randomly turned, negative values set to zero as after a ReLU. Those of ``digits``
are real: scikit-learn's handwritten digits at 32 px through timm's resnet10t with random weights
(1198 x 512, 10 classes; predictions are compared on the other 599). On the same float32 features,
in turn:

- ours: ``fit_path`` over all C, as it comes;
- ours, axes known: the same with the features' principal axes, which the evaluation finds once for
  all of its paths to parts of them;
- scikit-learn: ``LogisticRegression`` (lbfgs, tol 1e-4) for each C, at most 100 iterations, its
  defaults, and none of its warnings shown;
- for a few of the C, once, scikit-learn in float64 to tol 1e-8 or 300 iterations: what objectives
  are compared with. With large C this too ends before the optimum; a negative difference says
  that ours is lower.

``ratio`` is scikit-learn's time over ours. The share of our time in matrix products is that of
torch's profiler, over the wall time of a run of its own.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure
from trex_models.data.center_crop import CenterCrop
from trex_models.data.samples import digits
from trex_models.evaluation.extract import extract_features
from trex_models.evaluation.logistic import LogisticFit, fit_path, objective, principal_axes

_SMALL, _DIGITS, _PETS = "1000x256x10", "digits", "3680x2048x37"
_PRODUCTS = {"aten::mm", "aten::addmm"}


def features(samples: int, width: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return features, (samples, width) float32, and labels, the classes in turn."""
    generator = torch.Generator().manual_seed(seed)
    deviations = torch.arange(1, width + 1) ** -0.6
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    centres = 0.6 * torch.randn(classes, width, generator=generator)
    labels = torch.arange(samples) % classes
    noise = torch.randn(samples, width, generator=generator)
    return torch.relu(2 * ((centres[labels] + noise) * deviations) @ turn + 0.1), labels


def digit_features() -> tuple[Tensor, Tensor, Tensor]:
    """Return features and labels of digits to train on, and features to test on."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=0)
    train, test = digits(32)
    crop = CenterCrop(size=(32, 32), crop_pct=1.0, interpolation="bicubic")
    x, x_test = (extract_features(model, source, crop) for source in (train, test))
    return torch.from_numpy(x), torch.as_tensor(train.labels), torch.from_numpy(x_test)


def fit_scikit_learn(
    x: Tensor, y: Tensor, strength: float, tolerance: float = 1e-4, iterations: int = 100
) -> LogisticRegression:
    """Return scikit-learn's classifier, converged or not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "lbfgs failed", UserWarning)
        model = LogisticRegression(C=strength, tol=tolerance, max_iter=iterations)
        return model.fit(x.numpy(), y.numpy())


def product_share(x: Tensor, y: Tensor, strengths: Sequence[float]) -> float:
    """Return the share of a path's wall time that matrix products take."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        start = time.perf_counter()
        fit_path(x, y, strengths)
        seconds = time.perf_counter() - start
    events = profiler.key_averages()
    products = sum(e.self_cpu_time_total for e in events if e.key in _PRODUCTS)
    return products / 1e6 / seconds


def compare(
    x: Tensor, y: Tensor, test: Tensor, ours: LogisticFit, default: Any, iterations: int
) -> dict[str, Any]:
    """Return how a fit compares with scikit-learn's by default and to tight convergence."""
    start = time.perf_counter()
    tight = fit_scikit_learn(x.double(), y, ours.C, 1e-8, iterations)
    seconds = time.perf_counter() - start

    def cost(weight: Tensor, intercept: Tensor) -> float:
        return objective(x, y, weight.double(), intercept.double(), ours.C)

    least = cost(torch.as_tensor(tight.coef_), torch.as_tensor(tight.intercept_))
    by_default = cost(torch.as_tensor(default.coef_), torch.as_tensor(default.intercept_))
    predictions = ours.logits(test).argmax(1).numpy()
    return {
        "C": ours.C,
        "iterations": ours.iterations,
        "converged": ours.converged,
        "tight_iterations": int(tight.n_iter_[0]),
        "tight_seconds": round(seconds, 2),
        "objective_tight": least,
        "relative_difference": cost(ours.weight, ours.intercept) / least - 1,
        "relative_difference_of_default": by_default / least - 1,
        "agreement_with_tight": float((predictions == tight.predict(test.numpy())).mean()),
    }


def benchmark(
    size: str, rounds: int, strengths: Sequence[float], compared: int, tight_iterations: int
) -> dict[str, Any]:
    """Measure one size, ``samples x width x classes`` or the digits; print what comes out."""
    if size == _DIGITS:
        x, y, test = digit_features()
    else:
        samples, width, classes = map(int, size.split("x"))
        x, y = features(2 * samples, width, classes)
        x, y, test = x[:samples], y[:samples], x[samples:]
    fits: list[LogisticFit] = []
    models: list[LogisticRegression] = []

    def time_ours() -> float:
        start = time.perf_counter()
        fits[:] = fit_path(x, y, strengths)
        return time.perf_counter() - start

    def time_with_axes() -> float:
        start = time.perf_counter()
        fit_path(x, y, strengths, axes=axes)
        return time.perf_counter() - start

    def time_scikit_learn() -> float:
        start = time.perf_counter()
        models[:] = [fit_scikit_learn(x, y, strength) for strength in strengths]
        return time.perf_counter() - start

    axes = principal_axes(x)
    variants = {
        "ours": time_ours,
        "ours, axes known": time_with_axes,
        "scikit-learn": time_scikit_learn,
    }
    seconds = measure.alternate(variants, rounds, warm_up=0)
    picked = np.linspace(0, len(strengths) - 1, compared).round().astype(int)
    result: dict[str, Any] = {
        "size": size,
        "num_C": len(strengths),
        "seconds": {name: measure.spread(values) for name, values in seconds.items()},
        "ratio": measure.ratios(seconds["scikit-learn"], seconds["ours"]),
        "ratio_axes_known": measure.ratios(seconds["scikit-learn"], seconds["ours, axes known"]),
        "share_of_products": round(product_share(x, y, strengths), 3),
        "iterations": {
            "ours": sum(fitted.iterations for fitted in fits),
            "ours, axes known": sum(f.iterations for f in fit_path(x, y, strengths, axes=axes)),
            "scikit-learn": sum(int(model.n_iter_[0]) for model in models),
        },
        "compared": [compare(x, y, test, fits[i], models[i], tight_iterations) for i in picked],
    }
    print(
        f"{size}, {len(strengths)} values of C: ratio {measure.shown(result['ratio'])}, "
        f"axes known {measure.shown(result['ratio_axes_known'])}"
    )
    for name, values in result["seconds"].items():
        total = result["iterations"][name]
        print(f"  {name}: {measure.shown(values, ' s')}, {total} iterations")
    print(f"  matrix products: {100 * result['share_of_products']:.0f} % of our time")
    print("         C  ours - tight   default - tight  agreement  iterations, tight's, its seconds")
    for row in result["compared"]:
        print(
            f"  {row['C']:8.1e} {row['relative_difference']:+13.1e}"
            f" {row['relative_difference_of_default']:+17.1e}"
            f" {100 * row['agreement_with_tight']:8.2f} % {row['iterations']:9d}"
            f" {row['tight_iterations']:10d} {row['tight_seconds']:12.2f}"
        )
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Time, compare, print and record."""
    parser = measure.parser("logistic", __doc__)
    parser.add_argument("--sizes", nargs="+", default=[_SMALL, _DIGITS, _PETS], help="NxFxK")
    parser.add_argument("--rounds", type=int, nargs="+", default=[3, 1, 1], help="of each size")
    parser.add_argument("--num-C", type=int, default=30, help="from 1e-5 to 1e6")
    parser.add_argument("--compared", type=int, default=3, help="how many C have objectives told")
    parser.add_argument("--tight-iterations", type=int, default=300, help="at most")
    args = parser.parse_args(arguments)
    if len(args.rounds) != len(args.sizes):
        parser.error(f"--rounds: one number for each of the {len(args.sizes)} sizes")
    out: Path = args.out
    strengths = np.logspace(-5, 6, args.num_C).tolist()
    results = [
        benchmark(size, rounds, strengths, args.compared, args.tight_iterations)
        for size, rounds in zip(args.sizes, args.rounds, strict=True)
    ]
    ratio = results[-1]["ratio"]["median"]
    measure.record(out, {"machine": measure.machine(), "ratio": ratio, "results": results})


if __name__ == "__main__":
    main()
