"""What this machine is: its processor, and the cores that are ours."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from pathlib import Path


def free_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """Return the processor's name."""
    return processor_facts("model name") or platform.processor() or platform.machine()


def processor_facts(key: str) -> str:
    """Return what Linux says of the processor under a key; empty elsewhere."""
    with suppress(OSError):
        found = re.search(rf"^{key}\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.M)
        return found[1] if found else ""
    return ""
