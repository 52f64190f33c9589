"""Extract features of images with any timm model, into one file.

    python -m trex_models.features IMAGES... --model NAME_OR_DIR --out FILE.safetensors|FILE.npy
    python -m trex_models.features neighbours FILE --query IMAGE_OR_NAME... [--out PICTURE.png]

IMAGES are folders, patterns in quotes, images, and .txt files with a path a line. The same command
goes on where one was interrupted. The second finds the images nearest to others.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trex_models import plotting
from trex_models.cli import default_device, natural, positive, require_writable, run
from trex_models.features import images, neighbours, outputs, picture
from trex_models.features.extract import Plan, extract
from trex_models.features.file import FORMATS, KIND, load
from trex_models.features.outputs import OUTPUTS
from trex_models.machine import free_cores
from trex_models.transfer.cache import DTYPES
from trex_models.transfer.encoders import PRECISIONS, PREPROCESSING


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status: 0, or 2 with a short message on bad input."""
    if arguments[:1] == ["neighbours"]:
        return run(_neighbours, arguments[1:], "features")
    return run(_extract, arguments or ["--help"], "features")


def _extract(arguments: Sequence[str]) -> None:
    options = _extraction_parser().parse_args(arguments)
    require_writable(options.out, *FORMATS)
    found = images.find(options.images)
    if found.repeated:
        print(f"{found.repeated:,} images are named more than once and count once")
    encoder, shape = outputs.load(
        options.model,
        options.output,
        file=options.file,
        prepare=options.preprocessing,
        precision=options.precision,
        device=options.device,
    )
    count, size = len(found.source), DTYPES[options.dtype].itemsize * math.prod(shape)
    print(
        f"{count:,} images x {' x '.join(map(str, shape))} {options.dtype} ({options.output} of "
        f"{options.model}): {count * size / 1e6:,.2f} MB in {options.out}\n"
        f"licence of the weights: {encoder.facts['license']}",
        flush=True,
    )
    plan = Plan(
        out=options.out,
        dtype=options.dtype,
        batch_size=options.batch_size,
        workers=options.workers,
        skip=options.unreadable == "skip",
        overwrite=options.overwrite,
    )
    about = {
        "format": KIND,
        "model": options.model,
        "file": str(options.file.resolve()) if options.file else "",
        "architecture": str(encoder.facts["architecture"]),
        "tag": str(encoder.facts["tag"]),
        "license": str(encoder.facts["license"]),
        "output": options.output,
        "preprocessing": options.preprocessing,
    }
    written = extract(encoder, shape, found, plan, about)
    print(f"wrote {options.out}" if written else f"{options.out} is there already, of these images")


def _extraction_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trex_models.features",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGES", help="folder, pattern, image, or .txt list")
    add("--model", required=True, help="timm model, folder of one, finished run, or hf-hub:...")
    add("--out", type=Path, required=True, help=f"the file, {' or '.join(FORMATS)}")
    add("--output", default="backbone", choices=OUTPUTS, help="what of the model (backbone)")
    add("--file", type=Path, help="weights of your own for the model")
    add("--dtype", default="float32", choices=DTYPES, help="how they are kept (float32)")
    add("--unreadable", default="raise", choices=("raise", "skip"), help="images (raise)")
    add("--overwrite", action="store_true", help="replace other features in the file")
    add("--preprocessing", default="transfer", choices=PREPROCESSING, help="(transfer)")
    add("--precision", default="fp32", choices=PRECISIONS, help="(fp32)")
    add("--device", default=default_device(), help="where the model runs (%(default)s)")
    add("--batch-size", type=positive, default=256, help="images at a time (256)")
    cores = min(free_cores(), 16)
    add("--workers", type=natural, default=cores, help="loader processes (%(default)s)")
    return parser


def _neighbours(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m trex_models.features neighbours")
    add = parser.add_argument
    add("features", type=Path, help="file of features")
    add("--query", nargs="+", required=True, help="names of the file, or images")
    add("--out", type=Path, help="picture, .png, .svg or .pdf")
    add("-k", type=positive, default=8, help="neighbours (8)")
    add("--json", action="store_true", help="print JSON, not a table")
    add("--model", help="where the model is, for images that the file does not hold")
    add("--file", type=Path, help="where its weights are, of a model with --file")
    add("--root", type=Path, help="where the file's images are, if they were moved")
    add("--device", default=default_device(), help="where the model runs (%(default)s)")
    options = parser.parse_args(arguments)
    found = load(options.features)
    if options.out is not None:
        plotting.require_picture(options.out)
    rows = neighbours.find(
        found,
        options.query,
        options.k,
        model=options.model,
        file=options.file,
        root=options.root,
        device=options.device,
    )
    if options.json:
        entries: list[Any] = [{**asdict(row), "path": str(row.path)} for row in rows]
        print(json.dumps(entries, indent=2))
    else:
        print(picture.table(rows))
    if options.out is not None:
        root = options.root or Path(found.metadata["root"])
        title = f"{found.metadata['model']}, {found.metadata['output']}: nearest by cosine"
        plotting.save(picture.draw(rows, root, title), options.out)
        print(f"wrote {options.out}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
