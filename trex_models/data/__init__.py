"""Images: sources, decoding, the crop law, photometric augmentation, loading.

The names below are stable; docs/library.md shows their use.
"""

from trex_models.data.center_crop import CenterCrop
from trex_models.data.csv_file import CsvSource
from trex_models.data.decode import UnreadableImageError
from trex_models.data.folder import FolderSource
from trex_models.data.fractals import FractalSource
from trex_models.data.huggingface import HuggingFaceSource
from trex_models.data.loading import load_batches
from trex_models.data.multicrop import (
    TREX_CROPS,
    Batch,
    CropSpec,
    EpochSampler,
    MultiCropDataset,
    augment,
)
from trex_models.data.photometric import GLOBAL_LAW, LOCAL_LAW, PhotometricLaw
from trex_models.data.sources import ArraySource, Source
from trex_models.data.transform import MultiCrop

__all__ = [
    "GLOBAL_LAW",
    "LOCAL_LAW",
    "TREX_CROPS",
    "ArraySource",
    "Batch",
    "CenterCrop",
    "CropSpec",
    "CsvSource",
    "EpochSampler",
    "FolderSource",
    "FractalSource",
    "HuggingFaceSource",
    "MultiCrop",
    "MultiCropDataset",
    "PhotometricLaw",
    "Source",
    "UnreadableImageError",
    "augment",
    "load_batches",
]
