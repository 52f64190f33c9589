"""Fuzz test: damaged and malicious checkpoints for every function that reads one.

    python -m tests.fuzz_checkpoints --files 5000 --seed 0

Each file is a small checkpoint with one change: damaged bytes, a program in its pickle, or contents
of other types. One function reads it, in a worker process with a time limit and a memory limit. The
exit status is 1 if a file was loaded with wrong values although its format has checksums or
lengths, exceeded a limit, ended the process, or raised anything but an error that names the file.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import pickle
import random
import resource
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

import trex_models  # noqa: F401  # registers the models
from tests.official_files import official_form
from trex_models.distributed import Process
from trex_models.pretrained import checkpoints, licenses
from trex_models.train import checkpointing, export, init_from, setup
from trex_models.train.__main__ import main as train
from trex_models.train.build import build_method
from trex_models.train.config import from_dict

SECONDS, GIBIBYTES = 60, 1.5  # limits per file; memory in addition to the worker's
NOTHING = torch.empty(0)
GOOD = {"refused", "loaded", "loaded as written"}
SETTINGS = (
    "demo --data.num-classes 4 --data.images-per-class 16 --data.image-size 16 "
    "--crops.global-size 16 --crops.local-crops 1 --crops.local-size 12 --optim.batch-size 16 "
    "--optim.epochs 1 --optim.warmup-epochs 0 --model.hidden-dim 16 --model.embedding-dim 8 "
    "--model.backbone-args channels=(4,4,8,8) --objective.bank-size 64 --system.workers 0 "
    "--validation.images-per-class 0"
).split()


# Malicious pickles: programs in protocol 2.
def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def integer(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def call(name: str, *arguments: bytes) -> bytes:
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n(".encode() + b"".join(arguments) + b"tR"


def tensor(count: int, offset: int, size: int, stride: int, storage: str = "Float") -> bytes:
    pid = b"(" + text("storage") + f"ctorch\n{storage}Storage\n".encode() + text("0") + text("cpu")
    pid += integer(count) + b"tQ"
    view = integer(offset) + b"(" + integer(size) + b"t(" + integer(stride) + b"t\x89}"
    return call("torch._utils._rebuild_tensor_v2", pid, view)


GADGETS = {
    "ndarray of pointers": call(
        "numpy.ndarray", b"(K\x01t", text("O"), call("_codecs.encode", text("AAAA"), text("latin1"))
    ),
    "bytearray": call("builtins.bytearray", integer(1_500_000_000)),
    "codec": call("_codecs.encode", text("a" * 3_000_000), text("punycode")),
    "array of 1e17": call("numpy._core.multiarray._reconstruct", b"(" + integer(10**17) + b"t"),
    "system": call("os.system", text("true")),
    "getattr": call("builtins.getattr", text("a"), text("b")),
    "stride 0": tensor(4, 0, 2_000_000_000, 0),
    "beyond": tensor(4, 0, 4000, 1),
    "offset": tensor(4, 4000, 4, 1),
    "negative": tensor(4, 0, 4, -1),
    "longer storage": tensor(4_000_000, 0, 4, 1),
    "huge": tensor(10**17, 0, 10**17, 1),
    "memo": b"]r\xff\xff\xff\x7f",
    "nested": b"]q\x00" + b"](h\x00h\x00eq\x00" * 60,
    "long string in tuples": text("a" * 10_000)
    + b"\x85q\x00"
    + b"]("
    + b"c_codecs\nencode\nh\x00R" * 1000
    + b"e",
    "memo of one hash": b"K\x01" + b"".join(b"p%d\n" % (k * (2**61 - 1)) for k in range(40_000)),
    "extension": b"\x82\x01)R",
    "instance": b"(ios\nsystem\n",
    "same hash": b"}(" + b"".join(integer(k * (2**61 - 1)) + b"N" for k in range(50_000)) + b"u",
    "attribute": b"ccollections\nOrderedDict\n}" + text("a") + text("b") + b"sb",
    "deep": b"(" * 200_000 + b"t" * 200_000,
    "long number": b"L" + b"9" * 100_000 + b"L\n",
    "frame": b"\x95" + b"\xff" * 7 + b"\x7f",
    "byte array of any size": b"\x96" + b"\xff" * 5 + b"\0" * 3,
    "number": integer(10**300),
    "list": b"](K\x01K\x02e",
}


class Bench:
    """Small checkpoints of every form, and every function that reads one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert train([*SETTINGS, "--output", str(folder / "run")]) == 0
        (path,) = checkpointing.list_checkpoints(folder / "run")
        self.name = path.name
        state = checkpointing.load(path)
        self.config = from_dict(state["config"])
        self.run = setup.build_run(self.config, Process(0, 1, torch.device("cpu")))
        self.classes: list[str] = state["classes"]
        method, _ = export.load_method(path)
        prefix = "encoder.backbone."
        state = copy.deepcopy(state)  # copied out of the mapped file
        flat = {
            key.removeprefix(prefix): value.contiguous()
            for key, value in state["method"].items()
            if key.startswith(prefix)
        }
        self.contents = {"trainer": state, "official": official_form(state["method"]), "flat": flat}
        self.expected = method.encoder.backbone.state_dict()
        self.data = {form: self.saved(form) for form in (*self.contents, "legacy", "safetensors")}
        paths = self.create_model, self.read, self.init_from, self.resume, self.export, self.license
        self.paths: dict[str, Callable[[Path], dict[str, Tensor] | None]] = {
            path.__name__: path for path in paths
        }

    def saved(self, form: str) -> bytes:
        path = self.folder / "saved"
        if form == "safetensors":
            save_file(self.contents["flat"], path)
        else:
            contents = self.contents["trainer" if form == "legacy" else form]
            torch.save(contents, path, _use_new_zipfile_serialization=form != "legacy")
        return path.read_bytes()

    def create_model(self, path: Path) -> dict[str, Tensor]:
        model = timm.create_model(
            "trex_resnet",
            pretrained=True,
            backbone="resnet10t",
            num_classes=0,
            proj_dim=0,
            channels=(4, 4, 8, 8),
            pretrained_cfg_overlay={"file": str(path)},
        )
        return model.state_dict()

    def read(self, path: Path) -> dict[str, Tensor]:
        return checkpoints.read(path, num_classes=4, backbone=None).backbone

    def init_from(self, path: Path) -> dict[str, Tensor]:
        method = build_method(self.config, len(self.classes))
        init_from.init_from(path, method, self.classes, "")
        return method.encoder.backbone.state_dict()

    def resume(self, path: Path) -> dict[str, Tensor]:
        target = self.folder / "run" / "checkpoints" / self.name
        target.write_bytes(path.read_bytes())
        try:
            setup._resume(self.run)
        finally:
            for left in target.parent.iterdir():
                left.unlink()
        return self.run.method.encoder.backbone.state_dict()

    def export(self, path: Path) -> dict[str, Tensor]:
        (backbone, *_) = export.export_checkpoint(path, self.folder / "export")
        return checkpoints.read(backbone, backbone=None).backbone

    def license(self, path: Path) -> None:
        licenses.license_of(path)


