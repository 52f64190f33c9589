"""Logistic regression compared with scikit-learn, autograd and the plain formula."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from trex_models.evaluation.logistic import (
    LogisticFit,
    _losses,
    fit,
    fit_path,
    objective,
    principal_axes,
)


@cache
def digits() -> tuple[Tensor, Tensor, Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).float() / 4
    return x[:600], torch.from_numpy(labels)[:600], x[600:]


def clusters(samples: int = 90, width: int = 7, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(samples + width)
    labels = torch.arange(samples) % classes
    centers = torch.randn(classes, width, generator=generator)
    return 3 + centers[labels] + torch.randn(samples, width, generator=generator), labels


def plain_objective(x: Tensor, y: Tensor, fitted: LogisticFit) -> Tensor:
    weight, intercept = fitted.weight.double(), fitted.intercept.double()
    losses = F.cross_entropy(x.double() @ weight.T + intercept, y, reduction="sum")
    return fitted.C * losses + 0.5 * weight.square().sum()


def scikit_learn(x: Tensor, y: Tensor, strength: float) -> LogisticRegression:
    """Fit by Newton's method, which reaches the optimum; its lbfgs does not for large C."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about unreached last digits
        model = LogisticRegression(C=strength, tol=1e-9, solver="newton-cholesky")
        return model.fit(x.double().numpy(), y.numpy())


def scikit_learn_objective(x: Tensor, y: Tensor, model: LogisticRegression) -> float:
    weight, intercept = torch.as_tensor(model.coef_), torch.as_tensor(model.intercept_)
    return objective(x.double(), y, weight, intercept, model.C)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strength", [1e-5, 1e-2, 1.0, 10.0])
def test_digits_as_scikit_learn_classifies_them(strength: float, dtype: torch.dtype) -> None:
    x, y, test = digits()
    reference = scikit_learn(x, y, strength)
    fitted = fit(x.to(dtype), y, strength)
    assert fitted.converged
    assert fitted.weight.dtype == dtype
    assert fitted.objective == pytest.approx(scikit_learn_objective(x, y, reference), rel=2e-5)
    votes = fitted.logits(test).argmax(1).numpy()
    assert (votes == reference.predict(test.numpy())).mean() >= 0.999


def test_float64_reaches_scikit_learns_weights() -> None:
    x, y = clusters()
    reference = scikit_learn(x, y, 0.5)
    fitted = fit(x.double(), y, 0.5, tolerance=1e-14)
    np.testing.assert_allclose(fitted.weight, reference.coef_, atol=1e-6)
    np.testing.assert_allclose(fitted.intercept, reference.intercept_, atol=1e-6)
    x, y = clusters(classes=2)  # scikit-learn needs twice the C
    fitted = fit(x.double(), y, 0.5, tolerance=1e-14)
    reference = scikit_learn(x, y, 1.0)
    np.testing.assert_allclose(fitted.weight.diff(dim=0), reference.coef_, atol=1e-6)


def test_objective_is_the_plain_formula_with_the_promised_excess() -> None:
    x, y, _ = digits()
    for fitted in fit_path(x, y, [1e-4, 1.0, 1e4]):
        expected = plain_objective(x, y, fitted).item()
        assert fitted.objective == pytest.approx(expected, rel=1e-4)
        parameters = fitted.weight.double(), fitted.intercept.double()
        assert objective(x, y, *parameters, fitted.C) == pytest.approx(expected, rel=1e-9)
    least = fit(x.double(), y, 1.0, tolerance=1e-10).objective
    for tolerance in (1e-2, 1e-4):
        fitted = fit(x.double(), y, 1.0, tolerance=tolerance)
        assert least <= fitted.objective <= least * (1 + tolerance)


def test_losses_far_below_rounding_of_one_keep_their_precision() -> None:
    losses, gradient = _losses(torch.tensor([[30.0, 0.0, 0.0]]), torch.tensor([[0]]))
    expected = 2 * np.exp(-30.0)
    assert losses.item() == pytest.approx(expected, rel=1e-5)
    assert gradient[0].tolist() == pytest.approx([-expected, expected / 2, expected / 2], rel=1e-5)


def test_reported_gradient_is_that_of_the_objective() -> None:
    x, y, _ = digits()
    x = x.double() - x.double().mean(0)
    fitted = fit(x, y, 0.1, tolerance=1e-3)
    parameters = fitted.weight.clone().requires_grad_(), fitted.intercept.clone().requires_grad_()
    differentiable = replace(fitted, weight=parameters[0], intercept=parameters[1])
    gradients = torch.autograd.grad(plain_objective(x, y, differentiable), parameters)
    norm = sum(gradient.square().sum() for gradient in gradients) ** 0.5
    assert fitted.gradient_norm == pytest.approx(float(norm), rel=1e-6)


def test_a_path_extrapolates_its_last_two_fits() -> None:
    x, y, _ = digits()
    strengths = np.logspace(-3, 2, 11).tolist()
    path = fit_path(x, y, strengths)
    assert [fitted.C for fitted in path] == strengths
    cold = [fit(x, y, strength) for strength in strengths]
    assert sum(a.iterations for a in path) < 0.3 * sum(a.iterations for a in cold)
    for along, again, alone in zip(path, fit_path(x, y, strengths), cold, strict=True):
        assert along.converged
        assert torch.equal(along.weight, again.weight)
        assert along.objective == pytest.approx(alone.objective, rel=2e-5)
    strengths = [1e-6, 1e-6, 2.0, 2.0, 2.1, 1e5, 1e5]
    path = fit_path(x, y, strengths)
    assert [path[index].iterations <= 1 for index in (1, 3, 6)] == [True] * 3
    for strength, fitted in zip(strengths, path, strict=True):
        assert fitted.converged
        assert fitted.objective == pytest.approx(fit(x, y, strength).objective, rel=2e-5)
    with pytest.raises(ValueError, match=r"ascend, got 0.1 after 1.0; sort them"):
        fit_path(x, y, [1.0, 0.1])
    assert fit_path(x, y, []) == []


