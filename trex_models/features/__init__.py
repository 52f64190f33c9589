"""Features of images as files: ``python -m trex_models.features IMAGES --model M --out F``."""

from trex_models.features.file import Features, load

__all__ = ["Features", "load"]
