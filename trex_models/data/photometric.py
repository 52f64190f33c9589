"""Flip, color jitter, grayscale, Gaussian blur and solarization of whole batches on any device.

The pixels follow Pillow's integer arithmetic, so that a model sees what the usual PIL pipeline
shows it: every blend is floored, hue turns on an 8-bit HSV grid, luma is ITU-R 601-2 in 16-bit
fixed point, and the blur is PIL.ImageFilter.GaussianBlur's three box passes (as one matrix product
per axis; PIL rounds after each of its passes, hence single levels of difference). The draws have
the distributions of torchvision's ColorJitter and RandomApply.

Randomness is drawn on the CPU, one row of parameters per image, next to the image's crop. `apply`
derives from the rows, on the CPU too, which images each operation touches; nothing is read back
from the device, so nothing waits for it. All sums are exact in float32, also where matrix products
run in TF32: an image comes out the same on every device and in every batch.

Shapes: B batch, H and W height and width, J images with jitter, n images that an operation touches.
Inside, images are planes (3, B, H, W) of float32 levels.
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

# Columns of a row of parameters; one of zeros leaves its image as it is.
FLIP = 0  # 1 to mirror left and right
JITTER = 1  # 1 to jitter the colors
ORDER = slice(2, 6)  # of the jitter's parts: 0 brightness, 1 contrast, 2 saturation, 3 hue
FACTORS = slice(6, 9)  # of brightness, contrast, saturation; 1 changes nothing
HUE = 9  # shift in turns, in [-0.5, 0.5]
GRAY = 10  # 1 to remove the colors
SIGMA = 11  # of the blur, in pixels; 0 for none
SOLARIZE = 12  # 1 to invert the levels from THRESHOLD on
THRESHOLD = 13  # a level
NUM_PARAMETERS = 14

NUM_DRAWS = 14  # that a row is made of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_CONTRAST, _SATURATION, _HUE = 1, 2, 3  # codes of ORDER
_CPU_CHUNK = 1 << 19  # levels at a time on a CPU: float32 planes that stay in its cache


@dataclass(frozen=True, kw_only=True)
class PhotometricAugmentation:
    """Random flip, color jitter, grayscale, blur and solarization of one kind of crop.

    The augmentations of DINO (Caron et al. 2021, arXiv 2104.14294) by default, which t-ReX takes
    over, as Pillow and torchvision compute them; but whole batches at once, on any device:

        augmentation = PhotometricAugmentation(blur=0.5, solarize=0.0)
        images = augmentation(images, np.random.default_rng(0))

    Args:
        flip: Probability of a left-right flip.
        jitter: Probability of color jitter.
        brightness: x of the factor's range [max(0, 1 - x), 1 + x].
        contrast: x of the factor's range.
        saturation: x of the factor's range.
        hue: x of the shift's range [-x, x], in turns.
        gray: Probability of grayscale.
        blur: Probability of Gaussian blur.
        sigma: Range of the blur's standard deviation, in pixels.
        solarize: Probability of solarization.
        threshold: Least level that solarization inverts.

    Raises:
        ValueError: A probability, strength or range is impossible.
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
        for name, most in limits.items():
            if not 0 <= getattr(self, name) <= most or getattr(self, name) == math.inf:
                raise ValueError(f"{name} must lie in [0, {most}], not {getattr(self, name)}")
        if not 0 < self.sigma[0] <= self.sigma[1] < math.inf:
            raise ValueError(f"sigma must be a positive ascending range, not {self.sigma}")

    def __call__(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """Augment each image in its own way, with draws from ``rng``; see ``apply``."""
        return apply(images, self.parameters(rng.random((len(images), NUM_DRAWS))))

    def parameters(self, u: NDArray[np.float64]) -> Tensor:
        """Return rows of parameters for uniform draws in [0, 1), (N, NUM_DRAWS)."""
        out = np.empty((len(u), NUM_PARAMETERS), np.float32)
        out[:, FLIP] = u[:, 0] < self.flip
        out[:, JITTER] = u[:, 1] < self.jitter
        out[:, ORDER] = u[:, 2:6].argsort(1)
        strengths = np.array([self.brightness, self.contrast, self.saturation])
        low = np.maximum(0, 1 - strengths)
        out[:, FACTORS] = low + (1 + strengths - low) * u[:, 6:9]
        out[:, HUE] = self.hue * (2 * u[:, 9] - 1)
        out[:, GRAY] = u[:, 10] < self.gray
        least, most = self.sigma
        out[:, SIGMA] = (least + (most - least) * u[:, 12]) * (u[:, 11] < self.blur)
        out[:, SOLARIZE] = u[:, 13] < self.solarize
        out[:, THRESHOLD] = self.threshold
        return torch.from_numpy(out)


GLOBAL_AUGMENTATION = PhotometricAugmentation(blur=0.2, solarize=0.2)
LOCAL_AUGMENTATION = PhotometricAugmentation(blur=0.5, solarize=0.0)


def apply(images: Tensor, parameters: Tensor, compiled: bool = False) -> Tensor:
    """Augment each image, (3, H, W) uint8, by its row of parameters, which is on the CPU.

    In this order: flip, jitter, grayscale, blur, solarize. The memory format stays. ``compiled``
    fuses the jitter's arithmetic by torch.compile: far less memory traffic, after half a minute's
    start. The pixels are the same on a CPU; CUDA's compiler may join a product and a sum, which can
    be a level off.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        shape = tuple(images.shape)
        raise ValueError(f"images must be uint8 (B, 3, H, W), not {images.dtype} {shape}")
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
    """Return (images / 255 - mean) / std as float32, in one multiply-add.

    Images are levels of any type, (B, 3, H, W); the result is channels last if they are.
    """
    scale = 1 / (255 * torch.tensor(std, dtype=torch.float64))
    shift = -torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
    constants = _send(torch.stack([scale, shift]).float().view(2, 1, 3, 1, 1), images.device)
    return torch.addcmul(constants[1], images, constants[0])


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy from the CPU without waiting for the device (only pinned memory allows it)."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _augment(images: Tensor, parameters: Tensor, compiled: bool) -> Tensor:
    """`apply` on one chunk; the memory format of the result is any."""
    device = images.device
    # Images are in the order of their hue's place among the jitter's parts: each place is then a
    # slice, and so are all images with jitter (place 4: none).
    order = parameters[:, ORDER]
    places = (order == _HUE).long().argmax(1).masked_fill(parameters[:, JITTER] == 0, 4)
    forward = places.argsort(stable=True)
    parameters = parameters[forward]
    ends = places.bincount(minlength=5).cumsum(0).tolist()
    masks = [parameters[:, column] > 0 for column in (FLIP, GRAY, SIGMA, SOLARIZE)]
    chosen = [mask.nonzero()[:, 0] for mask in masks]
    indices = _send(torch.cat([forward, forward.argsort(), *chosen]), device)
    forward, backward, flip, gray, blur, solar = indices.split(
        [len(images), len(images), *map(len, chosen)]
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

    Each image meets brightness, contrast and saturation in three rounds and hue at one of the four
    places around them. The three are one operation, a blend with black, mean luma or luma. Images
    are sorted by the place of hue; ``ends`` are the ends of the places.
    """
    order = parameters[:, ORDER]
    blends = order[order != _HUE].view(-1, 3).long()
    factors = parameters[:, FACTORS].gather(1, blends)
    # Pillow's pipeline computes in double and truncates towards zero.
    shifts = (parameters[:, HUE].double() * 255).trunc().float()
    rows = torch.cat(
        [factors, (blends == _CONTRAST).float(), (blends == _SATURATION).float(), shifts[:, None]],
        dim=1,
    )
    columns = _send(rows.T.contiguous(), levels.device)[:, :, None, None]
    factor, contrast, saturation = columns[:9].view(3, 3, -1, 1, 1)
    start = 0
    for place in range(4):
        end = ends[place]
        if start < end:
            shift_hue = _kernel(_shift_hue, compiled and end - start > 1)
            shift_hue(levels[:, start:end], columns[9, start:end])
        start = end
        if place < 3:
            blend = _kernel(_blend, compiled and levels.shape[1] > 1)
            blend(levels, factor[place], contrast[place], saturation[place])


@cache
def _kernel(function: Callable[..., None], compiled: bool) -> Callable[..., None]:
    """Return a function, or its compiled form, which takes any number of images but one."""
    return torch.compile(function, dynamic=True) if compiled else function


def _blend(levels: Tensor, factor: Tensor, contrast: Tensor, saturation: Tensor) -> None:
    """Blend (3, n, H, W) levels in place: with black, their mean luma or their luma.

    All others are (n, 1, 1): factor 1 changes nothing; contrast 1 takes the mean luma, saturation 1
    the luma.
    """
    luma = _luma(levels)
    base = torch.addcmul(_mean(luma) * contrast, luma, saturation)
    levels.sub_(base).mul_(factor).add_(base).clamp_(0, 255).floor_()


def _luma(levels: Tensor) -> Tensor:
    """Return Pillow's L of (3, n, H, W) levels, (n, H, W): 16-bit fixed point, exact in float32."""
    red, green, blue = levels
    luma = red * 19595
    luma.add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768)
    return luma.mul_(1 / 65536).floor_()


