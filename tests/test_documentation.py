"""All Python and shell blocks of README.md and docs/ are executed, page by page."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documentation import PAGES, ROOT, SETTINGS, blocks, furnish, run, settings

LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")


@pytest.fixture(scope="module")
def furnished(
    release: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("furnished")
    yield folder, furnish(folder, release)
    shutil.rmtree(folder)


@pytest.mark.client
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if settings(page).slow else [])
        for page in PAGES
        if any(block.language in ("python", "sh") for block in blocks(page.read_text()))
    ],
    ids=lambda page: page.stem,
)
def test_page_runs(page: Path, furnished: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    made, environ = furnished
    for path in made.iterdir():
        if path.name not in ("home", "programs"):
            (tmp_path / path.name).symlink_to(path)
    outcome = run(page, tmp_path, environ)
    assert outcome.returncode == 0, f"{outcome.stdout[-3000:]}\n{outcome.stderr[-5000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_of_pages_exist(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        assert (page.parent / link[0]).exists(), link[0]


def test_every_settings_file_belongs_to_a_page() -> None:
    assert {path.stem for path in SETTINGS.glob("*.toml")} <= {page.stem for page in PAGES}
    assert ROOT / "README.md" in PAGES
