"""Linear segmentation: BatchNorm and a 1 x 1 convolution on the feature maps of a frozen model.

The protocol is DINOv2's (arXiv 2304.07193), whose code uses mmsegmentation. A training crop depends
only on the seed and its number, so that a resumed training is exact.

Shapes: B batch; K classes; C channels; S side of a crop; H height, W width of an image.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trex_models.atomic import replacing, write_safetensors
from trex_models.cli import first_line, progress_bar
from trex_models.data import photometric
from trex_models.data.loading import load_batches, to_device
from trex_models.data.multicrop import resize
from trex_models.data.photometric import NUM_DRAWS, PhotometricAugmentation
from trex_models.data.sources import Source
from trex_models.evaluation.frozen_model import FrozenModel, device_of
from trex_models.precision import full_float32

IGNORED = 255
"""Label of pixels that are neither trained on nor scored."""
_SAVE_EVERY = 60.0  # seconds
_SAMPLE, _ORDER = 0, 1  # separate random streams
_AUGMENTATION = PhotometricAugmentation(
    brightness=0.125, contrast=0.5, saturation=0.5, hue=0.05, gray=0.0, blur=0.0, solarize=0.0
)


class MaskedSource(Source, Protocol):
    """Source of images with a class per pixel."""

    def mask(self, index: int) -> np.ndarray:
        """Return the labels of an image's pixels, (H, W) uint8."""
        ...


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the training and the test; the defaults are DINOv2's."""

    iterations: int = 40_000
    batch_size: int = 16
    crop: int = 512
    """Side of the crops, and of the windows in the test, in pixels."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the ratio of a training image's shorter side to the crop."""
    max_aspect: float = 4.0
    """Maximum ratio of the longer side to the one drawn for the shorter side."""
    max_share: float = 0.75
    """Share of a crop's pixels below which each class must be, in one of ``attempts`` crops."""
    attempts: int = 10
    augmentation: PhotometricAugmentation = _AUGMENTATION
    lr: float = 1e-3
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 1500 / 40_000
    """Share of the iterations with a linear warm-up; then the rate decreases linearly to 0."""
    warmup_factor: float = 1e-6
    stride: float = 341 / 512
    """Distance between the windows in the test, as a fraction of the crop."""
    seed: int = 0

    def learning_rate(self, iteration: int) -> float:
        """Return the learning rate of an iteration, the first of which is 0."""
        progress = min(1.0, iteration / max(1, round(self.warmup * self.iterations)))
        factor = self.warmup_factor + (1 - self.warmup_factor) * progress
        return self.lr * factor * (1 - iteration / self.iterations)


class _TrainingCrops:
    """Batches of augmented crops, (B, S, S, 3) uint8, and labels, (B, S, S) uint8, by number."""

    def __init__(self, source: MaskedSource, settings: Settings, mean: Sequence[float]) -> None:
        self.source, self.settings = source, settings
        self.padding = torch.tensor([round(255 * value) for value in mean], dtype=torch.uint8)

    def __getitems__(self, numbers: Sequence[int]) -> list[Tensor]:
        side = self.settings.crop
        images = self.padding.repeat(len(numbers), side, side, 1)
        masks = torch.full((len(numbers), side, side), IGNORED, dtype=torch.uint8)
        for row, number in enumerate(numbers):
            image, mask = self._draw(number)
            height, width = mask.shape
            images[row, :height, :width], masks[row, :height, :width] = image, mask
        return [images, masks]

    def _draw(self, number: int) -> tuple[Tensor, Tensor]:
        s, (epoch, position) = self.settings, divmod(number, len(self.source))
        index = int(_order(s.seed, epoch, len(self.source))[position])
        image, mask = (torch.from_numpy(f(index)) for f in (self.source.read, self.source.mask))
        rng = np.random.default_rng((_SAMPLE, s.seed, number))
        side = s.crop * rng.uniform(*s.scale)
        scale = min(side / min(mask.shape), s.max_aspect * side / max(mask.shape))
        height, width = (min(s.crop, max(1, round(scale * length))) for length in mask.shape)
        # Only the part of the image that becomes the crop is resized.
        extents = [max(1, round(target / scale)) for target in (height, width)]
        for _ in range(s.attempts):
            sides = zip(mask.shape, extents, strict=True)
            starts = [int(rng.integers(max(0, length - extent) + 1)) for length, extent in sides]
            box = tuple(slice(a, a + extent) for a, extent in zip(starts, extents, strict=True))
            labels = F.interpolate(mask[box][None, None], (height, width), mode="nearest-exact")
            counts = labels.flatten().bincount(minlength=IGNORED + 1)[:IGNORED]
            if counts.max() < s.max_share * counts.sum():
                break
        parameters = s.augmentation.parameters(rng.random((1, NUM_DRAWS)))
        crop = resize(image[None, *box].permute(0, 3, 1, 2), height, width, "bilinear")
        labels = labels.flip(3) if parameters[0, photometric.FLIP] else labels
        return photometric.apply(crop, parameters)[0].permute(1, 2, 0), labels[0, 0]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((_ORDER, seed, epoch)).permutation(count)


