"""Proof that a run which is stopped by anything ends bit for bit like one that never was.

    python -m tests.fault_injection --kills 200                 # one process, loader workers 0 to 2
    python -m tests.fault_injection --kills 60 --processes 3    # data-parallel, over gloo
    python -m tests.fault_injection --kills 200 --seed 7        # other moments

A tiny run is trained once undisturbed. Then the same command is started again and again, and each
time ended at a random moment in start-up, steps, saving, export or exit: by SIGKILL, or (counted
apart) by a signal that asks to stop. When it has finished, all that it left is compared with
the undisturbed run: every value of the last checkpoint, metrics.jsonl without its speeds, the
configuration and the export byte for byte, and the names of all files. Then it begins anew.

Also checked at each end: exit status and output (no traceback; an error is one line), that loader
workers whose parent was killed end by themselves, and that, of several processes, those that are
left do. (Before they have met, only a launcher such as torchrun can know it; here, we.) What breaks
these rules is listed as an anomaly. The exit status is 1 if anything differed or was anomalous.

Times are those of a warm start: the runs are forked from a process that has imported everything.
They are real processes all the same, and have sessions of their own.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_start_method, set_start_method
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from tests.processes import environments, forkserver, output_to
from trex_models.train import checkpointing
from trex_models.train.__main__ import main as train_main
from trex_models.train.reporting import TIMINGS
from trex_models.train.signals import STOP_SIGNALS

_STEPS_PER_EPOCH = 4
_PHASES = ("start-up", "steps", "save", "export")
_MOST_SECONDS = 120.0  # of a life
_PEER_SECONDS = 30.0  # for a process to notice that another one is gone
_MEETING_SECONDS = 10.0  # the same in start-up; before they have met, only a launcher can tell it
_ORPHAN_SECONDS = 15.0  # for a loader worker to notice that its parent is gone
_MOST_ANOMALIES = 20
_POLL = 0.0005
_PEER_FAILED = r"error: .*another process failed.*\n"
# Before it torch logs its own stack.
_NOT_MET = r"(?m)^error: .*this process cannot meet the others.*\n\Z"


@dataclass(frozen=True)
class Setting:
    """A command of a run that takes seconds: three epochs of four steps unless told otherwise."""

    processes: int = 1
    workers: int = 0
    save_steps: int = 1
    epochs: int = 3
    log_every: int = 2
    more: tuple[str, ...] = ()

    @property
    def total_steps(self) -> int:
        return self.epochs * _STEPS_PER_EPOCH

    @property
    def batch_size(self) -> int:
        return 8 if 8 % self.processes == 0 else 4 * self.processes

    @property
    def hidden_dim(self) -> int:
        """Large where the order of sums can matter: from three processes on."""
        return 16 if self.processes < 3 else 256

    @property
    def command(self) -> list[str]:
        """What comes after ``python -m trex_models.train``; the folder is relative."""
        command = f"""smoke --output run
            --data.num-classes 4 --data.images-per-class {self.batch_size} --data.image-size 32
            --optim.epochs {self.epochs} --optim.batch-size {self.batch_size}
            --objective.bank-size 32 --crops.local-crops 2
            --model.hidden-dim {self.hidden_dim} --model.embedding-dim 8
            --model.backbone-args channels=(8,8,16,16) --system.workers {self.workers}
            --system.log-every {self.log_every} --system.save-steps {self.save_steps}""".split()
        return [*command, *self.more]


class Life:
    """One start of the command, in ``folder``/run: a process for each rank, with its own logs.

    Args:
        setting: What to run.
        folder: Where; the logs of an earlier start are overwritten.
        mounts: A process whose mounts to see; None for the usual ones.
    """

    def __init__(self, setting: Setting, folder: Path, mounts: int | None = None) -> None:
        self.setting = setting
        self.folder = folder
        self.run = folder / "run" if mounts is None else Path(f"/proc/{mounts}/root{folder}/run")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "tmp", ignore_errors=True)
        (folder / "tmp").mkdir()
        self.processes: list[ForkServerProcess] = []
        world = setting.processes
        for rank, environment in enumerate(environments(world) if world > 1 else [{}]):
            for name in ("out", "err"):
                (folder / f"{rank}.{name}").write_text("")
            process = forkserver.Process(
                target=_live,
                args=(folder, rank, setting.command, environment, get_start_method(), mounts),
            )
            process.start()
            self.processes.append(process)

    def out(self, rank: int = 0) -> str:
        """Return what a process has printed so far."""
        return (self.folder / f"{rank}.out").read_text()

    def err(self, rank: int = 0) -> str:
        """Return its errors so far."""
        return (self.folder / f"{rank}.err").read_text()

    def alive(self, rank: int) -> bool:
        """Return whether a process has not ended."""
        return self.processes[rank].is_alive()

    def ranks_alive(self) -> list[int]:
        """Return the ranks that have not ended."""
        return [rank for rank in range(self.setting.processes) if self.alive(rank)]

    def await_(self, condition: Callable[[], object], seconds: float = _MOST_SECONDS) -> bool:
        """Wait for a condition; return False if a process or the time ends before it holds."""
        end = time.monotonic() + seconds
        while len(self.ranks_alive()) == self.setting.processes and time.monotonic() < end:
            if condition():
                return True
            time.sleep(_POLL)
        return False

    def send(self, number: signal.Signals, ranks: Sequence[int]) -> None:
        """Send a signal to some of the processes, but not to their workers."""
        for rank in ranks:
            pid = self.processes[rank].pid
            assert pid is not None
            if self.alive(rank):
                os.kill(pid, number)

    def end(self, seconds: float = _MOST_SECONDS) -> list[int | None]:
        """Wait for all processes; return their exit statuses, None for one that had to be ended.

        A negative status is a signal's number.
        """
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0.01))
        hanging = self.ranks_alive()
        if hanging:
            self.send(signal.SIGUSR2, hanging)  # they print where they are
            time.sleep(0.5)
            self.send(signal.SIGKILL, hanging)
        for process in self.processes:
            process.join()
        return [None if r in hanging else p.exitcode for r, p in enumerate(self.processes)]

    def saving(self) -> str | None:
        """Return the name of the checkpoint being written, or left half-written."""
        folder = self.run / "checkpoints"
        names = os.listdir(folder) if folder.is_dir() else []  # noqa: PTH208  # polled
        return next((name for name in names if name.endswith(".tmp")), None)

    def all_steps_saved(self) -> bool:
        """Return whether the last checkpoint is there."""
        return (self.run / "checkpoints" / f"step_{self.setting.total_steps}.pt").exists()

    def phase(self, seen: frozenset[str]) -> str:
        """Return the phase that a life was ended in, as its folder shows it.

        Args:
            seen: Names in the checkpoints folder when it began.
        """
        if not self.out():
            return "start-up"
        names = names_of_checkpoints(self.run)
        unfinished = any(name.endswith(".tmp") for name in names - seen)
        if unfinished or len(names) > checkpointing.KEPT:  # the oldest one is not deleted yet
            return "save"
        return "export" if self.all_steps_saved() else "steps"


def _live(
    folder: Path,
    rank: int,
    command: list[str],
    environment: dict[str, str],
    start_method: str,
    mounts: int | None,
) -> None:
    """Be a run: what ``python -m trex_models.train`` does, in a forked process."""
    set_start_method(start_method, force=True)  # of loader workers: the usual one, not ours
    if mounts is not None:
        _enter_namespaces(mounts)
    os.setsid()  # its loader workers can be found by it
    os.chdir(folder)
    os.environ.update(environment)
    tempfile.tempdir = str(Path(folder, "tmp"))
    output_to(Path(f"{rank}.out"), Path(f"{rank}.err"))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.register(signal.SIGUSR2)
    torch.set_num_threads(1)  # as OMP_NUM_THREADS=1, which has been read already
    sys.exit(train_main(command, exits=True))


def _enter_namespaces(pid: int) -> None:
    """Join the user and mount namespaces of a process; from Python 3.12 on it is os.setns."""
    library = ctypes.CDLL(None, use_errno=True)
    for kind in ("user", "mnt"):
        path = Path(f"/proc/{pid}/ns/{kind}")
        if path.readlink() == Path(f"/proc/self/ns/{kind}").readlink():
            continue  # root needs no user namespace
        with path.open() as namespace:
            if library.setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"cannot enter {path}")


def names_of_checkpoints(run: Path) -> frozenset[str]:
    """Return all names in a run's checkpoints folder."""
    folder = run / "checkpoints"
    return frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else frozenset()


