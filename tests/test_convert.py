"""``python -m convert naver``: official files to timm folders."""

from __future__ import annotations

import csv
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from convert import official, source
from convert.__main__ import main
from tests import official_files, reference_resnet
from tests.processes import Forked, captured
from trex_models.pretrained import checkpoints, timm_folder
from trex_models.pretrained.checkpoints import Checkpoint
from trex_models.pretrained.manifest import sha256

ROOT = Path(__file__).parents[1]

# Of the largest value: our float32 against the reference's float64.
TOLERANCE = 1e-4

ABSENT = (3, 998)
HEAD = "head.layers."
PARTS = {"": "features", "_proj": "embeddings", "_cls": "logits"}


@dataclass(frozen=True)
class Conversion:
    """A file that was converted."""

    contents: dict[str, Any]
    """Under the official names."""
    path: Path
    out: Path
    options: tuple[str, ...]
    printed: str

    def models(self) -> list[Path]:
        return sorted(path for path in self.out.iterdir() if path.is_dir())

    def report(self) -> tuple[dict[str, str], list[dict[str, str]]]:
        """Return the facts at the report's head, and its rows."""
        lines = (self.out / f"{self.path.stem}.report.tsv").read_text().splitlines()
        facts = [line.removeprefix("# ") for line in lines if line.startswith("# ")]
        rows = csv.DictReader(lines[len(facts) :], delimiter="\t")
        return {name: value for name, _, value in (f.partition("\t") for f in facts)}, list(rows)


