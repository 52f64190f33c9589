"""Configurations that the study compares, which differ only in the subject of a claim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.study.images import Images, Text

Field = str | int | float | tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One configuration of the method."""

    title: str
    """Title in tables and figures."""
    objective: str
    """Value of ``--objective.name``."""
    layers: int | None
    """Number of hidden layers of the projector; None for no projector."""
    local: bool = True
    """Use the scale's number of local crops; False for no local crops."""
    precision: str = "auto"

    def settings(self) -> dict[str, Field]:
        """Return the trainer's fields that define the configuration."""
        fields: dict[str, Field] = {"objective.name": self.objective, "precision": self.precision}
        if self.layers is None:
            fields["model.projector"] = "none"
        else:
            fields["model.hidden-layers"] = self.layers
        if not self.local:
            fields["crops.local-crops"] = 0
        return fields


CELLS = {
    "softmax-global": Cell(
        title="Softmax, no projector, no local crops", objective="softmax", layers=None, local=False
    ),
    "cosine-1-global": Cell(
        title="t-ReX-1, no local crops", objective="cosine", layers=1, local=False
    ),
    "cosine-3-global": Cell(
        title="t-ReX-3, no local crops", objective="cosine", layers=3, local=False
    ),
    "softmax": Cell(title="Softmax, no projector", objective="softmax", layers=None),
    "cosine-1": Cell(title="t-ReX-1", objective="cosine", layers=1),
    "cosine-3": Cell(title="t-ReX-3", objective="cosine", layers=3),
    "ocm-1": Cell(title="t-ReX* (OCM-1)", objective="ocm", layers=1),
    "ocm-3": Cell(title="t-ReX (OCM-3)", objective="ocm", layers=3),
    "look-1": Cell(title="LOOK, multi-crop", objective="look", layers=1),
    "ocm-1-fp16": Cell(title="t-ReX* in fp16", objective="ocm", layers=1, precision="fp16"),
    "ocm-1-fp32": Cell(title="t-ReX* in fp32", objective="ocm", layers=1, precision="fp32"),
}
"""Configurations by name. t-ReX-L and OCM-L are the paper's names for L hidden layers."""

_PRECISIONS = ("ocm-1-fp16", "ocm-1-fp32")


@dataclass(frozen=True, kw_only=True)
class Start:
    """A short training run whose backbone initializes other runs."""

    cell: str
    epochs: int
    rate: float
    """Peak learning rate per 256 images."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Size of the study: the settings that all of its configurations share."""

    images: Images
    epochs: int
    search_epochs: int
    """Number of epochs of a run in the search for a learning rate."""
    first_rate: float
    """First learning rate of the search, per 256 images."""
    start: Start | None = None
    """Run whose backbone initializes all runs of a seed; None for random weights."""
    cells: tuple[str, ...]
    """Names of the configurations."""
    workers: int
    """Number of loader workers of a run."""
    settings: Mapping[str, Field]
    """Fields of the trainer that override the recipe demo."""


_CELLS = tuple(name for name in CELLS if name not in ("softmax", *_PRECISIONS))

SCALES = {
    # Batches of 64, crops of 32 and 16 pixels, as in the demo; 3,600 steps.
    "cpu": Scale(
        images=Images(num_classes=24, per_class=16, size=64, variation=2.5),
        epochs=600,
        search_epochs=150,
        first_rate=0.4,
        start=Start(cell="cosine-1-global", epochs=60, rate=0.4),
        cells=_CELLS,
        workers=0,
        settings={
            # A narrower network than the demo's, which halves the time per step.
            "model.backbone-args": ("channels=(16, 32, 64, 128)", "stem_width=16"),
            "crops.local-crops": 2,
            # Smaller local crops show too little of a 64-pixel fractal.
            "crops.local-scale": ("0.15", "0.4"),
            # The paper's 0.999 averages over 0.2 % of its 500,000 steps; 0.9 is similar for ours.
            "objective.ema-momentum": 0.9,
            "objective.bank-size": 384,
            "objective.neighbors": 96,
            "optim.warmup-epochs": 20,
        },
    ),
    # Not yet run: ResNet-50 on a GPU, 15,600 steps of 256 images.
    "gpu": Scale(
        images=Images(num_classes=200, per_class=100, size=128, variation=2.5),
        epochs=200,
        search_epochs=40,
        first_rate=0.1,
        start=Start(cell="cosine-1-global", epochs=15, rate=0.1),
        cells=(*_CELLS, *_PRECISIONS),
        workers=8,
        settings={
            "model.backbone": "resnet50",
            "model.backbone-args": (),
            "model.hidden-dim": 2048,
            "model.embedding-dim": 256,
            "crops.global-size": 64,
            "crops.local-crops": 8,
            "crops.local-size": 32,
            "crops.local-scale": ("0.05", "0.4"),
            "objective.bank-size": 8192,
            "objective.neighbors": 256,
            "objective.ema-momentum": 0.97,
            "optim.batch-size": 256,
            "optim.warmup-epochs": 10,
        },
    ),
    # Not yet run. 11 minutes with one seed, if a GPU trains on 6,000 images/s: 128 s for 4 runs of
    # 192,000 images, 58 s for 12 searches of 28,800, 300 s for starting and evaluating the searches
    # (25 s each), 200 s for the runs (50 s each).
    "gpu15": Scale(
        images=Text(num_classes=96, per_class=100, size=64),
        epochs=20,
        search_epochs=3,
        first_rate=0.4,
        cells=("softmax", "cosine-1", "cosine-3", "ocm-3"),
        workers=8,
        settings={
            "model.backbone": "resnet18",
            "model.backbone-args": (),
            "model.hidden-dim": 1024,
            "model.embedding-dim": 128,
            "crops.global-size": 64,
            "crops.local-size": 32,
            "crops.local-scale": ("0.15", "0.4"),
            # Mirrored letters do not occur.
            "crops.global-augmentation.flip": 0.0,
            "crops.local-augmentation.flip": 0.0,
            "objective.bank-size": 8192,
            "optim.batch-size": 128,
            "optim.warmup-epochs": 2,
        },
    ),
}
"""Scales by name."""
SEARCH_SEED = 1000