# Changes: each returns the file's bytes and the allowed outcome: "same" (refused, or loaded with
# the original values), "refuse", or "any".
def damage(bench: Bench, form: str, rng: random.Random) -> tuple[bytes, str]:
    data = bytearray(bench.data[form])
    position = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(1, 4000)
    kind = rng.choice(["flip", "cut", "insert", "zero"])
    if kind == "flip":
        data[position % len(data)] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "insert":
        data[position:position] = rng.randbytes(rng.randrange(1, 100))
    else:
        data[position : position + 64] = bytes(min(64, len(data) - position))
    # These formats have lengths but no checksums, so changed values cannot be detected.
    exact = form not in ("legacy", "safetensors") or kind in ("cut", "insert")
    return bytes(data), "same" if exact else "any"


def records(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def zipped(contents: Iterator[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in contents:
            archive.writestr(name, data)
    return file.getvalue()


def program(bench: Bench, form: str, rng: random.Random) -> tuple[bytes, str]:
    """Insert a program as an entry, a weight or the complete pickle, or damage the pickle."""
    contents = records(bench.data[form])
    (name,) = [name for name in contents if name.endswith("data.pkl")]
    body = bytearray(contents[name])
    gadget = rng.choice(list(GADGETS.values()))
    kind = rng.choice(["whole", "entry", "weight", "flip"])
    if kind == "whole":
        body = bytearray(b"\x80\x02" + gadget + b".")
    elif kind == "entry":
        entry = rng.choice(["config", "classes", "environment", "args", "optimizer", "step"])
        body = body[:-1] + text(entry) + gadget + b"s."
    elif kind == "weight":
        model = bytearray(pickle.dumps({}, 2)[:-1])
        body = model + text("model" if form == "official" else "method") + b"}"
        body += text("module.model.encoder.conv1.0.weight") + gadget + b"ss."
    else:
        for _ in range(rng.randrange(1, 4)):
            body[rng.randrange(len(body))] = rng.randrange(256)
    contents[name] = bytes(body)
    return zipped(iter(contents.items())), "any"


VALUES: list[Any] = [
    *(None, 1, -1, 1.5, "text", b"bytes", [], {}, [1], ["a"], {"a": 1}, {"license": 1}, 10**12),
    *([[["a"]]], {"model": {"hidden_layers": 100_000}}, {"license": ["mit"]}, (1, 2), True),
]


def types(bench: Bench, form: str, rng: random.Random) -> tuple[bytes, str]:
    contents = dict(bench.contents[form])
    weights = next((name for name in ("method", "model") if name in contents), "")
    state = dict(contents[weights]) if weights else contents
    key = rng.choice([key for key in state if isinstance(state[key], Tensor)])
    value = state[key].clone(memory_format=torch.contiguous_format)
    kind = rng.choice(["entry", "setting", "dtype", "value", "shape", "drop", "label"])
    verdict = "any"
    if kind == "entry" and weights:
        contents[rng.choice([name for name in contents if name != weights])] = rng.choice(VALUES)
    elif kind == "setting" and form == "trainer":
        config = json.loads(json.dumps(contents["config"]))
        section = rng.choice([name for name in config if isinstance(config[name], dict)])
        config[section][rng.choice(list(config[section]))] = rng.choice([*VALUES, 100_000])
        contents["config"] = config
    elif kind == "dtype":
        dtypes = (torch.int8, torch.int64, torch.bool, torch.complex64, torch.uint8, torch.int32)
        dtype = rng.choice([dtype for dtype in dtypes if dtype != value.dtype])
        value, verdict = value.to(dtype), "refuse"
    elif kind == "value" and value.is_floating_point() and value.numel():
        value.view(-1)[0] = rng.choice([float("nan"), float("inf"), float("-inf")])
        verdict = "refuse"
    elif kind == "shape":
        value = value.reshape(-1)[: rng.randrange(3)].clone()
    elif kind == "label":
        key = next((name for name in state if name.endswith(("bank.labels", "memory.labels"))), key)
        value = state[key].clone(memory_format=torch.contiguous_format)
        value.view(-1)[0] = rng.choice([-1, 4, 10**9])
        # Files of models and official files do not state the number of classes.
        refused = form == "trainer" or (form == "official" and value.min() < 0)
        verdict = "refuse" if refused else "any"
    state[key] = value
    if kind == "drop":
        del state[key]
    file = io.BytesIO()
    torch.save({**contents, weights: state} if weights else state, file)
    return file.getvalue(), verdict


CHANGES = {"damage": damage, "programs": program, "types": types}


def one(bench: Bench, seed: int, index: int) -> tuple[str, str, str]:
    rng = random.Random(f"{seed}.{index}")
    path_name = rng.choice(list(bench.paths))
    change = rng.choice(list(CHANGES))
    forms = list(bench.data) if change == "damage" else ["trainer", "official", "flat"]
    if path_name in ("resume", "export"):
        forms = ["trainer", "legacy"] if change == "damage" else ["trainer"]
    data, verdict = CHANGES[change](bench, rng.choice(forms), rng)
    path = bench.folder / "bad" / "step_4.pt"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome, printed = "loaded", io.StringIO()
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(printed):
            found = bench.paths[path_name](path)
        signal.alarm(0)
        if found is not None:
            same = all(
                torch.equal(found.get(key, NOTHING), value) for key, value in bench.expected.items()
            )
            outcome = "loaded" if same else "loaded as written" if verdict == "any" else "WRONG"
            outcome = "ACCEPTED" if verdict == "refuse" else outcome
    except (ValueError, RuntimeError, checkpoints.CheckpointError) as error:
        message = str(error) if isinstance(error, RuntimeError) else f"{printed.getvalue()} {error}"
        outcome = "refused" if path.name in message else f"NO FILE NAMED: {message[:200]}"
    except BaseException as error:  # anything else is a finding
        outcome = f"{type(error).__name__}: {error}"[:200]
    signal.alarm(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    return path_name, change, outcome if grown < GIBIBYTES else f"TOO MUCH MEMORY: {grown:.1f}"


def work(seed: int, files: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError()))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for index in range(files):
            print(json.dumps([index, *one(bench, seed, index)]), flush=True)


def outcomes(seed: int, files: int) -> Iterator[tuple[int, str, str, str]]:
    """Read all files in a worker process; stop at the file that ends the process."""
    command = [sys.executable, "-m", "tests.fuzz_checkpoints", "--work", str(seed), str(files)]
    index = -1
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            index, *found = json.loads(line)
            yield index, *found
    if process.returncode:
        yield index + 1, "?", "?", f"CRASH: status {process.returncode}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Read damaged and malicious checkpoints.")
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        work(*options.work)
        return 0
    read = list(outcomes(options.seed, options.files))
    bad = [found for found in read if found[-1] not in GOOD]
    for index, path, change, outcome in bad:
        print(f"file {index}, {path}, {change}: {outcome}", flush=True)
    print(f"{len(read)} files, seed {options.seed}: {len(bad)} findings")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
