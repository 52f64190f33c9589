"""A run: its parts, and how its state is saved."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trex_models import distributed
from trex_models.data.multicrop import EpochSampler, MultiCropDataset
from trex_models.distributed import Process
from trex_models.method.model import TReX
from trex_models.precision import Precision
from trex_models.train import checkpointing
from trex_models.train.config import Config, to_json
from trex_models.train.reporting import Meter
from trex_models.train.unreadable import ImageFiles, UnreadableImages
from trex_models.train.validation import Neighbors, ValidationDataset

_REMEDY = "lower optim.base_lr, lengthen optim.warmup_epochs, or use --precision bf16 or fp32"


@dataclass
class Run:
    """The parts of a run, at step ``sampler.start_step``."""

    config: Config  # with its precision resolved
    process: Process
    precision: Precision
    dataset: MultiCropDataset
    validation: ValidationDataset | None
    neighbors: Neighbors | None  # references of the k-NN classifier
    sampler: EpochSampler
    lr_schedule: np.ndarray  # of every step, (steps,)
    method: TReX  # on the device and in training mode
    model: nn.Module  # the method, wrapped for several processes
    optimizer: torch.optim.Optimizer
    meter: Meter
    unreadable: UnreadableImages
    workers: int  # of this process
    data_fingerprint: dict[str, Any]  # class names and digest of the images
    inherited_license: str  # of the weights that the run started from; empty for none
    messages: list[str]  # to print before the first step
    files: ImageFiles | None = None  # on rank 0

    @property
    def folder(self) -> Path:
        """Directory of the run."""
        return Path(self.config.output)

    @property
    def parts(self) -> dict[str, Any]:
        """Parts whose state is the same on all ranks."""
        return {
            "method": self.method,
            "optimizer": self.optimizer,
            "scaler": self.precision.scaler,
        }

    @property
    def environment(self) -> dict[str, int | str]:
        """Settings that change the rounding of the same computation."""
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
        """Number of parts of a batch that BatchNorm normalizes separately."""
        synchronized = distributed.synchronizes(self.process, self.config.system.sync_batchnorm)
        return 1 if synchronized else self.process.world_size

    def exchange_unreadable(self, log: Callable[[str], object]) -> None:
        """Share which images were skipped; every rank must call it."""
        if self.config.data.skips_unreadable:
            self.unreadable.exchange(self.process.is_main, log)

    def report_changed_files(self, log: Callable[[str], object]) -> None:
        """Report image files that changed since the checkpoint that the run resumed from."""
        for line in self.files.warnings() if self.files else []:
            log(line)

    def save(self, done: int) -> None:
        """Save the state after ``done`` steps, if all ranks agree on it and it is finite.

        Every rank must call it.
        """
        # A faulty device or link would otherwise spread into every later checkpoint.
        distributed.check_identical(self._shared_tensors())
        tensors = (*self.method.parameters(), *self.method.buffers())
        # One wait for the device for all tensors. A checkpoint with NaN would replace a good one.
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            trouble = f"weights are no longer finite after step {done}, and are not saved"
            raise ValueError(f"{trouble}; {_REMEDY}")
        self.exchange_unreadable(print)
        # Every rank takes part in the gathering; rank 0 alone writes.
        state = self._state_after(done) | {"meter": self.meter.gathered()}
        if self.files:
            state["files"] = self.files.state()
            self.report_changed_files(print)
            checkpointing.save(self.folder, state)
        distributed.barrier()  # a rank that ends early would have the others ended, too

    def save_failed_step(
        self, step: int, crops: list[Tensor], labels: Tensor, indices: Tensor
    ) -> str:
        """Save a step with a non-finite loss, for ``export.load_step``; return the message."""
        rank = self.process.rank
        path = self.folder / f"nonfinite_step_{step}_process_{rank}.pt"
        inputs = {
            "process": rank,
            "crops": [c.cpu() for c in crops],  # after augmentation, as the model saw them
            "labels": labels.cpu(),
            "indices": indices.cpu(),
        }
        trouble = f"the loss of step {step} is no longer finite; {_REMEDY}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # on another machine it is missing
            checkpointing.write(path, self._state_after(step) | inputs)
        except (OSError, ValueError) as error:
            return f"{trouble} ({error})"
        call = f"trex_models.train.export.load_step({str(path)!r})"
        return f"{trouble}. Its inputs and state: method, inputs, precision = {call}"

    def _shared_tensors(self) -> dict[str, Iterable[Tensor]]:
        """Return what every rank must hold identically: all but BatchNorm's running statistics."""
        method = self.method
        shared: dict[str, Iterable[Tensor]] = {"encoder": method.encoder.parameters()}
        if method.momentum_encoder is None or method.objective.bank is None:
            return shared | {"head": method.objective.parameters()}
        shared["momentum encoder"] = method.momentum_encoder.parameters()
        # Only the bank's buffers: those of BatchNorm differ by rank unless they are synchronized.
        bank = method.objective.bank
        pointer = torch.tensor(bank.pointer, device=bank.labels.device)
        return shared | {"bank": [*bank.buffers(), pointer]}

    def _state_after(self, steps: int) -> dict[str, Any]:
        """Return the contents of a checkpoint but for the meter's sums, which all ranks gather."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        return {
            **state,
            **self.data_fingerprint,
            "inherited_license": self.inherited_license,
            "unreadable": sorted(self.unreadable.training),
            "config": json.loads(to_json(self.config)),  # plain values, which load without pickle
            "step": steps,
            "environment": self.environment,
            "batchnorm_groups": self.batchnorm_groups,
        }
