"""Where and in which number formats models compute: cores, device, autocast, TF32, loss scaling."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

PrecisionName = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(
    name: str = "auto", local_rank: int = 0, option: str = "--device"
) -> torch.device:
    """Return the device that a user names by ``option``: auto is CUDA if available, else the CPU.

    ``local_rank``, this process's on its machine, is the default index of a CUDA device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.empty(0, device=device).cpu()
    except (AssertionError, NotImplementedError, RuntimeError):
        raise ValueError(
            f"{option}: {name!r} is not an available torch device; use auto, cpu or cuda"
        ) from None
    if device.type != "cuda":
        return device
    index = local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"{option}: there is no cuda:{index}, only {torch.cuda.device_count()} CUDA devices; "
            f"start fewer processes, or use {option} cpu"
        )
    return torch.device("cuda", index)


@dataclass(frozen=True)
class Precision:
    """Number formats of a computation: what autocast casts to, and whether TF32 is allowed.

    The parts that need float32 (norms, logits, prototypes, bank) switch autocast off themselves.
    """

    name: PrecisionName
    device_type: str
    scaler: torch.amp.GradScaler  # of the loss, which fp16 needs and other formats pass through

    @classmethod
    def from_name(cls, name: PrecisionName, device_type: str) -> Precision:
        """Build from fp32, tf32, bf16, fp16, or auto: bf16 on CUDA, fp32 elsewhere."""
        if name == "auto":
            name = "bf16" if device_type == "cuda" else "fp32"
        elif name in ("tf32", "fp16") and device_type != "cuda":
            raise ValueError(f"precision {name} needs CUDA, not {device_type}; use fp32 or bf16")
        return cls(name, device_type, torch.amp.GradScaler(device_type, enabled=name == "fp16"))

    def apply(self) -> None:
        """Set torch's global switches for training."""
        products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
        products.allow_tf32 = convolutions.allow_tf32 = self.name != "fp32"
        convolutions.benchmark = True  # crops come in few shapes, which never change

    def autocast(self) -> torch.autocast:
        """Return the context for forward passes."""
        dtype = _AUTOCAST.get(self.name)
        return torch.autocast(self.device_type, dtype, enabled=dtype is not None)

    def tf32(self) -> AbstractContextManager[None]:
        """Allow TF32 in float32 products and convolutions on CUDA, unless this is fp32."""
        return tf32(self.name != "fp32")


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in float32 products and convolutions on CUDA within the block."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = allowed
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Switch autocast and TF32 off: an error of 1e-3 in a product changes what is nearest."""
    with tf32(False), torch.autocast(device.type, enabled=False):
        yield


def free_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """Return the processor's name."""
    with suppress(OSError):  # only Linux has this file
        if found := re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.M):
            return found[1]
    return platform.processor() or platform.machine()
