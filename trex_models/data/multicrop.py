"""Multi-crop batches: uint8 crops from loader workers, augmented in batches on the device.

Boxes follow torchvision's RandomResizedCrop. Crops are resized by torch's uint8 kernel (bicubic,
antialiased), which reads the box as a channels-last view of the decoded image, without a copy. The
random numbers of a sample depend only on (seed, epoch, index): crops depend neither on the number
of loader workers or processes nor on interruptions.

Shapes: batch B, crops per image of one resolution N, crop side S in pixels, photometric parameters
P, image height H, image width W.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from trex_models.data import photometric
from trex_models.data.decode import UnreadableImageError, rgb_pixels, with_skip_hint
from trex_models.data.loading import to_device
from trex_models.data.photometric import NUM_DRAWS, PhotometricAugmentation
from trex_models.data.sources import EncodedSource, Source, require_rgb

Key = tuple[int, int]  # (epoch, index)
Box = tuple[int, int, int, int]  # top, left, height, width

_ATTEMPTS = 10
_RATIO = (3 / 4, 4 / 3)  # width / height of a box, log-uniform between them
_SAMPLE, _ORDER, _SUBSTITUTE = 0, 1, 2  # separate random streams
_MAX_SUBSTITUTES = 16


@dataclass(frozen=True)
class CropSpec:
    """Crops of one resolution.

    Args:
        count: Number of crops per image, N.
        size: Side of a crop in pixels, S.
        scale: Smallest and largest fraction of the image's area.
        augmentation: Photometric augmentation of the crops.

    Raises:
        ValueError: ``count`` or ``size`` is below 1, or ``scale`` is not positive and ascending.
    """

    count: int
    size: int
    scale: tuple[float, float]
    augmentation: PhotometricAugmentation

    def __post_init__(self) -> None:
        if min(self.count, self.size) < 1:
            raise ValueError(f"count and size must be at least 1, got {self.count} and {self.size}")
        if not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise ValueError(f"scale must be positive and ascending, got {self.scale}")

    def draw(
        self, rng: np.random.Generator, image: np.ndarray, out: Tensor, draws: np.ndarray
    ) -> None:
        """Write the crops of an image, (H, W, 3) uint8 RGB, and random numbers for ``parameters``.

        ``out`` is (N, S, S, 3) uint8, ``draws`` a contiguous (N, NUM_DRAWS) float64 array.
        """
        require_rgb(image)
        rng.random(out=draws)
        boxes = draw_boxes(rng, self.count, image.shape[0], image.shape[1], self.scale)
        resized_crops(image, boxes, self.size, out)

    def parameters(self, draws: np.ndarray) -> Tensor:
        """Convert a batch's draws, (B, N, NUM_DRAWS), to parameters, (N * B, P), crop-major."""
        return self.augmentation.parameters(draws.swapaxes(0, 1).reshape(-1, NUM_DRAWS))


TREX_CROPS = (
    CropSpec(1, 224, (0.25, 1.0), photometric.GLOBAL_AUGMENTATION),
    CropSpec(8, 96, (0.05, 0.25), photometric.LOCAL_AUGMENTATION),
)
"""One global crop of 224 pixels and eight local crops of 96 pixels (t-ReX, section 3.1)."""


