"""Random orders and splits that depend on the samples' names, not on a generator's state.

A SHA-256 is the same on every platform and in every version of numpy, and a sample's does not
depend on the others: one tiny class, or one image more, changes nothing for the other classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def hashed_order(keys: Sequence[str] | Sequence[bytes], seed: int = 0) -> np.ndarray:
    """Return a random order of names, (N,) int64: by the SHA-256 of ``seed/key``, 1 us a key."""
    start = f"{seed}/".encode()
    data = (key.encode() if isinstance(key, str) else key for key in keys)
    digests = [hashlib.sha256(start + key).digest() for key in data]
    return np.array(sorted(range(len(digests)), key=digests.__getitem__), dtype=np.int64)


def held_out(labels: np.ndarray, share: float = 0.2, seed: int = 0) -> np.ndarray:
    """Return which samples are held out for choosing a setting, (N,) bool.

    A share of each class, rounded, at least one sample and not all. Which ones depends only on
    the class's label and its number of samples.
    """
    mask = np.zeros(len(labels), dtype=bool)
    by_class = np.argsort(labels, kind="stable")
    classes, starts = np.unique(labels[by_class], return_index=True)
    for label, members in zip(classes.tolist(), np.split(by_class, starts[1:]), strict=False):
        if len(members) < 2:
            raise ValueError(
                f"class {label} has one sample; two are needed: add samples of it or leave it out"
            )
        count = min(max(1, round(share * len(members))), len(members) - 1)
        order = hashed_order([f"{label}/{position}" for position in range(len(members))], seed)
        mask[members[order[:count]]] = True
    return mask
