"""Export a timm model to an ONNX graph by torch.export, and compare it in onnxruntime.

Shapes: B batch, C channels, H, W height and width in pixels.
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
# onnxruntime may be this much farther from float64 than torch is in the graph's own type. A
# wrong eps is 1e-5 of the outputs; float32 is off by 1e-7 to 1e-5.
_ALLOWANCE = 8
_LEAST_TOLERANCE = 1e-6
_LARGEST = 2**31 - 2**20  # protobuf's limit, and room for what is not weights


def require_packages() -> None:
    """Raise ValueError unless the packages that write and run graphs are installed."""
    needed = ("onnx", "onnxscript", "onnxruntime")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--to onnx needs {', '.join(missing)}, which is not installed: pip install '.[export]'"
        )


class Graph(nn.Module):
    """The exported graph: float32 or uint8 images in, float32 out.

    Args:
        model: Maps (B, C, H, W) to (B, F).
        normalize: Mean and standard deviation of the channels, for values in [0, 1]: images are
            then uint8, (B, H, W, C). None for normalized float32 images, (B, C, H, W).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, normalize: tuple[Sequence[float], Sequence[float]] | None
    ) -> None:
        super().__init__()
        self.model = model
        self.takes_pixels = normalize is not None
        for name, values in zip(("mean", "std"), normalize or ([0.0], [1.0]), strict=True):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the model's output, (B, F), float32 at least."""
        if self.takes_pixels:
            pixels = images.permute(0, 3, 1, 2).to(self.mean.dtype) / 255
            images = (pixels - self.mean) / self.std
        output: Tensor = self.model(images.to(next(self.model.parameters()).dtype))
        return output.float() if output.dtype == torch.float16 else output

    def test_input(self, images: Tensor) -> Tensor:
        """Return test images, (B, C, H, W) of about unit variance, as the graph takes them."""
        if not self.takes_pixels:
            return images
        return (images * 64 + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()


@torch.no_grad()
def takes_other_sizes(model: nn.Module, shape: Sequence[int]) -> bool:
    """Return whether a model takes images of another shape, (B, C, H, W), than its own."""
    try:
        model(torch.zeros(*shape))
    except (AssertionError, RuntimeError):  # of timm's models and of torch
        return False
    return True


def build_onnx(
    graph: Graph,
    output: str,
    size: tuple[int, int, int],
    any_size: bool,
    metadata: Mapping[str, str],
) -> Any:
    """Return the onnx.ModelProto of a graph in eval mode, for any batch size.

    Args:
        graph: The graph.
        output: Name of the output.
        size: C, H and W of the model's own images.
        any_size: Leave height and width open.
        metadata: The file's metadata.
    """
    import onnx

    weights = sum(tensor.nbytes for tensor in graph.state_dict().values())
    half = next(graph.model.parameters()).dtype == torch.float16
    if weights > _LARGEST:
        raise ValueError(
            f"the weights are {weights / 1e9:.1f} GB, and one ONNX file holds 2"
            f"{'' if half else '; --half halves them'}"
        )
    channels, height, width = size
    # Open sides must not be specialized to the model's own, nor to be equal.
    scale = (2, 3) if any_size else (1, 1)
    images = torch.zeros(2, channels, scale[0] * height, scale[1] * width)
    names = {0: "batch"}
    if any_size:
        first = 1 if graph.takes_pixels else 2
        names |= {first: "height", first + 1: "width"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about its own code
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
    """Compare a file in onnxruntime, on the CPU, with the source in float64, on float32 images.

    ``exact`` is the graph in float64, with weights that were not rounded to float16.
    """
    import onnxruntime

    found = []
    try:
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        for batch in batches:
            images = graph.test_input(batch)
            [values] = session.run(None, {"images": images.numpy()})
            expected = exact(images if graph.takes_pixels else images.double())
            own = difference(images, graph(images), expected, 0).relative
            tolerance = max(_LEAST_TOLERANCE, _ALLOWANCE * own)
            found.append(difference(images, torch.from_numpy(values), expected, tolerance))
    except Exception as error:  # onnxruntime's have no class in common
        raise ValueError(f"onnxruntime cannot run the graph ({first_line(error)})") from error
    return found
