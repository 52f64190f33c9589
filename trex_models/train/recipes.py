"""Recipes: functions that return a complete `Config`, with their command and expected result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from trex_models.train.config import (
    Config,
    CropsConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    SystemConfig,
    ValidationConfig,
)


def trex(output: str = "") -> Config:
    """t-ReX (OCM, 3 hidden layers), which transfers best to other tasks.

    torchrun --nproc-per-node 4 -m trex_models.train trex --data.path IMAGES --output DIR

    The authors trained on 4 GPUs with 64 images each and report 77.9 to 78.0 % ImageNet-1K top-1
    with logistic regression and a mean transfer log-odds of 1.17. We have not run this recipe yet.
    """
    return Config(output=output)


def trexstar(output: str = "") -> Config:
    """t-ReX* (OCM, 1 hidden layer), which is best on the training task.

    torchrun --nproc-per-node 4 -m trex_models.train trexstar --data.path IMAGES --output DIR

    The authors report 80.2 % ImageNet-1K top-1 and a mean transfer log-odds of 0.88.
    We have not run this recipe yet.
    """
    return Config(
        output=output,
        crops=CropsConfig(global_scale=(0.40, 1.0), local_scale=(0.05, 0.40)),
        model=ModelConfig(hidden_layers=1),
    )


def plain3(output: str = "") -> Config:
    """t-ReX-3: like trex, with a learned cosine classifier (Eq. 1) instead of class means."""
    return replace(trex(output), objective=ObjectiveConfig(name="cosine"))


def plain1(output: str = "") -> Config:
    """t-ReX-1: like trexstar, with a learned cosine classifier (Eq. 1) instead of class means."""
    return replace(trexstar(output), objective=ObjectiveConfig(name="cosine"))


def auto(output: str = "") -> Config:
    """t-ReX for your images: settings chosen from their number and size and from the machine.

    python -m trex_models.train auto --data.path IMAGES --output DIR

    Prints each choice with its reason. Options that are set are kept. docs/pretraining.md compares
    the result with the paper's settings, with plain softmax and with an untrained network.
    """
    return replace(trexstar(output), optim=OptimConfig(warmup_epochs=0))


def trex_vit_small(output: str = "") -> Config:
    """t-ReX with a ViT-S/16 and AdamW, not yet run by us.

    torchrun --nproc-per-node 8 -m trex_models.train trex_vit_small --data.path IMAGES --output DIR

    Crops, projector, loss and final learning rate are those of trex. Learning rate (5e-4 per 512
    images), batch size, weight decay, epochs, warm-up and drop path are those of DeiT (arXiv
    2012.12877, table 9).
    """
    model = ModelConfig(backbone="vit_small_patch16_224", backbone_args=("drop_path_rate=0.1",))
    adamw = OptimConfig(name="adamw", epochs=300, batch_size=1024, base_lr=2.5e-4)
    optim = replace(adamw, warmup_epochs=5, weight_decay=0.05)
    return Config(output=output, model=model, optim=optim)


def trex_convnext_tiny(output: str = "") -> Config:
    """t-ReX with a ConvNeXt-T and AdamW, not yet run by us.

    Like trex_vit_small, with 20 epochs of warm-up. Learning rate (4e-3 per 4096 images), weight
    decay, epochs, warm-up and drop path are those of ConvNeXt (arXiv 2201.03545, appendix A). The
    batch size is DeiT's: the memory bank holds eight batches of it, but only two of 4096 images.
    """
    config = trex_vit_small(output)
    return replace(
        config,
        model=replace(config.model, backbone="convnext_tiny"),
        optim=replace(config.optim, warmup_epochs=20),
    )


def demo(output: str = "") -> Config:
    """A small t-ReX* on generated fractals, which trains in five minutes on two CPU cores.

    python -m trex_models.train demo --output DIR
    """
    return Config(
        output=output,
        data=DataConfig(source="fractals", variation=0.4),
        crops=replace(trexstar().crops, global_size=32, local_crops=4, local_size=16),
        model=ModelConfig(
            backbone="resnet10t",
            backbone_args=("channels=(24, 48, 96, 192)",),
            hidden_layers=1,
            hidden_dim=192,
            embedding_dim=48,
        ),
        # The default momentum averages over a thousand steps, as many as this run has.
        objective=ObjectiveConfig(bank_size=2048, ema_momentum=0.97),
        optim=OptimConfig(epochs=12, batch_size=64, base_lr=0.8, warmup_epochs=1),
        validation=ValidationConfig(images_per_class=10),
        system=SystemConfig(workers=1),
    )


def smoke(output: str = "") -> Config:
    """A quick check of the complete method: under a minute on two CPU cores.

    python -m trex_models.train smoke --output DIR
    """
    config = demo(output)
    return replace(
        config,
        data=replace(config.data, num_classes=10, images_per_class=64),
        objective=replace(config.objective, bank_size=256, ema_momentum=0.95),
        optim=replace(config.optim, epochs=6, batch_size=32),
        system=replace(config.system, log_every=10),
    )


_ALL = auto, trex, trexstar, plain3, plain1, trex_vit_small, trex_convnext_tiny, demo, smoke
RECIPES: dict[str, Callable[[str], Config]] = {recipe.__name__: recipe for recipe in _ALL}
