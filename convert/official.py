"""Conversion of NAVER's files to timm folders, named after the repositories on the Hub.

OUTPUT/trex_resnet50.in1k_r2         backbone, for timm without this package
OUTPUT/trex_resnet50_proj.in1k_r2    backbone and projector
OUTPUT/trex_resnet50_cls.in1k_r2     backbone, projector and classifier
OUTPUT/STEM.report.tsv               new name of every key of STEM.pth

A backbone file yields only the first folder. All models are built and compared with the source
before the first is written, and all are written before the first is moved to OUTPUT.
"""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from tyro.conf import Positional

from convert import key_report, source
from trex_models.atomic import existing_folder, require_space
from trex_models.cli import require_at_least
from trex_models.pretrained import naver, timm_folder
from trex_models.pretrained.checkpoints import Checkpoint, CheckpointError, load_checkpoint, read
from trex_models.pretrained.manifest import sha256

# Largest difference between the outputs of the source and of a converted model, relative to the
# largest value. A float32 ResNet-50 differs from float64 by up to 3e-5.
TOLERANCE = 1e-4

# Official sizes. The projector's depth identifies the family.
DEPTHS = {"trex": 3, "trexstar": 1}
WIDTHS = {"proj_hidden_dim": 2048, "proj_dim": 256}
NUM_CLASSES = 1000

PUBLISHED_TAGS = {name.partition(".")[2] for name in naver.FILES}
# naver.FILES lists the backbone-only file first.
BACKBONE_FILES = {files[0]: name for name, files in naver.FILES.items() if "50." in name}


class Converted(NamedTuple):
    """A converted model and the source's outputs that it must reproduce."""

    module: nn.Module
    expected: Tensor


def convert_official(
    file: Positional[Path],
    output: Path,
    *,
    model: str | None = None,
    momentum_encoder: bool = False,
    num_classes: int | None = None,
    tag: str | None = None,
) -> list[Path]:
    """Convert one of NAVER's files to timm folders and write a report about its keys.

    Example: python -m convert naver trex_2_checkpoint_full.pth --output converted

    Args:
        file: Backbone file or full training state (.pth).
        output: Parent folder of the timm folders. Existing folders with the same names are
            replaced.
        model: Model name and tag, such as trex_resnet50.in1k. Required for a renamed backbone file.
        momentum_encoder: Convert the momentum encoder instead of the online encoder.
        num_classes: Number of classes of the memory bank. The default is 1000.
        tag: Tag in the names of the timm folders. The default is derived from the file.

    Returns:
        Paths of the timm folders.
    """
    started, memory_before = time.perf_counter(), _peak_memory()
    _check_paths(file, output)
    if num_classes is not None:
        require_at_least(1, num_classes=num_classes)
    print(f"reading {file}", flush=True)
    checkpoint = read(file, momentum_encoder=momentum_encoder, num_classes=num_classes)
    family, suggested_tag = _identify(file, checkpoint, model, momentum_encoder, num_classes)
    tag = _checked_tag(file, tag, suggested_tag)

    print("computing the source's outputs and checksums", flush=True)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    # A separate memory map: deleting it below releases its pages.
    contents = load_checkpoint(file)
    weights = checkpoint.classifier_weights
    classes = NUM_CLASSES if weights is None else len(weights)
    expected = source.outputs(
        contents, images, momentum_encoder=momentum_encoder, num_classes=classes
    )
    rows = key_report.rows(contents, checkpoint.key_report)
    del contents
    metadata = {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)}

    print("building the models and comparing them with the source", flush=True)
    models = _build(checkpoint, expected, family, tag)
    errors = {name: _error(model, images) for name, model in models.items()}
    _check_errors(file, errors)

    report_name = f"{file.stem}.report.tsv"
    tensors = [t for model in models.values() for t in model.module.state_dict().values()]
    require_space(output, sum(tensor.nbytes for tensor in tensors) + 2**20, "--output")
    with _staged(output, [*models, report_name]) as (stage, done):
        for name, (module, outputs) in models.items():
            print(f"writing {name}", flush=True)
            timm_folder.write_timm_folder(module, stage / name, images, outputs)
        written = {name: sha256(stage / name / "model.safetensors") for name in models}
        key_report.write_rows(stage / report_name, metadata | written, rows)
        for name in models:
            with timm_folder.replaced_folder(output / name) as new_folder:
                (stage / name).replace(new_folder)
            done.append(name)
        (stage / report_name).replace(output / report_name)

    print()
    for key, value in metadata.items():
        print(f"{key:<10}{value}")
    print(f"contents  {_description(checkpoint, rows)}")
    if checkpoint.classifier_weights is not None:
        absent = checkpoint.absent_classes
        listed = ", ".join(map(str, absent[:10])) + (", ..." if len(absent) > 10 else "")
        print(f"no entry  {len(absent)} classes{': ' if absent else ''}{listed}")
    print(f"keys      {len(rows)}")
    for new_key, count in key_report.counts(rows).items():
        print(f"{count:>10}  {new_key}")
    print(f"checked   error relative to the largest value, tolerance {TOLERANCE:.0e}:")
    for name, error in errors.items():
        print(f"{error:>10.1e}  {name}")
    print("written   model.safetensors with size and SHA-256:")
    for name, digest in written.items():
        size = (output / name / "model.safetensors").stat().st_size
        print(f"{_megabytes(size):>10}  {digest}  {output / name}")
    print(f"report    {output / report_name}")
    print(f"time      {time.perf_counter() - started:.1f} s")
    memory = _peak_memory()
    print(f"memory    peak {_megabytes(memory)}, before reading {_megabytes(memory_before)}")
    return [output / name for name in models]


