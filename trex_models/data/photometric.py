"""Flip, color jitter, grayscale, Gaussian blur and solarization of batches on any device.

Pixels are computed with Pillow's integer arithmetic, so that a model sees the same images as with
the usual PIL pipeline: blends are rounded down, hue is shifted on an 8-bit HSV grid, luma is ITU-R
601-2 in 16-bit fixed point, and the blur consists of the three box passes of Pillow's GaussianBlur.
Here they are one matrix product per axis; Pillow rounds after each pass, so pixels may differ by
one level. The random draws have the distributions of torchvision's ColorJitter and RandomApply.

Parameters are drawn on the CPU, one row per image, together with the image's crop. `apply` selects
the images of each operation from the rows, on the CPU, too. Nothing is read back from the device,
so the CPU never waits for it. All sums are exact in float32, even if matrix products use TF32, so
the result of an image depends neither on the device nor on its batch.

Shapes: batch B, height H, width W, images with jitter J, images that an operation changes n.
Internally, images are planes (3, B, H, W) of float32 levels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

# Columns of a row of parameters; a row of zeros does not change its image.
FLIP = 0  # 1 to flip horizontally
JITTER = 1  # 1 to jitter the colors
ORDER = slice(2, 6)  # order of the jitter: 0 brightness, 1 contrast, 2 saturation, 3 hue
FACTORS = slice(6, 9)  # factors of brightness, contrast, saturation; 1 changes nothing
HUE = 9  # hue shift as a fraction of the color circle, in [-0.5, 0.5]
GRAY = 10  # 1 to convert to grayscale
SIGMA = 11  # standard deviation of the blur in pixels; 0 for no blur
SOLARIZE = 12  # 1 to invert the levels >= THRESHOLD
THRESHOLD = 13  # smallest level to invert
NUM_PARAMETERS = 14

NUM_DRAWS = 14  # random numbers per row

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_CONTRAST, _SATURATION, _HUE = 1, 2, 3  # codes of ORDER
_CPU_CHUNK = 1 << 19  # levels per chunk on a CPU, so that the float32 planes fit into its cache


@dataclass(frozen=True, kw_only=True)
class PhotometricAugmentation:
    """Random flip, color jitter, grayscale, blur and solarization for one type of crop.

    The defaults are the augmentations of DINO (Caron et al. 2021, arXiv 2104.14294), which t-ReX
    uses. Results match Pillow and torchvision, but are computed in batches and on any device:

        augmentation = PhotometricAugmentation(blur=0.5, solarize=0.0)
        images = augmentation(images, np.random.default_rng(0))

    Args:
        flip: Probability of a horizontal flip.
        jitter: Probability of color jitter.
        brightness: Strength x of brightness jitter; factors are in [max(0, 1 - x), 1 + x].
        contrast: Strength of contrast jitter, with the same range of factors.
        saturation: Strength of saturation jitter, with the same range of factors.
        hue: Largest hue shift in either direction, as a fraction of the color circle.
        gray: Probability of grayscale.
        blur: Probability of Gaussian blur.
        sigma: Range of the blur's standard deviation, in pixels.
        solarize: Probability of solarization.
        threshold: Smallest level that solarization inverts.

    Raises:
        ValueError: A probability, strength or range is invalid.
    """

    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    gray: float = 0.2
    blur: float
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float
    threshold: int = 128

    def __post_init__(self) -> None:
        limits = {"hue": 0.5, "threshold": 256}
        limits |= dict.fromkeys(("flip", "jitter", "gray", "blur", "solarize"), 1)
        limits |= dict.fromkeys(("brightness", "contrast", "saturation"), math.inf)
        for name, high in limits.items():
            value = getattr(self, name)
            if not 0 <= value <= high or value == math.inf:
                raise ValueError(f"{name} must be finite and in [0, {high}], got {value}")
        if not 0 < self.sigma[0] <= self.sigma[1] < math.inf:
            raise ValueError(f"sigma must be a positive ascending range, got {self.sigma}")

    def __call__(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """Augment each image independently with random draws from ``rng``; see ``apply``."""
        return apply(images, self.parameters(rng.random((len(images), NUM_DRAWS))))

    def parameters(self, u: NDArray[np.float64]) -> Tensor:
        """Convert uniform draws in [0, 1), (N, NUM_DRAWS), to rows of parameters."""
        out = np.empty((len(u), NUM_PARAMETERS), np.float32)
        out[:, FLIP] = u[:, 0] < self.flip
        out[:, JITTER] = u[:, 1] < self.jitter
        out[:, ORDER] = u[:, 2:6].argsort(1)
        strengths = np.array([self.brightness, self.contrast, self.saturation])
        lowest = np.maximum(0, 1 - strengths)
        out[:, FACTORS] = lowest + (1 + strengths - lowest) * u[:, 6:9]
        out[:, HUE] = self.hue * (2 * u[:, 9] - 1)
        out[:, GRAY] = u[:, 10] < self.gray
        low, high = self.sigma
        out[:, SIGMA] = (low + (high - low) * u[:, 12]) * (u[:, 11] < self.blur)
        out[:, SOLARIZE] = u[:, 13] < self.solarize
        out[:, THRESHOLD] = self.threshold
        return torch.from_numpy(out)


GLOBAL_AUGMENTATION = PhotometricAugmentation(blur=0.2, solarize=0.2)
LOCAL_AUGMENTATION = PhotometricAugmentation(blur=0.5, solarize=0.0)


def apply(images: Tensor, parameters: Tensor, compiled: bool = False) -> Tensor:
    """Augment images, (B, 3, H, W) uint8, according to rows of parameters on the CPU.

    The order is flip, jitter, grayscale, blur, solarize. The memory format is kept. ``compiled``
    fuses the jitter's arithmetic with torch.compile, which avoids most memory traffic but takes
    half a minute to compile. On a CPU, the pixels are the same; on CUDA, a fused multiplication and
    addition may change them by one level.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        shape = tuple(images.shape)
        raise ValueError(f"images must be uint8 (B, 3, H, W), got {images.dtype} {shape}")
    channels_last = images.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty_like(images, memory_format=memory_format)
    count = len(images)
    if images.device.type == "cpu":
        count = max(1, _CPU_CHUNK // max(1, images[:1].numel()))
    for start in range(0, len(images), max(1, count)):
        part = slice(start, start + count)
        out[part] = _augment(images[part], parameters[part], compiled)
    return out


def normalize(
    images: Tensor,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Tensor:
    """Return (images / 255 - mean) / std as float32, computed in one multiply-add.

    Images are (B, 3, H, W) of any dtype; the result has the same memory format.
    """
    scale = 1 / (255 * torch.tensor(std, dtype=torch.float64))
    shift = -torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
    constants = torch.stack([scale, shift]).float()
    if images.device.type == "cpu" and images.is_contiguous(memory_format=torch.channels_last):
        # In rows of a common length: a CPU does not vectorize along three channels.
        rows = images.permute(0, 2, 3, 1).flatten(2).float()
        scale, shift = constants.repeat(1, images.shape[3])
        return torch.addcmul(shift, rows, scale).unflatten(2, (-1, 3)).permute(0, 3, 1, 2)
    scale, shift = _send(constants.view(2, 1, 3, 1, 1), images.device)
    return torch.addcmul(shift, images, scale)


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy from the CPU without waiting for the device, which requires pinned memory."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _augment(images: Tensor, parameters: Tensor, compiled: bool) -> Tensor:
    """Augment one chunk of images; the result's memory format may differ."""
    device = images.device
    # Sort the images by the position of hue in the jitter's order (4: no jitter). The images of
    # each position are then a slice, and so are all images with jitter.
    order = parameters[:, ORDER]
    positions = (order == _HUE).long().argmax(1).masked_fill(parameters[:, JITTER] == 0, 4)
    forward = positions.argsort(stable=True)
    parameters = parameters[forward]
    ends = positions.bincount(minlength=5).cumsum(0).tolist()
    masks = [parameters[:, column] > 0 for column in (FLIP, GRAY, SIGMA, SOLARIZE)]
    selected = [mask.nonzero()[:, 0] for mask in masks]
    indices = _send(torch.cat([forward, forward.argsort(), *selected]), device)
    forward, backward, flip, gray, blur, solar = indices.split(
        [len(images), len(images), *map(len, selected)]
    )

    levels = images.permute(1, 0, 2, 3).index_select(1, forward)
    if len(flip):
        levels.index_copy_(1, flip, levels.index_select(1, flip).flip(3))
    levels = levels.float()
    if ends[3]:
        _jitter(levels[:, : ends[3]], parameters[: ends[3]], ends, compiled)
    if len(gray):
        luma = _luma(levels.index_select(1, gray))
        levels.index_copy_(1, gray, luma.expand(3, -1, -1, -1))
    if len(blur):
        blurred = _blur(levels.index_select(1, blur), parameters[masks[2], SIGMA])
        levels.index_copy_(1, blur, blurred)
    if len(solar):
        threshold = _send(parameters[masks[3], THRESHOLD], device)[:, None, None]
        part = levels.index_select(1, solar)
        levels.index_copy_(1, solar, torch.where(part >= threshold, 255 - part, part))
    return levels.to(torch.uint8).index_select(1, backward).permute(1, 0, 2, 3)


def _jitter(levels: Tensor, parameters: Tensor, ends: list[int], compiled: bool) -> None:
    """Jitter the colors of (3, J, H, W) levels in place.

    Brightness, contrast and saturation, in each image's order, are three rounds of one operation, a
    blend with black, mean luma or luma. Hue is shifted before, between or after them, at one of
    four positions. Images are sorted by this position; ``ends`` are the ends of its slices.
    """
    order = parameters[:, ORDER]
    blends = order[order != _HUE].view(-1, 3).long()
    factors = parameters[:, FACTORS].gather(1, blends)
    # The PIL pipeline computes the shift in double precision and truncates it towards zero.
    shifts = (parameters[:, HUE].double() * 255).trunc().float()
    rows = torch.cat(
        [factors, (blends == _CONTRAST).float(), (blends == _SATURATION).float(), shifts[:, None]],
        dim=1,
    )
    columns = _send(rows.T.contiguous(), levels.device)[:, :, None, None]
    factor, contrast, saturation = columns[:9].view(3, 3, -1, 1, 1)
    start = 0
    for position in range(4):
        end = ends[position]
        if start < end:
            shift_hue = _kernel(_shift_hue, compiled and end - start > 1)
            shift_hue(levels[:, start:end], columns[9, start:end])
        start = end
        if position < 3:
            blend = _kernel(_blend, compiled and levels.shape[1] > 1)
            blend(levels, factor[position], contrast[position], saturation[position])


@cache
def _kernel(function: Callable[..., None], compiled: bool) -> Callable[..., None]:
    """Return a function or its compiled version, which must not be called with one image."""
    return torch.compile(function, dynamic=True) if compiled else function


def _blend(levels: Tensor, factor: Tensor, contrast: Tensor, saturation: Tensor) -> None:
    """Blend (3, n, H, W) levels in place with black, their mean luma or their luma.

    The others are (n, 1, 1). Contrast 1 selects mean luma, saturation 1 luma, both 0 black.
    """
    luma = _luma(levels)
    base = torch.addcmul(_mean(luma) * contrast, luma, saturation)
    levels.sub_(base).mul_(factor).add_(base).clamp_(0, 255).floor_()


def _luma(levels: Tensor) -> Tensor:
    """Return the luma of (3, n, H, W) levels, (n, H, W), in Pillow's 16-bit fixed point."""
    red, green, blue = levels
    luma = red * 19595  # all sums are below 2**24, so exact in float32
    luma.add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768)
    return luma.mul_(1 / 65536).floor_()


def _mean(luma: Tensor) -> Tensor:
    """Return the mean of (n, H, W) levels, rounded half up as in Pillow, (n, 1, 1)."""
    pixels = luma[0].numel()
    # Sums of rows are exact in float32, but not sums of images larger than 256 x 256.
    total = luma.sum(2, keepdim=True).long().sum(1, keepdim=True)
    return total.mul_(2).add_(pixels).div_(2 * pixels, rounding_mode="floor").float()


def _shift_hue(levels: Tensor, shift: Tensor) -> None:
    """Shift the hue of (3, n, H, W) levels in place by (n, 1, 1) steps of Pillow's grid.

    Quotients are truncated exactly here, but after rounding in Pillow. For integer quotients,
    Pillow's hue or saturation can be one step lower (0.3 % of a photograph's pixels).
    """
    red, green, blue = levels
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    saturation = (chroma * 255).div_(value.clamp(min=1)).floor_()
    drop = saturation.mul_(value).mul_(1 / 255)  # largest minus smallest channel

    # Hue in sextants from red, times chroma; a sextant is 42.5 steps of the grid.
    hue = torch.where(
        green == value, (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4)
    )
    hue = torch.where(red == value, green - blue, hue)
    hue = hue.mul_(42.5).div_(chroma.clamp_(min=1)).floor_()
    hue.add_(hue.clamp(-1, 0))  # RGB to HSV wraps at 255, the shift wraps at 256
    hue.add_(shift)
    hue.sub_((hue * (1 / 256)).floor_().mul_(256)).mul_(6 / 255)

    # Fraction of the drop for each channel, from the distance between its hue and the pixel's.
    torch.sub(hue, 3, out=red).abs_().neg_().add_(2)
    torch.sub(hue, 2, out=green).abs_().sub_(1)
    torch.sub(hue, 4, out=blue).abs_().sub_(1)
    levels.clamp_(0, 1).mul_(drop).neg_().add_(value).round_()


def _blur(levels: Tensor, sigma: Tensor) -> Tensor:
    """Blur (3, n, H, W) levels with standard deviations ``sigma``, (n,), on the CPU."""
    height, width = levels.shape[2:]
    # Autocast would use half precision.
    with torch.autocast(levels.device.type, enabled=False):
        rows = _blur_matrices(sigma, width, levels.device)
        columns = rows if height == width else _blur_matrices(sigma, height, levels.device)
        return (columns @ (levels @ rows.mT).round_()).round_()


def _blur_matrices(sigma: Tensor, size: int, device: torch.device) -> Tensor:
    """Return Pillow's GaussianBlur along one axis as matrices, (n, size, size).

    Edges are replicated. The blur is three passes of an extended box filter (Gwosdek et al. 2011),
    a box with fractional ends. Filters are short, so the CPU multiplies the passes for the smallest
    size with all types of rows, and the device repeats the rows. Weights are multiples of 1/1024
    and sum to 1, so they are exact in TF32, and sums are exact in float32 in any order.
    """
    variance = sigma.double().square() / 3
    radius = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    fraction = (2 * radius + 1) * (radius * (radius + 1) - 3 * variance)
    fraction /= 6 * (variance - (radius + 1).square())
    inner = 1 / (2 * (radius + fraction) + 1)
    outer = (1 - (2 * radius + 1) * inner) / 2

    reach = int(radius.max()) + 1
    lead = min(3 * reach, size - 1)
    small = min(6 * reach + 1, size)
    offsets = torch.arange(-reach, reach + 1)
    distance = offsets.abs() - radius[:, None]
    taps = inner[:, None] * (distance <= 0) + outer[:, None] * (distance == 1)
    position = torch.arange(small)
    source = (position + offsets[:, None]).clamp_(0, small - 1)
    box = torch.einsum("nt,tij->nij", taps, (source[:, :, None] == position).double())
    product = (box @ box @ box).mul_(1024).round_().div_(1024)
    product.diagonal(dim1=1, dim2=2).add_(1 - product.sum(2))
    table = F.pad(product.float(), (0, 1)).flatten(1)  # append a 0 to each row

    position = torch.arange(size, device=device)
    row = position.clamp(max=lead) + (position - (size - small + lead)).clamp_(min=0)
    column = position + (row - position)[:, None]
    column.masked_fill_((column < 0) | (column >= small), small)
    index = column.add_(row[:, None], alpha=small + 1)
    return _send(table, device).index_select(1, index.flatten()).view(-1, size, size)
