"""What is refused or warned of before the first step."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.images import save_image
from tests.runs import run
from trex_models.data.image_files import FolderSource
from trex_models.data.sources import ArraySource
from trex_models.train import build, checkpointing, checks
from trex_models.train.config import from_dict
from trex_models.train.recipes import RECIPES
from trex_models.train.unreadable import ImageFiles

Usage = namedtuple("Usage", "total used free")


def set_free_space(monkeypatch: pytest.MonkeyPatch, free: int) -> list[Path]:
    """Let every disk have so much space; return the paths that are asked for."""
    asked: list[Path] = []

    def usage(path: Path) -> Usage:
        asked.append(path)
        assert path.exists()
        return Usage(10**15, 10**15 - free, free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    return asked


def labels_of(counts: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)


def exact_share(size: int, counts: list[int]) -> float:
    """Mean over classes of C(N - n, Q) / C(N, Q), in integers."""
    total = sum(counts)
    absent = [math.comb(total - n, size) / math.comb(total, size) for n in counts]
    return sum(absent) / len(absent)


@pytest.mark.parametrize(
    ("counts", "size"),
    [
        ([20] * 50, 100),
        ([1, 2, 3, 5, 8, 13, 21, 200, 400], 30),
        ([1] * 40, 40),
        ([1] * 40, 39),
        ([5, 95], 96),  # no 96 images are of the other class alone
        ([5, 95], 95),
        ([3, 3], 1),
    ],
)
def test_share_of_classes_without_a_prototype(counts: list[int], size: int) -> None:
    share = checks._share_without_prototype(size, np.array(counts))
    assert share == pytest.approx(exact_share(size, counts), rel=1e-9, abs=1e-15)


def test_share_is_what_a_simulation_shows() -> None:
    counts = [2, 2, 4, 10, 30, 52]
    labels, rng = labels_of(counts), np.random.default_rng(0)
    draws = 4000
    absent = sum(
        len(counts) - len(np.unique(rng.choice(labels, 20, replace=False))) for _ in range(draws)
    )
    share = checks._share_without_prototype(20, np.array(counts))
    assert absent / draws / len(counts) == pytest.approx(share, abs=0.015)


def test_papers_bank_suits_imagenet() -> None:
    """8192 of 1,281,167 images show each of 1000 classes but in 0.03 % of the cases."""
    counts = [1300] * 895 + [732] * 105
    assert checks.bank(8192, labels_of(counts), 1000) is None
    assert checks.bank(8192, labels_of([1300] * 1000), 1000) is None


def test_papers_bank_is_small_for_8192_classes() -> None:
    counts = [120] * 8192
    warning = checks.bank(8192, labels_of(counts), 8192)
    assert warning is not None
    assert "\n" not in warning
    found = re.fullmatch(
        r"a bank of 8192 leaves about 36\.\d% of the classes without a prototype; "
        r"--objective.bank-size (\d+) leaves (\d\.\d)%",
        warning,
    )
    assert found
    wanted = int(found[1])
    # The logarithm of the chance that a class is absent is about -Q / C.
    assert math.exp(-wanted / 8192) <= 0.001 < math.exp(-wanted / 2 / 8192)
    assert float(found[2]) <= 0.1
    assert checks.bank(wanted, labels_of(counts), 8192) is None


def test_bank_warns_above_one_percent() -> None:
    counts = [100] * 100
    shares = {size: checks._share_without_prototype(size, np.array(counts)) for size in (440, 450)}
    assert shares[440] > 0.01 > shares[450] > 0.009
    assert checks.bank(440, labels_of(counts), 100)
    assert checks.bank(450, labels_of(counts), 100) is None


def test_recommended_bank_is_the_least_power_of_two_for_one_in_a_thousand() -> None:
    counts = [100] * 160
    assert 0.001 < exact_share(1024, counts) < 0.002
    warning = checks.bank(300, labels_of(counts), 160)
    assert (warning or "").endswith("--objective.bank-size 2048 leaves 0.0%")


def test_recommended_bank_does_not_exceed_the_data() -> None:
    """1 image of a class in 1000: no power of two below 1000 suffices."""
    counts = [1] * 500 + [500]
    warning = checks.bank(600, labels_of(counts), 501)
    assert warning is not None
    assert warning.endswith("--objective.bank-size 1000 leaves 0.0%")


def test_bank_larger_than_the_data_is_refused() -> None:
    labels = labels_of([50, 50])
    with pytest.raises(ValueError, match="bank_size 101 exceeds .* 100 images.* use at most 100$"):
        checks.bank(101, labels, 2)
    assert checks.bank(100, labels, 2) is None


def test_bank_smaller_than_the_classes_is_refused() -> None:
    labels = labels_of([10] * 64)
    with pytest.raises(ValueError, match="bank_size 63 is below the 64 classes") as caught:
        checks.bank(63, labels, 64)
    message = str(caught.value)
    assert "\n" not in message
    found = re.search(r"leaves (\S+)% of the classes without .*-size (\d+) leaves (\S+)%", message)
    assert found
    share, wanted, left = float(found[1]), int(found[2]), float(found[3])
    assert share == pytest.approx(100 * exact_share(63, [10] * 64), abs=0.051)
    assert left == pytest.approx(100 * exact_share(wanted, [10] * 64), abs=0.051)
    assert left <= 0.1
    assert "leaves" in (checks.bank(64, labels, 64) or "")  # a warning, no longer refused


def tiny_method() -> tuple[torch.nn.Module, int]:
    """Return a module and its parameters' and buffers' bytes as counted by hand."""
    module = torch.nn.Sequential(torch.nn.Linear(10, 100, bias=False), torch.nn.BatchNorm1d(100))
    module[0].weight.requires_grad_(False)
    frozen, trained, buffers = 4 * 1000, 4 * 200, 4 * 200 + 8
    return module, frozen + 2 * trained + buffers


def test_disk_space_is_that_of_the_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, size = tiny_method()
    assert checks.checkpoint_bytes(module) == size
    asked = set_free_space(monkeypatch, 3 * size)
    checks.disk_space(tmp_path / "run" / "of" / "mine", module, 3)
    checks.disk_space(tmp_path, module, 3)
    assert asked == [tmp_path, tmp_path]
    set_free_space(monkeypatch, 3 * size - 1)
    with pytest.raises(
        ValueError, match="of free space, .* are needed; .* another --output"
    ) as caught:
        checks.disk_space(tmp_path / "run", module, 3)
    assert str(caught.value).startswith(f"{tmp_path / 'run'} has 0.0 MB")
    checks.disk_space(tmp_path / "run", module, 2)


def test_disk_space_of_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = set_free_space(monkeypatch, 0)
    with pytest.raises(ValueError, match="^runs/mine has "):
        checks.disk_space(Path("runs/mine"), tiny_method()[0], 1)
    assert asked == [tmp_path]


@pytest.mark.parametrize("objective", ["ocm", "cosine"])
def test_size_of_a_checkpoint(tmp_path: Path, objective: str) -> None:
    """The estimate is that of a file that a run leaves, but for its index of names."""
    assert (
        run(tmp_path / "run", "--objective.name", objective, "--model.hidden-dim", "1024",
            "--optim.epochs", "1")
        == 0
    )  # fmt: skip
    path = checkpointing.files(tmp_path / "run")[-1]
    method = build.build_method(from_dict(checkpointing.load(path)["config"]), 4)
    assert checks.checkpoint_bytes(method) == pytest.approx(path.stat().st_size, rel=0.1)


def test_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "_SHARED_MEMORY", tmp_path)
    needed = 10**6 * 4 * 3 * 3  # that each worker keeps
    asked = set_free_space(monkeypatch, needed)
    checks.shared_memory(10**6, workers=4, processes=3)
    assert asked == [tmp_path]
    set_free_space(monkeypatch, needed - 1)
    with pytest.raises(ValueError, match="from 12 workers take 36 MB; .* --system.workers"):
        checks.shared_memory(10**6, workers=4, processes=3)
    checks.shared_memory(10**6, workers=0, processes=3)  # needs none
    monkeypatch.setattr(checks, "_SHARED_MEMORY", tmp_path / "absent")  # macOS
    checks.shared_memory(10**6, workers=4, processes=3)


class Recording(ArraySource):
    """Notes what is read."""

    def __init__(self, count: int) -> None:
        super().__init__(np.zeros((count, 2, 3, 3), np.uint8), [0] * count, ["a"])
        self.seen: list[int] = []

    def read(self, index: int) -> np.ndarray:
        self.seen.append(index)
        return super().read(index)


@pytest.mark.parametrize("count", [1, 2, 16, 17, 1000])
def test_samples_are_read_from_all_over(count: int) -> None:
    source = Recording(count)
    checks.samples("training", source)
    assert len(source.seen) == len(set(source.seen)) == min(count, 16)
    assert source.seen[0] == 0
    assert source.seen[-1] == count - 1
    assert np.diff(source.seen).max(initial=0) <= math.ceil(count / 15)


@pytest.mark.parametrize(
    "image",
    [np.zeros((2, 3, 3), np.float32), np.zeros((2, 3), np.uint8), np.zeros((2, 3, 4), np.uint8)],
    ids=["float", "grey", "with alpha"],
)
def test_sample_that_is_no_rgb_bytes(image: np.ndarray) -> None:
    source = Recording(5)
    source.images = [*source.images[:4], image]
    message = f"^a image 4 is {re.escape(f'{image.dtype} {image.shape}')}, not uint8"
    with pytest.raises(ValueError, match=message):
        checks.samples("training", source)


def test_sample_that_cannot_be_read(tmp_path: Path) -> None:
    for label in "ab":
        save_image(tmp_path / label / "0.png")
    (tmp_path / "b" / "1.png").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"b/1.png cannot be read as an image"):
        checks.samples("training", FolderSource(tmp_path))


@pytest.mark.parametrize(
    ("precision", "device", "sizes", "refused"),
    [
        ("bf16", "cpu", [32, 16], True),
        ("bf16", "cpu", [16, 32], True),
        ("bf16", "cpu", [32, 17], False),
        ("fp32", "cpu", [32, 16], False),
        ("bf16", "cuda", [32, 16], False),
    ],
)
def test_bfloat16_on_a_cpu(precision: str, device: str, sizes: list[int], refused: bool) -> None:
    def check() -> None:
        checks.cpu_bfloat16(precision, torch.device(device), min(sizes))

    if refused:
        with pytest.raises(ValueError, match="16 pixels or fewer; use --precision fp32"):
            check()
    else:
        check()


def test_every_check_is_made() -> None:
    made: list[int] = []

    def check(number: int, outcome: str | Exception | None) -> str | None:
        made.append(number)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    passing = [lambda: check(0, None), lambda: check(1, "odd"), lambda: check(2, "strange")]
    assert checks.run_checks(passing) == ["odd", "strange"]
    assert checks.run_checks([]) == []
    failing = [lambda: check(3, ValueError("bad")), lambda: check(4, OSError("worse"))]
    with pytest.raises(ValueError, match="^bad\nworse$"):
        checks.run_checks([*failing, *passing])
    assert made == [0, 1, 2, 3, 4, 0, 1, 2]
    with pytest.raises(RuntimeError, match="defect"):
        checks.run_checks([lambda: check(5, RuntimeError("defect"))])


def test_two_troubles_give_two_lines_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    troubles = ["--precision", "bf16", "--objective.bank-size", "33"]
    assert run(tmp_path / "run", *troubles) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)
    assert sum("use --precision fp32" in line for line in lines) == 1
    assert sum("bank_size 33 exceeds the dataset's 32 images" in line for line in lines) == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_bank_is_checked_where_there_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--optim.epochs", "1", "--objective.bank-size", "4"]
    assert run(tmp_path / "ocm", *short) == 0
    assert "warning: a bank of 4 leaves about " in capsys.readouterr().out
    assert run(tmp_path / "cosine", *short, "--objective.name", "cosine") == 0
    assert "warning" not in capsys.readouterr().out


def test_full_disk_is_found_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_free_space(monkeypatch, 1000)
    assert run(tmp_path / "run", "--system.workers", "2") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert any("--shm-size" in line for line in lines)
    assert any("choose another --output" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_recipes_have_crops_that_bfloat16_bears_or_say_so(recipe: str) -> None:
    config = RECIPES[recipe]("x")
    sizes = [spec.size for spec in build.crop_specs(config.crops)]
    refused = False
    try:
        checks.cpu_bfloat16("bf16", torch.device("cpu"), min(sizes))
    except ValueError:
        refused = True
    assert refused == (recipe in ("demo", "smoke"))


TIMES = r"have other modification times since step_4\.pt was saved"


@pytest.mark.parametrize(
    ("sizes", "times", "expected"),
    [
        ([], [], []),
        ([3], [], [r"warning: 1 of 8 training images have other sizes .*, such as .*/a/3\.png"]),
        ([], [1, 2], [rf"warning: 2 of 8 training images {TIMES}, such as .*/a/1\.png"]),
        ([], range(8), [rf"all training images {TIMES}, but no other sizes"]),
        ([0], range(8), ["warning: 1 of 8 .* sizes", f"warning: 7 of 8 training images {TIMES}"]),
    ],
)
def test_changed_image_files(
    tmp_path: Path, sizes: Sequence[int], times: Sequence[int], expected: list[str]
) -> None:
    for index in range(8):
        save_image(tmp_path / "ab"[index // 4] / f"{index % 4}.png", index)
    source = FolderSource(tmp_path)
    before = ImageFiles({"training": source}).state(60)
    assert before["training"].nbytes == 4 * len(source)
    for index in times:
        os.utime(source.name(index), (0, 1e9))
    for index in sizes:
        with Path(source.name(index)).open("ab") as file:
            file.write(b"more")
        os.utime(source.name(index), (0, 1e9))
    files = ImageFiles({"training": source})
    files.state(60)
    files.compare_with(before, Path("step_4.pt"))
    found = files.warnings()
    assert len(found) == len(expected)
    assert all(map(re.match, expected, found))
    assert files.warnings() == []
