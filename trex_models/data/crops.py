"""The crop law, for worker processes: a random box of an image, resized to a square.

Boxes follow torchvision's RandomResizedCrop. Resizing is antialiased bicubic by torch's uint8
kernel, which reads the box as a view of the decoded image, channels last, without a copy.

Shapes: H, W height and width of the image; S the size of the crop.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Box = tuple[int, int, int, int]

_ATTEMPTS = 10


def draw_boxes(
    rng: np.random.Generator,
    count: int,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> NDArray[np.int64]:
    """Draw boxes with the distribution of torchvision's `RandomResizedCrop.get_params`.

    The number of draws from `rng` does not depend on their outcome.

    Args:
        rng: source of the draws.
        count: how many boxes.
        height: H.
        width: W.
        scale: least and greatest share of the image's area.
        ratio: least and greatest width / height of a box; log-uniform between them.

    Returns:
        Top, left, height and width of each box, (count, 4). Where ten boxes in a row do not fit
        into the image, the largest central box of an allowed ratio.

    Raises:
        ValueError: if the image is empty, or a range is not positive and ascending.
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image of {height} x {width} pixels has no boxes")
    for name, (low, high) in (("scale", scale), ("ratio", ratio)):
        if not 0 < low <= high < math.inf:
            raise ValueError(f"{name} must be positive and ascending, not {(low, high)}")
    draws = rng.random((4, count, _ATTEMPTS)).tolist()
    boxes = [
        _first_box(attempts, height, width, scale, ratio) for attempts in zip(*draws, strict=True)
    ]
    return np.array(boxes, np.int64).reshape(count, 4)


def _first_box(
    attempts: Sequence[Sequence[float]],
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """Return the first box that fits into the image, or else the largest central one.

    Plain floats: arrays of so few numbers would take ten times as long.

    Args:
        attempts: Numbers in [0, 1) for area, ratio, top and left, each for every attempt.
        height: H.
        width: W.
        scale: Least and greatest share of the image's area.
        ratio: Least and greatest width / height.
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for size, shape, down, right in zip(*attempts, strict=True):
        # By logarithms: sides are sqrt(area / aspect) and sqrt(area * aspect).
        area = math.log(height * width * (scale[0] + (scale[1] - scale[0]) * size))
        aspect = log_low + (log_high - log_low) * shape
        box_height = round(math.exp((area - aspect) / 2))
        box_width = round(math.exp((area + aspect) / 2))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(down * (height - box_height + 1))
            return top, int(right * (width - box_width + 1)), box_height, box_width
    return _largest_box(height, width, ratio)


def _largest_box(height: int, width: int, ratio: tuple[float, float]) -> Box:
    """Return the largest central box of an allowed ratio."""
    box_height, box_width = height, width
    if width / height < ratio[0]:
        box_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        box_width = round(height * ratio[1])
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def cut(image: NDArray[np.uint8], box: Box, size: int, out: Tensor) -> None:
    """Resize a box of an image into `out`, seeing no pixel outside of the box.

    Args:
        image: (H, W, 3). A writeable array is read in place; of any other the box is copied, since
            torch accepts no read-only memory.
        box: top, left, height and width.
        size: S.
        out: (S, S, 3) uint8 on the CPU, contiguous: one row of a batch, written in place.

    Raises:
        ValueError: if `image` is not uint8 (H, W, 3), the box does not lie in it, or `out` does not
            match.
    """
    top, left, height, width = box
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image must be uint8 (H, W, 3), not {image.dtype} {image.shape}")
    if min(top, left, height - 1, width - 1) < 0 or (
        top + height > image.shape[0] or left + width > image.shape[1]
    ):
        raise ValueError(f"box {box} does not lie in an image of {image.shape[:2]}")
    if out.shape != (size, size, 3) or out.dtype != torch.uint8 or not out.is_contiguous():
        raise ValueError(f"out must be contiguous uint8 {(size, size, 3)}, not {tuple(out.shape)}")
    if not image.flags.writeable:
        image, top, left = image[top : top + height, left : left + width].copy(), 0, 0
    # The batch axis goes on before the box is cut: only strides that still read as channels last
    # give the fast kernel and the matching output (half the time).
    patch = torch.from_numpy(image)[None, top : top + height, left : left + width]
    out[None].permute(0, 3, 1, 2).copy_(resize(patch.permute(0, 3, 1, 2), size, size, "bicubic"))


def resize(images: Tensor, height: int, width: int, mode: str) -> Tensor:
    """Resize uint8 images, antialiased.

    Levels are rounded after each axis, so that their order shows (0.2 levels on average). Rows go
    first where Pillow 13 takes them first, for speed: where the height loses more than twice as
    many pixels as the width. (Earlier Pillows never did.)

    Args:
        images: (B, 3, H, W) uint8 on the CPU; fastest in channels_last format.
        height: of the result, pixels.
        width: likewise.
        mode: "bilinear" or "bicubic".

    Returns:
        (B, 3, height, width) uint8.
    """
    lost = images.shape[2] - height
    if lost > max(0, 2 * (images.shape[3] - width)):
        images = F.interpolate(images, (height, images.shape[3]), mode=mode, antialias=True)
    return F.interpolate(images, (height, width), mode=mode, antialias=True)
