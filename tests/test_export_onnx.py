"""``python -m convert export --to onnx``, with the graphs run in onnxruntime."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms.functional import normalize

from convert import to_onnx
from convert.__main__ import main
from convert.comparison import batches
from tests.models import SIDE, load, write_model
from tests.processes import captured
from trex_models.pretrained import naver

CHANNELS = (8, 16, 24, 32)
HEAD = {"proj_hidden_dim": 32, "proj_dim": 16}
run = partial(captured, main, "export")
NORMALIZE = ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    backbone = {"backbone": "resnet10t", "channels": CHANNELS}
    folder = tmp_path_factory.mktemp("whole")
    return write_model(folder, "trex_resnet", naver.LICENSE, num_classes=7, **backbone, **HEAD)


def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def close(found: np.ndarray, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert tuple(found.shape) == tuple(expected.shape)
    error = np.abs(found - expected.numpy()).max() / expected.abs().max().item()
    assert error < tolerance, error


@torch.no_grad()
def test_complete_models_return_logits_at_any_size(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "whole.onnx"
    status, printed, error = run(whole, "--to", "onnx", "--output", path)
    assert (status, error) == (0, "")
    assert "any batch size, any height and width" in printed
    graph = session(path)
    assert [value.name for value in graph.get_inputs()] == ["images"]
    assert graph.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert [value.name for value in graph.get_outputs()] == ["logits"]
    model = load(whole).double()
    for shape in ((3, 3, 80, 57), (1, 3, SIDE, SIDE), (4, 3, 33, 100)):
        images = torch.randn(shape)
        close(graph.run(None, {"images": images.numpy()})[0], model(images.double()))

    assert list(tmp_path.iterdir()) == [path]  # no external data file
    contents = onnx.load(path)
    facts = {entry.key: entry.value for entry in contents.metadata_props}
    assert [o.version for o in contents.opset_import if not o.domain] == [to_onnx.OPSET]
    assert facts["license"].startswith(naver.LICENSE)
    assert facts["output"] == "logits"
    assert facts["images"] == "float32, RGB, B x 3 x H x W, normalized"
    assert json.loads(facts["preprocessing"])["crop_size"] == SIDE


@torch.no_grad()
def test_pixels_in_embeddings_out(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "pixels.onnx"
    options = ("--features", "projector", "--with-preprocessing", "--half")
    status, printed, _ = run(whole, "--to", "onnx", "--output", path, *options)
    assert status == 0
    assert "embeddings, opset" in printed
    model = load(whole, num_classes=0).double()
    config = resolve_model_data_config(model)
    pixels = torch.randint(0, 256, (3, 80, 57, 3), dtype=torch.uint8)
    images = normalize(pixels.permute(0, 3, 1, 2).double() / 255, config["mean"], config["std"])
    [found] = session(path).run(None, {"images": pixels.numpy()})
    assert found.dtype == np.float32
    close(found, model(images), 1e-2)
    weights = sum(parameter.numel() for parameter in model.parameters())
    stored = onnx.load(path).graph.initializer
    halves = [tensor for tensor in stored if tensor.data_type == onnx.TensorProto.FLOAT16]
    assert sum(math.prod(tensor.dims) for tensor in halves) > 0.9 * weights


@torch.no_grad()
def test_a_transformer_keeps_its_size(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"img_size": SIDE, "embed_dim": 32, "depth": 1, "num_heads": 2}
    folder = write_model(tmp_path / "model", "vit_tiny_patch16_224", num_classes=0, **sizes)
    path = tmp_path / "vit.onnx"
    status, printed, _ = run(folder, "--to", "onnx", "--output", path)
    assert status == 0
    assert f"any batch size, {SIDE} x {SIDE} pixels" in printed
    graph = session(path)
    assert graph.get_inputs()[0].shape == ["batch", 3, SIDE, SIDE]
    images = torch.randn(3, 3, SIDE, SIDE)
    expected = load(folder).double()(images.double())
    close(graph.run(None, {"images": images.numpy()})[0], expected)


def backbone(whole: Path) -> to_onnx.Graph:
    model = load(whole, num_classes=0)
    model.proj = nn.Identity()
    return to_onnx.Graph(model, NORMALIZE).eval()


@torch.no_grad()
def test_a_graph_normalizes_pixels_itself(whole: Path) -> None:
    graph = backbone(whole)
    pixels = torch.randint(0, 256, (2, SIDE, 48, 3), dtype=torch.uint8)
    images = normalize(pixels.permute(0, 3, 1, 2) / 255, *map(list, NORMALIZE))
    torch.testing.assert_close(graph(pixels), graph.model(images), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def exported(whole: Path) -> bytes:
    data: bytes = to_onnx.build_onnx(
        backbone(whole), "features", (3, 32, 32), False, {}
    ).SerializeToString()
    return data


def no_eps(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-12


def swap_layers(model: Any) -> None:
    block = model.layer1[0]
    block.bn1.weight, block.bn2.weight = block.bn2.weight, block.bn1.weight


@pytest.mark.parametrize("mutate", [None, no_eps, swap_layers])
def test_a_wrong_graph_is_found(
    whole: Path, exported: bytes, mutate: Callable[[Any], None] | None
) -> None:
    graph, exact = backbone(whole), backbone(whole).double()
    if mutate:  # changes the source, so the graph differs from it
        mutate(graph.model)
        mutate(exact.model)
    found = to_onnx.compare_onnx(exported, graph, exact, batches(3, [(32, 32)] * 3))
    assert [difference.is_small for difference in found] == [mutate is None] * 3, found
