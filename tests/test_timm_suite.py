"""timm's own tests, on our models: they must pass every test that timm's resnet50 passes.

timm's tests come with its source distribution, which `make setup` unpacks.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import pytest
import timm

import trex_models  # noqa: F401  # registers the models

pytestmark = pytest.mark.client

ROOT = Path(__file__).parent.parent
TIMM_SOURCE = ROOT / ".timm-src" / f"timm-{timm.__version__}"
# timm's test files whose tests name models or build ResNets.
FILES = ("models", "model_input", "input_conv", "checkpoint_loading", "utils")
# These need no network.
DESELECTED = {"tests/test_models.py::test_model_inference": "its expected outputs are on the Hub"}
# Tests that resnet50 passed under timm 1.0.31. If there are fewer, the plugin no longer finds them.
NUM_TESTS = 51


def run_timm_tests(folder: Path) -> dict[str, dict[str, str]]:
    """Run timm's tests in a new process; return model -> test -> outcome."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-p", "timm_suite_plugin", "-p", "no:cacheprovider"]
    # A separate folder: pytest changes the permissions of the common one while other tests run.
    command += ["-q", f"--junitxml={report}", f"--basetemp={folder / 'tests'}"]
    command += [f"--deselect={test}" for test in DESELECTED]
    command += [f"tests/test_{name}.py" for name in FILES]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "timm_suite")]),
        "PYTEST_ADDOPTS": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    done = subprocess.run(command, cwd=TIMM_SOURCE, env=env, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr  # 1: some tests failed
    outcomes: dict[str, dict[str, str]] = {}
    for case in ET.parse(report).iter("testcase"):
        properties = {p.get("name"): p.get("value") for p in case.iter("property")}
        model, key = properties["model"], properties["key"]
        assert model
        assert key
        outcome = next((e.tag for e in case if e.tag in ("failure", "error", "skipped")), "passed")
        tests = outcomes.setdefault(model, {})
        # A test runs once per tag, and passes if it passes for all tags.
        tests[key] = outcome if tests.get(key, "passed") == "passed" else tests[key]
    return outcomes


def kind(model: str) -> str:
    """Return a model's name without its projector's depth."""
    return model.replace("trexstar", "trex")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_that_resnet50_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert TIMM_SOURCE.is_dir(), f"no timm source in {TIMM_SOURCE}: run `make setup`"
    ours = run_timm_tests(tmp_path)
    passed = {test for test, outcome in ours.pop("resnet50").items() if outcome == "passed"}
    assert len(passed) >= NUM_TESTS
    assert {kind(model) for model in ours} == {kind(model) for model in timm.list_models("trex*")}
    with capsys.disabled():
        print(f"\ntimm {timm.__version__}: resnet50 passes {len(passed)} tests")
        for model, tests in ours.items():
            print(f"  {model}: {dict(Counter(tests[test] for test in passed & tests.keys()))}")
    not_passed = [
        f"{model}: {test}: {tests.get(test, 'not run')}"
        for model, tests in ours.items()
        for test in sorted(passed)
        if tests.get(test) != "passed"
        and not (model == "trex_resnet" and "_pretrained " in test)  # it has no weights
    ]
    assert not not_passed
