"""Extract image features with any timm model into a file, and find nearest neighbors."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Literal

from trex_models import cli, plotting
from trex_models.data.decode import UnreadableImageError, with_skip_hint
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
    """Extract image features into a file. The same command resumes an interrupted extraction.

    Example: python -m trex_models.features extract images --model trex_resnet50 --output f.npy

    Args:
        paths: Folders, quoted glob patterns, images, or .txt files with one path per line.
        model: A timm model, hf-hub:OWNER/NAME, a timm folder, a run directory, or "pixels".
        output: Feature file to write, .safetensors or .npy.
        features: Pooled features of the backbone, embeddings after the projector, class logits,
            or the last feature map (dense).
        file: File with your own weights for the timm architecture --model.
        preprocessing: Resize the shorter side to the crop size (transfer), to 256 for a crop of
            224 (validation), or as in the model's configuration (model).
        precision: Floating-point precision of the model.
        dtype: Data type in the file. float16 halves its size and rounds by up to 5e-4.
        unreadable: Raise an error for unreadable images, or skip and list them.
        overwrite: Replace an existing file that differs from the requested one.
        device: Device of the model: auto, cpu, cuda, ...
        batch_size: Images per batch.
        workers: Number of loader workers.
    """
    cli.require_writable(output, *FORMATS)
    cli.require_at_least(1, batch_size=batch_size)
    cli.require_at_least(0, workers=workers)
    source, repeated = images.find_images(paths)
    if repeated:
        print(f"{repeated:,} duplicate image paths are ignored")
    frozen = FrozenModel.load(
        model,
        features=features,
        file=file,
        preprocessing=preprocessing,
        precision=precision,
        device=device,
        hint="" if file else "--file loads your own weights into a timm architecture",
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
        written = Extraction(
            model=frozen,
            source=source,
            path=output,
            identity=feature_identity(frozen, source, not skip, output=features, dtype=dtype),
            names=images.names(source),
            metadata=_metadata(frozen, preprocessing, file, source.root),
            dtype=dtype,
            batch_size=batch_size,
            workers=workers,
            skip=skip,
            overwrite=overwrite,
            remedy="choose another --output, or replace it with --overwrite",
        ).run()
    except UnreadableImageError as error:
        raise with_skip_hint(error, "--unreadable") from error
    print(f"wrote {output}" if written else f"{output} already contains these features")


def _metadata(frozen: FrozenModel, protocol: str, file: Path | None, root: Path) -> dict[str, str]:
    return {
        "format": "trex_models.features 1",
        "model": frozen.name,
        "file": str(file.resolve()) if file else "",
        **{key: str(frozen.metadata[key]) for key in ("architecture", "tag", "license")},
        "preprocessing": protocol,
        "root": str(root),
    }


def find_neighbors(
    feature_file: Path,
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
    """Find the nearest neighbors of images in a feature file, by cosine similarity.

    Example: python -m trex_models.features neighbors f.npy --query image.jpg --output nearest.png

    Args:
        feature_file: File written by the command "extract".
        query: Query images: names in the feature file, or paths of other images.
        output: Image to write, with queries and neighbors, .png, .svg or .pdf.
        k: Number of neighbors per query.
        json: Print JSON instead of text.
        model: New path of the model, if it was moved. Only needed for other query images.
        file: New path of your own weights (--file of "extract"), if they were moved.
        root: New path of the folder with the images of the feature file, if it was moved.
        device: Device of the model: auto, cpu, cuda, ...
    """
    cli.require_at_least(1, k=k)
    stored = load(feature_file)
    if output is not None:
        plotting.require_picture(output)
    rows = neighbors.find(stored, query, k, model=model, file=file, root=root, device=device)
    if json:
        entries = [{**row._asdict(), "path": str(row.path)} for row in rows]
        print(dumps(entries, indent=2))
    else:
        print(neighbors.format_neighbors(rows))
    if output is not None:
        folder = root or Path(stored.metadata["root"])
        title = f"nearest by cosine: {stored.metadata['output']} of {stored.metadata['model']}"
        plotting.save(neighbors.draw_neighbors(rows, folder, title), output)
        print(f"wrote {output}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
