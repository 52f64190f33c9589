"""Recipes and configurations."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from trex_models.data import GLOBAL_AUGMENTATION, LOCAL_AUGMENTATION
from trex_models.train.config import (
    Config,
    ModelConfig,
    config_diff,
    from_dict,
    to_json,
)
from trex_models.train.recipes import RECIPES


@pytest.mark.parametrize(
    ("recipe", "hidden_layers", "global_scale", "local_scale", "objective"),
    [
        ("trex", 3, (0.25, 1.0), (0.05, 0.25), "ocm"),
        ("trexstar", 1, (0.40, 1.0), (0.05, 0.40), "ocm"),
        ("plain3", 3, (0.25, 1.0), (0.05, 0.25), "cosine"),
        ("plain1", 1, (0.40, 1.0), (0.05, 0.40), "cosine"),
    ],
)
def test_recipes_are_the_papers(
    recipe: str,
    hidden_layers: int,
    global_scale: tuple[float, float],
    local_scale: tuple[float, float],
    objective: str,
) -> None:
    config = RECIPES[recipe]("out")
    crops, model, optim = (
        list(vars(section).values()) for section in (config.crops, config.model, config.optim)
    )
    augmentations = [GLOBAL_AUGMENTATION, LOCAL_AUGMENTATION]
    assert crops == [1, 224, global_scale, 8, 96, local_scale, *augmentations]
    assert model == ["resnet50", (), "mlp", hidden_layers, 2048, 256]
    # Epochs, batch size, both learning rates, epochs of warm-up, momentum, weight decay. Neither
    # betas nor eps, and no clipping.
    assert optim == ["sgd", 100, 256, 0.1, 1e-6, 10, 0.9, 1e-4, None, None, 0]
    found = config.objective
    assert found.resolved_bank_size == (8192 if objective == "ocm" else 0)
    assert (found.name, found.temperature, found.ema_momentum) == (objective, 0.1, 0.999)


@pytest.mark.parametrize("recipe", RECIPES)
def test_json_round_trip(recipe: str) -> None:
    config = RECIPES[recipe]("out")
    saved = json.loads(to_json(config))
    assert from_dict(saved) == config
    assert hash(from_dict(saved)) == hash(config)  # frozen
    assert config_diff(saved, config) == []


def test_differences_name_the_field_and_pass_over_the_free_ones() -> None:
    config = RECIPES["smoke"]("out")
    saved = json.loads(to_json(config))
    system = dataclasses.replace(config.system, workers=3)
    moved = dataclasses.replace(config, output="elsewhere", system=system)
    assert config_diff(saved, moved) == []
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, hidden_layers=2))
    assert config_diff(saved, other) == ["model.hidden_layers: 1 -> 2"]
    saved["crops"]["global_augmentation"]["flip"] = 0
    assert "crops.global_augmentation.flip: 0 -> 0.5" in config_diff(saved, config)
    blur = saved["crops"]["local_augmentation"].pop("blur")
    with pytest.raises(ValueError, match=r"the field crops.local_augmentation.blur is missing"):
        from_dict(saved)
    saved["crops"]["local_augmentation"]["blur"] = blur
    saved["optim"]["lars"] = True
    with pytest.raises(ValueError, match="lars"):
        from_dict(saved)


@pytest.mark.parametrize(
    ("group", "field", "value"),
    [
        ("data", "num_classes", 1),
        ("data", "image_size", 0),
        ("crops", "global_crops", 0),
        ("crops", "local_crops", -1),
        ("crops", "global_scale", (0.5, 0.2)),
        ("crops", "local_scale", (0.0, 0.2)),
        ("model", "hidden_layers", -1),
        ("model", "embedding_dim", 0),
        ("objective", "temperature", 0.0),
        ("objective", "bank_size", 0),
        ("objective", "ema_momentum", 1.5),
        ("optim", "epochs", 0),
        ("optim", "batch_size", 0),
        ("optim", "base_lr", -1.0),
        ("optim", "warmup_epochs", 101),
        ("optim", "betas", (0.9, 1.0)),
        ("optim", "clip_grad", -1.0),
        ("system", "workers", -1),
        ("system", "log_every", 0),
    ],
)
def test_impossible_values_are_rejected(group: str, field: str, value: Any) -> None:
    part = getattr(Config(output="out"), group)
    with pytest.raises(ValueError, match=f"--{group}.{field} ".replace("_", "-")):
        dataclasses.replace(part, **{field: value})


def test_backbone_args_are_literals_or_strings() -> None:
    model = ModelConfig(backbone_args=("channels=(8, 16)", "act_layer=silu", "drop_path_rate=0.1"))
    assert model.parsed_backbone_args() == {
        "channels": (8, 16),
        "act_layer": "silu",
        "drop_path_rate": 0.1,
    }
    with pytest.raises(ValueError, match="key=value"):
        ModelConfig(backbone_args=("channels",))
