"""Study of the paper's claims; docs/study.md has the results.

    python -m benchmarks.study run [--scale gpu]
    python -m benchmarks.study report --output docs

The first command writes the images, searches a learning rate for each configuration (short runs,
top-1 on held-out images of the training classes), then trains and evaluates each configuration with
each seed. It writes one JSON file per run and skips runs whose file exists, so an interrupted study
can be continued. On a CPU, one single-threaded run per core runs in parallel; on a GPU, one at a
time. The second command prints the scores and the claims, and draws the figure.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock, Timeout

from benchmarks import measure
from benchmarks.study.cells import SCALES, SEARCH_SEED, Scale
from benchmarks.study.runs import FailedError, Run, read, sigterm_stops, write
from trex_models import cli
from trex_models.precision import free_cores

ScaleName = Literal["cpu", "gpu", "gpu15"]


def climb(score: Callable[[float], float], first: float) -> dict[float, float]:
    """Search for the best learning rate in factors of 2, upwards or downwards from ``first``."""
    tried = {rate: score(rate) for rate in (first, 2 * first)}
    factor = 2.0 if tried[2 * first] > tried[first] else 0.5
    best = max(tried, key=lambda rate: tried[rate])
    while True:
        tried[factor * best] = score(factor * best)
        if tried[factor * best] <= tried[best]:
            return tried
        best *= factor


def in_parallel(tasks: Iterable[Callable[[], str]], jobs: int) -> None:
    """Run tasks in parallel, and print the text that each returns and the remaining time."""
    queue = list(tasks)
    failed: list[FailedError] = []
    started = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(task) for task in queue]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                try:
                    text = future.result()
                except FailedError as error:
                    failed.append(error)
                    text = f"failed: {error}"
                left = (time.monotonic() - started) / done * (len(futures) - done) / 60
                print(f"[{done}/{len(futures)}] {text}; about {left:.0f} min left", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        raise failed[0]


def make_start(run: Run, out: Path) -> str:
    """Train the initial backbone of a seed's runs; write the settings and the CPU time."""
    run.train()
    write(out, {"settings": run.conditions(), "core_seconds": run.core_seconds()})
    return f"{out.stem} is trained"


def search(trial: Run, out: Path) -> str:
    """Search a configuration's learning rate; write all scores and the best run's settings."""
    tried = climb(lambda rate: replace(trial, rate=rate).search(), trial.rate)
    best = max(tried, key=lambda rate: tried[rate])
    result = {
        "settings": replace(trial, rate=best).conditions(),
        "top1": {f"{rate:g}": tried[rate] for rate in sorted(tried)},
        "core_seconds": sum(replace(trial, rate=rate).core_seconds() for rate in tried),
    }
    write(out, result)
    shown = ", ".join(f"{rate:g}: {100 * tried[rate]:.1f} %" for rate in sorted(tried))
    return f"{trial.name}: learning rates {shown}"


def best_rate(trial: Run, out: Path) -> float | None:
    """Return the learning rate selected by a search; None if the search is not finished."""
    if not out.exists():
        return None
    rate = _found_rate(out)
    replace(trial, rate=rate).is_done(out)
    return rate


def _found_rate(out: Path) -> float:
    return float(read(out)["settings"]["optim.base-lr"])


def complete(run: Run, out: Path) -> str:
    """Train and evaluate a configuration with one seed; write the result."""
    run.complete(out)
    result = read(out)
    return (
        f"{run.name}, seed {run.seed}: training task {100 * result['task_top1']:.1f} %, transfer "
        f"{result['transfer_log_odds']:.3f}, {result['core_seconds'] / 60:.1f} core minutes"
    )


def _results(scale: str) -> Path:
    return measure.RESULTS / f"study-{scale}"


def _search_file(results: Path, name: str) -> Path:
    return results / f"search-{name}.json"


def _start_file(results: Path, seed: int) -> Path:
    return results / f"start-{seed}.json"


def _result_file(results: Path, name: str, seed: int) -> Path:
    return results / f"{name}-{seed}.json"


def _starts(
    seeds: Iterable[int], scale: Scale, folder: Path, results: Path
) -> list[Callable[[], str]]:
    """Return tasks that train the missing initial backbones of some seeds."""
    if not scale.start:
        return []
    starts = [Run.start(scale, seed, folder) for seed in seeds]
    return [
        partial(make_start, start, out)
        for start in starts
        if not (start.is_done(out := _start_file(results, start.seed)) and start.backbone.is_dir())
    ]


