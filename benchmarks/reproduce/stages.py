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
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from benchmarks.reproduce import compare, data, estimate, replica, report
from benchmarks.reproduce.plan import MEANINGLESS, SCALES, SETS, STAGES, Model, Plan
from benchmarks.reproduce.state import is_locked, read_metrics, read_results, read_state, reports
from hub import notices
from hub.build_folders import build_folders
from trex_models import cli, plotting
from trex_models.atomic import require_space, write_text_file
from trex_models.data.sources import spread_indices
from trex_models.precision import free_cores
from trex_models.train.__main__ import parse
from trex_models.train.config import config_diff
from trex_models.transfer.__main__ import evaluate_models
from trex_models.transfer.report import environment

ROOT = Path(__file__).parents[2]
Job = tuple[str, Model, Sequence[str]]  # stage, model, datasets
_RUN_BYTES, _FEATURE_BYTES = 3e9, 2 * 2048  # of checkpoints and exports; of an image, float16
_SAMPLES = 16  # images of each part that are decoded


class State:
    """The stages' results, as JSON in OUTPUT/reproduce.json; report.md is next to it."""

    def __init__(self, plan: Plan) -> None:
        self.path, self.results = plan.output / "reproduce.json", dict[str, Any](format=1)
        names = {model.name for model in plan.models}
        if self.path.exists():
            self.results = read_state(plan.output)
            scale, passed = self.results["scale"], "check" in self.results
            if passed and scale != plan.scale_name:
                raise ValueError(
                    f"--output {plan.output} contains a reproduction at scale {scale}; choose "
                    "another folder"
                )
            earlier = map(Model.from_json, self.results["models"].values()) if passed else ()
            plan = replace(plan, others=[m for m in earlier if m.name not in names])
        self.plan = plan
        self.results |= {"scale": plan.scale_name, "skipped": plan.skip}
        self.results["models"] = {model.name: asdict(model) for model in plan.known}
        self.results |= {"gpus": estimate.gpus(), **environment()}
        if plan.is_dry:
            self.results["note"] = MEANINGLESS

    def write(self, **entries: Any) -> None:
        """Update entries, and write the JSON file and the report."""
        self.results |= entries
        write_text_file(self.path, json.dumps(self.results, indent=2) + "\n")
        text = report.render(self.plan, self.results, list(reports(self.plan).values()))
        write_text_file(self.plan.output / "report.md", text)

    @property
    def check(self) -> dict[str, Any]:
        """Result of the stage check, which the others need."""
        if "check" not in self.results:
            raise ValueError("the stage check has not passed; do not skip it")
        return dict(self.results["check"])


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
    actions: list[Callable[[Plan, State], None]]
    actions = [check, measure, train, linear, transfer, compare_all, draw, build]
    with replica.relaxed() if plan.is_dry else nullcontext():
        for number, (stage, action) in enumerate(zip(STAGES, actions, strict=True), start=1):
            skipped = stage in plan.skip
            print(f"\n[{number}/{len(STAGES)}] {stage}{' (skipped)' * skipped}", flush=True)
            if not skipped:
                state.write(running=stage)
                action(plan, state)
    print(f"\nwrote {state.path} and {plan.output / 'report.md'}")
    rows = state.results.get("compare", {}).get("published", [])
    return not any(row["verdict"] == compare.OUTSIDE for row in rows)


