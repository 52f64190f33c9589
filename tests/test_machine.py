"""Description of the machine."""

from __future__ import annotations

import os

import pytest

from trex_models.precision import free_cores, processor


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_cores_are_those_of_this_process() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert free_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert free_cores() == len(before)


def test_the_processor_has_a_name() -> None:
    assert processor()
