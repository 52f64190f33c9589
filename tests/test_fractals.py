import hashlib
import pickle

import numpy as np
import pytest

from tests.processes import Forked
from trex_models.data.fractals import FractalSource, draw_fractal


def _stack(source: FractalSource) -> np.ndarray:
    return np.stack([source.read(index) for index in range(len(source))])


def _nearest_mean_accuracy(features: np.ndarray, labels: np.ndarray, train: np.ndarray) -> float:
    means = np.stack([features[train & (labels == c)].mean(0) for c in range(labels.max() + 1)])
    distances = ((features[~train, None] - means) ** 2).sum(-1)
    return float((distances.argmin(1) == labels[~train]).mean())


def test_reads_what_the_protocol_promises() -> None:
    source = FractalSource(num_classes=3, images_per_class=2, size=32)
    assert len(source) == 6
    assert source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert source.labels.dtype == np.int64
    assert source.classes == ["fractal 0000", "fractal 0001", "fractal 0002"]
    image = source.read(5)
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8
    assert source.name(5) == "fractal class 2 image 1"


@pytest.mark.parametrize("size", [1, 7, 100, 224])
def test_any_size(size: int) -> None:
    assert FractalSource(size=size).read(0).shape == (size, size, 3)


def test_the_same_bytes_in_any_order_and_process() -> None:
    source = FractalSource(num_classes=3, images_per_class=2, size=32, seed=5)
    forwards = _stack(source)
    again = pickle.loads(pickle.dumps(source))
    backwards = [again.read(index) for index in reversed(range(len(again)))]
    np.testing.assert_array_equal(forwards, backwards[::-1])
    script = (
        "import hashlib; from trex_models.data.fractals import FractalSource\n"
        "source = FractalSource(num_classes=3, images_per_class=2, size=32, seed=5)\n"
        "images = [source.read(index).tobytes() for index in (5, 4, 3, 2, 1, 0)]\n"
        "print(hashlib.sha256(b''.join(images[::-1])).hexdigest())"
    )
    elsewhere = Forked("-c", script)
    assert elsewhere.end() == 0, elsewhere.err
    assert elsewhere.out.strip() == hashlib.sha256(forwards.tobytes()).hexdigest()


def test_shifts_name_the_same_classes_and_images() -> None:
    whole = FractalSource(num_classes=4, images_per_class=3, size=16)
    shifted = FractalSource(
        num_classes=2, images_per_class=1, size=16, first_class=2, first_image=2
    )
    np.testing.assert_array_equal(shifted.read(0), whole.read(2 * 3 + 2))
    np.testing.assert_array_equal(shifted.read(1), whole.read(3 * 3 + 2))
    assert shifted.classes == whole.classes[2:]
    assert shifted.labels.tolist() == [0, 1]
    assert shifted.name(1) == whole.name(11)


def test_shifted_sources_are_disjoint() -> None:
    sources = [
        FractalSource(num_classes=5, images_per_class=4, size=16),
        FractalSource(num_classes=5, images_per_class=4, size=16, first_image=4),
        FractalSource(num_classes=5, images_per_class=4, size=16, first_class=5),
        FractalSource(num_classes=5, images_per_class=4, size=16, seed=1),
    ]
    images = [image.tobytes() for source in sources for image in _stack(source)]
    assert len(set(images)) == len(images) == 80


def test_classes_differ_in_shape_and_agree_within() -> None:
    # Without variation, what is left of a class in the edges is its shape.
    source = FractalSource(num_classes=10, images_per_class=30, size=32, variation=0)
    gray = _stack(source).mean(3)
    edges = np.abs(np.diff(gray, axis=1))[:, :, 1:] + np.abs(np.diff(gray, axis=2))[:, 1:]
    folded = edges + edges[:, :, ::-1]  # instances are mirrored at random
    features = folded.reshape(len(folded), -1)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    train = np.arange(len(source)) % 30 < 20
    assert _nearest_mean_accuracy(features, source.labels, train) > 0.6


def test_variation_widens_a_class() -> None:
    def spread(variation: float) -> float:
        source = FractalSource(num_classes=1, images_per_class=40, size=32, variation=variation)
        edges = np.abs(np.diff(_stack(source).mean(3), axis=1)).reshape(40, -1)
        edges /= np.linalg.norm(edges, axis=1, keepdims=True)
        return float(1 - (edges @ edges.T).mean())

    assert spread(0) < spread(4)