def members(session: int) -> list[int]:
    """Return the processes of a session, without those that have ended and are not yet reaped."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, *fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[2]) == session and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def compare(run: Path, reference: Path, total_steps: int) -> list[str]:
    """Return how a finished run differs from another one, a line each; speeds may."""
    last = f"step_{total_steps}.pt"
    differences = _differences(
        checkpointing.load(run / "checkpoints" / last),
        checkpointing.load(reference / "checkpoints" / last),
        last,
    )
    if reports(run) != reports(reference):
        differences.append("metrics.jsonl")
    ours, theirs = _contents(run), _contents(reference)
    differences += [f"{name} is absent" for name in theirs.keys() - ours.keys()]
    differences += [f"{name} is left" for name in ours.keys() - theirs.keys()]
    differences += [name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]]
    names = names_of_checkpoints(run)
    strange = [name for name in names if not re.fullmatch(r"step_\d+\.pt", name)]
    if strange or len(names) > checkpointing.KEPT:
        differences.append(f"checkpoints are {', '.join(sorted(names))}")
    return differences


def _differences(ours: Any, theirs: Any, where: str) -> list[str]:
    if type(ours) is not type(theirs):
        return [f"{where} is {type(ours)}, not {type(theirs)}"]
    if isinstance(ours, torch.Tensor):
        same = (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        return [] if same and torch.equal(_bits(ours), _bits(theirs)) else [where]
    if isinstance(ours, dict):
        if list(ours) != list(theirs):
            return [f"the keys of {where}"]
        pairs = [(f"{where}.{key}", value, theirs[key]) for key, value in ours.items()]
    elif isinstance(ours, list | tuple):
        if len(ours) != len(theirs):
            return [f"the length of {where}"]
        pairs = [(f"{where}[{i}]", ours[i], theirs[i]) for i in range(len(ours))]
    else:
        return [] if repr(ours) == repr(theirs) else [f"{where} is {ours!r}, not {theirs!r}"]
    return [line for name, a, b in pairs for line in _differences(a, b, name)]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def reports(run: Path) -> list[dict[str, float]]:
    """Return the lines of metrics.jsonl without their speeds."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def _contents(run: Path) -> dict[str, bytes]:
    """Return the files of a run by name, but for those that are compared by value."""
    return {
        str(path.relative_to(run)): path.read_bytes() if path.is_file() else b""
        for path in run.rglob("*")
        if path.name != "metrics.jsonl" and path.parent.name != "checkpoints"
    }


