"""A run: its parts and how its state is saved."""

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

_REMEDY = "lower --optim.base-lr, raise --optim.warmup-epochs, or use --precision bf16 or fp32"


@dataclass
class Run:
    """Parts of a run; ``sampler.start_step`` is its first step."""

    config: Config  # with resolved precision
    process: Process
    precision: Precision
    dataset: MultiCropDataset
    validation: ValidationDataset | None
    neighbors: Neighbors | None  # references of the k-NN classifier
    sampler: EpochSampler
    lr_schedule: np.ndarray  # learning rate of each step, (steps,)
    method: TReX  # on the device and in training mode
    model: nn.Module  # ``method``, wrapped if there are several processes
    optimizer: torch.optim.Optimizer
    meter: Meter
    unreadable: UnreadableImages
    workers: int  # number of loader workers of this process
    data_fingerprint: dict[str, Any]  # class names and digest of the images
    inherited_license: str  # of the initial weights; empty if none is known
    messages: list[str]  # to print before the first step
    files: ImageFiles | None = None  # on rank 0

    @property
    def folder(self) -> Path:
        """Directory of the run."""
        return Path(self.config.output)

    @property
    def parts(self) -> dict[str, Any]:
        """Parts whose state is the same on all ranks."""
        return {"method": self.method, "optimizer": self.optimizer, "scaler": self.precision.scaler}

    @property
    def environment(self) -> dict[str, int | str]:
        """Settings that affect the rounding of the computation."""
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
        """Exchange the skipped images among all ranks, which must all call this method."""
        if self.config.data.skips_unreadable:
            self.unreadable.exchange(self.process.is_main, log)

    def report_changed_files(self, log: Callable[[str], object]) -> None:
        """Report image files that changed since the checkpoint that the run resumed from."""
        for line in self.files.warnings() if self.files else []:
            log(line)

    def save(self, done: int) -> None:
        """Save the state after ``done`` steps, if it is finite and identical on all ranks.

        All ranks must call this method.
        """
        # Otherwise an error of a faulty device or link would enter all later checkpoints.
        distributed.check_identical(self._shared_tensors())
        tensors = (*self.method.parameters(), *self.method.buffers())
        # One device sync for all tensors. A checkpoint with NaN would replace a good one.
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            problem = f"the weights are no longer finite after step {done} and were not saved"
            raise ValueError(f"{problem}; {_REMEDY}")
        self.exchange_unreadable(print)
        # All ranks gather the sums; only rank 0 writes.
        state = self._state_after(done) | {"meter": self.meter.gathered()}
        if self.files:
            state["files"] = self.files.state()
            self.report_changed_files(print)
            checkpointing.save(self.folder, state)
        distributed.barrier()  # an early exit of one rank would end the others

    def save_failed_step(
        self, step: int, crops: list[Tensor], labels: Tensor, indices: Tensor
    ) -> str:
        """Save a step with a non-finite loss for ``export.load_step``; return the error message."""
        rank = self.process.rank
        path = self.folder / f"nonfinite_step_{step}_process_{rank}.pt"
        inputs = {
            "process": rank,
            "crops": [c.cpu() for c in crops],  # after augmentation, as the model saw them
            "labels": labels.cpu(),
            "indices": indices.cpu(),
        }
        problem = f"the loss of step {step} is no longer finite; {_REMEDY}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # other machines may not share it
            checkpointing.write(path, self._state_after(step) | inputs)
        except (OSError, ValueError) as error:
            return f"{problem} ({error})"
        call = f"trex_models.train.export.load_step({str(path)!r})"
        return f"{problem}. To debug this step, load it: method, inputs, precision = {call}"

    def _shared_tensors(self) -> dict[str, Iterable[Tensor]]:
        """Return the tensors that must be identical on all ranks: all but BatchNorm statistics."""
        method = self.method
        shared: dict[str, Iterable[Tensor]] = {"encoder": method.encoder.parameters()}
        if method.momentum_encoder is None or method.objective.bank is None:
            return shared | {"head": method.objective.state_dict().values()}
        shared["momentum encoder"] = method.momentum_encoder.parameters()
        # Only the bank's buffers: those of BatchNorm differ by rank unless they are synchronized.
        bank = method.objective.bank
        pointer = torch.tensor(bank.pointer, device=bank.labels.device)
        return shared | {"bank": [*bank.buffers(), pointer]}

    def _state_after(self, steps: int) -> dict[str, Any]:
        """Return the contents of a checkpoint, except for the sums of the meter."""
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
