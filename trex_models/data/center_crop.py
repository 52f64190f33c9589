"""Center crops for evaluation: cut by workers as uint8, normalized on the device.

The sizes are those of timm's evaluation transform: the shorter side is resized (or both are, mode
"squash"), then the center is cut out. Resizing is antialiased, by torch's uint8 kernel, which
differs from Pillow's by less than 0.05 levels on average. The complete image is resized, since no
part of it can be resized alone to exactly the same pixels; of very long ones the middle, up to
half a pixel off.

Shapes: B batch; H, W height and width of the crop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trex_models.data import photometric
from trex_models.data.decode import UnreadableImageError
from trex_models.data.loading import load_batches, to_device
from trex_models.data.multicrop import resize
from trex_models.data.sources import Source, require_rgb

_INTERPOLATIONS = ("bilinear", "bicubic")
_MODES = ("center", "squash")
_LONGEST = 8  # length of the part that is resized, in sides of the crop


@dataclass(frozen=True, kw_only=True)
class CenterCrop:
    """Evaluation transform; the fields are those of timm's data config.

        crop = CenterCrop(size=(224, 224), crop_pct=1.0, interpolation="bicubic")
        features = extract_features(model, source, crop)

    Args:
        size: H, W, in pixels.
        crop_pct: The crop's side by the resized image's shorter one; above 1, black is around the
            image.
        interpolation: "bilinear" or "bicubic"; both are antialiased.
        crop_mode: "center" keeps the image's aspect ratio, "squash" resizes both sides to the
            crop's.
        mean: Mean of each channel, for values in [0, 1]; (3,).
        std: Standard deviation of each channel, likewise.

    Raises:
        ValueError: A value is impossible or not supported.
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
            raise ValueError(f"crop_pct must lie in [0.01, {min(self.size)}], not {self.crop_pct}")
        for name, known in (("interpolation", _INTERPOLATIONS), ("crop_mode", _MODES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be {' or '.join(known)}, not {getattr(self, name)}; a transform "
                    "of PIL images, such as timm's, can do others"
                )

    @classmethod
    def from_data_config(cls, config: Mapping[str, Any]) -> CenterCrop:
        """Build from the result of timm's `resolve_data_config`."""
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
        """Resize an image, (height, width, 3) uint8, and write its center into `out`, (H, W, 3)."""
        require_rgb(image)
        if not image.flags.writeable:  # torch accepts none of these
            image = image.copy()
        above, left = self._beyond(*image.shape[:2])
        height, width = image.shape[0] - 2 * above, image.shape[1] - 2 * left
        # The batch axis is added before anything is cut: only strides that still read as channels
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
        """Turn crops, (B, H, W, 3) uint8, into input, (B, 3, H, W) float32, channels last."""
        return photometric.normalize(crops.permute(0, 3, 1, 2), self.mean, self.std)

    def _targets(self) -> tuple[int, int]:
        """Return the height and width to resize to, before the aspect ratio counts."""
        height, width = (math.floor(side / self.crop_pct) for side in self.size)
        return height, width

    def _beyond(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns to drop at each end of a very long image.

        They are far from the crop, and resized with the rest they may not fit into memory.
        """
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
    """Return, along one side, the visible part of a resized image and its place in the crop."""
    length = min(resized, crop)
    start, lead = round((resized - length) / 2), (crop - length) // 2
    return slice(start, start + length), slice(lead, lead + length)


PROTOCOLS = {
    # The authors' validation during training: resize 256, crop 224.
    "validation": CenterCrop(crop_pct=0.875, interpolation="bilinear"),
    # Their feature extraction for transfer, and the transform of the released weights.
    "transfer": CenterCrop(crop_pct=1.0, interpolation="bicubic"),
}
Transform = CenterCrop | Callable[[Image.Image], Tensor]


class CropBatch(NamedTuple):
    """Crops, (B, H, W, 3) uint8, their labels, (B,), and errors of skipped images by index."""

    images: Tensor
    labels: Tensor
    unreadable: dict[int, str]


class CenterCropDataset:
    """Center crops of a source's images, a complete batch at a time."""

    def __init__(self, source: Source, crop: CenterCrop, skip: bool = False) -> None:
        self.source = source
        self.crop = crop
        self.skip = skip

    def __getitems__(self, indices: Sequence[int]) -> CropBatch:
        """Return a batch, which may be empty; ValueError names an unreadable image."""
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


class _TransformedDataset:
    """A source's images through a transform of PIL images."""

    def __init__(self, source: Source, transform: Callable[[Image.Image], Tensor]) -> None:
        self.source, self.transform = source, transform

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        images = (Image.fromarray(self.source.read(index)) for index in indices)
        return torch.stack([self.transform(image) for image in images])


def image_batches(
    source: Source,
    transform: Transform,
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device | None = None,
    indices: Sequence[int] | None = None,
    on_skip: Callable[[Mapping[int, str]], object] | None = None,
) -> Iterator[Tensor]:
    """Yield transformed images in order, (<= batch_size, 3, H, W).

    ``on_skip`` receives {index: error} of unreadable images, of center crops; without it they are
    errors.
    """
    images = range(len(source)) if indices is None else indices
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    device = device or torch.device("cpu")
    pin = device.type == "cuda"
    if isinstance(transform, CenterCrop):
        dataset = CenterCropDataset(source, transform, skip=on_skip is not None)
        for batch in load_batches(dataset, batches, workers, pin):
            if on_skip is not None and batch.unreadable:
                on_skip(batch.unreadable)
            if len(batch.images):
                [crops] = to_device([batch.images], device)
                yield transform.normalize(crops)
    else:
        for batch in load_batches(_TransformedDataset(source, transform), batches, workers, pin):
            [pixels] = to_device([batch], device)
            yield pixels.contiguous(memory_format=torch.channels_last)
