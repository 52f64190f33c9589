"""NAVER's files, once and for all: fetched, recorded, checked, converted, and measured.

DIR/files/trex.pth ...          NAVER's files
DIR/converted/NAME.TAG          timm folders, for `python -m hub build`
DIR/imagenet.json               top-1 beside the authors' figures

NAVER publishes no hashes: the first maintainer's are recorded in the manifest, and another file is
refused from then on. What is finished is not done again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from convert.naver import convert
from hub.imagenet import CLASSES, measure, table
from hub.publish import load_or_new
from trex_models import checkpoints, manifest, naver
from trex_models.manifest import WeightsError, sha256

FILES = tuple(dict.fromkeys(file for files in naver.FILES.values() for file in files))


def import_naver(
    output: Path,
    files: Sequence[str] = FILES,
    *,
    manifest_path: Path,
    imagenet: Path | None = None,
    classes: Sequence[str] = CLASSES,
) -> bool:
    """Fetch, record, check and convert files; measure the models where there are images.

    Args:
        output: Where everything goes.
        files: By NAVER's names.
        manifest_path: The manifest to record them in; made if it is missing.
        imagenet: ImageNet-1K's folder; None to measure nothing.
        classes: Names of the class folders in the order of the labels.

    Returns:
        Whether all is as it should be: files that hold the same backbone agree, and what was
        measured is within its tolerance of the authors' figures.

    Raises:
        ValueError: A name is none of NAVER's, or a file or an image is not what it should be.
        WeightsError: A file cannot be had, or is not the recorded one.
    """
    for file in files:
        if file not in FILES:
            raise ValueError(f"NAVER has no file {file!r}; choose from {', '.join(FILES)}")
    converted = output / "converted"
    if imagenet is not None and not (imagenet / "val").is_dir():
        raise ValueError(f"{imagenet} has no folder val; give ImageNet's, with val (and train)")
    for folder in (output / "files", converted):
        folder.mkdir(parents=True, exist_ok=True)
    agree = True
    failures = []
    for file in files:
        path = output / "files" / file
        try:
            digest = _obtain(path, manifest_path)
        except WeightsError as error:
            failures.append(f"{error} (or place it at {path} by hand)")
            continue
        if _is_converted(file, digest, converted):
            print(f"{file}: converted already", flush=True)
        else:
            agree &= _convert(path, converted)
    if failures:
        raise WeightsError(f"{len(failures)} of {len(files)} files: {'; '.join(failures)}")
    if imagenet is None:
        return agree
    results = measure(converted, imagenet, output, classes)
    print(f"\n{table(results)}")
    return agree and all(result["within_tolerance"] for result in results.values())


def _obtain(path: Path, manifest_path: Path) -> str:
    """Make a file be there, whole, checked and recorded; return its SHA-256."""
    if path.exists():
        digest = _check(path, path.name, manifest_path)
        print(f"{path.name}: here already, SHA-256 {digest}", flush=True)
        return digest
    part = path.with_name(f".{path.name}.part")
    try:
        print(f"{path.name}: downloading {naver.url(path.name)}", flush=True)
        naver.download(path.name, part)
        digest = _check(part, path.name, manifest_path)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    print(f"{path.name}: {path.stat().st_size} bytes, SHA-256 {digest}", flush=True)
    return digest


def _check(path: Path, file: str, manifest_path: Path) -> str:
    """Require the recorded hash; without one, the right contents, and record it."""
    recorded = load_or_new(manifest_path)
    digest = sha256(path)
    known = recorded.naver.get(file)
    if known is None:
        naver.check_contents(checkpoints.read(path), file)
        entries = recorded.naver | {file: digest}
        manifest.save(dataclasses.replace(recorded, naver=entries), manifest_path)
        print(f"{file}: every key is as it should be; recorded in {manifest_path}", flush=True)
    elif digest != known:
        raise WeightsError(
            f"refused: the SHA-256 of {path} is {digest}, not {known} of {manifest_path}; delete "
            "the file and try again; if NAVER has really replaced it, remove that line"
        )
    return digest


def _is_converted(file: str, digest: str, converted: Path) -> bool:
    """Tell whether the report is of this file, and the folders are what it says was written."""
    report = converted / f"{Path(file).stem}.report.tsv"
    if not report.exists():
        return False
    lines = report.read_text().splitlines()
    places = {name: converted / name / "model.safetensors" for name in _models(file)}
    return f"# sha256\t{digest}" in lines and all(
        place.exists()
        and place.with_name("config.json").exists()
        and f"# {name}\t{sha256(place)}" in lines
        for name, place in places.items()
    )


def _convert(path: Path, converted: Path) -> bool:
    """Convert a file; return whether what an earlier one gave as the same models is the same."""
    places = [converted / name / "model.safetensors" for name in _models(path.name)]
    before = {place: sha256(place) for place in places if place.exists()}
    convert(path, converted)
    different = [place.parent.name for place in before if sha256(place) != before[place]]
    for name in different:
        print(
            f"WARNING: {name} from {path.name} is not what it was before, from "
            f"{' or '.join(file for file in naver.FILES[name] if file != path.name) or 'it'}: "
            "find out which is right before publishing either",
            flush=True,
        )
    return not different


def _models(file: str) -> list[str]:
    return [name for name, files in naver.FILES.items() if file in files]
