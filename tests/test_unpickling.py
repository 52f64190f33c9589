"""Damaged and malicious files are refused, and reading one has no side effects."""

from __future__ import annotations

import argparse
import os
import random
import tracemalloc
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import fuzz_checkpoints, official_files
from tests.fuzz_checkpoints import GADGETS, Bench
from trex_models.pretrained import checkpoints
from trex_models.pretrained.checkpoints import CheckpointError, DamagedError
from trex_models.pretrained.unpickling import PlainUnpickler
from trex_models.train import export
from trex_models.train.config import ModelConfig


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def own_globals() -> Iterator[list[Any]]:
    torch.serialization.add_safe_globals([random.Random])
    yield torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()


def test_the_allow_list_of_the_process_is_not_touched(
    bench: Bench, own_globals: list[Any], tmp_path: Path
) -> None:
    arguments = argparse.Namespace(lr_schedule=np.linspace(0, 1, 9), scale=(0.25, 1.0))
    contents = {**bench.contents["official"], "args": arguments}
    paths = [tmp_path / f"{number}.pth" for number in range(4)]
    for number, path in enumerate(paths):
        names: Any = "new" if number % 2 else "old"
        official_files.write(contents, path, numpy_names=names, legacy=number > 1)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(checkpoints.load_checkpoint, paths * 2):
            assert found["model"].keys() == contents["model"].keys()
            assert found["args"] is None
    assert torch.serialization.get_safe_globals() == own_globals
    with pytest.raises(Exception, match="weights_only"):
        torch.load(paths[0], weights_only=True)


@pytest.mark.parametrize("name", GADGETS)
def test_programs_are_not_run(bench: Bench, name: str, tmp_path: Path) -> None:
    """A program in an entry of a checkpoint is refused before it allocates memory."""
    contents = fuzz_checkpoints.records(bench.data["trainer"])
    program = fuzz_checkpoints.text("meter") + GADGETS[name] + b"s."
    contents["saved/data.pkl"] = contents["saved/data.pkl"][:-1] + program
    path = tmp_path / "step_4.pt"
    path.write_bytes(fuzz_checkpoints.zipped(iter(contents.items())))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"step_4\.pt"):
            checkpoints.sort_keys(named(path))
        assert tracemalloc.get_traced_memory()[1] < 64e6
    finally:
        tracemalloc.stop()


def named(path: Path) -> Any:
    """Read a file and check the types of its entries; errors name the file."""
    contents = checkpoints.load_checkpoint(path)
    try:
        checkpoints.sort_keys(contents)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return contents


