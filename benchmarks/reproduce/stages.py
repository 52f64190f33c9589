"""The stages of a reproduction. Each continues where it was interrupted, and skips what is done."""

from __future__ import annotations

import io
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from benchmarks.reproduce import compare, data, estimate, replica, report
from benchmarks.reproduce.plan import MEANINGLESS, MODELS, SETS, STAGES, Model, Plan
from benchmarks.reproduce.status import read_state, seconds_of
from hub import notices
from hub.build_folders import build_folders
from trex_models import cli, plotting
from trex_models.atomic import require_space, write_text_file
from trex_models.precision import free_cores
from trex_models.train import checks
from trex_models.train.__main__ import parse
from trex_models.train.config import config_diff
from trex_models.train.reporting import duration
from trex_models.transfer.__main__ import evaluate_models
from trex_models.transfer.report import environment, read_report

ROOT = Path(__file__).parents[2]
Job = tuple[str, Model, str]  # stage, model, datasets
_RUN_BYTES, _FEATURE_BYTES = 3e9, 2 * 2048  # of checkpoints and exports; of an image, float16


class State:
    """What a reproduction has done, as JSON in OUTPUT/reproduce.json; report.md is next to it."""

    def __init__(self, plan: Plan) -> None:
        self.path, self.found = plan.output / "reproduce.json", dict[str, Any](format=1)
        names = [model.name for model in plan.models]
        if self.path.exists():
            self.found = read_state(plan.output)
            if (scale := self.found["scale"]) != plan.scale_name:
                raise ValueError(
                    f"--output {plan.output} contains a reproduction at scale {scale}; choose "
                    "another folder"
                )
            earlier = [name for name in self.found["models"] if name not in names]
            plan = replace(plan, others=[MODELS[name] for name in earlier if name in MODELS])
            names = [*earlier, *names]
        self.plan = plan
        self.found |= {"scale": plan.scale_name, "models": names}
        self.found |= {"gpus": estimate.gpus(), **environment()}
        if plan.is_dry:
            self.found["note"] = MEANINGLESS

    def write(self, **entries: Any) -> None:
        """Update entries, and write the JSON file and the report."""
        self.found |= entries
        write_text_file(self.path, json.dumps(self.found, indent=2) + "\n")
        text = report.render(self.plan, self.found, list(reports(self.plan).values()))
        write_text_file(self.plan.output / "report.md", text)


def run(plan: Plan) -> bool:
    """Run all stages, in a locked folder; return False if a result is outside its tolerance."""
    plan.output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(plan.output / ".lock", timeout=0):
            state = State(plan)
            return _run_stages(state.plan, state)
    except Timeout:
        raise ValueError(
            f"another process is working in {plan.output}; wait until it ends, or choose another "
            "--output"
        ) from None


def _run_stages(plan: Plan, state: State) -> bool:
    actions: dict[str, Callable[[Plan, State], None]] = {
        "check": check,
        "estimate": measure,
        "train": train,
        "linear": lambda plan, state: evaluate(plan, state, "linear"),
        "transfer": lambda plan, state: evaluate(plan, state, "transfer"),
        "compare": compare_all,
        "figure": draw,
        "folders": build,
    }
    with replica.relaxed() if plan.is_dry else nullcontext():
        for number, stage in enumerate(STAGES, start=1):
            skipped = stage in plan.skip
            print(f"\n[{number}/{len(STAGES)}] {stage}{' (skipped)' * skipped}", flush=True)
            if not skipped:
                actions[stage](plan, state)
    print(f"\nwrote {state.path} and {plan.output / 'report.md'}")
    rows = state.found.get("compare", {}).get("published", [])
    return plan.is_dry or not any(row["verdict"].startswith("OUTSIDE") for row in rows)


