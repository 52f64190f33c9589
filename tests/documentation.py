"""Documentation pages as programs: their code blocks are executed in order in a separate folder.

tests/pages/PAGE.toml replaces settings that tests cannot run:

    slow = true                  # takes more than ten seconds
    [replace]                    # text of the page -> what is run; each text must occur in a block
    "--epochs 300" = "--epochs 1"
    [skip]                       # first line of a block -> why it is not run
    "sbatch docs/slurm.sh" = "tests/test_slurm.py runs it"
    "pip install '.[export]'" = "docs/export.md"    # which runs the same lines
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from tests.processes import run_python
from trex_models.data import samples

ROOT = Path(__file__).parents[1]
SETTINGS = Path(__file__).parent / "pages"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
LANGUAGES = ("python", "sh", "text", "json", "bibtex")
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"(?:\A|\n\n)((?: {4}.*\n)+)")

# Setup commands are not run, but the files that they mention must exist.
_PIP = """
from importlib.metadata import version
from packaging.requirements import Requirement
import sys, tomllib
assert sys.argv[1] == "install", sys.argv
project = tomllib.load(open({project!r}, "rb"))["project"]
for argument in sys.argv[2:]:
    ours = argument.startswith(".")
    wanted = Requirement(argument.replace(".", "trex-models", 1) if ours else argument)
    version(wanted.name)
    if wanted.name == "trex-models":
        assert wanted.extras <= set(project["optional-dependencies"]), argument
"""
_MAKE = """
import subprocess, sys
sys.exit(subprocess.call([{make!r}, "--dry-run", "--always-make", *sys.argv[1:]], cwd={root!r}))
"""

# Python blocks share a namespace, as in a notebook; shell blocks run between them.
_SESSION = """
import json, subprocess, sys
namespace = {"__name__": "__main__"}
for language, text, line in json.load(open(sys.argv[1])):
    print(f"--- {language} block of line {line}", flush=True)
    if language == "sh":
        code = subprocess.call(["bash", "-euo", "pipefail", "-c", text])
        if code:
            sys.exit(f"the shell block of line {line} ended with status {code}")
    else:
        exec(compile("\\n" * line + text, sys.argv[2], "exec"), namespace)
"""


class Block(NamedTuple):
    """Fenced code block of a page, with the line number of its opening fence."""

    language: str
    text: str
    line: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    slow: bool = False
    replace: dict[str, str] = field(default_factory=dict)
    skip: dict[str, str] = field(default_factory=dict)


def settings(page: Path) -> Settings:
    file = SETTINGS / f"{page.stem}.toml"
    return Settings(**tomllib.loads(file.read_text())) if file.exists() else Settings()


def blocks(markdown: str) -> list[Block]:
    """Return the fenced code blocks of a page; reject indented blocks and other languages."""
    fenced = list(_FENCED.finditer(markdown))
    found = [Block(m[1], m[2], markdown.count("\n", 0, m.start()) + 1) for m in fenced]
    for block in found:
        if block.language not in LANGUAGES:
            raise ValueError(f"line {block.line}: the language {block.language!r} is not known")
    prose = _FENCED.sub("", markdown)
    if indented := _INDENTED.search(prose):
        raise ValueError(f"this block is indented, not fenced: {indented[1].strip()!r}")
    return found


def python_blocks(markdown: str) -> list[str]:
    return [block.text for block in blocks(markdown) if block.language == "python"]


def program(page: Path) -> list[Block]:
    """Return the blocks to run, with the replacements of the page; reject unused settings."""
    chosen = settings(page)
    unused = set(chosen.replace) | set(chosen.skip)
    found = []
    for block in blocks(page.read_text()):
        if block.language not in ("python", "sh"):
            continue
        first, text = block.text.partition("\n")[0], block.text
        if first in chosen.skip:
            unused.discard(first)
            _check_reason(chosen.skip[first], block)
            continue
        for old, new in chosen.replace.items():
            if old in text:
                unused.discard(old)
                text = text.replace(old, new)
        found.append(Block(block.language, text, block.line))
    if unused:
        raise ValueError(f"{page.name} has nothing of {sorted(unused)} in its blocks")
    return found


def _check_reason(reason: str, block: Block) -> None:
    other = (ROOT / reason).read_text() if reason.endswith(".md") else block.text
    if missing := [line for line in block.text.splitlines() if line not in other]:
        raise ValueError(f"line {block.line}: {reason} does not have {missing[0]!r}")


def furnish(folder: Path, release: Path) -> dict[str, str]:
    """Create the files that pages assume, images and official weights; return the variables to set.

    ``images/`` holds 4 classes of 8 photographs, ``image.jpg`` is one. The weights are random, in
    the official format, in the cache and (a full training state) in the folder.
    """
    photographs, _ = samples.photographs(size=96, train_per_class=8, test_per_class=1)
    for index, label in enumerate(photographs.labels[: 4 * 8]):
        name = photographs.classes[label]
        path = folder / "images" / name / f"{name}_{index % 8}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photographs.read(index)[:72]).save(path, quality=90)
    shutil.copy(path, folder / "image.jpg")
    placed = folder / "home" / "trex_models" / "naver"
    placed.mkdir(parents=True)
    for name in ("trex.pth", "trexstar.pth", "trex_2_checkpoint_full.pth"):
        shutil.copy(release / name, placed)
    (folder / "trex_2_checkpoint_full.pth").symlink_to(placed / "trex_2_checkpoint_full.pth")
    programs = folder / "programs"
    programs.mkdir()
    pip = _PIP.format(project=str(ROOT / "pyproject.toml"))
    make = _MAKE.format(make=shutil.which("make"), root=str(ROOT))
    for name, code in (("pip", pip), ("make", make)):
        command = programs / name
        command.write_text(f"#!{sys.executable}\n{code}")
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
    search = [str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]
    environ = {"PATH": os.pathsep.join(search), "PYTHONPATH": str(ROOT)}
    return {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", **environ}


def run(page: Path, folder: Path, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a page in a folder; its output names the blocks."""
    plan = folder / f".{page.stem}.json"
    plan.write_text(json.dumps(program(page)))
    command = ["-c", _SESSION, plan, page.name]
    return run_python(*command, cwd=folder, env=os.environ | environ, fails=True)
