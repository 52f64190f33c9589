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
    """Weights of a file by the parts of ``checkpoints.KEY_TABLE``, and their origin."""

    path: Path
    parts: dict[str, dict[str, Any]]
    license: str
    """Empty if not stated."""
    classes: list[str] | None
    images: str | None = None
    """Digest of the images that it was trained on."""

    def value(self, part: str) -> Any:
        """Return the only value of a part; None if the file has none."""
        return next(iter(self.parts[part].values()), None)


@torch.no_grad()
def init_from(
    path: Path, method: TReX, classes: Sequence[str], images: str
) -> tuple[list[str], str]:
    """Load the parts of a checkpoint that match a method on the CPU, whose others stay random.

    ``path`` is a checkpoint of any form, a timm folder, or a run for its last checkpoint;
    ``images`` is the digest of the run's: the bank's sample indices are valid for these only.
    Returns a line for each part, restored or why not, and the license of the weights, empty if
    the file does not state it.

    Raises:
        ValueError: The file is not readable, has no backbone or another one, or its weights are
            not finite.
    """
    try:
        path, contents = _read(path)
        file = _sort(path, contents)
        checkpoints.check_finite(file.parts)
        lines = [f"from {path}:", *_restore(method, file, classes, images)]
    except (CheckpointError, WeightsError) as error:
        named = "" if str(path) in str(error) else f"{path}: "
        raise ValueError(f"init_from: {named}{error}") from error
    return lines, file.license