@dataclass(frozen=True)
class Batch:
    """A batch of crops, valid until the next one is requested (``load_batches``).

    Args:
        crops: Crops, one tensor per resolution, (N * B, S, S, 3) uint8, crop-major.
        parameters: Augmentation parameters for ``augment``, one tensor per resolution, (N * B, P).
        labels: Class labels, (B,).
        indices: Indices of the samples in the source, (B,).
        unreadable: {index: error message} of the samples that were replaced.
    """

    crops: list[Tensor]
    parameters: list[Tensor]
    labels: Tensor
    indices: Tensor
    unreadable: dict[int, str]

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, except the parameters, which the CPU reads."""
        return replace(
            self,
            crops=[crops.pin_memory() for crops in self.crops],
            labels=self.labels.pin_memory(),
            indices=self.indices.pin_memory(),
        )


@dataclass(eq=False)
class MultiCropDataset(Dataset[Batch]):
    """Dataset that returns complete batches of random crops.

    Multi-crop (SwAV, arXiv 2006.09882) as in t-ReX (arXiv 2206.15369), section 3.1. Loader workers
    return uint8 crops, and ``augment`` augments them on the device. With torchvision's datasets,
    use ``MultiCrop`` instead.

        dataset = MultiCropDataset(FolderSource("images"))
        for batch in load_batches(dataset, EpochSampler(len(dataset.source), 256, epochs=100)):
            crops = augment(batch, "cuda")

    Args:
        source: Labeled images.
        specs: Crops of each resolution, global crops first.
        seed: Seed of all random draws.
        substitute: Replace an unreadable sample by another, drawn from (seed, epoch, index).
        num_buffers: Number of buffers per loader worker, reused in turn. 0 allocates memory for
            each batch, which takes a tenth of a worker's time.
        decode: "auto" decodes JPEGs at the size that ``reduction_factor`` allows, "exact" at full
            size.
    """

    source: Source
    specs: Sequence[CropSpec] = TREX_CROPS
    seed: int = 0
    substitute: bool = False
    num_buffers: int = 0
    decode: Literal["auto", "exact"] = "auto"

    def __post_init__(self) -> None:
        if self.decode == "auto" and isinstance(self.source, EncodedSource):
            # A copy, because the source may also serve validation, which is always exact.
            self.source = self.source.reduced(partial(reduction_factor, self.specs))
        self._memory: dict[int, list[Tensor]] = {}
        self._num_batches = 0

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """Load a batch; raise an UnreadableImageError for an unreadable image."""
        size = len(keys)
        indices: list[int] = []
        unreadable: dict[int, str] = {}
        crops = self._crops(size)
        draws = [np.empty((size, s.count, NUM_DRAWS)) for s in self.specs]
        for position, (epoch, index) in enumerate(keys):
            rng = np.random.default_rng((_SAMPLE, self.seed, epoch, index))
            image, read_index = self._read(epoch, index, unreadable)
            indices.append(read_index)
            for spec, out, spec_draws in zip(self.specs, crops, draws, strict=True):
                spec.draw(rng, image, out[:, position], spec_draws[position])
        return Batch(
            [c.flatten(0, 1) for c in crops],
            [s.parameters(spec_draws) for s, spec_draws in zip(self.specs, draws, strict=True)],
            torch.from_numpy(self.source.labels[indices]),
            torch.tensor(indices),
            unreadable,
        )

    def _crops(self, size: int) -> list[Tensor]:
        """Return memory for a batch of ``size`` images, (N, B, S, S, 3) uint8 each."""
        shared = self.num_buffers > 0 and get_worker_info() is not None
        slot = self._num_batches % self.num_buffers if shared else 0
        self._num_batches += 1
        crops = self._memory.get(slot)
        if crops is None or crops[0].shape[1] != size:
            shapes = [(s.count, size, s.size, s.size, 3) for s in self.specs]
            crops = [torch.empty(shape, dtype=torch.uint8) for shape in shapes]
            if shared:
                self._memory[slot] = [c.share_memory_() for c in crops]
        return crops

    def _read(self, epoch: int, index: int, unreadable: dict[int, str]) -> tuple[np.ndarray, int]:
        """Read a sample or a substitute; return the image and the index that was read."""
        key, rng = (_SUBSTITUTE, self.seed, epoch, index), None
        for _ in range(_MAX_SUBSTITUTES):
            try:
                return self.source.read(index), index
            except UnreadableImageError as error:
                if not self.substitute:
                    raise with_skip_hint(error) from error
                unreadable[index] = str(error)
                # Created only when needed, because it takes 12 us.
                rng = rng or np.random.default_rng(key)
                index = int(rng.integers(len(self.source)))
        raise ValueError(
            f"{_MAX_SUBSTITUTES} images in a row are unreadable; check the storage. First error: "
            f"{next(iter(unreadable.values()))}"
        )


@dataclass(eq=False)
class EpochSampler(Sampler[list[Key]]):
    """Batch sampler over all epochs of a run, starting at any step.

    Yields the (epoch, index) keys that ``MultiCropDataset`` expects. Each epoch is a permutation
    that is split into batches; an incomplete last batch is dropped. Each process receives its block
    of every global batch, so the batches do not depend on the number of processes.

    Args:
        num_samples: Number of images in the source.
        batch_size: Number of images per step, over all processes.
        epochs: Number of epochs.
        seed: Seed of the permutations.
        rank: Rank of this process.
        world_size: Number of processes.
        start_step: First step to yield.

    Raises:
        ValueError: ``batch_size`` is larger than the dataset, or not a multiple of ``world_size``
            with at least 2 images for each process.
    """

    num_samples: int
    batch_size: int
    epochs: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    start_step: int = 0

    def __post_init__(self) -> None:
        size, images, processes = self.batch_size, self.num_samples, self.world_size
        if size > images:
            raise ValueError(f"batch size {size} exceeds the dataset's {images} images; use fewer")
        share, rest = divmod(size, processes)
        if rest or share < 2:
            raise ValueError(
                f"batch size must be at least {2 * processes} and a multiple of the number "
                f"of processes, {processes} (BatchNorm requires 2 images each), got {size}"
            )
        self.steps_per_epoch = images // size
        self.total_steps = self.epochs * self.steps_per_epoch
        self._block = slice(self.rank * share, (self.rank + 1) * share)

    def __len__(self) -> int:
        """Return the number of remaining batches."""
        return self.total_steps - self.start_step

    def __iter__(self) -> Iterator[list[Key]]:
        """Yield the (epoch, index) keys of this process's block of each remaining batch."""
        step = self.start_step
        while step < self.total_steps:
            epoch, within = divmod(step, self.steps_per_epoch)
            order = np.random.default_rng((_ORDER, self.seed, epoch)).permutation(self.num_samples)
            for first in range(within, self.steps_per_epoch):
                batch = order[first * self.batch_size : (first + 1) * self.batch_size]
                yield [(epoch, int(index)) for index in batch[self._block]]
                step += 1


