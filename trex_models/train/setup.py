"""Set up a run: everything from its configuration to the moment before the first step.

`setup_run` and `build_run` list the stages in the order of execution; `build` creates the parts.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trex_models import distributed
from trex_models.atomic import require_space
from trex_models.data.decode import UnreadableImageError
from trex_models.data.sources import Source
from trex_models.distributed import Process, raise_on_all_ranks
from trex_models.method.model import TReX
from trex_models.method.optimizer import match_memory_format
from trex_models.precision import Precision
from trex_models.pretrained import naver
from trex_models.pretrained.licenses import combine, resolve_license
from trex_models.train import build, checkpointing, checks
from trex_models.train.config import Config, config_diff, to_json
from trex_models.train.export import export_method
from trex_models.train.init_from import init_from
from trex_models.train.reporting import Meter
from trex_models.train.run import Run
from trex_models.train.unreadable import ImageFiles, UnreadableImages
from trex_models.train.validation import ValidationDataset


@contextmanager
def setup_run(config: Config, process: Process) -> Iterator[Run]:
    """Build a run, lock its directory and restore its last checkpoint.

    Only rank 0 reads and writes the directory, which other ranks need not see. Invalid settings or
    data raise a ValueError on all ranks, with one line per problem, before anything is written.
    """
    run = build_run(config, process)
    # The run directory is locked until the end of the block, or of the process.
    with ExitStack() as stack:
        # Locked after all checks, so that a run that cannot start leaves nothing behind, and
        # before the checkpoint is read, so that no other process can replace it meanwhile.
        with raise_on_all_ranks():
            if process.is_main:
                stack.enter_context(checkpointing.lock_run_dir(run.config))
        _resume(run)
        # DistributedDataParallel broadcasts the weights of rank 0 when it is created: wrap last.
        if run.sampler.start_step < run.sampler.total_steps:
            run.model = wrap_model(run)
        yield run


def build_run(config: Config, process: Process) -> Run:
    """Build and check a run before its first step; do not lock, write or wrap anything."""
    # An error on one rank (its data, its memory) must end all ranks, or the others would hang.
    with raise_on_all_ranks():
        # Precision and device first: the checks below need the values of "auto".
        precision = Precision.from_name(config.precision, process.device.type)
        precision.apply()
        config = replace(config, precision=precision.name, objective=config.objective.resolved())
        if process.is_main and config.data.path:  # on network storage it may take minutes
            print(f"opening {config.data.path}", flush=True)
        # Data before the method: it sets the number of classes.
        source = build.open_source(config.data)
        validation = build.open_validation(config, source)
        # The sampler rejects an invalid batch size before a network is built.
        sampler = build.build_sampler(config.optim, config.seed, len(source), process)
        # The width of the teacher is saved: exports do not require the teacher itself.
        teacher = build.load_teacher(config, process.device)
        metadata = teacher.frozen.metadata if teacher else {}
        width = metadata.get("num_features", config.model.embedding_dim)
        config = replace(config, model=replace(config.model, embedding_dim=width))
        # Built on the CPU from the seed, so that all ranks and devices get equal weights.
        method = build.build_method(config, len(source.classes), teacher)
        build.build_optimizer(config.optim, method)  # only to check its settings
        # Problems that would otherwise end or waste the run after hours.
        warnings = _check(config, sampler.total_steps, source, validation, method, process)
        classes = list(source.classes)
        fingerprint: dict[str, Any] = {"classes": classes, "images": source.digest()}
        fingerprint |= {"teacher": metadata["weights_sha256"]} if teacher else {}
        is_new = not checkpointing.list_checkpoints(Path(config.output))
        if process.is_main and is_new:
            with tempfile.TemporaryDirectory() as trial:  # to fail now, not at the end
                export_method(method, config, classes, Path(trial))

    # Loaded on the CPU, before the method is moved to the device and wrapped. A resumed run has
    # these weights in its checkpoint, and does not load them again.
    report, inherited = _warm_start(config, method, fingerprint, is_new, process)
    is_new, license_ = distributed.broadcast((is_new, metadata.get("license", "")))
    inherited = combine(inherited, license_) if is_new else inherited
    about = f"teacher: {config.objective.teacher}, license of derived weights: {license_}"
    report += [about] if teacher else []
    with raise_on_all_ranks():
        config = replace(config, license=resolve_license(config.license, inherited))

    # Moved before the optimizer is created, which would keep references to tensors on the CPU.
    method.train().to(process.device)
    if config.system.channels_last:
        method.to(memory_format=torch.channels_last)
    run = Run(
        config=config,
        process=process,
        precision=precision,
        dataset=build.build_dataset(config, source),
        validation=validation,
        neighbors=build.build_neighbors(config, source),
        sampler=sampler,
        lr_schedule=build.lr_schedule(config.optim, sampler.steps_per_epoch),
        method=method,
        model=method,
        optimizer=build.build_optimizer(config.optim, method),
        meter=Meter(process, method.objective.predicts_labels),
        unreadable=UnreadableImages(
            Path(config.output) / "unreadable.txt", len(source), config.data.max_unreadable
        ),
        workers=build.num_workers(config.system),
        data_fingerprint=fingerprint,
        inherited_license=inherited,
        messages=[
            *_describe(config, source, validation, process),
            *(f"warning: {warning}" for warning in warnings),
            *report,
        ],
    )
    _require_equal_ranks(config, fingerprint)
    return run


def _require_equal_ranks(config: Config, fingerprint: dict[str, Any]) -> None:
    """Raise an error on all ranks if one was started with other settings or data.

    It would train without an error.
    """
    first, images = distributed.broadcast((to_json(config), fingerprint))
    with raise_on_all_ranks():
        differences = config_diff(json.loads(first), config)
        differences += [f"the {name}" for name in images if images[name] != fingerprint.get(name)]
        if differences:
            raise ValueError(
                f"this process differs from rank 0 in {'; '.join(differences)}; start all "
                "processes with the same command and the same data"
            )


def wrap_model(run: Run) -> nn.Module:
    """Return the module to train: compiled if enabled, in DDP if there are several processes."""
    # Compiled in place, which keeps state-dict keys; not the momentum encoder, which would double
    # the minutes that compilation takes at the first step.
    if run.config.system.compile:
        run.method.encoder.compile()
    model = distributed.data_parallel(run.method, run.process, run.config.system.sync_batchnorm)
    share, device = run.config.optim.batch_size // run.process.world_size, run.process.device
    shapes = [(spec.count * share, 3, spec.size, spec.size) for spec in run.dataset.specs]
    layout = torch.channels_last  # as augment returns
    crops = [torch.zeros(shape, device=device).to(memory_format=layout) for shape in shapes]
    labels, indices = torch.zeros(2, share, dtype=torch.int64, device=device)
    # Under autocast, for gradients of the same data type as in the steps.
    with run.precision.autocast():
        distributed.warm_up_ddp(model, crops, labels, indices)
    return model


def _check(
    config: Config,
    steps: int,
    source: Source,
    validation: ValidationDataset | None,
    method: TReX,
    process: Process,
) -> list[str]:
    specs, workers = build.crop_specs(config.crops), build.num_workers(config.system)
    optim = config.optim
    share = optim.batch_size // process.world_size
    batch_bytes = share * sum(spec.count * 3 * spec.size**2 for spec in specs)
    if validation is not None:  # its batches are in memory next to the crops
        batch_bytes += share * 3 * config.crops.global_size**2
    elif config.validation.neighbors:
        raise ValueError(
            "--validation.neighbors is set, but there are no validation images; set "
            "--validation.path, --validation.split or --validation.images-per-class"
        )
    smallest, skip = min(spec.size for spec in specs), config.data.skips_unreadable
    calls: list[Callable[[], str | None]] = [
        partial(checks.check_rate, optim.name, optim.peak_lr, optim.batch_size),
        partial(checks.check_samples, "training", source, skip),
        partial(checks.check_classes, source),
        partial(checks.check_shared_memory, batch_bytes, workers, build.local_processes()),
        partial(checks.check_cpu_bfloat16, config.precision, process.device, smallest),
    ]
    if validation is not None:
        calls.append(partial(checks.check_samples, "validation", validation.source, skip))
    if entries := config.objective.resolved_bank_size:
        calls.append(partial(checks.check_bank_size, entries, source.labels, len(source.classes)))
        calls.append(partial(checks.check_bank_refills, entries, optim.batch_size * steps))
        calls.append(partial(checks.check_momentum, config.objective.ema_momentum, steps))
    if process.is_main and config.system.tensorboard:
        calls.append(checks.check_tensorboard)
    if process.is_main and config.output:
        # One more than is kept: the next file is written before the oldest is deleted.
        folder = Path(config.output)
        saved = len(checkpointing.list_checkpoints(folder))
        count = max(1, checkpointing.MAX_CHECKPOINTS + 1 - saved)
        size = count * checks.checkpoint_bytes(method, optim.name)
        calls.append(partial(require_space, folder, size, "--output"))
    return checks.run_checks(calls)


def _warm_start(
    config: Config, method: TReX, fingerprint: dict[str, Any], is_new: bool, process: Process
) -> tuple[list[str], str]:
    """Load the weights of ``config.init_from``, unless the run already has a checkpoint.

    Returns a report, one line per part, and the license of these weights; both are empty if no
    weights were loaded.
    """
    lines: list[str] = []
    inherited = ""
    if not distributed.broadcast(bool(config.init_from) and is_new):  # rank 0 sees the directory
        return lines, inherited
    with raise_on_all_ranks():
        if process.is_main:
            lines, inherited = init_from(
                Path(config.init_from), method, fingerprint["classes"], fingerprint["images"]
            )
            stated = resolve_license(config.license, inherited)
            text = f"{stated}, which covers derived weights, too" if stated else ""
            text = text or f"not stated; if they are NAVER's, {naver.LICENSE}"
            lines.append(f"  license of the weights: {text}")
    # Only rank 0 needs to see the file: the other ranks receive the tensors from it.
    state, inherited = distributed.broadcast((method.state_dict(), inherited))
    method.load_state_dict(state)
    return lines, inherited


def _resume(run: Run) -> None:
    """Restore the run's last checkpoint, which rank 0 reads and broadcasts."""
    saved = None
    with raise_on_all_ranks():
        if run.process.is_main:
            saved = checkpointing.load_newest(run.folder, checkpointing.rename_damaged)
            if saved is not None:
                checkpointing.check_belongs(*saved, run.config, run.data_fingerprint)
                _check_environment(run, *saved)
                checkpointing.prune(run.folder)
            # Images may have been replaced since: a thread compares file sizes and times.
            sources = {"training": run.dataset.source}
            if run.validation is not None:
                sources["validation"] = run.validation.source
            path, state = saved or (None, {})
            run.files = ImageFiles(sources, state.get("files", {}), path)
    saved = distributed.broadcast(saved)
    if saved is None:
        return
    path, state = saved
    checkpointing.restore({**run.parts, "meter": run.meter}, state, path)
    match_memory_format(run.optimizer)  # after loading, which keeps the strides of the file
    run.inherited_license = state["inherited_license"]
    chosen = resolve_license(run.config.license, run.inherited_license)
    run.config = replace(run.config, license=chosen)
    _reread_unreadable(run, state["unreadable"])
    run.sampler.start_step = state["step"]
    finished = state["step"] == run.sampler.total_steps
    run.messages.append(f"the run {'is finished:' if finished else 'continues from'} {path}")


