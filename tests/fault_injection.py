"""Fault injection: killed or stopped runs must end bit for bit like undisturbed ones.

    python -m tests.fault_injection [KILLS]

A tiny run is trained once undisturbed. Then the same command is started repeatedly, and killed each
time at a random moment in start-up, steps, saving, export or exit. When it finishes, its files are
compared with those of the undisturbed run: every value of the last checkpoint, metrics.jsonl
without speeds, and all other files byte for byte. Then the next run starts.

Whenever the processes end, the exit status and the output are checked (no traceback; an error is
one line). Loader workers whose parent was killed must end, and so must the other processes of a
run. (Before the process group exists, only a launcher such as torchrun can end them; here, this
module does.) Each run is a process in its own session, forked from one with all imports.
"""

from __future__ import annotations

import faulthandler
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_start_method, set_start_method
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple

import torch

from tests.processes import environments, forkserver, output_to
from tests.runs import TINY, assert_same_state, logged
from trex_models.train import checkpointing
from trex_models.train.__main__ import main as train_main

_STEPS_PER_EPOCH = 4
_MOST_SECONDS = 120.0  # maximum duration of a start
_PEER_SECONDS = 30.0  # for a process to notice that another one has ended
_MEETING_SECONDS = 10.0  # the same in start-up, before the process group exists
_ORPHAN_SECONDS = 15.0  # for a loader worker to notice that its parent has ended
_MOST_WRONG = 20
_POLL = 0.0005
_PEER_FAILED = r"error: .*another process failed.*\n"
# torch logs its own stack trace before this line.
_NOT_MET = r"(?m)^error: .*this process cannot connect to the others.*\n\Z"


@dataclass(frozen=True)
class Setting:
    """Settings of a run that takes seconds: three epochs of four steps by default."""

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
        """Large if the order of sums can matter, that is with three processes or more."""
        return 16 if self.processes < 3 else 256

    @property
    def command(self) -> list[str]:
        """Arguments of ``python -m trex_models.train``; the folder is relative."""
        options = f"""--data.images-per-class {self.batch_size} --optim.epochs {self.epochs}
            --optim.batch-size {self.batch_size} --model.hidden-dim {self.hidden_dim}
            --system.workers {self.workers} --system.log-every {self.log_every}
            --system.save-steps {self.save_steps}""".split()
        return ["smoke", "--output", "run", *TINY, *options, *self.more]


class Life:
    """One start of the command, in ``folder``/run: a process for each rank, with its own logs."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.setting, self.folder, self.run = setting, folder, folder / "run"
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
                args=(folder, rank, setting.command, environment, get_start_method()),
            )
            process.start()
            self.processes.append(process)

    def out(self, rank: int = 0) -> str:
        """Return the output of a process so far."""
        return (self.folder / f"{rank}.out").read_text()

    def err(self, rank: int = 0) -> str:
        return (self.folder / f"{rank}.err").read_text()

    def ranks_alive(self) -> list[int]:
        return [rank for rank, process in enumerate(self.processes) if process.is_alive()]

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
            if self.processes[rank].is_alive():
                with suppress(ProcessLookupError):  # a rank may have ended already
                    os.kill(pid, number)

    def end(self, seconds: float = _MOST_SECONDS) -> list[int | None]:
        """Wait for all processes; return their exit statuses, None for a process that was killed.

        A negative status is the number of a signal.
        """
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0.01))
        hanging = self.ranks_alive()
        if hanging:
            self.send(signal.SIGUSR2, hanging)  # they print their stack traces
            time.sleep(0.5)
            self.send(signal.SIGKILL, hanging)
        for process in self.processes:
            process.join()
        return [None if r in hanging else p.exitcode for r, p in enumerate(self.processes)]

    def saving(self) -> bool:
        """Return True if a checkpoint is being written, or was left incomplete."""
        return any((self.run / "checkpoints").glob("*.tmp"))

    def all_steps_saved(self) -> bool:
        return (self.run / "checkpoints" / f"step_{self.setting.total_steps}.pt").exists()

    def started(self) -> bool:
        """Return True if the process group exists and the data has been opened."""
        return " images of " in self.out()


def _live(
    folder: Path, rank: int, command: list[str], environment: dict[str, str], start_method: str
) -> None:
    """Run ``python -m trex_models.train`` in this forked process."""
    set_start_method(start_method, force=True)  # of loader workers: the default
    os.setsid()  # identifies the loader workers
    os.chdir(folder)
    os.environ.update(environment)
    tempfile.tempdir = str(Path(folder, "tmp"))
    output_to(Path(f"{rank}.out"), Path(f"{rank}.err"))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.register(signal.SIGUSR2)
    torch.set_num_threads(1)  # OMP_NUM_THREADS was read at import
    sys.exit(train_main(command, exits=True))


def names_of_checkpoints(run: Path) -> frozenset[str]:
    folder = run / "checkpoints"
    return frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else frozenset()


def members(session: int) -> list[int]:
    """Return the processes of a session, without zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, *fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended in the meantime
            continue
        if int(fields[2]) == session and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def compare(run: Path, reference: Path, total_steps: int) -> list[str]:
    """Return the names of all differences between two finished runs, except speeds."""
    ours, theirs = (_contents(folder) for folder in (run, reference))
    found = [
        name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)
    ]
    last = f"checkpoints/step_{total_steps}.pt"
    try:
        assert_same_state(checkpointing.load(run / last), checkpointing.load(reference / last))
    except AssertionError as error:
        found.append(str(error))
    names = sorted(names_of_checkpoints(run))
    strange = [name for name in names if not re.fullmatch(r"step_\d+\.pt", name)]
    return found + (names if strange or len(names) > checkpointing.MAX_CHECKPOINTS else [])