def check(plan: Plan, state: State) -> None:
    """Check images, settings, free space and devices: everything that would fail later."""
    if plan.is_dry:
        replica.create(plan.imagenet.parent)
    data.require_folders(plan)
    waiting = [model for model in plan.trained if not plan.is_trained(model)]
    if waiting and not (plan.is_dry or plan.slurm or torch.cuda.is_available()):
        raise ValueError(
            f"--scale {plan.scale_name} trains ResNet-50s, but no CUDA device is available; use "
            "--slurm to write a script for a cluster, or --scale dry to try the command"
        )
    if plan.owner and plan.license:
        notices.find_license(plan.license)
    inputs = [str(plan.imagenet), str(plan.data_root), *data.folders(plan), *state.found["models"]]
    if state.found.get("check", {}).get("inputs") == inputs:
        print("already passed")
        return
    data.link(plan)
    found = data.find(plan)
    images = len(found.task.sources[0])
    if plan.scale.images and images != plan.scale.images:
        print(f"note: {images:,} training images, but {plan.scale.images:,} are usual")
    for model in plan.trained:
        recipe, *options = command(plan, model, images)[-1]
        config, path = parse(recipe, options), plan.run(model) / "config.json"
        if path.exists() and (changes := config_diff(json.loads(path.read_text()), config)):
            raise ValueError(f"{path.parent} has other settings ({'; '.join(changes)}); delete it")
    opened = {found.task.dataset.name: found.task, **found.transfer}
    for name, dataset in opened.items():
        for source in dataset.sources:
            checks.check_samples(name, source)
    evaluated = sum(len(source) for dataset in opened.values() for source in dataset.sources)
    needed = len(plan.trained) * _RUN_BYTES + evaluated * _FEATURE_BYTES
    if not plan.is_dry:
        require_space(plan.output, int(needed), "--output")
    sizes = {name: _sizes(dataset) for name, dataset in opened.items()}
    for name, (classes, train_images, test_images) in sizes.items():
        print(f"  {name}: {classes:,} classes, {train_images:,} training, {test_images:,} test")
    for name, folder in found.missing.items():
        print(f"  MISSING {name}: there is no {folder} in the data root")
    print(
        f"{len(found.transfer)} of {len(SETS[15])} transfer datasets; {len(estimate.gpus())} GPUs"
    )
    state.write(check={"inputs": inputs, "datasets": sizes, "missing": found.missing})


def _sizes(opened: Any) -> tuple[int, int, int]:
    train, test = opened.sources
    return len(test.classes), len(train), len(test)


def images_of(state: State, plan: Plan) -> int:
    """Return the number of training images, which the stage check has counted."""
    if "check" not in state.found:
        raise ValueError("the stage check has not passed; do not skip it")
    return int(state.found["check"]["datasets"][plan.scale.task][1])


def command(plan: Plan, model: Model, images: int, *extra: str) -> tuple[list[str], list[str]]:
    """Return the launcher of a model's training, and the trainer's arguments."""
    folder = plan.data / plan.scale.task
    recipe, *options = plan.scale.training(model, images, folder)
    count = 2 if plan.is_dry else torch.cuda.device_count()
    launcher = [sys.executable, "-m"]
    if count > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"]
    memory = sum(gpu["gigabytes"] for gpu in estimate.gpus())
    if 0 < memory < estimate.RECOMPUTED_BELOW:
        options += ["--system.checkpoint-activations", "True"]
    arguments = [recipe, *options, "--output", str(plan.run(model)), *extra]
    return [*launcher, "trex_models.train"], arguments


def measure(plan: Plan, state: State) -> None:
    """Estimate the hours by arithmetic, and from rates measured on this machine's GPUs."""
    images, titles = images_of(state, plan), {m.name: m.title for m in plan.models}
    sizes = state.found["check"]["datasets"]
    arithmetic = estimate.by_arithmetic(plan.scale, plan.models, sizes)
    print(estimate.format_arithmetic(arithmetic, titles), flush=True)
    measured = state.found.get("estimate", {}).get("measured", {})
    for model in plan.trained[:1] if plan.is_dry else plan.trained:
        if model.name in measured or plan.slurm:
            continue
        launcher, arguments = command(plan, model, images, "--benchmark")
        print(f"\n{model.title}: measuring for about a minute", flush=True)
        measured |= {model.name: estimate.measure([*launcher, *arguments])}
        state.write(estimate={"arithmetic": arithmetic, "measured": measured})
    state.write(estimate={"arithmetic": arithmetic, "measured": measured})
    if len(measured) == len(plan.trained) and measured:
        hours = sum(rate["hours"] for rate in measured.values())
        print(f"training takes {hours:.1f} hours in all on this machine")


