"""Feature files of images: ``python -m trex_models.features extract`` writes them."""

from trex_models.evaluation.feature_file import Features, load

__all__ = ["Features", "load"]
