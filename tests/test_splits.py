"""Orders and splits derived from hashes."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from trex_models.evaluation.splits import hashed_order, held_out


def test_order_is_that_of_the_hashes_for_ever() -> None:
    keys = ["b.jpg", "a.jpg", "c/d.jpg", "\u00e4.jpg", "a.jpg"]
    hashes = [hashlib.sha256(f"7/{key}".encode()).hexdigest() for key in keys]
    expected = sorted(range(5), key=lambda i: (hashes[i], i))
    assert hashed_order(keys, 7).tolist() == expected
    assert hashed_order([key.encode() for key in keys], 7).tolist() == expected
    assert hashed_order([], 7).shape == (0,)
    keys = [f"{i}.jpg" for i in range(8)]
    assert hashed_order(keys, 0).tolist() == [2, 6, 1, 0, 3, 7, 5, 4]
    assert hashed_order(keys, 1).tolist() == [2, 7, 6, 5, 0, 1, 4, 3]
    keys = [f"{i}.jpg" for i in range(50)]
    order = [keys[i] for i in hashed_order(keys)]
    fewer = [keys[i] for i in range(0, 50, 3)]
    assert [fewer[i] for i in hashed_order(fewer)] == [key for key in order if key in fewer]


def test_held_out_images_of_a_class_never_change() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3, 9], (10, 2, 25, 3, 13)))
    mask = held_out(labels)
    assert [int(mask[labels == c].sum()) for c in (0, 1, 2, 3, 9)] == [2, 1, 5, 1, 3]
    assert held_out(labels, 0.99)[labels == 3].sum() == 2  # not all
    assert not held_out(np.zeros(0, dtype=np.int64)).any()
    labels = np.repeat([0, 1, 2], (10, 2, 25))
    assert np.flatnonzero(held_out(labels)).tolist() == [4, 8, 11, 15, 22, 26, 29, 31]
    assert np.flatnonzero(held_out(labels, seed=1)).tolist() != [4, 8, 11, 15, 22, 26, 29, 31]
    with pytest.raises(ValueError, match=r"class 5 has only one sample, but needs two.*remove"):
        held_out(np.array([1, 1, 5, 2, 2]))


def test_a_tiny_class_changes_nothing_for_the_others() -> None:
    labels = np.repeat(np.arange(6), 20)
    expected = held_out(labels)
    tiny = np.concatenate([labels[:20], [1, 1], labels[40:]])
    mask = held_out(tiny)
    for c in (0, 2, 3, 4, 5):
        assert mask[tiny == c].tolist() == expected[labels == c].tolist()
    assert held_out(labels[labels == 4]).tolist() == expected[labels == 4].tolist()


def test_every_sample_is_equally_likely_and_classes_differ() -> None:
    labels = np.repeat(np.arange(2000), 10)
    drawn = held_out(labels).reshape(2000, 10)
    # Binomial, 2000 draws with probability 0.2: the standard deviation is 18.
    assert np.abs(drawn.sum(0) - 400).max() < 80
    assert len(np.unique(drawn, axis=0)) == 45  # number of pairs among ten
