"""Real images shipped with installed packages: small transfer datasets without a download.

The digits are scikit-learn's copy of "Optical Recognition of Handwritten Digits" (Alpaydin and
Kaynak, UCI, 1998). The photographs are files of the packages scikit-image and scikit-learn, whose
READMEs list their authors and licenses; this package does not redistribute them.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trex_models.data.sources import ArraySource, require_positive

# Photographs by the package and folder that contain them.
_SHIPPED = {
    ("skimage", "data"): (
        "astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png coffee.png "
        "coins.png grass.png gravel.png hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png "
        "page.png retina.jpg rocket.jpg text.png"
    ),
    ("sklearn", "datasets/images"): "china.jpg flower.jpg",
}
_PHOTOGRAPHS = dict(
    sorted((file, location) for location, files in _SHIPPED.items() for file in files.split())
)
_Square = tuple[int, int, int]
_TILES = 3  # number of tiles along a photograph's shorter side
_MIN_STD = 6.0  # minimum standard deviation of a patch, in gray levels


def digits(size: int = 32) -> tuple[ArraySource, ArraySource]:
    """Return scikit-learn's 1797 handwritten digits as a training set and a test set.

    Two thirds of each class, always the same ones, are for training. The 8x8 images are resized
    (bicubic) to ``size`` pixels. Raw pixels suffice to classify them: use them only for checks.
    """
    require_positive(size=size)
    bunch = _require("sklearn.datasets").load_digits()
    levels = (bunch.images * (255 / 16)).astype(np.uint8)
    images, labels = np.stack([_resized(image, size) for image in levels]), bunch.target
    rng = np.random.default_rng(0)
    parts: tuple[list[int], list[int]] = [], []
    for label in range(10):
        members = rng.permutation(np.flatnonzero(labels == label)).tolist()
        cut = round(len(members) * 2 / 3)
        parts[0].extend(members[:cut])
        parts[1].extend(members[cut:])
    train, test = (ArraySource(images[part], labels[part], list("0123456789")) for part in parts)
    return train, test


def photographs(
    size: int = 64,
    train_per_class: int = 60,
    test_per_class: int = 30,
    seed: int = 0,
    validation: bool = False,
) -> tuple[ArraySource, ArraySource]:
    """Return a training set and a test set of patches of 20 photographs, which are the classes.

    Each photograph is divided into square tiles, one third of which are for test patches. A patch
    lies within one tile, so the sets share no pixels. Patches differ in position, scale and
    mirroring. They are gray with random brightness and contrast, so that neither reveals the class.
    The split of the tiles does not depend on the seed.

    With ``validation``, only the training tiles are used, half of them for each set. The second set
    is then for choosing settings and shares no pixels with the test patches.
    """
    require_positive(size=size, train_per_class=train_per_class, test_per_class=test_per_class)
    names = [Path(file).stem for file in _PHOTOGRAPHS]
    counts = {"train": train_per_class, "test": test_per_class}
    patches: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for label, (file, (package, folder)) in enumerate(_PHOTOGRAPHS.items()):
        photograph = _photograph(file, package, folder)
        tiles = _tiles(*photograph.shape, validation=validation)
        for part, count in counts.items():
            rng = np.random.default_rng((seed, label, part == "test"))
            patches[part] += [_patch(photograph, tiles[part], size, rng) for _ in range(count)]
    train, test = (
        ArraySource(np.stack(patches[part]), np.repeat(np.arange(len(names)), count), names)
        for part, count in counts.items()
    )
    return train, test


def _require(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        packages = "scikit-learn and scikit-image: pip install '.[transfer]' in a clone"
        raise ImportError(f"this dataset requires {packages}") from error


def _photograph(file: str, package: str, folder: str) -> np.ndarray:
    module = _require(package)
    path = Path(module.__file__).parent / folder / file
    if not path.is_file():
        raise FileNotFoundError(
            f"{package} {module.__version__} does not contain {file} (expected at {path}); "
            "run pip install 'scikit-image>=0.24,<0.27' scikit-learn"
        )
    with Image.open(path, formats=("JPEG", "PNG")) as image:
        return np.asarray(image.convert("L"))


def _tiles(height: int, width: int, *, validation: bool = False) -> dict[str, list[_Square]]:
    """Return the (top, left, side) of a photograph's training tiles and test tiles."""
    side = min(height, width) // _TILES
    tiles: dict[str, list[_Square]] = {"train": [], "test": []}
    parts = ("train", "test", None) if validation else ("train", "train", "test")
    for row in range(height // side):
        for column in range(width // side):
            if part := parts[(row + column) % 3]:
                tiles[part].append((row * side, column * side, side))
    return tiles


def _window(tiles: list[_Square], rng: np.random.Generator) -> _Square:
    top, left, side = tiles[rng.integers(len(tiles))]
    extent = int(rng.integers(side // 2, side + 1))
    y, x = (int(rng.integers(start, start + side - extent + 1)) for start in (top, left))
    return y, x, extent


def _patch(
    photograph: np.ndarray, tiles: list[_Square], size: int, rng: np.random.Generator
) -> np.ndarray:
    while True:
        y, x, extent = _window(tiles, rng)
        patch = photograph[y : y + extent, x : x + extent]
        if patch.std() >= _MIN_STD:
            break
    if rng.random() < 0.5:
        patch = patch[:, ::-1]
    standardized = (patch - patch.mean()) / patch.std()
    levels = rng.uniform(100, 156) + rng.uniform(30, 60) * standardized
    return _resized(levels.clip(0, 255).astype(np.uint8), size)


def _resized(gray: np.ndarray, size: int) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(gray))
    resized = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.repeat(np.asarray(resized)[..., None], 3, axis=2)