def _mean(luma: Tensor) -> Tensor:
    """Return the mean of (n, H, W) levels, rounded half up as Pillow's contrast does, (n, 1, 1)."""
    pixels = luma[0].numel()
    # Sums along a row are exact in float32, those of an image above 256 x 256 are not.
    total = luma.sum(2, keepdim=True).long().sum(1, keepdim=True)
    return total.mul_(2).add_(pixels).div_(2 * pixels, rounding_mode="floor").float()


def _shift_hue(levels: Tensor, shift: Tensor) -> None:
    """Turn the hue of (3, n, H, W) levels in place by (n, 1, 1) steps of Pillow's 8-bit grid.

    Quotients are truncated exactly here, after rounding in Pillow: where they are whole, Pillow's
    hue or saturation can be a step lower (0.3 % of a photograph's pixels).
    """
    red, green, blue = levels
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    saturation = (chroma * 255).div_(value.clamp(min=1)).floor_()
    drop = saturation.mul_(value).mul_(1 / 255)  # from the greatest to the least channel

    # Sextants from red, times chroma; 42.5 grid steps make a sextant.
    hue = torch.where(
        green == value,
        (blue - red).add_(chroma, alpha=2),
        (red - green).add_(chroma, alpha=4),
    )
    hue = torch.where(red == value, green - blue, hue)
    hue = hue.mul_(42.5).div_(chroma.clamp_(min=1)).floor_()
    hue.add_(hue.clamp(-1, 0))  # RGB to HSV wraps at 255, the shift at 256
    hue.add_(shift)
    hue.sub_((hue * (1 / 256)).floor_().mul_(256)).mul_(6 / 255)

    # How much of the drop each channel takes, by the hue's distance from the channel's own.
    torch.sub(hue, 3, out=red).abs_().neg_().add_(2)
    torch.sub(hue, 2, out=green).abs_().sub_(1)
    torch.sub(hue, 4, out=blue).abs_().sub_(1)
    levels.clamp_(0, 1).mul_(drop).neg_().add_(value).round_()


