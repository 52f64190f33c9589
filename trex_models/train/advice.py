"""What makes training faster here: advice from the rates of the loader, the step and both."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Where advice changes.
_HINDERED = 0.8  # share of the slower one's rate that loader and step reach together
_CLOSE, _FAR = 1.2, 5.0  # ratio of the loader's rate to the step's
_WAITS = 0.4  # share of its time that a worker waits for a core, or otherwise
_LARGE = 1.25  # an image's side over the one that the crops need
_ROOMY = 0.4  # share of the device's memory in use


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Images per second, of all processes together.

    Args:
        loader: Of the loader alone.
        step: Of augmentation and training step alone.
        both: Of training.
    """

    loader: float
    step: float
    both: float


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What advice depends on beside the rates.

    Args:
        workers: Loader processes of each training process.
        cores: Cores of each training process.
        queued: Share of its time that a worker waits for a core; 0 where it is not known.
        blocked: Share of its time that it waits otherwise, mostly for files; 0 where it is not
            known.
        files: Whether the images are files, not generated.
        simplejpeg: Whether that package decodes JPEG.
        side: Median of the images' shorter sides, pixels.
        needed_side: From which on no crop is enlarged, pixels.
        cuda: Whether it trains on CUDA.
        bf16: Whether it could compute in bf16, and faster, but does not.
        channels_last: Whether images and weights are NHWC.
        compiled: Whether the encoder is compiled.
        recomputes: Whether activations are computed anew in the backward pass.
        idle_devices: CUDA devices of this machine that no process uses.
        memory: Share of the device's memory in use; 1 on the CPU.
    """

    workers: int
    cores: int
    queued: float
    blocked: float
    files: bool
    simplejpeg: bool
    side: float
    needed_side: float
    cuda: bool
    bf16: bool
    channels_last: bool
    compiled: bool
    recomputes: bool
    idle_devices: int
    memory: float


def advice(rates: Rates, setting: Setting) -> list[str]:
    """Name the bottleneck, then what helps, the cheapest first: a line each."""
    ratio = rates.loader / rates.step
    told = f"loader / step = {figure(ratio)}. "
    reached = rates.both / min(rates.loader, rates.step)
    if setting.workers == 0 and ratio < _FAR:
        told += "Loading and training take turns in one process."
        helps = [_workers(ratio, setting)]
        if ratio < 1:
            helps += _smaller_work(setting)
    elif ratio < 1:
        told += f"The loader is the bottleneck: the step waits for it {1 - ratio:.0%} of the time."
        helps = [_workers(ratio, setting), *_smaller_work(setting)]
    elif reached < _HINDERED and ratio < _FAR:
        told += (
            f"The cores are the bottleneck: both together reach {reached:.0%} of the rate of the "
            "slower one alone."
        )
        helps = _fewer_cores(ratio, setting)
    else:
        spare = ", but the loader has little to spare" if ratio < _CLOSE else ""
        told += f"The step is the bottleneck{spare}."
        if reached < _HINDERED:  # the loader's work is too little to explain it
            told += (
                f" (Training reached {reached:.0%} of the step's own rate: other programs seem to "
                "use this machine; measure again when they do not.)"
            )
        helps = _faster_step(setting)
    return [told, *(f"- {line}" for line in helps)]


def _wanted_workers(ratio: float, setting: Setting) -> int:
    """Return how many workers of one process would be a little faster than the step."""
    return max(1, math.ceil(1.1 * max(setting.workers, 1) / ratio))


def _workers(ratio: float, setting: Setting) -> str:
    """Say how many workers to take, or how many cores the step wants."""
    wanted = _wanted_workers(ratio, setting)
    if setting.workers >= setting.cores:
        return (
            f"more cores: the workers use all {setting.cores} of each training process, its step "
            f"could use {wanted} workers"
        )
    helps = f"--system.workers {min(wanted, setting.cores)}: there are {setting.cores} cores"
    if wanted > setting.cores:
        helps += f" (the step could use {wanted} workers)"
    return helps if setting.cuda else f"{helps}, which the step uses, too"


def _smaller_work(setting: Setting) -> list[str]:
    """Say what lets a worker load more images."""
    helps = []
    if setting.files and not setting.simplejpeg:
        helps.append("pip install simplejpeg: it decodes JPEG faster than Pillow, to the same bits")
    if setting.files and setting.side > _LARGE * setting.needed_side:
        helps.append(
            f"smaller files: the images' shorter side is {setting.side:.0f} pixels (median), these "
            f"crops need {setting.needed_side:.0f}"
        )
    if setting.files and setting.blocked > _WAITS:
        helps.append(
            "faster storage, such as a local disk: the workers wait, most likely for files, "
            f"{setting.blocked:.0%} of the time"
        )
    if setting.queued > _WAITS and setting.workers <= setting.cores:
        helps.append(
            f"cores for this alone: the workers wait for one {setting.queued:.0%} of the time, "
            "others use them"
        )
    return helps


def _fewer_cores(ratio: float, setting: Setting) -> list[str]:
    """Say what helps where loader and step take the cores from each other."""
    helps = []
    wanted = _wanted_workers(ratio, setting)
    if wanted < setting.workers:
        helps.append(f"--system.workers {wanted} would be enough for the step")
    helps += _smaller_work(setting)
    return [*helps, "more cores" if setting.cuda else "more cores, or training on a CUDA device"]


def _faster_step(setting: Setting) -> list[str]:
    helps = []
    if setting.workers == 0:
        helps.append("--system.workers 1: it loads beside the step")
    if setting.bf16:
        helps.append("--precision bf16")
    if not setting.channels_last:
        helps.append("--system.channels-last")
    if not setting.cuda:
        return [*helps, "training on a CUDA device"]
    if not setting.compiled:
        helps.append("--system.compile, which takes minutes at the start")
    if setting.recomputes:
        helps.append(
            "--system.no-checkpoint-activations, if the memory holds them: "
            f"{setting.memory:.0%} of it is in use"
        )
    elif setting.memory < _ROOMY:
        helps.append(
            f"a larger --optim.batch-size: {setting.memory:.0%} of the device's memory is in use "
            "(it is another training: the learning rate grows alike)"
        )
    if setting.idle_devices:
        helps.append(f"torchrun --nproc-per-node: {setting.idle_devices} CUDA devices are idle")
    else:
        helps.append("more or faster GPUs")
    return helps


def figure(value: float) -> str:
    """Return a number with three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
