"""Center crops for evaluation: cropped as uint8 by loader workers, normalized on the device.

Sizes follow timm's evaluation transform: the shorter side is resized (mode "squash": both sides),
then the center is cropped. Resizing is antialiased and uses torch's uint8 kernel, whose pixels
differ from Pillow's by less than 0.05 levels on average. The complete image is resized, because
resizing only a part of it changes the pixels. Only the middle of a very long image is resized,
which shifts it by up to half a pixel.

Shapes: batch B, crop height H, crop width W.
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
_MAX_LENGTH = 8  # of the part of an image that is resized, as a multiple of the crop's side


@dataclass(frozen=True, kw_only=True)
class CenterCrop:
    """Evaluation transform with the fields of timm's data config.

        crop = CenterCrop(size=(224, 224), crop_pct=1.0, interpolation="bicubic")
        features = extract_features(model, source, crop)

    Args:
        size: Height and width of the crop in pixels, (H, W).
        crop_pct: Ratio of the crop's side to the shorter side of the resized image. Above 1, the
            resized image is padded with black.
        interpolation: "bilinear" or "bicubic"; both are antialiased.
        crop_mode: "center" keeps the image's aspect ratio, "squash" resizes each side separately.
        mean: Mean of each channel, (3,), for values in [0, 1].
        std: Standard deviation of each channel, (3,), for values in [0, 1].

    Raises:
        ValueError: A value is out of range or not supported.
    """

    size: tuple[int, int] = (224, 224)
    crop_pct: float
    interpolation: str
    crop_mode: str = "center"
    mean: tuple[float, float, float] = photometric.IMAGENET_MEAN
    std: tuple[float, float, float] = photometric.IMAGENET_STD

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"size must be positive, got {self.size}")
        if not 0.01 <= self.crop_pct <= min(self.size):
            raise ValueError(f"crop_pct must be in [0.01, {min(self.size)}], got {self.crop_pct}")
        for name, known in (("interpolation", _INTERPOLATIONS), ("crop_mode", _MODES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be {' or '.join(known)}, got {getattr(self, name)}; use a "
                    "transform of PIL images, such as timm's, for other values"
                )

    @classmethod
    def from_data_config(cls, config: Mapping[str, Any]) -> CenterCrop:
        """Create the transform from the result of timm's `resolve_data_config`."""
        channels, height, width = config["input_size"]
        if channels != 3:
            raise ValueError(f"the model must have 3 input channels (RGB), got {channels}")
        same = {key: config[key] for key in ("crop_pct", "interpolation", "crop_mode")}
        mean, std = tuple(config["mean"]), tuple(config["std"])
        return cls(size=(height, width), mean=mean, std=std, **same)

    def empty(self, count: int) -> Tensor:
        """Return an uninitialized buffer for crops, (count, H, W, 3) uint8."""
        return torch.empty(count, *self.size, 3, dtype=torch.uint8)

    def crop_into(self, image: np.ndarray, out: Tensor) -> None:
        """Resize an image, (h, w, 3) uint8, and write its center crop to `out`, (H, W, 3)."""
        require_rgb(image)
        if not image.flags.writeable:  # torch does not support read-only arrays
            image = image.copy()
        top, left = self._margins(*image.shape[:2])
        height, width = image.shape[0] - 2 * top, image.shape[1] - 2 * left
        # Add the batch axis before slicing: otherwise torch does not recognize the strides as
        # channels last and uses a slower kernel.
        middle = torch.from_numpy(image)[None, top : top + height, left : left + width]
        new_size = self._resized(height, width)
        (resized,) = resize(middle.permute(0, 3, 1, 2), *new_size, self.interpolation)
        sides = zip(resized.shape[1:], self.size, strict=True)
        source, target = zip(*(_overlap(*lengths) for lengths in sides), strict=True)
        if self.crop_pct > 1:
            out.zero_()
        out[target].copy_(resized.permute(1, 2, 0)[source])

    def normalize(self, crops: Tensor) -> Tensor:
        """Normalize crops, (B, H, W, 3) uint8, to (B, 3, H, W) float32, channels last."""
        return photometric.normalize(crops.permute(0, 3, 1, 2), self.mean, self.std)

    def _targets(self) -> tuple[int, int]:
        """Return the height and width to resize to, not yet adjusted to the aspect ratio."""
        height, width = (math.floor(side / self.crop_pct) for side in self.size)
        return height, width

    def _margins(self, height: int, width: int) -> tuple[int, int]:
        """Return the number of rows and columns to drop at each end of a very long image.

        They are far from the crop, and resizing them too could run out of memory.
        """
        if self.crop_mode == "squash":
            return 0, 0
        targets = self._targets()
        ratio = min(height / targets[0], width / targets[1])
        top, left = (
            max(0, side - round(_MAX_LENGTH * ratio * target)) // 2
            for side, target in zip((height, width), targets, strict=True)
        )
        return top, left

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the resized image, rounded as in timm and torchvision."""
        targets = self._targets()
        if self.crop_mode == "squash":
            return targets
        if targets[0] == targets[1]:
            longer = int(targets[0] * max(height, width) / min(height, width))
            return (targets[0], longer) if height <= width else (longer, targets[0])
        ratio = min(height / targets[0], width / targets[1])
        return round(height / ratio), round(width / ratio)


def _overlap(resized: int, crop: int) -> tuple[slice, slice]:
    """Return the slices, along one axis, of the resized image and of the crop that overlap."""
    length = min(resized, crop)
    start, padding = round((resized - length) / 2), (crop - length) // 2
    return slice(start, start + length), slice(padding, padding + length)


PROTOCOLS = {
    # The authors' validation transform during training: resize to 256, crop 224.
    "validation": CenterCrop(crop_pct=0.875, interpolation="bilinear"),
    # The authors' transform for transfer, also the data config of the released weights.
    "transfer": CenterCrop(crop_pct=1.0, interpolation="bicubic"),
}
Transform = CenterCrop | Callable[[Image.Image], Tensor]


class CropBatch(NamedTuple):
    """Crops, (B, H, W, 3) uint8, labels, (B,), and error messages of skipped images by index."""

    images: Tensor
    labels: Tensor
    unreadable: dict[int, str]


class CenterCropDataset:
    """Dataset of the center crops of a source's images that loads complete batches."""

    def __init__(self, source: Source, crop: CenterCrop, skip: bool = False) -> None:
        self.source = source
        self.crop = crop
        self.skip = skip

    def __getitems__(self, indices: Sequence[int]) -> CropBatch:
        """Return the readable images as a batch; others raise a ValueError unless `skip`."""
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
                self.crop.crop_into(image, images[len(read)])
                read.append(index)
        labels = torch.from_numpy(self.source.labels[read])
        return CropBatch(images[: len(read)], labels, unreadable)


class _TransformedDataset:
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
    """Yield batches of transformed images in order, (<= batch_size, 3, H, W).

    Unreadable images raise an error. With a ``CenterCrop``, ``on_skip`` makes them skipped instead
    and receives {index: error message}.
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
