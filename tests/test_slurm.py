"""docs/slurm.sh, under commands that replace Slurm's own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import TINY, last_state, logged

SCRIPT = Path(__file__).parents[1] / "docs" / "slurm.sh"

# Starts the tasks; sends SIGUSR1 to each, and to its loader workers, once the first line is logged.
SRUN = """#!/bin/bash
[ "$1 $2 $3" = "--kill-on-bad-exit=0 --wait=300 --cpus-per-task=1" ] || exit 9
shift 3
for rank in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank setsid "$@" &
    tasks+=($!)
done
if [ "$WARN" = 1 ]; then
    until [ -s "$RUN_FOLDER/metrics.jsonl" ]; do sleep 0.02; done
    kill -USR1 -- "${tasks[@]/#/-}"
fi
status=0
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit $status
"""

SCONTROL = """#!/bin/bash
[ "$1 $2" = "show hostnames" ] && exec printf '127.0.0.1\\nanother machine\\n'
echo -n "$*" > "$REQUEUED"
"""


@pytest.mark.client
@pytest.mark.slow
def test_job_stops_before_its_limit_and_queues_again(tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    python = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": python}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    requeued = tmp_path / "requeued"

    def job(folder: Path, *overrides: str, warn: bool = False) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(SCRIPT.parents[1]),
            "OMP_NUM_THREADS": "1",
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": "machine[1-2]",
            "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "2",
            "SLURM_CPUS_PER_TASK": "1",
            "RUN_FOLDER": str(folder),
            "REQUEUED": str(requeued),
            "WARN": str(int(warn)),
        }
        workers = TINY.index("--system.workers")
        arguments = ["smoke", "--output", str(folder), *TINY[:workers], *TINY[workers + 2 :]]
        return subprocess.run(
            ["bash", str(SCRIPT), *arguments, "--optim.epochs", "4", *overrides],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    first = job(tmp_path / "run", warn=True)
    assert first.returncode == 0, first.stderr
    stopped = re.search(r"stopped by SIGUSR1 after step (\d+) of 16 \(saved\)", first.stdout)
    assert stopped is not None
    assert last_state(tmp_path / "run")["step"] == int(stopped[1]) < 16
    assert requeued.read_text() == f"requeue {os.getpid()}"
    assert "Traceback" not in first.stderr
    second = job(tmp_path / "run")
    assert second.returncode == 0, second.stderr
    assert f"continues from {tmp_path}/run/checkpoints/step_{stopped[1]}.pt" in second.stdout
    assert last_state(tmp_path / "run")["step"] == 16
    assert [line["step"] for line in logged(tmp_path / "run")] == list(range(2, 17, 2))

    requeued.unlink()
    other = job(tmp_path / "run", "--seed", "3")
    assert other.returncode == 2
    assert other.stderr.count("error: ") == 1
    assert "already contains a run with other settings (seed: 0 -> 3)" in other.stderr
    assert not requeued.exists()