def test_starts_at_the_shares_of_the_classes_and_ignores_constant_features() -> None:
    x, y = clusters()
    y[:20] = 0
    fitted = fit(x, y, 1e-12)
    shares = y.bincount() / len(y)
    torch.testing.assert_close(fitted.intercept.softmax(0), shares)
    x, y = clusters()
    fitted = fit(torch.cat([x, torch.full_like(x, 5.0)], 1), y, 1.0)
    assert fitted.weight[:, 7:].abs().max() < 1e-5
    assert fitted.objective == pytest.approx(fit(x, y, 1.0).objective, rel=2e-5)


@pytest.mark.parametrize("shape", [(90, 7), (20, 50)])
@pytest.mark.parametrize("chunk", [1, 13])
def test_blocks_change_nothing(shape: tuple[int, int], chunk: int) -> None:
    x, y = clusters(*shape)
    whole = fit(x.double(), y, 1.0, tolerance=1e-12)
    blocks = fit(x.double(), y, 1.0, tolerance=1e-12, chunk=chunk)
    torch.testing.assert_close(blocks.weight, whole.weight, atol=1e-5, rtol=0)
    assert blocks.objective == pytest.approx(whole.objective, rel=1e-10)


@pytest.mark.parametrize(
    ("shape", "strengths", "excess"),
    [((20, 50), [1.0], 2e-5), ((90, 30), [1.0, 1e3, 1e6], 1e-3)],
    ids=["more features than samples", "large C on separable classes"],
)
def test_scikit_learns_objective(
    shape: tuple[int, int], strengths: list[float], excess: float
) -> None:
    x, y = clusters(*shape)
    expected = scikit_learn_objective(x, y, scikit_learn(x, y, strengths[-1]))
    assert fit_path(x, y, strengths)[-1].objective <= expected * (1 + excess)


def test_other_types_are_widened() -> None:
    x, y = clusters()
    for narrow in (x.half(), x.bfloat16(), (10 * x).long()):
        assert torch.equal(fit(narrow, y, 1.0).weight, fit(narrow.float(), y, 1.0).weight)
    is_positive = x[:, 0] > 3
    assert fit(x, is_positive, 1.0).objective == fit(x, is_positive.int(), 1.0).objective


@pytest.mark.parametrize("width", [64, 20], ids=["more features", "more samples"])
def test_axes_of_a_set_serve_its_parts(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.randn(60, width, generator=generator) * torch.arange(1, width + 1) ** -0.7
    x = (x + 0.3 * torch.randn(3, width, generator=generator)[y]).double()
    axes = principal_axes(x)
    assert axes.shape == (width, min(60, width))
    part = torch.arange(60) % 5 != 0
    for shared, own in zip(
        fit_path(x[part], y[part], [0.1, 10.0], axes=axes, tolerance=1e-10),
        fit_path(x[part], y[part], [0.1, 10.0], tolerance=1e-10),
        strict=True,
    ):
        assert shared.converged
        torch.testing.assert_close(shared.weight, own.weight, rtol=1e-3, atol=1e-4)
        assert shared.objective == pytest.approx(own.objective, rel=1e-9)
    with pytest.raises(ValueError, match="row 7 has a NaN"):
        principal_axes(x.index_fill(0, torch.tensor([7]), torch.nan))


def test_progress_and_the_end_of_patience() -> None:
    x, y, _ = digits()
    calls: list[tuple[float, int, float, float]] = []
    fitted = fit(x, y, 1.0, max_iterations=4, progress=lambda *args: calls.append(args))
    assert not fitted.converged
    assert fitted.iterations == 4
    assert [(strength, iteration) for strength, iteration, *_ in calls] == [
        (1.0, i) for i in range(5)
    ]
    values = [value for *_, value, _ in calls]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(fitted.objective, rel=1e-5)


X, Y = clusters()
NAN = X.index_fill(0, torch.tensor([4]), torch.nan)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"C": 0.0}, "C must be positive and finite, got 0.0"),
        ({"C": float("nan")}, "C must be positive and finite, got nan"),
        ({"C": float("inf")}, "C must be positive and finite, got inf"),
        ({"features": X[0]}, r"features must be of shape \(N, F\) .*got \(7,\)"),
        ({"features": X[:0], "labels": Y[:0]}, "not empty"),
        ({"features": NAN}, "features must be finite, but row 4"),
        ({"features": X * 1e18}, "features reach .*e.18, too large for torch.float32; scale"),
        ({"labels": Y[:-1]}, r"labels of the features must be 90 integers, .* of shape \(89,\)"),
        ({"labels": Y.float()}, "must be 90 integers, .* got torch.float32"),
        ({"labels": Y - 1}, "labels must be 0 to K - 1.*got 3 different labels from -1 to 1"),
        ({"labels": Y * 0}, "K at least 2.* got 1 different labels from 0 to 0"),
        ({"labels": Y * 2}, "each must occur, got 3 different labels from 0 to 4.*torch.unique"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(**{"features": X, "labels": Y, "C": 1.0, **arguments})


def test_convergence_is_not_claimed_where_rounding_spoils_the_intercept() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(60, 5), torch.arange(60) % 3
    assert fit(x, y, 1.0).converged
    assert not fit(x + 1e7, y, 1.0).converged