def check(plan: Plan, state: State) -> None:
    """Check images, settings, free space and devices: everything that would fail later."""
    if plan.is_dry:
        replica.create(plan.imagenet.parent)
    data.require_folders(plan)
    trains = "train" not in plan.skip
    waiting = [m for m in plan.to_train if trains and not plan.is_trained(m)]
    if not (plan.is_dry or torch.cuda.is_available()):
        if waiting and not plan.slurm:
            raise ValueError(
                f"--scale {plan.scale_name} trains ResNet-50s, but no CUDA device is available; "
                "use --slurm to write a script for a cluster, or --scale dry to try the command"
            )
        print("note: without a CUDA device, the evaluation takes weeks")
    if bool(plan.owner) != bool(plan.license):
        raise ValueError("--owner and --license are only useful together; pass both or neither")
    if plan.license:
        notices.find_license(plan.license)
    inputs = [
        str(plan.imagenet),
        str(plan.data_root),
        *data.folders(plan),
        *state.results["models"],
    ]
    if state.results.get("check", {}).get("inputs") == inputs:
        print("already passed")
        return
    data.link(plan)
    opened, missing = data.find(plan)
    images = len(opened[plan.scale.task].sources[0])
    if plan.scale.images and images != plan.scale.images:
        print(f"note: {images:,} training images, expected {plan.scale.images:,}")
    for model in plan.to_train:
        _check_run(plan, model, images)
    sources = [source for dataset in opened.values() for source in dataset.sources]
    for source in sources:
        for index in spread_indices(source, _SAMPLES):
            source.read(index)
    extracted = len(devices()) * sum(map(len, sources)) * _FEATURE_BYTES
    if not plan.is_dry:
        require_space(plan.output, int(len(waiting) * _RUN_BYTES + extracted), "--output")
    sizes = {
        name: (len(dataset.sources[-1].classes), *map(len, dataset.sources))
        for name, dataset in opened.items()
    }
    for name, (classes, train_images, test_images) in sizes.items():
        print(f"  {name}: {classes:,} classes, {train_images:,} training, {test_images:,} test")
    for name, folders in missing.items() if plan.data_root else ():
        print(f"  MISSING {name}: {plan.data_root} has no folder {' or '.join(folders)}")
    print(f"{len(opened) - 1} of {len(SETS[15])} transfer datasets; {len(estimate.gpus())} GPUs")
    state.write(check={"inputs": inputs, "datasets": sizes, "missing": missing})


def _check_run(plan: Plan, model: Model, images: int) -> None:
    """Check a model's options, and that an earlier run in its folder has the same."""
    recipe, *options = command(plan, model, images)[-1]
    config, path = parse(recipe, options), plan.run(model) / "config.json"
    config = replace(config, objective=config.objective.resolved())  # as in the file
    if path.exists():
        saved = json.loads(path.read_text()) | {"precision": config.precision}
        if changes := config_diff(saved, config):
            raise ValueError(
                f"{path.parent} is a run with other settings ({'; '.join(changes)}); choose "
                "another --output"
            )


def command(plan: Plan, model: Model, images: int, *extra: str) -> tuple[list[str], list[str]]:
    """Return the launcher of a model's training, and the trainer's arguments."""
    folder = plan.data / plan.scale.task
    recipe, *options = plan.scale.training(model, images, folder)
    count, gpus = 2, estimate.gpus()
    if not plan.is_dry:  # each GPU has the same number of images
        count = next((n for n in range(len(gpus), 1, -1) if plan.scale.batch_size % n == 0), 1)
    launcher = [sys.executable, "-m"]
    if count > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"]
    memory = sum(gpu["gigabytes"] for gpu in gpus[:count])
    if 0 < memory < estimate.RECOMPUTED_BELOW:
        options.append("--system.checkpoint-activations")
    arguments = [recipe, *options, "--output", str(plan.run(model)), *extra]
    return [*launcher, "trex_models.train"], arguments


def measure(plan: Plan, state: State) -> None:
    """Estimate the hours by arithmetic, and from rates measured on this machine's GPUs."""
    sizes = state.check["datasets"]
    scale = SCALES["full"] if plan.is_dry else plan.scale  # the dry run trains no ResNet-50
    known = estimate.nominal_sizes(scale) if plan.is_dry else sizes
    arithmetic = estimate.by_arithmetic(scale, plan.known, known)
    print(estimate.format_arithmetic(arithmetic), flush=True)
    earlier, gpus = state.results.get("estimate", {}), estimate.gpus()
    measured = earlier["measured"] if earlier.get("gpus") == gpus else {}
    for model in plan.to_train[:1] if plan.is_dry else plan.to_train:
        if model.name in measured or plan.slurm or plan.is_trained(model):
            continue
        launcher, arguments = command(plan, model, sizes[plan.scale.task][1], "--benchmark")
        print(f"\n{model.title}: measuring for about a minute", flush=True)
        output = run_command([*launcher, *arguments], capture=True)
        print(output, end="", flush=True)
        measured |= {model.name: estimate.parse_benchmark(output)}
        state.write(estimate={"arithmetic": arithmetic, "measured": measured, "gpus": gpus})
    state.write(estimate={"arithmetic": arithmetic, "measured": measured, "gpus": gpus})
    waiting = [model.name for model in plan.to_train if not plan.is_trained(model)]
    if waiting and measured.keys() >= {*waiting}:
        hours = sum(measured[name]["hours"] for name in waiting)
        print(f"training takes {hours:.1f} hours on this machine")


