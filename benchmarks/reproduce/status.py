"""What a reproduction has done, what runs, and what is left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from benchmarks.reproduce.plan import STAGES
from trex_models.train.benchmark import format_number
from trex_models.train.reporting import duration


def read_state(output: Path) -> dict[str, Any]:
    """Read OUTPUT/reproduce.json; raise a ValueError if it is missing or damaged."""
    path = output / "reproduce.json"
    try:
        found = dict(json.loads(path.read_text()))
        _ = found["scale"], found["models"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is not the state of a reproduction ({error}); pass its --output"
        ) from error
    return found


def describe(output: Path) -> str:
    """Return one line per stage and model, and the remaining time as far as it is known."""
    found, running = read_state(output), _is_locked(output)
    rows, left, unknown = [], 0.0, False
    for stage in STAGES:
        if stage in ("train", "linear", "transfer"):
            for name in found["models"]:
                text, seconds = _of_model(output, found, stage, name)
                rows.append((stage, name, text))
                left += seconds or 0
                unknown |= seconds is None
        else:
            rows.append((stage, "", "done" if stage in found else "not done"))
    state = "running" if running else "not running; the same command continues it"
    if left or unknown:
        remaining = f"at least {duration(left)}" if unknown else duration(left)
        state += f"; {remaining} left" if left else "; the remaining time is not known yet"
    width = 2 + max(len(name) for _, name, _ in rows)
    lines = (f"{stage:<10}{name:<{width}}{text}" for stage, name, text in rows)
    return "\n".join([f"{output}, scale {found['scale']}: {state}", *lines])


def _is_locked(output: Path) -> bool:
    try:
        with FileLock(output / ".lock", timeout=0):
            return False
    except Timeout:
        return True


def _of_model(
    output: Path, found: Mapping[str, Any], stage: str, name: str
) -> tuple[str, float | None]:
    """Return the state of a stage for a model, and its remaining seconds; None if not known."""
    if stage == "train":
        return _training(output / "runs" / name, found, name)
    path = output / stage / f"{name}.json"
    done = [p for p in path.parent.glob("*.json") if _complete(p)]
    usual = sum(map(_seconds, done)) / len(done) if done else None
    if path in done:
        return f"done in {duration(_seconds(path))}", 0
    if path.exists():
        report = json.loads(path.read_text())
        return f"{len(report['datasets'])} datasets done", usual
    return "not done", usual


def _training(folder: Path, found: Mapping[str, Any], name: str) -> tuple[str, float | None]:
    if (folder / "export" / "backbone" / "model.safetensors").exists():
        seconds = found.get("train", {}).get(name, {}).get("seconds")
        return "done" if seconds is None else f"done in {duration(seconds)}", 0
    hours = found.get("estimate", {}).get("measured", {}).get(name, {}).get("hours")
    expected = None if hours is None else 3600 * hours
    lines = (folder / "metrics.jsonl").read_text().splitlines() if folder.exists() else []
    if not lines:
        return "not started", expected
    last = json.loads(lines[-1])
    epochs = json.loads((folder / "config.json").read_text())["optim"]["epochs"]
    left = seconds_of(folder) * (epochs / last["epoch"] - 1) if last["epoch"] else expected
    rate = last.get("images_per_second", 0)
    return f"epoch {last['epoch']:.2f} of {epochs}, {format_number(rate)} images/s", left


def seconds_of(folder: Path) -> float:
    """Return the duration of a run's steps, over all its starts, from its metrics."""
    seconds = before = 0.0
    batch = json.loads((folder / "config.json").read_text())["optim"]["batch_size"]
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        if rate := line.get("images_per_second"):
            seconds += (line["step"] - before) * batch / rate
        before = line["step"]
    return seconds


def _complete(path: Path) -> bool:
    return bool(json.loads(path.read_text())["complete"])


def _seconds(path: Path) -> float:
    report = json.loads(path.read_text())
    entries = [*report["datasets"].values(), *report["tasks"].get("robustness", {}).values()]
    return sum(entry["seconds"]["total"] for entry in entries)
