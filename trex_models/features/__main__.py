"""Extract features of images with any timm model into a file, and find nearest neighbors."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Literal

from trex_models import cli, plotting
from trex_models.evaluation.extract import Extraction, feature_identity
from trex_models.evaluation.feature_file import DTYPES, FORMATS, load
from trex_models.evaluation.frozen_model import FeaturesName, FrozenModel, Preprocessing
from trex_models.features import images, neighbors
from trex_models.precision import PrecisionName, free_cores

_WORKERS = min(free_cores(), 16)


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status: 0, or 2 with a short message on bad input."""
    return cli.main(
        {"extract": extract, "neighbors": find_neighbors},
        arguments,
        prog="python -m trex_models.features",
        description=__doc__,
        extra="features",
    )


def extract(
    paths: list[str],
    /,
    *,
    model: str,
    output: Path,
    features: FeaturesName = "backbone",
    file: Path | None = None,
    preprocessing: Preprocessing = "transfer",
    precision: PrecisionName = "fp32",
    dtype: Literal["float32", "float16"] = "float32",
    unreadable: Literal["raise", "skip"] = "raise",
    overwrite: bool = False,
    device: str = "auto",
    batch_size: int = 256,
    workers: int = _WORKERS,
) -> None:
    """Extract features of images into a file. The same command continues an interrupted one.

    Example: python -m trex_models.features extract images --model trex_resnet50 --output f.npy

    Args:
        paths: Folders, patterns in quotes, images, and .txt files with a path on each line.
        model: A timm model, a timm folder, a finished run, hf-hub:OWNER/NAME, or "pixels".
        output: The file of features, .safetensors or .npy.
        features: The model's output: pooled features before any projector, embeddings after it,
            class logits, or the last feature map.
        file: Your own weights for an architecture of timm.
        preprocessing: Resize the shorter side to the crop's, to 256 for 224 (validation), or as
            the model's own configuration says (model).
        precision: Number formats of the model.
        dtype: Type of the features in the file. float16 halves it and rounds by up to 5e-4.
        unreadable: Unreadable images are errors, or are skipped and listed.
        overwrite: Replace a file that holds something else.
        device: Device of the model: auto, cpu, cuda, ...
        batch_size: Images per batch.
        workers: Loader processes.
    """
    cli.require_writable(output, *FORMATS)
    cli.require_at_least(1, batch_size=batch_size)
    cli.require_at_least(0, workers=workers)
    source, repeated = images.find_images(paths)
    if repeated:
        print(f"{repeated:,} images are named more than once and count once")
    frozen = FrozenModel.load(
        model,
        features=features,
        file=file,
        preprocessing=preprocessing,
        precision=precision,
        device=device,
        hint="" if file else "--file gives an architecture of timm weights of your own",
    )
    count, size = len(source), DTYPES[dtype].itemsize * math.prod(frozen.shape)
    print(
        f"{count:,} images x {' x '.join(map(str, frozen.shape))} {dtype} ({features} of "
        f"{model}): {count * size / 1e6:,.2f} MB in {output}\n"
        f"license of the weights: {frozen.metadata['license']}",
        flush=True,
    )
    skip = unreadable == "skip"
    try:
        identity = feature_identity(frozen, source, not skip, output=features, dtype=dtype)
    except ValueError as error:
        raise ValueError(f"{error}, or skip them with --unreadable skip") from error
    written = Extraction(
        model=frozen,
        source=source,
        path=output,
        identity=identity,
        names=images.names(source),
        about=_about(frozen, preprocessing, file, source.root),
        dtype=dtype,
        batch_size=batch_size,
        workers=workers,
        skip=skip,
        overwrite=overwrite,
        remedy="choose another --output, or replace it with --overwrite",
    ).run()
    print(f"wrote {output}" if written else f"{output} is there already, of these images")


def _about(frozen: FrozenModel, protocol: str, file: Path | None, root: Path) -> dict[str, str]:
    """Return metadata, by which ``neighbors`` finds the model and the images again."""
    return {
        "format": "trex_models.features 1",
        "model": frozen.name,
        "file": str(file.resolve()) if file else "",
        **{key: str(frozen.metadata[key]) for key in ("architecture", "tag", "license")},
        "preprocessing": protocol,
        "root": str(root),
    }


def find_neighbors(
    file_of_features: Path,
    /,
    *,
    query: list[str],
    output: Path | None = None,
    k: int = 8,
    json: bool = False,
    model: str | None = None,
    file: Path | None = None,
    root: Path | None = None,
    device: str = "auto",
) -> None:
    """Find the images of a file of features that are nearest to others, by cosine similarity.

    Example: python -m trex_models.features neighbors f.npy --query image.jpg --output nearest.png

    Args:
        file_of_features: File that "extract" wrote.
        query: Names in the file, or images.
        output: Picture of queries and neighbors, .png, .svg or .pdf.
        k: Number of neighbors.
        json: Print JSON instead of a table.
        model: The file's model, if it was moved; it computes features of other images.
        file: Its weights, if they are your own and were moved.
        root: Folder of the file's images, if they were moved.
        device: Device of the model: auto, cpu, cuda, ...
    """
    cli.require_at_least(1, k=k)
    found = load(file_of_features)
    if output is not None:
        plotting.require_picture(output)
    rows = neighbors.find(found, query, k, model=model, file=file, root=root, device=device)
    if json:
        entries = [{**row._asdict(), "path": str(row.path)} for row in rows]
        print(dumps(entries, indent=2))
    else:
        print(neighbors.format_neighbors(rows))
    if output is not None:
        place = root or Path(found.metadata["root"])
        title = f"{found.metadata['model']}, {found.metadata['output']}: nearest by cosine"
        plotting.save(neighbors.draw_neighbors(rows, place, title), output)
        print(f"wrote {output}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
