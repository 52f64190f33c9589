"""From a configuration to the parts of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from trex_models.data.fractals import FractalSource
from trex_models.data.huggingface import HuggingFaceSource
from trex_models.data.image_files import CsvSource, FolderSource
from trex_models.data.multicrop import CropSpec, EpochSampler
from trex_models.data.photometric import GLOBAL_AUGMENTATION, LOCAL_AUGMENTATION
from trex_models.data.sources import Source
from trex_models.heads import Projector
from trex_models.machine import free_cores
from trex_models.train import checkpointing, preflight
from trex_models.train.backbone import build_backbone, full_args
from trex_models.train.bank import MemoryBank
from trex_models.train.config import Config, CropsConfig, DataConfig, ObjectiveConfig
from trex_models.train.distributed import Process
from trex_models.train.export import export
from trex_models.train.look import LOOK
from trex_models.train.method import Encoder, TReX
from trex_models.train.objectives import (
    CosineSoftmax,
    LinearSoftmax,
    Objective,
    OnlineClassMeans,
)
from trex_models.train.optimizer import learning_rates
from trex_models.train.recompute import recompute_activations
from trex_models.train.validation import Neighbors, ValidationDataset

_PATHS = {
    "folder": "the folder of class folders",
    "csv": "the CSV file",
    "huggingface": "the data set's folder or parquet file",
}


def open_source(data: DataConfig, classes: Sequence[str] | None = None) -> Source:
    """Open the images that a configuration names.

    Args:
        data: What to open.
        classes: Class names that the labels are to be counted by; None for the data set's own.

    Raises:
        ValueError: There is no path, or what it leads to will not do.
    """
    if data.source == "fractals":
        return FractalSource(
            data.num_classes, data.images_per_class, data.image_size, variation=data.variation
        )
    if not data.path:
        raise ValueError(
            f"data.path is not set; name {_PATHS[data.source]} by --data.path, or train on "
            "generated images by --data.source fractals"
        )
    if data.source == "csv":
        image_column, label_column = data.image_column or "path", data.label_column or "label"
        return CsvSource(data.path, image_column, label_column, classes)
    if data.source == "huggingface":
        return HuggingFaceSource(
            data.path, data.split, data.image_column, data.label_column, classes
        )
    if Path(data.path).is_file():
        raise ValueError(
            f"{data.path} is a file; a CSV file needs --data.source csv, a parquet file "
            "--data.source huggingface"
        )
    return FolderSource(data.path, classes)


def open_validation(config: Config, source: Source) -> ValidationDataset | None:
    """Open the images to validate on, if there are any.

    Raises:
        ValueError: The data is invalid, or has a class that the training images do not have.
    """
    data, validation = config.data, config.validation
    if data.source == "fractals":
        if not validation.images_per_class:
            return None
        held_out: Source = FractalSource(
            data.num_classes,
            validation.images_per_class,
            data.image_size,
            first_image=data.images_per_class,
            variation=data.variation,
        )
    elif validation.path or validation.split:
        data = replace(data, path=validation.path or data.path, split=validation.split)
        held_out = open_source(data, source.classes)
    else:
        return None
    return ValidationDataset(held_out, config.crops.global_size, data.skips_unreadable)


def build_neighbors(config: Config, source: Source) -> Neighbors | None:
    """Draw the training images that validation compares features with, if it does.

    Args:
        config: The configuration.
        source: The training images.
    """
    validation = config.validation
    if not validation.neighbors:
        return None
    drawn = np.random.default_rng(config.seed).permutation(len(source))
    dataset = ValidationDataset(source, config.crops.global_size, config.data.skips_unreadable)
    return Neighbors(dataset, drawn[: validation.neighbors_among], validation.neighbors)


def crop_specs(crops: CropsConfig) -> list[CropSpec]:
    """Return the crops of each resolution, globals first."""
    specs = [
        CropSpec(crops.global_crops, crops.global_size, crops.global_scale, GLOBAL_AUGMENTATION)
    ]
    if crops.local_crops:
        specs.append(
            CropSpec(crops.local_crops, crops.local_size, crops.local_scale, LOCAL_AUGMENTATION)
        )
    return specs


def build_sampler(config: Config, num_images: int, process: Process) -> EpochSampler:
    """Build the order of a run's batches.

    Raises:
        ValueError: The batch does not fit the data or the processes.
    """
    return EpochSampler(
        num_images,
        config.optim.batch_size,
        config.optim.epochs,
        config.seed,
        process.rank,
        process.world_size,
    )


def build_rates(config: Config, steps_per_epoch: int) -> np.ndarray:
    """Return the learning rate of every step."""
    optim = config.optim
    return learning_rates(
        peak=optim.base_lr * optim.batch_size / 256,
        final=optim.final_lr,
        warmup_steps=optim.warmup_epochs * steps_per_epoch,
        total_steps=optim.epochs * steps_per_epoch,
    )


def build_method(config: Config, num_classes: int) -> TReX:
    """Build the method with random weights, a function of the seed, on the CPU.

    Raises:
        ValueError: The backbone will not do, or cannot recompute its activations.
    """
    torch.manual_seed(config.seed)
    model, objective = config.model, config.objective
    sizes = [spec.size for spec in crop_specs(config.crops)]
    backbone, width = build_backbone(model.backbone, model.parsed_backbone_args(), sizes)
    projector: nn.Module = nn.Identity()
    if model.projector == "mlp":
        projector = Projector(width, model.hidden_layers, model.hidden_dim, model.embedding_dim)
        width = model.embedding_dim
    loss = _build_objective(objective, width, num_classes)
    method = TReX(Encoder(backbone, projector), loss, objective.ema_momentum)
    if config.system.checkpoint_activations:  # the momentum encoder's copy keeps none anyway
        recompute_activations(backbone, model.backbone)
    return method


def _build_objective(config: ObjectiveConfig, dim: int, num_classes: int) -> Objective:
    if config.name == "softmax":
        return LinearSoftmax(dim, num_classes)
    if config.name == "cosine":
        return CosineSoftmax(dim, num_classes, config.temperature)
    bank = MemoryBank(config.bank_entries, dim, num_classes)
    if config.name == "look":
        return LOOK(bank, config.temperature, config.neighbors)
    return OnlineClassMeans(bank, config.temperature)


def num_workers(config: Config) -> int:
    """Return the loader processes of each training process."""
    if config.system.workers is not None:
        return config.system.workers
    return min(8, max(1, free_cores() // local_processes()))


def local_processes() -> int:
    """Return the number of training processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check(
    config: Config,
    source: Source,
    validation: ValidationDataset | None,
    method: TReX,
    process: Process,
) -> list[str]:
    """Look for what would fail or go badly later; return warnings.

    Raises:
        ValueError: Something would fail; one line each.
    """
    specs, folder = crop_specs(config.crops), Path(config.output)
    sources = {"training": source}
    if validation is not None:
        sources["validation"] = validation.source
    skip = config.data.skips_unreadable
    share = config.optim.batch_size // process.world_size
    batch_bytes = share * sum(spec.count * 3 * spec.size**2 for spec in specs)
    if validation is not None:  # beside the crops that wait
        batch_bytes += share * 3 * config.crops.global_size**2
    checks: list[Callable[[], str | None]] = [
        *(
            lambda name=name, images=images: preflight.samples(name, images, skip)
            for name, images in sources.items()
        ),
        lambda: preflight.classes(source),
        lambda: preflight.shared_memory(batch_bytes, num_workers(config), local_processes()),
        lambda: preflight.cpu_bfloat16(
            config.precision, process.device, [spec.size for spec in specs]
        ),
    ]
    if size := config.objective.bank_entries:
        checks.append(lambda: preflight.bank(size, source.labels, len(source.classes)))
    if config.validation.neighbors and validation is None:
        raise ValueError(
            "validation.neighbors is set, but there are no images to validate on; name them by "
            "validation.path, validation.split or validation.images_per_class"
        )
    if process.is_main and config.system.tensorboard:
        checks.append(preflight.tensorboard)
    if process.is_main and config.output:
        # One more than are kept: the next is written before the oldest is deleted.
        more = max(1, checkpointing.KEPT + 1 - len(checkpointing.files(folder)))
        checks.append(lambda: preflight.disk_space(folder, method, more))
    return preflight.all_of(*checks)


def export_method(method: TReX, config: Config, classes: list[str], folder: Path) -> list[Path]:
    """Export a method that a configuration describes; return the exported folders.

    Args:
        method: On the CPU; put into eval mode.
        config: What it was built from.
        classes: Names of the classes.
        folder: Where to write, as ``export.export``.
    """
    model = config.model
    backbone_args = full_args(
        model.backbone, model.parsed_backbone_args(), config.crops.global_size
    )
    backbone_args.pop("zero_init_last", None)  # of initial weights alone
    return export(
        method,
        folder,
        backbone=model.backbone,
        backbone_args=backbone_args,
        head_args={
            "proj_layers": model.hidden_layers,
            "proj_hidden_dim": model.hidden_dim,
            "proj_dim": model.embedding_dim if model.projector == "mlp" else 0,
            "temperature": config.objective.temperature,
        },
        image_size=config.crops.global_size,
        classes=classes,
        weights_license=config.license,
    )