def augment(
    batch: Batch, device: torch.device | str = "cpu", compiled: bool = False
) -> list[Tensor]:
    """Copy a batch's crops to a device, augment and normalize them there.

    Args:
        batch: Batch of crops and their augmentation parameters.
        device: Device to augment on.
        compiled: Compile the color jitter, which takes half a minute at the first call.

    Returns:
        Crops, one tensor per resolution, (N * B, 3, S, S) float32, crop-major, channels last,
        normalized with ImageNet's mean and standard deviation.
    """
    device = torch.device(device)
    return [
        photometric.normalize(photometric.apply(crops.permute(0, 3, 1, 2), parameters, compiled))
        for crops, parameters in zip(to_device(batch.crops, device), batch.parameters, strict=True)
    ]


class MultiCrop:
    """Transform from an image to its crops, augmented and normalized, for any DataLoader.

    Multi-crop (SwAV, arXiv 2006.09882) as in t-ReX (arXiv 2206.15369), section 3.1. DataLoader's
    default collation returns one tensor per crop, (B, 3, S, S), as ``TReX`` expects:

        dataset = ImageFolder("images", transform=MultiCrop(), loader=read_image)
        for crops, labels in DataLoader(dataset, batch_size=256, shuffle=True): ...

    Random numbers come from torch's generator, which DataLoader seeds in each worker. Crops have
    the same distribution as those of ``MultiCropDataset`` and ``augment``, but each worker augments
    its images one by one and transfers float32 instead of uint8.

    Args:
        specs: Crops of each resolution, global crops first.
    """

    def __init__(self, specs: Sequence[CropSpec] = TREX_CROPS) -> None:
        self.specs = list(specs)

    def __call__(self, image: Image.Image | np.ndarray) -> list[Tensor]:
        """Return the crops, (3, S, S) float32 each, of a PIL image or a (H, W, 3) uint8 RGB array.

        Crops are normalized with ImageNet's mean and standard deviation. PIL images whose values
        have no defined range (floating point, 32 bits) raise a ValueError.
        """
        pixels = rgb_pixels(image) if isinstance(image, Image.Image) else image
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        crops: list[Tensor] = []
        for spec in self.specs:
            out = torch.empty(spec.count, spec.size, spec.size, 3, dtype=torch.uint8)
            draws = np.empty((1, spec.count, NUM_DRAWS))
            spec.draw(rng, pixels, out, draws[0])
            images = photometric.apply(out.permute(0, 3, 1, 2), spec.parameters(draws))
            crops += photometric.normalize(images)
        return crops


