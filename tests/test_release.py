"""Consistency of version, date and requirements in the five files of a release."""

from __future__ import annotations

import datetime
import itertools
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import trex_models

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def lower_bounds() -> dict[str, Version]:
    """Return the lower bound of each requirement, including those of the extras."""
    bounds: dict[str, Version] = {}
    extras = itertools.chain.from_iterable(PROJECT["optional-dependencies"].values())
    for line in (*PROJECT["dependencies"], *extras):
        requirement = Requirement(line)
        if requirement.name == PROJECT["name"]:  # one extra includes others
            assert requirement.extras <= set(PROJECT["optional-dependencies"])
            continue
        (bound,) = requirement.specifier
        assert bound.operator == ">=", line
        version = Version(bound.version)
        assert bounds.setdefault(requirement.name, version) == version, f"{line}: two bounds"
    return bounds


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text().splitlines()
    requirements = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(str(r.specifier).startswith("==") for r in requirements)
    return {r.name: Version(str(r.specifier)[2:]) for r in requirements}


def changelog() -> list[tuple[str, str]]:
    """Return version and date of each release in the changelog, the latest first."""
    text = (ROOT / "CHANGELOG.md").read_text()
    return re.findall(r"^## (?!\[Unreleased\]$)\[?([^\]\s]+)\]?(?: - (\S+))?$", text, re.MULTILINE)


def citation(field: str) -> str:
    found = re.search(rf"^{field}: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert found is not None, field
    return found[1]


def test_pinned_versions_are_within_the_bounds() -> None:
    assert pins("constraints-oldest.txt") == lower_bounds()
    bounds = lower_bounds()
    newest = pins("constraints.txt")
    assert newest.keys() == bounds.keys()
    assert not {name for name, version in newest.items() if version < bounds[name]}
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    for requirement in map(Requirement, build):
        assert str(requirement.specifier) == f">={bounds[requirement.name]}"


def test_version_and_license_are_one_everywhere() -> None:
    version, _ = changelog()[0]
    assert version == citation("version") == trex_models.__version__
    assert citation("license") == PROJECT["license"]
    releases = changelog()
    dates = [datetime.date.fromisoformat(date) for _, date in releases]
    assert dates == sorted(dates, reverse=True)
    assert citation("date-released") == dates[0].isoformat()
    versions = [Version(version) for version, _ in releases]
    assert versions == sorted(versions, reverse=True)


def test_classifiers_begin_at_the_oldest_python() -> None:
    prefix = "Programming Language :: Python :: 3."
    minors = [int(c.removeprefix(prefix)) for c in PROJECT["classifiers"] if c.startswith(prefix)]
    assert PROJECT["requires-python"] == f">=3.{min(minors)}"
    page = (ROOT / "docs" / "versions.md").read_text()
    assert all(f"3.{minor}" in page for minor in minors)


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-oldest.txt"])
def test_page_of_versions_names_what_ran(file: str) -> None:
    page = (ROOT / "docs" / "versions.md").read_text()
    rows = {
        cells[0].strip(): cells[1:]
        for cells in (line.strip("|").split("|") for line in page.splitlines() if "|" in line)
    }
    column = {"constraints-oldest.txt": 0, "constraints.txt": 1}[file]
    pinned = pins(file)
    for name in (Requirement(line).name for line in PROJECT["dependencies"]):
        assert Version(rows[name][column].strip()) == pinned[name], name
