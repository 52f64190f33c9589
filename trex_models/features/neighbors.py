"""Nearest neighbors of images in a file of features, by cosine similarity, and their picture.

Shapes: N images of the file, M queries, F features, K neighbors.
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

_DECISIVE = ("weights_sha256", "modules_sha256", "transform")
_CELL = 1.5  # inches
_SIDE = 220  # pixels of a thumbnail
_LINE, _LINES = 22, 3  # characters in a line, lines of a name


class Neighbors(NamedTuple):
    """Neighbors of one query."""

    query: str
    """Name in the file, or path of another image."""
    path: Path
    names: list[str]
    """K names, the nearest first."""
    similarities: list[float]


def find(
    found: Features,
    queries: Sequence[str],
    k: int = 8,
    *,
    model: str | None = None,
    file: Path | None = None,
    root: Path | None = None,
    device: str = "cpu",
) -> list[Neighbors]:
    """Find the images nearest to queries: names in the file, or images, which its model computes.

    An image is not its own neighbor. ``model``, its weights' ``file`` and the images' ``root`` are
    needed if they were moved.
    """
    if found.features.ndim != 2:
        raise ValueError("neighbors need vectors, not maps: extract --features backbone")
    root = Path(images.absolute((root or Path(found.metadata["root"])).expanduser()))
    rows = {name: row for row, name in enumerate(found.names)}
    known = [_row(query, rows, root) for query in queries]
    new = [query for query, row in zip(queries, known, strict=True) if row is None]
    computed = iter(_compute(found, new, model, file, device)) if new else iter(())
    vectors = [next(computed) if row is None else found.features[row] for row in known]
    # A copy would take as much memory as the file is long.
    mapped = as_tensor(found.features)
    wanted = torch.from_numpy(np.stack(vectors).astype(np.float32))
    similarities, indices = nearest_neighbors(mapped, wanted, k + 1)
    answers = []
    for query, row, cosines, near in zip(
        queries, known, similarities.tolist(), indices.tolist(), strict=True
    ):
        kept = [(value, index) for value, index in zip(cosines, near, strict=True) if index != row]
        answers.append(
            Neighbors(
                query=query if row is None else found.names[row],
                path=Path(query) if row is None else root / found.names[row],
                names=[found.names[index] for _, index in kept[:k]],
                similarities=[value for value, _ in kept[:k]],
            )
        )
    return answers


def _row(query: str, rows: dict[str, int], root: Path) -> int | None:
    """Return a query's row; None for an image that the file does not hold."""
    if query in rows:
        return rows[query]
    path = Path(query).expanduser()
    if not path.is_file():
        example = next(iter(rows))
        raise ValueError(f"--query {query} is neither a name (such as {example}) nor an image")
    placed = Path(images.absolute(path))
    return rows.get(placed.relative_to(root).as_posix()) if placed.is_relative_to(root) else None


def _compute(
    found: Features, queries: Sequence[str], name: str | None, file: Path | None, device: str
) -> np.ndarray:
    """Return features of new images, (M, F), by the file's model."""
    about: dict[str, Any] = found.metadata
    if file is None and name is None and about["file"]:
        file = Path(about["file"])
    model = FrozenModel.load(
        name or about["model"],
        features=about["output"],
        file=file,
        preprocessing=about["preprocessing"],
        precision=about["precision"],
        device=device,
    )
    identity = model.identity()
    differing = [key for key in _DECISIVE if as_text(identity[key]) != about[key]]
    if differing:
        raise ValueError(
            f"{model.name} is not the model that made the features (other {', '.join(differing)}); "
            "name theirs with --model and --file, or extract the features again"
        )
    source = FileSource(Path.cwd(), list(queries), [0] * len(queries), ["queries"])
    return extract_features(model.model, source, model.transform, precision=model.precision.name)


def draw_neighbors(found: Sequence[Neighbors], root: Path, title: str) -> Any:
    """Draw a row per query: the query in a frame, then its neighbors, which are below ``root``."""
    columns = 1 + max(len(row.names) for row in found)
    with plotting.new_figure(_CELL * columns + 0.3, (_CELL + 0.75) * len(found) + 0.5) as figure:
        figure.suptitle(plotting.shorten(title, 16 * columns), parse_math=False)
        for number, row in enumerate(found):
            nearest = zip(row.names, row.similarities, strict=True)
            cells = [(row.query, row.path, "query")]
            cells += [(name, root / name, f"{cosine:.3f}") for name, cosine in nearest]
            for place, (name, path, heading) in enumerate(cells, 1):
                axis = figure.add_subplot(len(found), columns, number * columns + place)
                color = plotting.GRAY if place > 1 else plotting.PALETTE[0]
                image = Image.fromarray(read_image(path))
                axis.imshow(ImageOps.pad(image, (_SIDE, _SIDE), color="white"))
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set(visible=place == 1, color=color, linewidth=2)
                text = plotting.shorten(images.printable(name), _LINE * _LINES)
                text = textwrap.fill(text, _LINE, break_on_hyphens=False)
                axis.set_xlabel(f"{heading}\n{text}", fontsize=7, color=color, parse_math=False)
    return figure


def format_neighbors(found: Sequence[Neighbors]) -> str:
    """Return the same as text: a query, then its neighbors, a line each."""
    lines = []
    for row in found:
        lines.append(images.printable(row.query))
        nearest = zip(row.names, row.similarities, strict=True)
        lines += [f"  {cosine:6.3f}  {images.printable(name)}" for name, cosine in nearest]
    return "\n".join(lines)