def run(path: Path, output: Path, *options: str) -> tuple[int, str, str]:
    """Return the exit status, and what was printed to each stream."""
    return captured(main, "naver", path, "--output", output, *options)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for large files, which do not outlive the tests."""
    folder = tmp_path_factory.mktemp("convert")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)


def converted(
    folder: Path, name: str, contents: dict[str, Any], *options: str, written: Any = None
) -> Conversion:
    """Write a file and convert it; ``written`` is what the file holds, if not ``contents``."""
    path, out = folder / name, folder / f"out of {name}{''.join(options)}"
    if not path.exists():
        official_files.write(contents if written is None else written, path)
    status, printed, err = run(path, out, *options)
    assert status == 0, err
    return Conversion(contents, path, out, options, printed)


@pytest.fixture(scope="module")
def trex(base: Path) -> Conversion:
    contents = official_files.full_checkpoint(
        3, seed=1, bank_size=2048, absent=ABSENT, optimizer=False
    )
    return converted(base, "trex_2_checkpoint_full.pth", contents)


@pytest.fixture(scope="module")
def trexstar(base: Path) -> Conversion:
    contents = official_files.full_checkpoint(1, seed=2, bank_size=2048, optimizer=False)
    return converted(base, "trexstar_2_checkpoint_full.pth", contents)


@pytest.fixture(scope="module")
def momentum(base: Path, trexstar: Conversion) -> Conversion:
    return converted(base, trexstar.path.name, trexstar.contents, "--momentum-encoder")


@pytest.fixture(scope="module")
def learned(base: Path) -> Conversion:
    """Class weights instead of a bank; saved with one more wrapper, and in another layout."""
    contents = official_files.full_checkpoint(3, memory=False, seed=3, optimizer=False)
    written = contents | {
        "model": {
            f"_orig_mod.{name}": value.to(memory_format=torch.channels_last)
            if value.ndim == 4
            else value
            for name, value in contents["model"].items()
        }
    }
    return converted(base, "run_7.pth", contents, written=written)


def narrow_contents() -> dict[str, Any]:
    """2 hidden layers of 64, embeddings of 32, a bank of 7 classes, no momentum encoder."""
    contents = official_files.full_checkpoint(
        2, seed=4, num_classes=7, bank_size=64, absent=[2], optimizer=False
    )
    model = contents["model"]
    for name in [name for name in model if name.startswith("module.model_ema.")]:
        del model[name]
    for name, value in model.items():
        if f".{HEAD}" not in name and name != "module.memory.features":
            continue
        is_last = name.endswith(f"{HEAD}3.weight")
        if value.ndim:
            value = value[:32] if is_last else value[:64]
        if name == "module.memory.features":
            value = value[:, :32]
        elif value.ndim == 2 and not name.endswith(f"{HEAD}1.fc.weight"):
            value = value[:, :64] * (2048 / 64) ** 0.5
        model[name] = value.clone()
    return contents


@pytest.fixture(scope="module")
def narrow(base: Path) -> Conversion:
    return converted(base, "narrow.pth", narrow_contents(), "--num-classes", "7")


@pytest.fixture(scope="module")
def backbone(base: Path) -> Conversion:
    return converted(base, "trexstar.pth", official_files.backbone_checkpoint(5))


@pytest.fixture(scope="module")
def renamed(base: Path) -> Conversion:
    """A backbone of another name, saved inside a wrapper."""
    contents = official_files.backbone_checkpoint(6)
    written = {f"module.{name}": value for name, value in contents.items()}
    model = ("--model", "trex_resnet50.in1k_r2")
    return converted(base, "download.pth", contents, *model, written=written)


FULL = {
    "trex": ("trex_resnet50", "in1k_r2"),
    "trexstar": ("trexstar_resnet50", "in1k_r2"),
    "momentum": ("trexstar_resnet50", "in1k_r2_momentum"),
    "learned": ("trex_resnet50", "in1k_r2_learned"),
    "narrow": ("trex_resnet50", "c7_l2_h64_d32"),
}
BACKBONES = {"backbone": ("trexstar_resnet50", "in1k"), "renamed": ("trex_resnet50", "in1k_r2")}


def files(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("conversion", names, indirect=True)


ALL = [*FULL, *BACKBONES]
every_file = pytest.mark.parametrize(
    ("name", "conversion"), [(n, n) for n in ALL], indirect=["conversion"], ids=ALL
)


@pytest.fixture
def conversion(request: pytest.FixtureRequest) -> Conversion:
    found: Conversion = request.getfixturevalue(request.param)
    return found


# What is written


@every_file
def test_folders_are_named_as_the_hub_repositories(name: str, conversion: Conversion) -> None:
    architecture, tag = (FULL | BACKBONES)[name]
    parts = PARTS if name in FULL else [""]
    wanted = {f"{architecture}{part}.{tag}" for part in parts}
    assert {path.name for path in conversion.out.iterdir()} == wanted | {
        f"{conversion.path.stem}.report.tsv"
    }
    for folder in conversion.models():
        assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
        assert folder.stat().st_mode & 0o777 == 0o755


@every_file
def test_folders_reproduce_the_reference(name: str, conversion: Conversion) -> None:
    images = reference_resnet.pictures(3, 96, seed=7)
    expected = reference_resnet.outputs(
        conversion.contents,
        images,
        momentum="--momentum-encoder" in conversion.options,
        num_classes=7 if name == "narrow" else 1000,
    )
    for folder in conversion.models():
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        wanted = getattr(expected, PARTS[re.sub(r".*50|\..*", "", folder.name)])
        with torch.no_grad():
            found = model(images)
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() < TOLERANCE * wanted.abs().max(), folder
        if folder.name.endswith(("_cls.in1k_r2", "_cls.c7_l2_h64_d32")):
            absent = {"trex": list(ABSENT), "narrow": [2]}.get(name, [])
            assert (found == 0).all(0).nonzero().flatten().tolist() == absent


@every_file
def test_config(name: str, conversion: Conversion) -> None:
    architecture, tag = (FULL | BACKBONES)[name]
    for folder in conversion.models():
        text = (folder / "config.json").read_text()
        assert re.findall(r'"([^"]*/[^"]*)"', text) == ["https://github.com/naver/trex"]
        config = json.loads(text)
        is_backbone = folder.name == f"{architecture}.{tag}"
        assert config["architecture"] == (
            "resnet50" if is_backbone else folder.name.partition(".")[0]
        )
        classes = 0
        if "_cls" in folder.name:
            classes = 7 if name == "narrow" else 1000
        assert config["num_classes"] == classes
        assert "num_classes" not in config["model_args"]
        head = {key: value for key, value in config["model_args"].items() if "proj" in key}
        sizes = {"proj_layers": 2, "proj_hidden_dim": 64, "proj_dim": 32}
        assert head == (sizes if name == "narrow" and not is_backbone else {})
        cfg = config["pretrained_cfg"]
        wanted = {
            "tag": tag,
            "num_classes": classes,
            "input_size": [3, 224, 224],
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "license": "cc-by-nc-sa-4.0",
            "paper_ids": "arXiv:2206.15369",
            "first_conv": "conv1",
            "classifier": "fc",
        }
        assert {key: cfg[key] for key in wanted} == wanted
        assert not {"file", "url", "hf_hub_id", "source"} & cfg.keys()


def test_backbones_load_in_stock_timm(
    trex: Conversion, backbone: Conversion, scratch: Path
) -> None:
    code = """
