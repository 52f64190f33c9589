"""Errors and warnings before the first step."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch

from tests.images import save_classes, save_image
from tests.processes import captured
from tests.runs import output_of, refused, run
from trex_models.atomic import require_space
from trex_models.data.image_files import FolderSource
from trex_models.data.sources import ArraySource
from trex_models.train import build, checkpointing, checks
from trex_models.train.config import from_dict
from trex_models.train.recipes import RECIPES
from trex_models.train.unreadable import ImageFiles


def set_free_space(monkeypatch: pytest.MonkeyPatch, free: int) -> list[Path]:
    """Set the free space of every disk in bytes; return the list of queried paths."""
    asked: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        assert path.exists()
        return SimpleNamespace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    return asked


def labels_of(counts: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)


def exact_share(size: int, counts: list[int]) -> float:
    """Return the mean over classes of C(N - n, Q) / C(N, Q), computed with integers."""
    total = sum(counts)
    absent = {n: math.comb(total - n, size) / math.comb(total, size) for n in set(counts)}
    return sum(absent[n] for n in counts) / len(counts)


@pytest.mark.parametrize(
    ("counts", "size", "recommended"),
    [
        ([20] * 50, 100, 512),
        ([1, 2, 3, 5, 8, 13, 21, 200, 400], 30, 653),  # no power of two below N is sufficient
        ([1] * 500 + [500], 600, 1000),
        ([1] * 40, 40, None),
        ([1] * 40, 39, 40),
        ([5, 95], 96, None),  # 96 images cannot all be of the other class
        ([5, 95], 95, None),
        ([3, 3], 1, 4),
        ([100] * 100, 440, 1024),  # 1.1 %
        ([100] * 100, 450, None),  # 0.97 %
        ([100] * 160, 300, 2048),  # 1024 leave 0.16 %
        ([1300] * 895 + [732] * 105, 8192, None),  # the paper's bank on ImageNet
        ([10] * 64, 63, 512),
        ([10] * 64, 64, 512),
    ],
)
def test_share_of_classes_without_a_prototype(
    counts: list[int], size: int, recommended: int | None
) -> None:
    """More than 1 % cause a warning; fewer entries than classes are an error."""
    if size < len(counts):
        below = f"--objective.bank-size {size} is below the {len(counts)} classes"
        with pytest.raises(ValueError, match=below) as caught:
            checks.check_bank_size(size, labels_of(counts), len(counts))
        message = str(caught.value)
    else:
        message = checks.check_bank_size(size, labels_of(counts), len(counts)) or ""
    if recommended is None:
        assert message == ""
        assert exact_share(size, counts) <= 0.01
        return
    found = re.search(
        r"leaves (?:about )?(\S+)% of the classes .*-size (\d+) would leave (\S+)%$", message
    )
    assert found
    assert "\n" not in message
    shares = [100 * exact_share(used, counts) for used in (size, recommended)]
    assert [float(found[1]), float(found[3])] == pytest.approx(shares, abs=0.051)
    assert int(found[2]) == recommended
    assert shares[0] > 1
    assert shares[1] <= 0.1


def test_bank_larger_than_the_data_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match="bank-size 101 exceeds .* 100 images.* use at most 100, or the recipe auto$",
    ):
        checks.check_bank_size(101, labels_of([50, 50]), 2)
    assert checks.check_bank_size(100, labels_of([50, 50]), 2) is None


def test_disk_space_is_that_of_the_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(10, 100, bias=False), torch.nn.BatchNorm1d(100))
    module[0].weight.requires_grad_(False)
    frozen, trained, buffers = 4 * 1000, 4 * 200, 4 * 200 + 8
    assert checks.checkpoint_bytes(module, "sgd") == frozen + 2 * trained + buffers
    assert checks.checkpoint_bytes(module, "adamw") == frozen + 3 * trained + buffers
    monkeypatch.chdir(tmp_path)
    asked = set_free_space(monkeypatch, 1000)
    for folder in (tmp_path / "run" / "of" / "mine", tmp_path, Path("runs/mine")):
        require_space(folder, 1000, "--output")
    assert asked == [tmp_path] * 3
    with pytest.raises(
        ValueError, match="^runs/mine has 0.0 MB of free space, .* are required; .* another --"
    ):
        require_space(Path("runs/mine"), 1001, "--output")


@pytest.mark.parametrize("objective", ["ocm", "cosine"])
def test_size_of_a_checkpoint_and_of_a_bank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    """The estimate is close to the size of a real file, which also contains names."""
    options = f"""--objective.name {objective} --model.hidden-dim 1024 --optim.epochs 1
        --objective.bank-size 4""".split()
    warned = "warning: --objective.bank-size 4 leaves about " in output_of(
        tmp_path / "run", *options
    )
    assert warned == (objective == "ocm")
    path = checkpointing.list_checkpoints(tmp_path / "run")[-1]
    method = build.build_method(from_dict(checkpointing.load(path)["config"]), 4)
    size = checks.checkpoint_bytes(method, "sgd")
    assert size == pytest.approx(path.stat().st_size, rel=0.1)
    # Room for three: two are kept, and the next is written before the oldest is deleted.
    set_free_space(monkeypatch, 3 * size - 1)
    assert "another --output" in refused(tmp_path / "other", *options)
    assert run(tmp_path / "run", *options) == 0


def test_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "_SHARED_MEMORY", tmp_path)
    needed = 10**6 * 4 * 3 * 3  # 3 batches of each worker
    asked = set_free_space(monkeypatch, needed)
    checks.check_shared_memory(10**6, workers=4, processes=3)
    assert asked == [tmp_path]
    set_free_space(monkeypatch, needed - 1)
    with pytest.raises(ValueError, match="of 12 workers need 36 MB; .* --system.workers"):
        checks.check_shared_memory(10**6, workers=4, processes=3)
    checks.check_shared_memory(10**6, workers=0, processes=3)  # no workers
    monkeypatch.setattr(checks, "_SHARED_MEMORY", tmp_path / "absent")  # macOS
    checks.check_shared_memory(10**6, workers=4, processes=3)


@pytest.mark.parametrize("count", [1, 2, 16, 17, 1000])
def test_samples_are_read_from_all_over(count: int) -> None:
    source = ArraySource(np.zeros((count, 2, 3, 3), np.uint8), [0] * count, ["a"])
    with patch.object(source, "read", wraps=source.read) as read:
        checks.check_samples("training", source)
    seen = [call.args[0] for call in read.call_args_list]
    assert len(seen) == len(set(seen)) == min(count, 16)
    assert (seen[0], seen[-1]) == (0, count - 1)
    assert np.diff(seen).max(initial=0) <= math.ceil(count / 15)


@pytest.mark.parametrize(
    "image",
    [np.zeros((2, 3, 3), np.float32), np.zeros((2, 3), np.uint8), np.zeros((2, 3, 4), np.uint8)],
    ids=["float", "gray", "with alpha"],
)
def test_sample_that_is_no_rgb_bytes(image: np.ndarray, tmp_path: Path) -> None:
    source = ArraySource(np.zeros((5, 2, 3, 3), np.uint8), [0] * 5, ["a"])
    source.images = [*source.images[:4], image]
    message = f"^a image 4 must be uint8 .*, got {re.escape(f'{image.dtype} {image.shape}')}$"
    with pytest.raises(ValueError, match=message):
        checks.check_samples("training", source)
    (save_classes(tmp_path, 2) / "b" / "1.jpg").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"b/1.jpg cannot be read as an image"):
        checks.check_samples("training", FolderSource(tmp_path))


@pytest.mark.parametrize(
    ("precision", "device", "size", "refused"),
    [
        ("bf16", "cpu", 16, True),
        ("bf16", "cpu", 17, False),
        ("fp32", "cpu", 16, False),
        ("bf16", "cuda", 16, False),
        *(
            ("bf16", "cpu", build.crop_specs(config("x").crops)[-1].size, name in ("demo", "smoke"))
            for name, config in RECIPES.items()
        ),
    ],
)
def test_bfloat16_on_a_cpu(precision: str, device: str, size: int, refused: bool) -> None:
    message = "16 pixels or fewer; use --precision fp32"
    with pytest.raises(ValueError, match=message) if refused else nullcontext():
        checks.check_cpu_bfloat16(precision, torch.device(device), size)


def test_every_check_is_made() -> None:
    passing = [Mock(return_value=warning) for warning in (None, "odd", "strange")]
    assert checks.run_checks(passing) == ["odd", "strange"]
    assert checks.run_checks([]) == []
    failing = [Mock(side_effect=error) for error in (ValueError("bad"), OSError("worse"))]
    with pytest.raises(ValueError, match="^bad\nworse$"):
        checks.run_checks([*failing, *passing])
    assert [check.call_count for check in (*failing, *passing)] == [1, 1, 2, 2, 2]
    with pytest.raises(RuntimeError, match="defect"):
        checks.run_checks([Mock(side_effect=RuntimeError("defect"))])


def test_each_trouble_has_a_line_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_free_space(monkeypatch, 1000)
    troubles = "--precision bf16 --objective.bank-size 33 --system.workers 2".split()
    status, out, err = captured(lambda options: run(tmp_path / "run", *options), *troubles)
    assert (status, out) == (2, "")
    lines = err.splitlines()
    remedies = ("use --precision fp32", "the dataset's 32 images", "--shm-size", "another --output")
    for remedy in remedies:
        assert sum(remedy in line for line in lines) == 1
    assert len(lines) == len(remedies)
    assert all(line.startswith("error: ") for line in lines)
    assert list(tmp_path.iterdir()) == []


TIMES = r"have new modification times since step_4\.pt was saved"


@pytest.mark.parametrize(
    ("sizes", "times", "expected"),
    [
        ([], [], []),
        ([3], [], [r"warning: 1 of 8 training images have new sizes .*, such as .*/a/3\.png"]),
        ([], [1, 2], [rf"warning: 2 of 8 training images {TIMES}, such as .*/a/1\.png"]),
        ([], range(8), [rf"all training images {TIMES}, but the same sizes"]),
        ([0], range(8), ["warning: 1 of 8 .* sizes", f"warning: 7 of 8 training images {TIMES}"]),
    ],
)
def test_changed_image_files(
    tmp_path: Path, sizes: Sequence[int], times: Sequence[int], expected: list[str]
) -> None:
    for index in range(8):
        save_image(tmp_path / "ab"[index // 4] / f"{index % 4}.png", index)
    source = FolderSource(tmp_path)
    before = ImageFiles({"training": source}, {}, None).state(60)
    assert before["training"].nbytes == 4 * len(source)
    for index in times:
        os.utime(source.name(index), (0, 1e9))
    for index in sizes:
        with Path(source.name(index)).open("ab") as file:
            file.write(b"more")
        os.utime(source.name(index), (0, 1e9))
    files = ImageFiles({"training": source}, before, Path("step_4.pt"))
    files.state(60)
    found = files.warnings()
    assert len(found) == len(expected)
    assert all(map(re.match, expected, found))
    assert files.warnings() == []


def test_warnings_about_a_bank_that_is_too_slow_for_the_run() -> None:
    assert checks.check_bank_refills(100, 1000) is None
    assert "filled 9.9 times" in str(checks.check_bank_refills(100, 990))
    assert checks.check_momentum(0.999, 5000) is None
    message = str(checks.check_momentum(0.999, 4000))
    assert "averages over 1,000 steps, more than a fifth of the run's 4000; use 0.99, or" in message
    assert "infinitely many steps" in str(checks.check_momentum(1.0, 100))


def test_a_learning_rate_of_sgd_is_too_high_for_adamw() -> None:
    message = str(checks.check_rate("adamw", 0.1, 512))
    assert message.startswith("the learning rate of adamw rises to 0.1, but is usually about 0.001")
    assert "use --optim.base-lr 0.0005, or the recipe auto" in message
    assert checks.check_rate("adamw", 0.01, 512) is None
    for name in ("sgd", "sgdp", "lars", "adafactor", "muon"):
        assert checks.check_rate(name, 0.2, 512) is None


def test_recipes_for_imagenet_warn_on_few_images(tmp_path: Path) -> None:
    output = output_of(tmp_path / "run", "--objective.ema-momentum", "0.999")
    assert "warning: --objective.ema-momentum 0.999 averages over 1,000 steps" in output
    assert "warning: --objective.bank-size 32 is filled 2.0 times by the run" in output
    assert output.count("or the recipe auto") == 2
