"""Check for leaks: memory and open files of the trainer and its loader worker over a long run.

    python -m benchmarks.growth --steps 10000

Takes about ten minutes on two idle cores. The trainer's command trains a tiny network on tiny
fractals with one loader worker, logs to the console, metrics.jsonl and TensorBoard every 20 steps,
and validates and saves a checkpoint ten times. This process reads the trainer's /proc (Linux only).
The benchmark detects memory that grows with the number of steps, not with the size of the images or
the network.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import linregress

from benchmarks import measure
from trex_models import plotting

_STEPS_PER_EPOCH = 50
_RUN = f"""--data.num-classes 4 --data.images-per-class {_STEPS_PER_EPOCH} --data.image-size 16
    --optim.batch-size 4 --optim.warmup-epochs 0
    --crops.local-crops 1 --crops.global-size 16 --crops.local-size 8
    --model.backbone-args channels=(8,8,8,8) --model.hidden-dim 16 --model.embedding-dim 8
    --objective.bank-size 64 --validation.images-per-class 4 --validation.neighbors 3
    --system.device cpu --system.workers 1 --system.tensorboard --system.log-every 20""".split()
_SHARES = (0.1, 0.25, 0.5, 1.0)
_LABELS = {"trainer_bytes": "trainer", "worker_bytes": "loader worker"}


def sample(pid: int) -> dict[str, int]:
    """Return current memory and number of open files of a trainer and its loader worker."""
    children = sorted(_children(pid))
    if not children:
        raise FileNotFoundError(f"process {pid} has no child process")
    usage: dict[str, int] = {}
    for name, process in (("trainer", pid), ("worker", children[0][1])):
        rollup = _rollup(process)
        usage[f"{name}_bytes"] = rollup["Rss"]
        usage[f"{name}_shared_bytes"] = rollup["Pss_Shmem"]
        usage[f"{name}_files"] = sum(1 for _ in Path(f"/proc/{process}/fd").iterdir())
    return usage


def slope(steps: Sequence[int], values: Sequence[float]) -> dict[str, float]:
    """Fit a line to values by step, by least squares."""
    fit: Any = linregress(steps, values)
    result = {"per_step": fit.slope, "standard_error": fit.stderr, "r_squared": fit.rvalue**2}
    return {name: float(np.nan_to_num(value)) for name, value in result.items()}  # 0 if constant


def watch(steps: int, seconds: float, folder: Path) -> tuple[list[dict[str, int]], float]:
    """Train for a number of steps and sample memory every ``seconds``."""
    epochs = math.ceil(steps / _STEPS_PER_EPOCH)
    command = [sys.executable, "-m", "trex_models.train", "smoke", *_RUN]
    command += ["--output", str(folder / "run"), "--optim.epochs", str(epochs)]
    command += ["--validation.every", str(max(1, epochs // 10))]
    command += ["--system.save-steps", str(max(1, epochs // 10) * _STEPS_PER_EPOCH)]
    samples: list[dict[str, int]] = []
    started = time.monotonic()
    with (folder / "output.txt").open("w+") as output:
        # One thread, since more threads only wait for each other on tensors this small.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            while run.poll() is None:
                time.sleep(seconds)
                step = _last_step(folder / "run" / "metrics.jsonl")
                if 0 < step < epochs * _STEPS_PER_EPOCH:
                    try:
                        samples.append({"step": step, **sample(run.pid)})
                    except OSError:  # the process is ending
                        continue
                    if sys.stderr.isatty():
                        print(f"\rstep {step}", end="", file=sys.stderr)
        finally:
            run.kill()
            run.wait()
        if run.returncode:
            raise RuntimeError((folder / "output.txt").read_text())
    return samples, time.monotonic() - started


def draw(samples: Sequence[Mapping[str, int]], fits: Mapping[str, Any], path: Path) -> None:
    """Plot memory and open files by step."""
    steps = np.array([s["step"] for s in samples])
    late = steps[_second_half(steps)]
    with plotting.new_figure(9, 3.2) as figure:
        memory, files = figure.subplots(1, 2)
        for key, label in _LABELS.items():
            values = np.array([s[key] for s in samples]) / 1e6
            per_step = fits[key]["per_step"]
            label = f"{label} ({per_step:+.0f} bytes per step)"
            (line,) = memory.plot(steps, values, lw=1, label=label)
            trend = values[_second_half(steps)].mean() + per_step / 1e6 * (late - late.mean())
            memory.plot(late, trend, "--", c=line.get_color())
        memory.set(xlabel="step", ylabel="resident MB", ylim=(0, None))
        memory.legend(loc="lower right", fontsize="small")
        for name in ("trainer", "worker"):
            label = _LABELS[f"{name}_bytes"]
            files.plot(steps, [s[f"{name}_files"] for s in samples], lw=1, label=label)
        files.set(xlabel="step", ylabel="open file descriptors", ylim=(0, None))
        files.legend(loc="lower right", fontsize="small")
    plotting.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = measure.parser("growth", __doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds between two samples")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        samples, seconds = watch(options.steps, options.seconds, Path(folder))
    steps = [s["step"] for s in samples]
    late = _second_half(np.array(steps))
    fits = {
        key: slope(
            [step for step, is_late in zip(steps, late, strict=True) if is_late],
            [s[key] for s, is_late in zip(samples, late, strict=True) if is_late],
        )
        for key in _LABELS
    }
    rows = []
    for share in _SHARES:
        row = min(samples, key=lambda s: abs(s["step"] - share * steps[-1]))
        rows.append({"share": share, **row})
        print(
            f"{share:4.0%} step {row['step']:6d}: trainer {row['trainer_bytes'] / 1e6:.1f} MB, "
            f"{row['trainer_files']} files; loader worker {row['worker_bytes'] / 1e6:.1f} MB, "
            f"{row['worker_files']} files; shared memory "
            f"{(row['trainer_shared_bytes'] + row['worker_shared_bytes']) / 1e6:.2f} MB"
        )
    for key, fit in fits.items():
        print(
            f"{_LABELS[key]}, second half: {fit['per_step']:+.1f} +- {fit['standard_error']:.1f} "
            f"bytes per step (r2 {fit['r_squared']:.2f})"
        )
    print(f"{len(samples)} samples in {seconds:.0f} s")
    draw(samples, fits, options.out.with_suffix(".png"))
    measure.record(
        options.out,
        {
            "machine": measure.machine(),
            "arguments": _RUN,
            "seconds": round(seconds, 1),
            "samples": len(samples),
            "rows": rows,
            "second_half": fits,
        },
    )


def _second_half(steps: np.ndarray) -> np.ndarray:
    return steps >= steps[-1] / 2


def _children(pid: int) -> list[tuple[int, int]]:
    """Return the start time and ID of each child process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # Fields after the name, which may contain blanks: state, parent, ..., 20th: start.
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # the process has ended
        if int(fields[1]) == pid:
            found.append((int(fields[19]), int(stat.parent.name)))
    return found


def _rollup(pid: int) -> dict[str, int]:
    """Return the memory of a process by category, in bytes."""
    kinds = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, kilobytes, _ = line.split()
        kinds[name.removesuffix(":")] = int(kilobytes) * 1024
    return kinds


def _last_step(metrics: Path) -> int:
    """Return the last logged step; 0 before the first."""
    try:
        lines = metrics.read_text().splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, IndexError, ValueError):  # no file yet, or an incomplete line
        return 0


if __name__ == "__main__":
    main()
