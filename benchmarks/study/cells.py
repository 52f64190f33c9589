"""What the study trains: one cell a side of a claim, all alike but for what the claim is about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.study.images import Images

Field = str | int | float | tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One variant of the method."""

    title: str
    """What tables and figures call it."""
    objective: str
    """As ``--objective.name``."""
    layers: int | None
    """Hidden layers of the projector; None: there is no projector."""
    local: bool = True
    """Whether there are local crops, as many as the scale has."""
    precision: str = "auto"

    def settings(self) -> dict[str, Field]:
        """Return the fields that the cell is about."""
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
    "cosine-1": Cell(title="t-ReX-1", objective="cosine", layers=1),
    "cosine-3": Cell(title="t-ReX-3", objective="cosine", layers=3),
    "ocm-1": Cell(title="t-ReX* (OCM-1)", objective="ocm", layers=1),
    "ocm-3": Cell(title="t-ReX (OCM-3)", objective="ocm", layers=3),
    "look-1": Cell(title="LOOK, multi-crop", objective="look", layers=1),
    "ocm-1-fp16": Cell(title="t-ReX* in fp16", objective="ocm", layers=1, precision="fp16"),
    "ocm-1-fp32": Cell(title="t-ReX* in fp32", objective="ocm", layers=1, precision="fp32"),
}
"""By name. The names t-ReX-L and OCM-L are the paper's, L hidden layers."""

_PRECISIONS = ("ocm-1-fp16", "ocm-1-fp32")


@dataclass(frozen=True, kw_only=True)
class Start:
    """A short training, whose backbone others start from."""

    cell: str
    epochs: int
    rate: float
    """Peak learning rate per 256 images."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the study is; what all of its cells share."""

    images: Images
    epochs: int
    search_epochs: int
    """Of a run that tries a learning rate."""
    first_rate: float
    """Per 256 images; where the search for a learning rate begins."""
    start: Start | None = None
    """Whose backbone all runs of a seed start from; None: random weights."""
    cells: tuple[str, ...]
    """Names of the cells that it has."""
    workers: int
    """Loader processes of a run."""
    settings: Mapping[str, Field]
    """Fields of the trainer, over the recipe demo."""


_CELLS = tuple(name for name in CELLS if name not in _PRECISIONS)

SCALES = {
    # Batches of 64, crops of 32 and 16 pixels, as the demo's; 3,600 steps.
    "cpu": Scale(
        images=Images(num_classes=24, per_class=16, size=64, variation=2.5),
        epochs=600,
        search_epochs=150,
        first_rate=0.4,
        start=Start(cell="cosine-1-global", epochs=60, rate=0.4),
        cells=_CELLS,
        workers=0,
        settings={
            # A slimmer network than the demo's: half the time a step.
            "model.backbone-args": ("channels=(16, 32, 64, 128)", "stem_width=16"),
            "crops.local-crops": 2,
            # Locals of less than this show too little of a 64-pixel fractal.
            "crops.local-scale": ("0.15", "0.4"),
            # 0.999 averages over 0.2 % of the paper's 500,000 steps, this one over as much of ours.
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
        cells=tuple(CELLS),
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
}
"""By name."""
SEARCH_SEED = 1000
