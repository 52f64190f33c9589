"""Multi-crop batches: uint8 crops from workers, augmented in batch on the training device.

Multi-crop is SwAV's (Caron et al. 2020), the augmentations are DINO's; t-ReX section 3.1.
A sample's randomness is a function of (seed, epoch, index) alone, so that a run does not depend
on the number of workers or processes, or on where it was interrupted.

Shapes: B batch, N crops of one resolution, S their side in pixels, P photometric parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from trex_models.data import photometric
from trex_models.data.crops import cut, draw_boxes
from trex_models.data.decode import UnreadableImageError, or_skip
from trex_models.data.photometric import (
    GLOBAL_LAW,
    LOCAL_LAW,
    NUM_DRAWS,
    NUM_PARAMETERS,
    PhotometricLaw,
)
from trex_models.data.sources import Source
from trex_models.data.transfer import to_device

Key = tuple[int, int]  # (epoch, index)

_SAMPLE, _ORDER, _SUBSTITUTE = 0, 1, 2  # separate random streams
_MOST_SUBSTITUTES = 16


@dataclass(frozen=True)
class CropSpec:
    """Crops of one resolution.

    Args:
        count: N, crops per image.
        size: S, pixels.
        scale: Smallest and largest share of the image's area.
        law: Their photometric augmentation.

    Raises:
        ValueError: ``count`` or ``size`` is below 1.
    """

    count: int
    size: int
    scale: tuple[float, float]
    law: PhotometricLaw

    def __post_init__(self) -> None:
        if min(self.count, self.size) < 1:
            raise ValueError(
                f"count and size of crops must be at least 1, got {self.count} and {self.size}"
            )

    def draw(
        self,
        rng: np.random.Generator,
        image: NDArray[np.uint8],
        out: Tensor,
        draws: NDArray[np.float64],
    ) -> None:
        """Write an image's crops, and the draws for the augmentation still to be done.

        Args:
            rng: Source of the draws.
            image: (height, width, 3) uint8 RGB.
            out: (N, S, S, 3) uint8, written in place.
            draws: (N, NUM_DRAWS) float64, contiguous, written in place, for ``parameters``.
        """
        rng.random(out=draws)
        boxes = draw_boxes(rng, self.count, image.shape[0], image.shape[1], self.scale)
        for crop, box in enumerate(boxes.tolist()):
            cut(image, box, self.size, out[crop])

    def parameters(self, draws: NDArray[np.float64]) -> Tensor:
        """Return the parameters of a batch's augmentation, (N * B, P) float32, crop-major.

        Args:
            draws: (B, N, NUM_DRAWS), of ``draw``.
        """
        crop_major = draws.swapaxes(0, 1).reshape(-1, NUM_DRAWS)
        parameters = np.empty((len(crop_major), NUM_PARAMETERS), np.float32)
        self.law.fill(crop_major, parameters)
        return torch.from_numpy(parameters)


TREX_CROPS = (
    CropSpec(1, 224, (0.25, 1.0), GLOBAL_LAW),
    CropSpec(8, 96, (0.05, 0.25), LOCAL_LAW),
)
"""One global crop of 224 pixels and eight local ones of 96: those of t-ReX, section 3.1."""


@dataclass(frozen=True)
class Batch:
    """What a worker makes; its crops hold until the next batch is asked for (`load_batches`).

    Args:
        crops: One tensor per resolution, (N * B, S, S, 3) uint8, crop-major.
        parameters: One tensor per resolution, (N * B, P), of the augmentation still to be done.
        labels: (B,).
        ids: Which samples of the source these are, (B,).
        unreadable: What is wrong with the samples that others stand in for, by index.
    """

    crops: list[Tensor]
    parameters: list[Tensor]
    labels: Tensor
    ids: Tensor
    unreadable: dict[int, str]

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory; the parameters stay with the CPU."""
        return replace(
            self,
            crops=[crops.pin_memory() for crops in self.crops],
            labels=self.labels.pin_memory(),
            ids=self.ids.pin_memory(),
        )


class MultiCropDataset(Dataset[Batch]):
    """Cuts crops from a source, a whole batch at a time.

    Multi-crop (SwAV, arXiv 2006.09882) as in t-ReX (arXiv 2206.15369), section 3.1. The fast way:
    workers hand over bytes, ``augment`` finishes them on the device of training. For a data set
    of torchvision's kind there is ``MultiCrop``.

        dataset = MultiCropDataset(FolderSource("images"))
        for batch in load_batches(dataset, EpochSampler(len(dataset.source), 256, epochs=100)):
            crops = augment(batch, "cuda")

    Args:
        source: Labelled images.
        specs: The crops, globals first.
        seed: Of all random draws.
        substitute: Whether another sample, a function of (seed, epoch, index), takes the place of
            one that cannot be read.
        live_batches: How many batches of crops a loader worker keeps in memory: it writes each
            over the one so many before. 0 for new memory each time, of which the system takes a
            tenth of a worker's time to make it.
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
        ids: list[int] = []
        unreadable: dict[int, str] = {}
        crops = self._crops(size)
        draws = [np.empty((size, s.count, NUM_DRAWS)) for s in self.specs]
        for position, (epoch, index) in enumerate(keys):
            rng = np.random.default_rng((_SAMPLE, self.seed, epoch, index))
            image, found = self._read(epoch, index, unreadable)
            ids.append(found)
            for spec, out, drawn in zip(self.specs, crops, draws, strict=True):
                spec.draw(rng, image, out[:, position], drawn[position])
        return Batch(
            [c.flatten(0, 1) for c in crops],
            [s.parameters(drawn) for s, drawn in zip(self.specs, draws, strict=True)],
            torch.from_numpy(self.source.labels[ids]),
            torch.tensor(ids),
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

    A batch sampler of the (epoch, index) keys that ``MultiCropDataset`` takes.

    Every process gets its block of each global batch, so the batches do not depend on how many
    processes there are. The last batch of an epoch is dropped if it is not full.

    Args:
        num_samples: Images in the source.
        batch_size: Images per step, all processes together.
        epochs: Passes over the data.
        seed: Of the permutations.
        rank: Of this process.
        world_size: Number of processes.
        start_step: First step to yield.

    Raises:
        ValueError: A batch is larger than the data set, or does not divide among the processes,
            or leaves one of them a single image.
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
                f"optim.batch_size {batch_size} exceeds the data set's {num_samples} images; "
                f"take at most {num_samples}"
            )
        if batch_size % world_size:
            raise ValueError(
                f"optim.batch_size {batch_size} does not divide among {world_size} processes"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.steps_per_epoch = num_samples // batch_size
        self.total_steps = epochs * self.steps_per_epoch
        self.seed = seed
        self.start_step = start_step
        share = batch_size // world_size
        if share < 2:
            raise ValueError(
                f"optim.batch_size {batch_size} on {world_size} processes leaves {share} image to "
                "each; BatchNorm needs at least 2"
            )
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
        batch: From a worker.
        device: Of training.
        compiled: As of ``photometric.apply``.

    Returns:
        One float32 tensor per resolution, (N * B, 3, S, S), crop-major, in channels_last format,
        normalised by ImageNet's mean and standard deviation.
    """
    device = torch.device(device)
    return [
        photometric.normalize(photometric.apply(crops.permute(0, 3, 1, 2), parameters, compiled))
        for crops, parameters in zip(to_device(batch.crops, device), batch.parameters, strict=True)
    ]
