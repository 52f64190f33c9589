"""Import of NAVER's files: download, record, check and convert them, and evaluate the models.

DIR/files/trex.pth ...          NAVER's files
DIR/converted/NAME.TAG          timm folders, for `python -m hub build`
DIR/reproduce/report.md         top-1 and the authors' results

NAVER publishes no hashes: those of the first download are recorded in the manifest, and different
files are refused from then on. Finished steps are not repeated.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from benchmarks.reproduce import released, stages
from benchmarks.reproduce.plan import Plan
from convert.official import convert_official
from trex_models.pretrained import checkpoints, naver
from trex_models.pretrained.download import download
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
    """Download, check and convert NAVER's files; with --imagenet, also evaluate the models.

    The evaluation is that of python -m benchmarks.reproduce --from-released on ImageNet only.

    Example: python -m hub import-naver --output DIR --imagenet IMAGENET

    Args:
        files: NAVER's names of the files, such as trex.pth. The default is all files.
        output: Folder for the files, the timm folders and the results.
        imagenet: Folder of ImageNet-1K with train and val, to measure the top-1 accuracy.
        manifest: Manifest that records the files; created if missing. The default is
            TREX_MODELS_MANIFEST or the file in the package.

    Returns:
        True if files that contain the same backbone agree, and all measured results are within
        their tolerance of the authors' results.
    """
    files, path = files or naver.ALL_FILES, manifest or manifest_path()
    for file in files:
        if file not in naver.ALL_FILES:
            raise ValueError(
                f"{file!r} is not a file of NAVER's; choose from {', '.join(naver.ALL_FILES)}"
            )
    converted = output / "converted"
    for folder in (output / "files", converted):
        folder.mkdir(parents=True, exist_ok=True)
    agree = True
    failures = []
    for file in files:
        local = output / "files" / file
        try:
            digest = _obtain(local, path)
        except WeightsError as error:
            failures.append(f"{error} (or copy it to {local} manually)")
            continue
        if _is_converted(file, digest, converted):
            print(f"{file}: already converted", flush=True)
        else:
            agree &= _convert(local, converted)
    if failures:
        raise WeightsError(f"{len(failures)} of {len(files)} files failed: {'; '.join(failures)}")
    if imagenet is None:
        return agree
    plan = Plan(
        scale_name="full",
        imagenet=imagenet.absolute(),
        data_root=None,
        output=output.absolute() / "reproduce",
        models=released.find(converted, output),
        skip=("estimate", "train", "transfer", "figure", "folders"),
    )
    return stages.run(plan) and agree


def _obtain(path: Path, manifest: Path) -> str:
    """Download a file unless it exists, check and record it, and return its SHA-256."""
    if path.exists():
        digest = _check(path, path.name, manifest)
        print(f"{path.name}: already downloaded, SHA-256 {digest}", flush=True)
        return digest
    part = path.with_name(f".{path.name}.part")
    try:
        remote = naver.remote_file(path.name)
        print(f"{path.name}: downloading {remote.url}", flush=True)
        download(remote, part)
        digest = _check(part, path.name, manifest)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    print(f"{path.name}: {path.stat().st_size} bytes, SHA-256 {digest}", flush=True)
    return digest


def _check(path: Path, file: str, manifest: Path) -> str:
    """Require the recorded hash; without a record, check the contents and record the hash."""
    recorded = load_manifest(manifest, missing_ok=True)
    digest = sha256(path)
    known = recorded.naver.get(file)
    if known is None:
        naver.check_contents(checkpoints.read(path), file)
        entries = recorded.naver | {file: digest}
        save_manifest(dataclasses.replace(recorded, naver=entries), manifest)
        print(f"{file}: all keys are as expected; recorded in {manifest}", flush=True)
    else:
        source = f"{manifest}; delete the file, or if NAVER has replaced it, remove that entry"
        check_sha256(path, digest, known, source)
    return digest


def _is_converted(file: str, digest: str, converted: Path) -> bool:
    """Return True if the report describes this file and the timm folders match the report."""
    report = converted / f"{Path(file).stem}.report.tsv"
    if not report.exists():
        return False
    lines = report.read_text().splitlines()
    paths = {name: converted / name / "model.safetensors" for name in _models(file)}
    return f"# sha256\t{digest}" in lines and all(
        path.exists()
        and path.with_name("config.json").exists()
        and f"# {name}\t{sha256(path)}" in lines
        for name, path in paths.items()
    )


def _convert(path: Path, converted: Path) -> bool:
    """Convert a file; return False if an earlier conversion resulted in different weights."""
    outputs = [converted / name / "model.safetensors" for name in _models(path.name)]
    before = {output: sha256(output) for output in outputs if output.exists()}
    convert_official(path, converted)
    different = [output.parent.name for output in before if sha256(output) != before[output]]
    for name in different:
        others = [file for file in naver.FILES[name] if file != path.name] or ["the same file"]
        print(
            f"WARNING: {name} from {path.name} differs from the earlier conversion of "
            f"{' or '.join(others)}; find out which one is correct before publishing",
            flush=True,
        )
    return not different


def _models(file: str) -> list[str]:
    return [name for name, files in naver.FILES.items() if file in files]
