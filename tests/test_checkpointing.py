"""Damaged or foreign checkpoints, folders of other runs, and saved steps for debugging."""

from __future__ import annotations

import copy
import os
import random
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tests.images import save_classes, save_image
from tests.processes import captured, run_python
from tests.runs import assert_same_state, last_state, logged, output_of, refused, run
from trex_models.pretrained.checkpoints import DamagedError
from trex_models.train import checkpointing, export, loop
from trex_models.train.__main__ import main
from trex_models.train.step import training_step

# Saves in the middle of an epoch of four steps.
MIDWAY = ["--system.save-steps", "3"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert run(folder, *MIDWAY) == 0
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def cut(data: bytes, offset: int) -> bytes:
    return data[:offset]


def flip(data: bytes, offset: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 1 << offset % 8]) + data[offset + 1 :]


@pytest.mark.parametrize("damage", [cut, flip])
def test_damage_at_any_offset_is_noticed_or_harmless(
    finished: Path, tmp_path: Path, damage: Callable[[bytes, int], bytes]
) -> None:
    """Harmless: in the padding between tensors, and in fields of the zip file that are unused."""
    data = checkpointing.list_checkpoints(finished)[-1].read_bytes()
    whole = copy.deepcopy(last_state(finished))
    draw = random.Random(0)
    ends = [*range(0, 200, 3), *range(len(data) - 400, len(data), 3)]  # records of the zip format
    noticed = 0
    for offset in ends + [draw.randrange(len(data)) for _ in range(150)]:
        path = tmp_path / "step_8.pt"
        path.write_bytes(damage(data, offset))
        try:
            state = checkpointing.load(path)
        except DamagedError:
            noticed += 1
        else:
            assert damage is not cut
            assert_same_state(state, whole)
    assert noticed > 200


@pytest.mark.parametrize("content", [b"", b"no checkpoint", bytes(5000)])
def test_damaged_checkpoints_are_renamed_and_the_previous_one_is_used(
    copied: Path, finished: Path, content: bytes
) -> None:
    assert names(copied) == ["step_6.pt", "step_8.pt"]
    (copied / "checkpoints/step_8.pt").write_bytes(content)
    out = output_of(copied, *MIDWAY)
    assert "step_8.pt cannot be read as a checkpoint: it is damaged; it was renamed to" in out
    assert f"continues from {copied}/checkpoints/step_6.pt" in out
    assert names(copied) == ["step_6.pt", "step_8.pt", "step_8.pt.damaged"]
    ours, theirs = last_state(copied), last_state(finished)
    assert_same_state(ours | {"config": None}, theirs | {"config": None})
    assert ours["config"] == theirs["config"] | {"output": str(copied)}
    assert logged(copied) == logged(finished)


def test_a_run_whose_checkpoints_are_all_torn_does_not_begin_anew(copied: Path) -> None:
    for path in checkpointing.list_checkpoints(copied):
        path.write_bytes(path.read_bytes()[:-100])
    lines = logged(copied)
    for _ in range(2):
        assert "all checkpoints of" in refused(copied, *MIDWAY)
    assert logged(copied) == lines
    assert names(copied) == ["step_6.pt.damaged", "step_8.pt.damaged"]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError()])