class _TestImages:
    """Images with the shorter side resized to the crop, (h, w, 3) uint8, and their masks."""

    def __init__(self, source: MaskedSource, side: int) -> None:
        self.source, self.side = source, side

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        (index,) = indices
        mask = torch.from_numpy(self.source.mask(index))
        height, width = (round(self.side * length / min(mask.shape)) for length in mask.shape)
        image = torch.from_numpy(self.source.read(index))[None].permute(0, 3, 1, 2)
        return [resize(image, height, width, "bilinear")[0].permute(1, 2, 0), mask]


class LinearSegmentation:
    """Resumable training and test of a head on a frozen model's feature maps.

    Args:
        model: Frozen model that maps images to feature maps, (B, C, h, w).
        num_classes: Number of classes, K.
        settings: Settings of the training and the test.
        path: File of the head, the optimizer and the counts of test images, saved every minute.
        key: Hash of everything that the head depends on; a file with another key is replaced.
        test_key: Hash of the test images; counts with another one are discarded.

    Raises:
        ValueError: The model does not accept images of the crop's size.
    """

    def __init__(
        self,
        model: FrozenModel,
        num_classes: int,
        settings: Settings,
        path: Path,
        key: str,
        test_key: str = "",
    ) -> None:
        self.model, self.settings, self.path = model, settings, path
        self.key, self.test_key = key, test_key
        self.device = device_of(model.model)
        conv: Any = nn.Conv2d(model.shape[0], num_classes, 1)
        generator = torch.Generator().manual_seed(settings.seed)
        nn.init.normal_(conv.weight, std=0.01, generator=generator)
        nn.init.zeros_(conv.bias)
        self.head = nn.Sequential(nn.BatchNorm2d(model.shape[0]), conv).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(), betas=settings.betas, weight_decay=settings.weight_decay
        )
        self.iteration = 0
        self.counts = torch.empty(0, 3, num_classes, dtype=torch.int64)
        self._saved = time.monotonic()
        self._check_size()
        with suppress(FileNotFoundError, safetensors.SafetensorError):
            self._restore()

    def train(self, source: MaskedSource, title: str, workers: int = 0) -> None:
        """Train the head from the saved iteration on."""
        s, initial = self.settings, self.iteration
        numbers = range(initial * s.batch_size, s.iterations * s.batch_size)
        batches = [numbers[i : i + s.batch_size] for i in range(0, len(numbers), s.batch_size)]
        dataset = _TrainingCrops(source, s, self.model.transform.mean)
        self.head.train()
        title = f"segmentation head, {title}"
        with progress_bar(s.iterations, title, "iteration", initial=initial) as bar:
            for batch in load_batches(dataset, batches, workers, self.device.type == "cuda"):
                self._step(*to_device(batch, self.device))
                self.iteration += 1
                self._save(finished=self.iteration == s.iterations)
                bar.update()

    def test(self, source: MaskedSource, title: str, workers: int = 0) -> np.ndarray:
        """Return the pixels of each class that are correct, predicted and labeled, (N, 3, K)."""
        done, count = len(self.counts), len(source)
        dataset, batches = (
            _TestImages(source, self.settings.crop),
            [[i] for i in range(done, count)],
        )
        with progress_bar(count, f"segmentation, {title}", "image", initial=done) as bar:
            for image, mask in load_batches(dataset, batches, workers):
                counts = class_counts(self._segment(image, mask.shape), mask, self.counts.shape[2])
                self.counts = torch.cat([self.counts, counts[None]])
                self._save(finished=len(self.counts) == count)
                bar.update()
        return self.counts.numpy()

    def predict(self, source: MaskedSource, index: int) -> np.ndarray:
        """Return the predicted labels of an image's pixels, (H, W) uint8."""
        image, mask = _TestImages(source, self.settings.crop).__getitems__([index])
        return self._segment(image, mask.shape).numpy()

    def _step(self, images: Tensor, masks: Tensor) -> None:
        maps = self._maps(images).clone()  # inference tensors cannot be saved for backward
        with full_float32(self.device):
            logits = self.head(maps)
            # One image at a time, because upsampled logits take K / 3 times the images' memory.
            leaf = logits.detach().requires_grad_()
            for part, mask in zip(leaf.split(1), masks.long().split(1), strict=True):
                upsampled = F.interpolate(part, mask.shape[1:], mode="bilinear")
                loss = F.cross_entropy(upsampled, mask, ignore_index=IGNORED, reduction="sum")
                (loss / masks.numel()).backward()
            self.optimizer.param_groups[0]["lr"] = self.settings.learning_rate(self.iteration)
            self.optimizer.zero_grad()
            logits.backward(leaf.grad)
            self.optimizer.step()

    @torch.inference_mode()
    def _maps(self, images: Tensor) -> Tensor:
        """Return the feature maps of images, (B, H, W, 3) uint8, in float32."""
        with self.model.precision.autocast(), self.model.precision.tf32():
            return self.model.model(self.model.transform.normalize(images)).float()

    @torch.inference_mode()
    def _segment(self, image: Tensor, size: Sequence[int]) -> Tensor:
        """Return the predicted labels, (H, W), of a resized image, (h, w, 3)."""
        side = self.settings.crop
        stride = max(1, round(self.settings.stride * side))
        rows, columns = (window_starts(length, side, stride) for length in image.shape[:2])
        boxes = [(slice(y, y + side), slice(x, x + side)) for y in rows for x in columns]
        [image] = to_device([image], self.device)
        self.head.eval()
        with full_float32(self.device):
            logits = torch.cat([self.head(self._maps(image[box][None])) for box in boxes])
            return merge_windows(logits, boxes, image.shape[:2], size).cpu()

    def _check_size(self) -> None:
        side = self.settings.crop
        try:
            self._maps(torch.zeros(1, side, side, 3, dtype=torch.uint8, device=self.device))
        except (RuntimeError, AssertionError, IndexError) as error:
            raise ValueError(
                f"{self.model.name} does not accept crops of {side} pixels ({first_line(error)}); "
                "choose a model for images of any size"
            ) from error

    def _save(self, finished: bool) -> None:
        if not finished and time.monotonic() < self._saved + _SAVE_EVERY:
            return
        states = {"head": self.head.state_dict(), **self.optimizer.state_dict()["state"]}
        tensors = {
            f"{part} {name}": t for part, state in states.items() for name, t in state.items()
        }
        metadata = {"key": self.key, "test_key": self.test_key, "iteration": str(self.iteration)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as file:
            write_safetensors(file, {**tensors, "counts": self.counts}, metadata)
        self._saved = time.monotonic()

    def _restore(self) -> None:
        with safetensors.safe_open(self.path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
        if metadata["key"] != self.key:
            return
        self.iteration, counts = int(metadata["iteration"]), tensors.pop("counts")
        if metadata["test_key"] == self.test_key:
            self.counts = counts
        parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, value in tensors.items():
            part, name = key.split(" ")
            parts[part][name] = value
        self.head.load_state_dict(parts.pop("head"))
        states = {int(number): state for number, state in parts.items()}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": states})


def window_starts(length: int, side: int, stride: int) -> list[int]:
    """Return the starts of windows that cover a length; the last window ends at its end."""
    count = math.ceil((length - side) / stride) + 1
    return [min(number * stride, length - side) for number in range(count)]


def merge_windows(
    logits: Tensor, boxes: Sequence[Any], shape: Sequence[int], size: Sequence[int]
) -> Tensor:
    """Return the labels of the highest logits, averaged over overlapping windows, (H, W) uint8.

    ``logits`` are those of the windows, (windows, K, h, w), at the rows and columns ``boxes`` of
    the resized image of size ``shape``; ``size`` is (H, W). One class at a time, because the
    upsampled logits of all classes could exceed the memory.
    """
    overlaps = logits.new_zeros(shape)
    for box in boxes:
        overlaps[box] += 1
    best = logits.new_full(size, -math.inf)
    labels = torch.zeros(size, dtype=torch.uint8, device=logits.device)
    for label, maps in enumerate(logits.unbind(1)):
        total = torch.zeros_like(overlaps)
        for window, box in zip(maps, boxes, strict=True):
            part = total[box]
            part += F.interpolate(window[None, None], part.shape, mode="bilinear")[0, 0]
        upsampled = F.interpolate((total / overlaps)[None, None], size, mode="bilinear")[0, 0]
        labels.masked_fill_(upsampled > best, label)
        torch.maximum(best, upsampled, out=best)
    return labels


def class_counts(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return the numbers of correct, predicted and labeled pixels of each class, (3, K)."""
    valid = labels != IGNORED
    predicted, labels = predicted[valid], labels[valid]
    parts = labels[predicted == labels], predicted, labels
    return torch.stack([part.bincount(minlength=num_classes) for part in parts])


def class_iou(counts: np.ndarray) -> np.ndarray:
    """Return each class's intersection over union from counts, (3, K); NaN without a union."""
    correct, predicted, labeled = counts
    with np.errstate(invalid="ignore"):
        return correct / (predicted + labeled - correct)
