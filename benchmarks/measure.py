"""Shared helpers of the benchmarks: alternating measurements, machine description and records.

On a shared machine, absolute times are unreliable. Variants are therefore measured alternately, and
the reported ratio is the median of the ratios of all rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from trex_models.atomic import write_text_file
from trex_models.precision import free_cores, processor
from trex_models.train.signals import STOP_SIGNALS

RESULTS = Path(__file__).parent / "results"
_CPU = torch.device("cpu")
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "simplejpeg", "scikit-learn")


def alternate(
    variants: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Measure variants alternately, in reverse order in every second round."""
    measured: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-warm_up, rounds):
        names = list(variants)
        for name in reversed(names) if number % 2 else names:
            value = variants[name]()
            if number >= 0:
                measured[name].append(value)
        if sys.stderr.isatty():
            done = f"round {number + 1}/{rounds}" if number >= 0 else "warming up"
            print(f"\r{done}", end="\n" if number + 1 == rounds else "", file=sys.stderr)
    return measured


def wait(device: torch.device) -> None:
    """Wait until a device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device = _CPU) -> float:
    """Return the wall time of a call."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of a call in this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def spreads(measured: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float | int]]:
    """Return the spread of each variant."""
    return {name: spread(values) for name, values in measured.items()}


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Return median, minimum, maximum and number of values."""
    return {
        "median": _rounded(statistics.median(values)),
        "min": _rounded(min(values)),
        "max": _rounded(max(values)),
        "n": len(values),
    }


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float | int]:
    """Return the spread of the ratios, one per round."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


def compared(
    ours: Callable[[], float], reference: Callable[[], float], rounds: int
) -> dict[str, dict[str, float | int]]:
    """Measure two rates alternately; return their spreads and that of their ratio."""
    rates = alternate({"ours": ours, "reference": reference}, rounds)
    return {**spreads(rates), "ratio": ratios(rates["ours"], rates["reference"])}


def print_compared(title: str, found: Mapping[str, Mapping[str, float | int]]) -> None:
    """Print the result of `compared`."""
    print(title)
    for name, values in found.items():
        print(f"  {name}: {format_spread(values)}")


def format_spread(values: Mapping[str, float | int], unit: str = "") -> str:
    """Format a spread: median (minimum to maximum, n)."""
    return f"{values['median']:g}{unit} ({values['min']:g} to {values['max']:g}, n = {values['n']})"


def machine(device: str = "cpu") -> dict[str, Any]:
    """Describe the machine: processor, device, load and package versions."""
    installed = {}
    for package in _PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    description: dict[str, Any] = {
        "processor": processor(),
        "instructions": _instructions(),
        "cores": free_cores(),
        "threads": torch.get_num_threads(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", ""),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **installed,
    }
    if device.startswith("cuda"):
        description |= {
            "device": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return description


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the option ``--out`` (default: ``benchmarks/results/<name>.json``)."""
    result = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--out", type=_path, default=RESULTS / f"{name}.json", help="JSON file")
    return result


def _path(text: str) -> Path:
    return Path(text).expanduser()


def record(out: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text_file(out, json.dumps(result, indent=2) + "\n")
    print(f"wrote {out}")


def interrupt_on_signals() -> None:
    """Handle stop signals like Ctrl-C, unless they are ignored, as under nohup."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def _instructions() -> str:
    """Return the instruction set of torch's kernels and the bfloat16 instructions available."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    found = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *found])


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
