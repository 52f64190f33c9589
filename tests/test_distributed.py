"""What processes exchange, on two and three gloo processes and on one."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.processes import results, spawn
from trex_models import distributed
from trex_models.distributed import (
    Process,
    SharedFlags,
    check_identical,
    process_group,
    raise_on_all_ranks,
)
from trex_models.train.reporting import Meter

Work = Callable[[Path], Any]


def message_of(function: Callable[[], object]) -> str:
    """Return the type and text of the error that a function raises; nothing if it raises none."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def block(error: Exception | None) -> None:
    with raise_on_all_ranks():
        if error is not None:
            raise error


def group_of_checks(folder: Path) -> dict[str, Any]:
    """Use every kind of exchange; then the last process leaves without a word."""
    seen: dict[str, Any] = {}

    def work() -> None:
        with process_group("cpu") as process:
            seen.update(exchanges(process, folder))
            if process.rank == process.world_size - 1:
                results(folder, process.world_size)[process.rank].write_bytes(pickle.dumps(seen))
                os._exit(0)
            while True:
                distributed.gather(torch.zeros(1))

    return seen | {"peer left": message_of(work), "group left": not dist.is_initialized()}


def exchanges(process: Process, folder: Path) -> dict[str, Any]:
    rank, is_last = process.rank, process.rank == process.world_size - 1
    seen: dict[str, Any] = {"process": process}

    seen["none fails"] = message_of(lambda: block(None))
    seen["last fails"] = message_of(lambda: block(ValueError("torn") if is_last else None))
    seen["all fail"] = message_of(lambda: block(OSError("full")))
    seen["each fails"] = message_of(lambda: block(ValueError(f"at {rank}")))
    seen["two troubles"] = message_of(lambda: block(ValueError("a\nb") if is_last else None))
    seen["first differs"] = message_of(lambda: block(ValueError("a" if rank == 0 else "b")))

    flags = SharedFlags(2)
    raised = [(False, False), (is_last, False), (False, rank == 0), (False, False), (False, False)]
    seen["flags"] = [flags.exchange(*mine) for mine in raised]
    flags.finish()

    seen["identical"] = {
        name: message_of(partial(check_identical, shared)) for name, shared in parts(is_last)
    }

    seen["object"] = distributed.broadcast({"rank": rank, "path": folder / str(rank)})
    seen["gather"] = distributed.gather(torch.full((2, 1), rank)).flatten().tolist()
    seen["rows"] = distributed.gather_rows(torch.full((rank, 1), rank)).flatten().tolist()
    norm = nn.BatchNorm1d(2)
    for tensor in (*norm.buffers(), *norm.parameters()):
        tensor.data.fill_(rank + 5)
    distributed.broadcast_buffers(norm)
    seen["buffers"] = [buffer.tolist() for buffer in norm.buffers()]
    seen["parameters"] = [parameter.tolist() for parameter in norm.parameters()]

    meter = Meter(process)
    for step in range(rank + 1):
        update(meter, loss=0.1 * (step + 1) + rank, correct=rank % 2 == 0)
    sums = meter.gathered()
    seen["sums"] = sums
    restored = Meter(process)
    restored.load_state_dict(sums)
    seen["restored exactly"] = torch.equal(restored.gathered(), sums)
    seen["read"] = meter.read()
    seen["emptied"] = meter.gathered().abs().sum().item()

    distributed.barrier()
    return seen


def parts(changed: bool) -> Iterator[tuple[str, dict[str, list[Tensor]]]]:
    """Yield parts that are alike but where ``changed``."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, generator=generator)
    labels = torch.randint(9, (5,), generator=generator)
    zero = torch.zeros(3)

    def both(encoder: Tensor, bank: Tensor = labels) -> dict[str, list[Tensor]]:
        return {"encoder": [zero, encoder], "bank": [bank]}

    yield "equal", both(weight)
    yield "strides", both(weight.T.contiguous().T if changed else weight)
    for bit in (0, 12, 30, 31):
        flipped = weight.clone()
        flipped.view(torch.int32)[3, 1] ^= 1 << bit if bit < 31 else -(1 << 31)
        yield f"bit {bit}", both(flipped if changed else weight)
    rows = weight[[0, 2, 1, 3, 4, 5]]
    yield "rows", both(rows if changed else weight)
    yield "tensors", {"encoder": [-weight, weight] if changed else [weight, -weight]}
    yield "high bit", both(weight, labels ^ -(1 << 63) if changed else labels)
    yield "integer", both(weight, labels + torch.tensor([0, 0, 0, 1, 0]) if changed else labels)
    negative = torch.tensor([0.0, 0.0, -0.0])
    yield "sign of zero", {"encoder": [negative if changed else zero]}
    nan = torch.full((2,), torch.nan)
    yield "nan alike", {"encoder": [nan]}
    half = weight.bfloat16()
    yield "bfloat16", {"encoder": [half], "bank": [half.flip(1) if changed else half]}
    yield "scalar", {"encoder": [torch.tensor(4 if changed else 3)]}
    yield "both", both(weight + 1 if changed else weight, labels + 1 if changed else labels)


def update(meter: Meter, loss: float, correct: bool) -> None:
    meter.update(torch.tensor(loss), torch.tensor([[0.0, 1.0]]), torch.tensor([int(correct)]))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three processes saw."""
    return spawn(group_of_checks, 3, tmp_path_factory.mktemp("group"))


