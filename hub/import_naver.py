"""Import NAVER's files: fetch, record, check and convert them, and measure the models.

DIR/files/trex.pth ...          NAVER's files
DIR/converted/NAME.TAG          timm folders, for `python -m hub build`
DIR/imagenet.json               top-1 next to the authors' figures

NAVER publishes no hashes: the first maintainer's are recorded in the manifest, and another file is
refused from then on. Finished steps are not repeated.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from convert.official import convert_official
from hub.imagenet import format_results, measure
from trex_models.pretrained import checkpoints, naver
from trex_models.pretrained.manifest import (
    WeightsError,
    check_sha256,
    load_manifest,
    manifest_path,
    save_manifest,
    sha256,
)


def import_naver(
    files: Positional[tuple[str, ...]] = (),
    *,
    output: Path,
    imagenet: Path | None = None,
    manifest: Path | None = None,
) -> bool:
    """Fetch, record, check and convert NAVER's files; measure the models if there are images.

    Example: python -m hub import-naver --output DIR --imagenet IMAGENET

    Args:
        files: Files by NAVER's names, such as trex.pth; all by default.
        output: Folder for the files, the timm folders and the results.
        imagenet: ImageNet-1K's folder, with val and train, to measure top-1.
        manifest: Manifest to record the files in, created if it is missing; by default
            TREX_MODELS_MANIFEST or the package's own.

    Returns:
        Whether files that hold the same backbone agree, and all that was measured is within its
        tolerance of the authors' figures.
    """
    files, path = files or naver.ALL_FILES, manifest or manifest_path()
    for file in files:
        if file not in naver.ALL_FILES:
            raise ValueError(
                f"NAVER has no file {file!r}; choose from {', '.join(naver.ALL_FILES)}"
            )
    converted = output / "converted"
    if imagenet is not None and not (imagenet / "val").is_dir():
        raise ValueError(f"{imagenet} has no folder val; give ImageNet's, with val (and train)")
    for folder in (output / "files", converted):
        folder.mkdir(parents=True, exist_ok=True)
    agree = True
    failures = []
    for file in files:
        place = output / "files" / file
        try:
            digest = _obtain(place, path)
        except WeightsError as error:
            failures.append(f"{error} (or place it at {place} by hand)")
            continue
        if _is_converted(file, digest, converted):
            print(f"{file}: converted already", flush=True)
        else:
            agree &= _convert(place, converted)
    if failures:
        raise WeightsError(f"{len(failures)} of {len(files)} files: {'; '.join(failures)}")
    if imagenet is None:
        return agree
    results = measure(converted, imagenet, output)
    print(f"\n{format_results(results)}")
    return agree and all(result["within_tolerance"] for result in results.values())


def _obtain(path: Path, manifest: Path) -> str:
    """Download a file unless it is there; check and record it; return its SHA-256."""
    if path.exists():
        digest = _check(path, path.name, manifest)
        print(f"{path.name}: here already, SHA-256 {digest}", flush=True)
        return digest
    part = path.with_name(f".{path.name}.part")
    try:
        print(f"{path.name}: downloading {naver.url(path.name)}", flush=True)
        naver.download(path.name, part)
        digest = _check(part, path.name, manifest)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    print(f"{path.name}: {path.stat().st_size} bytes, SHA-256 {digest}", flush=True)
    return digest


def _check(path: Path, file: str, manifest: Path) -> str:
    """Require the recorded hash; without one, the right contents, and record it."""
    recorded = load_manifest(manifest, missing_ok=True)
    digest = sha256(path)
    known = recorded.naver.get(file)
    if known is None:
        naver.check_contents(checkpoints.read(path), file)
        entries = recorded.naver | {file: digest}
        save_manifest(dataclasses.replace(recorded, naver=entries), manifest)
        print(f"{file}: all keys are as expected; recorded in {manifest}", flush=True)
    else:
        source = f"{manifest}; delete the file; if NAVER has really replaced it, remove that line"
        check_sha256(path, digest, known, source)
    return digest


def _is_converted(file: str, digest: str, converted: Path) -> bool:
    """Return whether the report is of this file, and the folders are those that it lists."""
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
    """Convert a file; return whether an earlier file gave the same models, if it gave any."""
    places = [converted / name / "model.safetensors" for name in _models(path.name)]
    before = {place: sha256(place) for place in places if place.exists()}
    convert_official(path, converted)
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
