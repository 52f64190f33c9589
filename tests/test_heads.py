from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models._manipulate import reinit_non_persistent_buffers
from torch import fx, nn

from tests.reference_resnet import embeddings
from trex_models import CosineClassifier, Projector
from trex_models.heads import L2Norm, cosine_logits, widen


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_projector_is_its_formulas(num_layers: int) -> None:
    torch.manual_seed(0)
    projector = Projector(12, num_layers, 20, 5, dtype=torch.float64)
    for _ in range(3):  # move the running statistics
        projector(torch.randn(16, 12, dtype=torch.float64))
    projector.eval()
    x = torch.randn(4, 12, dtype=torch.float64)
    expected = embeddings(projector.state_dict(), x)
    torch.testing.assert_close(projector(x), expected)
    torch.testing.assert_close(projector(3 * x), expected)  # it sees directions alone


def test_projector_initial_values() -> None:
    torch.manual_seed(0)
    weights = Projector(256, 2, 512, 128).state_dict()
    for name, value in weights.items():
        if name.endswith(("fc.weight", "3.weight")):
            assert value.std().item() == pytest.approx(0.02, rel=0.03)
            assert value.abs().max() <= 2
        elif name.endswith("fc.bias"):
            assert not value.any()
    assert "3.bias" not in weights


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        *(
            (Projector, sizes, "hidden_layers >= 0 and widths >= 1")
            for sizes in ((8, -1, 4, 2), (0, 1, 4, 2), (8, 1, 0, 2), (8, 1, 4, 0))
        ),
        *((CosineClassifier, (4, 2, value), "must be positive") for value in (0.0, -1.0, math.nan)),
    ],
)
def test_values_out_of_range(make: Any, arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(*arguments)


def test_cosine_logits_are_scaled_cosines() -> None:
    torch.manual_seed(0)
    z, w = torch.randn(4, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    expected = F.cosine_similarity(z[:, None], w[None], dim=2) / 0.1
    torch.testing.assert_close(cosine_logits(z, w, 0.1), expected)
    torch.testing.assert_close(cosine_logits(5 * z, 2 * w, 0.1), expected)
    w[1] = 0
    z.requires_grad_()
    logits = cosine_logits(z, w, 0.1)
    assert not logits[:, 1].any()
    logits.logsumexp(1).sum().backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_classifier_starts_like_linear() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 3)
    torch.manual_seed(0)
    classifier = CosineClassifier(6, 3)
    assert torch.equal(classifier.weight, linear.weight)
    assert (classifier.in_features, classifier.out_features) == (6, 3)
    assert list(classifier.state_dict()) == ["weight"]
    reinit_non_persistent_buffers(classifier)  # its hook is for transformers alone
    assert torch.equal(classifier.weight, linear.weight)


def test_float32_islands_under_autocast() -> None:
    torch.manual_seed(0)
    z, w = torch.randn(64, 256), torch.randn(10, 256)
    classifier = CosineClassifier(256, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = cosine_logits(z, w, 0.1)
        outside = F.linear(z, w)
        norms = L2Norm()(z)
        from_bfloat16 = classifier(z.bfloat16())
    assert outside.dtype == torch.bfloat16  # autocast was on
    assert logits.dtype == norms.dtype == from_bfloat16.dtype == torch.float32
    assert torch.equal(logits, cosine_logits(z, w, 0.1))
    assert torch.equal(norms, F.normalize(z))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_complete_modules_in_one_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Projector(16, 1, 32, 8), CosineClassifier(8, 4)).eval()
    x = 100 * torch.randn(5, 16)  # the sum of squares overflows float16
    expected = model(x)
    logits = model.to(dtype)(x.to(dtype))
    assert logits.dtype == dtype
    assert widen(logits).dtype == (dtype if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(logits.float(), expected, atol=0.2, rtol=0.05)


def test_plain_symbolic_trace() -> None:
    """Under torch.fx's own tracer, which knows nothing of timm's leaf modules."""
    model = nn.Sequential(Projector(16, 1, 32, 8), CosineClassifier(8, 4)).eval()
    x = torch.randn(3, 16)
    assert torch.equal(fx.symbolic_trace(model)(x), model(x))
