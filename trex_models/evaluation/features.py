"""Features of a source's images, as arrays.

Shapes: N images, F features, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from trex_models.data.loading import load_batches
from trex_models.data.sources import Source


class TransformedSource:
    """A source's images through a transform of PIL images, such as timm's.

    Args:
        source: Labelled images.
        transform: Maps a PIL image to a tensor, (3, S, S).
    """

    def __init__(self, source: Source, transform: Callable[[Image.Image], Tensor]) -> None:
        self.source = source
        self.transform = transform

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """Return transformed images, (B, 3, S, S); ValueError names one that cannot be read."""
        return torch.stack(
            [self.transform(Image.fromarray(self.source.read(index))) for index in indices]
        )


def image_batches(
    source: Source,
    transform: Callable[[Image.Image], Tensor],
    batch_size: int = 256,
    workers: int = 0,
) -> Iterator[Tensor]:
    """Yield transformed images in the source's order, (<= batch_size, 3, S, S).

    Raises:
        ValueError: An image cannot be read; the message names it.
    """
    images = range(len(source))
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    return load_batches(TransformedSource(source, transform), batches, workers)


@torch.inference_mode()
def extract_features(
    model: nn.Module,
    source: Source,
    transform: Callable[[Image.Image], Tensor],
    batch_size: int = 256,
    workers: int = 0,
) -> np.ndarray:
    """Run a model over a source, in eval mode on the device that it is on.

    Args:
        model: Maps (B, 3, S, S) to (B, F); its mode is restored afterwards.
        source: Labelled images.
        transform: Maps a PIL image to a tensor, (3, S, S).
        batch_size: Images at a time.
        workers: Loader processes.

    Returns:
        (N, F) float32.

    Raises:
        ValueError: An image cannot be read.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    batches = image_batches(source, transform, batch_size, workers)
    features = [model(images.to(device)).float().cpu().numpy() for images in batches]
    model.train(was_training)
    return np.concatenate(features)


def pixel_features(source: Source, size: int) -> np.ndarray:
    """Return images resized to (size, size) and flattened, in [0, 1]: (N, 3 * size * size)."""
    shape = (size, size)
    rows = [
        np.asarray(Image.fromarray(source.read(i)).resize(shape, Image.Resampling.BICUBIC)).ravel()
        for i in range(len(source))
    ]
    return np.stack(rows).astype(np.float32) / 255
