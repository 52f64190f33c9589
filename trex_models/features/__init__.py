"""Features of images as files: ``python -m trex_models.features extract``."""

from trex_models.evaluation.feature_file import Features, load

__all__ = ["Features", "load"]
