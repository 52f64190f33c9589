"""Random orders and splits from hashes of sample names instead of a random generator.

SHA-256 is the same on every platform and in every NumPy version, and the hash of a sample does not
depend on other samples, so adding a class or an image does not change the split of other classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def hashed_order(keys: Sequence[str] | Sequence[bytes], seed: int = 0) -> np.ndarray:
    """Return the indices that sort N keys by SHA-256 of ``seed/key``, int64; 1 us per key."""
    start = f"{seed}/".encode()
    data = (key.encode() if isinstance(key, str) else key for key in keys)
    digests = [hashlib.sha256(start + key).digest() for key in data]
    return np.array(sorted(range(len(digests)), key=digests.__getitem__), dtype=np.int64)


def held_out(labels: np.ndarray, share: float = 0.2, seed: int = 0) -> np.ndarray:
    """Return a mask, (N,) bool, of the samples to hold out for hyperparameter selection.

    Selects ``share`` of each class, rounded, but at least one sample and never all. The selection
    depends only on the label of the class and its number of samples.
    """
    mask = np.zeros(len(labels), dtype=bool)
    by_class = np.argsort(labels, kind="stable")
    classes, starts = np.unique(labels[by_class], return_index=True)
    for label, members in zip(classes.tolist(), np.split(by_class, starts[1:]), strict=False):
        if len(members) < 2:
            raise ValueError(
                f"class {label} has only one sample, but needs two; add samples or remove the class"
            )
        count = min(max(1, round(share * len(members))), len(members) - 1)
        order = hashed_order([f"{label}/{position}" for position in range(len(members))], seed)
        mask[members[order[:count]]] = True
    return mask
