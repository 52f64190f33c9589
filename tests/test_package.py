"""What is installed, what imports what."""

from __future__ import annotations

import ast
import re
import zipfile
from functools import partial
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import trex_models
from tests.processes import run_python

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trex_models"

# From the lowest to the highest: a part may import those of the lines above, and of its own line.
ORDER = """
    heads atomic cli
    precision plotting
    pretrained data
    distributed
    method
    trex evaluation
    train transfer
    features
    demo plot
"""
RANK = {part: rank for rank, line in enumerate(ORDER.split("\n")) for part in line.split()}
# Besides: the models need neither training nor data, the method is free of files, and the trainer
# and the transfer suite stay apart.
FORBIDDEN = {
    "": set(RANK) - {"heads", "pretrained", "trex"},
    "pretrained": {"cli", "data", "precision"},
    "trex": {"cli", "data", "distributed", "method", "precision"},
    "data": {"pretrained"},
    "method": {"atomic", "data", "pretrained"},
    "evaluation": {"distributed", "method", "trex"},
    "train": {"transfer"},
    "transfer": {"distributed", "method", "train"},
    "features": {"distributed", "method", "train"},
    "plot": {"evaluation", "features", "transfer"},
}
# Only these have a run's configuration in hand.
SEE_CONFIG = {
    *("demo", "plot", "train.__main__", "train.auto", "train.benchmark", "train.build"),
    *("train.checkpointing", "train.export", "train.loop", "train.recipes", "train.run"),
    "train.setup",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> set[str]:
    """Names of the package's modules that a file imports, with the package's prefix removed."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {n.removeprefix("trex_models.") for n in names if n.startswith("trex_models.")}
    return found


def forbidden(module: str, imported: str) -> bool:
    """Whether a module must not import a name of the package, both without the package's name."""
    own, other = module.split(".")[0], imported.split(".")[0]
    if imported.startswith("train.config"):
        return module not in SEE_CONFIG
    if own == other or (not own and other == "__version__"):
        return False
    return other in FORBIDDEN.get(own, set()) or (own != "" and RANK[other] > RANK[own])


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_imports_run_one_way(path: Path) -> None:
    wrong = [n for n in imported_modules(path) if forbidden(module_name(path), n)]
    assert not wrong, f"{module_name(path)} imports {', '.join(wrong)}"


def test_no_two_modules_import_each_other() -> None:
    graph = {
        module_name(path): {
            other
            for name in imported_modules(path)
            for other in (name, name.rpartition(".")[0])
            if (PACKAGE / f"{other.replace('.', '/')}.py").is_file()
        }
        for path in PACKAGE.rglob("*.py")
    }
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_tests_share_helpers_and_not_other_tests() -> None:
    for path in sorted(Path(__file__).parent.glob("*.py")):
        assert not re.search(r"^\s*(from|import) tests[. ].*\btest_", path.read_text(), re.M), path


def test_importing_the_package_loads_no_extras_and_nothing_that_timm_does_not() -> None:
    code = (
        "import sys, trex_models; "
        "print([m for m in ('tyro', 'sklearn', 'skimage', 'matplotlib', 'simplejpeg', "
        "'trex_models.train', 'trex_models.data') if m in sys.modules]); "
        # None is for what is not installed; the parts of the library need no extras either.
        "extras = 'simplejpeg tyro datasets pyarrow matplotlib sklearn scipy skimage tensorboard'; "
        "sys.modules |= dict.fromkeys(extras.split()); "
        "import trex_models.data, trex_models.evaluation, trex_models.train; "
        "print([m for m in ('loop', 'config') if f'trex_models.train.{m}' in sys.modules])"
    )
    assert run_python("-c", code).stdout.split() == ["[]", "[]"]
    code = (
        "import sys, timm; known = set(sys.modules); import trex_models; "
        "print(*sorted(set(sys.modules) - known))"
    )
    out = run_python("-c", code)
    pretrained = "checkpoints download licenses manifest naver resolve unpickling".split()
    modules = ["atomic", "heads", "pretrained", *(f"pretrained.{name}" for name in pretrained)]
    expected = ["trex_models", *(f"trex_models.{name}" for name in (*modules, "trex"))]
    assert out.stdout.split() == expected


@pytest.mark.slow
def test_the_wheel_contains_only_the_package_and_works_elsewhere(tmp_path: Path) -> None:
    pip = partial(run_python, "-m", "pip", "--quiet", "--disable-pip-version-check")
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"trex_models-{trex_models.__version__}-py3-none-any")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"trex_models", f"trex_models-{trex_models.__version__}.dist-info"}
    assert {"trex_models/py.typed", "trex_models/pretrained/manifest.json"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.endswith("licenses/NOTICE") for name in names)

    site = tmp_path / "site"
    pip("install", "--no-deps", "--target", site, wheel)
    code = (
        "import trex_models, timm; print(trex_models.__file__); "
        "print(timm.create_model('trex_resnet50_proj').head_hidden_size)"
    )
    # -P and -S -like isolation: the checkout is installed in development mode, so put ours first.
    code = f"import sys; sys.path.insert(0, {str(site)!r}); {code}"
    location, width = run_python("-c", code, cwd=tmp_path).stdout.split()
    assert Path(location).is_relative_to(site)
    assert width == "256"
