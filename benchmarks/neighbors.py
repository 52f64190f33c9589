"""Compare k-nearest-neighbor voting with a plain matrix product and top-k.

    OMP_WAIT_POLICY=passive python -m benchmarks.neighbors

`bare` is ``(queries @ references.T).topk(k)`` for unit vectors, without normalization, checks,
votes and chunks. `product` is only the matrix product. Takes two minutes on two cores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks import measure
from trex_models.evaluation.knn import knn_votes

NUM_CLASSES = 1000


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = measure.parser("neighbors", __doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--references", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=2_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parsed = parser.parse_args(arguments)
    device = torch.device(parsed.device)
    torch.manual_seed(0)
    features = torch.randn(parsed.references, parsed.width, device=device)
    queries = torch.randn(parsed.queries, parsed.width, device=device)
    labels = torch.randint(NUM_CLASSES, (parsed.references,), device=device)
    unit_features, unit_queries = F.normalize(features, dim=1), F.normalize(queries, dim=1)
    variants: dict[str, Callable[[], object]] = {
        "ours": lambda: knn_votes(features, labels, queries, NUM_CLASSES, parsed.k),
        "bare": lambda: (unit_queries @ unit_features.T).topk(parsed.k),
        "product": lambda: unit_queries @ unit_features.T,
    }
    timed = {name: partial(measure.seconds, work, device) for name, work in variants.items()}
    times = measure.alternate(timed, parsed.rounds)
    found = measure.spreads(times)
    ratio = measure.ratios(times["ours"], times["bare"])
    for name, values in found.items():
        print(f"{name}: {measure.format_spread(values, ' s')}")
    print(f"ours, time relative to bare product and top-k: {measure.format_spread(ratio)}")
    result = {
        "machine": measure.machine(parsed.device),
        "ratio": measure.ratios(times["bare"], times["ours"])["median"],
        "shape": {name: getattr(parsed, name) for name in ("references", "queries", "width", "k")},
        "seconds": found,
        "share_of_bare": ratio,
    }
    measure.record(parsed.out, result)


if __name__ == "__main__":
    main()
