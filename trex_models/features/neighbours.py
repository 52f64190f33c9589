"""The nearest neighbours of images among those of a file of features, by cosine similarity.

Shapes: N images of the file, M queries, F features, K neighbours.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from trex_models.data.image_files import FileSource
from trex_models.evaluation.features import extract_features
from trex_models.evaluation.knn import nearest_neighbors
from trex_models.features import images, outputs
from trex_models.features.file import Features
from trex_models.transfer.cache import as_text
from trex_models.transfer.encoders import PRECISIONS

_DECISIVE = ("weights_sha256", "modules_sha256", "transform")


@dataclass(frozen=True)
class Neighbours:
    """Of one query."""

    query: str
    """A name of the file, or the path of another image."""
    path: Path
    """Where the query lies."""
    names: list[str]
    """K names, the nearest first."""
    similarities: list[float]
    """K cosines."""


def find(
    found: Features,
    queries: Sequence[str],
    k: int = 8,
    *,
    model: str | None = None,
    file: Path | None = None,
    root: Path | None = None,
    device: str = "cpu",
) -> list[Neighbours]:
    """Find the images nearest to queries; an image is no neighbour of its own.

    Args:
        found: A file of features, one vector an image.
        queries: Names of the file, or paths of images. Of a path that the file does not hold the
            features are computed by the file's model.
        k: How many; fewer where the file holds fewer.
        model: Where that model is, if not where it was.
        file: Where its weights are, if they are a file elsewhere.
        root: Where the file's images are, if not where they were.
        device: Where that model runs.

    Raises:
        ValueError: A query is neither, the model is not that of the file, or the features are maps
            or not finite.
    """
    if found.features.ndim != 2:
        raise ValueError(
            f"neighbours are of vectors, but the file holds maps {found.features.shape[1:]}; "
            "extract --output backbone"
        )
    root = Path(images.absolute((root or Path(found.metadata["root"])).expanduser()))
    rows = {name: row for row, name in enumerate(found.names)}
    known = [_row(query, rows, root) for query in queries]
    new = [query for query, row in zip(queries, known, strict=True) if row is None]
    computed = iter(_compute(found, new, model, file, device)) if new else iter(())
    vectors = [next(computed) if row is None else found.features[row] for row in known]
    with warnings.catch_warnings():
        # Nothing writes to it, and a copy takes as much memory as the file is long.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        mapped = torch.from_numpy(found.features)
    wanted = torch.from_numpy(np.stack(vectors).astype(np.float32))
    similarities, indices = nearest_neighbors(mapped, wanted, k + 1)
    answers = []
    for query, row, cosines, near in zip(
        queries, known, similarities.tolist(), indices.tolist(), strict=True
    ):
        kept = [(value, index) for value, index in zip(cosines, near, strict=True) if index != row]
        answers.append(
            Neighbours(
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
        raise ValueError(
            f"--query {query} is neither a name of the file (such as {next(iter(rows))}) nor an "
            "image; correct it"
        )
    placed = Path(images.absolute(path.expanduser()))
    return rows.get(placed.relative_to(root).as_posix()) if placed.is_relative_to(root) else None


def _compute(
    found: Features, queries: Sequence[str], model: str | None, file: Path | None, device: str
) -> np.ndarray:
    """Return features of new images, (M, F), by the file's model."""
    about = found.metadata
    if file is None and model is None and about["file"]:
        file = Path(about["file"])
    encoder, _ = outputs.load(
        model or about["model"],
        about["output"],
        file=file,
        prepare=about["preprocessing"],
        precision=about["precision"],
        device=device,
    )
    identity = encoder.identity()
    differing = [key for key in _DECISIVE if as_text(identity[key]) != about[key]]
    if differing:
        raise ValueError(
            f"{encoder.name} is not the model that made the features (other "
            f"{', '.join(differing)}); name theirs by --model, and by --file where its weights "
            "are your own, or extract the features again"
        )
    source = FileSource(Path.cwd(), list(queries), [0] * len(queries), ["queries"])
    autocast = PRECISIONS[encoder.precision]
    return extract_features(encoder.model, source, encoder.transform, autocast=autocast)