@dataclass
class Pace:
    """How long the parts of an undisturbed run take, in seconds since its start."""

    started: float
    saved: float
    ended: float
    one_save: float


def undisturbed(setting: Setting, folder: Path) -> Pace:
    """Train without a fault in ``folder``/run; return how long its parts take."""
    idle = forkserver.Process(target=time.sleep, args=(0,))
    idle.start()  # starts the server
    idle.join()
    began, life = time.monotonic(), Life(setting, folder)
    since: Callable[[], float] = lambda: time.monotonic() - began  # noqa: E731
    life.await_(life.out)
    started = since()
    life.await_(life.saving)
    first = since()
    life.await_(lambda: not life.saving())
    one_save = since() - first
    life.await_(life.all_steps_saved)
    saved = since()
    statuses = life.end()
    assert statuses == [0] * setting.processes, f"{statuses} {life.out()} {life.err()}"
    return Pace(started, saved, since(), one_save)


@dataclass
class Results:
    """What happened, over all lives."""

    kills: Counter[str] = field(default_factory=Counter)
    signals: Counter[str] = field(default_factory=Counter)
    waiting: int = 0
    comparisons: int = 0
    differences: list[str] = field(default_factory=list)
    anomalies: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Return them as lines."""
        rows = {f"kills: {phase}": self.kills[phase] for phase in _PHASES}
        rows["kills: total"] = self.kills.total()
        rows |= {name: self.signals[name] for name in sorted(self.signals)}
        rows["left waiting for one that had not yet come"] = self.waiting
        rows["runs finished and compared"] = self.comparisons
        rows["differences"] = len(self.differences)
        rows["anomalies"] = len(self.anomalies)
        lines = [f"{name:<45}{count:>6}" for name, count in rows.items()]
        lines += [f"difference: {line}" for line in self.differences]
        return "\n".join(lines + [f"anomaly: {line}" for line in self.anomalies])


class Tormentor:
    """Runs a setting to its end again and again, killing it on its way.

    Args:
        setting: What to run.
        folder: For the undisturbed run and the tormented ones.
        seed: Of the moments; the system's own timing is not repeatable.
        results: Where to count; may be shared with others.
    """

    def __init__(self, setting: Setting, folder: Path, seed: int, results: Results) -> None:
        self.setting = setting
        self.results = results
        self._random = random.Random(f"{seed} {setting}")
        self._reference = folder / "undisturbed"
        self._folder = folder / "tormented"
        self._pace = undisturbed(setting, self._reference)
        self._orphans: dict[int, float] = {}  # sessions, and when their leader was killed

    def until(self, kills: int, signals: float = 0.15) -> None:
        """Go on until so many kills are counted, and the run under way has finished.

        Args:
            kills: How many.
            signals: Share of lives that a signal ends that asks to stop.
        """
        results = self.results
        while results.kills.total() < kills or self._folder.exists():
            if len(results.anomalies) > _MOST_ANOMALIES:
                return
            number = signal.SIGKILL if results.kills.total() < kills else None
            if number and self._random.random() < signals:
                number = self._random.choice(STOP_SIGNALS)
            self.live_once(number)

    def live_once(self, number: signal.Signals | None) -> None:
        """Start the command, and end it by a signal unless it finishes before; check its end."""
        before = names_of_checkpoints(self._folder / "run")
        life = Life(self.setting, self._folder)
        ranks = list(range(self.setting.processes))
        self._random.shuffle(ranks)
        victims = []
        if number is not None:
            self._await_moment(life, self._share_left(before))
            victims = ranks[: self._random.randint(1, len(ranks))]
        victims = [rank for rank in victims if life.alive(rank)]
        all_saved = life.all_steps_saved()
        if number is not None:
            life.send(number, victims)
        killed = number == signal.SIGKILL and bool(victims)
        started = " images of " in life.out()
        patience = _PEER_SECONDS if started else _MEETING_SECONDS
        statuses = life.end(patience if killed or not started else _MOST_SECONDS)
        for process in life.processes:
            assert process.pid is not None
            self._orphans[process.pid] = time.monotonic()
        if number == signal.SIGKILL and any(statuses[rank] == -9 for rank in victims):
            phase = life.phase(before)
            self.results.kills[phase] += 1
            self._check_peers(life, victims, statuses, phase, all_saved)
        elif any(statuses):
            self._check_stopped(life, victims, statuses, number)
        else:
            if number is not None and number != signal.SIGKILL:
                self.results.signals[f"{number.name}: too late, run finished"] += 1
            self._check_finished(life)
        self._check_orphans()

    def _share_left(self, names: frozenset[str]) -> float:
        """Return the share of the steps that a run with such checkpoints has still to take."""
        steps = [
            int(found[1]) for name in names if (found := re.fullmatch(r"step_(\d+)\.pt", name))
        ]
        return 1 - max(steps, default=0) / self.setting.total_steps

    def _await_moment(self, life: Life, share: float) -> None:
        """Wait for a random moment: anywhere, or in a phase that is too short to be hit often.

        Args:
            life: What is to be killed.
            share: Of the steps, that it has still to take.
        """
        pace, uniform = self._pace, self._random.uniform
        length = pace.ended - (1 - share) * (pace.saved - pace.started)
        kind = self._random.choices(["anywhere", "start-up", "save", "export"], [4, 1, 4, 1])[0]
        if kind == "save":
            saves = round(share * self.setting.total_steps / self.setting.save_steps)
            for _ in range(self._random.randint(1, max(1, min(3, saves)))):
                life.await_(lambda: not life.saving())
                life.await_(life.saving)
            seconds = uniform(0, 1.5 * pace.one_save)
        elif kind == "export":
            life.await_(life.all_steps_saved)
            seconds = uniform(0, pace.ended - pace.saved)
        else:
            seconds = uniform(0, length if kind == "anywhere" else pace.started)
        life.await_(lambda: False, seconds)

    def _check_peers(
        self,
        life: Life,
        victims: list[int],
        statuses: list[int | None],
        phase: str,
        all_saved: bool,
    ) -> None:
        """Check what a killed process and those that are left have said, and how they ended."""
        for rank, status in enumerate(statuses):
            err = life.err(rank)
            who = f"process {rank}, of which {victims} were killed in {phase},"
            if rank in victims and status in (-9, 0):
                # Of several, each is killed a moment after the one before, and may see it go.
                saw_another = rank != victims[0] and re.fullmatch(_PEER_FAILED, err)
                # Orphaned workers may complain.
                if err and not saw_another and not self.setting.workers:
                    self._note(f"{who} printed errors", life, rank)
            elif status is None and "init_process_group" in err:
                self.results.waiting += 1
            elif status is None:
                self._note(f"{who} did not end", life, rank)
            elif not (
                (status == 0 and all_saved)
                or (status == 1 and re.fullmatch(_PEER_FAILED, err))
                or (status == 2 and re.search(_NOT_MET, err) and phase == "start-up")
            ):
                self._note(f"{who} ended with {status}", life, rank)

    def _check_stopped(
        self,
        life: Life,
        victims: list[int],
        statuses: list[int | None],
        number: signal.Signals | None,
    ) -> None:
        """Check a stop by a signal that can be handled; anything else here is an anomaly."""
        if number and number in STOP_SIGNALS and " images of " not in life.out():
            self.results.signals[f"{number.name}: ended in start-up"] += 1
            self._check_start_up(life, victims, statuses, number)
            return
        expected: list[int | None] = [128 + (number or 0)] * len(statuses)
        said = re.search(
            r"stopped by .* after step (\d+) of \d+, saved; the same .*\n$", life.out()
        )
        errors = "".join(life.err(rank) for rank in range(len(statuses)))
        if number in (None, signal.SIGKILL) or statuses != expected or not said or errors:
            rank = next(rank for rank, status in enumerate(statuses) if status != 0)
            self._note(f"signal {number} to {victims} ended it with {statuses}", life, rank)
            return
        assert number is not None
        self.results.signals[f"{number.name}: stopped, saved"] += 1
        if not (life.run / "checkpoints" / f"step_{said[1]}.pt").exists():
            self._note(f"step {said[1]} was not saved", life, 0)

    def _check_start_up(
        self, life: Life, victims: list[int], statuses: list[int | None], number: signal.Signals
    ) -> None:
        """Check that a signal in start-up ended the processes without a traceback."""
        for rank, status in enumerate(statuses):
            err = life.err(rank)
            if status is None and "init_process_group" in err:
                self.results.waiting += 1
            elif not (
                (rank in victims and status in (-number, 128 + number) and not err)
                or (status == 1 and re.fullmatch(_PEER_FAILED, err))
                or (status == 2 and re.search(_NOT_MET, err))
            ):
                self._note(f"signal {number} to {victims} in start-up: {status}", life, rank)

    def _check_finished(self, life: Life) -> None:
        self.results.comparisons += 1
        for rank in range(self.setting.processes):
            if life.err(rank):
                self._note("a run that finished printed errors", life, rank)
        for line in compare(life.run, self._reference / "run", self.setting.total_steps):
            print(f"difference: {line}", flush=True)
            self.results.differences.append(f"{line} ({self.setting})")
        shutil.rmtree(self._folder)

    def _note(self, what: str, life: Life, rank: int) -> None:
        said = f"out: {life.out(rank)[-500:]!r}, err: {life.err(rank)[-2000:]!r}"
        print(f"anomaly: {what}; {said}", flush=True)
        self.results.anomalies.append(f"{what}; {said} ({self.setting})")

    def _check_orphans(self, wait: bool = False) -> None:
        """Note the workers that have outlived their parent for too long."""
        while True:
            for session, ended in list(self._orphans.items()):
                left = members(session)
                if not left:
                    del self._orphans[session]
                elif time.monotonic() - ended > _ORPHAN_SECONDS:
                    del self._orphans[session]
                    self.results.anomalies.append(
                        f"workers {left} of the killed {session} live on ({self.setting})"
                    )
            if not wait or not self._orphans:
                return
            time.sleep(0.1)

    def finish(self) -> None:
        """Wait for the last orphans."""
        self._check_orphans(wait=True)


_LOOK = (
    *("--objective.name", "look", "--objective.neighbors", "8"),
    *("--validation.images-per-class", "2", "--validation.neighbors", "3"),
)


def settings(processes: int) -> list[Setting]:
    """Return what to torment: both objectives with a bank, with and without workers.

    Args:
        processes: 1, 2 or 3.
    """
    if processes == 1:
        look = Setting(workers=2, more=_LOOK)
        return [Setting(), Setting(workers=1, save_steps=2), look]
    return [Setting(processes, workers=0, more=_LOOK), Setting(processes, workers=1, save_steps=2)]


def main(arguments: Sequence[str]) -> int:
    """Run the command; return 1 if anything differed or was anomalous."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fault_injection",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, choices=(1, 2, 3), default=1)
    parser.add_argument("--signals", type=float, default=0.15, help="share of lives they end")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    results, began = Results(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tormentors = [
            Tormentor(setting, Path(folder, str(index)), options.seed, results)
            for index, setting in enumerate(settings(options.processes))
        ]
        rounds = range(10, options.kills + 10, 10)
        for index, kills in enumerate(rounds):
            tormentors[index % len(tormentors)].until(min(kills, options.kills), options.signals)
            if len(results.anomalies) > _MOST_ANOMALIES:
                break
            done, seconds = results.kills.total(), time.monotonic() - began
            left = seconds / done * (options.kills - done)
            print(
                f"{done}/{options.kills} kills, {results.comparisons} comparisons, "
                f"{len(results.differences)} differences, {len(results.anomalies)} anomalies; "
                f"{done / seconds:.2f} kills/s, {max(left, 0):.0f} s left",
                flush=True,
            )
        for tormentor in tormentors:
            tormentor.finish()
    print(results.table())
    print(f"{time.monotonic() - began:.0f} s, {options.processes} processes, seed {options.seed}")
    return 1 if results.differences or results.anomalies else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
