"""Weights to start from: what of a checkpoint fits a run is taken on, the rest is told.

Shapes: C classes, D embedding, Q bank size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trex_models import checkpoints, naver
from trex_models.checkpoints import CheckpointError, Sorted
from trex_models.heads import class_means
from trex_models.train import checkpointing
from trex_models.train.bank import Bank
from trex_models.train.method import TReX
from trex_models.train.objectives import LinearSoftmax, Objective


@torch.no_grad()
def init_from(
    path: Path, method: TReX, classes: Sequence[str], images: str
) -> tuple[list[str], str]:
    """Take on the weights of a checkpoint.

    Args:
        path: A checkpoint of any form, a timm folder, or a run: its last whole checkpoint.
        method: On the CPU, with its random weights; what does not fit keeps them.
        classes: Names of the run's classes.
        images: Digest of the run's images, by which the bank's samples are told.

    Returns:
        A line for each part, what was restored and what was not, and why; and the licence of the
        weights, empty where the file does not tell it.

    Raises:
        ValueError: The file cannot be read, has no backbone, or another one; or the weights that
            would be taken on are not finite.
    """
    path, contents = _read(path)
    try:
        found = checkpoints.sort(contents)
        lines = [f"from {path}:", *_restore(method, found, contents, classes, images)]
        checkpoints.check_finite(
            {name: value for name, value in method.state_dict().items() if _is_tensor(value)}
        )
    except CheckpointError as error:
        raise ValueError(f"init_from: {path}: {error}") from error
    return lines, _license(path, found, contents)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _read(path: Path) -> tuple[Path, Mapping[str, Any]]:
    """Return the file, and what it holds."""
    if (path / "checkpoints").is_dir():
        newest = checkpointing.newest(path, lambda _, error: print(error))
        if newest is None:
            raise ValueError(f"init_from: {path} holds no checkpoint yet; name another one")
        return newest
    if path.is_dir():
        path = path / "model.safetensors"
    try:
        return path, checkpoints.load(path)
    except CheckpointError as error:
        raise ValueError(f"init_from: {error}") from error


def _restore(
    method: TReX,
    found: Sorted,
    contents: Mapping[str, Any],
    classes: Sequence[str],
    images: str,
) -> list[str]:
    """Copy into the method what fits; return a line for each part."""
    parts, encoder, average = found.parts, method.encoder, method.momentum_encoder
    if not parts["backbone"]:
        raise CheckpointError("it holds no backbone; name another file")
    trouble = _misfit(encoder.backbone, parts["backbone"])
    if trouble:
        raise CheckpointError(
            f"its backbone is not the run's ({trouble}); set model.backbone to the file's"
        )
    encoder.backbone.load_state_dict(parts["backbone"])
    lines = [_line("backbone", "restored")]

    trouble = _misfit(encoder.projector, parts["projector"])
    if not trouble:
        encoder.projector.load_state_dict(parts["projector"])
    has_projector = bool(encoder.projector.state_dict())
    if has_projector or parts["projector"]:
        lines.append(_line("projector", "restored" if not trouble else f"random: {trouble}"))

    if average is not None:
        average.encoder.load_state_dict(encoder.state_dict())
        saved = {name: parts[f"momentum {name}"] for name in ("backbone", "projector")}
        lacking = trouble or (
            "the file has none"
            if not saved["backbone"]
            else _misfit(average.encoder, _joined(saved))
        )
        if not lacking:
            average.encoder.load_state_dict(_joined(saved))
        lines.append(
            _line("momentum encoder", f"copy of the encoder: {lacking}" if lacking else "restored")
        )

    elif parts["momentum backbone"]:
        lines.append(_line("momentum encoder", "not used: the objective has none"))

    other = trouble or _other_classes(found, contents, classes)
    lines += _restore_head(method.objective, found, other, contents.get("images") == images)
    return lines


def _restore_head(
    objective: Objective, found: Sorted, trouble: str, same_images: bool
) -> list[str]:
    """Restore bank or class weights, unless there is a trouble with them."""
    parts = found.parts
    bank = {name: parts[f"bank {name}"].get("") for name in ("features", "labels", "ids")}
    has_bank = bank["features"] is not None and bank["labels"] is not None
    weights, biases = parts["class weights"].get(""), parts["class biases"].get("")
    if objective.bank is not None:
        lacking = trouble or _misfit_bank(objective.bank, bank)
        if not lacking:
            _restore_bank(objective.bank, bank, parts["bank pointer"], same_images)
        lines = [_line("memory bank", f"noise: {lacking}" if lacking else "restored")]
        if weights is not None:
            lines.append(_line("class weights", "not used: the objective has none"))
        return lines

    name = "class weights"
    if has_bank and not trouble:
        weights, biases = _prototypes(bank, objective), None
        name = "class weights, from the bank's prototypes"
    classifier: Any = objective.classifier
    state = {"weight": weights, "bias": biases}
    wanted = classifier.state_dict()
    lacking = trouble or ("the file has none" if weights is None else "")
    if not lacking and isinstance(objective, LinearSoftmax) and biases is None:
        lacking = "the file's are compared by cosine, without biases"
    if not lacking and not isinstance(objective, LinearSoftmax) and biases is not None:
        lacking = "the file's are of a linear classifier with biases"
    if not lacking:
        lacking = _misfit(classifier, {key: state[key] for key in wanted})
    if not lacking:
        classifier.load_state_dict({key: state[key] for key in wanted})
    return [_line(name, f"random: {lacking}" if lacking else "restored")]


def _line(part: str, fate: str) -> str:
    return f"  {part}: {fate}"


def _misfit(module: nn.Module, state: Mapping[str, Any]) -> str:
    """Return in which keys or shapes a state is not the module's; empty where it is."""
    wanted = module.state_dict()
    if not state:
        return "the file has none" if wanted else ""
    if not wanted:
        return "the run has none"
    missing, more = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    if missing or more:
        example = min(missing or more)
        return f"{len(missing)} keys missing, {len(more)} too many, such as {example}"
    for key, tensor in wanted.items():
        if state[key].shape != tensor.shape:
            return f"{key} is {tuple(state[key].shape)}, not {tuple(tensor.shape)}"
    return ""


