"""One run of the study: the commands of trainer and evaluation, and their results.

An interrupted run resumes; its result is one JSON file.
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
from benchmarks.study.images import REAL_SETS, TITLES
from trex_models.atomic import append, write_text_file
from trex_models.data.image_files import FolderSource
from trex_models.evaluation.extract import extract_features

TRAINING_TASK = "task"
_SEEDS = 2  # of the evaluation's validation splits
_START_SEEDS = 10_000  # a start shares no weights, order or crops with the runs that begin there
_CURVES = ("step", "loss", "accuracy", "prototype_change")
_running: set[int] = set()  # processes of the commands that have not ended
_stopped = Event()  # by SIGTERM
_DIVERGED = b"no longer finite"  # of the trainer's errors


class FailedError(ValueError):
    """A command of the study ended with an error."""


class DivergedError(FailedError):
    """The loss of a training did not stay finite."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training and its evaluation.

    Raises:
        FailedError: A command failed; the message names its log.
    """

    name: str
    """Of the cell, a key of ``CELLS``."""
    rate: float
    """Peak learning rate per 256 images."""
    seed: int
    epochs: int
    scale: Scale
    folder: Path
    """Of the study."""
    is_start: bool = False
    """Whether it only makes the backbone that the runs of its seed start from."""

    @classmethod
    def start(cls, scale: Scale, seed: int, folder: Path) -> Run:
        """Return the run whose backbone those of a seed start from."""
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
        """What is trained."""
        return CELLS[self.name]

    @property
    def output(self) -> Path:
        """Folder of the run."""
        kind = "start-" if self.is_start else ""
        named = f"{kind}{self.name}-{self.epochs}-{self.rate:g}-{self.seed}"
        return self.folder / "runs" / named

    def _beside(self, kind: str) -> Path:
        """Return a file next to the run's folder, whose name has dots that are no suffix."""
        return self.output.with_name(f"{self.output.name}.{kind}")

    def settings(self) -> dict[str, Field]:
        """Return the trainer's fields that say what is learned, over the recipe demo."""
        return {
            "data.source": "folder",
            "data.variation": 1.0,  # the default: these images are not the recipe's own
            "validation.images-per-class": 0,
            **self.scale.settings,
            **self.cell.settings(),
            "optim.epochs": self.epochs,
            "optim.base-lr": self.rate,
            "seed": self.seed,
        }

    def conditions(self) -> dict[str, Field]:
        """Return what a result is of: the settings, the images, and what the run starts from."""
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
        self._do("trex_models.train", self.training())

    def search(self) -> float:
        """Train, and return top-1 on held-out images of the training classes; 0 if it diverges."""
        out = self.output / "held-out.json"
        try:
            self.train()
        except DivergedError:
            return 0.0
        self._do("trex_models.transfer", self.evaluation(["held-out"], out, seeds=1))
        return float(json.loads(out.read_text())["datasets"]["held-out"]["top1"]["mean"])

    def is_done(self, result: Path) -> bool:
        """Return whether there is a result of this run."""
        if not result.exists():
            return False
        known = read(result)["settings"]
        asked = json.loads(json.dumps(rounded(self.conditions())))
        if field := differing(known, asked):
            raise ValueError(
                f"{result} is of {field} {known.get(field)}, not {asked.get(field)}: delete "
                "it, or name another --results"
            )
        return True

    def complete(self, result: Path) -> None:
        """Train, evaluate on all sets, and write the result."""
        out = self.output / "transfer.json"
        self.train()
        evaluation = [*self.evaluation(list(TITLES), out, _SEEDS), "--geometry"]
        self._do("trex_models.transfer", evaluation)
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
        """Return the processor time of the run's commands, including interrupted ones.

        It lacks commands that were killed together with the study, and the heads' accuracy.
        """
        costs = self._beside("cost")
        return sum(map(float, costs.read_text().split())) if costs.exists() else 0.0

    def _head(self) -> dict[str, float] | None:
        """Return top-1 of the training head on training images and new ones; None without one.

        And of class means of the embeddings (``mean_head``), a classifier that all objectives have
        alike: OCM's own head holds an embedding of each training image.
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

    def _do(self, module: str, arguments: list[str]) -> None:
        """Run a module on one thread; its output goes to a log next to the run's folder."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        log = self._beside("log")
        if _stopped.is_set():
            raise FailedError(f"{module} was not started: the study was asked to stop")
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
            if _stopped.is_set():  # between the check and the line above
                child.terminate()
            _, status, used = os.wait4(child.pid, 0)
            _running.discard(child.pid)
            child.returncode = os.waitstatus_to_exitcode(status)
        append(self._beside("cost"), f"{used.ru_utime + used.ru_stime:.2f}\n")
        if child.returncode:
            kind = DivergedError if _DIVERGED in log.read_bytes()[begun:] else FailedError
            raise kind(f"{module} ended with status {child.returncode}: see {log}")


@contextmanager
def sigterm_stops() -> Iterator[None]:
    """Have SIGTERM end the study as Ctrl-C does: the trainings save their state and end, too."""

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
    """Return top-1 by the nearest class mean of unit embeddings, on known and on new images."""
    known, new = _unit(known), _unit(new)
    sums = np.stack([known[labels == label].sum(0) for label in range(labels.max() + 1)])
    scores = known @ _unit(sums).T
    scores[np.arange(len(labels)), labels] = (known * _unit(sums[labels] - known)).sum(1)
    guesses = scores.argmax(1), (new @ _unit(sums).T).argmax(1)
    return float((guesses[0] == labels).mean()), float((guesses[1] == new_labels).mean())


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def read(path: Path) -> dict[str, Any]:
    """Read a JSON file of the study."""
    try:
        found = json.loads(path.read_text())
        if "optim.base-lr" not in found["settings"]:
            raise ValueError("its settings lack optim.base-lr")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and run the study") from None
    return dict(found)


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Write a JSON file of the study, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_file(path, json.dumps(rounded(found)) + "\n")


def differing(
    known: Mapping[str, Any], asked: Mapping[str, Any], but: Set[str] = frozenset()
) -> str | None:
    """Return the first field in which settings differ, ``but`` some; None where they agree."""
    fields = sorted((known.keys() | asked.keys()) - but)
    return next((field for field in fields if known.get(field) != asked.get(field)), None)


def rounded(value: Any) -> Any:
    """Return a JSON value with numbers of six digits, which is more than seeds agree on."""
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
    """Return the part of a dataset's entry in a report that a result keeps."""
    geometry = entry["geometry"]["train"]
    return {
        "top1": entry["top1"]["mean"],
        "log_odds": entry["log_odds"],
        "knn": entry["knn"]["top1"],
        "test_images": entry["test"]["images"],
        "geometry": {key: geometry[key] for key in _GEOMETRY} if geometry else None,
    }