def train(plan: Plan, state: State) -> None:
    """Train each model, or write the script that submits the runs to Slurm."""
    images, records = images_of(state, plan), dict(state.found.get("train", {}))
    waiting = [m for m in plan.trained if not plan.is_trained(m)]
    if plan.slurm and waiting:
        script = plan.output / "submit.sh"
        lines = ["#!/usr/bin/env bash", "# docs/slurm.sh has the settings of the jobs."]
        lines += ["set -euo pipefail", f"cd {shlex.quote(str(ROOT))}"]
        for model in waiting:
            _, arguments = command(plan, model, images)
            lines.append(shlex.join(["sbatch", "docs/slurm.sh", *arguments]))
        write_text_file(script, "\n".join(lines) + "\n")
        raise ValueError(
            f"{len(waiting)} models are not trained: run bash {script}, and this command again "
            "when the jobs have ended"
        )
    for model in plan.trained:
        launcher, arguments = command(plan, model, images)
        if plan.is_trained(model):
            print(f"{model.title}: already trained")
        else:
            print(f"{model.title}: {shlex.join([*launcher, *arguments])}", flush=True)
            started = time.monotonic()
            _run([*launcher, *arguments])
            print(f"{model.title}: trained in {duration(time.monotonic() - started)}", flush=True)
        shown = shlex.join(["python", *launcher[1:], *arguments])
        records[model.name] = {"command": shown, "seconds": seconds_of(plan.run(model))}
        state.write(train=records)


def _run(arguments: list[str]) -> None:
    """Run a command; on a signal, let it save its state first."""
    child = subprocess.Popen(arguments, cwd=ROOT)
    try:
        status = child.wait()
    except KeyboardInterrupt:
        child.send_signal(signal.SIGTERM)
        child.wait()
        raise
    if status:
        raise ValueError(f"training failed (exit status {status}); its messages are above")


def evaluate(plan: Plan, state: State, stage: str) -> None:
    """Evaluate the models on the training task, and in the stage transfer on all datasets."""
    images_of(state, plan)
    found = [name for name in SETS[15] if name not in state.found["check"]["missing"]]
    jobs = []
    for model in plan.models:
        names = [data.task_datasets(plan), *(found if stage == "transfer" else ())]
        if model.is_classifier:
            names = ["imagenet-real"]
        if model.recipe and not plan.is_trained(model):
            print(f"{model.title}: not trained")
        elif _is_evaluated(plan.report(stage, model), len(names)):
            print(f"{model.title}: already evaluated")
        else:
            jobs.append((stage, model, ",".join(names)))
    found_devices = devices()
    if len(found_devices) == 1 or len(jobs) < 2:
        for job in jobs:
            evaluate_one(plan, *job, found_devices[0], 1)
    else:
        evaluate_in_parallel(plan, jobs, found_devices)
    state.write()


def devices() -> list[str]:
    """Return the devices that evaluate models at the same time."""
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]


