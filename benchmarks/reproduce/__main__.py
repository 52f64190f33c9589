"""Reproduce the paper: one resumable command from images to its table and figure.

    python -m benchmarks.reproduce --scale full --imagenet DIR --data-root DATA --output OUT
    python -m benchmarks.reproduce --scale full --from-released cache --data-root DATA --output OUT
    python -m benchmarks.reproduce --scale dry --output OUT      # minutes on a CPU, meaningless
    python -m benchmarks.reproduce status OUT
    python -m benchmarks.reproduce estimate --scale in100        # hours by arithmetic, no data

OUT/report.md is the report, OUT/reproduce.json all of it as JSON, OUT/figure.png the figure.
docs/reproduce.md describes the stages.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from benchmarks import measure
from benchmarks.reproduce import released, stages, state
from benchmarks.reproduce.estimate import by_arithmetic, format_arithmetic, nominal_sizes
from benchmarks.reproduce.plan import MODELS, SCALES, Plan, ScaleName, StageName
from trex_models import cli
from trex_models.pretrained.manifest import WeightsError

ModelName = Literal["trex", "trexstar", "plain3", "plain1", "baseline", "look"]
_PROGRAM = "python -m benchmarks.reproduce"


def reproduce(
    *,
    scale: ScaleName,
    output: Path,
    imagenet: Path | None = None,
    data_root: Path | None = None,
    models: tuple[ModelName, ...] = (),
    from_released: Path | None = None,
    skip: tuple[StageName, ...] = (),
    slurm: bool = False,
    owner: str = "",
    license: str = "",  # noqa: A002 - the option's name
) -> bool:
    """Train the models of the paper, evaluate them, and compare them with the authors' results.

    The stages are check, estimate, train, linear, transfer, compare, figure, folders. The same
    command continues an interrupted reproduction, also with more models or datasets. Further
    commands: "status OUTPUT" shows what is done, "estimate --scale SCALE" prints hours on GPUs.

    Args:
        scale: The paper's (full), 100 classes of ImageNet (in100, settings not yet run by us), or
            generated images that only show that all stages work (dry).
        output: Folder for runs, reports and figure.
        imagenet: Folder of ImageNet-1K with train and val. The default is DATA_ROOT/imagenet.
        data_root: Folder that contains the transfer datasets; see docs/transfer_data.md. If unset,
            the models are evaluated only on the training task.
        models: Models to train and evaluate. The default is all of them.
        from_released: Evaluate NAVER's released models, not for commercial use, instead of
            training: a folder of NAVER's files or of converted models, or "cache" for those that
            were downloaded before.
        skip: Stages to skip.
        slurm: Write a script that submits the training runs to Slurm instead of running them.
        owner: Owner of the weights, for the model cards of the stage folders.
        license: License of the weights, as the Hub's identifier.

    Returns:
        True if no result differs from the authors' by more than its tolerance.
    """
    output = output.absolute()
    if scale == "dry":
        if imagenet or data_root:
            raise ValueError("--scale dry generates its images; omit --imagenet and --data-root")
        data_root = output / "replica"
    if imagenet is None and data_root is None:
        raise ValueError("--imagenet is not set; pass ImageNet's folder, with train and val")
    if models and from_released:
        raise ValueError("--models are trained, --from-released trains none; pass one of the two")
    chosen = [MODELS[name] for name in dict.fromkeys(models or MODELS)]
    if from_released:
        chosen = released.find(from_released, output)
        if scale == "dry":  # whose validation images have too few classes
            chosen = [model for model in chosen if not model.is_classifier]
    elif scale == "full":
        chosen += released.figure_models()
    plan = Plan(
        scale_name=scale,
        imagenet=(imagenet or data_root / "imagenet").absolute(),  # type: ignore[operator]
        data_root=data_root and data_root.absolute(),
        output=output,
        models=chosen,
        skip=skip,
        slurm=slurm,
        owner=owner or "nobody" * (scale == "dry"),
        license=license or "apache-2.0" * (scale == "dry"),
    )
    return stages.run(plan)


def print_status(output: Positional[Path]) -> None:
    """Show what is done, what runs, what is left and for how long.

    Example: python -m benchmarks.reproduce status OUT

    Args:
        output: Folder of the reproduction.
    """
    print(state.describe(output))


def print_estimate(*, scale: Literal["full", "in100"]) -> None:
    """Print the hours on common GPUs, by arithmetic; needs no images.

    Args:
        scale: Scale of the reproduction.
    """
    settings, models = SCALES[scale], list(MODELS.values())
    print(format_arithmetic(by_arithmetic(settings, models, nominal_sizes(settings))))


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status; 1 if a result is outside its tolerance."""
    commands: dict[str, cli.Command] = {"status": print_status, "estimate": print_estimate}
    command, prog = commands.get("".join(arguments[:1]), reproduce), _PROGRAM
    if command is not reproduce:
        prog, arguments = f"{_PROGRAM} {arguments[0]}", arguments[1:]
    return cli.main(command, arguments, prog=prog, extra="train,transfer", errors=(WeightsError,))


if __name__ == "__main__":
    measure.interrupt_on_signals()  # the training run saves its state
    sys.exit(main(sys.argv[1:]))