def _contents(run: Path) -> dict[str, object]:
    """Return the files and reports of a run, without its checkpoints."""
    files = [path for path in run.rglob("*") if path.parent.name != "checkpoints"]
    contents = {str(p.relative_to(run)): p.read_bytes() if p.is_file() else b"" for p in files}
    return contents | {"metrics.jsonl": logged(run)}


class Pace(NamedTuple):
    """End times of the phases of an undisturbed run, in seconds since its start."""

    started: float
    saved: float
    ended: float
    one_save: float


def undisturbed(setting: Setting, folder: Path) -> Pace:
    """Train undisturbed in ``folder``/run; return the end times of its phases."""
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


class Tormentor:
    """Runs a setting to its end repeatedly, and kills it on the way."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.setting = setting
        self.kills = self.comparisons = 0
        self.wrong: list[str] = []
        """What differed, and what else must not happen."""
        self._reference = folder / "undisturbed"
        self._folder = folder / "tormented"
        self._pace = undisturbed(setting, self._reference)
        self._orphans: dict[int, float] = {}  # sessions, and when their leader was killed

    def until(self, kills: int) -> None:
        """Continue until this number of kills is reached and the current run has finished."""
        while (self.kills < kills or self._folder.exists()) and len(self.wrong) < _MOST_WRONG:
            self._live_once(kill=self.kills < kills)
        while self._orphans:
            self._check_orphans()
            time.sleep(0.1)

    def _live_once(self, kill: bool) -> None:
        """Start the command, kill it unless it finishes first, and check how it ended."""
        paths = checkpointing.list_checkpoints(self._folder / "run")
        saved = [int(path.stem[5:]) for path in paths]
        life = Life(self.setting, self._folder)
        victims: list[int] = []
        if kill:
            self._await_moment(life, 1 - max(saved, default=0) / self.setting.total_steps)
            world = self.setting.processes
            victims = random.sample(range(world), random.randint(1, world))
            victims = [rank for rank in victims if rank in life.ranks_alive()]
        all_saved = life.all_steps_saved()
        life.send(signal.SIGKILL, victims)
        patience = _PEER_SECONDS if victims else _MOST_SECONDS
        statuses = life.end(_MEETING_SECONDS if victims and not life.started() else patience)
        self._orphans |= {process.pid or 0: time.monotonic() for process in life.processes}
        killed = any(statuses[rank] == -signal.SIGKILL for rank in victims)
        self.kills += killed
        if killed or statuses != [0] * len(statuses):
            for rank, status in enumerate(statuses):
                if not killed or not self._may_end(life, rank, status, victims, all_saved):
                    self._note(f"kill of {victims}: {rank} ended with {status}", life, rank)
        else:
            self._check_finished(life)
        self._check_orphans()

    def _await_moment(self, life: Life, share: float) -> None:
        """Wait for a random moment of the run, or of a phase that is too short to be hit often."""
        pace, uniform = self._pace, random.uniform
        length = pace.ended - (1 - share) * (pace.saved - pace.started)
        kind = random.choices(["anywhere", "start-up", "save", "export"], [4, 1, 4, 1])[0]
        if kind == "save":
            saves = round(share * self.setting.total_steps / self.setting.save_steps)
            for _ in range(random.randint(1, max(1, min(3, saves)))):
                life.await_(lambda: not life.saving())
                life.await_(life.saving)
            seconds = uniform(0, 1.5 * pace.one_save)
        elif kind == "export":
            life.await_(life.all_steps_saved)
            seconds = uniform(0, pace.ended - pace.saved)
        else:
            seconds = uniform(0, length if kind == "anywhere" else pace.started)
        life.await_(lambda: False, seconds)

    def _may_end(
        self, life: Life, rank: int, status: int | None, victims: list[int], all_saved: bool
    ) -> bool:
        """Return True if a process may end with this result after some processes were killed."""
        err = life.err(rank)
        lost_another = bool(re.fullmatch(_PEER_FAILED, err))
        if rank in victims and status in (-signal.SIGKILL, 0):
            # Several processes are killed one after the other, and may see the previous one end.
            saw_another = rank != victims[0] and lost_another
            # Orphaned workers may complain.
            return not err or saw_another or self.setting.workers > 0
        if status is None:
            return "init_process_group" in err  # waits for a process that has not joined
        if status == 0:
            return all_saved
        if status == 1:
            return lost_another
        return status == 2 and not life.started() and bool(re.search(_NOT_MET, err))

    def _check_finished(self, life: Life) -> None:
        self.comparisons += 1
        for rank in range(self.setting.processes):
            if life.err(rank):
                self._note("a run that finished printed errors", life, rank)
        for name in compare(life.run, self._reference / "run", self.setting.total_steps):
            self._note(f"{name} differs", life, 0)
        shutil.rmtree(self._folder)

    def _note(self, what: str, life: Life, rank: int) -> None:
        out, err = life.out(rank)[-500:], life.err(rank)[-2000:]
        self.wrong.append(f"{what}; out: {out!r}, err: {err!r} ({self.setting})")

    def _check_orphans(self) -> None:
        for session, ended in list(self._orphans.items()):
            left = members(session)
            late = time.monotonic() - ended > _ORPHAN_SECONDS
            if not left or late:
                del self._orphans[session]
            if left and late:
                self.wrong.append(
                    f"workers {left} of the killed {session} live on ({self.setting})"
                )


_LOOK = (
    *("--objective.name", "look", "--objective.neighbors", "8"),
    *("--validation.images-per-class", "2", "--validation.neighbors", "3"),
)
# Both objectives with a bank, with and without workers, on one to three processes.
SETTINGS = [
    *(Setting(), Setting(workers=1, save_steps=2), Setting(workers=2, more=_LOOK)),
    *(Setting(2, more=_LOOK), Setting(2, workers=1, save_steps=2)),
    *(Setting(3, more=_LOOK), Setting(3, workers=1, save_steps=2)),
]


def main(kills: int = 200) -> int:
    """Kill runs this number of times in total; return 1 if anything went wrong."""
    wrong = []
    for setting in SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            tormentor = Tormentor(setting, Path(folder))
            tormentor.until(-(-kills // len(SETTINGS)))
        done = f"{tormentor.kills} kills, {tormentor.comparisons} comparisons"
        print(f"{setting}: {done}, {len(tormentor.wrong)} wrong", flush=True)
        wrong += tormentor.wrong
    print("\n".join(wrong) or "nothing differed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
