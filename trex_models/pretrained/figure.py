"""ResNet-50s that the paper compares with t-ReX, from the files that their authors published.

Without the documented keys of other parts, and without its prefix, a file must have exactly the
keys, shapes and types of timm's resnet50, with finite values.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.data import IMAGENET_DEFAULT_STD
from torch import Tensor

from trex_models.atomic import cache_folder
from trex_models.pretrained import checkpoints
from trex_models.pretrained.checkpoints import CheckpointError
from trex_models.pretrained.download import CachedFile, RemoteFile, recorded
from trex_models.pretrained.manifest import WeightsError
from trex_models.pretrained.timm_folder import temporary_folder

ARCHITECTURE = "resnet50"
_LIMIT = 1000  # MB; some files contain a momentum encoder and the optimizer's state
_META = "https://dl.fbaipublicfiles.com"
_DINO = f"{_META}/dino/dino_resnet50_pretrain/dino_resnet50_pretrain.pth"
_SWAV = f"{_META}/deepcluster/swav_800ep_pretrain.pth.tar"
_SUPCON = "https://www.dropbox.com/s/l4a69ececk4spdt/supcon.pth?dl=1"
_MOCO = f"{_META}/moco-v3/r-50-1000ep/r-50-1000ep.pth.tar"
_OBOW_RELEASE = "https://github.com/valeoai/obow/releases/download/v0.1.0"
_OBOW = f"{_OBOW_RELEASE}/ImageNetFull_ResNet50_OBoW_full_feature_extractor.zip"
# Method, license, address of the file.
MODELS = {
    "dino_resnet50": ("DINO", "apache-2.0", _DINO),
    "swav_resnet50": ("SwAV", "cc-by-nc-4.0", _SWAV),
    "paws_resnet50": ("PAWS", "mit", f"{_META}/paws/paws_imgnt_10percent_300ep.pth.tar"),
    "supcon_resnet50": ("SupCon", "bsd-2-clause", _SUPCON),
    "mocov3_resnet50": ("MoCo v3", "cc-by-nc-4.0", _MOCO),
    "barlowtwins_resnet50": ("Barlow Twins", "mit", f"{_META}/barlowtwins/ljng/resnet50.pth"),
    "vicreg_resnet50": ("VICReg", "mit", f"{_META}/vicreg/resnet50.pth"),
    "obow_resnet50": ("OBoW", "apache-2.0 (mit in its README)", _OBOW),
}
_MOCO_PARTS = "module.base_encoder.fc.", "module.momentum_encoder.", "module.predictor."
# Entry with the state dict, prefix of the backbone's keys, prefixes of the keys of other parts.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "swav_resnet50": ("", "module.", "module.projection_head.", "module.prototypes."),
    "paws_resnet50": ("encoder", "module.", "module.fc.", "module.pred."),
    "supcon_resnet50": ("model", "module.encoder.", "module.head.0.", "module.head.2."),
    "mocov3_resnet50": ("state_dict", "module.base_encoder.", *_MOCO_PARTS),
    "obow_resnet50": ("network", "", "fc."),
}
_OTHERS = {"resnet50.a1_in1k": "RSB-A1", "trex_resnet50": "t-ReX", "trexstar_resnet50": "t-ReX*"}
TITLES = {name: title for name, (title, _, _) in MODELS.items()} | _OTHERS
FIGURE = (*list(MODELS)[:4], *_OTHERS)  # models of the paper's figure, in its order


def pretrained_cfg(name: str, pretrained: bool) -> dict[str, Any]:
    """Return timm's configuration of a model, with the path of its weights if ``pretrained``."""
    cached, (_, license_, url) = _cached_file(name), MODELS[name]
    interpolation = "bicubic" if name == "dino_resnet50" else "bilinear"
    std = (0.228, 0.224, 0.225) if name == "swav_resnet50" else IMAGENET_DEFAULT_STD
    cfg = {"num_classes": 0, "license": license_, "interpolation": interpolation, "std": std}
    if pretrained:
        cfg["file"] = str(fetch(name))
        cfg["origin_url"] = f"{url} ({cached.original.name}, SHA-256 {recorded(cached.record)[0]})"
    return cfg


def fetch(name: str) -> Path:
    """Return a verified safetensors file with a model's weights; download it at first use."""
    cached, (title, _, url) = _cached_file(name), MODELS[name]
    try:
        return cached.find() or cached.obtain(RemoteFile(url, title, _LIMIT), name)
    except Exception as error:  # zipfile raises many types for a damaged archive
        copy = f"to use a manual copy, download {url} to {cached.original}"
        raise WeightsError(f"{cached.original.name}: {error}; {copy}") from error


def is_available(name: str) -> bool:
    """Return True if a model's file was downloaded, or copied to the cache."""
    if name not in MODELS:  # timm's
        return isinstance(try_to_load_from_cache(f"timm/{name}", "model.safetensors"), str)
    cached = _cached_file(name)
    return cached.weights.exists() or cached.original.exists()


def _cached_file(name: str) -> CachedFile:
    folder, (_, license_, url) = cache_folder() / "figure", MODELS[name]
    file = Path(urlsplit(url).path).name.replace("resnet50.pth", f"{name}.pth")  # of two models
    read = partial(_read, layout=LAYOUTS.get(name, ("", "")))
    metadata = {"license": license_, "source": url}
    return CachedFile(folder / file, folder / f"{name}.safetensors", read, metadata)


def _read(path: Path, layout: tuple[str, ...]) -> dict[str, Tensor]:
    if zipfile.is_zipfile(path):  # OBoW's, or a checkpoint
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.filename.endswith(".pth.tar") and info.file_size <= _LIMIT * 10**6:
                    with temporary_folder(path.parent, path.name) as folder:
                        extracted = archive.extract(info, folder)
                        return _backbone(checkpoints.load_checkpoint(extracted), layout)
    return _backbone(checkpoints.load_checkpoint(path), layout)


def _backbone(contents: Mapping[str, Any], layout: tuple[str, ...]) -> dict[str, Tensor]:
    entry, prefix, *dropped = layout
    state = contents.get(entry) if entry else contents
    if not isinstance(state, Mapping):
        raise CheckpointError(f"the file must have a state dict under {entry!r}; use another file")
    with torch.device("meta"):
        own = timm.create_model(ARCHITECTURE, num_classes=0).state_dict()
    expected = {prefix + key: tensor for key, tensor in own.items()}
    kept = {key: state[key] for key in state if not str(key).startswith(tuple(dropped))}
    for key in expected.keys() & kept.keys():
        checkpoints.check_type(key, "backbone", kept[key])
    checkpoints.check_keys(kept, expected, ARCHITECTURE)
    checkpoints.check_finite({"": kept})
    # Copies, since safetensors refuses tensors that share memory.
    return {key: kept[prefix + key].clone(memory_format=torch.contiguous_format) for key in own}
