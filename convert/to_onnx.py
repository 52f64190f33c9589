"""Export of a timm model to an ONNX graph with torch.export, and its check in onnxruntime.

Shapes: B batch size, C channels, H and W height and width in pixels, F features.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convert.comparison import Difference, difference
from trex_models.cli import first_line

SUFFIXES = (".onnx",)
OPSET = 20
# Largest allowed ratio of onnxruntime's error to that of torch at the same precision, both relative
# to float64. A wrong eps changes outputs by 1e-5, float32 rounding by 1e-7 to 1e-5.
_ALLOWANCE = 8
_LEAST_TOLERANCE = 1e-6
_LARGEST = 2**31 - 2**20  # protobuf's limit, minus space for the graph itself


def require_packages() -> None:
    """Raise ValueError unless the packages that write and run ONNX graphs are installed."""
    needed = ("onnx", "onnxscript", "onnxruntime")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--to onnx requires {', '.join(missing)}, not installed; run pip install '.[export]'"
        )


class Graph(nn.Module):
    """Graph to export: float32 or uint8 images in, float32 outputs.

    Args:
        model: Model that maps images (B, C, H, W) to outputs (B, F).
        normalize: Mean and standard deviation per channel, for values in [0, 1]; the graph then
            accepts uint8 images, (B, H, W, C). None: normalized float32 images, (B, C, H, W).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, normalize: tuple[Sequence[float], Sequence[float]] | None
    ) -> None:
        super().__init__()
        self.model = model
        self.normalizes = normalize is not None
        for name, values in zip(("mean", "std"), normalize or ([0.0], [1.0]), strict=True):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the model's output, (B, F), in float32 or float64."""
        if self.normalizes:
            pixels = images.permute(0, 3, 1, 2).to(self.mean.dtype) / 255
            images = (pixels - self.mean) / self.std
        output: Tensor = self.model(images.to(next(self.model.parameters()).dtype))
        return output.float() if output.dtype == torch.float16 else output

    def test_input(self, images: Tensor) -> Tensor:
        """Convert test images, (B, C, H, W) with about unit variance, to the graph's input."""
        if not self.normalizes:
            return images
        return (images * 64 + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()


@torch.no_grad()
def accepts_shape(model: nn.Module, shape: Sequence[int]) -> bool:
    """Return True if a model accepts images of a shape, (B, C, H, W)."""
    try:
        model(torch.zeros(*shape))
    except (AssertionError, RuntimeError):  # raised by timm's models and by torch, respectively
        return False
    return True


def build_onnx(
    graph: Graph,
    output: str,
    size: tuple[int, int, int],
    any_size: bool,
    metadata: Mapping[str, str],
) -> Any:
    """Export a graph in eval mode to an onnx.ModelProto with dynamic batch size.

    Args:
        graph: Graph to export.
        output: Name of the graph's output.
        size: Number of channels, height and width of the model's default input.
        any_size: Make height and width dynamic, too.
        metadata: Metadata of the file.
    """
    import onnx

    weights = sum(tensor.nbytes for tensor in graph.state_dict().values())
    half = next(graph.model.parameters()).dtype == torch.float16
    if weights > _LARGEST:
        raise ValueError(
            f"the weights are {weights / 1e9:.1f} GB, but an ONNX file is limited to 2 GB"
            f"{'' if half else '; --half halves their size'}"
        )
    channels, height, width = size
    # Unequal, non-default sides keep torch.export from specializing dynamic ones.
    scale = (2, 3) if any_size else (1, 1)
    images = torch.zeros(2, channels, scale[0] * height, scale[1] * width)
    names = {0: "batch"}
    if any_size:
        first = 1 if graph.normalizes else 2
        names |= {first: "height", first + 1: "width"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's exporter warns about torch's code
            program = torch.onnx.export(
                graph,
                kwargs={"images": graph.test_input(images)},
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=[output],
                dynamic_shapes={"images": names},
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        raise ValueError(f"torch cannot export this model ({first_line(error)})") from error
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model)
    return model


@torch.no_grad()
def compare_onnx(
    data: bytes, graph: Graph, exact: Graph, batches: Iterable[Tensor]
) -> list[Difference]:
    """Compare an ONNX file in onnxruntime on the CPU with the source in float64.

    ``exact`` is the source graph in float64, with weights that were never rounded to float16.
    """
    import onnxruntime

    differences = []
    try:
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        for batch in batches:
            images = graph.test_input(batch)
            [values] = session.run(None, {"images": images.numpy()})
            expected = exact(images if graph.normalizes else images.double())
            torch_error = difference(images, graph(images), expected, 0).relative
            tolerance = max(_LEAST_TOLERANCE, _ALLOWANCE * torch_error)
            differences.append(difference(images, torch.from_numpy(values), expected, tolerance))
    except Exception as error:  # onnxruntime's errors have no common class
        raise ValueError(f"onnxruntime cannot run the graph ({first_line(error)})") from error
    return differences