def train(plan: Plan, state: State) -> None:
    """Train each model, or write the script that submits the runs to Slurm."""
    images, records = state.check["datasets"][plan.scale.task][1], state.results.get("train", {})
    commands = {model: command(plan, model, images) for model in plan.to_train}
    waiting = [model for model in plan.to_train if not plan.is_trained(model)]
    if plan.slurm and waiting:
        script, jobs = plan.output / "submit.sh", []
        for model in waiting:
            jobs.append(shlex.join(["sbatch", "docs/slurm.sh", *commands[model][-1]]))
            records |= {model.name: {"command": jobs[-1]}}
        head = (
            "#!/usr/bin/env bash\n# docs/slurm.sh has the settings of the jobs.\nset -euo pipefail"
        )
        write_text_file(script, "\n".join([head, f"cd {shlex.quote(str(ROOT))}", *jobs, ""]))
        state.write(train=records)
        text = f"{len(waiting)} models are not trained: run bash {script}, and when the jobs have "
        raise cli.Stopped(f"{text}ended, this command again on a machine with a GPU", status=0)
    for model, (launcher, arguments) in commands.items():
        shown = shlex.join(["python", *launcher[1:], *arguments])
        if is_locked(plan.run(model)):  # torchrun's processes survive if it is killed
            print(f"{model.title}: waiting for the training of an earlier command", flush=True)
        while is_locked(plan.run(model)):
            time.sleep(1)
        if plan.is_trained(model):
            print(f"{model.title}: already trained")
        else:
            print(f"{model.title}: {shown}", flush=True)
            run_command([*launcher, *arguments])
            records[model.name] = {"command": shown}
        record = records.setdefault(model.name, {"command": shown})
        record["seconds"] = read_metrics(plan.run(model))[1]
        state.write(train=records)


def run_command(arguments: Sequence[str], capture: bool = False) -> str:
    """Run a training command, return its output; on a signal, let it save its state first."""
    pipe = subprocess.PIPE if capture else None
    child = subprocess.Popen(arguments, cwd=ROOT, stdout=pipe, text=True)
    try:
        output, _ = child.communicate()
    except KeyboardInterrupt:
        child.send_signal(signal.SIGTERM)
        child.communicate()
        raise
    if child.returncode:
        print(output or "", end="")
        raise ValueError(f"training failed (status {child.returncode}); its messages are above")
    return output or ""


def linear(plan: Plan, state: State) -> None:
    """Evaluate the models on the training task."""
    _evaluate(plan, state, "linear", [])


def transfer(plan: Plan, state: State) -> None:
    """Evaluate the models on the transfer datasets; the scores of the training task are cached."""
    _evaluate(plan, state, "transfer", [n for n in SETS[15] if n not in state.check["missing"]])


def _evaluate(plan: Plan, state: State, stage: str, names: Sequence[str]) -> None:
    jobs: list[Job] = []
    for model in plan.models:
        wanted = ["imagenet-real"] if model.is_classifier else [plan.scale.task, *names]
        if model.recipe and not plan.is_trained(model):
            print(f"{model.title}: not trained")
        elif _is_evaluated(plan, stage, model, wanted):
            print(f"{model.title}: already evaluated")
        else:
            jobs.append((stage, model, wanted))
    if len(devices()) == 1 or len(jobs) < 2:
        for job in jobs:
            _evaluate_one(plan, *job, devices()[0], 1)
    else:
        _evaluate_in_parallel(plan, jobs)
    state.write()


