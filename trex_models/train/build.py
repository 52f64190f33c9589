"""The parts of a run, each built from its section of the configuration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from trex_models.cli import first_line
from trex_models.data.fractals import FractalSource
from trex_models.data.huggingface import HuggingFaceSource
from trex_models.data.image_files import CsvSource, FolderSource, open_unlabeled
from trex_models.data.loading import NUM_BUFFERS
from trex_models.data.multicrop import CropSpec, EpochSampler, MultiCropDataset
from trex_models.data.sources import Source
from trex_models.data.tar_files import TarSource
from trex_models.distributed import Process
from trex_models.evaluation.frozen_model import FrozenModel
from trex_models.heads import Projector
from trex_models.method import objectives, optimizer
from trex_models.method.backbone import build_backbone, recompute_activations
from trex_models.method.bank import MemoryBank
from trex_models.method.model import Encoder, TReX
from trex_models.precision import free_cores
from trex_models.train.config import (
    Config,
    CropsConfig,
    DataConfig,
    ObjectiveConfig,
    OptimConfig,
    SystemConfig,
)
from trex_models.train.validation import Neighbors, ValidationDataset


def open_source(data: DataConfig, classes: Sequence[str] | None = None) -> Source:
    """Open the dataset that a configuration names; ``classes`` lists them in label order."""
    if data.source == "fractals":
        sizes = data.num_classes, data.images_per_class, data.image_size
        return FractalSource(*sizes, variation=data.variation)
    if not data.path:
        known = {"csv": "the CSV file", "huggingface": "the dataset's folder or parquet file"}
        known |= {"images": "a folder of images", "tar": "a tar file or a folder of tar files"}
        raise ValueError(
            f"--data.path is not set; pass {known.get(data.source, 'a folder of class folders')}, "
            "or train on generated images with --data.source fractals"
        )
    if data.source == "images":
        return open_unlabeled(data.path)
    image_column, label_column = data.image_column, data.label_column
    if data.source == "csv":
        return CsvSource(data.path, image_column or "path", label_column or "label", classes)
    if data.source == "huggingface":
        return HuggingFaceSource(data.path, data.split, image_column, label_column, classes)
    if data.source == "tar":
        return TarSource(data.path, classes)
    if Path(data.path).is_file():
        raise ValueError(
            f"{data.path} is a file, not a folder of class folders; use --data.source csv for a "
            "CSV file, huggingface for a parquet file, tar for a tar file"
        )
    return FolderSource(data.path, classes)


def open_validation(config: Config, source: Source) -> ValidationDataset | None:
    """Open the validation images, of the classes of ``source``; None if there are none."""
    data, validation = config.data, config.validation
    if isinstance(source, FractalSource) and validation.images_per_class:
        first, count = source.images_per_class, validation.images_per_class
        held_out: Source = replace(source, images_per_class=count, first_image=first)
    elif validation.path or validation.split:
        data = replace(data, path=validation.path or data.path, split=validation.split)
        held_out = open_source(data, source.classes)
    else:
        return None
    return ValidationDataset(held_out, config.crops.global_size, data.skips_unreadable)


def build_neighbors(config: Config, source: Source) -> Neighbors | None:
    """Draw the training images that k-NN validation searches; None if it is disabled."""
    validation = config.validation
    if not validation.neighbors:
        return None
    drawn = np.random.default_rng(config.seed).permutation(len(source))
    dataset = ValidationDataset(source, config.crops.global_size, config.data.skips_unreadable)
    return Neighbors(dataset, drawn[: validation.neighbors_among], validation.neighbors)


def crop_specs(crops: CropsConfig) -> list[CropSpec]:
    """Return the crops of each resolution, global crops first."""
    large = crops.global_crops, crops.global_size, crops.global_scale
    small = crops.local_crops, crops.local_size, crops.local_scale
    specs = [CropSpec(*large, crops.global_augmentation)]
    return [*specs, CropSpec(*small, crops.local_augmentation)] if crops.local_crops else specs


def build_dataset(config: Config, source: Source) -> MultiCropDataset:
    """Build the dataset of the training crops."""
    return MultiCropDataset(
        source,
        crop_specs(config.crops),
        config.seed,
        config.data.skips_unreadable,
        num_buffers=NUM_BUFFERS,  # so that workers do not allocate shared memory for each batch
        decode=config.data.decode,
    )


def build_sampler(optim: OptimConfig, seed: int, num_images: int, process: Process) -> EpochSampler:
    """Build the sampler of this process's batches; ValueError if the batch size is invalid."""
    ranks = process.rank, process.world_size
    return EpochSampler(num_images, optim.batch_size, optim.epochs, seed, *ranks)