def _read(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file that a path names, and its contents."""
    if (path / "checkpoints").is_dir():
        return checkpointing.last(path)
    if path.is_dir():
        path /= "model.safetensors"
        if not path.is_file():
            raise CheckpointError(
                f"{path.parent} is neither a run's folder nor a timm folder with {path.name}; "
                "name one of these, or a checkpoint file"
            )
    if not path.exists():
        raise CheckpointError("the file does not exist; name a checkpoint, or a run")
    return path, dict(checkpoints.load_checkpoint(path))


def _sort(path: Path, contents: dict[str, Any]) -> _File:
    """Sort the contents of a file by parts."""
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
            f"{config} is no model's configuration ({type(error).__name__}: {error}); export the "
            "model again, or name another file"
        ) from error
    return _File(path, parts, stated, names)


def _restore(method: TReX, file: _File, classes: Sequence[str], images: str) -> list[str]:
    """Copy the parts that match into the method; return a line for each part."""
    encoder = method.encoder
    _take_head_out_of_backbone(encoder.backbone, file)
    if not file.parts["backbone"]:
        raise CheckpointError("it holds no backbone; name another file")
    misfit = _misfit(encoder.backbone, file.parts["backbone"])
    if misfit:
        reason = f"its backbone is not the run's ({misfit})"
        raise CheckpointError(f"{reason}; set model.backbone to the file's")
    encoder.backbone.load_state_dict(file.parts["backbone"])
    lines = [_line("backbone")]

    misfit = _misfit(encoder.projector, file.parts["projector"])
    if not misfit:
        encoder.projector.load_state_dict(file.parts["projector"])
    if encoder.projector.state_dict() or file.parts["projector"]:
        lines.append(_line("projector", misfit and f"random: {misfit}"))
    # Embeddings of another projector: what was learned behind it does not match them.
    lost = misfit and "the projector was not restored"
    lines += _restore_momentum_encoder(method, file, lost)
    lost = lost or _other_classes(file, classes)
    lines += _restore_head(method.objective, file, lost, file.images == images)
    if lines[-1].endswith(": restored") and file.classes is None:
        count = len(classes)
        lines.append(
            f"  classes: the file does not name them; they must be the run's {count} in their order"
        )
    return lines


def _take_head_out_of_backbone(backbone: nn.Module, file: _File) -> None:
    """Move timm's own classifier to the class weights; the key table only knows the name fc."""
    cfg: Any = getattr(backbone, "pretrained_cfg", None) or {}
    name, own = cfg.get("classifier"), backbone.state_dict()
    for suffix, part in (("weight", "class weights"), ("bias", "class biases")):
        key = f"{name}.{suffix}"
        if key in file.parts["backbone"] and key not in own:
            file.parts[part][""] = file.parts["backbone"].pop(key)


def _restore_momentum_encoder(method: TReX, file: _File, lost: str) -> list[str]:
    average = method.momentum_encoder
    state = {
        f"{part}.{key}": value
        for part in ("backbone", "projector")
        for key, value in file.parts[f"momentum {part}"].items()
    }
    if average is None:
        unused = "not used: the objective has none"
        return [_line("momentum encoder", unused)] if state else []
    misfit = lost or _misfit(average.encoder, state)
    average.encoder.load_state_dict(method.encoder.state_dict() if misfit else state)
    return [_line("momentum encoder", misfit and f"copy of the encoder: {misfit}")]


def _restore_head(objective: Objective, file: _File, lost: str, same_images: bool) -> list[str]:
    """Restore the bank or the class weights, unless ``lost`` says why not."""
    has_bank = file.value("bank features") is not None
    has_weights = file.value("class weights") is not None
    if objective.bank is None:
        name = "class weights" + (", from the bank's prototypes" if has_bank else "")
        misfit = "" if has_bank or has_weights else "the file has none"
        misfit = misfit or lost or _restore_class_weights(objective, file)
        return [_line(name, misfit and f"random: {misfit}")]
    unused = [_line("class weights", "not used: the objective has none")] if has_weights else []
    misfit = "" if has_bank else "the file has none"
    misfit = misfit or lost or _restore_bank(objective.bank, file, same_images)
    return [*unused, _line("memory bank", misfit and f"noise: {misfit}")]


def _restore_class_weights(objective: Any, file: _File) -> str:
    """Copy the class weights; return why not, if they do not match."""
    classifier, biases = objective.classifier, file.value("class biases")
    if isinstance(objective, LinearSoftmax) and biases is None:
        return "the file's are compared by cosine, without biases"
    if not isinstance(objective, LinearSoftmax) and biases is not None:
        return "the file's are of a linear classifier with biases"
    features, weights = file.value("bank features"), file.value("class weights")
    if features is not None:
        labels = file.value("bank labels")
        weights = class_means(features.float(), labels, len(classifier.weight))
    found = {"weight": weights} | ({} if biases is None else {"bias": biases})
    misfit = _misfit(classifier, found)
    if not misfit:
        classifier.load_state_dict(found)
    return misfit


def _restore_bank(bank: MemoryBank, file: _File, same_images: bool) -> str:
    """Copy the bank; return why not, if it does not match."""
    features, indices = file.value("bank features"), file.value("bank indices")
    if features.shape != bank.embeddings.shape:
        own, files = tuple(bank.embeddings.shape), tuple(features.shape)
        return f"the file's is {files}, the run's {own}; see objective.bank_size"
    bank.embeddings.copy_(features)
    bank.labels.copy_(file.value("bank labels"))
    if same_images and indices is not None:  # otherwise -1: samples of other images
        bank.indices.copy_(indices)
    bank.pointer = checkpoints.bank_pointer(file.parts)
    return ""


def _other_classes(file: _File, classes: Sequence[str]) -> str:
    """Return how the file's classes differ from the run's, as far as the file states them."""
    if file.classes is not None:
        if list(file.classes) == list(classes):
            return ""
        odd = sorted(set(file.classes) ^ set(classes))
        example = f", such as {odd[0]}" if odd else ": in another order"
        return f"the file's {len(file.classes)} classes are not the run's {len(classes)}{example}"
    weights, labels = file.value("class weights"), file.value("bank labels")
    if weights is not None and weights.shape[:1] != (len(classes),):
        return f"the file's are {tuple(weights.shape)}, the run has {len(classes)} classes"
    if labels is not None:
        # A bank does not state the number of classes: apart from ImageNet's 1000, the last class
        # must have an entry.
        high = int(labels.max())
        if high >= len(classes) or high + 1 < len(classes) != 1000:
            return f"the bank's labels go up to {high}, the run has {len(classes)} classes"
    return ""


def _line(part: str, otherwise: str = "") -> str:
    return f"  {part}: {otherwise or 'restored'}"


def _misfit(module: nn.Module, state: Mapping[str, Any]) -> str:
    """Return how keys and shapes of a state differ from the module's; empty if they match."""
    wanted = module.state_dict()
    if not state:
        return "the file has none" if wanted else ""
    if not wanted:
        return "the run has none"
    return checkpoints.mismatch(state, wanted)