def draw_boxes(
    rng: np.random.Generator, count: int, height: int, width: int, scale: tuple[float, float]
) -> list[Box]:
    """Draw boxes with the distribution of torchvision's ``RandomResizedCrop.get_params``.

    Always draws the same number of random numbers from ``rng``.
    """
    draws = rng.random((4, count, _ATTEMPTS)).tolist()
    return [_first_box(attempts, height, width, scale) for attempts in zip(*draws, strict=True)]


def _first_box(
    attempts: Sequence[Sequence[float]], height: int, width: int, scale: tuple[float, float]
) -> Box:
    """Return the first box that fits into the image, otherwise the largest central one.

    ``attempts`` contains, for every attempt, numbers in [0, 1) for area, aspect ratio, top and
    left. They are plain floats, because NumPy is ten times slower for so few numbers.
    """
    log_low, log_high = math.log(_RATIO[0]), math.log(_RATIO[1])
    for size, shape, down, right in zip(*attempts, strict=True):
        # Logarithms of area and aspect: sides are sqrt(area / aspect) and sqrt(area * aspect).
        area = math.log(height * width * (scale[0] + (scale[1] - scale[0]) * size))
        aspect = log_low + (log_high - log_low) * shape
        box_height = round(math.exp((area - aspect) / 2))
        box_width = round(math.exp((area + aspect) / 2))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(down * (height - box_height + 1))
            return top, int(right * (width - box_width + 1)), box_height, box_width
    box_height, box_width = height, width
    if width / height < _RATIO[0]:
        box_height = round(width / _RATIO[0])
    elif width / height > _RATIO[1]:
        box_width = round(height * _RATIO[1])
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def reduction_factor(specs: Sequence[CropSpec], height: int, width: int) -> int:
    """Return the largest factor, 1, 2 or 4, that reduces an image without enlarging any crop.

    Aspect ratios of boxes are between 3/4 and 4/3. A box with a share s of the area therefore has
    sides of at least sqrt(3/4 s H W), and the largest central box of at least min(H, W). The factor
    is at most the smaller of both divided by S for every spec. Boxes that are drawn in the reduced
    image, of ceil(H / factor) x ceil(W / factor), then have sides of at least S.
    """
    limit = min(
        min(math.sqrt(_RATIO[0] * spec.scale[0] * height * width), height, width) / spec.size
        for spec in specs
    )
    return max(factor for factor in (1, 2, 4) if factor <= max(1, limit))


def resized_crops(image: np.ndarray, boxes: Sequence[Box], size: int, out: Tensor) -> None:
    """Resize only boxes of an image, (H, W, 3) uint8, and write them to ``out``, (N, S, S, 3)."""
    for crop, (top, left, height, width) in zip(out, boxes, strict=True):
        # A copy, which is faster than the one that torch would make.
        box = torch.from_numpy(image[top : top + height, left : left + width].copy())
        # The batch axis first: otherwise torch does not recognize the strides as channels last.
        patch = box[None].permute(0, 3, 1, 2)
        crop.copy_(resize(patch, size, size, "bicubic")[0].permute(1, 2, 0))


def resize(images: Tensor, height: int, width: int, mode: str) -> Tensor:
    """Resize images, (B, 3, H, W) uint8, antialiased; fastest in channels_last format.

    Values are rounded after each axis, so the order of the axes matters (by 0.2 of 255 on average).
    As in Pillow 13 (not earlier), the height is resized first, for speed, if it shrinks by more
    than twice as many pixels as the width.
    """
    removed = images.shape[2] - height
    if removed > max(0, 2 * (images.shape[3] - width)):
        images = F.interpolate(images, (height, images.shape[3]), mode=mode, antialias=True)
    return F.interpolate(images, (height, width), mode=mode, antialias=True)
