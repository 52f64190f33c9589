"""Image sources, multi-crop, augmentation and loading; see docs/library.md for examples."""

from trex_models.data.center_crop import CenterCrop
from trex_models.data.decode import UnreadableImageError
from trex_models.data.fractals import FractalSource
from trex_models.data.huggingface import HuggingFaceSource
from trex_models.data.image_files import CsvSource, FolderSource
from trex_models.data.loading import load_batches
from trex_models.data.multicrop import (
    TREX_CROPS,
    Batch,
    CropSpec,
    EpochSampler,
    MultiCrop,
    MultiCropDataset,
    augment,
)
from trex_models.data.photometric import (
    GLOBAL_AUGMENTATION,
    LOCAL_AUGMENTATION,
    PhotometricAugmentation,
)
from trex_models.data.sources import ArraySource, Source
from trex_models.data.tar_files import TarSource

__all__ = [
    "GLOBAL_AUGMENTATION",
    "LOCAL_AUGMENTATION",
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
    "PhotometricAugmentation",
    "Source",
    "TarSource",
    "UnreadableImageError",
    "augment",
    "load_batches",
]
