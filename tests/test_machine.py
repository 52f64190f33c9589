"""What this machine is."""

from __future__ import annotations

import os

import pytest

from trex_models.machine import free_cores, processor, processor_facts


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_cores_are_those_of_this_process() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert free_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert free_cores() == len(before)


def test_the_processor_has_a_name_and_unknown_facts_are_empty() -> None:
    assert processor()
    assert processor_facts("no such fact") == ""