def _description(checkpoint: Checkpoint, rows: list[key_report.KeyRow]) -> str:
    if not checkpoint.projector:
        return "a ResNet-50 backbone only"
    sizes = checkpoint.projector_args()
    assert checkpoint.classifier_weights is not None
    entries = [row.shape.partition("x")[0] for row in rows if row.new_key.startswith("prototypes:")]
    return (
        f"a full training state: ResNet-50, projector with {sizes['proj_layers']} hidden layers of "
        f"width {sizes['proj_hidden_dim']}, {sizes['proj_dim']}-dimensional embeddings, "
        f"{len(checkpoint.classifier_weights)} classes with "
        f"{f'prototypes from a bank of {entries[0]}' if entries else 'learned weights'}"
    )


def _check_paths(path: Path, output: Path) -> None:
    """Check early that the input exists and the output is writable, before minutes of work."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; pass the .pth file")
    if not path.exists():
        raise ValueError(
            f"{path} does not exist; check the path, or download one of "
            f"{', '.join(naver.ALL_FILES)} from {naver.BASE_URL}"
        )
    existing = existing_folder(output)
    if not existing.is_dir():
        raise OSError(f"{existing} is a file; choose another --output")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OSError(f"{existing} is not writable by this user; choose another --output")


def _identify(
    path: Path,
    checkpoint: Checkpoint,
    model: str | None,
    momentum_encoder: bool,
    num_classes: int | None,
) -> tuple[str, str]:
    """Return the family (trex or trexstar) and the tag of a file's models.

    Raises:
        ValueError: The file's contents do not match its name, the file is not an official one, or
            an option is missing or does not match the file.
    """
    if path.name in naver.ALL_FILES:
        naver.check_contents(checkpoint, path.name)
    if checkpoint.form == "trainer":
        raise CheckpointError(
            f"{path} is a checkpoint of this project's trainer; export it with "
            "python -m trex_models.train export"
        )
    if checkpoint.form == "official":
        if model:
            raise ValueError(
                f"{path}: --model {model} is only for backbone files, but this is a full training "
                "state, which its projector identifies; remove --model"
            )
        return _identify_full(path, checkpoint, momentum_encoder, num_classes)
    if checkpoint.projector or checkpoint.classifier_weights is not None:
        raise CheckpointError(
            f"{path} is a converted model, not an official file; timm loads it directly with "
            f"pretrained_cfg_overlay=dict(file={path.name!r})"
        )
    if num_classes is not None:
        raise ValueError(
            f"{path}: --num-classes {num_classes} requires a memory bank, but this file contains "
            "only a backbone; remove --num-classes"
        )
    return _identify_backbone(path, model)


def _identify_full(
    path: Path, checkpoint: Checkpoint, momentum_encoder: bool, num_classes: int | None
) -> tuple[str, str]:
    if checkpoint.classifier_weights is None:
        raise CheckpointError(
            f"{path} contains neither a memory bank nor classifier weights; use the complete file"
        )
    learned = "fc.weight" in checkpoint.key_report.values()
    classes = len(checkpoint.classifier_weights)
    if num_classes not in (None, classes):
        raise ValueError(
            f"{path}: --num-classes {num_classes} does not match the learned classifier weights of "
            f"{classes} classes; remove --num-classes"
        )
    # The tag lists all differences from the published models, to prevent confusion with them.
    sizes = checkpoint.projector_args()
    marks = ["in1k_r2" if classes == NUM_CLASSES else f"c{classes}"]
    if sizes["proj_layers"] not in DEPTHS.values():
        marks.append(f"l{sizes['proj_layers']}")
    for name, letter in (("proj_hidden_dim", "h"), ("proj_dim", "d")):
        if sizes[name] != WIDTHS[name]:
            marks.append(f"{letter}{sizes[name]}")
    marks += ["learned"] * learned + ["momentum"] * momentum_encoder
    family = "trexstar" if sizes["proj_layers"] == DEPTHS["trexstar"] else "trex"
    return family, "_".join(marks)


def _identify_backbone(path: Path, model: str | None) -> tuple[str, str]:
    by_name = BACKBONE_FILES.get(path.name)
    if model is None and by_name is None:
        raise ValueError(
            f"{path}: a backbone file does not show whether it is t-ReX or t-ReX*, and its name is "
            f"not one of {', '.join(BACKBONE_FILES)}; specify the model with --model "
            f"{' or --model '.join(BACKBONE_FILES.values())}"
        )
    if model and by_name and model != by_name:
        raise ValueError(
            f"{path}: --model {model} contradicts the file name, which implies {by_name}; "
            "remove --model or rename the file"
        )
    family, _, tag = (model or by_name or "").partition("_resnet50.")
    if family not in DEPTHS or not tag:
        raise ValueError(
            f"{path}: --model {model} is not a backbone with a tag; choose one of "
            f"{', '.join(BACKBONE_FILES.values())}, or another tag for that backbone"
        )
    return family, tag


def _checked_tag(path: Path, tag: str | None, suggested: str) -> str:
    if tag in PUBLISHED_TAGS and tag != suggested:
        raise ValueError(
            f"{path}: --tag {tag} is reserved for published weights, and the default for this file "
            f"is {suggested}; choose another tag"
        )
    tag = suggested if tag is None else tag
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", tag):
        raise ValueError(
            f"{path}: the tag {tag!r} becomes part of folder names and may only contain letters, "
            "digits, _ and -; choose another tag"
        )
    return tag


def _build(
    checkpoint: Checkpoint, expected: source.Outputs, family: str, tag: str
) -> dict[str, Converted]:
    """Build the models, by name and tag; they share their tensors with the checkpoint."""
    state = checkpoint.state_dict()
    backbone = f"{family}_resnet50"
    # timm's resnet50, so that timm and transformers load it without this package.
    models = {f"{backbone}.{tag}": _model("resnet50", backbone, tag, state, expected.features)}
    if expected.embeddings is not None and expected.logits is not None:
        standard = {"proj_layers": DEPTHS[family], **WIDTHS}
        args = {k: v for k, v in checkpoint.projector_args().items() if v != standard[k]}
        for part, outputs in (("proj", expected.embeddings), ("cls", expected.logits)):
            name = f"{backbone}_{part}"
            models[f"{name}.{tag}"] = _model(name, name, tag, state, outputs, **args)
    return models


def _model(
    architecture: str, like: str, tag: str, state: dict[str, Tensor], expected: Tensor, **args: Any
) -> Converted:
    row = timm.get_pretrained_cfg(like)
    assert row is not None
    num_classes = expected.shape[1] if row.num_classes else 0
    cfg = dataclasses.replace(
        row, architecture=architecture, num_classes=num_classes, tag=tag, hf_hub_id=None
    )
    with torch.device("meta"):  # allocates no memory
        model = timm.create_model(
            architecture, pretrained_cfg=cfg, num_classes=num_classes, **args
        ).eval()
    model.load_state_dict({key: state[key] for key in model.state_dict()}, assign=True)
    return Converted(model, expected)


@torch.no_grad()
def _error(model: Converted, images: Tensor) -> float:
    difference = (model.module(images) - model.expected).abs().max()
    return float(difference / model.expected.abs().max())


def _check_errors(path: Path, errors: dict[str, float]) -> None:
    wrong = [f"{name}: {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE]
    if wrong:
        raise ValueError(
            f"{path}: the converted models do not reproduce the file (relative error of "
            f"{', '.join(wrong)}; tolerance {TOLERANCE:.0e}); nothing was written; "
            "please report this as a bug"
        )


@contextmanager
def _staged(output: Path, names: list[str]) -> Iterator[tuple[Path, list[str]]]:
    """Yield a temporary folder inside ``output``, and a list for the names of finished outputs.

    Args:
        output: Output folder; created if missing, and removed again if it remains empty.
        names: Names to be written: folders, followed by one file.

    Raises:
        OSError: The disk is full or not writable; the message lists what was written.
    """
    missing = [folder for folder in (output, *output.parents) if not folder.exists()]
    done: list[str] = []
    try:
        for name in names[:-1]:
            if (output / name).is_file():
                raise OSError(f"{name} exists and is a file")
        output.mkdir(parents=True, exist_ok=True)
        with timm_folder.temporary_folder(output, names[-1]) as stage:
            yield stage, done
    except OSError as error:
        missing_names = ", ".join(name for name in names if name not in done)
        raise OSError(
            f"{output}: {error.strerror or error}; written: {', '.join(done) or 'nothing'}; "
            f"not written: {missing_names}; free some space or choose another --output"
        ) from error
    finally:
        for folder in missing:
            with suppress(OSError):  # folders that are no longer empty remain
                folder.rmdir()


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
