"""Multi-crop batches: uint8 crops from workers, augmented in batch on the training device.

Boxes follow torchvision's RandomResizedCrop. Resizing is antialiased bicubic by torch's uint8
kernel, which reads the box as a view of the decoded image, channels last, without a copy. A
sample's randomness is a function of (seed, epoch, index) only, so that a run does not depend on the
number of workers or processes, or on where it was interrupted.

Shapes: B batch, N crops of one resolution, S their side in pixels, P photometric parameters; H, W
height and width of an image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from trex_models.data import photometric
from trex_models.data.decode import UnreadableImageError, or_skip, rgb_pixels
from trex_models.data.loading import to_device
from trex_models.data.photometric import NUM_DRAWS, PhotometricAugmentation
from trex_models.data.sources import Source, require_rgb

Key = tuple[int, int]  # (epoch, index)
Box = tuple[int, int, int, int]  # top, left, height, width

_ATTEMPTS = 10
_RATIO = (3 / 4, 4 / 3)  # width / height of a box, log-uniform between them
_SAMPLE, _ORDER, _SUBSTITUTE = 0, 1, 2  # separate random streams
_MOST_SUBSTITUTES = 16


@dataclass(frozen=True)
class CropSpec:
    """Crops of one resolution.

    Args:
        count: N, crops per image.
        size: S, pixels.
        scale: Smallest and largest share of the image's area.
        augmentation: Their photometric augmentation.

    Raises:
        ValueError: ``count`` or ``size`` is below 1, or ``scale`` no positive ascending range.
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
        """Write the crops of an image, (H, W, 3) uint8 RGB, and the draws for ``parameters``.

        ``out`` is (N, S, S, 3) uint8, ``draws`` (N, NUM_DRAWS), contiguous.
        """
        require_rgb(image)
        rng.random(out=draws)
        boxes = draw_boxes(rng, self.count, image.shape[0], image.shape[1], self.scale)
        for crop, box in zip(out, boxes, strict=True):
            cut(image, box, self.size, crop)

    def parameters(self, draws: np.ndarray) -> Tensor:
        """Return the parameters, (N * B, P) crop-major, of a batch's draws, (B, N, NUM_DRAWS)."""
        return self.augmentation.parameters(draws.swapaxes(0, 1).reshape(-1, NUM_DRAWS))


TREX_CROPS = (
    CropSpec(1, 224, (0.25, 1.0), photometric.GLOBAL_AUGMENTATION),
    CropSpec(8, 96, (0.05, 0.25), photometric.LOCAL_AUGMENTATION),
)
"""One global crop of 224 pixels and eight local ones of 96: those of t-ReX, section 3.1."""