def _reread_unreadable(run: Run, indices: list[int]) -> None:
    with raise_on_all_ranks():
        for index in indices:
            if not 0 <= index < len(run.dataset.source):
                raise ValueError(f"{run.folder}: the images lack index {index}; restore them")
            try:
                run.dataset.source.read(index)
            except UnreadableImageError as error:
                run.unreadable.training[index] = str(error)
        message = run.unreadable.error_message()
        if run.config.data.skips_unreadable and message:
            raise ValueError(message)


def _check_environment(run: Run, path: Path, state: dict[str, Any]) -> None:
    before, now, groups = state["environment"], run.environment, state["batchnorm_groups"]
    if groups != run.batchnorm_groups:
        processes = before.get("processes")
        raise ValueError(
            f"{path} was saved by a run with {groups} BatchNorm groups per batch, this one has "
            f"{run.batchnorm_groups}; use the same type of device and {processes} processes"
        )
    changed = [
        f"{name}: {before.get(name)} -> {value}"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if changed:
        run.messages.append(
            f"warning: {path.name} was saved in another environment ({'; '.join(changed)}): "
            "results will be equal up to rounding, not bit for bit"
        )


def _describe(
    config: Config, source: Source, validation: ValidationDataset | None, process: Process
) -> list[str]:
    model, classes = config.model, f"{len(source.classes)} classes"
    classes = "an unlabeled folder" if config.data.source == "images" else classes
    layers = f"{model.hidden_layers} hidden layer{'s' * (model.hidden_layers != 1)}"
    projector = f"projector with {layers}" if model.projector == "mlp" else "no projector"
    lines = [
        f"{len(source)} images of {classes}; {model.backbone}, {projector}, "
        f"{config.objective.name}; {config.precision} on {process.world_size} x {process.device}"
    ]
    if validation is not None:
        images, present = len(validation.source), len(np.unique(validation.source.labels))
        lines.append(f"validation: {images} images of {present} of the {classes}")
    return lines
