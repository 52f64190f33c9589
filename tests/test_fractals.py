import pickle

import numpy as np
import pytest

from trex_models.data import fractals
from trex_models.data.fractals import FractalSource, draw_fractal


def _stack(source: FractalSource) -> np.ndarray:
    return np.stack([source.read(index) for index in range(len(source))])


def _nearest_mean_accuracy(features: np.ndarray, labels: np.ndarray, train: np.ndarray) -> float:
    means = np.stack([features[train & (labels == c)].mean(0) for c in range(labels.max() + 1)])
    distances = ((features[~train, None] - means) ** 2).sum(-1)
    return float((distances.argmin(1) == labels[~train]).mean())


def test_sources_follow_the_protocol() -> None:
    source = FractalSource(num_classes=3, images_per_class=2, size=32, seed=5, variation=0.7)
    assert len(source) == 6
    assert source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert source.labels.dtype == np.int64
    assert source.classes == ["fractal 0000", "fractal 0001", "fractal 0002"]
    image = source.read(5)
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8
    assert source.name(5) == "fractal class 2 image 1"
    np.testing.assert_array_equal(draw_fractal(2, 1, 32, 5, 0.7).image, image)
    for index in (-1, 6):
        with pytest.raises(IndexError, match=r"index must be in \[0, 6\)"):
            source.read(index)
    for size in (1, 7, 100, 224):
        assert FractalSource(size=size).read(0).shape == (size, size, 3)
    many = FractalSource(num_classes=60, images_per_class=1, size=64)
    assert _stack(many).std((1, 2)).max(1).min() > 10  # each contains a shape


def test_the_same_bytes_in_any_order() -> None:
    source = FractalSource(num_classes=3, images_per_class=2, size=32, seed=5)
    again = pickle.loads(pickle.dumps(source))
    forwards = _stack(source)
    backwards = [again.read(index) for index in reversed(range(len(again)))]
    np.testing.assert_array_equal(forwards, backwards[::-1])


def test_images_are_rendered_once_if_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fractals, "_CACHE_BYTES", 2 * 3 * 32**2)
    source = FractalSource(num_classes=3, images_per_class=1, size=32)
    first, again = ([source.read(index) for index in range(3)] for _ in range(2))
    assert [a is b for a, b in zip(first, again, strict=True)] == [True, True, False]
    np.testing.assert_array_equal(first, again)
    assert len(pickle.dumps(source)) < len(pickle.dumps(first))


def test_shifted_sources() -> None:
    whole = FractalSource(num_classes=4, images_per_class=3, size=16)
    shifted = FractalSource(2, 1, 16, first_class=2, first_image=2)
    np.testing.assert_array_equal(shifted.read(0), whole.read(2 * 3 + 2))
    np.testing.assert_array_equal(shifted.read(1), whole.read(3 * 3 + 2))
    assert shifted.classes == whole.classes[2:]
    assert shifted.labels.tolist() == [0, 1]
    assert shifted.name(1) == whole.name(11)
    shifts: list[dict[str, int]] = [{}, {"first_image": 4}, {"first_class": 5}, {"seed": 1}]
    sources = [FractalSource(5, 4, 16, **shift) for shift in shifts]
    images = [image.tobytes() for source in sources for image in _stack(source)]
    assert len(set(images)) == len(images) == 80


def test_classes_differ_in_shape_and_agree_within() -> None:
    # Without variation, the edges contain only the shape of the class.
    source = FractalSource(num_classes=10, images_per_class=30, size=32, variation=0)
    gray = _stack(source).mean(3)
    edges = np.abs(np.diff(gray, axis=1))[:, :, 1:] + np.abs(np.diff(gray, axis=2))[:, 1:]
    folded = edges + edges[:, :, ::-1]  # images are mirrored at random
    features = folded.reshape(len(folded), -1)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    train = np.arange(len(source)) % 30 < 20
    assert _nearest_mean_accuracy(features, source.labels, train) > 0.6


