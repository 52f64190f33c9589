"""Features of a source's images, as arrays.

Shapes: N images, F features, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from trex_models.data.sources import Source


class TransformedSource(Dataset[Tensor]):
    """A source's images through a transform of PIL images, such as timm's.

    Args:
        source: Labelled images.
        transform: Maps a PIL image to a tensor, (3, S, S).
    """

    def __init__(self, source: Source, transform: Callable[[Image.Image], Tensor]) -> None:
        self.source = source
        self.transform = transform

    def __len__(self) -> int:
        """Return N."""
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        """Return one transformed image, (3, S, S)."""
        return self.transform(Image.fromarray(self.source.read(index)))


def image_batches(
    source: Source,
    transform: Callable[[Image.Image], Tensor],
    batch_size: int = 256,
    workers: int = 0,
) -> DataLoader[Tensor]:
    """Return a loader of transformed images in the source's order, (<= batch_size, 3, S, S)."""
    dataset = TransformedSource(source, transform)
    return DataLoader(dataset, batch_size=batch_size, num_workers=workers)


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