def test_a_passing_trouble_does_not_condemn_a_checkpoint(
    copied: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(zipfile.ZipFile, "testzip", Mock(side_effect=error))
    if isinstance(error, OSError):
        assert "step_8.pt cannot be read (Input/output error)" in refused(copied, *MIDWAY)
    else:
        with pytest.raises(MemoryError):
            run(copied, *MIDWAY)
    assert names(copied) == ["step_6.pt", "step_8.pt"]


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (20_000, r"error: .*/step_6\.pt cannot be written \(File too large\); fix this, .*\n"),
        (100, r"error: .*File too large: '.*/metrics\.jsonl'\n"),
    ],
    ids=["checkpoint", "metrics"],
)
def test_a_full_disk_costs_the_steps_since_the_last_checkpoint(
    finished: Path, tmp_path: Path, limit: int, message: str
) -> None:
    """A limit on the file size interrupts a write, like a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    steps: list[int] = []

    def step(*arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        return training_step(*arguments)

    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "training_step", step)
        try:
            status, _, err = captured(lambda options: run(folder, *options), *MIDWAY)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2
    assert re.fullmatch(message, err), err
    assert names(folder) == ["step_3.pt"]
    assert run(folder, *MIDWAY) == 0
    ours, theirs = last_state(folder), last_state(finished)
    assert_same_state(ours | {"config": None}, theirs | {"config": None})
    assert logged(folder) == logged(finished)


def test_an_export_reads_without_changing_anything(copied: Path, tmp_path: Path) -> None:
    (copied / "checkpoints/step_8.pt").write_bytes(b"torn")
    command = ("export", copied, "--output", tmp_path / "out")
    status, out, _ = captured(main, *command)
    assert status == 0
    assert "step_8.pt cannot be read as a checkpoint" in out
    assert names(copied) == ["step_6.pt", "step_8.pt"]
    (tmp_path / "out/cls/thesis.txt").write_text("precious")
    status, _, err = captured(main, *command)
    assert status == 2
    assert "cls contains other files (thesis.txt)" in err
    assert (tmp_path / "out/cls/thesis.txt").read_text() == "precious"


def test_a_continued_run_does_not_hold_its_checkpoint(copied: Path) -> None:
    """An open checkpoint would occupy memory, or disk space after it is deleted."""
    checkpointing.list_checkpoints(copied)[-1].unlink()
    held: list[bool] = []

    def step(*arguments: Any) -> Any:
        held.append("step_6.pt" in Path("/proc/self/maps").read_text())
        return training_step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "training_step", step)
        assert run(copied, *MIDWAY) == 0
    assert held == [False] * 2


def test_foreign_checkpoint_is_refused(copied: Path, tmp_path: Path) -> None:
    foreign = copied / "checkpoints/step_12.pt"

    def is_refused(message: str) -> None:
        assert f"step_12.pt {message}" in refused(copied, *MIDWAY)

    shutil.copy(copied / "checkpoints/step_8.pt", foreign)
    is_refused("belongs to another run (its step is 8); move it to")
    assert run(tmp_path / "other", *MIDWAY, "--seed", "5") == 0
    shutil.move(tmp_path / "other/checkpoints/step_8.pt", foreign)
    is_refused("belongs to another run (seed: 5 -> 0; its step is 8)")
    torch.save({"weights": torch.zeros(3)}, foreign)
    is_refused("is not a checkpoint of this trainer")
    assert names(copied) == ["step_12.pt", "step_6.pt", "step_8.pt"]


def test_a_folder_with_other_settings_is_refused_by_their_names(finished: Path) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    overrides = """--seed 1 --precision bf16 --crops.local-size 24 --optim.epochs 3
        --optim.base-lr 0.3 --optim.batch-size 4 --objective.temperature 0.2
        --objective.bank-size 16 --crops.local-crops 1 --model.embedding-dim 16
        --data.images-per-class 9 --system.no-sync-batchnorm""".split()
    named = (
        "crops.local_crops: 2 -> 1; crops.local_size: 16 -> 24; data.images_per_class: 8 -> 9; "
        "model.embedding_dim: 8 -> 16; objective.bank_size: 32 -> 16; "
        "objective.temperature: 0.1 -> 0.2; optim.base_lr: 0.8 -> 0.3; optim.batch_size: 8 -> 4; "
        "optim.epochs: 2 -> 3; precision: fp32 -> bf16; seed: 0 -> 1; "
        "system.sync_batchnorm: True -> False"
    )
    err = refused(finished, *MIDWAY, *overrides)
    assert f"{finished} already contains a run with other settings ({named})" in err
    assert before == {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}


def test_settings_that_do_not_affect_the_result_may_change(copied: Path, finished: Path) -> None:
    checkpointing.list_checkpoints(copied)[-1].unlink()
    free = "--system.workers 1 --system.save-minutes 0 --system.no-channels-last --license mit"
    out = output_of(copied, *free.split())
    assert "continues from" in out
    assert "was saved in another environment (channels_last: True -> False)" in out
    assert names(copied) == ["step_6.pt", "step_8.pt"]
    assert logged(copied)[-1].keys() == logged(finished)[-1].keys()


def test_processes_that_normalize_other_parts_of_a_batch_are_refused(copied: Path) -> None:
    path = checkpointing.list_checkpoints(copied)[-1]
    state = copy.deepcopy(checkpointing.load(path))
    four = {"environment": state["environment"] | {"processes": 4}}
    checkpointing.write(path, state | four | {"batchnorm_groups": 4})
    assert "was saved by a run with 4 BatchNorm groups per batch" in refused(copied, *MIDWAY)
    checkpointing.write(path, state | four)  # synchronized
    assert "was saved in another environment (processes: 4 -> 1)" in output_of(copied, *MIDWAY)


def test_temporary_files_of_a_killed_process_do_not_stay(copied: Path) -> None:
    checkpointing.list_checkpoints(copied)[-1].unlink()
    (copied / "checkpoints/.step_7.pt.tmp").write_bytes(b"half")
    (copied / "export/.backbone.x1.tmp").mkdir()
    (copied / "export/.git").mkdir()
    shutil.copy(copied / "checkpoints/step_6.pt", copied / "checkpoints/step_4.pt")
    shutil.copy(copied / "checkpoints/step_6.pt", copied / "checkpoints/step_5.pt")
    assert run(copied, *MIDWAY) == 0
    assert names(copied) == ["step_6.pt", "step_8.pt"]
    assert sorted(p.name for p in (copied / "export").iterdir()) == [".git", "backbone", "cls"]
    folder = copied.with_name("killed")  # before it wrote config.json
    (folder / "checkpoints").mkdir(parents=True)
    (folder / ".lock").touch()
    (folder / ".config.json.tmp").write_text("{")
    assert run(folder) == 0
    assert not (folder / ".config.json.tmp").exists()


def test_a_step_that_diverged_can_be_repeated(tmp_path: Path) -> None:
    overrides = ["--optim.base-lr", "1e30", "--model.backbone-args", "channels=(8,8,16,16)"]
    err = refused(tmp_path / "run", *overrides, "drop_path_rate=0.1")
    (path,) = (tmp_path / "run").glob("nonfinite_step_*.pt")
    assert "no longer finite" in err
    assert "lower --optim.base-lr" in err
    assert not checkpointing.list_checkpoints(tmp_path / "run")
    assert f"trex_models.train.export.load_step('{path}')" in err
    method, (crops, labels, indices), precision = export.load_step(path)
    before = copy.deepcopy(method.state_dict())
    assert all(parameter.isfinite().all() for parameter in method.parameters())
    with precision.autocast():
        loss, _ = method(crops, labels, indices)
    assert not loss.isfinite()
    assert len(labels) == 8
    assert [tuple(c.shape) for c in crops] == [(8, 3, 32, 32), (16, 3, 16, 16)]
    bank: Any = method.objective.bank
    step = checkpointing.load(path)["step"]
    assert f"the loss of step {step} " in err
    assert bank.pointer == 8 * step % 32  # of the previous steps, without this one
    assert torch.equal(before["objective.bank.features"], bank.embeddings)
    state = checkpointing.load(path)
    del state["crops"]
    state["method"] = {
        k: v.nan_to_num() if torch.is_tensor(v) else v for k, v in state["method"].items()
    }
    checkpointing.write(tmp_path / "step_1.pt", state)
    with pytest.raises(ValueError, match="is a checkpoint, not a failed step"):
        export.load_step(tmp_path / "step_1.pt")


def test_moved_images_are_the_same_and_renamed_ones_are_not(tmp_path: Path) -> None:
    save_classes(tmp_path / "images", 8)
    folder = ["--system.save-steps", "2", "--objective.bank-size", "16"]
    folder += ["--data.source", "folder", "--data.path"]
    assert run(tmp_path / "run", *folder, str(tmp_path / "images")) == 0
    moved = (tmp_path / "images").rename(tmp_path / "moved")
    assert "the run is finished" in output_of(tmp_path / "run", *folder, str(moved))
    checkpointing.list_checkpoints(tmp_path / "run")[-1].unlink()
    save_image(moved / "a/3.jpg", seed=9)
    out = output_of(tmp_path / "run", *folder, str(moved))
    assert out.count("warning: 1 of 16 training images have new ") == 1
    assert f"such as {moved}/a/3.jpg" in out
    (moved / "a/3.jpg").rename(moved / "a/9.jpg")
    assert "was saved with different images" in refused(tmp_path / "run", *folder, str(moved))


def test_incompatible_torchvision_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    command = "-m trex_models.train smoke --output unused".split()
    result = run_python(*command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, fails=True)
    assert result.returncode == 1
    assert "are not compatible (operator torchvision::nms does not exist)" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
