"""What is reproduced: the models, their settings at each scale, and the authors' results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from trex_models.train.__main__ import parse
from trex_models.transfer.datasets import GROUPS
from trex_models.transfer.published import PUBLISHED, Point, reported

ScaleName = Literal["full", "in100", "dry"]
StageName = Literal[
    "check", "estimate", "train", "linear", "transfer", "compare", "figure", "folders"
]
STAGES = get_args(StageName)
SETS = {
    15: GROUPS["transfer"],
    # The paper's figure. The authors' two means match only if iNaturalist is left out.
    13: tuple(name for name in GROUPS["transfer"] if not name.startswith("inat")),
}
"""Transfer datasets of the authors' two means, by their number."""
MEANINGLESS = "DRY RUN on generated images: the numbers are meaningless"
_PAPER_STEPS, _PAPER_CLASSES = 100 * 5004, 1000


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model to evaluate, which is trained first if it has a recipe."""

    name: str
    title: str
    recipe: str = ""
    options: tuple[str, ...] = ()
    source: str = ""
    """``--model`` of the evaluation, if the model is not trained."""
    paper: Point | None = None
    """The authors' results in the paper, with the mean over 13 datasets."""
    released: Point | None = None
    """The authors' results on their released weights, with the mean over 15 datasets."""

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Model:
        """Rebuild a model from the JSON of ``dataclasses.asdict``."""
        points = {key: Point(*saved[key]) for key in ("paper", "released") if saved[key]}
        return cls(**{**saved, "options": tuple(saved["options"]), **points})

    @property
    def is_classifier(self) -> bool:
        """True for a released classifier, whose own logits are evaluated."""
        return not self.recipe and "_cls" in self.name


PAPER = {point.name: point for point in PUBLISHED["paper"].points}
# Read from the paper's plot over the number of local crops, at 8. That these are of learned
# classifiers is our inference: they differ from the values of t-ReX and t-ReX*.
_PLAIN3, _PLAIN1 = Point("t-ReX-3", 0.7794, 1.349), Point("t-ReX-1", 0.7945, 1.175)
_SOFTMAX = "--objective.name softmax --model.projector none --crops.local-crops 0"
MODELS = {
    model.name: model
    for model in (
        Model(
            name="trex",
            title="t-ReX",
            recipe="trex",
            paper=PAPER["t-ReX"],
            released=reported("trex_resnet50.in1k_r2"),
        ),
        Model(
            name="trexstar",
            title="t-ReX*",
            recipe="trexstar",
            paper=PAPER["t-ReX*"],
            released=reported("trexstar_resnet50.in1k_r2"),
        ),
        Model(name="plain3", title="t-ReX-3", recipe="plain3", paper=_PLAIN3),
        Model(name="plain1", title="t-ReX-1", recipe="plain1", paper=_PLAIN1),
        Model(name="baseline", title="softmax", recipe="trex", options=tuple(_SOFTMAX.split())),
        Model(
            name="look",
            title="LOOK + multi-crop",
            recipe="trex",
            options=("--objective.name", "look"),
            paper=PAPER["LOOK + multi-crop"],
        ),
    )
}
"""Models that can be trained, by name. LOOK is our reconstruction."""


class Claim(NamedTuple):
    """A statement of the paper: one model is better than another on one of the two scores."""

    title: str
    better: str
    other: str
    score: Literal["top1", "transfer"]


