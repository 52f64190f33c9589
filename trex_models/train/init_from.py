"""Warm start: load the parts of a checkpoint that match this run, and report the rest.

Shapes: C classes, D embedding, Q bank size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trex_models.heads import class_means
from trex_models.method.bank import MemoryBank
from trex_models.method.model import TReX
from trex_models.method.objectives import LinearSoftmax, Objective
from trex_models.pretrained import checkpoints
from trex_models.pretrained.checkpoints import CheckpointError
from trex_models.pretrained.licenses import license_of
from trex_models.pretrained.manifest import WeightsError
from trex_models.train import checkpointing


@dataclass(frozen=True)
class _File:
    """Weights of a file by the parts of ``checkpoints.KEY_TABLE``, and their metadata."""

    path: Path
    parts: dict[str, dict[str, Any]]
    license: str
    """License of the weights; empty if the file does not state it."""
    classes: list[str] | None
    images: str | None = None
    """Digest of the training images."""

    def value(self, part: str) -> Any:
        """Return the only value of a part; None if the file does not contain the part."""
        return next(iter(self.parts[part].values()), None)


@torch.no_grad()
def init_from(
    path: Path, method: TReX, classes: Sequence[str], images: str
) -> tuple[list[str], str]:
    """Load the matching parts of a checkpoint into a method on the CPU; other parts stay random.

    ``path`` is a checkpoint of any format, a timm folder, or a run (its last checkpoint is used).
    ``images`` is the digest of the run's images: bank indices are only valid for the same images.
    Returns a line for each part, which says whether it was restored or why not, and the license of
    the weights, which is empty if the file does not state it.

    Raises:
        ValueError: The file is unreadable, has no backbone or a different one, or contains values
            that are not finite.
    """
    try:
        path, contents = _read(path)
        file = _sort(path, contents)
        checkpoints.check_finite(file.parts)
        lines = [f"from {path}:", *_restore(method, file, classes, images)]
    except (CheckpointError, WeightsError) as error:
        named = "" if str(path) in str(error) else f"{path}: "
        raise ValueError(f"--init-from: {named}{error}") from error
    return lines, file.license


def _read(path: Path) -> tuple[Path, dict[str, Any]]:
    if (path / "checkpoints").is_dir():
        return checkpointing.load_last(path)
    if path.is_dir():
        path /= "model.safetensors"
        if not path.is_file():
            raise CheckpointError(
                f"{path.parent} is neither the folder of a run nor a timm folder with {path.name}; "
                "pass one of these, or a checkpoint file"
            )
    if not path.exists():
        raise CheckpointError("the file does not exist; pass a checkpoint, a run or a timm folder")
    return path, dict(checkpoints.load_checkpoint(path))


def _sort(path: Path, contents: dict[str, Any]) -> _File:
    form, parts, _ = checkpoints.sort_keys(contents)
    stated = license_of(path, contents, form)
    if form == "trainer":
        return _File(path, parts, stated, contents.get("classes"), contents.get("images"))
    config = path.with_name("config.json")
    if path.name != "model.safetensors" or not config.is_file():
        return _File(path, parts, stated, None)
    try:
        names = dict(json.loads(config.read_text())["pretrained_cfg"]).get("label_names")
        if names is not None and not all(isinstance(name, str) for name in names):
            raise TypeError("label_names is not a list of strings")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{config} is not a model configuration ({type(error).__name__}: {error}); export the "
            "model again, or pass another file"
        ) from error
    return _File(path, parts, stated, names)


def _restore(method: TReX, file: _File, classes: Sequence[str], images: str) -> list[str]:
    encoder = method.encoder
    _take_head_out_of_backbone(encoder.backbone, file)
    if not file.parts["backbone"]:
        raise CheckpointError("the file contains no backbone; pass another file")
    mismatch = _mismatch(encoder.backbone, file.parts["backbone"])
    if mismatch:
        difference = f"its backbone differs from the run's ({mismatch})"
        raise CheckpointError(f"{difference}; set --model.backbone to that of the file")
    encoder.backbone.load_state_dict(file.parts["backbone"])
    lines = [_line("backbone")]

    mismatch = _mismatch(encoder.projector, file.parts["projector"])
    if not mismatch:
        encoder.projector.load_state_dict(file.parts["projector"])
    if encoder.projector.state_dict() or file.parts["projector"]:
        lines.append(_line("projector", mismatch and f"not restored ({mismatch})"))
    # The other parts were trained on the embeddings of the file's projector.
    reason = mismatch and "the projector was not restored"
    lines += _restore_momentum_encoder(method, file, reason)
    reason = reason or _compare_classes(file, classes)
    lines += _restore_head(method.objective, file, reason, file.images == images)
    if lines[-1].endswith(": restored") and file.classes is None:
        lines.append(
            "  classes: not named in the file; they must be the same as the run's "
            f"{len(classes)} classes, in the same order"
        )
    return lines


def _take_head_out_of_backbone(backbone: nn.Module, file: _File) -> None:
    """Move a timm classifier to the classifier weights; the key table only knows the name fc."""
    cfg: Any = getattr(backbone, "pretrained_cfg", None) or {}
    name, own = cfg.get("classifier"), backbone.state_dict()
    for suffix, part in (("weight", "classifier weights"), ("bias", "classifier biases")):
        key = f"{name}.{suffix}"
        if key in file.parts["backbone"] and key not in own:
            file.parts[part][""] = file.parts["backbone"].pop(key)


def _restore_momentum_encoder(method: TReX, file: _File, reason: str) -> list[str]:
    average = method.momentum_encoder
    state = {
        f"{part}.{key}": value
        for part in ("backbone", "projector")
        for key, value in file.parts[f"momentum {part}"].items()
    }
    if average is None:
        unused = "not used (the objective has none)"
        return [_line("momentum encoder", unused)] if state else []
    mismatch = reason or _mismatch(average.encoder, state)
    average.encoder.load_state_dict(method.encoder.state_dict() if mismatch else state)
    return [_line("momentum encoder", mismatch and f"copy of the encoder ({mismatch})")]


def _restore_head(objective: Objective, file: _File, reason: str, same_images: bool) -> list[str]:
    if not objective.predicts_labels:
        return [_line("classifier weights and memory bank", "not used (the objective has none)")]
    has_bank = file.value("bank features") is not None
    has_weights = file.value("classifier weights") is not None
    if objective.bank is None:
        name = "classifier weights" + (", from the bank's prototypes" if has_bank else "")
        mismatch = "" if has_bank or has_weights else "the file has none"
        mismatch = mismatch or reason or _restore_classifier(objective, file)
        return [_line(name, mismatch and f"not restored ({mismatch})")]
    unused = [_line("classifier weights", "not used (the objective has none)")] * has_weights
    mismatch = "" if has_bank else "the file has none"
    mismatch = mismatch or reason or _restore_bank(objective.bank, file, same_images)
    return [*unused, _line("memory bank", mismatch and f"not restored ({mismatch})")]


def _restore_classifier(objective: Any, file: _File) -> str:
    classifier, biases = objective.classifier, file.value("classifier biases")
    if isinstance(objective, LinearSoftmax) and biases is None:
        return "those of the file are for cosine similarity, without biases"
    if not isinstance(objective, LinearSoftmax) and biases is not None:
        return "those of the file are of a linear classifier with biases"
    features, weights = file.value("bank features"), file.value("classifier weights")
    if features is not None:
        labels = file.value("bank labels")
        weights = class_means(features.float(), labels, len(classifier.weight))
    state = {"weight": weights} | ({} if biases is None else {"bias": biases})
    mismatch = _mismatch(classifier, state)
    if not mismatch:
        classifier.load_state_dict(state)
    return mismatch


def _restore_bank(bank: MemoryBank, file: _File, same_images: bool) -> str:
    features, indices = file.value("bank features"), file.value("bank indices")
    if features.shape != bank.embeddings.shape:
        own, files = tuple(bank.embeddings.shape), tuple(features.shape)
        return f"shape {files} in the file, {own} in the run; see --objective.bank-size"
    bank.embeddings.copy_(features)
    bank.labels.copy_(file.value("bank labels"))
    if same_images and indices is not None:  # otherwise -1, for unknown
        bank.indices.copy_(indices)
    bank.pointer = checkpoints.bank_pointer(file.parts)
    return ""


def _compare_classes(file: _File, classes: Sequence[str]) -> str:
    """Describe how the file's classes differ from the run's; empty if they may be the same."""
    if (names := file.classes) is not None:
        if list(names) == list(classes):
            return ""
        odd = sorted(set(names) ^ set(classes))
        example = f", such as {odd[0]}" if odd else " in their order"
        return f"the file's {len(names)} classes differ from the run's {len(classes)}{example}"
    weights, labels = file.value("classifier weights"), file.value("bank labels")
    if weights is not None and weights.shape[:1] != (len(classes),):
        return f"weights {tuple(weights.shape)} in the file, {len(classes)} classes in the run"
    if labels is not None:
        # A bank does not store the number of classes: except for the 1000 of ImageNet, the last
        # class must have an entry.
        high = int(labels.max())
        if high >= len(classes) or high + 1 < len(classes) != 1000:
            return f"bank labels up to {high} in the file, {len(classes)} classes in the run"
    return ""


def _line(part: str, otherwise: str = "") -> str:
    return f"  {part}: {otherwise or 'restored'}"


def _mismatch(module: nn.Module, state: Mapping[str, Any]) -> str:
    """Describe how keys and shapes of a state differ from the module's; empty if they match."""
    expected = module.state_dict()
    if not state:
        return "the file has none" if expected else ""
    if not expected:
        return "the run has none"
    return checkpoints.mismatch(state, expected)