def shapes(images: np.ndarray, axis: int = 1) -> np.ndarray:
    """Return the edges of images as unit vectors, (B, D)."""
    edges = np.abs(np.diff(images.mean(3), axis=axis)).reshape(len(images), -1)
    return edges / np.linalg.norm(edges, axis=1, keepdims=True)


def test_variation_widens_a_class() -> None:
    def spread(variation: float) -> float:
        edges = shapes(_stack(FractalSource(1, 40, 32, variation=variation)), axis=1)
        return float(1 - (edges @ edges.T).mean())

    assert spread(0) < spread(4)


def test_color_says_nothing_about_the_class() -> None:
    source = FractalSource(num_classes=10, images_per_class=100, size=16)
    images = _stack(source) / 255
    train = np.arange(len(source)) % 100 < 60
    color = images.mean((1, 2))
    # Chance level is 0.1, with a standard error of 0.015 on 400 images.
    assert _nearest_mean_accuracy(color, source.labels, train) < 0.17
    # The same check detects a class with a color of its own.
    tinted = color + 0.3 * np.eye(3)[source.labels % 3]
    assert _nearest_mean_accuracy(tinted, source.labels, train) > 0.2


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("num_classes", 0), ("images_per_class", 0), ("size", -1), ("seed", -1)),
        *(("first_class", -1), ("first_image", -1)),
        *(("variation", -0.1), ("variation", float("nan"))),
    ],
)
def test_refuses(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=argument):
        FractalSource(**{argument: value})  # type: ignore[arg-type]


def test_rotation_changes_only_the_pose() -> None:
    own = draw_fractal(0, 0, 32)
    assert abs(own.rotation) <= np.pi / 12
    np.testing.assert_array_equal(draw_fractal(0, 0, 32, rotation=own.rotation).image, own.image)
    turned = draw_fractal(0, 0, 32, rotation=1.0)
    assert turned.rotation == 1.0
    assert turned.mirrored == own.mirrored
    assert turned.color == pytest.approx(own.color, abs=0.03)
    assert (turned.image != own.image).any()


def test_images_of_an_individual_are_alike() -> None:
    def upright(number: int, individual: int | None) -> np.ndarray:
        drawn = [
            draw_fractal(number, n, 32, variation=8, rotation=0, individual=individual)
            for n in range(40)
        ]
        return shapes(np.stack([d.image for d in drawn if not d.mirrored]), axis=2)

    likeness = []
    for number in range(6):
        one, other, anyone = (upright(number, individual) for individual in (0, 1, None))
        pairs = (one, one), (one, other), (anyone, anyone)
        likeness.append([(left @ right.T).mean() for left, right in pairs])
    of_one, of_two, of_any = np.mean(likeness, axis=0)
    assert of_one > of_two + 0.02
    assert of_one > of_any + 0.02


def test_mirrored_images_are_those_that_say_so() -> None:
    drawn = [draw_fractal(0, n, 32, variation=0, rotation=0) for n in range(200)]
    edges = np.stack([np.abs(np.diff(d.image.mean(2), axis=0)) for d in drawn])
    mirrored = np.array([d.mirrored for d in drawn])
    assert 0.3 < mirrored.mean() < 0.7
    apart = edges[mirrored].mean(0) - edges[~mirrored].mean(0)
    assert np.corrcoef(apart.ravel(), -apart[:, ::-1].ravel())[0, 1] > 0.8


def test_the_color_is_that_of_the_shape() -> None:
    drawn = [draw_fractal(n % 5, n, 32) for n in range(150)]
    colors = np.array([fractal.color for fractal in drawn])
    assert colors.min() >= 0
    assert colors.max() <= 1 + 1e-9
    # Some pixels have about the mean color of the shape, unlike the mean of the image.
    pixels = np.stack([fractal.image.reshape(-1, 3) / 255 for fractal in drawn])
    near, far = (
        np.median(np.abs(pixels - shown[:, None]).max(2).min(1))
        for shown in (colors, np.roll(colors, -1, axis=0))
    )
    assert near < 0.06
    assert far > 2 * near
