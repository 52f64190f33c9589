import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.processes import Forked
from trex_models.data import samples
from trex_models.data.fractals import FractalSource
from trex_models.data.samples import digits, photographs
from trex_models.data.sources import ArraySource, Source


def test_array_source() -> None:
    images = [np.zeros((4, 5, 3), np.uint8), np.ones((2, 2, 3), np.uint8)]
    source: Source = ArraySource(images, [1, 0], ["cat", "dog"])
    assert len(source) == 2
    assert source.read(1).tolist() == images[1].tolist()
    assert source.labels.dtype == np.int64
    assert source.name(0) == "dog image 0"
    others = (images, [0, 1], source.classes), (images[::-1], [1, 0], source.classes)
    digests = {ArraySource(*other).digest() for other in others}
    assert source.digest() not in digests | {ArraySource(images, [1, 0], ["dog", "cat"]).digest()}


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.uint8), [0], "need 2 labels, one per image"),
        (np.zeros((1, 4, 4, 3), np.uint8), [1], r"labels must be in \[0, 1\), got 1 to 1"),
        (np.zeros((1, 4, 4, 3), np.uint8), [-1], "labels must be in .*, got -1 to -1"),
        (np.zeros((1, 4, 4, 3)), [0], "image 0 must be .*, got float64"),
        (np.zeros((1, 4, 4), np.uint8), [0], "must be uint8"),
    ],
)
def test_array_source_refuses(images: np.ndarray, labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ArraySource(images, labels, ["only"])


def hash_of_all_samples() -> str:
    parts: list[Source] = [*photographs(24, 2, 1, seed=3), *digits(), FractalSource(3, 2, 32, 5)]
    images = [part.read(index) for part in parts for index in range(len(part))]
    return hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()


def test_the_same_bytes_in_any_process() -> None:
    script = "from tests.test_samples import *; print(hash_of_all_samples())"
    elsewhere = Forked("-c", script)
    assert elsewhere.end() == 0, elsewhere.err
    assert elsewhere.out.strip() == hash_of_all_samples()


class TestDigits:
    def test_every_digit_is_in_one_part(self) -> None:
        train, test = digits()
        assert len(train) + len(test) == 1797
        assert train.read(0).shape == (32, 32, 3)
        assert train.read(0).dtype == np.uint8
        counts = [np.bincount(part.labels, minlength=10) for part in (train, test)]
        np.testing.assert_allclose(counts[0] / (counts[0] + counts[1]), 2 / 3, atol=0.005)
        images = [part.read(i).tobytes() for part in (train, test) for i in range(len(part))]
        distinct_pairs = {(image, i < len(train)) for i, image in enumerate(images)}
        assert len({image for image, _ in distinct_pairs}) == len(distinct_pairs)


class TestPhotographs:
    def test_shapes(self) -> None:
        train, test = photographs(size=24, train_per_class=3, test_per_class=2)
        assert len(train.classes) == 20
        assert train.labels.tolist() == np.repeat(np.arange(20), 3).tolist()
        assert test.labels.tolist() == np.repeat(np.arange(20), 2).tolist()
        assert train.read(0).shape == (24, 24, 3)
        assert train.classes[train.labels[0]] == "astronaut"

    @pytest.mark.parametrize(("height", "width"), [(172, 448), (512, 512), (660, 550)])
    def test_tiles_do_not_overlap(self, height: int, width: int) -> None:
        seen = np.zeros((height, width), np.int64)
        parts = samples._tiles(height, width)
        for tiles in parts.values():
            for top, left, side in tiles:
                assert top + side <= height
                assert left + side <= width
                seen[top : top + side, left : left + side] += 1
        assert seen.max() == 1
        assert len(parts["train"]) >= 1.4 * len(parts["test"]) > 0
        tuning = samples._tiles(height, width, validation=True)  # the test tiles are not used
        assert sorted(tuning["train"] + tuning["test"]) == sorted(parts["train"])

    def test_windows_stay_within_a_tile_of_their_part(self) -> None:
        rng = np.random.default_rng(0)
        parts = samples._tiles(172, 448)
        for tiles in parts.values():
            seen = np.zeros((172, 448), bool)
            for _ in range(500):
                y, x, extent = samples._window(tiles, rng)
                assert any(
                    top <= y < y + extent <= top + side and left <= x < x + extent <= left + side
                    for top, left, side in tiles
                )
                seen[y : y + extent, x : x + extent] = True
            assert seen.sum() > 0.9 * sum(side**2 for *_, side in tiles)

    def test_brightness_says_little_about_the_class(self) -> None:
        train, test = photographs(size=16)
        means = [np.asarray(part.images).mean((1, 2, 3)) for part in (train, test)]
        centers = [means[0][train.labels == label].mean() for label in range(20)]
        guess = np.abs(means[1][:, None] - np.array(centers)).argmin(1)
        assert (guess == test.labels).mean() < 0.15  # chance level is 0.05
        assert all((image == image[..., :1]).all() for image in np.asarray(train.images))

    def test_a_missing_file_names_the_remedy(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setitem(samples._PHOTOGRAPHS, "astronaut.png", ("skimage", str(tmp_path)))
        with pytest.raises(FileNotFoundError, match=r"contain astronaut\.png.*pip install"):
            photographs()


@pytest.mark.parametrize("module", ["sklearn", "skimage"])
def test_a_missing_package_names_the_extra(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install '\.\[transfer\]' in a clone"):
        photographs()


def test_sizes_that_are_not_positive_are_refused() -> None:
    assert digits(16)[1].read(3).shape == (16, 16, 3)
    with pytest.raises(ValueError, match="size"):
        digits(0)
    for argument in ("size", "train_per_class", "test_per_class"):
        with pytest.raises(ValueError, match=argument):
            photographs(**dict[str, Any]({argument: 0}))
