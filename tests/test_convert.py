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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from convert import official, source
from convert.__main__ import main
from tests import official_files, reference_resnet
from tests.processes import Forked, captured, run_python
from trex_models.pretrained import checkpoints, timm_folder
from trex_models.pretrained.checkpoints import Checkpoint
from trex_models.pretrained.manifest import sha256

ROOT = Path(__file__).parents[1]

# Relative to the largest value: our float32 outputs against the reference's float64.
TOLERANCE = 1e-4

ABSENT = (3, 998)
HEAD = "head.layers."
PARTS = {"": "features", "_proj": "embeddings", "_cls": "logits"}


@dataclass(frozen=True)
class Conversion:
    name: str
    contents: dict[str, Any]
    """Contents of a file with the official names."""
    path: Path
    out: Path
    options: tuple[str, ...]
    printed: str

    def models(self) -> list[Path]:
        return sorted(path for path in self.out.iterdir() if path.is_dir())

    def report(self) -> tuple[dict[str, str], list[dict[str, str]]]:
        lines = (self.out / f"{self.path.stem}.report.tsv").read_text().splitlines()
        facts = [line.removeprefix("# ") for line in lines if line.startswith("# ")]
        rows = csv.DictReader(lines[len(facts) :], delimiter="\t")
        return {name: value for name, _, value in (f.partition("\t") for f in facts)}, list(rows)


def run(path: Path, output: Path, *options: str) -> tuple[int, str, str]:
    return captured(main, "naver", path, "--output", output, *options)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("convert")
    yield folder
    shutil.rmtree(folder)


def narrow_contents() -> dict[str, Any]:
    """A state with 2 hidden layers of 64, D = 32, a bank of 7 classes, no momentum encoder."""
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


full = partial(official_files.full_checkpoint, bank_size=2048, optimizer=False)
# Case -> file name, function that returns the contents, and options of the conversion.
CASES: dict[str, tuple[str, Callable[[], dict[str, Any]], str]] = {
    "trex": ("trex_2_checkpoint_full.pth", partial(full, 3, seed=1, absent=ABSENT), ""),
    "trexstar": ("trexstar_2_checkpoint_full.pth", partial(full, 1, seed=2), ""),
    "momentum": ("trexstar_2_checkpoint_full.pth", partial(full, 1, seed=2), "--momentum-encoder"),
    "learned": ("run_7.pth", partial(full, 3, memory=False, seed=3), ""),
    "narrow": ("narrow.pth", narrow_contents, "--num-classes 7"),
    "backbone": ("trexstar.pth", partial(official_files.backbone_checkpoint, 5), ""),
    "renamed": (
        "download.pth",
        partial(official_files.backbone_checkpoint, 6),
        "--model trex_resnet50.in1k_r2",
    ),
}


def written(name: str, contents: dict[str, Any]) -> dict[str, Any]:
    """Return a file's contents: some keys have wrappers, some tensors have another layout."""
    if name == "renamed":
        return {f"module.{key}": value for key, value in contents.items()}
    if name != "learned":
        return contents
    model = {
        f"_orig_mod.{key}": v.to(memory_format=torch.channels_last) if v.ndim == 4 else v
        for key, v in contents["model"].items()
    }
    return contents | {"model": model}


def conversion_of(name: str) -> Any:
    @pytest.fixture(scope="module", name=name)
    def converted(base: Path) -> Conversion:
        file, build, given = CASES[name]
        contents, options = build(), given.split()
        path, out = base / file, base / f"out of {name}"
        if not path.exists():
            official_files.write(written(name, contents), path)
        status, printed, err = run(path, out, *options)
        assert status == 0, err
        return Conversion(name, contents, path, out, tuple(options), printed)

    return converted


trex, trexstar, momentum, learned, narrow, backbone, renamed = map(conversion_of, CASES)
FULL = {
    "trex": ("trex_resnet50", "in1k_r2"),
    "trexstar": ("trexstar_resnet50", "in1k_r2"),
    "momentum": ("trexstar_resnet50", "in1k_r2_momentum"),
    "learned": ("trex_resnet50", "in1k_r2_learned"),
    "narrow": ("trex_resnet50", "c7_l2_h64_d32"),
}
BACKBONES = {"backbone": ("trexstar_resnet50", "in1k"), "renamed": ("trex_resnet50", "in1k_r2")}


