"""Compare the photometric augmentation with PIL: speed, pixel values and random parameters.

    OMP_WAIT_POLICY=passive python -m benchmarks.augment [--device cuda] [--compile]

`ratio`: Images per second for flip, jitter, gray, blur, solarization and normalization of a batch
of crops (1 x 224 and 8 x 96 per image), relative to PIL with the same parameters on one core. PIL
is timed by CPU time, and so is our augmentation if the device is a CPU.

`differences`: Our pixel levels minus those of PIL and torchvision for the same parameters, by
operation: mean absolute difference, mean, largest difference, and percentage of pixels with a
channel that differs by more than 4. `draws`: p-values of tests that our random parameters have the
same distribution as torchvision's. Takes three minutes on a CPU.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import chi2_contingency, fisher_exact, ks_2samp
from torch import Tensor

from benchmarks import measure
from benchmarks.loader import one_thread
from benchmarks.photographs import KINDS, bundled, jpeg
from benchmarks.reference_pipeline import (
    SPECS,
    Rows,
    random_boxes,
    random_rows,
    reference_crop,
    reference_photometric,
    reference_tensor,
)
from trex_models.data import photometric as ph
from trex_models.data.multicrop import Box, draw_boxes, resized_crops
from trex_models.data.photometric import PhotometricAugmentation, apply, normalize

Photographs = Sequence[NDArray[np.uint8]]

ALWAYS = PhotometricAugmentation(flip=1, jitter=1, gray=1, blur=1, solarize=1)
COLUMNS: dict[str, list[int]] = {
    "flip": [ph.FLIP],
    "jitter": [ph.JITTER, *range(ph.ORDER.start, ph.HUE + 1)],
    "gray": [ph.GRAY],
    "solarize": [ph.SOLARIZE, ph.THRESHOLD],
    "blur": [ph.SIGMA],
}
"""Operation -> columns of its parameters in a row."""

_SIZES = ((500, 375), (375, 500))  # width and height
_BATCHES = 3  # number of batches of parameters, used in rotation
_CUDA_REPEATS = 10


class Difference(NamedTuple):
    """Statistics of our pixel levels minus the reference's, or limits of these statistics."""

    mean: float
    bias: float
    most: float = math.inf
    percent_beyond_4: float = math.inf

    def within(self, limit: Difference) -> bool:
        """Return True if no statistic exceeds its limit."""
        return all(abs(value) <= most for value, most in zip(self, limit, strict=True))


LIMITS = {
    "crop": Difference(mean=0.05, bias=0.05, percent_beyond_4=0.1),
    "flip": Difference(mean=0.05, bias=0.05),
    "jitter": Difference(mean=0.05, bias=0.05),
    "gray": Difference(mean=0.05, bias=0.05),
    "solarize": Difference(mean=0.05, bias=0.05),
    "blur": Difference(mean=0.4, bias=0.2),
}
"""Limits for photographs."""


class Comparison(NamedTuple):
    """Result of a statistical test that two samples have the same distribution."""

    quantity: str
    test: str
    statistic: float
    p: float


def draw_rows(augmentation: PhotometricAugmentation, count: int, seed: int = 0) -> Rows:
    """Draw rows of parameters, (count, NUM_PARAMETERS)."""
    draws = np.random.default_rng(seed).random((count, ph.NUM_DRAWS))
    return augmentation.parameters(draws).numpy()


def our_boxes(
    height: int, width: int, scale: tuple[float, float], count: int, seed: int = 0
) -> NDArray[np.int64]:
    """Draw crop boxes, (count, 4): top, left, height, width."""
    return np.array(draw_boxes(np.random.default_rng(seed), count, height, width, scale))


def keep(rows: Rows, *operations: str) -> Rows:
    """Return a copy of the rows with all other operations disabled."""
    columns = [column for name in operations for column in COLUMNS[name]]
    kept = np.zeros_like(rows)
    kept[:, columns] = rows[:, columns]
    return kept


def cut_crops(
    photographs: Photographs,
    size: int,
    count: int,
    scale: tuple[float, float] = (0.05, 1.0),
    seed: int = 0,
) -> Tensor:
    """Cut crops with our code, cycling through photographs: (count, 3, size, size) uint8."""
    out = torch.empty(count, size, size, 3, dtype=torch.uint8)
    for row, (image, box) in zip(out, _boxes(photographs, count, scale, seed), strict=True):
        resized_crops(image, [box], size, row[None])
    return out.permute(0, 3, 1, 2)


def crop_error(
    photographs: Photographs, size: int, count: int, scale: tuple[float, float], seed: int = 0
) -> NDArray[np.int16]:
    """Return pixel levels of our crops minus PIL's, (count, size, size, 3)."""
    theirs = [
        reference_crop(Image.fromarray(image), box, size)
        for image, box in _boxes(photographs, count, scale, seed)
    ]
    return _error(cut_crops(photographs, size, count, scale, seed), theirs)