def _blur(levels: Tensor, sigma: Tensor) -> Tensor:
    """Blur (3, n, H, W) levels by (n,) standard deviations, these on the CPU."""
    height, width = levels.shape[2:]
    # Autocast would compute, and round, in half precision.
    with torch.autocast(levels.device.type, enabled=False):
        rows = _blur_matrices(sigma, width, levels.device)
        columns = rows if height == width else _blur_matrices(sigma, height, levels.device)
        return (columns @ (levels @ rows.mT).round_()).round_()


def _blur_matrices(sigma: Tensor, size: int, device: torch.device) -> Tensor:
    """Return the matrices of PIL's GaussianBlur along one axis, edges replicated, (n, size, size).

    Three passes of an extended box filter (Gwosdek et al. 2011): a box with fractional ends. Their
    reach is short, so the product of the passes is made on the CPU for the least size that has all
    edges, and its rows repeated on the device. Weights are multiples of 1/1024 and sum to 1: exact
    in TF32, and in float32 whatever the order of summation.
    """
    variance = sigma.double().square() / 3
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    fraction /= 6 * (variance - (whole + 1).square())
    inner = 1 / (2 * (whole + fraction) + 1)
    outer = (1 - (2 * whole + 1) * inner) / 2

    reach = int(whole.max()) + 1
    lead = min(3 * reach, size - 1)
    least = min(6 * reach + 1, size)
    offsets = torch.arange(-reach, reach + 1)
    distance = offsets.abs() - whole[:, None]
    taps = inner[:, None] * (distance <= 0) + outer[:, None] * (distance == 1)
    position = torch.arange(least)
    source = (position + offsets[:, None]).clamp_(0, least - 1)
    box = torch.einsum("nt,tij->nij", taps, (source[:, :, None] == position).double())
    product = (box @ box @ box).mul_(1024).round_().div_(1024)
    product.diagonal(dim1=1, dim2=2).add_(1 - product.sum(2))
    table = F.pad(product.float(), (0, 1)).flatten(1)  # a 0 behind each row

    position = torch.arange(size, device=device)
    row = position.clamp(max=lead) + (position - (size - least + lead)).clamp_(min=0)
    column = position + (row - position)[:, None]
    column.masked_fill_((column < 0) | (column >= least), least)
    index = column.add_(row[:, None], alpha=least + 1)
    return _send(table, device).index_select(1, index.flatten()).view(-1, size, size)
