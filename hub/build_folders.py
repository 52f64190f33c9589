"""Hub folders from timm folders: the same model with model card, license and attribution."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tyro.conf import Positional

from hub import cards, notices
from hub.hub_folder import EVAL_RESULTS, HubModel, inspect_folder
from hub.results import benchmark_yaml, match_reports, merge_results
from trex_models.pretrained import naver, timm_folder
from trex_models.pretrained.licenses import license_of

NAMESPACE = "trex-models"
Texts = dict[str, str]  # by file name

CHANGES = {
    "backbone": "Converted from PyTorch's format to safetensors. Names and values of the tensors "
    "are NAVER's.",
    "proj": "Extracted from the full training state, converted to safetensors, tensors renamed. "
    "The values of the tensors are NAVER's.",
    "cls": "Extracted from the full training state, converted to safetensors, tensors renamed. "
    "The classifier's weight is computed from the training state's memory bank: the "
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
    results: tuple[Path, ...] = (),
    benchmark: tuple[str, ...] = (),
) -> list[Path]:
    """Build Hub folders from timm folders. All models are checked before any folder is written.

    Your own models require --owner and a license; the command to publish them is printed.

    Example: python -m hub build RUN/export/backbone --output HUB --owner YOU --license mit

    Args:
        converted: Timm folder, or a folder of timm folders.
        output: Parent folder of the Hub folders.
        name: Name of the repository, for a single model. The default is the timm folder's name.
        owner: Owner of the weights. Required for your own models.
        license: License of your own model, as the Hub's identifier. The default is the license
            stated in the weights or in config.json.
        namespace: Organization or user on the Hub, for the examples in the model cards.
        results: Reports of the transfer evaluation, for the model cards. A report is used for the
            models that have the evaluated weights.
        benchmark: Datasets that are benchmarks on the Hub, as DATASET=OWNER/NAME/TASK_ID.
    """
    sources = _timm_folders(converted)
    if name is not None and len(sources) > 1:
        raise ValueError(
            f"--name requires one model, but {converted} has {len(sources)}; pass one timm folder"
        )
    models = [inspect_folder(source, name or source.resolve().name) for source in sources]
    matched = match_reports(models, results)
    checked = []
    for model in models:
        identifier = _license(model, owner, license)
        found = merge_results(matched[model.name], f"{namespace}/{model.name}")
        texts = {"README.md": cards.render(model, identifier, owner, namespace, found)}
        if benchmark:
            texts[EVAL_RESULTS] = benchmark_yaml(found, benchmark)
        checked.append((model, identifier, texts))
    with _name_folder(output):
        output.mkdir(parents=True, exist_ok=True)
    written = []
    for model, identifier, texts in checked:
        folder = output / model.name
        with _name_folder(folder):
            _write(model, identifier, owner, texts, folder)
        print(f"built {folder}")
        written.append(folder)
    if own := [str(folder) for folder in written if folder.name not in naver.FILES]:
        rebuild = "build again with --namespace YOU, then " * (namespace == NAMESPACE)
        print(
            f"to publish your models: {rebuild}python -m hub publish {shlex.join(own)} "
            f"--namespace {'YOU' if rebuild else namespace} --manifest manifest.json"
        )
    return written


@contextmanager
def _name_folder(folder: Path) -> Iterator[None]:
    """Name the folder in OSError messages."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # the message already has the folder
            raise
        raise OSError(
            f"{folder} cannot be written ({error.strerror}); fix this, or choose another --output"
        ) from error


def _timm_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; pass a timm folder or a folder of timm folders")
    if (path / "checkpoints").is_dir():
        known = [path / "export" / part for part in ("backbone", "cls", "proj")]
        found = [folder for folder in known if folder.is_dir()] or known[:2]
        raise ValueError(f"{path} is a run directory; pass {' or '.join(map(str, found))}")
    if (path / "config.json").exists():
        return [path]
    found = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not found:
        raise ValueError(
            f"{path} contains no timm folder; run python -m convert naver FILE --output {path}, "
            f"or python -m trex_models.train export RUN --output {path}"
        )
    return found


def _license(model: HubModel, owner: str | None, chosen: str | None) -> str:
    """Return the license's identifier: NAVER's, ``chosen``, or the one stated in the files."""
    if model.is_naver:
        if owner:
            raise ValueError(
                f"--owner {owner}: {model.name} is the name of weights owned by NAVER; remove "
                "--owner or choose another --name"
            )
        if chosen not in (None, naver.LICENSE):
            raise ValueError(
                f"--license {chosen}: the license of {model.name} must be {naver.LICENSE}, since "
                "the weights are NAVER's; remove --license"
            )
        return naver.LICENSE
    stated = license_of(model.folder) or model.license
    if stated and chosen and stated != chosen:
        raise ValueError(
            f"--license {chosen}: the weights in {model.folder} are licensed under {stated}; "
            f"remove --license, or export the model again with license {chosen}"
        )
    identifier = chosen or stated
    if not identifier:
        raise ValueError(
            f"{model.folder} states no license for {model.name}; choose one with --license "
            f"{' | '.join(notices.LICENSES)}"
        )
    notices.find_license(identifier)
    if not owner:
        raise ValueError(f"{model.folder}: NOTICE must name the weights' owner; add --owner NAME")
    return identifier


def _write(model: HubModel, identifier: str, owner: str | None, texts: Texts, folder: Path) -> None:
    config = dict(model.config)
    config["pretrained_cfg"] = config["pretrained_cfg"] | {"license": identifier}
    if model.is_naver:
        notice = notices.naver_notice(model.name, CHANGES[model.part])
    else:
        notice = notices.owner_notice(model.name, str(owner), identifier)
    with timm_folder.replaced_folder(folder) as new:
        shutil.copyfile(model.folder / "model.safetensors", new / "model.safetensors")
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (new / "LICENSE").write_text(notices.license_text(identifier))
        (new / "NOTICE").write_text(notice, encoding="utf-8")
        for file, text in texts.items():
            (new / file).parent.mkdir(exist_ok=True)
            (new / file).write_text(text, encoding="utf-8")
