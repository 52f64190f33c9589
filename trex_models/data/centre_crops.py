"""Centre crops of whole images, for evaluation: cut by workers as uint8, normalised on the device.

The sizes are those of timm's evaluation transform: the shorter side is resized (or both are, mode
"squash"), then the centre is cut out. Resizing is antialiased, by torch's uint8 kernel, which
differs from Pillow's by less than 0.05 levels on average. The whole image is resized, for no part
of it can be resized by itself to exactly the same pixels; but for very long ones, of which the
middle is taken, up to half a pixel off.

Shapes: B batch; H, W height and width of the crop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trex_models.data import photometric
from trex_models.data.decode import UnreadableImageError
from trex_models.data.multicrop import resize
from trex_models.data.sources import Source

_INTERPOLATIONS = ("bilinear", "bicubic")
_MODES = ("center", "squash")
_LONGEST = 8  # times what the crop shows of an image: what is farther off is cut first


@dataclass(frozen=True, kw_only=True)
class CentreCrop:
    """How images are resized, cut and normalised; the fields are those of timm's data config.

        crop = CentreCrop(size=(224, 224), crop_pct=1.0, interpolation="bicubic")
        features = extract_features(model, source, crop)

    Args:
        size: H, W, in pixels.
        crop_pct: The crop's side by the resized image's shorter one; above 1, black is around the
            image.
        interpolation: "bilinear" or "bicubic"; both are antialiased.
        crop_mode: "center" keeps the image's aspect ratio, "squash" resizes both sides to the
            crop's.
        mean: Of each channel, for values in [0, 1]; (3,).
        std: Standard deviation, likewise.

    Raises:
        ValueError: if a value is impossible, or none that this module knows.
    """

    size: tuple[int, int] = (224, 224)
    crop_pct: float
    interpolation: str
    crop_mode: str = "center"
    mean: tuple[float, float, float] = photometric.IMAGENET_MEAN
    std: tuple[float, float, float] = photometric.IMAGENET_STD

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"size must be positive, not {self.size}")
        if not 0.01 <= self.crop_pct <= min(self.size):
            raise ValueError(
                f"crop_pct must lie in [0.01, {min(self.size)}] for size {self.size}, not "
                f"{self.crop_pct}"
            )
        for name, known in (("interpolation", _INTERPOLATIONS), ("crop_mode", _MODES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be {' or '.join(known)}, not {getattr(self, name)}; a transform "
                    "of PIL images, such as timm's, can do others"
                )

    @classmethod
    def from_data_config(cls, config: Mapping[str, Any]) -> CentreCrop:
        """Build from what timm's `resolve_data_config` returns.

        Raises:
            ValueError: as the class, or the images are not RGB.
        """
        channels, height, width = config["input_size"]
        if channels != 3:
            raise ValueError(f"images have 3 channels, and the model takes {channels}")
        return cls(
            size=(height, width),
            crop_pct=config["crop_pct"],
            interpolation=config["interpolation"],
            crop_mode=config["crop_mode"],
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
        )

    def empty(self, count: int) -> Tensor:
        """Return room for crops, (count, H, W, 3) uint8."""
        return torch.empty(count, *self.size, 3, dtype=torch.uint8)

    def cut(self, image: np.ndarray, out: Tensor) -> None:
        """Resize an image and write its centre into `out`.

        Of very long images only the middle is resized: as a whole one may not fit into memory.

        Args:
            image: (height, width, 3) uint8. A read-only array is copied, since torch accepts none.
            out: (H, W, 3) uint8 on the CPU: one row of a batch.

        Raises:
            ValueError: if `image` is not uint8 (height, width, 3).
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(
                f"image must be uint8 (height, width, 3), not {image.dtype} {image.shape}"
            )
        if not image.flags.writeable:
            image = image.copy()
        above, left = self._beyond(*image.shape[:2])
        height, width = image.shape[0] - 2 * above, image.shape[1] - 2 * left
        # The batch axis goes on before anything is cut: only strides that still read as channels
        # last give the fast kernel.
        middle = torch.from_numpy(image)[None, above : above + height, left : left + width]
        (resized,) = resize(
            middle.permute(0, 3, 1, 2), *self._resized(height, width), self.interpolation
        )
        sides = zip(resized.shape[1:], self.size, strict=True)
        seen, shown = zip(*(_overlap(*lengths) for lengths in sides), strict=True)
        if self.crop_pct > 1:
            out.zero_()
        out[shown].copy_(resized.permute(1, 2, 0)[seen])

    def normalize(self, crops: Tensor) -> Tensor:
        """Return crops as a network takes them, on the device where they are.

        Args:
            crops: (B, H, W, 3) uint8.

        Returns:
            (B, 3, H, W) float32, in channels_last format.
        """
        return photometric.normalize(crops.permute(0, 3, 1, 2), self.mean, self.std)

    def _targets(self) -> tuple[int, int]:
        """Return height and width that are resized to, before the aspect ratio counts."""
        height, width = (math.floor(side / self.crop_pct) for side in self.size)
        return height, width

    def _beyond(self, height: int, width: int) -> tuple[int, int]:
        """Return how many rows, and columns, at each end of an image are too far off to matter."""
        if self.crop_mode == "squash":
            return 0, 0
        targets = self._targets()
        ratio = min(height / targets[0], width / targets[1])
        above, left = (
            max(0, side - round(_LONGEST * ratio * target)) // 2
            for side, target in zip((height, width), targets, strict=True)
        )
        return above, left

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the size that an image is resized to, rounded as timm and torchvision do."""
        targets = self._targets()
        if self.crop_mode == "squash":
            return targets
        if targets[0] == targets[1]:
            longer = int(targets[0] * max(height, width) / min(height, width))
            return (targets[0], longer) if height <= width else (longer, targets[0])
        ratio = min(height / targets[0], width / targets[1])
        return round(height / ratio), round(width / ratio)


def _overlap(resized: int, crop: int) -> tuple[slice, slice]:
    """Return what the crop shows of a resized image along one side, and where in the crop."""
    length = min(resized, crop)
    start, lead = round((resized - length) / 2), (crop - length) // 2
    return slice(start, start + length), slice(lead, lead + length)


PROTOCOLS = {
    # How the authors validate during training: resize 256, cut out 224.
    "validation": CentreCrop(crop_pct=0.875, interpolation="bilinear"),
    # How they extract features for transfer, and how the released weights are to be used.
    "transfer": CentreCrop(crop_pct=1.0, interpolation="bicubic"),
}


@dataclass(frozen=True)
class CropBatch:
    """What a worker makes.

    Args:
        images: (B, H, W, 3) uint8.
        labels: (B,).
        unreadable: What is wrong with the images that are left out, by index.
    """

    images: Tensor
    labels: Tensor
    unreadable: dict[int, str]

    def pin_memory(self) -> CropBatch:
        """Return the batch in page-locked memory."""
        return CropBatch(self.images.pin_memory(), self.labels.pin_memory(), self.unreadable)


class CentreCropDataset:
    """Centre crops of a source's images, a whole batch at a time.

    Args:
        source: Labelled images.
        crop: How they are cut.
        skip: Whether images that cannot be read are left out.
    """

    def __init__(self, source: Source, crop: CentreCrop, skip: bool = False) -> None:
        self.source = source
        self.crop = crop
        self.skip = skip

    def __getitems__(self, indices: Sequence[int]) -> CropBatch:
        """Return a batch, which may be empty; ValueError names an image that cannot be read."""
        images = self.crop.empty(len(indices))
        read: list[int] = []
        unreadable: dict[int, str] = {}
        for index in indices:
            try:
                image = self.source.read(index)
            except UnreadableImageError as error:
                if not self.skip:
                    raise
                unreadable[index] = str(error)
            else:
                self.crop.cut(image, images[len(read)])
                read.append(index)
        labels = torch.from_numpy(self.source.labels[read])
        return CropBatch(images[: len(read)], labels, unreadable)