import sys, timm, torch
for i, folder in enumerate(sys.argv[1:]):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        torch.save(model(torch.load("images.pt")), f"{i}.pt")
assert "trex_models" not in sys.modules
"""
    images = reference_resnet.pictures(2, 64)
    torch.save(images, scratch / "images.pt")
    conversions = trex, backbone
    folders = [str(conversion.models()[0]) for conversion in conversions]
    subprocess.run([sys.executable, "-c", code, *folders], check=True, cwd=scratch)
    for i, conversion in enumerate(conversions):
        wanted = reference_resnet.outputs(conversion.contents, images).features
        found = torch.load(scratch / f"{i}.pt")
        assert (found - wanted).abs().max() < TOLERANCE * wanted.abs().max()


@files("narrow", "renamed")
def test_conversion_is_deterministic(conversion: Conversion, scratch: Path) -> None:
    status, _, err = run(conversion.path, scratch / "again", *conversion.options)
    assert status == 0, err

    def digests(folder: Path) -> dict[Path, str]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder): sha256(path) for path in files}

    assert digests(scratch / "again") == digests(conversion.out)


# The report and the summary


@every_file
def test_report_covers_every_key_once(name: str, conversion: Conversion) -> None:
    facts, rows = conversion.report()
    data = conversion.path.read_bytes()
    files = {path.name: path / "model.safetensors" for path in conversion.models()}
    assert facts == {
        "file": conversion.path.name,
        "bytes": str(len(data)),
        "sha256": hashlib.sha256(data).hexdigest(),
        **{model: sha256(file) for model, file in files.items()},
    }
    contents = checkpoints.load_checkpoint(conversion.path)
    held = dict(contents["model"]) if name in FULL else dict(contents)
    others = contents.keys() - {"model"} if name in FULL else set()
    assert len(rows) == len(held) + len(others)
    assert {row["key"] for row in rows} == held.keys() | others

    whole = load_file(max(conversion.models(), key=size) / "model.safetensors")
    kept = set()
    for row in rows:
        if row["key"] in others:
            assert row["fate"] == "dropped: not weights"
            assert row["sha256_16"] == row["shape"] == "-"
            continue
        tensor = held[row["key"]]
        assert row["shape"] == ("x".join(map(str, tensor.shape)) or "scalar")
        assert f"torch.{row['dtype']}" == str(tensor.dtype)
        assert row["sha256_16"] == checksum(tensor)
        if row["fate"] in whole:
            assert row["sha256_16"] == checksum(whole[row["fate"]])
            kept.add(row["fate"])
        else:
            assert row["fate"].startswith(("dropped:", "prototypes:")), row
    has_bank = name in FULL and name != "learned"
    assert whole.keys() - kept == ({"fc.weight"} if has_bank else set())


def size(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


def checksum(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def test_fates_of_the_encoders(trexstar: Conversion, momentum: Conversion) -> None:
    def fates(conversion: Conversion) -> dict[str, str]:
        return {row["key"]: row["fate"] for row in conversion.report()[1]}

    online, average = "module.model.encoder.conv1.weight", "module.model_ema.encoder.conv1.weight"
    assert fates(trexstar)[online] == fates(momentum)[average] == "conv1.weight"
    assert fates(trexstar)[average] == "dropped: momentum encoder"
    assert fates(momentum)[online] == "dropped: online encoder"


def test_summary_of_a_full_file(trex: Conversion) -> None:
    for line in (
        r"file +trex_2_checkpoint_full\.pth",
        rf"bytes +{trex.path.stat().st_size}",
        r"holds +.*3 hidden layers of 2048, embeddings of 256, 1000 classes .* bank of 2048",
        r"absent +2 classes: 3, 998",
        r"keys +687",
        r" +318  backbone",
        r" +22  projector",
        r" +2  prototypes: L2-normalized class sums",
        r" +340  dropped: momentum encoder",
        r" +\d\.\de-0\d  trex_resnet50_cls\.in1k_r2",
        rf"report +{re.escape(str(trex.out))}/trex_2_checkpoint_full\.report\.tsv",
        r"time +\d+\.\d s",
        r"memory +\d+\.\d MB at most, \d+\.\d MB before reading",
    ):
        assert re.search(f"^{line}$", trex.printed, re.MULTILINE), line
    for folder in trex.models():
        digest = sha256(folder / "model.safetensors")
        assert f"{size(folder) / 1e6:.1f} MB  {digest}  {folder}\n" in trex.printed


def test_summary_of_the_others(backbone: Conversion, learned: Conversion) -> None:
    assert re.search(r"^holds +a ResNet-50 backbone alone$", backbone.printed, re.MULTILINE)
    assert "absent" not in backbone.printed
    assert re.search(r"^absent +0 classes$", learned.printed, re.MULTILINE)
    assert re.search(r"^holds .*1000 classes with learned weights$", learned.printed, re.MULTILINE)
    assert re.search(r"^ +1  class weights$", learned.printed, re.MULTILINE)


# The check before anything is written


@pytest.mark.parametrize("part", ["backbone", "projector", "prototypes"])
def test_wrong_models_are_not_written(
    part: str, narrow: Conversion, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(*args: Any, **kwargs: Any) -> Checkpoint:
        found = checkpoints.read(*args, **kwargs)
        if part == "backbone":
            backbone = found.backbone | {"bn1.bias": found.backbone["bn1.bias"] + 1e-3}
            return dataclasses.replace(found, backbone=backbone)
        if part == "projector":
            layers = found.projector | {"1.bn.bias": found.projector["1.bn.bias"] + 1e-3}
            return dataclasses.replace(found, projector=layers)
        assert found.class_weights is not None
        return dataclasses.replace(found, class_weights=found.class_weights.roll(1, 0))

    monkeypatch.setattr(official, "read", changed)
    status, _, err = run(narrow.path, scratch / "out", *narrow.options)
    wrong = {
        "backbone": ["trex_resnet50", "trex_resnet50_proj", "trex_resnet50_cls"],
        "projector": ["trex_resnet50_proj", "trex_resnet50_cls"],
        "prototypes": ["trex_resnet50_cls"],
    }
    assert status == 2
    assert re.findall(r"(\w+)\.\w+ is off by", err) == wrong[part]
    assert "nothing was written" in err
    assert not list(scratch.iterdir())


def test_temperature_is_checked(
    narrow: Conversion, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "TEMPERATURE", 0.101)
    status, _, err = run(narrow.path, scratch / "out", *narrow.options)
    assert status == 2
    assert re.findall(r"(\w+)\.\w+ is off by", err) == ["trex_resnet50_cls"]


@every_file
def test_source_agrees_with_the_reference(name: str, conversion: Conversion) -> None:
    """Two independent routes from the file's tensors to its outputs."""
    images = reference_resnet.pictures(2, 64)
    options: Any = {"num_classes": 7 if name == "narrow" else 1000}
    average = "--momentum-encoder" in conversion.options
    expected = reference_resnet.outputs(conversion.contents, images, average, **options)
    contents = checkpoints.load_checkpoint(conversion.path)
    found = source.outputs(contents, images, momentum_encoder=average, **options)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert (a - b).abs().max() < TOLERANCE * b.abs().max()