@pytest.fixture(params=[*FULL, *BACKBONES])
def conversion(request: pytest.FixtureRequest) -> Conversion:
    found: Conversion = request.getfixturevalue(request.param)
    return found


# Written files


def test_names_and_config(conversion: Conversion) -> None:
    name = conversion.name
    architecture, tag = (FULL | BACKBONES)[name]
    parts = PARTS if name in FULL else [""]
    names = {f"{architecture}{part}.{tag}" for part in parts}
    names.add(f"{conversion.path.stem}.report.tsv")
    assert {path.name for path in conversion.out.iterdir()} == names
    for folder in conversion.models():
        assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
        assert folder.stat().st_mode & 0o777 == 0o755
        text = (folder / "config.json").read_text()
        assert re.findall(r'"([^"]*/[^"]*)"', text) == ["https://github.com/naver/trex"]
        config = json.loads(text)
        is_backbone = folder.name == f"{architecture}.{tag}"
        stock = "resnet50" if is_backbone else folder.name.partition(".")[0]
        assert config["architecture"] == stock
        classes = ("_cls" in folder.name) * (7 if name == "narrow" else 1000)
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


def test_folders_and_source_reproduce_the_reference(conversion: Conversion) -> None:
    """Compare three independent computations of the outputs from the file's tensors."""
    name = conversion.name
    images = reference_resnet.pictures(3, 96, seed=7)
    options: Any = {"num_classes": 7 if name == "narrow" else 1000}
    average = "--momentum-encoder" in conversion.options
    expected = reference_resnet.outputs(conversion.contents, images, average, **options)
    contents = checkpoints.load_checkpoint(conversion.path)
    found = source.outputs(contents, images, momentum_encoder=average, **options)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert (a - b).abs().max() < TOLERANCE * b.abs().max()
    for folder in conversion.models():
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        wanted = getattr(expected, PARTS[re.sub(r".*50|\..*", "", folder.name)])
        with torch.no_grad():
            outputs = model(images)
        assert outputs.shape == wanted.shape
        assert (outputs - wanted).abs().max() < TOLERANCE * wanted.abs().max(), folder
        if folder.name.endswith(("_cls.in1k_r2", "_cls.c7_l2_h64_d32")):
            absent = {"trex": list(ABSENT), "narrow": [2]}.get(name, [])
            assert (outputs == 0).all(0).nonzero().flatten().tolist() == absent
    allowed = ["trex_models.pretrained.checkpoints import WRAPPERS"]  # no code of the models
    assert re.findall(r"trex_models.*", Path(source.__file__).read_text()) == allowed
    assert "trex_models" not in Path(reference_resnet.__file__).read_text()


def test_backbones_load_in_timm(trex: Conversion, backbone: Conversion, tmp_path: Path) -> None:
    code = """
import sys, timm, torch
for i, folder in enumerate(sys.argv[1:]):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        torch.save(model(torch.load("images.pt")), f"{i}.pt")
assert "trex_models" not in sys.modules
"""
    images = reference_resnet.pictures(2, 64)
    torch.save(images, tmp_path / "images.pt")
    conversions = trex, backbone
    folders = [str(conversion.models()[0]) for conversion in conversions]
    run_python("-c", code, *folders, cwd=tmp_path)
    for i, conversion in enumerate(conversions):
        wanted = reference_resnet.outputs(conversion.contents, images).features
        found = torch.load(tmp_path / f"{i}.pt")
        assert (found - wanted).abs().max() < TOLERANCE * wanted.abs().max()


def test_conversion_is_deterministic_and_replaces_an_earlier_one(
    narrow: Conversion, tmp_path: Path
) -> None:
    out = keep_out(tmp_path)
    status, _, err = run(narrow.path, out, *narrow.options)
    assert status == 0, err

    def digests(folder: Path) -> dict[Path, str]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder): sha256(path) for path in files}

    assert digests(out) == digests(narrow.out)


# The report and the summary


