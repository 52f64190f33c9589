"""A training run from its configuration to its export: the only file that sees every part."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from trex_models.data.folder import FolderSource
from trex_models.data.fractals import FractalSource
from trex_models.data.multicrop import (
    CropSpec,
    EpochSampler,
    MultiCropDataset,
    augment,
    load_batches,
)
from trex_models.data.photometric import GLOBAL_LAW, LOCAL_LAW
from trex_models.data.sources import Source
from trex_models.heads import Projector
from trex_models.train import checkpointing, distributed
from trex_models.train.backbone import build_backbone, full_args
from trex_models.train.bank import Bank
from trex_models.train.config import Config, CropsConfig, DataConfig, from_dict
from trex_models.train.export import export
from trex_models.train.method import Encoder, TReX
from trex_models.train.objectives import CosineSoftmax, Objective, OnlineClassMeans
from trex_models.train.optimizer import build_sgd, learning_rates, match_memory_format
from trex_models.train.reporting import Meter, Reporter
from trex_models.train.step import Precision, training_step


def train(config: Config) -> list[Path]:
    """Train, or continue the run that ``config.output`` holds, to the end; then export.

    Returns:
        The exported folders (of the main process; empty for the others).

    Raises:
        ValueError: The configuration, the data or the output folder will not do, or the loss is
            no longer finite. The message says what to change.
    """
    with distributed.process_group(config.system.device) as process:
        device, optim, folder = process.device, config.optim, Path(config.output)
        precision = Precision.from_name(config.precision, device.type)
        config = replace(config, precision=precision.name)

        source = open_source(config.data)
        sampler = EpochSampler(
            len(source),
            optim.batch_size,
            optim.epochs,
            config.seed,
            process.rank,
            process.world_size,
        )
        rates = learning_rates(
            peak=optim.base_lr * optim.batch_size / 256,
            final=optim.final_lr,
            warmup_steps=optim.warmup_epochs * sampler.steps_per_epoch,
            total_steps=sampler.total_steps,
        )
        torch.manual_seed(config.seed)
        method = build_method(config, len(source.classes))
        if process.is_main and checkpointing.latest(folder) is None:
            with tempfile.TemporaryDirectory() as trial:  # what cannot be exported is not trained
                export_method(method, config, source.classes, Path(trial))
        method.train().to(device)
        if config.system.channels_last:
            method.to(memory_format=torch.channels_last)
        optimizer = build_sgd(method, optim.sgd_momentum, optim.weight_decay)

        # Nothing is written before all of the above has been found good.
        if process.is_main:
            checkpointing.claim_folder(config)
        distributed.barrier()
        parts: dict[str, checkpointing.Stateful] = {
            "method": method,
            "optimizer": optimizer,
            "scaler": precision.scaler,
        }
        facts = {"classes": list(source.classes), "num_images": len(source)}
        latest = checkpointing.latest(folder)
        if latest is not None:
            sampler.start_step = checkpointing.restore(latest, parts, facts)
            match_memory_format(optimizer)

        if config.system.compile:
            method.encoder.compile()
        model = distributed.data_parallel(method, process, config.system.sync_batchnorm)
        dataset = MultiCropDataset(source, crop_specs(config.crops), config.seed)
        batches = load_batches(dataset, sampler, _workers(config), device.type == "cuda")
        meter = Meter(device)
        with Reporter(
            folder / "metrics.jsonl",
            start_step=sampler.start_step,
            total_steps=sampler.total_steps,
            steps_per_epoch=sampler.steps_per_epoch,
            images_per_step=optim.batch_size,
            enabled=process.is_main,
        ) as reporter:
            reporter.say(f"{_describe(config, source)} on {process.world_size} x {device}")
            if latest is not None:
                finished = sampler.start_step == sampler.total_steps
                reporter.say(f"the run {'is finished:' if finished else 'continues from'} {latest}")
            for step, batch in enumerate(batches, start=sampler.start_step):
                torch.manual_seed(_step_seed(config.seed, step, process.rank))  # drop path
                crops = augment(batch, device)
                labels = batch.labels.to(device, non_blocking=True)
                rate = float(rates[step])
                loss, logits = training_step(
                    model, method, optimizer, precision, crops, labels, rate
                )
                meter.update(loss, logits[: len(labels)], labels)
                reporter.advance()

                done = step + 1
                epoch, within = divmod(done, sampler.steps_per_epoch)
                save = within == 0 and epoch % config.system.save_every == 0
                save |= done == sampler.total_steps
                if save or done % config.system.log_every == 0:
                    # Stops where the loss is not finite: such weights are not saved.
                    reporter.report(done, {**meter.read(), "learning_rate": rate})
                if save and process.is_main:
                    saved = {"config": dataclasses.asdict(config), **facts}
                    checkpointing.save(folder, done, parts, saved)
                if save:
                    distributed.barrier()
        if not process.is_main:
            return []
        return export_checkpoint(folder, folder / "export", config.license)


def export_checkpoint(path: Path, folder: Path, weights_license: str | None = None) -> list[Path]:
    """Export any checkpoint of the trainer, of a finished run or not.

    Args:
        path: A file of a run's checkpoints folder, or the run's folder: its last one.
        folder: Where to write ``backbone`` and, where the backbone is a ResNet, ``cls``.
        weights_license: Licence to state; None for the one that the run was started with.

    Returns:
        The exported folders.

    Raises:
        ValueError: There is no checkpoint, or it is damaged or does not fit its configuration.
    """
    if path.is_dir():
        latest = checkpointing.latest(path)
        if latest is None:
            raise ValueError(f"{path} holds no checkpoints; name a run's folder or a checkpoint")
        path = latest
    state = checkpointing.load(path)
    config = from_dict(state["config"])
    if weights_license is not None:
        config = replace(config, license=weights_license)
    method = build_method(config, len(state["classes"]))
    checkpointing.load_part(method, state, "method", path)
    return export_method(method, config, state["classes"], folder)


def export_method(method: TReX, config: Config, classes: Sequence[str], folder: Path) -> list[Path]:
    """Export a method that a configuration describes; return the exported folders.

    Args:
        method: On the CPU; put into eval mode.
        config: What it was built from.
        classes: Names of the classes.
        folder: Where to write ``backbone`` and, where the backbone is a ResNet, ``cls``.
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
            "proj_dim": model.embedding_dim,
            "temperature": config.objective.temperature,
        },
        image_size=config.crops.global_size,
        classes=classes,
        weights_license=config.license,
    )