def test_source_uses_no_code_of_the_models() -> None:
    text = Path(source.__file__).read_text()
    assert re.findall(r"trex_models.*", text) == [
        "trex_models.pretrained.checkpoints import WRAPPERS"
    ]


# All or nothing


FULL_DISK = OSError(errno.ENOSPC, "No space left on device")


def keep_out(scratch: Path) -> Path:
    """Return a folder with an earlier conversion of one model."""
    out = scratch / "out"
    earlier = out / "trex_resnet50.c7_l2_h64_d32"
    earlier.mkdir(parents=True)
    (earlier / "earlier").touch()
    return out


def left(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*"))


@pytest.mark.parametrize(
    ("error", "existing"), [(FULL_DISK, True), (SafetensorError("No space left on device"), False)]
)
def test_full_disk_midway_leaves_nothing(
    error: Exception,
    existing: bool,
    narrow: Conversion,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = keep_out(scratch) if existing else scratch / "new" / "out"
    before = left(scratch)
    write = timm_folder.write_timm_folder

    def fail(model: Any, folder: Path, images: Tensor, expected: Tensor) -> Path:
        if "_cls" in folder.name:
            (folder.parent / "half a file").write_bytes(b"0" * 1000)
            raise error
        return write(model, folder, images, expected)

    monkeypatch.setattr(timm_folder, "write_timm_folder", fail)
    status, _, err = run(narrow.path, out, *narrow.options)
    tag = "c7_l2_h64_d32"
    assert status == 2
    assert (
        f"error: {out}: No space left on device; written: nothing; not written: "
        f"trex_resnet50.{tag}, trex_resnet50_proj.{tag}, trex_resnet50_cls.{tag}, "
        f"narrow.report.tsv; free some space or choose another --output\n"
    ) in err
    assert left(scratch) == before


def test_too_little_room_is_seen_first(
    narrow: Conversion, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(scratch)._replace(free=200 * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(timm_folder, "write_timm_folder", None)
    status, _, err = run(narrow.path, scratch / "out", *narrow.options)
    assert status == 2
    needed = r"28\d\.\d MB are needed; free some, or choose another --output"
    assert re.fullmatch(rf"error: {scratch}/out has 200\.0 MB of free space, {needed}\n", err)
    assert not list(scratch.iterdir())


def test_message_tells_what_was_moved_before_an_error(
    narrow: Conversion, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scratch / "out"
    replaced = timm_folder.replaced_folder

    def fail(folder: Path) -> Any:
        if folder.parent == out and "_proj" in folder.name:
            raise FULL_DISK
        return replaced(folder)

    monkeypatch.setattr(timm_folder, "replaced_folder", fail)
    status, _, err = run(narrow.path, out, *narrow.options)
    tag = "c7_l2_h64_d32"
    assert status == 2
    assert (
        f"written: trex_resnet50.{tag}; not written: trex_resnet50_proj.{tag}, "
        f"trex_resnet50_cls.{tag}, narrow.report.tsv;"
    ) in err
    assert left(out) == [
        f"trex_resnet50.{tag}",
        f"trex_resnet50.{tag}/config.json",
        f"trex_resnet50.{tag}/model.safetensors",
    ]


def test_disk_that_is_really_full(
    narrow: Conversion, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has room for one model; the free space is not noticed first."""
    mount = scratch / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=150m", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk")
    try:
        usage = shutil.disk_usage(mount)._replace(free=10**12)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        status, _, err = run(narrow.path, mount / "out", *narrow.options)
        assert status == 2
        assert re.search(r"No space left on device.*; written: nothing; not written: trex_res", err)
        assert not list(mount.iterdir())
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_earlier_folder_is_replaced(narrow: Conversion, scratch: Path) -> None:
    out = keep_out(scratch)
    status, _, err = run(narrow.path, out, *narrow.options)
    assert status == 0, err
    assert left(out) == left(narrow.out)


# Bad input


def refused(path: Path, out: Path, *options: str) -> str:
    """Return the message; require that it is one line and that nothing was written."""
    existed = out.exists()
    status, _, err = run(path, out, *options)
    assert status == 2
    assert out.exists() == existed
    assert re.fullmatch(r"error: .+\n", err), err
    assert path.name in err
    return err


TREX = ("--model", "trex_resnet50.in1k")


NO_WEIGHTS = {
    "empty": (b"", "not a file of torch or safetensors .*; download or copy it again"),
    "page": (b"<!DOCTYPE html>\n<html>", "web page, not weights; download the file again"),
    "text": (b"404: Not Found", r"begins with b'404: Not Found'\); download or copy"),
}


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_no_weights(name: str, scratch: Path) -> None:
    data, message = NO_WEIGHTS[name]
    path = scratch / "trex.pth"
    path.write_bytes(data)
    assert re.search(message, refused(path, scratch / "out"))


def test_no_file(scratch: Path) -> None:
    missing = refused(scratch / "none.pth", scratch / "out")
    assert re.search(r"none\.pth does not exist; check the path, or download one of trex", missing)
    assert "is a folder; give the .pth file" in refused(scratch, scratch / "out")


@pytest.mark.parametrize("cut", [3, 64, 5000, 0.5, -5000, -22, -1])
def test_truncated_file(cut: float, backbone: Conversion, scratch: Path) -> None:
    """In the first record, in the pickle, in the data, in the directory at the end."""
    path = scratch / "trexstar.pth"
    shutil.copy(backbone.path, path)
    whole = path.stat().st_size
    length = int(cut * whole) if cut == 0.5 else int(cut) % whole
    os.truncate(path, length)
    message = refused(path, scratch / "out")
    if length > 3:
        assert f"damaged or cut short ({length} bytes); download or copy it again" in message


@pytest.mark.parametrize("at", [70, 0.1, 0.5, 0.99, -50])
def test_flipped_byte(at: float, backbone: Conversion, scratch: Path) -> None:
    path = scratch / "trexstar.pth"
    data = bytearray(backbone.path.read_bytes())
    data[int(at * len(data)) if isinstance(at, float) else at] ^= 1
    path.write_bytes(data)
    assert "damaged or cut short" in refused(path, scratch / "out")


def change(key: str, value: Callable[[Tensor], Tensor] | None) -> Callable[[Any], None]:
    def apply(state: dict[str, Tensor]) -> None:
        if value is None:
            del state[key]
        else:
            state[key] = value(state.get(key, torch.empty(0)).clone())

    return apply


def with_nan(tensor: Tensor) -> Tensor:
    tensor.view(-1)[7] = torch.nan
    return tensor


BAD_BACKBONES = {
    "missing key": (
        change("layer3.0.bn1.weight", None),
        r"1 \(layer3\.0\.bn1\.weight\) missing, 0 unexpected; use a whole file",
    ),
    "unexpected key": (
        change("extra.weight", lambda _: torch.ones(2)),
        r"0 missing, 1 \(extra\.weight\) unexpected; use a whole file",
    ),
    "wrong shape": (
        change("conv1.weight", lambda t: t[:, :, :3]),
        r"conv1\.weight is \(64, 3, 3, 7\) torch\.float32, expected \(64, 3, 7, 7\)",
    ),
    "wrong dtype": (change("conv1.weight", lambda t: t.half()), r"torch\.float16, expected"),
    "NaN": (change("bn1.running_var", with_nan), r"bn1\.running_var has 1 values that are not fin"),
    "infinity": (change("fc.weight", lambda _: torch.full((9, 2048), torch.inf)), "18432 values"),
    "classifier": (change("fc.weight", lambda _: torch.ones(9, 2048)), "holds a whole model"),
}


@pytest.mark.parametrize("name", BAD_BACKBONES)
def test_backbone_that_is_not_one(name: str, scratch: Path, backbone: Conversion) -> None:
    apply, message = BAD_BACKBONES[name]
    contents = dict(backbone.contents)
    apply(contents)
    path = scratch / "download.pth"
    torch.save(contents, path)
    assert re.search(message, refused(path, scratch / "out", *TREX))


BANK = "module.memory."
ONLINE = "module.model."
BAD_FULL_FILES = {
    "NaN in the bank": (
        change(f"{BANK}features", with_nan),
        "bank features has 1 values that are not finite",
    ),
    "no labels": (change(f"{BANK}labels", None), "the memory bank has no labels; it is cut down"),
    "no features": (change(f"{BANK}features", None), "bank has no features; it is cut down"),
    "labels of more classes": (
        change(f"{BANK}labels", lambda t: t + 1),
        r"labels run from 1 to 7, outside 7 classes; give the number of classes",
    ),
    "bank of another width": (
        change(f"{BANK}features", lambda t: t[:, :16]),
        r"class weights, \(7, 16\), do not match embeddings of 32",
    ),
    "learned weights besides": (
        change("module.clf.fc.weight", lambda _: torch.ones(7, 32)),
        "holds both a memory bank and learned class weights",
    ),
    "projector cut down": (
        change(f"{ONLINE}{HEAD}2.bn.weight", None),
        r"projector of 2 hidden layers: 1 \(2\.bn\.weight\) missing",
    ),
    "unknown key": (change("module.other.weight", lambda _: torch.ones(2)), "unexpected key 'modu"),
}


@pytest.mark.parametrize("name", BAD_FULL_FILES)
def test_full_file_that_is_not_one(name: str, scratch: Path, narrow: Conversion) -> None:
    apply, message = BAD_FULL_FILES[name]
    model = dict(narrow.contents["model"])
    apply(model)
    path = scratch / "run.pth"
    official_files.write(narrow.contents | {"model": model}, path)
    assert re.search(message, refused(path, scratch / "out", "--num-classes", "7"))


OTHER_ARCHITECTURES = {
    "resnet18": r"not those of a resnet50: 198 \(.*\) missing, 0 unexpected",
    "resnet101": r"0 missing, 306 \(layer3\.6\.conv1\.weight, .*\) unexpected",
    "resnet50": "it is a resnet50 with a linear classifier, not a t-ReX model",
}


@pytest.mark.parametrize("name", OTHER_ARCHITECTURES)
def test_other_architecture(name: str, scratch: Path) -> None:
    path = scratch / f"{name}.pth"
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    torch.save({k: torch.zeros_like(v, device="cpu") for k, v in model.state_dict().items()}, path)
    assert re.search(OTHER_ARCHITECTURES[name], refused(path, scratch / "out", *TREX))


class Command:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_pickle_that_wants_other_globals(scratch: Path) -> None:
    path = scratch / "trex.pth"
    for value, wanted in ((Command(scratch / "made"), "posix.mkdir"), (Fraction(1), "Fraction")):
        torch.save({"model": {"conv1.weight": torch.ones(2)}, "epoch": value}, path)
        message = refused(path, scratch / "out")
        assert re.search(rf"refused: it wants to run \S*{wanted}; no weights need that", message)
    assert not (scratch / "made").exists()


def test_trainers_checkpoint_is_exported_otherwise(backbone: Conversion, scratch: Path) -> None:
    names = {f"encoder.backbone.{name}": value for name, value in backbone.contents.items()}
    projector = {"encoder.projector.1.weight": torch.ones(4, 2048)}
    torch.save(names | projector, scratch / "step_9.pt")
    assert "python -m trex_models.train export" in refused(scratch / "step_9.pt", scratch / "out")


def test_name_that_contradicts_the_contents(
    trexstar: Conversion, backbone: Conversion, scratch: Path
) -> None:
    for source_path, name, message in (
        (trexstar.path, "trex_2_checkpoint_full.pth", "a projector of 3 hidden layers, found a "),
        (trexstar.path, "trexstar_2.pth", "expected a backbone alone, found a projector of 1"),
        (backbone.path, "trexstar_2_checkpoint_full.pth", "found a backbone alone"),
    ):
        (scratch / name).symlink_to(source_path)
        assert message in refused(scratch / name, scratch / "out")
        (scratch / name).unlink()


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("renamed", (), r"none of trex\.pth, trexstar\.pth, .*; say which it is by --model trex_"),
        ("renamed", ("--model", "resnet50.a1"), "--model resnet50.a1 is no backbone and tag"),
        ("renamed", ("--model", "trex_resnet50"), "choose from trex_resnet50.in1k, trexstar_"),
        ("renamed", (*TREX, "--tag", "../up"), "the tag '../up' would be a part of folders' names"),
        ("renamed", ("--model", "trex_resnet50.a/b"), "the tag 'a/b' would be a part of folders'"),
        ("renamed", (*TREX, "--tag", "in1k_r2"), "--tag in1k_r2 is for the published weights"),
        ("renamed", (*TREX, "--num-classes", "9"), "--num-classes 9 is for a memory bank"),
        ("renamed", (*TREX, "--momentum-encoder"), "it holds no momentum encoder"),
        ("backbone", TREX, "--model trex_resnet50.in1k contradicts the file's name"),
        ("trexstar", TREX, "--model trex_resnet50.in1k is for backbone files.*leave it out"),
        ("trexstar", ("--num-classes", "9"), "labels run from 0 to 999, outside 9 classes"),
        ("trexstar", ("--momentum-encoder", "--tag", "in1k_r2"), "would be in1k_r2_momentum; cho"),
        ("narrow", (), r"entries of 6 of 1000 classes only; give the number .*\(--num-classes, or"),
        ("narrow", ("--num-classes", "7", "--tag", "in1k"), "--tag in1k is for the published"),
        (
            "learned",
            ("--num-classes", "9"),
            "--num-classes 9 does not match its class weights, of 1",
        ),
        ("learned", ("--momentum-encoder",), "it holds no momentum encoder"),
    ],
)
def test_options_that_do_not_fit(
    file: str, options: tuple[str, ...], message: str, scratch: Path, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(file).path
    assert re.search(message, refused(path, scratch / "out", *options))


def test_number_of_classes_is_positive(backbone: Conversion, scratch: Path) -> None:
    status, _, err = run(backbone.path, scratch / "out", "--num-classes", "0")
    assert (status, err) == (2, "error: --num-classes must be at least 1, got 0\n")


def test_tag_option(renamed: Conversion, scratch: Path) -> None:
    status, _, err = run(renamed.path, scratch, *TREX, "--tag", "mine")
    assert status == 0, err
    config = json.loads((scratch / "trex_resnet50.mine" / "config.json").read_text())
    assert config["pretrained_cfg"]["tag"] == "mine"


def test_output_that_cannot_be(
    backbone: Conversion, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (scratch / "file").touch()
    for out in (scratch / "file", scratch / "file" / "below"):
        status, _, err = run(backbone.path, out)
        assert status == 2
        assert err == f"error: {scratch}/file is a file; choose another --output\n"
    (scratch / "out").mkdir()
    (scratch / "out" / "trexstar_resnet50.in1k").touch()
    status, _, err = run(backbone.path, scratch / "out")
    assert status == 2
    assert "trexstar_resnet50.in1k there is a file; written: nothing" in err
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    status, _, err = run(backbone.path, scratch / "out" / "new")
    assert status == 2
    assert err == f"error: {scratch}/out cannot be written by this user; choose another --output\n"
    assert left(scratch) == ["file", "out", "out/trexstar_resnet50.in1k"]


def test_traceback_on_demand(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="does not exist"):
        run(scratch / "none.pth", scratch / "out")


def test_command_line(scratch: Path) -> None:
    for arguments, status in ((["--help"], 0), ([], 2)):
        with pytest.raises(SystemExit) as stop:
            main(["naver", *arguments])
        assert stop.value.code == status
    done = Forked("-m", "convert", "naver", "none.pth", "--output", str(scratch), cwd=ROOT)
    assert done.end() == 2
    assert done.err.startswith("error: none.pth does not exist")
    assert done.out == ""


# Size


@pytest.mark.client
def test_memory_of_a_file_of_full_size(scratch: Path) -> None:
    """Above what the imports take: the pages of the file, which are all checked, and one copy."""
    path = scratch / "trex_2_checkpoint_full.pth"
    official_files.write(official_files.full_checkpoint(3), path)
    code = f"""
import convert.official, pathlib, re
def peak():  # ru_maxrss counts the parent's, too
    return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
before = peak()
paths = {[str(path), str(scratch / "out")]!r}
convert.official.convert_official(*map(pathlib.Path, paths))
print((peak() - before) * 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert int(done.stdout.split()[-1]) < 1.7 * path.stat().st_size