Seen = list[dict[str, Any]]


def test_processes_come_from_the_environment_and_notice_one_that_leaves(seen: Seen) -> None:
    cpu = torch.device("cpu")
    assert [one["process"] for one in seen] == [Process(rank, 3, cpu) for rank in range(3)]
    assert [one["process"].is_main for one in seen] == [True, False, False]
    for one in seen[:-1]:
        assert one["peer left"].startswith("PeerError: another process failed")
        assert one["group left"]


def alike(seen: Seen, name: str) -> Any:
    """Return what all processes saw, which must be equal."""
    assert all(one[name] == seen[0][name] for one in seen)
    return seen[0][name]


def test_errors_and_flags_are_seen_by_all(seen: Seen) -> None:
    assert alike(seen, "none fails") == ""
    for name, message in {
        "last fails": "process 2: torn",
        "two troubles": "process 2: a\nprocess 2: b",
        "all fail": "full",
        "each fails": "process 0: at 0\nprocess 1: at 1\nprocess 2: at 2",
        "first differs": "process 0: a\nprocess 1, 2: b",
    }.items():
        assert alike(seen, name) == f"SharedError: {message}"
    down = [False, False]
    assert alike(seen, "flags") == [down, down, [True, False], [False, True], down]


def test_differences_between_ranks_are_reported(seen: Seen) -> None:
    found: dict[str, str] = alike(seen, "identical")
    passing = {name for name, message in found.items() if not message}
    assert passing == {"equal", "strides", "nan alike"}
    for name, message in found.items():
        part = "bank" if name in ("integer", "bfloat16", "high bit") else "encoder"
        if name not in passing:
            start = f"SharedError: the {part} of process 2 differs from that of process 0;"
            assert message.startswith(start), name


def test_tensors_and_objects_are_exchanged(seen: Seen) -> None:
    assert alike(seen, "object")["rank"] == 0
    assert alike(seen, "object")["path"].name == "0"
    assert alike(seen, "gather") == [0, 0, 1, 1, 2, 2]
    assert alike(seen, "rows") == [1, 2, 2]
    assert alike(seen, "buffers") == [[5, 5], [5, 5], 5]  # those of process 0
    assert [one["parameters"] for one in seen] == [[[value] * 2] * 2 for value in (5, 6, 7)]


def test_meter_of_many_processes(seen: Seen) -> None:
    losses = [[0.1], [1.1, 1.2], [2.1, 2.2, 2.3]]  # process 1 is never right
    assert all(torch.equal(one["sums"], seen[0]["sums"]) for one in seen)
    expected = [
        [sum(own), len(own) * right, len(own)] for own, right in zip(losses, (1, 0, 1), strict=True)
    ]
    torch.testing.assert_close(seen[0]["sums"].double(), torch.tensor(expected).double())
    assert alike(seen, "restored exactly")
    assert alike(seen, "read") == pytest.approx(
        {"loss": sum(map(sum, losses)) / 6, "accuracy": 4 / 6}
    )
    assert alike(seen, "emptied") == 0
    # Of another number of processes: one takes the mean.
    one = Meter(Process(0, 1, torch.device("cpu")))
    update(one, loss=99.0, correct=False)  # forgotten
    one.load_state_dict(seen[0]["sums"])
    torch.testing.assert_close(one.gathered(), seen[0]["sums"].mean(0, keepdim=True))
    assert one.read() == pytest.approx(seen[0]["read"])


def test_a_single_process_exchanges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group("cpu") as process:
        assert process == Process(0, 1, torch.device("cpu"))
        assert not dist.is_initialized()
        assert message_of(lambda: block(ValueError("torn"))) == "ValueError: torn"
        assert message_of(lambda: block(RuntimeError("a defect"))) == "RuntimeError: a defect"
        assert message_of(lambda: block(None)) == ""
        flags = SharedFlags(2)
        assert flags.exchange(False, True) == [False, True]
        assert flags.exchange(True, False) == [True, False]
        flags.finish()
        check_identical({"encoder": [torch.zeros(2)]})
        assert distributed.broadcast("object") == "object"
        tensor = torch.arange(3)
        assert distributed.gather(tensor) is tensor
        module = nn.Linear(2, 2)
        assert distributed.data_parallel(module, process, sync_batchnorm=True) is module
        distributed.broadcast_buffers(module)
        distributed.barrier()


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("auto", "MASTER_PORT: this process cannot connect to the others at "),
        ("nccl", "nccl requires CUDA"),
    ],
)
def test_processes_that_cannot_meet(
    backend: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=message), process_group("cpu", backend):
        raise AssertionError("not reached")
    assert not dist.is_initialized()

    for name in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=r"^--system.device: "), process_group(name):
            raise AssertionError("not reached")