def _joined(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{part}.{key}": value for part, state in parts.items() for key, value in state.items()}


def _other_classes(found: Sorted, contents: Mapping[str, Any], classes: Sequence[str]) -> str:
    """Return in what the file's classes differ from the run's, as far as it tells them."""
    names = contents.get("classes")
    if names is not None and list(names) != list(classes):
        return f"the file's {len(names)} classes are not the run's {len(classes)}"
    weights, labels = found.parts["class weights"].get(""), found.parts["bank labels"].get("")
    if weights is not None and len(weights) != len(classes):
        return f"the file has {len(weights)} classes, the run {len(classes)}"
    if names is None and labels is not None and len(labels):
        most = int(labels.max()) + 1
        # A bank does not tell how many classes there are; all but few have an entry.
        if not 0.5 * len(classes) < most <= len(classes):
            return f"the bank's labels go up to {most - 1}, the run has {len(classes)} classes"
    return ""


def _misfit_bank(bank: Bank, state: Mapping[str, Tensor | None]) -> str:
    features, labels = state["features"], state["labels"]
    if features is None or labels is None:
        return "the file has none"
    if features.shape != bank.features.shape or labels.shape != bank.labels.shape:
        return (
            f"the file's is {tuple(features.shape)}, the run's {tuple(bank.features.shape)}; see "
            "objective.bank_size"
        )
    return ""


def _restore_bank(
    bank: Bank, state: Mapping[str, Any], pointer: Mapping[str, Any], same_images: bool
) -> None:
    """Copy a bank; whose samples its entries are is known where the images are the same."""
    bank.features.copy_(state["features"])
    bank.labels.copy_(state["labels"])
    if same_images and state["ids"] is not None:
        bank.ids.copy_(state["ids"])
    position = next(iter(pointer.values()), 0)
    position = position["pointer"] if isinstance(position, Mapping) else int(position)
    bank.pointer = position % len(bank.labels)


def _prototypes(state: Mapping[str, Any], objective: Objective) -> Tensor:
    weights = objective.class_weights()
    assert weights is not None
    return class_means(state["features"].float(), state["labels"], len(weights))


def _license(path: Path, found: Sorted, contents: Mapping[str, Any]) -> str:
    """Return the licence that a file states, or NAVER's where the form is the official one."""
    if found.form == "official":
        return naver.LICENSE
    if found.form == "trainer":
        return str(contents.get("config", {}).get("license", ""))
    config = path.parent / "config.json"
    if path.name != "model.safetensors" or not config.is_file():
        return ""
    try:
        return json.loads(config.read_text())["pretrained_cfg"].get("license") or ""
    except (AttributeError, KeyError, TypeError, ValueError):
        return ""