def _is_evaluated(plan: Plan, stage: str, model: Model, names: Sequence[str]) -> bool:
    """Return True if a report on a model has all datasets and is newer than the weights."""
    path, weights = plan.report(stage, model), plan.weights(model)
    if not (results := read_results(path)):
        return False
    if weights.exists() and weights.stat().st_mtime > path.stat().st_mtime:
        return False
    tasks = [results["datasets"], *results["tasks"].values()]
    return {*names} <= {name for task in tasks for name in task}


def devices() -> list[str]:
    """Return the devices, each of which evaluates one model at a time."""
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]


def _evaluate_one(
    plan: Plan, stage: str, model: Model, names: Sequence[str], device: str, processes: int
) -> None:
    features = plan.output / "features" / model.name
    features.mkdir(parents=True, exist_ok=True)
    # Processes of a killed command may still evaluate the model.
    with FileLock(features / ".lock"), replica.relaxed() if plan.is_dry else nullcontext():
        if _is_evaluated(plan, stage, model, names):
            return
        print(f"{model.title}: {stage}, on {device}", flush=True)
        evaluate_models(
            model=model.source or str(plan.run(model)),
            datasets=",".join(data.argument(plan, name) for name in names),
            output=plan.report(stage, model),
            data_root=plan.data,
            training_task=None if model.is_classifier else plan.scale.task,
            label=model.title,
            seeds=plan.scale.seeds,
            cache=features,
            dtype="float32" if model.is_classifier else "float16",  # logits must not be equal
            device=device,
            workers=0 if plan.is_dry else min(max(free_cores() // processes, 1), 16),
        )
        for path in features.rglob("*.safetensors"):  # 33 GB at full scale; the scores are kept
            path.unlink()


def _evaluate_in_parallel(plan: Plan, jobs: Sequence[Job]) -> None:
    """Evaluate models in one process per device."""
    spawn, used = get_context("spawn"), devices()
    queue: Any = spawn.SimpleQueue()
    for job in [*jobs, *(None for _ in used)]:
        queue.put(job)
    arguments = [(plan, queue, device, len(used)) for device in used]
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
            _evaluate_one(plan, stage, model, names, device, processes)

    sys.exit(cli.run(work, [], "transfer"))


def compare_all(plan: Plan, state: State) -> None:
    """Compare the results with the authors', and the models with each other."""
    found = reports(plan)
    results = {name: compare.scores(each) for name, each in found.items()}
    rows = [] if plan.scale.subset else compare.published(plan.known, results)
    claims = compare.claims(plan.known, results, with_authors=not plan.scale.subset)
    for row in (*rows, *claims):
        if plan.is_dry:
            row["verdict"] = "meaningless"
        print(f"  {row.get('claim') or row['model'] + ', ' + row['score']}: {row['verdict']}")
    compared = {"results": results, "published": rows, "claims": claims}
    state.write(compare=compared, reports=found)


def draw(plan: Plan, state: State) -> None:
    """Draw the figure of the models that have both scores."""
    both = [r for r in reports(plan).values() if plan.scale.task in r["datasets"]]
    both = [r for r in both if any(name in r["datasets"] for name in SETS[13])]
    names = [name for name in SETS[13] if both and all(name in r["datasets"] for r in both)]
    if not names:
        print("no transfer dataset of the figure has results of all models")
        return
    path = plan.output / "figure.png"
    plotting.save(report.draw(plan, both, names), path)
    print(f"wrote {path}")
    state.write(figure=path.name)


def build(plan: Plan, state: State) -> None:
    """Build Hub folders of the trained models, with cards that contain the results."""
    if not plan.owner:
        print("skipped: pass --owner and --license, which the model cards state")
        return
    tag = {"full": "in1k_repro", "dry": "dry_meaningless"}.get(plan.scale_name, "in100")
    built = []
    for model in filter(plan.is_trained, plan.known):
        paths = [plan.report(stage, model) for stage in ("transfer", "linear")]
        results = tuple([path for path in paths if read_results(path)][:1])
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
