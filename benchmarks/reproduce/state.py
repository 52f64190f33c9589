"""State of a reproduction: its files, and a description of what is done, running and left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from benchmarks.reproduce.plan import STAGES, Model, Plan
from trex_models.train.benchmark import format_number
from trex_models.train.reporting import duration
from trex_models.transfer.report import read_report


def read_state(output: Path) -> dict[str, Any]:
    """Read OUTPUT/reproduce.json; raise a ValueError if it is missing or damaged."""
    path = output / "reproduce.json"
    try:
        state = dict(json.loads(path.read_text()))
        _ = state["scale"], [*map(Model.from_json, state["models"].values())]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else repr(error)
        raise ValueError(
            f"{path} is not the state of a reproduction ({reason}); pass its --output, or delete "
            "this file and run the reproduction again"
        ) from error
    return state


def is_locked(folder: Path) -> bool:
    """Return True if a process works in a folder: a reproduction, or a training run."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # read-only, or missing
        return False


def read_results(path: Path, complete: bool = True) -> dict[str, Any] | None:
    """Return a report of the evaluation; None if it is missing, damaged or not complete."""
    with suppress(ValueError):
        report = read_report(path)
        return report if report["complete"] or not complete else None
    return None


def reports(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the last complete report of each evaluated model, by name."""
    results = {}
    for model in plan.known:
        for stage in ("linear", "transfer"):
            if report := read_results(plan.report(stage, model)):
                results[model.name] = report
    return results


def read_metrics(folder: Path) -> tuple[list[dict[str, Any]], float]:
    """Return the metrics of a training run, and the seconds of its steps over all starts."""
    lines, seconds, before = [], 0.0, 0
    with suppress(OSError, ValueError, KeyError):  # a line may be incomplete
        batch = json.loads((folder / "config.json").read_text())["optim"]["batch_size"]
        for text in (folder / "metrics.jsonl").read_text().splitlines():
            line = json.loads(text)
            seconds += (line["step"] - before) * batch / line.get("images_per_second", float("inf"))
            before = line["step"]
            lines.append(line)
    return lines, seconds


def describe(output: Path) -> str:
    """Return one line per stage and model, and the remaining time as far as it is known."""
    state, rows, left = read_state(output), [], list[float | None]()
    models = [Model.from_json(saved) for saved in state["models"].values()]
    plan = Plan(scale_name=state["scale"], output=output, models=models)
    for stage in STAGES:
        if stage in state.get("skipped", ()):
            rows.append((stage, "", "skipped"))
        elif stage not in ("train", "linear", "transfer"):
            rows.append((stage, "", "done" if stage in state else "not done"))
        else:
            for model in models if stage != "train" else plan.to_train:
                describe_model = _training if stage == "train" else _evaluation
                text, seconds = describe_model(plan, state, stage, model)
                rows.append((stage, model.name, text))
                left.append(seconds)
    done = all(text.startswith(("done", "skipped")) for _, _, text in rows)
    title = "finished" if done else "interrupted; the same command continues it"
    if is_locked(output):
        title = f"running {state.get('running')}"
    if any(left):
        title += f"; {'at least ' * (None in left)}{duration(sum(filter(None, left)))} left"
    width = 2 + max(len(name) for _, name, _ in rows)
    lines = (f"{stage:<10}{name:<{width}}{text}" for stage, name, text in rows)
    return "\n".join([f"{output}, scale {state['scale']}: {title}", *lines])


def _training(plan: Plan, state: dict[str, Any], _: str, model: Model) -> tuple[str, float | None]:
    """Describe a training run; return its remaining seconds, too, None if not known."""
    folder, rate = plan.run(model), state.get("estimate", {}).get("measured", {}).get(model.name)
    lines, seconds = read_metrics(folder)
    if plan.is_trained(model):
        return f"done in {duration(seconds)}", 0
    running = ", running" * is_locked(folder)
    if not lines:
        return f"not started{running}", 3600 * rate["hours"] if rate else None
    last = lines[-1]
    epochs = json.loads((folder / "config.json").read_text())["optim"]["epochs"]
    speed = format_number(last.get("images_per_second", 0))
    left = seconds * (epochs / last["epoch"] - 1) if last["epoch"] else None
    return f"epoch {last['epoch']:.2f} of {epochs}, {speed} images/s{running}", left


def _evaluation(
    plan: Plan, _: dict[str, Any], stage: str, model: Model
) -> tuple[str, float | None]:
    """Describe an evaluation; its time is the mean of the finished ones of the stage."""
    report = read_results(plan.report(stage, model), complete=False)
    if report and report["complete"]:
        return f"done in {duration(_seconds(stage, report))}", 0
    text = f"{len(report['datasets'])} datasets done" if report else "not done"
    spent = [_seconds(stage, r) for m in plan.models if (r := read_results(plan.report(stage, m)))]
    return text, sum(spent) / len(spent) if spent else None


def _seconds(stage: str, report: dict[str, Any]) -> float:
    entries: Sequence[Any] = [
        entry
        for name, entry in report["datasets"].items()
        if stage == "linear" or name != report["training_task"]  # whose scores are cached
    ]
    return sum(entry["seconds"]["total"] for entry in entries)
