"""Timm folders to Hub folders: the same model with its card, its licence and its attribution."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub import cards, licenses
from hub.folder import Model, inspect
from hub.imagenet import read_results
from trex_models import folders, naver
from trex_models.licenses import license_of
from trex_models.manifest import sha256

NAMESPACE = "trex-models"

CHANGES = {
    "backbone": "Converted from PyTorch's format to safetensors. Names and values of the tensors "
    "are NAVER's.",
    "proj": "Taken out of the full training state, converted to safetensors, with other names of "
    "the tensors. Their values are NAVER's.",
    "cls": "Taken out of the full training state, converted to safetensors, with other names of "
    "the tensors. The classifier's weight is computed from the state's memory bank: the "
    "L2-normalised sum of each class's embeddings. The other values are NAVER's.",
}


@dataclass(frozen=True)
class Owner:
    """Whose weights they are that are not NAVER's."""

    name: str | None = None
    license: str | None = None
    """By the Hub's identifier; None for what config.json states."""


def build(
    converted: Path,
    output: Path,
    *,
    name: str | None = None,
    owner: Owner | None = None,
    namespace: str = NAMESPACE,
    results: Path | None = None,
) -> list[Path]:
    """Write a Hub folder for each model.

    All are checked before the first is written; each is written beside its place and moved there.

    Args:
        converted: A timm folder, or a folder of them.
        output: Where to write the Hub folders.
        name: Of the repository, for one timm folder; None for the folder's name.
        owner: Of the models that are not NAVER's.
        namespace: Organisation or user on the Hub, for the examples in the cards.
        results: The imagenet.json of ``import-naver``, for the cards; None for none.

    Returns:
        The Hub folders.

    Raises:
        ValueError: There is no model, one is not fit to be published, its licence or owner is
            unknown, or the results are another file's.
        OSError: A folder cannot be written, by name.
    """
    sources = _timm_folders(converted)
    if name is not None and len(sources) > 1:
        raise ValueError(
            f"{converted} holds {len(sources)} models, but --name names one; give the folder of one"
        )
    models = [inspect(source, name or source.resolve().name) for source in sources]
    owner = owner or Owner()
    identifiers = [_license(model, owner) for model in models]
    measured = [_measured(model, results) for model in models]
    rendered = [
        cards.render(model, identifier, owner.name, namespace, figures)
        for model, identifier, figures in zip(models, identifiers, measured, strict=True)
    ]
    with _explained(output):
        output.mkdir(parents=True, exist_ok=True)
    written = []
    for model, identifier, card in zip(models, identifiers, rendered, strict=True):
        with _explained(output / model.name):
            written.append(_write(model, identifier, owner, card, output / model.name))
    return written


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Say which folder the system does not let be written, such as on a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # it is explained already
            raise
        raise OSError(
            f"{folder} cannot be written ({error.strerror}); free space there, or choose another "
            "--output"
        ) from error


def _timm_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; give a timm folder, or a folder of them")
    if (path / "checkpoints").is_dir():
        known = [path / "export" / part for part in ("backbone", "cls", "proj")]
        found = [folder for folder in known if folder.is_dir()] or known[:2]
        raise ValueError(f"{path} is a training run; give {' or '.join(map(str, found))}")
    if (path / "config.json").exists():
        return [path]
    found = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not found:
        raise ValueError(
            f"{path} holds no model; make some: python -m convert naver FILE {path}, or "
            "python -m trex_models.train export RUN --output DIR"
        )
    return found


def _license(model: Model, owner: Owner) -> str:
    """Return the licence's identifier: NAVER's, or what the owner chose, never a default."""
    if model.is_naver:
        if owner.name:
            raise ValueError(
                f"--owner {owner.name}: {model.name} is the name of weights of NAVER's; leave "
                "--owner out, or choose another --name"
            )
        if owner.license not in (None, naver.LICENSE):
            raise ValueError(
                f"--license {owner.license}: the licence of {model.name} is {naver.LICENSE}, "
                "because the weights are NAVER's; leave --license out"
            )
        return naver.LICENSE
    stated = license_of(model.folder) or model.license
    if stated and owner.license and stated != owner.license:
        raise ValueError(
            f"--license {owner.license}: the weights of {model.folder} are under {stated}; leave "
            "--license out, or export the model again with the other one"
        )
    chosen = owner.license or stated
    if not chosen:
        raise ValueError(
            f"{model.folder}: no licence is stated for {model.name}; choose one: --license "
            f"{' | '.join(licenses.LICENSES)}"
        )
    licenses.find(chosen)
    if not owner.name:
        raise ValueError(f"{model.folder}: whose weights are these? --owner NAME, for NOTICE")
    return chosen


def _measured(model: Model, results: Path | None) -> dict[str, Any] | None:
    if results is None:
        return None
    found = read_results(results).get(model.name)
    if found and found["sha256"] != sha256(model.folder / "model.safetensors"):
        raise ValueError(
            f"{results}: {model.name} was measured with another model.safetensors than that of "
            f"{model.folder}; measure again"
        )
    return found


def _write(model: Model, identifier: str, owner: Owner, card: str, folder: Path) -> Path:
    config = dict(model.config)
    config["pretrained_cfg"] = config["pretrained_cfg"] | {"license": identifier}
    if model.is_naver:
        notice = licenses.naver_notice(model.name, CHANGES[model.part])
    else:
        notice = licenses.owner_notice(model.name, str(owner.name), identifier)
    with folders.replaced(folder) as beside:
        shutil.copyfile(model.folder / "model.safetensors", beside / "model.safetensors")
        (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (beside / "LICENSE").write_text(licenses.license_text(identifier))
        (beside / "NOTICE").write_text(notice, encoding="utf-8")
        (beside / "README.md").write_text(card, encoding="utf-8")
    return folder