def evaluate_one(
    plan: Plan, stage: str, model: Model, names: str, device: str, processes: int
) -> None:
    """Evaluate one model; its features are deleted after the stage transfer."""
    print(f"{model.title}: {stage}, on {device}", flush=True)
    features = plan.output / "features" / model.name
    with replica.relaxed() if plan.is_dry else nullcontext():
        evaluate_models(
            model=model.source or str(plan.run(model)),
            datasets=names,
            output=plan.report(stage, model),
            data_root=plan.data,
            training_task=None if model.is_classifier else plan.scale.task,
            label=plan.title(model),
            seeds=plan.scale.seeds,
            cache=features,
            dtype="float16",
            device=device,
            workers=0 if plan.is_dry else min(max(free_cores() // processes, 1), 16),
        )
    if stage == "transfer":
        for path in features.rglob("*.safetensors"):  # scores stay in the cache
            path.unlink()


def evaluate_in_parallel(plan: Plan, jobs: Sequence[Job], on: Sequence[str]) -> None:
    """Evaluate models in one process per device."""
    spawn = get_context("spawn")
    queue: Any = spawn.SimpleQueue()
    for job in [*jobs, *(None for _ in on)]:
        queue.put(job)
    arguments = [(plan, queue, device, len(on)) for device in on]
    workers = [spawn.Process(target=_work, args=each) for each in arguments]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            worker.terminate()
    if any(worker.exitcode for worker in workers):
        raise ValueError("the evaluation failed; its messages are above")


def _work(plan: Plan, queue: Any, device: str, processes: int) -> None:
    def work(_: list[str]) -> None:
        for stage, model, names in iter(queue.get, None):
            evaluate_one(plan, stage, model, names, device, processes)

    sys.exit(cli.run(work, [], "transfer"))


def _is_evaluated(path: Path, count: int) -> bool:
    if not path.exists():
        return False
    found = read_report(path)
    robustness = found["tasks"].get("robustness", {})
    return found["complete"] and len(found["datasets"]) + len(robustness) >= count


def reports(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the most complete report of each evaluated model, by name."""
    found = {}
    for model in (*plan.others, *plan.models):
        for stage in ("linear", "transfer"):
            path = plan.report(stage, model)
            if path.exists() and (complete := read_report(path))["complete"]:
                found[model.name] = complete
    return found


def compare_all(plan: Plan, state: State) -> None:
    """Compare the results with the authors', and the models with each other."""
    found = reports(plan)
    results = {name: compare.scores(each) for name, each in found.items()}
    models = [*plan.others, *plan.models]
    rows = [] if plan.scale.subset else compare.published(models, results)
    claims = compare.claims(models, results)
    for row in (*rows, *claims):
        if plan.is_dry:
            row["verdict"] = "meaningless"
        print(f"  {row.get('claim') or row['model'] + ', ' + row['score']}: {row['verdict']}")
    compared = {"results": results, "published": rows, "claims": claims}
    state.write(compare=compared, reports=found)


def draw(plan: Plan, state: State) -> None:
    """Draw the figure of the models that have both scores."""
    both = [r for r in reports(plan).values() if plan.scale.task in r["datasets"] and r["transfer"]]
    if not both:
        print("no model has both scores")
        return
    path = plan.output / "figure.png"
    plotting.save(report.draw(plan, both), path)
    print(f"wrote {path}")
    state.write(figure={"file": path.name, "models": [r["model"]["label"] for r in both]})


def build(plan: Plan, state: State) -> None:
    """Build Hub folders of the trained models, with cards that contain the results."""
    if not (plan.owner and plan.license):
        print("skipped: pass --owner and --license, which the model cards state")
        return
    tag = {"full": "in1k_repro", "dry": "dry_meaningless"}.get(plan.scale_name, "in100")
    built = []
    for model in filter(plan.is_trained, (*plan.others, *plan.trained)):
        paths = [plan.report(stage, model) for stage in ("transfer", "linear")]
        results = tuple([path for path in paths if path.exists()][:1])
        for source in sorted((plan.run(model) / "export").iterdir()):
            is_backbone = source.name == "backbone"  # which the reports are of
            kind = "" if is_backbone else f"_{source.name}"
            with redirect_stdout(io.StringIO()):  # a hint after each folder
                built += build_folders(
                    source,
                    plan.output / "hub",
                    name=f"{model.name}_resnet50{kind}.{tag}",
                    owner=plan.owner,
                    license=plan.license,
                    results=results * is_backbone,
                )
            print(f"built {built[-1]}", flush=True)
    state.write(folders=[str(folder.relative_to(plan.output)) for folder in built])
