"""One run of the study: it calls the trainer and the evaluation and collects their results.

An interrupted run can be resumed. The result is one JSON file.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import timm
import torch

from benchmarks import measure
from benchmarks.study.cells import CELLS, Cell, Field, Scale
from benchmarks.study.images import REAL_SETS
from trex_models.atomic import append, write_text_file
from trex_models.data.image_files import FolderSource
from trex_models.evaluation.extract import extract_features

TRAINING_TASK = "task"
_SEEDS = 2  # seeds of the evaluation, for its validation splits
_START_SEEDS = 10_000  # offset, so that runs share no weights, order or crops with their start
_CURVES = ("step", "loss", "accuracy", "prototype_change")
_running: set[int] = set()  # process IDs of running commands
_stopped = Event()  # set by SIGTERM
_DIVERGED = b"no longer finite"  # part of the trainer's error message


class FailedError(ValueError):
    """A command of the study ended with an error."""


class DivergedError(FailedError):
    """The training loss became non-finite."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run and its evaluation.

    Raises:
        FailedError: A command failed; the message names its log.
    """

    name: str
    """Name of the configuration, a key of ``CELLS``."""
    rate: float
    """Peak learning rate per 256 images."""
    seed: int
    epochs: int
    scale: Scale
    folder: Path
    """Folder of the study."""
    is_start: bool = False
    """True for a run that only trains the initial backbone of a seed's runs."""

    @classmethod
    def start(cls, scale: Scale, seed: int, folder: Path) -> Run:
        """Return the run that trains the initial backbone of a seed's runs."""
        assert scale.start
        return cls(
            name=scale.start.cell,
            rate=scale.start.rate,
            seed=_START_SEEDS + seed,
            epochs=scale.start.epochs,
            scale=scale,
            folder=folder,
            is_start=True,
        )

    @property
    def cell(self) -> Cell:
        """Configuration of the run."""
        return CELLS[self.name]

    @property
    def output(self) -> Path:
        """Folder of the run."""
        kind = "start-" if self.is_start else ""
        named = f"{kind}{self.name}-{self.epochs}-{self.rate:g}-{self.seed}"
        return self.folder / "runs" / named

    def _sibling(self, kind: str) -> Path:
        """Return a path next to the run's folder, without with_suffix: the name has dots."""
        return self.output.with_name(f"{self.output.name}.{kind}")

    def settings(self) -> dict[str, Field]:
        """Return the trainer's fields that determine the result and override the recipe demo."""
        return {
            "data.source": "folder",
            "data.variation": 1.0,  # the default, since the images are not the recipe's fractals
            "validation.images-per-class": 0,
            **self.scale.settings,
            **self.cell.settings(),
            "optim.epochs": self.epochs,
            "optim.base-lr": self.rate,
            "seed": self.seed,
        }

    def conditions(self) -> dict[str, Field]:
        """Return everything that determines a result: settings, images and initialization."""
        fields = self.settings()
        for part, described in (("images", self.scale.images), ("start", self.scale.start)):
            if described:
                fields |= {f"{part}.{field}": value for field, value in asdict(described).items()}
        return fields

    def training(self) -> list[str]:
        """Return the trainer's arguments."""
        fields = {
            **self.settings(),
            "data.path": str(self.folder / "images" / "train"),
            "system.workers": self.scale.workers,
            "output": str(self.output),
        }
        if self.scale.start and not self.is_start:
            start = Run.start(self.scale, self.seed, self.folder)
            fields["init-from"] = str(start.backbone)
        arguments = ["demo"]
        for field, value in fields.items():
            values = value if isinstance(value, tuple) else (value,)
            arguments += [f"--{field}", *map(str, values)]
        return arguments

    def evaluation(self, sets: Sequence[str], out: Path, seeds: int) -> list[str]:
        """Return the arguments of the transfer evaluation."""
        images = str(self.folder / "images").replace(",", "\\,")
        named = [name if name in REAL_SETS else f"{name}={images}/{name}" for name in sets]
        arguments = ["evaluate", "--model", str(self.output), "--datasets", ",".join(named)]
        arguments += ["--training-task", sets[0], "--seeds", str(seeds), "--output", str(out)]
        return [*arguments, "--workers", str(self.scale.workers), "--label", self.cell.title]

    @property
    def backbone(self) -> Path:
        """Folder of the trained backbone."""
        return self.output / "export" / "backbone"

    def train(self) -> None:
        """Train, or resume training."""
        self._run_module("trex_models.train", self.training())

    def search(self) -> float:
        """Train and return top-1 on held-out images of the training classes; 0 if diverged."""
        out = self.output / "held-out.json"
        try:
            self.train()
        except DivergedError:
            return 0.0
        self._run_module("trex_models.transfer", self.evaluation(["held-out"], out, seeds=1))
        return float(json.loads(out.read_text())["datasets"]["held-out"]["top1"]["mean"])

    def is_done(self, result: Path) -> bool:
        """Return True if the file is a result of this run; raise ValueError for another run."""
        if not result.exists():
            return False
        known = read(result)["settings"]
        expected = json.loads(json.dumps(rounded(self.conditions())))
        if field := differing(known, expected):
            raise ValueError(
                f"{result} has {field} {known.get(field)}, expected {expected.get(field)}; delete "
                "the file or choose another --results"
            )
        return True

    def complete(self, result: Path) -> None:
        """Train, evaluate on all datasets and write the result."""
        out = self.output / "transfer.json"
        self.train()
        evaluation = [*self.evaluation(self.scale.images.sets, out, _SEEDS), "--geometry"]
        self._run_module("trex_models.transfer", evaluation)
        report = json.loads(out.read_text())
        metrics = [
            json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()
        ]
        found = {
            "cell": self.name,
            "seed": self.seed,
            "settings": self.conditions(),
            "commands": {"train": shlex.join(self.training()), "transfer": shlex.join(evaluation)},
            "task_top1": report["datasets"][TRAINING_TASK]["top1"]["mean"],
            "transfer_log_odds": report["transfer"]["mean_log_odds"],
            "datasets": {name: _entry(entry) for name, entry in report["datasets"].items()},
            "head": self._head(),
            "curves": {
                key: [line[key] for line in metrics] for key in _CURVES if key in metrics[0]
            },
            "core_seconds": round(self.core_seconds(), 1),
            "machine": measure.machine(),
        }
        write(result, found)

    def core_seconds(self) -> float:
        """Return the CPU time of the run's commands, including interrupted ones.

        Commands that were killed with the study and the evaluation of the heads are not included.
        """
        costs = self._sibling("cost")
        return sum(map(float, costs.read_text().split())) if costs.exists() else 0.0

    def _head(self) -> dict[str, float] | None:
        """Return top-1 of the training head on training and new images; None without a head.

        The result also has top-1 of class means of the embeddings (``mean_head``), which all
        objectives have in common: OCM's own head contains an embedding of each training image.
        """
        export = self.output / "export" / "cls"
        if not export.is_dir():
            return None
        model: Any = timm.create_model(f"local-dir:{export}", pretrained=True)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        train, test = (
            FolderSource(self.folder / "images" / TRAINING_TASK / part)
            for part in ("train", "test")
        )
        shares = {
            part: float((extract_features(model, source).argmax(1) == source.labels).mean())
            for part, source in (("train", train), ("test", test))
        }
        model.reset_classifier(0)
        known, new = (extract_features(model, source) for source in (train, test))
        means = mean_head(known, train.labels, new, test.labels)
        return {**shares, **dict(zip(("means_train", "means_test"), means, strict=True))}

    def _run_module(self, module: str, arguments: list[str]) -> None:
        """Run a module in one thread, with a log file next to the run's folder."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        log = self._sibling("log")
        if _stopped.is_set():
            raise FailedError(f"{module} was not started, since the study is being stopped")
        with log.open("ab") as file:
            begun = file.tell()
            child = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
            )
            _running.add(child.pid)
            if _stopped.is_set():  # a signal arrived after the check above
                child.terminate()
            _, status, used = os.wait4(child.pid, 0)
            _running.discard(child.pid)
            child.returncode = os.waitstatus_to_exitcode(status)
        append(self._sibling("cost"), f"{used.ru_utime + used.ru_stime:.2f}\n")
        if child.returncode:
            kind = DivergedError if _DIVERGED in log.read_bytes()[begun:] else FailedError
            raise kind(f"{module} failed with exit status {child.returncode}; see {log}")


@contextmanager
def sigterm_stops() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C: forward it to the training runs, which save their state."""

    def stop(*_: object) -> None:
        _stopped.set()
        for process in list(_running):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _stopped.clear()


