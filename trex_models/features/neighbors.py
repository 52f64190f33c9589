"""Nearest neighbors of images in a feature file, by cosine similarity, and plots of them.

Shapes: N images in the file, M queries, F features, K neighbors.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from trex_models import plotting
from trex_models.data.decode import read_image
from trex_models.data.image_files import FileSource
from trex_models.evaluation.extract import as_text, extract_features
from trex_models.evaluation.feature_file import Features
from trex_models.evaluation.frozen_model import FrozenModel
from trex_models.evaluation.inputs import as_tensor
from trex_models.evaluation.knn import nearest_neighbors
from trex_models.features import images

_MODEL_KEYS = ("weights_sha256", "modules_sha256", "transform")
_CELL = 1.5  # inches
_SIDE = 220  # side of a thumbnail in pixels
_LINE, _LINES = 22, 3  # characters per line, lines per name


class Neighbors(NamedTuple):
    """Nearest neighbors of one query."""

    query: str
    """Name in the feature file, or path of another image."""
    path: Path
    names: list[str]
    """Names of the K neighbors, the nearest first."""
    similarities: list[float]


def find(
    stored: Features,
    queries: Sequence[str],
    k: int = 8,
    *,
    model: str | None = None,
    file: Path | None = None,
    root: Path | None = None,
    device: str = "cpu",
) -> list[Neighbors]:
    """Find nearest neighbors of queries, names in the feature file or paths of other images.

    An image is not its own neighbor. ``model``, ``file`` (its weights) and ``root`` (folder of the
    images) are only needed if they were moved.
    """
    if stored.features.ndim != 2:
        raise ValueError("neighbors require vectors, got maps; extract --features backbone")
    root = Path(images.absolute((root or Path(stored.metadata["root"])).expanduser()))
    rows = {name: row for row, name in enumerate(stored.names)}
    known = [_row(query, rows, root) for query in queries]
    new = [query for query, row in zip(queries, known, strict=True) if row is None]
    computed = iter(_compute(stored, new, model, file, device)) if new else iter(())
    vectors = [next(computed) if row is None else stored.features[row] for row in known]
    # Not copied: the file may be larger than the memory.
    references = as_tensor(stored.features)
    query_vectors = torch.from_numpy(np.stack(vectors).astype(np.float32))
    similarities, indices = nearest_neighbors(references, query_vectors, k + 1)
    answers = []
    for query, row, cosines, near in zip(
        queries, known, similarities.tolist(), indices.tolist(), strict=True
    ):
        kept = [(value, index) for value, index in zip(cosines, near, strict=True) if index != row]
        answers.append(
            Neighbors(
                query=query if row is None else stored.names[row],
                path=Path(query) if row is None else root / stored.names[row],
                names=[stored.names[index] for _, index in kept[:k]],
                similarities=[value for value, _ in kept[:k]],
            )
        )
    return answers


def _row(query: str, rows: dict[str, int], root: Path) -> int | None:
    if query in rows:
        return rows[query]
    path = Path(query).expanduser()
    if not path.is_file():
        example = next(iter(rows))
        raise ValueError(f"--query {query} is neither a name in the file ({example}) nor an image")
    path = Path(images.absolute(path))
    return rows.get(path.relative_to(root).as_posix()) if path.is_relative_to(root) else None


def _compute(
    stored: Features, queries: Sequence[str], name: str | None, file: Path | None, device: str
) -> np.ndarray:
    metadata: dict[str, Any] = stored.metadata
    if file is None and name is None and metadata["file"]:
        file = Path(metadata["file"])
    model = FrozenModel.load(
        name or metadata["model"],
        features=metadata["output"],
        file=file,
        preprocessing=metadata["preprocessing"],
        precision=metadata["precision"],
        device=device,
    )
    identity = model.identity()
    differing = [key for key in _MODEL_KEYS if as_text(identity[key]) != metadata[key]]
    if differing:
        raise ValueError(
            f"{model.name} differs from the model of the feature file in {', '.join(differing)}; "
            "pass that model with --model and --file, or extract the features again"
        )
    source = FileSource(Path.cwd(), list(queries), [0] * len(queries), ["queries"])
    return extract_features(model.model, source, model.transform, precision=model.precision.name)


def draw_neighbors(results: Sequence[Neighbors], root: Path, title: str) -> Any:
    """Draw one row per query: the query in a frame, then its neighbors in ``root``."""
    columns = 1 + max(len(row.names) for row in results)
    with plotting.new_figure(_CELL * columns + 0.3, (_CELL + 0.75) * len(results) + 0.5) as figure:
        figure.suptitle(plotting.shorten(title, 16 * columns), parse_math=False)
        for number, row in enumerate(results):
            nearest = zip(row.names, row.similarities, strict=True)
            cells = [(row.query, row.path, "query")]
            cells += [(name, root / name, f"{cosine:.3f}") for name, cosine in nearest]
            for column, (name, path, heading) in enumerate(cells, 1):
                axis = figure.add_subplot(len(results), columns, number * columns + column)
                color = plotting.GRAY if column > 1 else plotting.PALETTE[0]
                image = Image.fromarray(read_image(path))
                axis.imshow(ImageOps.pad(image, (_SIDE, _SIDE), color="white"))
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set(visible=column == 1, color=color, linewidth=2)
                text = plotting.shorten(images.printable(name), _LINE * _LINES)
                text = textwrap.fill(text, _LINE, break_on_hyphens=False)
                axis.set_xlabel(f"{heading}\n{text}", fontsize=7, color=color, parse_math=False)
    return figure


def format_neighbors(results: Sequence[Neighbors]) -> str:
    """Return each query and its neighbors as text, one per line."""
    lines = []
    for row in results:
        lines.append(images.printable(row.query))
        nearest = zip(row.names, row.similarities, strict=True)
        lines += [f"  {cosine:6.3f}  {images.printable(name)}" for name, cosine in nearest]
    return "\n".join(lines)