def photometric_error(images: Tensor, rows: Rows) -> NDArray[np.int16]:
    """Return pixel levels of our augmentation minus PIL's, (B, H, W, 3)."""
    theirs = [reference_photometric(*pair) for pair in zip(_pil(images), rows, strict=True)]
    return _error(apply(images, torch.from_numpy(rows)), theirs)


def summary(error: NDArray[np.int16]) -> Difference:
    """Summarize differences of pixel levels, (B, H, W, 3)."""
    size = np.abs(error)
    return Difference(
        mean=float(size.mean()),
        bias=float(error.mean()),
        most=float(size.max()),
        percent_beyond_4=float((size > 4).any(axis=3).mean() * 100),
    )


def compare_boxes(ours: NDArray[np.int64], theirs: NDArray[np.int64]) -> list[Comparison]:
    """Compare the distributions of boxes, (n, 4) each, by position, size and shape."""

    def quantities(boxes: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        top, left, height, width = boxes.T.astype(float)
        return {
            "top": top,
            "left": left,
            "height": height,
            "width": width,
            "area": height * width,
            "aspect": width / height,
            "center row": top + height / 2,
            "center column": left + width / 2,
        }

    reference = quantities(theirs)
    return [_kolmogorov(name, values, reference[name]) for name, values in quantities(ours).items()]


def compare_rows(ours: Rows, theirs: Rows) -> list[Comparison]:
    """Compare the distributions of photometric parameters, (n, NUM_PARAMETERS) each."""
    compared = []
    for name, (column, *_) in COLUMNS.items():
        table = [
            [(rows[:, column] > 0).sum(), (rows[:, column] <= 0).sum()] for rows in (ours, theirs)
        ]
        shares = [hits / (hits + misses) for hits, misses in table]
        p = float(fisher_exact(table).pvalue)
        compared.append(Comparison(f"{name} or not", "Fisher", float(shares[0] - shares[1]), p))
    orders = np.concatenate([rows[:, ph.ORDER] for rows in (ours, theirs)]).astype(int)
    _, kinds = np.unique(orders, axis=0, return_inverse=True)
    kinds = kinds.ravel()  # NumPy 2.0 adds a dimension
    most = int(kinds.max()) + 1
    counts = [
        np.bincount(part, minlength=most) for part in (kinds[: len(ours)], kinds[len(ours) :])
    ]
    test = chi2_contingency(counts)
    compared.append(Comparison("order", "chi squared", float(test.statistic), float(test.pvalue)))
    strengths = ("brightness", "contrast", "saturation", "hue")
    for column, name in enumerate(strengths, start=ph.FACTORS.start):
        compared.append(_kolmogorov(name, ours[:, column], theirs[:, column]))
    sigmas = [rows[rows[:, ph.SIGMA] > 0, ph.SIGMA] for rows in (ours, theirs)]
    compared.append(_kolmogorov("sigma", *sigmas))
    return compared


def speed(device: torch.device, batch: int, rounds: int, compiled: bool) -> dict[str, Any]:
    """Time our augmentation on a device and PIL's on one core, alternately."""
    crops = [cut_crops(bundled(), s.size, s.count * batch, s.scale) for s in SPECS]
    rows = [
        [draw_rows(s.augmentation, s.count * batch, seed) for s in SPECS]
        for seed in range(_BATCHES)
    ]
    on_device = [part.to(device) for part in crops]
    images = [list(_pil(part)) for part in crops]

    def batched(augment: Callable[[Tensor, Tensor], Tensor]) -> Callable[[list[Rows]], None]:
        def run(parameters: list[Rows]) -> None:
            for part, own in zip(on_device, parameters, strict=True):
                augment(part, torch.from_numpy(own))

        return run

    def reference(parameters: list[Rows]) -> None:
        for part, own in zip(images, parameters, strict=True):
            torch.stack(
                [
                    reference_tensor(reference_photometric(*pair))
                    for pair in zip(part, own, strict=True)
                ]
            )

    def timed(
        work: Callable[[list[Rows]], None], seconds: Callable[[Callable[[], None]], float]
    ) -> Callable[[], float]:
        parameters = cycle(rows)  # the same parameters for every variant
        return lambda: batch / seconds(partial(work, next(parameters)))

    clock = _cuda_seconds if device.type == "cuda" else measure.cpu_seconds
    variants = {
        "ours": timed(batched(_augment), clock),
        "reference": timed(reference, measure.cpu_seconds),
    }
    if compiled:
        variants["compiled"] = timed(batched(partial(_augment, compiled=True)), clock)
    rates = measure.alternate(variants, rounds, warm_up=_BATCHES)
    return {
        "images_per_second": measure.spreads(rates),
        "ratios": {
            name: measure.ratios(values, rates["reference"])
            for name, values in rates.items()
            if name != "reference"
        },
    }


def differences(device: torch.device, count: int) -> list[dict[str, Any]]:
    """Compare pixel values with the reference's, for each operation."""
    files = [io.BytesIO(jpeg(KINDS["standard"], index)) for index in range(len(bundled()))]
    synthetic = [np.array(Image.open(file, formats=["JPEG"])) for file in files]
    table = []
    for name, photographs in (("bundled", bundled()), ("synthetic", synthetic)):
        for spec in SPECS:
            images = cut_crops(photographs, spec.size, count, spec.scale).to(device)
            always = draw_rows(ALWAYS, count)
            errors = {
                "crop": crop_error(photographs, spec.size, count, spec.scale),
                **{part: photometric_error(images, keep(always, part)) for part in COLUMNS},
                "all but crop": photometric_error(images, draw_rows(spec.augmentation, count)),
            }
            for operation, error in errors.items():
                found, limit = summary(error), LIMITS.get(operation)
                table.append(
                    {
                        "photographs": name,
                        "size": spec.size,
                        "operation": operation,
                        **{key: float(f"{value:.3g}") for key, value in found._asdict().items()},
                        "within_limit": None if limit is None else found.within(limit),
                    }
                )
    return table


def draws(count: int) -> list[dict[str, Any]]:
    """Compare `count` of our random parameters with as many of torchvision's."""
    table = []
    for seed, spec in enumerate(SPECS):
        kind = f"crop of {spec.size}"
        for width, height in _SIZES:
            boxes = [
                draw(height, width, spec.scale, count, seed=1000 * seed + width)
                for draw in (our_boxes, random_boxes)
            ]
            table += [(f"{kind}, of {width} x {height}", found) for found in compare_boxes(*boxes)]
        rows = [draw(spec.augmentation, count, seed) for draw in (draw_rows, random_rows)]
        table += [(kind, found) for found in compare_rows(*rows)]
    return [{"of": name, **found._asdict()} for name, found in table]


@one_thread()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = measure.parser("augment", __doc__)
    parser.add_argument("--device", default="cpu", help="device of our augmentation: cpu or cuda")
    parser.add_argument("--compile", action="store_true", help="also time it with torch.compile")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=64, help="images per batch")
    parser.add_argument("--crops", type=int, default=128, help="crops per operation and crop size")
    parser.add_argument("--draws", type=int, default=20_000, help="random parameters per test")
    parsed = parser.parse_args(arguments)
    device = torch.device(parsed.device)
    timed = speed(device, parsed.batch, parsed.rounds, parsed.compile)
    for name, values in timed["images_per_second"].items():
        print(f"{name:10} {measure.format_spread(values)} images/s")
    for name, values in timed["ratios"].items():
        print(f"{name}, speed relative to the reference: {measure.format_spread(values)}")
    pixels = differences(device, parsed.crops)
    print("\n" + "  ".join(f"{name:>16}" for name in pixels[0]))
    for row in pixels:
        print("  ".join(f"{value!s:>16}" for value in row.values()))
    drawn = draws(parsed.draws)
    print()
    for row in drawn:
        found = f"{row['test']} {row['statistic']:.4g}, p {row['p']:.3g}"
        print(f"{row['of']}, {row['quantity']}: {found}")
    print(f"smallest of {len(drawn)} p-values: {min(row['p'] for row in drawn):.3g}")
    machine = measure.machine(parsed.device)
    print(f"\n{machine}")
    result = {
        "machine": machine,
        "ratio": timed["ratios"]["ours"]["median"],
        "batch": parsed.batch,
        "speed": timed,
        "crops": parsed.crops,
        "differences": pixels,
        "samples": parsed.draws,
        "draws": drawn,
    }
    measure.record(parsed.out, result)