def open_source(data: DataConfig) -> Source:
    """Open the images that a configuration names.

    Raises:
        ValueError: There is no path, or the folder will not do.
    """
    if data.source == "fractals":
        return FractalSource(
            data.num_classes, data.images_per_class, data.image_size, variation=data.variation
        )
    if not data.path:
        raise ValueError(
            "data.path is not set; name the folder of class folders by --data.path, or train on "
            "generated images by --data.source fractals"
        )
    return FolderSource(data.path)


def crop_specs(crops: CropsConfig) -> list[CropSpec]:
    """Return the crops of each resolution, globals first."""
    specs = [CropSpec(crops.global_crops, crops.global_size, crops.global_scale, GLOBAL_LAW)]
    if crops.local_crops:
        specs.append(CropSpec(crops.local_crops, crops.local_size, crops.local_scale, LOCAL_LAW))
    return specs


def build_method(config: Config, num_classes: int) -> TReX:
    """Build the method with random weights, on the CPU.

    Raises:
        ValueError: The backbone will not do.
    """
    model, objective = config.model, config.objective
    sizes = [spec.size for spec in crop_specs(config.crops)]
    backbone, width = build_backbone(model.backbone, model.parsed_backbone_args(), sizes)
    projector = Projector(width, model.hidden_layers, model.hidden_dim, model.embedding_dim)
    loss: Objective
    if objective.name == "ocm":
        bank = Bank(objective.bank_size, model.embedding_dim, num_classes)
        loss = OnlineClassMeans(bank, objective.temperature)
    else:
        loss = CosineSoftmax(model.embedding_dim, num_classes, objective.temperature)
    return TReX(Encoder(backbone, projector), loss, objective.ema_momentum)


def _workers(config: Config) -> int:
    if config.system.workers is not None:
        return config.system.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])


def _describe(config: Config, source: Source) -> str:
    model = config.model
    return (
        f"{len(source)} images of {len(source.classes)} classes; {model.backbone}, projector with "
        f"{model.hidden_layers} hidden layers, {config.objective.name}; {config.precision}"
    )
