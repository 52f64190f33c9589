"""A run made ready: its parts built, checked, its folder taken, its last checkpoint restored."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trex_models import naver
from trex_models.data.decode import UnreadableImageError
from trex_models.data.loading import LIVE_BATCHES
from trex_models.data.multicrop import EpochSampler, MultiCropDataset
from trex_models.data.sources import Source
from trex_models.licenses import resolve_license
from trex_models.precision import Precision
from trex_models.train import build, checkpointing, distributed
from trex_models.train.config import Config, differences, to_json
from trex_models.train.distributed import Process
from trex_models.train.initial import init_from
from trex_models.train.method import TReX
from trex_models.train.optimizer import build_sgd, match_memory_format
from trex_models.train.preflight import ImageFiles
from trex_models.train.reporting import Meter
from trex_models.train.unreadable import UnreadableImages
from trex_models.train.validation import Neighbors, ValidationDataset

_REMEDY = "lower optim.base_lr, lengthen optim.warmup_epochs, or take --precision bf16 or fp32"


@dataclass
class Run:
    """What a run consists of, at the step that ``sampler.start_step`` says.

    Attributes:
        config: With its precision resolved.
        process: This process.
        precision: The types to compute in.
        dataset: The training images' crops.
        validation: The images to validate on, if there are any.
        neighbors: What a k-NN classifier compares them with, if one is wanted.
        sampler: The order of the batches.
        rates: The learning rate of every step.
        method: On the device, in training mode.
        optimizer: Over what is trained.
        meter: Loss and accuracy since the last report.
        unreadable: Images that were passed over.
        facts: What a checkpoint says of the data.
        inherited_license: Of the weights that the run started from; empty for none.
        messages: What to tell before the first step.
        files: State of the image files; None but in the main process.
    """

    config: Config
    process: Process
    precision: Precision
    dataset: MultiCropDataset
    validation: ValidationDataset | None
    neighbors: Neighbors | None
    sampler: EpochSampler
    rates: np.ndarray
    method: TReX
    optimizer: torch.optim.Optimizer
    meter: Meter
    unreadable: UnreadableImages
    facts: dict[str, Any]
    inherited_license: str
    messages: list[str]
    files: ImageFiles | None = None

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.config.output)

    @property
    def parts(self) -> dict[str, checkpointing.Stateful]:
        """What has a state that is alike in all processes."""
        return {
            "method": self.method,
            "optimizer": self.optimizer,
            "scaler": self.precision.scaler,
        }

    @property
    def steps_between_validations(self) -> int:
        """Steps from one validation to the next."""
        return self.config.validation.every * self.sampler.steps_per_epoch

    def blank_inputs(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return crops, labels and ids of the shapes of a step, of this process."""
        share = self.config.optim.batch_size // self.process.world_size
        device = self.process.device
        crops = [
            torch.zeros(s.count * share, 3, s.size, s.size, device=device).to(
                memory_format=torch.channels_last
            )
            for s in self.dataset.specs
        ]
        return crops, *torch.zeros(2, share, dtype=torch.int64, device=device)

    def share_unreadable(self, say: Callable[[str], object]) -> None:
        """Share what images were passed over; every process must call it."""
        if self.config.data.skips_unreadable:
            self.unreadable.exchange(self.process.is_main, say)

    def report_changed_files(self, say: Callable[[str], object]) -> None:
        """Report image files that changed since the checkpoint that the run continues from."""
        for line in self.files.warnings() if self.files else []:
            say(line)

    def save(self, done: int) -> None:
        """Save the state after ``done`` steps, if all processes agree on it and it is finite.

        Every process must call it.

        Raises:
            SharedError: The processes hold different weights, or another bank.
            ValueError: Weights are not finite, or the checkpoint cannot be written.
        """
        distributed.check_identical(self._shared_tensors())
        tensors = (*self.method.parameters(), *self.method.buffers())
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            raise ValueError(
                f"weights are no longer finite after step {done}, and are not saved; {_REMEDY}"
            )
        self.share_unreadable(print)
        state = self._state_after(done) | {"meter": self.meter.gathered()}
        if self.files:
            state["files"] = self.files.state()
            self.report_changed_files(print)
            checkpointing.save(self.folder, state)
        distributed.barrier()  # a process that ends early would have the others ended, too

    def keep_step(self, step: int, crops: list[Tensor], labels: Tensor, ids: Tensor) -> str:
        """Save a step whose loss is not finite, for ``saved.load_step``; return what to tell."""
        rank = self.process.rank
        path = self.folder / f"nonfinite_step_{step}_process_{rank}.pt"
        inputs = {
            "process": rank,
            "crops": [c.cpu() for c in crops],
            "labels": labels.cpu(),
            "ids": ids.cpu(),
        }
        trouble = f"the loss of step {step} is no longer finite; {_REMEDY}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # another machine's
            checkpointing.write(path, self._state_after(step) | inputs)
        except (OSError, ValueError) as error:
            return f"{trouble} ({error})"
        return (
            f"{trouble}. Its inputs and state: method, inputs, precision = "
            f"trex_models.train.saved.load_step({str(path)!r})"
        )

    def _shared_tensors(self) -> dict[str, Iterable[Tensor]]:
        """What every process must hold alike: all but BatchNorm's running statistics."""
        method = self.method
        shared: dict[str, Iterable[Tensor]] = {"encoder": method.encoder.parameters()}
        if method.momentum_encoder is None or method.objective.bank is None:
            return shared | {"head": method.objective.parameters()}
        shared["momentum encoder"] = method.momentum_encoder.parameters()
        bank = method.objective.bank
        pointer = torch.tensor(bank.pointer, device=bank.labels.device)
        return shared | {"bank": [*bank.buffers(), pointer]}

    def _state_after(self, steps: int) -> dict[str, Any]:
        """Return what a checkpoint holds but for the meter's sums, which all processes share."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        return {
            **state,
            **self.facts,
            "inherited_license": self.inherited_license,
            "unreadable": self.unreadable.indices,
            "config": json.loads(to_json(self.config)),
            "step": steps,
            "environment": self.environment,
            "batchnorm_groups": self.batchnorm_groups,
        }

    @property
    def environment(self) -> dict[str, int | str]:
        """What changes the rounding of the same computation."""
        device = self.process.device
        return {
            "processes": self.process.world_size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "channels_last": self.config.system.channels_last,
            "compile": self.config.system.compile,
        }

    @property
    def batchnorm_groups(self) -> int:
        """Into how many parts a batch falls that are normalised each by itself."""
        synchronized = distributed.synchronizes(self.process, self.config.system.sync_batchnorm)
        return 1 if synchronized else self.process.world_size


@contextmanager
def prepared(config: Config, process: Process) -> Iterator[Run]:
    """Build a run, or continue the one that ``config.output`` holds.

    What would fail later is refused here, by all processes alike, before anything is written. The
    main process alone reads and writes the folder; the others need not see it.

    Raises:
        ValueError: The configuration, the data, the folder or its checkpoint will not do; a line
            for each trouble.
    """
    run = built(config, process)
    with ExitStack() as stack:
        with distributed.together():
            if process.is_main:
                stack.enter_context(checkpointing.claimed(run.config))
        _continue(run)
        yield run


def built(config: Config, process: Process) -> Run:
    """Build and check a run at its first step; ``config.output`` is neither claimed nor written.

    Raises:
        ValueError: The configuration or the data will not do; a line for each trouble.
    """
    with distributed.together():
        precision = Precision.from_name(config.precision, process.device.type)
        precision.apply()
        config = replace(config, precision=precision.name, objective=config.objective.resolved())
        source = build.open_source(config.data)
        validation = build.open_validation(config, source)
        sampler = build.build_sampler(config, len(source), process)
        method = build.build_method(config, len(source.classes))
        warnings = build.check(config, source, validation, method, process)
        classes = list(source.classes)
        facts = {"classes": classes, "images": source.digest()}
        if process.is_main and not checkpointing.files(Path(config.output)):
            with tempfile.TemporaryDirectory() as trial:  # what cannot be exported is not trained
                build.export_method(method, config, classes, Path(trial))

    started_from, inherited = _initialised(config, method, facts, process)
    config = replace(config, license=resolve_license(config.license, inherited))
    method.train().to(process.device)
    if config.system.channels_last:
        method.to(memory_format=torch.channels_last)
    run = Run(
        config=config,
        process=process,
        precision=precision,
        dataset=MultiCropDataset(
            source,
            build.crop_specs(config.crops),
            config.seed,
            substitute=config.data.skips_unreadable,
            live_batches=LIVE_BATCHES,
        ),
        validation=validation,
        neighbors=build.build_neighbors(config, source),
        sampler=sampler,
        rates=build.build_rates(config, sampler.steps_per_epoch),
        method=method,
        optimizer=build_sgd(method, config.optim.sgd_momentum, config.optim.weight_decay),
        meter=Meter(process),
        unreadable=UnreadableImages(
            Path(config.output) / "unreadable.txt", len(source), config.data.max_unreadable
        ),
        facts=facts,
        inherited_license=inherited,
        messages=[
            _describe(config, source, process),
            *([_describe_validation(validation.source)] if validation else []),
            *(f"warning: {warning}" for warning in warnings),
            *started_from,
        ],
    )
    first = distributed.broadcast((to_json(run.config), run.facts))
    with distributed.together():
        _check_alike(run, *first)
    return run


def _initialised(
    config: Config, method: TReX, facts: dict[str, Any], process: Process
) -> tuple[list[str], str]:
    """Take on the weights of ``config.init_from``, unless the run has a checkpoint of its own.

    The main process reads the file for all.

    Returns:
        What to tell, and the licence of these weights; both empty where nothing was read.

    Raises:
        ValueError: The file will not do, or its licence forbids the one that was chosen.
    """
    begins = not checkpointing.files(Path(config.output))
    if not distributed.broadcast(bool(config.init_from) and begins):
        return [], ""
    lines: list[str] = []
    inherited = ""
    with distributed.together():
        if process.is_main:
            lines, inherited = init_from(
                Path(config.init_from), method, facts["classes"], facts["images"]
            )
            told = resolve_license(config.license, inherited)
            what = f"{told}, for what is trained from them, too" if told else "not told"
            lines.append(f"  licence of the weights: {what} (NAVER's are under {naver.LICENSE})")
    state, inherited = distributed.broadcast((method.state_dict(), inherited))
    method.load_state_dict(state)
    return lines, inherited


def _continue(run: Run) -> None:
    """Take on the state of the run's last checkpoint, which the main process reads for all."""
    if run.process.is_main:
        datasets = {"training": run.dataset, "validation": run.validation}
        run.files = ImageFiles({name: data.source for name, data in datasets.items() if data})
    saved = None
    with distributed.together():
        if run.process.is_main:
            saved = checkpointing.newest(run.folder, checkpointing.put_aside)
            if saved is not None:
                checkpointing.check_belongs(*saved, run.config, run.facts)
                _check_environment(run, *saved)
                checkpointing.prune(run.folder)
    saved = distributed.broadcast(saved)
    if saved is None:
        return
    path, state = saved
    checkpointing.restore(run.parts, state, path)
    checkpointing.restore({"meter": run.meter}, state, path)
    run.inherited_license = state["inherited_license"]
    run.config = replace(
        run.config, license=resolve_license(run.config.license, run.inherited_license)
    )
    if run.files:
        run.files.compare_with(state.get("files", {}), path)
    _restore_unreadable(run, state["unreadable"])
    match_memory_format(run.optimizer)
    run.sampler.start_step = state["step"]
    finished = state["step"] == run.sampler.total_steps
    run.messages.append(f"the run {'is finished:' if finished else 'continues from'} {path}")