def _search_all(
    cells: Iterable[str], scale: Scale, folder: Path, results: Path, jobs: int
) -> dict[str, float]:
    """Search the missing learning rates; return the learning rate of each configuration."""
    trials = {
        name: Run(
            name=name,
            rate=scale.first_rate,
            seed=SEARCH_SEED,
            epochs=scale.search_epochs,
            scale=scale,
            folder=folder,
        )
        for name in cells
    }
    files = {name: _search_file(results, name) for name in trials}
    left = [name for name, trial in trials.items() if best_rate(trial, files[name]) is None]
    if left:
        in_parallel(_starts([SEARCH_SEED], scale, folder, results), jobs)
        in_parallel([partial(search, trials[name], files[name]) for name in left], jobs)
    return {name: _found_rate(out) for name, out in files.items()}


def run_all(
    *,
    scale: ScaleName = "cpu",
    results: Path | None = None,
    folder: Path | None = None,
    cells: tuple[str, ...] = (),
    seeds: int = 3,
    jobs: int | None = None,
) -> None:
    """Train and evaluate all configurations. Runs with an existing result are skipped.

    Example: python -m benchmarks.study run --scale gpu

    Args:
        scale: Size of the study.
        results: Folder of the JSON files. The default is benchmarks/results/study-SCALE.
        folder: Folder of images, runs and logs. The default is runs/study-SCALE.
        cells: Names of the configurations to run. The default is all.
        seeds: Number of runs per configuration.
        jobs: Number of parallel runs. The default is one per core, or 1 on a GPU.
    """
    chosen = SCALES[scale]
    names = dict.fromkeys(cells or chosen.cells)
    if absent := names.keys() - set(chosen.cells):
        raise ValueError(f"--scale {scale} has no configuration {min(absent)}; remove it")
    folder = folder or Path("runs", f"study-{scale}")
    results = results or _results(scale)
    # Parallel runs would not use a GPU more efficiently.
    jobs = (1 if torch.cuda.is_available() else free_cores()) if jobs is None else jobs
    cli.require_at_least(1, seeds=seeds, jobs=jobs)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    try:
        with FileLock(folder / ".lock", timeout=0), sigterm_stops():
            chosen.images.write(folder / "images")
            rates = _search_all(names, chosen, folder, results, jobs)
            runs = {
                _result_file(results, name, seed): Run(
                    name=name,
                    rate=rates[name],
                    seed=seed,
                    epochs=chosen.epochs,
                    scale=chosen,
                    folder=folder,
                )
                for seed in range(seeds)
                for name in names
            }
            todo = {out: run for out, run in runs.items() if not run.is_done(out)}
            starting = dict.fromkeys(run.seed for run in todo.values())
            in_parallel(_starts(starting, chosen, folder, results), jobs)
            in_parallel([partial(complete, run, out) for out, run in todo.items()], jobs)
            print(f"finished {len(runs)} runs; results are in {results}")
    except Timeout:
        raise ValueError(f"another study is using {folder}; choose another --folder") from None


def report(*, output: Path, scale: ScaleName = "cpu", results: Path | None = None) -> None:
    """Print the tables of scores and claims, and draw the figure.

    Example: python -m benchmarks.study report --output docs

    Args:
        output: Folder for the figure.
        scale: Size of the study.
        results: Folder of the JSON files. The default is benchmarks/results/study-SCALE.
    """
    from benchmarks.study import claims, pictures, tables
    from trex_models.plotting import save

    found = claims.read_results(results or _results(scale))
    print(tables.scores(found), end="\n\n")
    if tested := claims.tested(found, [*claims.CLAIMS, *claims.BUT_HUES]):
        print(tables.claims(tested), end="\n\n")
    picture = output / "study_tradeoff.png"
    save(pictures.tradeoff(found), picture)
    print(f"wrote {picture}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status, see `cli.main`."""
    return cli.main(
        {"run": run_all, "report": report},
        sys.argv[1:] if arguments is None else arguments,
        prog="python -m benchmarks.study",
        description=__doc__,
        extra="transfer",
    )


if __name__ == "__main__":
    raise SystemExit(main())
