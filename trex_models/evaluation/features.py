"""Features of a source's images, as arrays.

Workers decode, resize and cut; uint8 crops travel to the model's device and are normalised there.
The host waits for no batch: it takes the features of one while the device computes the next.

Shapes: N images, F features, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from trex_models.data.centre_crops import CentreCrop, CentreCropDataset
from trex_models.data.loading import load_batches, to_device
from trex_models.data.sources import Source

Transform = CentreCrop | Callable[[Image.Image], Tensor]
Skipped = Callable[[Mapping[int, str]], object]
"""Is given what is wrong with images that are left out, by index."""


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


def preprocessing(model: nn.Module) -> CentreCrop:
    """Return the preprocessing that a timm model asks for.

    Args:
        model: Of ``timm.create_model``.

    Raises:
        ValueError: The model does not say (it has no ``pretrained_cfg``), or asks for what
            ``CentreCrop`` cannot do.
    """
    if not getattr(model, "pretrained_cfg", None):
        raise ValueError(
            f"{type(model).__name__} has no pretrained_cfg that says how its images are prepared; "
            "pass a transform, such as PROTOCOLS['transfer'] of trex_models.data.centre_crops"
        )
    return CentreCrop.from_data_config(resolve_model_data_config(model))


def image_batches(
    source: Source,
    transform: Transform,
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device | None = None,
    indices: Sequence[int] | None = None,
    skipped: Skipped | None = None,
) -> Iterator[Tensor]:
    """Yield transformed images in order, (<= batch_size, 3, S, S).

    Args:
        source: Labelled images.
        transform: A centre crop, the fast way; or maps a PIL image to a tensor, (3, S, S).
        batch_size: Images at a time.
        workers: Loader processes.
        device: Where the images are to be; None for the CPU.
        indices: Which images; None for all of the source, in its order.
        skipped: Told of images that cannot be read and are left out, of a centre crop's; None:
            they are errors.

    Raises:
        ValueError: An image cannot be read; the message names it.
    """
    images = range(len(source)) if indices is None else indices
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    device = device or torch.device("cpu")
    pin = device.type == "cuda"
    if isinstance(transform, CentreCrop):
        dataset = CentreCropDataset(source, transform, skip=skipped is not None)
        for batch in load_batches(dataset, batches, workers, pin):
            if skipped is not None and batch.unreadable:
                skipped(batch.unreadable)
            if not len(batch.images):
                continue
            [crops] = to_device([batch.images], device)
            yield transform.normalize(crops)
    else:
        for batch in load_batches(TransformedSource(source, transform), batches, workers, pin):
            [pixels] = to_device([batch], device)
            yield pixels.contiguous(memory_format=torch.channels_last)


def extract_features(
    model: nn.Module,
    source: Source,
    transform: Transform | None = None,
    batch_size: int = 256,
    workers: int = 0,
    autocast: torch.dtype | None = None,
) -> np.ndarray:
    """Run a model over a source, in eval mode on the device that it is on.

        features = extract_features(timm.create_model("trex_resnet50", pretrained=True), source)

    Args:
        model: Any module that maps (B, 3, S, S), in channels_last format, to (B, F).
        source: Labelled images.
        transform: A centre crop, the fast way; or maps a PIL image to a tensor, (3, S, S). None
            for the centre crop that the model itself asks for.
        batch_size: Images at a time.
        workers: Loader processes.
        autocast: What the device may compute in.

    Returns:
        (N, F) float32.

    Raises:
        ValueError: An image cannot be read, there is none, or ``transform`` is None and the model
            does not say what it needs.
    """
    if not len(source):
        raise ValueError("there are no images to extract features of")
    transform = transform or preprocessing(model)
    features, done = np.empty((0, 0), np.float32), 0
    for rows in feature_batches(model, source, transform, batch_size, workers, autocast):
        if not done:
            features = np.empty((len(source), *rows.shape[1:]), np.float32)
        features[done : done + len(rows)] = rows
        done += len(rows)
    return features


@torch.inference_mode()
def feature_batches(
    model: nn.Module,
    source: Source,
    transform: Transform,
    batch_size: int = 256,
    workers: int = 0,
    autocast: torch.dtype | None = None,
    indices: Sequence[int] | None = None,
    skipped: Skipped | None = None,
) -> Iterator[np.ndarray]:
    """Yield features of images in order, (<= batch_size, F) float32, or what the model gives.

    Args:
        model: Maps (B, 3, S, S), in channels_last format, to (B, F); run in eval mode on the
            device that it is on. The modes of all its modules are restored at the end.
        source: Labelled images.
        transform: A centre crop, the fast way; or maps a PIL image to a tensor, (3, S, S).
        batch_size: Images at a time.
        workers: Loader processes.
        autocast: What the device may compute in, such as torch.bfloat16; None for the model's own
            type.
        indices: Which images; None for all of the source, in its order.
        skipped: Told of images that cannot be read and are left out, of a centre crop's; None:
            they are errors.

    Raises:
        ValueError: An image cannot be read; the message names it.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def outputs() -> Iterator[Tensor]:
        images = image_batches(source, transform, batch_size, workers, device, indices, skipped)
        for batch in images:
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                output = model(batch)
            yield output.float()

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield from _arrays(outputs())
    finally:
        for module, training in modes:
            module.training = training


def _arrays(outputs: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Yield tensors as arrays, each one after the next has been asked of the device."""
    waiting: list[tuple[Tensor, torch.cuda.Event | None]] = []
    for output in outputs:
        copied = None
        copy = output.to("cpu", non_blocking=output.is_cuda)  # into page-locked memory
        if output.is_cuda:
            copied = torch.cuda.current_stream(output.device).record_event()
        waiting.append((copy, copied))
        if len(waiting) > 1:
            yield _array(*waiting.pop(0))
    for last in waiting:
        yield _array(*last)


def _array(copy: Tensor, copied: torch.cuda.Event | None) -> np.ndarray:
    if copied is not None:
        copied.synchronize()
    return copy.numpy()