def mean_head(
    known: np.ndarray, labels: np.ndarray, new: np.ndarray, new_labels: np.ndarray
) -> tuple[float, float]:
    """Return top-1 by the nearest class mean, on known images (leave-one-out) and on new ones."""
    known, new = _unit(known), _unit(new)
    sums = np.stack([known[labels == label].sum(0) for label in range(labels.max() + 1)])
    scores = known @ _unit(sums).T
    scores[np.arange(len(labels)), labels] = (known * _unit(sums[labels] - known)).sum(1)
    known_top1 = (scores.argmax(1) == labels).mean()
    return float(known_top1), float(((new @ _unit(sums).T).argmax(1) == new_labels).mean())


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def read(path: Path) -> dict[str, Any]:
    """Read a JSON file of the study."""
    try:
        contents = json.loads(path.read_text())
        if "optim.base-lr" not in contents["settings"]:
            raise ValueError("settings have no optim.base-lr")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run the study") from None
    return dict(contents)


def write(path: Path, contents: Mapping[str, Any]) -> None:
    """Write a JSON file of the study atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_file(path, json.dumps(rounded(contents)) + "\n")


def differing(
    known: Mapping[str, Any], expected: Mapping[str, Any], ignored: Set[str] = frozenset()
) -> str | None:
    """Return the first field in which settings differ, except ``ignored``; None if they agree."""
    fields = sorted((known.keys() | expected.keys()) - ignored)
    return next((field for field in fields if known.get(field) != expected.get(field)), None)


def rounded(value: Any) -> Any:
    """Round all numbers in a JSON value to six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list) else value


_GEOMETRY = (
    "coding_length",
    "effective_rank",
    "singular_values",
    "within_class_distance",
    "between_class_distance",
)


def _entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Select the values that a result keeps from a dataset's entry in a report."""
    geometry = entry["geometry"]["train"]
    return {
        "top1": entry["top1"]["mean"],
        "log_odds": entry["log_odds"],
        "knn": entry["knn"]["top1"],
        "test_images": entry["test"]["images"],
        "geometry": {key: geometry[key] for key in _GEOMETRY} if geometry else None,
    }