def build_optimizer(optim: OptimConfig, method: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer; ValueError if it is not available or lacks a setting."""
    names = "name", "momentum", "weight_decay", "betas", "eps"
    settings = {name: getattr(optim, name) for name in names}
    try:
        return optimizer.build_optimizer(method, lr=optim.peak_lr, **settings)
    except ValueError as error:
        raise ValueError(f"--optim.{error}") from error


def lr_schedule(optim: OptimConfig, steps_per_epoch: int) -> np.ndarray:
    """Return the learning rate of every step, (epochs * steps_per_epoch,)."""
    return optimizer.learning_rates(
        peak=optim.peak_lr,
        final=optim.final_lr,
        warmup_steps=optim.warmup_epochs * steps_per_epoch,
        total_steps=optim.epochs * steps_per_epoch,
    )


@dataclass(frozen=True)
class Teacher:
    """Frozen model; crops are resized to ``size`` and normalized for it, scale * crops + shift."""

    frozen: FrozenModel
    size: int
    scale: Tensor
    shift: Tensor

    def __call__(self, crops: Tensor) -> Tensor:
        """Return features, (B, D), of crops, (B, 3, S, S)."""
        if crops.shape[-1] != self.size:
            crops = F.interpolate(crops, (self.size, self.size), mode="bicubic", antialias=True)
        return self.frozen.model(crops * self.scale + self.shift)


@torch.no_grad()
def load_teacher(config: Config, device: torch.device) -> Teacher | None:
    """Load the teacher, which must accept the global crops; None if the objective has none."""
    name, crop = config.objective.teacher, config.crops.global_size
    size = config.objective.teacher_size or crop
    if not name:
        return None
    try:
        frozen = FrozenModel.load(name, features="backbone", device=str(device))
    except ValueError as error:
        reason = str(error).removeprefix("--model ")
        raise ValueError(f"--objective.teacher: {reason}") from error
    own = frozen.transform
    rows = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, own.mean, own.std
    mean, std, own_mean, own_std = torch.tensor(rows, device=device)[..., None, None]
    teacher = Teacher(frozen, size, std / own_std, (mean - own_mean) / own_std)
    try:
        teacher(torch.zeros(2, 3, crop, crop, device=device)).reshape(2, *frozen.shape)
    except Exception as error:  # models raise different types
        raise ValueError(
            f"--objective.teacher: {name} does not accept crops of {size} pixels "
            f"({first_line(error)}); use --objective.teacher-size {own.size[0]}"
        ) from error
    return teacher


def build_method(config: Config, num_classes: int, teacher: Teacher | None = None) -> TReX:
    """Build the method on the CPU; its random weights depend only on the seed."""
    torch.manual_seed(config.seed)  # the same weights on every rank, whatever was drawn before
    model, sizes = config.model, [spec.size for spec in crop_specs(config.crops)]
    backbone, width = build_backbone(model.backbone, model.parsed_backbone_args(), sizes)
    projector: nn.Module = nn.Identity()
    if model.projector == "mlp":
        projector = Projector(width, model.hidden_layers, model.hidden_dim, model.embedding_dim)
        width = model.embedding_dim
    elif config.objective.name == "distill" and width != model.embedding_dim:
        raise ValueError(
            f"backbone {model.backbone} has {width} features, the teacher {model.embedding_dim}, "
            "which --model.projector none requires to be equal; use --model.projector mlp"
        )
    objective = _build_objective(config.objective, width, num_classes)
    objective.teacher = teacher
    method = TReX(Encoder(backbone, projector), objective, config.objective.ema_momentum)
    # After the momentum encoder has copied the backbone: without gradients, it stores none.
    if config.system.checkpoint_activations:
        recompute_activations(backbone, model.backbone)
    return method


def _build_objective(config: ObjectiveConfig, dim: int, num_classes: int) -> objectives.Objective:
    if config.name == "softmax":
        return objectives.LinearSoftmax(dim, num_classes)
    if config.name == "cosine":
        return objectives.CosineSoftmax(dim, num_classes, config.temperature)
    if config.name == "distill":
        return objectives.Distillation(dim)
    bank = MemoryBank(config.resolved_bank_size, dim, num_classes)
    if config.name == "look":
        return objectives.LOOK(bank, config.temperature, config.neighbors)
    return objectives.OnlineClassMeans(bank, config.temperature)


def num_workers(system: SystemConfig) -> int:
    """Return the number of loader processes of each training process."""
    return min(8, available_cores()) if system.workers is None else system.workers


def available_cores() -> int:
    """Return the number of cores for each training process on this machine."""
    return max(1, free_cores() // local_processes())


def local_processes() -> int:
    """Return the number of training processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
