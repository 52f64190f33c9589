"""Train on two hosts and kill each once; the result equals that of two processes on one host.

The hosts are two network namespaces that a veth pair joins; no traffic leaves them. On each,
torchrun starts one training process; they meet at a c10d rendezvous and share a file system, as
the nodes of a cluster do. Needs Linux, root and iproute2.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.fault_injection import Setting, compare, names_of_checkpoints

SETTING = Setting(processes=2, workers=1, epochs=6, save_steps=4)
_ADDRESSES = ("10.231.0.1", "10.231.0.2")
_SECONDS = 120.0


@contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Yield the names of two network namespaces that can only reach each other."""
    names = [f"trex-{os.getpid()}-{index}" for index in range(2)]
    with ExitStack() as stack:
        for name in names:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
        ends = f"eth0 netns {names[0]} type veth peer eth0 netns {names[1]}"
        _ip("link", "add", *ends.split())
        for name, address in zip(names, _ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/30", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
            stack.callback(kill, name)
        yield names


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def start(host: str, folder: Path, interface: str, *launcher: str) -> subprocess.Popen[bytes]:
    """Start torchrun on a host in ``folder``, with its output in HOST.log."""
    command = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run"]
    command += [*launcher, "-m", "trex_models.train", *SETTING.command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    with (folder / f"{host}.log").open("a") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def start_on_both(hosts: Sequence[str], folder: Path) -> list[subprocess.Popen[bytes]]:
    launcher = f"--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-id {hosts[0]}"
    launcher += f" --rdzv-endpoint {_ADDRESSES[0]}:29500"
    # torchrun looks up whose endpoint it is by the host's name, which both share.
    own = [f"--local-addr {a} --rdzv-conf is_host={a == _ADDRESSES[0]}" for a in _ADDRESSES]
    return [
        start(host, folder, "eth0", *launcher.split(), *options.split())
        for host, options in zip(hosts, own, strict=True)
    ]


def kill(host: str) -> None:
    for pid in _ip("netns", "pids", host).split():
        os.kill(int(pid), signal.SIGKILL)


def _await_checkpoint(run: Path, seen: frozenset[str]) -> None:
    deadline = time.monotonic() + _SECONDS
    while names_of_checkpoints(run) <= seen:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no checkpoint in {run}")
        time.sleep(0.02)


@pytest.mark.client
def test_two_hosts_give_the_result_of_one(tmp_path: Path) -> None:
    """Each host is killed once, and the run resumed to its end."""
    one, two = tmp_path / "one", tmp_path / "two"
    with ExitStack() as stack:
        try:
            hosts = stack.enter_context(two_hosts())
        except (FileNotFoundError, PermissionError) as error:
            pytest.skip(f"network namespaces are not available here: {error}")
        for place in (one, two):
            place.mkdir()
        alone = start(hosts[0], one, "lo", "--standalone", "--nproc-per-node", "2")
        assert alone.wait(_SECONDS) == 0
        for killed in (1, 0):
            seen = names_of_checkpoints(two / "run")
            processes = start_on_both(hosts, two)
            _await_checkpoint(two / "run", seen)
            kill(hosts[killed])
            # The host that lost the other ends with status 1.
            assert [process.wait(_SECONDS) for process in processes].count(1) == 1
        assert not any(process.wait(_SECONDS) for process in start_on_both(hosts, two))
    assert compare(two / "run", one / "run", SETTING.total_steps) == []
