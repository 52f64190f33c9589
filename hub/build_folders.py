"""Build Hub folders from timm folders: the same model with its card, license and attribution."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from hub import cards, notices
from hub.hub_folder import Model, inspect_folder
from hub.imagenet import read_results
from trex_models.pretrained import naver, timm_folder
from trex_models.pretrained.licenses import license_of
from trex_models.pretrained.manifest import sha256

NAMESPACE = "trex-models"

CHANGES = {
    "backbone": "Converted from PyTorch's format to safetensors. Names and values of the tensors "
    "are NAVER's.",
    "proj": "Taken out of the full training state, converted to safetensors, with other names of "
    "the tensors. Their values are NAVER's.",
    "cls": "Taken out of the full training state, converted to safetensors, with other names of "
    "the tensors. The classifier's weight is computed from the state's memory bank: the "
    "L2-normalized sum of each class's embeddings. The other values are NAVER's.",
}


def build_folders(
    converted: Positional[Path],
    output: Path,
    *,
    name: str | None = None,
    owner: str | None = None,
    license: str | None = None,  # noqa: A002 - the option's name
    namespace: str = NAMESPACE,
    results: Path | None = None,
) -> list[Path]:
    """Build Hub folders from timm folders. All are checked before the first is written.

    Models of your own need --owner and a license; how to publish them is printed.

    Example: python -m hub build RUN/export/backbone --output HUB --owner YOU --license mit

    Args:
        converted: A timm folder, or a folder of them.
        output: Folder for the Hub folders.
        name: Name of the repository, for one timm folder; by default the folder's.
        owner: Owner of the weights, for models of your own.
        license: License of a model of your own, by the Hub's identifier; by default the one that
            the weights or config.json state.
        namespace: Organization or user on the Hub, for the examples in the cards.
        results: The imagenet.json of import-naver, for the cards.

    Returns:
        The Hub folders.
    """
    sources = _timm_folders(converted)
    if name is not None and len(sources) > 1:
        raise ValueError(
            f"{converted} holds {len(sources)} models, but --name names one; give the folder of one"
        )
    checked = []
    for source in sources:
        model = inspect_folder(source, name or source.resolve().name)
        identifier = _license(model, owner, license)
        card = cards.render(model, identifier, owner, namespace, _measured(model, results))
        checked.append((model, identifier, card))
    with _explained(output):
        output.mkdir(parents=True, exist_ok=True)
    written = []
    for model, identifier, card in checked:
        folder = output / model.name
        with _explained(folder):
            _write(model, identifier, owner, card, folder)
        print(f"built {folder}")
        written.append(folder)
    if own := [str(folder) for folder in written if folder.name not in naver.FILES]:
        again = ", once built again with --namespace YOU" * (namespace == NAMESPACE)
        print(
            f"publish your own{again}: python -m hub publish {shlex.join(own)} "
            f"--namespace {'YOU' if again else namespace} --manifest manifest.json"
        )
    return written


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Name the folder in errors of the system, such as a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # explained already
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
            f"{path} holds no model; make some: python -m convert naver FILE --output {path}, "
            f"or python -m trex_models.train export RUN --output {path}"
        )
    return found


def _license(model: Model, owner: str | None, chosen: str | None) -> str:
    """Return the license's identifier: NAVER's, or what the owner chose, never a default."""
    if model.is_naver:
        if owner:
            raise ValueError(
                f"--owner {owner}: {model.name} is the name of weights of NAVER's; leave --owner "
                "out, or choose another --name"
            )
        if chosen not in (None, naver.LICENSE):
            raise ValueError(
                f"--license {chosen}: the license of {model.name} is {naver.LICENSE}, because the "
                "weights are NAVER's; leave --license out"
            )
        return naver.LICENSE
    stated = license_of(model.folder) or model.license
    if stated and chosen and stated != chosen:
        raise ValueError(
            f"--license {chosen}: the weights of {model.folder} are under {stated}; leave "
            "--license out, or export the model again with the other one"
        )
    identifier = chosen or stated
    if not identifier:
        raise ValueError(
            f"{model.folder}: no license is stated for {model.name}; choose one: --license "
            f"{' | '.join(notices.LICENSES)}"
        )
    notices.find_license(identifier)
    if not owner:
        raise ValueError(f"{model.folder}: whose weights are these? --owner NAME, for NOTICE")
    return identifier


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


def _write(model: Model, identifier: str, owner: str | None, card: str, folder: Path) -> None:
    config = dict(model.config)
    config["pretrained_cfg"] = config["pretrained_cfg"] | {"license": identifier}
    if model.is_naver:
        notice = notices.naver_notice(model.name, CHANGES[model.part])
    else:
        notice = notices.owner_notice(model.name, str(owner), identifier)
    with timm_folder.replaced_folder(folder) as fresh:
        shutil.copyfile(model.folder / "model.safetensors", fresh / "model.safetensors")
        (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (fresh / "LICENSE").write_text(notices.license_text(identifier))
        (fresh / "NOTICE").write_text(notice, encoding="utf-8")
        (fresh / "README.md").write_text(card, encoding="utf-8")
