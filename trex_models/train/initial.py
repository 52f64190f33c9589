"""Weights to start from: what of a checkpoint fits a run is taken on, the rest is told.

Shapes: C classes, D embedding, Q bank size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trex_models import checkpoints, naver
from trex_models.checkpoints import CheckpointError
from trex_models.heads import class_means
from trex_models.train import checkpointing
from trex_models.train.bank import MemoryBank
from trex_models.train.method import TReX
from trex_models.train.objectives import LinearSoftmax, Objective


@dataclass(frozen=True)
class _File:
    """What a file holds.

    Args:
        path: Where it is.
        form: official, trainer or model.
        parts: Weights by the parts of ``checkpoints.TABLE``.
        classes: Names of its classes, if it tells them.
        images: Digest of the images that it was trained on, if it tells it.
        license: Of the weights; empty if it does not tell it.
    """

    path: Path
    form: str
    parts: dict[str, dict[str, Any]]
    classes: list[str] | None
    images: str | None
    license: str

    def value(self, part: str) -> Any:
        """Return the only value of a part; None where the file has none."""
        return next(iter(self.parts[part].values()), None)

    @property
    def has_bank(self) -> bool:
        """Whether there is a memory bank."""
        return self.value("bank features") is not None and self.value("bank labels") is not None


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
    file = _open(path)
    try:
        lines = [f"from {file.path}:", *_restore(method, file, classes, images)]
        state = method.state_dict()
        checkpoints.check_finite({k: v for k, v in state.items() if isinstance(v, Tensor)})
    except CheckpointError as error:
        raise ValueError(f"init_from: {file.path}: {error}") from error
    return lines, file.license


def license_of_result(chosen: str, inherited: str) -> str:
    """Return the licence of what is trained from other weights.

    Args:
        chosen: What the run's owner wants; empty for no wish.
        inherited: Of the weights that the run started from; empty for none.

    Raises:
        ValueError: The weights are NAVER's, whose licence asks for the same one.
    """
    if inherited == naver.LICENSE and chosen not in ("", naver.LICENSE):
        raise ValueError(
            f"license: the weights that the run starts from are under {naver.LICENSE}, and so is "
            f"what is trained from them, not under {chosen}; leave --license out"
        )
    return chosen or inherited


def _open(path: Path) -> _File:
    if (path / "checkpoints").is_dir():
        newest = checkpointing.newest(path, lambda _, error: print(error))
        if newest is None:
            raise ValueError(f"init_from: {path} holds no checkpoint yet; name another one")
        path, contents = newest
    else:
        if path.is_dir() and not (path / "model.safetensors").is_file():
            raise ValueError(
                f"init_from: {path} is neither a run's folder nor a timm folder with "
                "model.safetensors; name one of these, or a checkpoint file"
            )
        if not path.exists():
            raise ValueError(f"init_from: {path} does not exist; name a checkpoint, or a run")
        path = path / "model.safetensors" if path.is_dir() else path
        try:
            contents = dict(checkpoints.load(path))
        except CheckpointError as error:
            raise ValueError(f"init_from: {error}") from error
    try:
        form, parts, _ = checkpoints.sort(contents)
    except CheckpointError as error:
        raise ValueError(f"init_from: {path}: {error}") from error
    if form == "trainer":
        license_of_weights = str(contents.get("config", {}).get("license", ""))
        return _File(
            path, form, parts, contents.get("classes"), contents.get("images"), license_of_weights
        )
    cfg = _pretrained_cfg(path)
    license_of_weights = cfg.get("license") or _stated_license(path)
    known = {file for files in naver.FILES.values() for file in files}
    if form == "official" or path.name in known:
        license_of_weights = naver.LICENSE
    return _File(path, form, parts, cfg.get("label_names"), None, license_of_weights)


def _pretrained_cfg(path: Path) -> dict[str, Any]:
    """Return timm's description beside a model.safetensors, empty where there is none."""
    config = path.with_name("config.json")
    if path.name != "model.safetensors" or not config.is_file():
        return {}
    try:
        return dict(json.loads(config.read_text())["pretrained_cfg"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"init_from: {config} is no model's configuration ({type(error).__name__}: {error}); "
            "export the model again, or name a file that stands alone"
        ) from error


def _stated_license(path: Path) -> str:
    """Return the licence in a safetensors file's metadata; converted files of NAVER's have it."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("license", "")
    except (OSError, SafetensorError):
        return ""


def _restore(method: TReX, file: _File, classes: Sequence[str], images: str) -> list[str]:
    """Copy into the method what fits; return a line for each part."""
    encoder = method.encoder
    _take_head_out_of_backbone(encoder.backbone, file)
    if not file.parts["backbone"]:
        raise CheckpointError("it holds no backbone; name another file")
    misfit = _misfit(encoder.backbone, file.parts["backbone"])
    if misfit:
        raise CheckpointError(
            f"its backbone is not the run's ({misfit}); set model.backbone to the file's"
        )
    encoder.backbone.load_state_dict(file.parts["backbone"])
    lines = [_line("backbone")]

    misfit = _misfit(encoder.projector, file.parts["projector"])
    if not misfit:
        encoder.projector.load_state_dict(file.parts["projector"])
    if encoder.projector.state_dict() or file.parts["projector"]:
        lines.append(_line("projector", misfit and f"random: {misfit}"))
    # What lies behind the projector is of no use without it.
    lost = misfit and "the projector was not restored"
    lines += _restore_momentum_encoder(method, file, lost)
    lost = lost or _other_classes(file, classes)
    lines += _restore_head(method.objective, file, lost, file.images == images)
    if lines[-1].endswith(": restored") and file.classes is None:
        lines.append(
            f"  classes: the file does not name them; they must be the run's {len(classes)} in "
            "their order"
        )
    return lines


def _take_head_out_of_backbone(backbone: nn.Module, file: _File) -> None:
    """Move timm's own classifier to the class weights; the table knows the name fc alone."""
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
    """Restore the bank or the class weights, unless they are lost for a reason."""
    if objective.bank is None:
        name = "class weights"
        if file.has_bank:
            name += ", from the bank's prototypes"
        has_any = file.has_bank or file.value("class weights") is not None
        misfit = "" if has_any else "the file has none"
        misfit = misfit or lost or _restore_class_weights(objective, file)
        return [_line(name, misfit and f"random: {misfit}")]
    lines = []
    if file.value("class weights") is not None:
        lines.append(_line("class weights", "not used: the objective has none"))
    misfit = "" if file.has_bank else "the file has none"
    misfit = misfit or lost or _restore_bank(objective.bank, file, same_images)
    return [*lines, _line("memory bank", misfit and f"noise: {misfit}")]


def _restore_class_weights(objective: Any, file: _File) -> str:
    """Copy the class weights; return why not, where they do not fit."""
    classifier, weights = objective.classifier, file.value("class weights")
    biases = file.value("class biases")
    if file.has_bank:
        features, labels = file.value("bank features"), file.value("bank labels")
        weights = class_means(features.float(), labels, len(classifier.weight))
    if isinstance(objective, LinearSoftmax) and biases is None:
        return "the file's are compared by cosine, without biases"
    if not isinstance(objective, LinearSoftmax) and biases is not None:
        return "the file's are of a linear classifier with biases"
    found = {"weight": weights} | ({} if biases is None else {"bias": biases})
    misfit = _misfit(classifier, found)
    if not misfit:
        classifier.load_state_dict(found)
    return misfit


def _restore_bank(bank: MemoryBank, file: _File, same_images: bool) -> str:
    """Copy the bank; return why not, where it does not fit."""
    features, labels = file.value("bank features"), file.value("bank labels")
    if features.shape != bank.features.shape or labels.shape != bank.labels.shape:
        return (
            f"the file's is {tuple(features.shape)}, the run's {tuple(bank.features.shape)}; see "
            "objective.bank_size"
        )
    bank.features.copy_(features)
    bank.labels.copy_(labels)
    ids, pointer = file.value("bank ids"), file.value("bank pointer")
    if same_images and ids is not None:  # else they are of unknown samples
        bank.ids.copy_(ids)
    pointer = pointer["pointer"] if isinstance(pointer, Mapping) else int(pointer or 0)
    bank.pointer = pointer % len(bank.labels)
    return ""


def _other_classes(file: _File, classes: Sequence[str]) -> str:
    """Return in what the file's classes differ from the run's, as far as it tells them."""
    if file.classes is not None:
        odd = sorted(set(file.classes) ^ set(classes))
        if odd or list(file.classes) != list(classes):
            example = f", such as {odd[0]}" if odd else ": in another order"
            return (
                f"the file's {len(file.classes)} classes are not the run's {len(classes)}{example}"
            )
        return ""
    weights, labels = file.value("class weights"), file.value("bank labels")
    if weights is not None and weights.shape[:1] != (len(classes),):
        return f"the file's are {tuple(weights.shape)}, the run has {len(classes)} classes"
    if labels is not None and labels.numel():
        # A bank does not tell how many classes there are; but for ImageNet's 1000, the last one
        # must have an entry.
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(classes) or high + 1 < len(classes) != 1000:
            return f"the bank's labels go up to {high}, the run has {len(classes)} classes"
    return ""


def _line(part: str, otherwise: str = "") -> str:
    return f"  {part}: {otherwise or 'restored'}"


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
