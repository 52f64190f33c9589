"""Cache of the features of an evaluation and of the scores computed from them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trex_models.atomic import write_text_file
from trex_models.data.sources import Source, digest
from trex_models.evaluation.extract import Extraction, as_text, feature_identity
from trex_models.evaluation.feature_file import load
from trex_models.evaluation.frozen_model import FrozenModel


@dataclass(frozen=True, kw_only=True)
class FeatureCache:
    """Cached features, ROOT/<architecture>-<hash>/<dataset>-<split>-<hash>.safetensors.

    See ``Extraction`` for the settings. File names are only for readability: a file is reused if
    its metadata match. Scores are cached in the same folders.
    """

    root: Path
    dtype: str = "float32"
    batch_size: int = 256
    workers: int = 0
    _identities: dict[tuple[str, int], Any] = field(default_factory=dict, repr=False)

    def features(self, model: FrozenModel, source: Source, title: str) -> np.ndarray:
        """Return memory-mapped features, (N, F); extract them first if they are not cached.

        ``title`` is the dataset and split, for the file name and the progress bar.
        """
        identity = self.identity(model, source)
        key = digest(as_text({**identity, "dtype": self.dtype}))
        path = self.folder(model) / f"{slug(title)}-{key[:12]}.safetensors"
        settings = partial(Extraction, dtype=self.dtype, batch_size=self.batch_size)
        extraction = partial(settings, model=model, source=source, path=path, identity=identity)
        extraction(title=title, workers=self.workers).run()
        return load(path).features

    def identity(self, model: FrozenModel, source: Source) -> dict[str, str]:
        """Return ``feature_identity``, remembered since it reads the sizes of all files."""
        key = as_text(model.identity()), id(source)
        if key not in self._identities:  # with the source, so that no other one gets its id
            self._identities[key] = feature_identity(model, source), source
        return dict(self._identities[key][0])

    def scores(
        self, model: FrozenModel, title: str, settings: Any, compute: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the scores cached for these settings; compute and cache them if there are none."""
        key = digest(as_text(settings))
        path = self.folder(model) / f"{title}-scores-{key[:12]}.json"
        try:
            cached = json.loads(path.read_text())
            if cached["key"] == key:
                return dict(cached["scores"])
        except (OSError, ValueError, TypeError, KeyError):  # none, or damaged
            pass
        scores = compute()
        try:
            write_text_file(path, json.dumps({"key": key, "scores": scores}, indent=2) + "\n")
        except OSError as error:  # the report contains the scores in any case
            print(f"      the scores were not cached for other runs ({error})", flush=True)
        return scores

    def folder(self, model: FrozenModel) -> Path:
        """Return the folder of a model's features."""
        name = slug(str(model.metadata["architecture"]))
        return self.root / f"{name}-{digest(as_text(model.identity()))[:12]}"


def slug(name: str) -> str:
    """Return a name as a file name: letters, digits, - _ and . only."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[-60:] or "model"
