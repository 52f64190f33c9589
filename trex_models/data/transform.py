"""Multi-crop as a transform, for data sets of torchvision's kind and any DataLoader.

Shapes: S side of a crop in pixels, P photometric parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trex_models.data import photometric
from trex_models.data.decode import rgb_pixels
from trex_models.data.multicrop import TREX_CROPS, CropSpec


class MultiCrop:
    """One image -> all its crops, augmented and normalised.

    Multi-crop (SwAV, arXiv 2006.09882) as in t-ReX (arXiv 2206.15369), section 3.1. DataLoader's
    own collation makes of them one (B, 3, S, S) a crop, which is what ``TReX`` takes:

        dataset = ImageFolder("images", transform=MultiCrop(), loader=read_image)
        for crops, labels in DataLoader(dataset, batch_size=256, shuffle=True): ...

    Draws follow torch's generator, which DataLoader seeds in each worker. The same law as
    ``MultiCropDataset`` with ``augment``, but each worker augments its images one by one and hands
    over four times the bytes.

    Args:
        specs: The crops, globals first.
    """

    def __init__(self, specs: Sequence[CropSpec] = TREX_CROPS) -> None:
        self.specs = list(specs)

    def __call__(self, image: Image.Image | np.ndarray) -> list[Tensor]:
        """Return an image's crops, (3, S, S) float32 each, normalised as ImageNet's are.

        Args:
            image: PIL image, converted as image files are (``rgb_pixels``), or an array, (height,
                width, 3) uint8 RGB.

        Raises:
            ValueError: An array is not of this shape and type, or the values of a PIL image have
                no defined range (floating point, 32 bits).
        """
        pixels = rgb_pixels(image) if isinstance(image, Image.Image) else image
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        crops: list[Tensor] = []
        for spec in self.specs:
            out = torch.empty(spec.count, spec.size, spec.size, 3, dtype=torch.uint8)
            draws = np.empty((1, spec.count, photometric.NUM_DRAWS))
            spec.draw(rng, pixels, out, draws[0])
            images = photometric.apply(out.permute(0, 3, 1, 2), spec.parameters(draws))
            crops += photometric.normalize(images)
        return crops
