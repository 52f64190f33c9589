"""Compare the speed of feature extraction with the usual pipeline.

    OMP_WAIT_POLICY=passive python -m benchmarks.features

Both read the same JPEG files (500 x 375, about 100 KB). The reference consists of Pillow, timm's
evaluation transform, DataLoader and a loop that waits for each batch's features. Ours is
`extract_features`. `core`: images per second of CPU time for the work of a loader worker, in one
process with one thread, by protocol. `whole`: images per second of wall time from files to an
array, including the start of the workers, for a single convolution of patches (negligible cost) and
for a ResNet-50, and the distance between the two features (random weights). Takes five minutes on
two cores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm
import torch
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from benchmarks import measure
from benchmarks.loader import one_thread
from benchmarks.photographs import NUM_CLASSES, write_photographs
from trex_models.data.center_crop import PROTOCOLS, CenterCrop, CenterCropDataset
from trex_models.data.image_files import FolderSource
from trex_models.evaluation.extract import extract_features

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "small": lambda: nn.Sequential(
        nn.Conv2d(3, 64, 16, stride=16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ),
    "resnet50": partial(timm.create_model, "resnet50", num_classes=0),
}


def reference_transform(crop: CenterCrop, normalize: bool = True) -> Callable[[Any], Tensor]:
    """Return timm's evaluation transform, which maps PIL images to tensors, (3, H, W)."""
    transform: Callable[[Any], Tensor] = create_transform(
        (3, *crop.size),
        interpolation=crop.interpolation,
        crop_pct=crop.crop_pct,
        crop_mode=crop.crop_mode,
        mean=crop.mean,
        std=crop.std,
        normalize=normalize,
    )
    return transform


def core(root: Path, protocol: str, images: int, rounds: int) -> dict[str, Any]:
    """Time a loader worker's work for a batch, in this process."""
    crop = PROTOCOLS[protocol]
    ours, reference = (
        CenterCropDataset(FolderSource(root), crop),
        ImageFolder(str(root), reference_transform(crop)),
    )

    def timed(work: Callable[[], object]) -> Callable[[], float]:
        return lambda: images / measure.cpu_seconds(work)

    with one_thread():
        return measure.compared(
            timed(lambda: ours.__getitems__(range(images))),
            timed(lambda: torch.stack([reference[index][0] for index in range(images)])),
            rounds,
        )


@torch.inference_mode()
def reference_features(
    model: nn.Module, root: Path, batch: int, workers: int, device: torch.device
) -> np.ndarray:
    """Extract the features of all files with the usual loop, (images, F)."""
    files = ImageFolder(str(root), reference_transform(PROTOCOLS["transfer"]))
    pin = device.type == "cuda"
    loader: DataLoader[Any] = DataLoader(files, batch, num_workers=workers, pin_memory=pin)
    rows: list[Tensor] = [model(pixels.to(device)).cpu() for pixels, _ in loader]
    return torch.cat(rows).numpy()


def whole(
    root: Path, network: str, batch: int, workers: int, rounds: int, device: torch.device
) -> dict[str, Any]:
    """Time the complete extraction, from files to an array."""
    torch.manual_seed(0)
    model = NETWORKS[network]().to(device).eval()
    source = FolderSource(root)
    features: dict[str, np.ndarray] = {}

    def ours() -> None:
        features["ours"] = extract_features(model, source, PROTOCOLS["transfer"], batch, workers)

    def reference() -> None:
        features["reference"] = reference_features(model, root, batch, workers, device)

    def timed(work: Callable[[], None]) -> Callable[[], float]:
        return lambda: len(source) / measure.seconds(work)

    compared = measure.compared(timed(ours), timed(reference), rounds)
    distances = np.linalg.norm(features["ours"] - features["reference"], axis=1)
    distances /= np.linalg.norm(features["reference"], axis=1)
    distance = float(f"{distances.max():.2g}")
    sizes = {"images": len(source), "batch": batch, "workers": workers}
    return {**sizes, "compared": compared, "relative_distance": distance}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = measure.parser("features", __doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=256, help="images for the small network")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="used in `whole`"
    )
    parsed = parser.parse_args(arguments)
    device = torch.device(parsed.device)
    images = dict.fromkeys(NETWORKS, parsed.images)
    if device.type == "cpu":
        images["resnet50"] = max(NUM_CLASSES, parsed.images // 8)  # 5 images per second
    with TemporaryDirectory() as folder:
        for count in set(images.values()):
            write_photographs(Path(folder) / str(count), count, "standard")
        root = Path(folder) / str(parsed.images)
        cores = {
            name: core(root, name, min(64, parsed.images), parsed.rounds) for name in PROTOCOLS
        }
        wholes = {
            name: whole(
                Path(folder) / str(images[name]),
                name,
                parsed.batch,
                parsed.workers,
                parsed.rounds,
                device,
            )
            for name in parsed.networks
        }
    result = {
        "machine": measure.machine(parsed.device),
        "ratio": cores["transfer"]["ratio"]["median"],
        "ratio_whole": list(wholes.values())[-1]["compared"]["ratio"]["median"],
        "core": cores,
        "whole": wholes,
    }
    for name, found in cores.items():
        measure.print_compared(f"one core, images per second of CPU time, protocol {name}", found)
    for name, found in wholes.items():
        title = f"complete extraction, images per second, {name}"
        measure.print_compared(title, found["compared"])
    print(f"{result['machine']}")
    measure.record(parsed.out, result)


if __name__ == "__main__":
    main()
