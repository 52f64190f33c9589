"""Recipes and configurations."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from trex_models.train.config import (
    Config,
    DataConfig,
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
    crops, optim, model = config.crops, config.optim, config.model
    assert (crops.global_crops, crops.global_size, crops.global_scale) == (1, 224, global_scale)
    assert (crops.local_crops, crops.local_size, crops.local_scale) == (8, 96, local_scale)
    assert (model.backbone, model.hidden_layers) == ("resnet50", hidden_layers)
    assert (model.hidden_dim, model.embedding_dim) == (2048, 256)
    assert config.objective.name == objective
    assert (config.objective.temperature, config.objective.bank_entries) == (
        0.1,
        8192 if objective == "ocm" else 0,
    )
    assert config.objective.ema_momentum == 0.999
    assert (optim.epochs, optim.batch_size, optim.warmup_epochs) == (100, 256, 10)
    assert (optim.base_lr, optim.final_lr, optim.weight_decay) == (0.1, 1e-6, 1e-4)
    assert optim.sgd_momentum == 0.9


@pytest.mark.parametrize("recipe", RECIPES)
def test_json_round_trip(recipe: str) -> None:
    config = RECIPES[recipe]("out")
    saved = json.loads(to_json(config))
    assert from_dict(saved) == config
    assert config_diff(saved, config) == []


def test_differences_name_the_field_and_pass_over_the_free_ones() -> None:
    config = RECIPES["smoke"]("out")
    saved = json.loads(to_json(config))
    moved = dataclasses.replace(
        config, output="elsewhere", system=dataclasses.replace(config.system, workers=3)
    )
    assert config_diff(saved, moved) == []
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, hidden_layers=2))
    assert config_diff(saved, other) == ["model.hidden_layers: 1 -> 2"]


def test_unknown_saved_field_is_an_error() -> None:
    saved: dict[str, Any] = json.loads(to_json(Config(output="out")))
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
        ("system", "workers", -1),
        ("system", "log_every", 0),
    ],
)
def test_impossible_values_are_named(group: str, field: str, value: Any) -> None:
    part = getattr(Config(output="out"), group)
    with pytest.raises(ValueError, match=f"{group}.{field}|crop sizes|model widths"):
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


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DataConfig().source = "fractals"  # type: ignore[misc]
