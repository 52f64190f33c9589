"""Compare our warm-started path of logistic regressions with scikit-learn's separate fits.

    python -m benchmarks.logistic --out benchmarks/results/logistic.json

Takes minutes. The features are synthetic: Gaussian classes, variances that fall as a power of rank,
a random rotation, and negative values set to zero as after a ReLU. The features of ``digits`` are
real: scikit-learn's handwritten digits at 32 px, encoded by timm's resnet10t with random weights
(1198 x 512, 10 classes). Variants on the same float32 features, measured alternately:

- ours: ``fit_path`` over all C;
- ours, axes known: the same with precomputed principal axes, which the evaluation computes once and
  shares between its paths;
- scikit-learn: ``LogisticRegression`` (lbfgs, tol 1e-4) for each C, with the default of at most 100
  iterations and without its warnings.

``ratio`` is scikit-learn's time divided by ours; ``excess`` is the largest relative excess of our
objective over scikit-learn's, in float64.

`--device cuda` instead compares k-NN, logistic regression and linear layers there and on the CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from benchmarks import measure
from trex_models.data.center_crop import CenterCrop
from trex_models.data.samples import digits
from trex_models.evaluation import linear
from trex_models.evaluation.extract import extract_features
from trex_models.evaluation.knn import knn_votes
from trex_models.evaluation.logistic import LogisticFit, fit_path, objective, principal_axes

_SMALL, _DIGITS, _PETS = "1000x256x10", "digits", "3680x2048x37"


def features(samples: int, width: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return synthetic features, (samples, width) float32, and cyclic labels, (samples,)."""
    generator = torch.Generator().manual_seed(seed)
    deviations = torch.arange(1, width + 1) ** -0.6
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    centers = 0.6 * torch.randn(classes, width, generator=generator)
    labels = torch.arange(samples) % classes
    noise = torch.randn(samples, width, generator=generator)
    return torch.relu(2 * ((centers[labels] + noise) * deviations) @ rotation + 0.1), labels


def digit_features() -> tuple[Tensor, Tensor]:
    """Return features and labels of the handwritten digits."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=0)
    train, _ = digits(32)
    crop = CenterCrop(size=(32, 32), crop_pct=1.0, interpolation="bicubic")
    return torch.from_numpy(extract_features(model, train, crop)), torch.as_tensor(train.labels)


def fit_scikit_learn(x: Tensor, y: Tensor, strength: float) -> LogisticRegression:
    """Fit scikit-learn's classifier, without a warning if it does not converge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "lbfgs failed", UserWarning)
        return LogisticRegression(C=strength).fit(x.numpy(), y.numpy())


def excess(x: Tensor, y: Tensor, ours: LogisticFit, theirs: LogisticRegression) -> float:
    """Return the relative excess of our objective over scikit-learn's."""
    weight, intercept = torch.as_tensor(theirs.coef_), torch.as_tensor(theirs.intercept_)
    cost = objective(x, y, ours.weight.double(), ours.intercept.double(), ours.C)
    return cost / objective(x, y, weight.double(), intercept.double(), ours.C) - 1