@pytest.mark.parametrize("form", ["trainer", "official", "flat"])
@pytest.mark.parametrize("change", ["shorter", "longer", "missing", "deflated", "twice"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_records_of_other_lengths(bench: Bench, form: str, change: str, tmp_path: Path) -> None:
    contents = fuzz_checkpoints.records(bench.data[form])
    name = "saved/data/0"
    if change == "missing":
        del contents[name]
    elif change in ("shorter", "longer"):
        contents[name] = contents[name][:-4] if change == "shorter" else contents[name] + b"more"
    items = [*contents.items(), *([(name, b"again")] if change == "twice" else [])]
    kind = zipfile.ZIP_DEFLATED if change == "deflated" else zipfile.ZIP_STORED
    (tmp_path / "bad.pth").write_bytes(fuzz_checkpoints.zipped(iter(items), kind))
    message = "compressed.*zip -0" if change == "deflated" else "damaged or truncated"
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoints.load_checkpoint(tmp_path / "bad.pth")
    assert isinstance(caught.value, DamagedError) is (change != "deflated")


def test_old_files_shared_memory_pipes_and_large_keys(bench: Bench, tmp_path: Path) -> None:
    data = bench.data["legacy"]
    for bad in (data[:-4], data + b"more"):
        (tmp_path / "bad.pth").write_bytes(bad)
        with pytest.raises(DamagedError, match="damaged or truncated"):
            checkpoints.load_checkpoint(tmp_path / "bad.pth")
    (tmp_path / "good.pth").write_bytes(data)
    found = checkpoints.load_checkpoint(tmp_path / "good.pth")
    assert found.keys() == bench.contents["trainer"].keys()
    tensor = torch.zeros(2000, 500)
    torch.save({"a": tensor, "b": tensor}, tmp_path / "tied.pth")
    found = checkpoints.load_checkpoint(tmp_path / "tied.pth")
    assert torch.equal(found["a"], tensor)
    torch.save({str(n): tensor.t() for n in range(20)}, tmp_path / "many.pth")
    with pytest.raises(CheckpointError, match="share memory; copies would be larger than"):
        checkpoints.load_checkpoint(tmp_path / "many.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(CheckpointError, match="not a regular file"):
        checkpoints.load_checkpoint(tmp_path / "pipe.pth")
    pairs = b"](](X\x01\0\0\0aK\x01e](X\x01\0\0\0bK\x02ee"
    (tmp_path / "list.pkl").write_bytes(b"\x80\x02ccollections\nOrderedDict\n" + pairs + b"\x85R.")
    with (tmp_path / "list.pkl").open("rb") as file:
        assert PlainUnpickler(file).load() == {"a": 1, "b": 2}
    torch.save({"state": {140_000_000_000_000: torch.ones(1)}, "a": torch.ones(2)}, tmp_path / "x")
    assert 140_000_000_000_000 in checkpoints.load_checkpoint(tmp_path / "x")["state"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("config", None), ("config", [1]), ("classes", "abcd"), ("classes", [1, 2, 3, 4])],
        *[("environment", []), ("environment", {"torch": [1]}), ("step", "4"), ("images", 9)],
        *[("unreadable", ["a"]), ("inherited_license", 3), ("optimizer", 1), ("meter", [0.0])],
    ],
)
def test_entries_have_their_types(bench: Bench, name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"entry '{name}' is not of type"):
        checkpoints.sort_keys({**bench.contents["trainer"], name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_layers": 100_000}, "describes a larger network than its tensors"),
        ({"backbone_args": ["layers=(100000,1,1,1)"]}, "describes a larger network than its ten"),
        ({"backbone_args": ["layers=(999999999,1,1,1)"]}, "describes a larger network"),
        ({"hidden_dim": 1_000_000_000}, r"do not match its configuration: .*expected \(10000000"),
        ({"backbone_args": ["pretrained=True"]}, "must not load weights.*--init-from"),
        ({"backbone_args": ["pretrained_cfg={'url': 'http://x'}"]}, "must not load weights"),
        ({"backbone_args": ["checkpoint_path=/etc/passwd"]}, "must not load weights"),
        ({"backbone_args": ["cache_dir=/tmp/x"]}, "must not load weights"),
        ({"backbone_args": ["device=cpu", "channels=(4,4,8,9000)"]}, "or choose a device"),
        ({"backbone_args": ["layers=(0x3B9AC9FF,1,1,1)"]}, "describes a larger network"),
        ({"backbone_args": ["act_layer=os.system"]}, r"step_4\.pt: "),
        ({"hidden_dim": 10**30}, r"step_4\.pt: "),
        ({"backbone": "hf-hub:someone/resnet10t"}, "names pretrained weights, but training starts"),
        ({"backbone": "local-dir:/tmp"}, "names pretrained weights, but training starts"),
        ({"hidden_layers": "3"}, "model.hidden_layers has the wrong type str"),
        ({"hidden_layers": [[1]]}, "model.hidden_layers has the wrong type list"),
        ({"surprise": 1}, "not a configuration of this version: unknown field model.surprise"),
    ],
)
def test_a_configuration_asks_for_no_more_than_the_file_holds(
    bench: Bench, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    contents = dict(bench.contents["trainer"])
    contents["config"] = {**contents["config"], "model": contents["config"]["model"] | settings}
    torch.save(contents, tmp_path / "step_4.pt")
    with pytest.raises(ValueError, match=message):
        export.export_checkpoint(tmp_path / "step_4.pt", tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_steps_that_went_wrong_and_pretrained_models(bench: Bench, tmp_path: Path) -> None:
    contents = {**bench.contents["trainer"], "crops": []}
    torch.save(contents, tmp_path / "step_4.pt")
    with pytest.raises(ValueError, match=r"step_4\.pt is a failed step, not a checkpoint"):
        export.export_checkpoint(tmp_path / "step_4.pt", tmp_path / "export")
    with pytest.raises(ValueError, match="must not load weights or choose a device, got 'pretrai"):
        ModelConfig(backbone_args=("pretrained=True",))


@pytest.mark.client
def test_many_damaged_and_hostile_files() -> None:
    """Run larger tests manually with python -m tests.fuzz_checkpoints."""
    found = list(fuzz_checkpoints.outcomes(seed=7, files=150))
    assert len(found) == 150
    assert [outcome for outcome in found if outcome[-1] not in fuzz_checkpoints.GOOD] == []