def _augment(images: Tensor, parameters: Tensor, compiled: bool = False) -> Tensor:
    return normalize(apply(images, parameters, compiled))


def _boxes(
    photographs: Photographs, count: int, scale: tuple[float, float], seed: int
) -> Iterator[tuple[NDArray[np.uint8], Box]]:
    """Yield pairs of a photograph and a random crop box, cycling through the photographs."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        image = photographs[index % len(photographs)]
        height, width, _ = image.shape
        yield image, draw_boxes(rng, 1, height, width, scale)[0]


def _pil(images: Tensor) -> Iterator[Image.Image]:
    return map(Image.fromarray, images.cpu().permute(0, 2, 3, 1).contiguous().numpy())


def _error(ours: Tensor, theirs: Sequence[Image.Image]) -> NDArray[np.int16]:
    levels = ours.cpu().permute(0, 2, 3, 1).numpy().astype(np.int16)
    return levels - np.stack([np.asarray(image) for image in theirs])


def _kolmogorov(quantity: str, ours: NDArray[Any], theirs: NDArray[Any]) -> Comparison:
    test = ks_2samp(ours, theirs, method="asymp")
    return Comparison(quantity, "Kolmogorov-Smirnov", float(test.statistic), float(test.pvalue))


def _cuda_seconds(work: Callable[[], None]) -> float:
    """Return the mean time of a call, over several calls without synchronization in between."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(_CUDA_REPEATS):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / _CUDA_REPEATS


if __name__ == "__main__":
    main()