CLAIMS = (
    Claim("Depth costs accuracy on the training task", "plain1", "plain3", "top1"),
    Claim("Depth helps transfer", "plain3", "plain1", "transfer"),
    Claim("Class means raise the accuracy on the training task", "trexstar", "plain1", "top1"),
    Claim("Class means help transfer", "trex", "plain3", "transfer"),
    Claim("t-ReX* is above softmax on the training task", "trexstar", "baseline", "top1"),
    Claim("t-ReX is above softmax in transfer", "trex", "baseline", "transfer"),
    Claim("t-ReX* is above LOOK on the training task", "trexstar", "look", "top1"),
    Claim("t-ReX is above LOOK in transfer", "trex", "look", "transfer"),
)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Settings that the models of a scale share."""

    epochs: int
    images: int
    """Expected number of training images; 0 for any."""
    seeds: int = 5
    """Number of validation splits of the evaluation."""
    batch_size: int = 256
    options: tuple[str, ...] = ()
    subset: tuple[str, ...] = ()
    """WordNet ids of a subset of ImageNet; empty for all classes."""
    num_classes: int = _PAPER_CLASSES

    @property
    def task(self) -> str:
        """Name of the training task in the evaluation."""
        return "imagenet100" if self.subset else "imagenet"

    def training(self, model: Model, images: int, data: Path) -> list[str]:
        """Return the trainer's recipe and options.

        Settings that depend on the size of the dataset follow from the paper's: a bank with as many
        entries per class, and a momentum encoder that averages over the same share of the run.

        Args:
            model: Model to train.
            images: Number of training images.
            data: Folder of the training task.
        """
        suffix = ".csv" if self.subset else ""
        train, validation = (f"{data / part}{suffix}" for part in ("train", "val"))
        options = ["--data.path", train, "--validation.path", validation, *self.options]
        options += ["--data.source", "csv"] if self.subset else []
        if self.num_classes == _PAPER_CLASSES:
            return [model.recipe, *options, *model.options]
        options += ["--optim.epochs", str(self.epochs)]
        options += ["--optim.warmup-epochs", str(self.epochs // 10)]
        paper = parse(model.recipe, model.options, needs_output=False)
        if bank := paper.objective.resolved_bank_size:
            batch, steps = self.batch_size, self.epochs * (images // self.batch_size)
            entries = bank * self.num_classes / _PAPER_CLASSES
            size = min(math.ceil(entries / batch), images // batch) * batch
            momentum = max(1 - 0.001 * _PAPER_STEPS / steps, 0.9)
            options += ["--objective.bank-size", str(size)]
            options += ["--objective.ema-momentum", f"{momentum:.4f}"]
        return [model.recipe, *options, *model.options]


_IN100 = tuple((Path(__file__).parent / "imagenet100.txt").read_text().split())
_SLIM = (
    "--model.backbone resnet10t --model.backbone-args channels=(8,8,16,16) --model.hidden-dim 16 "
    "--model.embedding-dim 8 --crops.global-size 32 --crops.local-size 16 --crops.local-crops 2 "
    "--optim.batch-size 16 --system.workers 0 --system.log-every 4 --system.save-steps 4 "
    "--system.device cpu"
)
SCALES: dict[ScaleName, Scale] = {
    "full": Scale(epochs=100, images=1_281_167),
    # Not yet run by us. Twice the epochs: a tenth of the images, a fifth of the paper's steps.
    "in100": Scale(epochs=200, images=126_689, subset=_IN100, num_classes=100),
    "dry": Scale(
        epochs=10, images=0, seeds=2, batch_size=16, options=tuple(_SLIM.split()), num_classes=8
    ),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A reproduction: what to do, with which images, and where."""

    scale_name: ScaleName
    output: Path
    imagenet: Path = Path()
    data_root: Path | None = None
    """Folder of the transfer datasets; None to evaluate only the training task."""
    models: Sequence[Model]
    """Models to train and evaluate."""
    others: Sequence[Model] = ()
    """Models of earlier commands with the same output, which are compared, too."""
    skip: tuple[str, ...] = ()
    slurm: bool = False
    owner: str = ""
    license: str = ""

    @property
    def scale(self) -> Scale:
        """Settings of the scale."""
        return SCALES[self.scale_name]

    @property
    def is_dry(self) -> bool:
        """True if the numbers are meaningless."""
        return self.scale_name == "dry"

    @property
    def to_train(self) -> list[Model]:
        """Models to train."""
        return [model for model in self.models if model.recipe]

    @property
    def known(self) -> list[Model]:
        """All models, with those of earlier commands."""
        return [*self.others, *self.models]

    @property
    def data(self) -> Path:
        """Data root of the evaluation: links to the images."""
        return self.output / "data"

    def run(self, model: Model) -> Path:
        """Folder of a model's training run."""
        return self.output / "runs" / model.name

    def report(self, stage: str, model: Model) -> Path:
        """Report of the stage linear or transfer."""
        return self.output / stage / f"{model.name}.json"

    def weights(self, model: Model) -> Path:
        """Weights of a model: those that its run exports at its end, or of its source."""
        folder = Path(model.source) if model.source else self.run(model) / "export" / "backbone"
        return folder / "model.safetensors"

    def is_trained(self, model: Model) -> bool:
        """Return True if a model's run has ended and was exported."""
        return bool(model.recipe) and self.weights(model).exists()