@dataclass(frozen=True)
class Batch:
    """A batch of crops, valid until the next one is requested (`load_batches`).

    Args:
        crops: One tensor per resolution, (N * B, S, S, 3) uint8, crop-major.
        parameters: One tensor per resolution, (N * B, P): the augmentation still to be done.
        labels: Class labels, (B,).
        indices: Indices of the samples in the source, (B,).
        unreadable: Reasons why samples were replaced by others, by index.
    """

    crops: list[Tensor]
    parameters: list[Tensor]
    labels: Tensor
    indices: Tensor
    unreadable: dict[int, str]

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory; the parameters stay with the CPU."""
        return replace(
            self,
            crops=[crops.pin_memory() for crops in self.crops],
            labels=self.labels.pin_memory(),
            indices=self.indices.pin_memory(),
        )


class MultiCropDataset(Dataset[Batch]):
    """Cuts crops from a source, a whole batch at a time.

    Multi-crop (SwAV, arXiv 2006.09882) as in t-ReX (arXiv 2206.15369), section 3.1: workers hand
    over bytes, ``augment`` finishes them on the device. For torchvision's datasets there is
    ``MultiCrop``.

        dataset = MultiCropDataset(FolderSource("images"))
        for batch in load_batches(dataset, EpochSampler(len(dataset.source), 256, epochs=100)):
            crops = augment(batch, "cuda")

    Args:
        source: Labeled images.
        specs: The crops, globals first.
        seed: Seed of all random draws.
        substitute: Replace a sample that cannot be read by another one, a function of (seed,
            epoch, index).
        live_batches: Number of batches of crops that a loader worker keeps in memory and writes
            over in turn. 0 for new memory each time, which costs a tenth of a worker's time.
    """

    def __init__(
        self,
        source: Source,
        specs: Sequence[CropSpec] = TREX_CROPS,
        seed: int = 0,
        substitute: bool = False,
        live_batches: int = 0,
    ) -> None:
        self.source = source
        self.specs = list(specs)
        self.seed = seed
        self.substitute = substitute
        self.live_batches = live_batches
        self._memory: dict[int, list[Tensor]] = {}
        self._made = 0

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """Return the batch of some samples; ValueError names one that cannot be read."""
        size = len(keys)
        indices: list[int] = []
        unreadable: dict[int, str] = {}
        crops = self._crops(size)
        draws = [np.empty((size, s.count, NUM_DRAWS)) for s in self.specs]
        for position, (epoch, index) in enumerate(keys):
            rng = np.random.default_rng((_SAMPLE, self.seed, epoch, index))
            image, found = self._read(epoch, index, unreadable)
            indices.append(found)
            for spec, out, drawn in zip(self.specs, crops, draws, strict=True):
                spec.draw(rng, image, out[:, position], drawn[position])
        return Batch(
            [c.flatten(0, 1) for c in crops],
            [s.parameters(drawn) for s, drawn in zip(self.specs, draws, strict=True)],
            torch.from_numpy(self.source.labels[indices]),
            torch.tensor(indices),
            unreadable,
        )

    def _crops(self, size: int) -> list[Tensor]:
        """Return memory for a batch of ``size`` images, (N, B, S, S, 3) uint8 each."""
        shared = self.live_batches > 0 and get_worker_info() is not None
        slot = self._made % self.live_batches if shared else 0
        self._made += 1
        crops = self._memory.get(slot)
        if crops is None or crops[0].shape[1] != size:
            crops = [
                torch.empty(s.count, size, s.size, s.size, 3, dtype=torch.uint8) for s in self.specs
            ]
            if shared:
                self._memory[slot] = [c.share_memory_() for c in crops]
        return crops

    def _read(self, epoch: int, index: int, unreadable: dict[int, str]) -> tuple[np.ndarray, int]:
        """Return a sample's image, or its substitute's, and whose it is."""
        key, stand_ins = (_SUBSTITUTE, self.seed, epoch, index), None
        for _ in range(_MOST_SUBSTITUTES):
            try:
                return self.source.read(index), index
            except UnreadableImageError as error:
                if not self.substitute:
                    raise or_skip(error) from error
                unreadable[index] = str(error)
                # Only here: it would cost every image of every epoch 12 us.
                stand_ins = stand_ins or np.random.default_rng(key)
                index = int(stand_ins.integers(len(self.source)))
        raise ValueError(
            f"{_MOST_SUBSTITUTES} images in a row cannot be read, such as: "
            f"{next(iter(unreadable.values()))}"
        )


class EpochSampler(Sampler[list[Key]]):
    """All batches of a run, from any step: each epoch is one permutation, cut into batches.

    A batch sampler of the (epoch, index) keys that ``MultiCropDataset`` takes. Every process gets
    its block of each global batch, so the batches do not depend on how many processes there are.
    The last batch of an epoch is dropped if it is not full.

    Args:
        num_samples: Number of images in the source.
        batch_size: Number of images per step, all processes together.
        epochs: Number of epochs.
        seed: Seed of the permutations.
        rank: Rank of this process.
        world_size: Number of processes.
        start_step: First step to yield.

    Raises:
        ValueError: A batch is larger than the dataset, or does not divide into 2 or more images
            for each process.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        epochs: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
    ) -> None:
        if batch_size > num_samples:
            raise ValueError(
                f"optim.batch_size {batch_size} exceeds the dataset's {num_samples} images"
            )
        share, rest = divmod(batch_size, world_size)
        if rest or share < 2:
            raise ValueError(
                f"optim.batch_size {batch_size} does not divide among {world_size} processes into "
                "equal shares; BatchNorm needs at least 2 images in each"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.steps_per_epoch = num_samples // batch_size
        self.total_steps = epochs * self.steps_per_epoch
        self.seed = seed
        self.start_step = start_step
        self._own = slice(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        """Return the number of batches left."""
        return self.total_steps - self.start_step

    def __iter__(self) -> Iterator[list[Key]]:
        """Yield the (epoch, index) keys of this process's share of every batch left."""
        step = self.start_step
        while step < self.total_steps:
            epoch, within = divmod(step, self.steps_per_epoch)
            order = np.random.default_rng((_ORDER, self.seed, epoch)).permutation(self.num_samples)
            for first in range(within, self.steps_per_epoch):
                batch = order[first * self.batch_size : (first + 1) * self.batch_size]
                yield [(epoch, int(index)) for index in batch[self._own]]
                step += 1


def augment(
    batch: Batch, device: torch.device | str = "cpu", compiled: bool = False
) -> list[Tensor]:
    """Copy a batch's crops to a device and finish their augmentation there.

    Args:
        batch: Batch of a worker.
        device: Device of training.
        compiled: Fuse the jitter's arithmetic by torch.compile, as ``photometric.apply``.

    Returns:
        One float32 tensor per resolution, (N * B, 3, S, S), crop-major, in channels_last format,
        normalized by ImageNet's mean and standard deviation.
    """
    device = torch.device(device)
    return [
        photometric.normalize(photometric.apply(crops.permute(0, 3, 1, 2), parameters, compiled))
        for crops, parameters in zip(to_device(batch.crops, device), batch.parameters, strict=True)
    ]


class MultiCrop:
    """Transform of one image to all its crops, augmented and normalized, for any DataLoader.

    Multi-crop (SwAV, arXiv 2006.09882) as in t-ReX (arXiv 2206.15369), section 3.1. DataLoader's
    own collation makes of them one (B, 3, S, S) a crop, which is what ``TReX`` takes:

        dataset = ImageFolder("images", transform=MultiCrop(), loader=read_image)
        for crops, labels in DataLoader(dataset, batch_size=256, shuffle=True): ...

    Draws follow torch's generator, which DataLoader seeds in each worker. The same distribution as
    ``MultiCropDataset`` with ``augment``, but each worker augments its images one by one and hands
    over four times the bytes.

    Args:
        specs: The crops, globals first.
    """

    def __init__(self, specs: Sequence[CropSpec] = TREX_CROPS) -> None:
        self.specs = list(specs)

    def __call__(self, image: Image.Image | np.ndarray) -> list[Tensor]:
        """Return the crops, (3, S, S) float32 each, of a PIL image or a (H, W, 3) uint8 RGB array.

        They are normalized as ImageNet's are. PIL images are converted as image files are; one
        whose values have no defined range (floating point, 32 bits) is a ValueError.
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
    """Draw boxes with the distribution of torchvision's `RandomResizedCrop.get_params`.

    The number of draws from `rng` does not depend on their outcome.
    """
    draws = rng.random((4, count, _ATTEMPTS)).tolist()
    return [_first_box(attempts, height, width, scale) for attempts in zip(*draws, strict=True)]


def _first_box(
    attempts: Sequence[Sequence[float]], height: int, width: int, scale: tuple[float, float]
) -> Box:
    """Return the first box that fits into the image, or else the largest central one.

    Plain floats: arrays of so few numbers would take ten times as long. ``attempts`` are numbers in
    [0, 1) for area, ratio, top and left, each for every attempt.
    """
    log_low, log_high = math.log(_RATIO[0]), math.log(_RATIO[1])
    for size, shape, down, right in zip(*attempts, strict=True):
        # By logarithms: sides are sqrt(area / aspect) and sqrt(area * aspect).
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


def cut(image: np.ndarray, box: Box, size: int, out: Tensor) -> None:
    """Resize a box of an image, (H, W, 3) uint8, into `out`, (S, S, 3), and see no other pixel."""
    top, left, height, width = box
    if not image.flags.writeable:  # torch accepts none of these
        image, top, left = image[top : top + height, left : left + width].copy(), 0, 0
    # The batch axis is added before the box is cut: only strides that still read as channels last
    # give the fast kernel and the matching output (half the time).
    patch = torch.from_numpy(image)[None, top : top + height, left : left + width]
    out[None].permute(0, 3, 1, 2).copy_(resize(patch.permute(0, 3, 1, 2), size, size, "bicubic"))


def resize(images: Tensor, height: int, width: int, mode: str) -> Tensor:
    """Resize images, (B, 3, H, W) uint8, antialiased; fastest in channels_last format.

    Levels are rounded after each axis, so that their order shows (0.2 levels on average). Rows go
    first where Pillow 13 takes them first, for speed: where the height loses more than twice as
    many pixels as the width. (Earlier Pillows never did.)
    """
    lost = images.shape[2] - height
    if lost > max(0, 2 * (images.shape[3] - width)):
        images = F.interpolate(images, (height, images.shape[3]), mode=mode, antialias=True)
    return F.interpolate(images, (height, width), mode=mode, antialias=True)