def test_color_says_nothing_about_the_class() -> None:
    source = FractalSource(num_classes=10, images_per_class=100, size=16)
    images = _stack(source) / 255
    train = np.arange(len(source)) % 100 < 60
    color = images.mean((1, 2))
    # Chance is 0.1 and the standard error on 400 images 0.015.
    assert _nearest_mean_accuracy(color, source.labels, train) < 0.17
    # The same check does see a class that has a color.
    tinted = color + 0.3 * np.eye(3)[source.labels % 3]
    assert _nearest_mean_accuracy(tinted, source.labels, train) > 0.2


def test_images_show_a_shape() -> None:
    source = FractalSource(num_classes=60, images_per_class=1, size=64)
    assert _stack(source).std((1, 2)).max(1).min() > 10


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("num_classes", 0),
        ("images_per_class", 0),
        ("size", -1),
        ("seed", -1),
        ("first_class", -1),
        ("first_image", -1),
        ("variation", -0.1),
        ("variation", float("nan")),
    ],
)
def test_refuses(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=argument):
        FractalSource(**{argument: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("index", [-1, 6])
def test_index_out_of_range(index: int) -> None:
    with pytest.raises(IndexError, match="6 fractal images"):
        FractalSource(num_classes=3, images_per_class=2).read(index)


def test_draw_gives_what_the_source_reads() -> None:
    source = FractalSource(num_classes=3, images_per_class=2, size=32, seed=5, variation=0.7)
    drawn = draw_fractal(2, 1, 32, seed=5, variation=0.7)
    np.testing.assert_array_equal(drawn.image, source.read(5))


def test_a_given_turn_changes_the_pose_alone() -> None:
    own = draw_fractal(0, 0, 32)
    assert abs(own.turn) <= np.pi / 12
    np.testing.assert_array_equal(draw_fractal(0, 0, 32, turn=own.turn).image, own.image)
    turned = draw_fractal(0, 0, 32, turn=1.0)
    assert turned.turn == 1.0
    assert turned.mirrored == own.mirrored
    assert turned.color == pytest.approx(own.color, abs=0.03)
    assert (turned.image != own.image).any()


def test_images_of_an_individual_are_alike() -> None:
    def shapes(number: int, individual: int | None) -> np.ndarray:
        drawn = [
            draw_fractal(number, n, 32, variation=8, turn=0, individual=individual)
            for n in range(40)
        ]
        edges = np.stack(
            [np.abs(np.diff(d.image.mean(2), axis=1)).ravel() for d in drawn if not d.mirrored]
        )
        return edges / np.linalg.norm(edges, axis=1, keepdims=True)

    likeness = []
    for number in range(6):
        one, other, anyone = (shapes(number, individual) for individual in (0, 1, None))
        pairs = (one, one), (one, other), (anyone, anyone)
        likeness.append([(left @ right.T).mean() for left, right in pairs])
    of_one, of_two, of_any = np.mean(likeness, axis=0)
    assert of_one > of_two + 0.02
    assert of_one > of_any + 0.02


def test_mirrored_images_are_those_that_say_so() -> None:
    drawn = [draw_fractal(0, n, 32, variation=0, turn=0) for n in range(200)]
    edges = np.stack([np.abs(np.diff(d.image.mean(2), axis=0)) for d in drawn])
    mirrored = np.array([d.mirrored for d in drawn])
    assert 0.3 < mirrored.mean() < 0.7
    apart = edges[mirrored].mean(0) - edges[~mirrored].mean(0)
    assert np.corrcoef(apart.ravel(), -apart[:, ::-1].ravel())[0, 1] > 0.8


def test_the_color_is_that_of_the_shape() -> None:
    drawn = [draw_fractal(n % 5, n, 32) for n in range(150)]
    near = []
    for fractal in drawn:
        pixels = fractal.image.reshape(-1, 3) / 255
        color = np.array(fractal.color)
        assert (color >= 0).all()
        assert (color <= 1 + 1e-9).all()
        # Some pixels show about the mean of the shape, which is in no mean of the image.
        near.append(np.abs(pixels - color).max(1).min())
    assert np.median(near) < 0.06
    others = [np.array(fractal.color) for fractal in drawn[1:]]
    far = [
        np.abs(fractal.image.reshape(-1, 3) / 255 - color).max(1).min()
        for fractal, color in zip(drawn, others, strict=False)
    ]
    assert np.median(far) > 2 * np.median(near)