def benchmark(size: str, rounds: int, strengths: Sequence[float]) -> dict[str, Any]:
    """Measure and print one problem: ``SAMPLESxWIDTHxCLASSES`` or ``digits``."""
    if size == _DIGITS:
        x, y = digit_features()
    else:
        samples, width, classes = map(int, size.split("x"))
        x, y = (part[:samples] for part in features(2 * samples, width, classes))
    fits: list[LogisticFit] = []
    models: list[LogisticRegression] = []

    def fit_ours() -> None:
        fits[:] = fit_path(x, y, strengths)

    def fit_theirs() -> None:
        models[:] = [fit_scikit_learn(x, y, strength) for strength in strengths]

    axes = principal_axes(x)
    variants = {
        "ours": partial(measure.seconds, fit_ours),
        "ours, axes known": partial(measure.seconds, partial(fit_path, x, y, strengths, axes=axes)),
        "scikit-learn": partial(measure.seconds, fit_theirs),
    }
    seconds = measure.alternate(variants, rounds, warm_up=0)
    result: dict[str, Any] = {
        "size": size,
        "num_C": len(strengths),
        "seconds": measure.spreads(seconds),
        "ratio": measure.ratios(seconds["scikit-learn"], seconds["ours"]),
        "ratio_axes_known": measure.ratios(seconds["scikit-learn"], seconds["ours, axes known"]),
        "excess": max(excess(x, y, *pair) for pair in zip(fits, models, strict=True)),
        "iterations": {
            "ours": sum(fitted.iterations for fitted in fits),
            "ours, axes known": sum(f.iterations for f in fit_path(x, y, strengths, axes=axes)),
            "scikit-learn": sum(int(model.n_iter_[0]) for model in models),
        },
    }
    print(
        f"{size}, {len(strengths)} values of C: ratio {measure.format_spread(result['ratio'])}, "
        f"axes known {measure.format_spread(result['ratio_axes_known'])}"
    )
    for name, values in result["seconds"].items():
        total = result["iterations"][name]
        print(f"  {name}: {measure.format_spread(values, ' s')}, {total} iterations")
    print(f"  largest excess of our objective: {result['excess']:.1e}")
    return result


def devices(size: str, device: torch.device) -> dict[str, float]:
    """Compare three classifiers on a device with the CPU: seconds and equal predictions."""
    samples, width, classes = map(int, size.split("x"))
    data, labels = features(2 * samples, width, classes)
    (x, queries), y = F.normalize(data).split(samples), labels[:samples]
    labeled, settings = linear.Samples(x, y, torch.arange(samples)), [linear.Setting(0.5, 0.0)]
    train = partial(linear.fit, labeled, settings, num_classes=classes, epochs=20)
    methods: dict[str, Callable[[torch.device], Tensor]] = {
        "k-NN": lambda on: knn_votes(x.to(on), y.to(on), queries.to(on), classes),
        "logistic": lambda on: fit_path(x.to(on), y.to(on), [1.0])[0].logits(queries.to(on)),
        "linear": lambda on: train(device=on).logits(queries.to(on))[:, 0],
    }
    found: dict[str, float] = {}
    for name, scores in methods.items():
        cpu, other = (scores(torch.device(on)).argmax(1).cpu() for on in ("cpu", device))
        found[f"{name}, equal predictions"] = (cpu == other).double().mean().item()
        for on in (torch.device("cpu"), device):
            found[f"{name}, s on {on}"] = measure.seconds(partial(scores, on), on)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = measure.parser("logistic", __doc__)
    parser.add_argument("--sizes", nargs="+", default=[_SMALL, _DIGITS, _PETS], help="NxFxC")
    parser.add_argument("--rounds", type=int, nargs="+", default=[3, 1, 1], help="for each size")
    parser.add_argument("--num-C", type=int, default=30, help="number of C from 1e-5 to 1e6")
    parser.add_argument("--device", type=torch.device, help="compare this device with the CPU")
    args = parser.parse_args(arguments)
    if args.device:
        found = devices(args.sizes[0], args.device)
        measure.record(args.out, {"machine": measure.machine(str(args.device)), "devices": found})
        return
    if len(args.rounds) != len(args.sizes):
        parser.error(f"--rounds must have {len(args.sizes)} numbers, one for each size")
    strengths = np.logspace(-5, 6, args.num_C).tolist()
    sizes = zip(args.sizes, args.rounds, strict=True)
    results = [benchmark(size, rounds, strengths) for size, rounds in sizes]
    ratio = results[-1]["ratio"]["median"]
    measure.record(args.out, {"machine": measure.machine(), "ratio": ratio, "results": results})


if __name__ == "__main__":
    main()