def _restore_unreadable(run: Run, indices: list[int]) -> None:
    """Read the images again that could not be read: some may have been mended meanwhile."""
    with distributed.together():
        for index in indices:
            if not 0 <= index < len(run.dataset.source):
                raise ValueError(f"the last checkpoint of {run.folder} lists an image {index}")
            try:
                run.dataset.source.read(index)
            except UnreadableImageError as error:
                run.unreadable.add({index: str(error)})
        if run.config.data.skips_unreadable and run.unreadable.too_many:
            raise ValueError(run.unreadable.trouble())


def _check_alike(run: Run, config: str, facts: dict[str, Any]) -> None:
    different = differences(json.loads(config), run.config)
    if facts != run.facts:
        different.append("the images")
    if different:
        raise ValueError(
            f"this process and process 0 differ in {'; '.join(different)}; start all with the same "
            "command and the same data"
        )


def _check_environment(run: Run, path: Path, state: dict[str, Any]) -> None:
    before, now = state["environment"], run.environment
    if state["batchnorm_groups"] != run.batchnorm_groups:
        raise ValueError(
            f"{path} was saved by {before.get('processes')} processes, and BatchNorm saw "
            f"{state['batchnorm_groups']} parts of each batch; with {now['processes']} it would "
            f"see {run.batchnorm_groups}: start {before.get('processes')}"
        )
    changed = [
        f"{name}: {before.get(name)} -> {now[name]}"
        for name in now
        if before.get(name) != now[name]
    ]
    if changed:
        run.messages.append(
            f"warning: saved elsewhere ({'; '.join(changed)}): what follows is what it would have "
            "been up to rounding, not bit for bit"
        )


def _describe_validation(source: Source) -> str:
    present = len(np.unique(source.labels))
    return f"validation: {len(source)} images of {present} of the {len(source.classes)} classes"


def _describe(config: Config, source: Source, process: Process) -> str:
    model = config.model
    layers = f"{model.hidden_layers} hidden layer{'s' * (model.hidden_layers != 1)}"
    projector = f"projector with {layers}" if model.projector == "mlp" else "no projector"
    return (
        f"{len(source)} images of {len(source.classes)} classes; {model.backbone}, {projector}, "
        f"{config.objective.name}; {config.precision} on {process.world_size} x {process.device}"
    )
