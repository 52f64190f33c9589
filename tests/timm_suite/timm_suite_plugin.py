"""A pytest plugin that puts our models into timm's own tests, next to its ``resnet50``.

Loaded by tests/test_timm_suite.py in a pytest process over timm's source distribution. timm's
tests name their models in three ways, and each gets ``resnet50`` and ours in place of its own:

- ``parametrize("model_name", list_models(...))``: where timm's list holds ``resnet50``.
- ``parametrize("model_name", ["resnet18", ...])``: the rest of each row is kept, except that
  arguments meant for one architecture (dicts) are emptied.
- ``create_model("resnet18")`` or ``"test_resnet"`` in the body: the name means each of ours.

Many such tests are about other architectures. So ``resnet50`` runs first, and ours are skipped
where it does not pass. Untrained weights take the place of those of the Hub.
"""

from __future__ import annotations

import inspect
import math
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import timm.models._builder
import timm.models._factory
import torch
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg
from torch import Tensor
from torch.nn import init

import trex_models  # noqa: F401  # registers the models
from trex_models.pretrained import resolve

STOCK = "resnet50"
# One model of each kind; the others differ only in the depth of the projector.
OURS = ["trex_resnet", "trex_resnet50", "trex_resnet50_cls", "trexstar_resnet50_proj"]
FOLDER = tempfile.TemporaryDirectory()
WEIGHTS = Path(FOLDER.name)
STAND_IN = re.compile(r"(?:create_model|resolve_model_input_args)\(\s*'(?:test_resnet|resnet18)'")

# Random initialization would take most of the time.
NUMBERS = torch.randn(1 << 24)
NOT_PASSED: set[str] = set()
PASSED: set[str] = set()

_list_models = timm.list_models
_split_name = timm.models._factory.split_model_name_tag


def list_models(*args: Any, **kwargs: Any) -> list[str]:
    """Return resnet50 and our models if timm's list contains resnet50, otherwise nothing."""
    names = _list_models(*args, **kwargs)
    stock = next((name for name in names if name.split(".")[0] == STOCK), None)
    if stock is None:
        return []
    if "." not in stock:
        return [stock, *OURS]
    pretrained = kwargs.get("pretrained", False)
    tagged = _list_models("trex*", pretrained=pretrained, include_tags=True)
    return [stock, *(name for name in tagged if name.split(".")[0] in OURS)]


def fetch(name: str, cache_dir: object = None) -> Path:  # noqa: ARG001
    path = WEIGHTS / f"{name}.safetensors"
    if not path.exists():
        cfg = get_pretrained_cfg(name)
        assert cfg is not None
        model = timm.create_model(name, num_classes=cfg.num_classes)
        save_file(model.state_dict(), path)
    return path


def load_state_dict_from_hf(*_args: Any, **_kwargs: Any) -> Any:
    return timm.create_model(STOCK).state_dict()


@torch.no_grad()
def kaiming(
    tensor: Tensor,
    a: float = 0,
    mode: init._FanMode = "fan_in",
    nonlinearity: init._NonlinearityType = "leaky_relu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Initialize from precomputed normal numbers, starting at a random position."""
    if tensor.is_meta:
        return tensor
    fan = init._calculate_correct_fan(tensor, mode)
    std = init.calculate_gain(nonlinearity, a) / math.sqrt(fan)
    last = len(NUMBERS) - tensor.numel()
    first = torch.randint(last, (), generator=generator, device="cpu").item()
    return tensor.copy_(NUMBERS[first : first + tensor.numel()].view_as(tensor)).mul_(std)


timm.list_models = list_models
timm.models._builder.load_state_dict_from_hf = load_state_dict_from_hf
resolve.fetch = fetch
init.kaiming_normal_ = init.kaiming_uniform_ = kaiming


@pytest.fixture
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace the names of small ResNets in a test by the model under test."""

    stood_in = []

    def split_name(name: str, no_tag: str = "") -> tuple[str, str]:
        if name in ("test_resnet", "resnet18"):
            stood_in.append(name)
            return request.param, no_tag
        return _split_name(name, no_tag)

    monkeypatch.setattr(timm.models._factory, "split_model_name_tag", split_name)
    yield
    assert stood_in, "the test built none of the ResNets that it names"


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for mark in metafunc.definition.iter_markers("parametrize"):
        names, rows = mark.args
        argnames = names.split(",") if isinstance(names, str) else names
        if argnames[0].strip() not in ("model_name", "name") or not isinstance(rows, list):
            continue
        if len(argnames) == 1:
            # Empty lists come from list_models with filters that exclude ResNets.
            if rows and rows[0].split(".")[0] != STOCK:
                rows[:] = [STOCK, *OURS]
            return
        tails = {repr(tail): tail for tail in map(_tail, rows)}
        rows[:] = [(name, *tail) for tail in tails.values() for name in (STOCK, *OURS)]
        return
    if STAND_IN.search(inspect.getsource(metafunc.function)):
        metafunc.fixturenames.append("stand_in")
        metafunc.parametrize("stand_in", [STOCK, *OURS], indirect=True)


def _tail(row: Any) -> list[Any]:
    values = getattr(row, "values", row)
    return [{} if isinstance(value, dict) else value for value in values[1:]]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    selected, deselected = [], []
    for item in items:
        params = dict(getattr(item, "callspec", _NoParams).params)
        name = next((params.pop(k) for k in ("model_name", "name", "stand_in") if k in params), "")
        model = str(name).split(".")[0]
        key = f"{item.nodeid.partition('[')[0]} {sorted(params.items(), key=str)}"
        # With vit=True, the test builds no ResNet.
        if model in (STOCK, *OURS) and not params.get("vit"):
            item.user_properties += [("model", model), ("key", key)]
            selected.append(item)
        else:
            deselected.append(item)
    config.hook.pytest_deselected(items=deselected)
    items[:] = sorted(selected, key=lambda item: ("model", STOCK) not in item.user_properties)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    properties = dict(item.user_properties)
    if properties["model"] != STOCK and properties["key"] not in PASSED - NOT_PASSED:
        pytest.skip(f"{STOCK} does not pass it")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    properties = dict(report.user_properties)
    if properties["model"] == STOCK:
        if not report.passed:
            NOT_PASSED.add(str(properties["key"]))
        elif report.when == "call":
            PASSED.add(str(properties["key"]))


class _NoParams:
    params: ClassVar[dict[str, Any]] = {}
