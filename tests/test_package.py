"""What is installed, what imports what."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import trex_models

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trex_models"

# What each part may import of this package; a part may always import itself.
# Longest prefix counts. Everything may import heads.
ALLOWED: dict[str, set[str]] = {
    "heads": set(),
    "checkpoints": {"unpickling"},
    "unpickling": set(),
    "licenses": {"checkpoints", "manifest", "naver", "weights"},
    "cli": set(),
    "precision": {"cli"},
    "files": set(),
    "folders": {"files"},
    "machine": set(),
    "manifest": {"files"},
    "naver": {"checkpoints", "files", "manifest"},
    "weights": {"checkpoints", "manifest", "naver"},
    "trex": {"checkpoints", "licenses", "naver", "weights"},
    "data": set(),
    "evaluation": {"cli", "data", "files", "folders", "licenses", "precision"},
    "train": {  # its __init__ alone, which names the public parts
        *("train.backbone", "train.bank", "train.look", "train.method", "train.momentum"),
        *("train.objectives", "train.optimizer"),
    },
    "train.config": {"precision"},
    "train.bank": set(),
    "train.distributed": {"precision"},
    "train.momentum": set(),
    "train.optimizer": set(),
    "train.backbone": set(),
    "train.recompute": set(),
    "train.objectives": {"train.bank"},
    "train.look": {"train.bank", "train.objectives"},
    "train.health": {"train.bank", "train.objectives"},
    "train.initial": {"checkpoints", "licenses", "manifest", "train"},
    "train.unreadable": {"files", "train.distributed"},
    "train.summary": {"train.reporting"},
    "train.method": {"train.distributed", "train.momentum", "train.objectives"},
    "train.step": {"precision", "train.method", "train.recompute"},
    "train.checkpointing": {"checkpoints", "files", "train.config"},
    "train.preflight": {"data"},
    "train.reporting": {"files", "train.distributed"},
    "train.signals": {"data", "train.distributed"},
    "train.validation": {
        *("data", "evaluation", "precision", "train.distributed", "train.method"),
    },
    "train.export": {
        *("checkpoints", "folders", "train.checkpointing", "train.method", "train.objectives"),
    },
    "train.build": {"data", "machine", "train"},
    "train.run": {"data", "licenses", "naver", "precision", "train"},
    "train.saved": {"checkpoints", "licenses", "precision", "train"},
    "train.loop": {"data", "train"},
    "train.advice": set(),
    "train.benchmark": {"data", "machine", "train"},
    "train.__main__": {"cli", "train"},
    "demo": {"cli", "data", "evaluation", "train", "transfer"},
    "transfer": {
        *("cli", "data", "evaluation", "files", "machine", "precision", "unpickling"),
    },
    "features": {"cli", "data", "evaluation", "machine", "precision", "transfer"},
    "plot": {"cli", "files", "train.config"},
    "": {"checkpoints", "manifest", "trex"},
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


def allowed_for(module: str) -> set[str]:
    prefix = max(
        (key for key in ALLOWED if module == key or (key and module.startswith(f"{key}."))), key=len
    )
    own = {prefix} if prefix not in ("", "train") else set()
    return ALLOWED[prefix] | own | {"heads"} if module != "heads" else set()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_imports_run_one_way(path: Path) -> None:
    allowed = allowed_for(module_name(path))
    for name in imported_modules(path):
        assert any(name == a or name.startswith(f"{a}.") for a in allowed), (
            f"{module_name(path)} imports {name}"
        )


def test_rules_of_imports_can_fail(tmp_path: Path) -> None:
    path = tmp_path / "bank.py"
    path.write_text("from trex_models.train.loop import train\n")
    assert imported_modules(path) == {"train.loop.train"}
    allowed = allowed_for("train.bank")
    assert not any(name.startswith(a) for name in imported_modules(path) for a in allowed)


def test_importing_the_package_loads_no_extras() -> None:
    code = (
        "import sys, trex_models; "
        "print([m for m in ('tyro', 'sklearn', 'skimage', 'matplotlib', 'simplejpeg', "
        "'trex_models.train', 'trex_models.data') if m in sys.modules]); "
        # None stands for what is not installed; the parts of the library need no extras either.
        "extras = 'simplejpeg tyro datasets pyarrow matplotlib sklearn scipy skimage tensorboard'; "
        "sys.modules |= dict.fromkeys(extras.split()); "
        "import trex_models.data, trex_models.evaluation, trex_models.train; "
        "print([m for m in ('loop', 'config') if f'trex_models.train.{m}' in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["[]", "[]"]


def test_importing_the_package_loads_nothing_that_timm_does_not() -> None:
    code = (
        "import sys, timm; known = set(sys.modules); import trex_models; "
        "print(*sorted(set(sys.modules) - known))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = "checkpoints files heads licenses manifest naver trex unpickling weights".split()
    assert out.stdout.split() == ["trex_models", *(f"trex_models.{name}" for name in modules)]


@pytest.mark.slow
def test_wheel_holds_the_package_alone_and_works_outside_the_checkout(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"trex_models-{trex_models.__version__}-py3-none-any")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"trex_models", f"trex_models-{trex_models.__version__}.dist-info"}
    assert {"trex_models/py.typed", "trex_models/manifest.json"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.endswith("licenses/NOTICE") for name in names)

    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    code = (
        "import trex_models, timm; print(trex_models.__file__); "
        "print(timm.create_model('trex_resnet50_proj').head_hidden_size)"
    )
    # -P and -S -like isolation: the checkout is installed in development mode, so put ours first.
    run = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {code}"]
    out = subprocess.run(run, capture_output=True, text=True, check=True, cwd=tmp_path)
    location, width = out.stdout.split()
    assert Path(location).is_relative_to(site)
    assert width == "256"
