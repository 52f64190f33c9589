"""Folder of a model on the Hub: list of its files and checks of their contents."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from timm.models import model_entrypoint

from hub.notices import ORIGIN
from trex_models.cli import first_line
from trex_models.pretrained import naver

TIMM_FILES = ("config.json", "model.safetensors")
FILES = (*TIMM_FILES, "README.md", "LICENSE", "NOTICE")
EVAL_RESULTS = ".eval_results/trex_models.yaml"  # optional
_ENTRIES = ("architecture", "num_classes", "num_features", "pretrained_cfg")
_LOCAL_PATH = re.compile(
    r"/|~|\.{1,2}/|file:|[A-Za-z]:[\\/]|(?!https?://).*\.(bin|ckpt|pt|pth|safetensors|tar)$"
)


@dataclass(frozen=True)
class HubModel:
    """A model in a timm folder."""

    name: str
    """Name of the repository; for NAVER's weights, model and tag, such as trex_resnet50.in1k."""
    folder: Path
    config: dict[str, Any]
    part: str
    """Output of the model: backbone (features), proj (embeddings) or cls (logits)."""
    is_stock: bool
    """True if timm can build the model without trex_models."""
    absent_classes: tuple[int, ...] = ()
    """Classes with a prototype of zeros."""

    @property
    def is_naver(self) -> bool:
        """True for NAVER's weights."""
        return self.name in naver.FILES

    @property
    def license(self) -> str | None:
        """Hub identifier of the license stated in config.json."""
        return self.config["pretrained_cfg"].get("license")


def load_folder(folder: Path, pretrained: bool = True) -> Any:
    """Load a model from a timm folder, in eval mode."""
    return timm.create_model(f"local-dir:{folder}", pretrained=pretrained).eval()


def inspect_folder(folder: Path, name: str) -> HubModel:
    """Check a timm folder or a Hub folder and describe its model.

    Args:
        folder: Timm folder or Hub folder; files not in FILES or EVAL_RESULTS are refused.
        name: Name of the repository.

    Raises:
        ValueError: A file is missing or unexpected, config.json cannot be published, or the
            weights are not finite or do not load in timm.
    """
    try:
        validate_repo_id(f"owner/{name}")
    except HFValidationError as error:
        raise ValueError(f"{name!r} is not a valid repository name: {error}") from error
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())
    for file in found:
        if file not in (*FILES, EVAL_RESULTS):
            raise ValueError(
                f"{folder / file} is not a file of a Hub folder ({', '.join(FILES)}); move it to "
                "another folder"
            )
    for file in TIMM_FILES:
        if file not in found:
            raise ValueError(f"{folder} has no {file}; convert or export the model again")
    config = _read_config(folder / "config.json")
    absent = _check_weights(folder / "model.safetensors")
    try:
        network = load_folder(folder)
    except Exception as error:  # timm, torch and safetensors raise many types
        raise ValueError(
            f"timm cannot load {folder} ({first_line(error)}); convert or export the model again"
        ) from error
    is_stock = model_entrypoint(config["architecture"]).__module__.startswith("timm.")
    part = "cls" if network.num_classes else "backbone" if is_stock else "proj"
    model = HubModel(name, folder, config, part, is_stock, absent)
    _check_ownership(model)
    return model


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = dict(json.loads(path.read_text()))
        missing = [entry for entry in _ENTRIES if entry not in config]
        if "input_size" not in config["pretrained_cfg"]:
            missing.append("pretrained_cfg.input_size")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a model configuration ({type(error).__name__}: {error}); convert or "
            "export the model again"
        ) from error
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}; convert or export the model again")
    for key, text in _strings(config, ""):
        if _LOCAL_PATH.match(text):
            raise ValueError(f"{path}: {key} is a local path, {text!r}; remove it")
    if "num_classes" in config.get("model_args", {}):
        raise ValueError(
            f"{path}: transformers refuses num_classes in model_args; remove that entry, since "
            "num_classes is also at the top level"
        )
    return config


def _strings(value: Any, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield prefix, value
    elif isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            yield from _strings(part, f"{prefix}.{key}".lstrip("."))


def _check_weights(path: Path) -> tuple[int, ...]:
    """Require finite values; return the classes with a prototype of zeros."""
    absent: tuple[int, ...] = ()
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  # not a dict
                tensor = file.get_tensor(key)
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise ValueError(
                        f"{path}: {key} has non-finite values; do not publish this model"
                    )
                if key == "fc.weight":
                    absent = tuple((~tensor.any(1)).nonzero().flatten().tolist())
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}); convert again") from error
    return absent


def _check_ownership(model: HubModel) -> None:
    """Require that the names and the origin_url of NAVER's weights occur only together."""
    architecture, classes = model.config["architecture"], model.config["num_classes"]
    path = model.folder / "config.json"
    if not model.is_naver:
        if model.config["pretrained_cfg"].get("origin_url") == ORIGIN:
            raise ValueError(
                f"{path}: origin_url says that the weights are NAVER's, but {model.name!r} is not "
                f"one of their names ({', '.join(naver.FILES)}); use one for NAVER's own "
                f"weights, and publish derived ones by hand, with attribution and {naver.LICENSE}"
            )
        return
    if model.is_stock and classes != 0:
        raise ValueError(
            f"{path}: num_classes of a backbone must be 0, got {classes}; export it again"
        )
    base, _, tag = model.name.partition(".")
    expected = base if base.endswith(("_proj", "_cls")) else "resnet50"
    if architecture != expected:
        raise ValueError(
            f"{path}: architecture of {model.name} must be {expected!r}, got {architecture!r}; "
            "convert NAVER's file again"
        )
    if model.license not in (None, naver.LICENSE):
        raise ValueError(
            f"{path}: license of NAVER's weights must be {naver.LICENSE}, got {model.license!r}; "
            "convert NAVER's file again"
        )
    cfg = model.config["pretrained_cfg"]
    if (cfg.get("origin_url"), cfg.get("tag")) != (ORIGIN, tag):
        raise ValueError(
            f"{path}: {model.name} is a name of NAVER's weights, but origin_url or tag do not "
            "match them; choose another --name or convert NAVER's file"
        )
