"""Every Python and shell block of README.md and docs/ runs, in the order of its page."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documentation import PAGES, ROOT, SETTINGS, blocks, furnish, program, run, settings

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
def test_page_links_to_what_exists(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        assert (page.parent / link[0]).exists(), link[0]


def test_every_setting_is_of_a_page() -> None:
    assert {path.stem for path in SETTINGS.glob("*.toml")} <= {page.stem for page in PAGES}
    assert ROOT / "README.md" in PAGES


def page_of(folder: Path, *texts: str) -> Path:
    page = folder / "page.md"
    page.write_text("\n".join(texts))
    return page


def test_a_page_that_fails_says_where(tmp_path: Path) -> None:
    page = page_of(tmp_path, "```python", "x = 1", "```", "", "```sh", "test -e missing", "```")
    outcome = run(page, tmp_path, {})
    assert outcome.returncode == 1
    assert "the shell block of line 5 ended with status 1" in outcome.stderr
    page = page_of(tmp_path, "```python", "x = 1", "```", "", "```python", "x + y", "```")
    outcome = run(page, tmp_path, {})
    assert outcome.returncode == 1
    assert 'page.md", line 6' in outcome.stderr


def test_pip_and_make_must_be_asked_for_what_exists(
    furnished: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    for line, works in (
        ("pip install '.[train]'", True),
        ("pip install torch trex-models", True),
        ("pip install '.[nothing]'", False),
        ("pip install no-such-package-at-all", False),
        ("make test", True),
        ("make nothing", False),
    ):
        page = page_of(tmp_path, "```sh", line, "```")
        assert (run(page, tmp_path, furnished[1]).returncode == 0) is works, line


def test_useless_blocks_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="indented, not fenced: 'make demo'"):
        blocks("Do this:\n\n    make demo\n\nand that.\n")
    with pytest.raises(ValueError, match="line 3: the language 'pyhton' is not known"):
        blocks("# Page\n\n```pyhton\nprint()\n```\n")
    monkeypatch.setattr("tests.documentation.SETTINGS", tmp_path)
    for setting, message in (
        ('[replace]\n"--epochs 300" = "--epochs 1"', "nothing of ['--epochs 300']"),
        ('[skip]\n"make setup" = "docs/versions.md"', "versions.md does not have 'make setup'"),
    ):
        (tmp_path / "page.toml").write_text(f"{setting}\n")
        with pytest.raises(ValueError, match=re.escape(message)):
            program(page_of(tmp_path, "```sh", "make setup", "```"))