def test_report_covers_every_key_once(conversion: Conversion) -> None:
    name = conversion.name
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
            assert row["new_key"] == "dropped: not weights"
            assert row["sha256_16"] == row["shape"] == "-"
            continue
        tensor = held[row["key"]]
        assert row["shape"] == ("x".join(map(str, tensor.shape)) or "scalar")
        assert f"torch.{row['dtype']}" == str(tensor.dtype)
        assert row["sha256_16"] == checksum(tensor)
        if row["new_key"] in whole:
            assert row["sha256_16"] == checksum(whole[row["new_key"]])
            kept.add(row["new_key"])
        else:
            assert row["new_key"].startswith(("dropped:", "prototypes:")), row
    has_bank = name in FULL and name != "learned"
    assert whole.keys() - kept == ({"fc.weight"} if has_bank else set())


def size(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


def checksum(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def test_fates_of_the_encoders(trexstar: Conversion, momentum: Conversion) -> None:
    def new_keys(conversion: Conversion) -> dict[str, str]:
        return {row["key"]: row["new_key"] for row in conversion.report()[1]}

    online, average = "module.model.encoder.conv1.weight", "module.model_ema.encoder.conv1.weight"
    assert new_keys(trexstar)[online] == new_keys(momentum)[average] == "conv1.weight"
    assert new_keys(trexstar)[average] == "dropped: momentum encoder"
    assert new_keys(momentum)[online] == "dropped: online encoder"


def test_summaries(trex: Conversion, backbone: Conversion, learned: Conversion) -> None:
    for line in (
        r"file +trex_2_checkpoint_full\.pth",
        rf"bytes +{trex.path.stat().st_size}",
        r"contents +.*3 hidden layers of width 2048, 256-dim.*1000 classes .* bank of 2048",
        r"no entry +2 classes: 3, 998",
        r"keys +687",
        r" +318  backbone",
        r" +22  projector",
        r" +2  prototypes: L2-normalized class means",
        r" +340  dropped: momentum encoder",
        r" +\d\.\de-0\d  trex_resnet50_cls\.in1k_r2",
        rf"report +{re.escape(str(trex.out))}/trex_2_checkpoint_full\.report\.tsv",
        r"time +\d+\.\d s",
        r"memory +peak \d+\.\d MB, before reading \d+\.\d MB",
    ):
        assert re.search(f"^{line}$", trex.printed, re.MULTILINE), line
    for folder in trex.models():
        digest = sha256(folder / "model.safetensors")
        assert f"{size(folder) / 1e6:.1f} MB  {digest}  {folder}\n" in trex.printed
    assert re.search(r"^contents +a ResNet-50 backbone only$", backbone.printed, re.MULTILINE)
    assert "absent" not in backbone.printed
    for line in (
        "no entry +0 classes",
        "contents .* classes with learned weights",
        " +1  classifier .*",
    ):
        assert re.search(f"^{line}$", learned.printed, re.MULTILINE), line


# The check before anything is written


@pytest.mark.parametrize("part", ["backbone", "projector", "prototypes"])
def test_wrong_models_are_not_written(
    part: str, narrow: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(*args: Any, **kwargs: Any) -> Checkpoint:
        found = checkpoints.read(*args, **kwargs)
        if part == "backbone":
            backbone = found.backbone | {"bn1.bias": found.backbone["bn1.bias"] + 1e-3}
            return dataclasses.replace(found, backbone=backbone)
        if part == "projector":
            layers = found.projector | {"1.bn.bias": found.projector["1.bn.bias"] + 1e-3}
            return dataclasses.replace(found, projector=layers)
        assert found.classifier_weights is not None
        return dataclasses.replace(found, classifier_weights=found.classifier_weights.roll(1, 0))

    monkeypatch.setattr(official, "read", changed)
    status, _, err = run(narrow.path, tmp_path / "out", *narrow.options)
    wrong = {
        "backbone": ["trex_resnet50", "trex_resnet50_proj", "trex_resnet50_cls"],
        "projector": ["trex_resnet50_proj", "trex_resnet50_cls"],
        "prototypes": ["trex_resnet50_cls"],
    }
    assert status == 2
    assert re.findall(r"(\w+)\.\w+: \d", err) == wrong[part]
    assert "nothing was written" in err
    assert not list(tmp_path.iterdir())


def test_temperature_and_room(
    narrow: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "TEMPERATURE", 0.101)
    status, _, err = run(narrow.path, tmp_path / "out", *narrow.options)
    assert status == 2
    assert re.findall(r"(\w+)\.\w+: \d", err) == ["trex_resnet50_cls"]
    monkeypatch.undo()
    usage = shutil.disk_usage(tmp_path)._replace(free=200 * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(timm_folder, "write_timm_folder", None)
    status, _, err = run(narrow.path, tmp_path / "out", *narrow.options)
    assert status == 2
    needed = r"28\d\.\d MB are required; delete files or choose another --output"
    assert re.fullmatch(rf"error: {tmp_path}/out has 200\.0 MB of free space, but {needed}\n", err)
    assert not list(tmp_path.iterdir())


# All or nothing


FULL_DISK = OSError(errno.ENOSPC, "No space left on device")


def keep_out(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    earlier = out / "trex_resnet50.c7_l2_h64_d32"
    earlier.mkdir(parents=True)
    (earlier / "earlier").touch()
    return out


def left(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*"))


NARROW = [f"trex_resnet50{part}.c7_l2_h64_d32" for part in ("", "_proj", "_cls")]


@pytest.mark.parametrize("existing", [True, False])
def test_full_disk_midway_leaves_nothing(
    existing: bool, narrow: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = keep_out(tmp_path) if existing else tmp_path / "new" / "out"
    before = left(tmp_path)
    write = timm_folder.write_timm_folder

    def fail(model: Any, folder: Path, images: Tensor, expected: Tensor) -> Path:
        if "_cls" in folder.name:
            (folder.parent / "half a file").write_bytes(b"0" * 1000)
            raise FULL_DISK
        return write(model, folder, images, expected)

    monkeypatch.setattr(timm_folder, "write_timm_folder", fail)
    status, _, err = run(narrow.path, out, *narrow.options)
    assert status == 2
    assert (
        f"error: {out}: No space left on device; written: nothing; not written: "
        f"{', '.join(NARROW)}, narrow.report.tsv; free some space or choose another --output\n"
    ) in err
    assert left(tmp_path) == before


def test_errors_list_what_was_already_moved(
    narrow: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    replaced = timm_folder.replaced_folder

    def fail(folder: Path) -> Any:
        if folder.parent == out and "_proj" in folder.name:
            raise FULL_DISK
        return replaced(folder)

    monkeypatch.setattr(timm_folder, "replaced_folder", fail)
    status, _, err = run(narrow.path, out, *narrow.options)
    assert status == 2
    first, *others = NARROW
    assert f"written: {first}; not written: {', '.join(others)}, narrow.report.tsv;" in err
    assert left(out) == [first, f"{first}/config.json", f"{first}/model.safetensors"]


# Bad input


def refused(path: Path, out: Path, *options: str) -> str:
    existed = out.exists()
    status, _, err = run(path, out, *options)
    assert status == 2
    assert out.exists() == existed
    assert re.fullmatch(r"error: .+\n", err), err
    assert path.name in err
    return err


TREX = ("--model", "trex_resnet50.in1k")


def test_no_file_or_a_trainers_checkpoint(tmp_path: Path, backbone: Conversion) -> None:
    missing = refused(tmp_path / "none.pth", tmp_path / "out")
    assert re.search(r"none\.pth does not exist; check the path, or download one of trex", missing)
    assert "is a folder; pass the .pth file" in refused(tmp_path, tmp_path / "out")
    names = {f"encoder.backbone.{name}": value for name, value in backbone.contents.items()}
    projector = {"encoder.projector.1.weight": torch.ones(4, 2048)}
    torch.save(names | projector, tmp_path / "step_9.pt")
    assert "python -m trex_models.train export" in refused(tmp_path / "step_9.pt", tmp_path / "out")
    torch.save(backbone.contents | {"fc.weight": torch.ones(9, 2048)}, tmp_path / "whole.pth")
    assert "is a converted model" in refused(tmp_path / "whole.pth", tmp_path / "out", *TREX)


def test_contradicting_name(trexstar: Conversion, backbone: Conversion, tmp_path: Path) -> None:
    for source_path, name, message in (
        (trexstar.path, "trex_2_checkpoint_full.pth", "a projector with 3 hidden layers, got a "),
        (trexstar.path, "trexstar_2.pth", "must contain only a backbone, got a projector"),
        (backbone.path, "trexstar_2_checkpoint_full.pth", "got only a backbone"),
    ):
        (tmp_path / name).symlink_to(source_path)
        assert message in refused(tmp_path / name, tmp_path / "out")
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("renamed", (), r"not one of trex\.pth, trexstar\.pth, .*; specify .* with --model trex_"),
        ("renamed", ("--model", "resnet50.a1"), "--model resnet50.a1 is not a backbone with"),
        ("renamed", ("--model", "trex_resnet50"), "choose one of trex_resnet50.in1k, trexst"),
        ("renamed", (*TREX, "--tag", "../up"), "the tag '../up' becomes part of folder names"),
        ("renamed", ("--model", "trex_resnet50.a/b"), "the tag 'a/b' becomes part of folder name"),
        ("renamed", (*TREX, "--tag", "in1k_r2"), "--tag in1k_r2 is reserved for published we"),
        ("renamed", (*TREX, "--num-classes", "9"), "--num-classes 9 requires a memory b"),
        ("renamed", (*TREX, "--momentum-encoder"), "no momentum encoder in"),
        ("backbone", TREX, "--model trex_resnet50.in1k contradicts the file name"),
        ("trexstar", TREX, "--model trex_resnet50.in1k is only for backbone files.*remove "),
        ("trexstar", ("--num-classes", "9"), r"labels must be in \[0, 9\), got 0 to 999"),
        ("trexstar", ("--momentum-encoder", "--tag", "in1k_r2"), "is in1k_r2_momentum; choose an"),
        ("narrow", (), r"entries of only 6 of 1000 classes; set --num-classes, or num_cl"),
        ("narrow", ("--num-classes", "7", "--tag", "in1k"), "--tag in1k is reserved for publ"),
        (
            "learned",
            ("--num-classes", "9"),
            "--num-classes 9 does not match the learned classifier",
        ),
        ("learned", ("--momentum-encoder",), "no momentum encoder in"),
    ],
)
def test_incompatible_options_are_rejected(
    file: str,
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    path = request.getfixturevalue(file).path
    assert re.search(message, refused(path, tmp_path / "out", *options))


def test_bad_output(backbone: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        error = f"error: {tmp_path}/file is a file; choose another --output\n"
        assert run(backbone.path, out)[::2] == (2, error)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "trexstar_resnet50.in1k").touch()
    status, _, err = run(backbone.path, tmp_path / "out")
    assert status == 2
    assert "trexstar_resnet50.in1k exists and is a file; written: not" in err
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    error = f"error: {tmp_path}/out is not writable by this user; choose another --output\n"
    assert run(backbone.path, tmp_path / "out" / "new")[::2] == (2, error)
    assert left(tmp_path) == ["file", "out", "out/trexstar_resnet50.in1k"]


def test_command_line_and_tag(backbone: Conversion, tmp_path: Path, renamed: Conversion) -> None:
    status, _, err = run(backbone.path, tmp_path / "out", "--num-classes", "0")
    assert (status, err) == (2, "error: --num-classes must be at least 1, got 0\n")
    done = Forked("-m", "convert", "naver", "none.pth", "--output", str(tmp_path), cwd=ROOT)
    assert done.end() == 2
    assert done.err.startswith("error: none.pth does not exist")
    assert done.out == ""
    status, _, err = run(renamed.path, tmp_path, *TREX, "--tag", "mine")
    assert status == 0, err
    config = json.loads((tmp_path / "trex_resnet50.mine" / "config.json").read_text())
    assert config["pretrained_cfg"]["tag"] == "mine"


# Size


@pytest.mark.client
def test_memory_of_a_file_of_full_size(tmp_path: Path) -> None:
    """Beyond the imports, memory is limited to the file's pages, all read, and one copy."""
    path = tmp_path / "trex_2_checkpoint_full.pth"
    official_files.write(official_files.full_checkpoint(3), path)
    code = f"""
import convert.official, pathlib, re
def peak():  # ru_maxrss counts the parent's, too
    return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
before = peak()
paths = {[str(path), str(tmp_path / "out")]!r}
convert.official.convert_official(*map(pathlib.Path, paths))
print((peak() - before) * 1024)
"""
    done = run_python("-c", code, cwd=ROOT)
    assert int(done.stdout.split()[-1]) < 1.7 * path.stat().st_size
