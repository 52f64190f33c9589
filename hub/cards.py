"""Model cards, rendered from the template MODEL_CARD.md at the root of the checkout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_data_config

from hub import notices, structure
from hub.hub_folder import HubModel
from hub.results import Results
from trex_models.pretrained import naver
from trex_models.transfer.published import reported
from trex_models.transfer.report import format_table

TEMPLATE = Path(__file__).parents[1] / "MODEL_CARD.md"


def render(
    model: HubModel,
    identifier: str,
    owner: str | None,
    namespace: str,
    results: Results = (),
) -> str:
    """Return the README.md of a model's repository.

    Args:
        model: Model to describe.
        identifier: Identifier of the model's license.
        owner: Owner of the weights; None for NAVER's weights.
        namespace: Organization or user on the Hub.
        results: Results of the model in reports of the transfer evaluation.
    """
    architecture, _, tag = model.name.partition(".")
    backbone = f"{architecture.partition('_')[0]}_resnet50.{tag}"
    repository = f"{namespace}/{model.name}"
    card = ModelCard.from_template(
        metadata(model, identifier, [result for result, _ in results]),
        template_path=str(TEMPLATE),
        name=model.name,
        repository=repository,
        create=model.name if model.is_naver else f"hf-hub:{repository}",
        naver=model.is_naver,
        part=model.part,
        stock=model.is_stock,
        star=architecture.startswith("trexstar"),
        tag=tag,
        backbone_name=backbone,
        backbone_repository=f"{namespace}/{backbone}",
        config=model.config,
        num_features=model.config["num_features"],
        num_classes=model.config["num_classes"],
        embedding_dim=256,
        own=None if model.is_naver else structure.inspect_model(model),
        classes=_classes(model),
        **_transform(model.config["pretrained_cfg"]),
        absent_classes=model.absent_classes,
        terms=notices.find_license(identifier),
        under_naver_license=identifier == naver.LICENSE,
        owner=owner,
        figures=reported(model.name) if model.is_naver else None,
        reports=list({report["path"]: report for _, report in results}.values()),
        format_table=format_table,
    )
    return f"{card}\n"


def _classes(model: HubModel) -> list[str]:
    """Return the class names as Markdown code, [] if the model has none."""
    cfg = model.config["pretrained_cfg"]
    names = model.config.get("label_names") or cfg.get("label_names") or ()
    if not isinstance(names, list | tuple) or len(names) != model.config["num_classes"]:
        return []
    return [f"`{' '.join(str(name).split()).replace('`', chr(39))}`" for name in names]


def _transform(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the properties of timm's evaluation transform: sizes and normalization."""
    data = resolve_data_config(pretrained_cfg=dict(cfg))
    mean, std = tuple(data["mean"]), tuple(data["std"])
    normalization = f"mean {mean} and standard deviation {std}"
    if (mean, std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD):
        normalization = "ImageNet's mean and standard deviation"
    size = data["input_size"][-1]
    return {
        "size": size,
        "resized": math.floor(size / data["crop_pct"]),
        "interpolation": data["interpolation"],
        "normalization": normalization,
    }


def metadata(model: HubModel, identifier: str, results: list[EvalResult]) -> ModelCardData:
    """Return the card's YAML header, with our own results only, not those of the authors."""
    tags = ["image-feature-extraction", "timm", "trex"]
    if model.part == "cls":
        tags.append("image-classification")
    return ModelCardData(
        license=identifier,
        library_name="timm",
        pipeline_tag="image-classification" if model.part == "cls" else tags[0],
        tags=tags,
        datasets=["imagenet-1k"] if model.is_naver else None,
        model_name=model.name if results else None,
        eval_results=results or None,
    )
