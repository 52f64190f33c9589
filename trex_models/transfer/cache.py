"""Features of datasets, extracted once.

    ROOT/<architecture>-<hash>/<dataset>-<split>-<hash>.safetensors

The names are for people: a file is used only if its metadata are those asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trex_models.data.sources import Source, digest
from trex_models.evaluation.extract import Extraction, as_text, feature_identity
from trex_models.evaluation.feature_file import load
from trex_models.evaluation.frozen_model import FrozenModel


@dataclass(frozen=True, kw_only=True)
class FeatureCache:
    """A folder of features; its settings are those of ``Extraction``."""

    root: Path
    dtype: str = "float32"
    batch_size: int = 256
    workers: int = 0

    def features(
        self,
        model: FrozenModel,
        source: Source,
        title: str,
        identity: Mapping[str, str] | None = None,
    ) -> np.ndarray:
        """Return features, (N, F), mapped into memory, extracting them if they are missing.

        ``title`` names dataset and split in the file's name and the progress bar; ``identity`` is
        the result of ``feature_identity``, if it is known, since it reads every file's size.
        """
        identity = identity or feature_identity(model, source)
        key = digest(as_text({**identity, "dtype": self.dtype}))
        path = self.folder(model) / f"{_slug(title)}-{key[:12]}.safetensors"
        Extraction(
            model=model,
            source=source,
            path=path,
            identity=identity,
            title=title,
            dtype=self.dtype,
            batch_size=self.batch_size,
            workers=self.workers,
        ).run()
        return load(path).features

    def folder(self, model: FrozenModel) -> Path:
        """Return the folder of a model's features."""
        name = _slug(str(model.facts["architecture"]))
        return self.root / f"{name}-{digest(as_text(model.identity()))[:12]}"


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[-60:] or "model"
