"""Linear layers of a grid, each compared with torch.optim.SGD."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trex_models.evaluation import linear
from trex_models.evaluation.linear import (
    Samples,
    Setting,
    accuracies,
    fit,
    fitted_accuracies,
    settings_at_once,
)

SETTINGS = [Setting(1.0, 1e-2), Setting(10.0, 0.0), Setting(0.3, 1e-1), Setting(3.0, 1e-6)]
CPU = torch.device("cpu")
train: Any = partial(fit, num_classes=3, device=CPU, epochs=4, batch_size=16)


def sample() -> Samples:
    """Return 50 features of different norms, one all zero; 45 are used for training."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 6, generator=generator) * torch.arange(50).view(-1, 1)
    labels = torch.randint(3, (50,), generator=generator)
    return Samples(features, labels, torch.cat([torch.tensor([0]), torch.arange(6, 50)]))


def by_torch(samples: Samples, setting: Setting, epochs: int, batch: int, seed: int) -> nn.Linear:
    x = F.normalize(samples.features.float(), dim=1)
    layer = nn.Linear(x.shape[1], 3)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    sgd = torch.optim.SGD(
        layer.parameters(), lr=1.0, momentum=0.9, weight_decay=setting.weight_decay
    )
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        sgd.param_groups[0]["lr"] = setting.learning_rate * (1 + math.cos(math.pi * epoch / epochs))
        sgd.param_groups[0]["lr"] /= 2
        shuffled = samples.rows[torch.randperm(len(samples.rows), generator=order)]
        for rows in shuffled.split(batch):
            sgd.zero_grad()
            F.cross_entropy(layer(x[rows]), samples.labels[rows]).backward()
            sgd.step()
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_each_layer_is_torchs_sgd(dtype: torch.dtype) -> None:
    samples = sample()._replace(features=sample().features.to(dtype))
    layers = train(samples, SETTINGS, seed=3)
    scores = accuracies(layers, samples, batch_size=7)
    for i, setting in enumerate(SETTINGS):
        reference = by_torch(samples, setting, epochs=4, batch=16, seed=3)
        torch.testing.assert_close(layers.weight[i], reference.weight.detach())
        torch.testing.assert_close(layers.bias[i], reference.bias.detach())
        x = F.normalize(samples.features[samples.rows].float(), dim=1)
        logits = reference(x)
        torch.testing.assert_close(layers.logits(x)[:, i], logits.detach(), rtol=1e-4, atol=1e-4)
        right = logits.argmax(1) == samples.labels[samples.rows]
        assert scores[i] == right.double().mean().item()
    assert len(set(scores)) > 1


def test_groups_are_as_large_as_memory_allows_and_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    samples = sample()
    tests = samples._replace(rows=torch.arange(1, 6))
    layers = train(samples, SETTINGS)
    sizes = []

    def watched(samples: Samples, settings: Any, **options: Any) -> linear.Layers:
        sizes.append(len(settings))
        return fit(samples, settings, **options)

    monkeypatch.setattr(linear, "fit", watched)
    options: dict[str, Any] = {"num_classes": 3, "device": CPU, "epochs": 4, "batch_size": 16}
    three = 3 * 4 * 3 * (2 * 7 + 2 * 16)
    for memory in (three, three - 1, 1, 2 * 10**9):
        monkeypatch.setattr(linear, "_MEMORY", memory)
        scores = fitted_accuracies(samples, tests, SETTINGS, **options)
        assert scores == accuracies(layers, tests)
    assert sizes == [3, 1, 2, 2, 1, 1, 1, 1, 4]
    # ImageNet, 1000 classes and 2048 features: 24.6 MB per setting, with 2 GB.
    assert settings_at_once(1000, 2048, 1024, CPU) == 2 * 10**9 // (4 * 1000 * 6146)


def test_a_diverged_setting_scores_nothing_and_disturbs_no_other() -> None:
    samples = sample()
    settings = [SETTINGS[0], Setting(1e30, 1.0), SETTINGS[1], Setting(1e5, 1e3)]
    layers = train(samples, settings, epochs=12)
    assert [bool(w.isfinite().all()) for w in layers.weight] == [True, False, True, False]
    apart = train(samples, SETTINGS[:2], epochs=12)
    torch.testing.assert_close(layers.weight[[0, 2]], apart.weight, rtol=1e-4, atol=1e-4)
    scores = accuracies(layers, samples)
    assert scores[1] == scores[3] == 0
    assert min(scores[0], scores[2]) > 0.4
    assert (samples.labels == 0).any()  # which argmax of NaN would predict


def test_order_is_the_seeds_whatever_autocast_or_mapping(tmp_path: Path) -> None:
    first, again, other = (train(sample(), SETTINGS, seed=seed).weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(train(sample(), SETTINGS).weight, first)
    samples = sample()
    np.save(tmp_path / "features.npy", samples.features.half().numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "features.npy", mmap_mode="c"))
    layers = train(samples._replace(features=mapped), SETTINGS)
    expected = train(samples._replace(features=samples.features.half()), SETTINGS)
    assert torch.equal(layers.weight, expected.weight)


@pytest.mark.cuda
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_cuda_trains_the_same_wherever_the_features_are(where: str) -> None:
    samples = sample()
    expected = train(samples, SETTINGS)
    placed = Samples(samples.features.to(where), samples.labels.to(where), samples.rows)
    layers = train(placed, SETTINGS, device=torch.device("cuda"))
    torch.testing.assert_close(layers.weight.cpu(), expected.weight, rtol=1e-4, atol=1e-4)
    assert accuracies(layers, placed) == accuracies(expected, samples)
