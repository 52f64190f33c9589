"""t-ReX ResNets: backbones, and complete models with projector and cosine classifier.

t-ReX (Sariyildiz et al., "No Reason for No Supervision: Improved Generalization in Supervised
Models", ICLR 2023, arXiv 2206.15369): supervised pre-training with multi-crop augmentation, a
projector that is discarded afterwards, and a cosine softmax loss.

Three models for t-ReX (3 hidden layers in the projector); for t-ReX* (1 hidden layer) likewise:

- ``trex_resnet50``: backbone only, a stock timm ResNet; 2048-d features.
- ``trex_resnet50_proj``: backbone and projector; 256-d embeddings.
- ``trex_resnet50_cls``: backbone, projector and cosine classifier; 1000 logits.

``trex_resnet`` puts the same head on any timm ResNet. The tag ``in1k`` denotes the paper's weights
(backbones only), ``in1k_r2`` weights that the authors retrained with their released code.
"""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.classifier import create_classifier
from timm.layers.helpers import get_device_dtype
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    is_model_in_modules,
    model_entrypoint,
    register_model,
)
from timm.models._builder import resolve_pretrained_cfg
from timm.models._input import update_model_args
from timm.models._pretrained import PretrainedCfg
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from trex_models.heads import CosineClassifier, Projector
from trex_models.pretrained import checkpoints, licenses, naver, resolve

__all__ = ["TRexResNet"]  # register_model appends the entry points


class TRexResNet(ResNet):
    """ResNet with the projector as its pre-logits block and a cosine classifier.

    The state dict is the backbone's plus ``proj.*`` and ``fc.*``. Without pooling
    (``global_pool=""``) there is no projector, because it requires pooled features.

    Args:
        block: Class of the residual blocks.
        layers: Number of blocks in each stage.
        num_classes: Number of classes, C; with 0 there is no classifier.
        global_pool: Type of global pooling, as in timm; "" for none.
        proj_layers: Number of hidden layers of the projector, L.
        proj_hidden_dim: Width of the projector's hidden layers.
        proj_dim: Embedding dimension, D; 0 for no projector.
        temperature: Temperature of the cosine softmax, tau.
        linear_classifier: Use a linear classifier with bias in place of the cosine classifier.
        zero_init_last: Initialize the last BatchNorm weight of each residual block with 0.
        **kwargs: Further arguments of timm's ResNet, such as ``device`` and ``dtype``.

    Raises:
        ValueError: A size of the head or the temperature is out of range.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, ...],
        num_classes: int = 1000,
        global_pool: str = "avg",
        proj_layers: int = 3,
        proj_hidden_dim: int = 2048,
        proj_dim: int = 256,
        temperature: float = 0.1,
        linear_classifier: bool = False,
        zero_init_last: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            block,  # type: ignore[arg-type]  # timm takes the class but declares an instance
            layers,
            num_classes=0,
            global_pool=global_pool,
            zero_init_last=zero_init_last,
            **kwargs,
        )
        self._add_head(
            num_classes, proj_layers, proj_hidden_dim, proj_dim, temperature, linear_classifier
        )

    def _add_head(
        self,
        num_classes: int = 1000,
        proj_layers: int = 3,
        proj_hidden_dim: int = 2048,
        proj_dim: int = 256,
        temperature: float = 0.1,
        linear_classifier: bool = False,
    ) -> None:
        self.proj_layers = proj_layers
        self.proj_hidden_dim = proj_hidden_dim
        self.proj_dim = proj_dim
        self.temperature = temperature
        self.linear_classifier = linear_classifier
        self.proj: nn.Module = nn.Identity()
        if proj_dim and self.global_pool.pool_type:
            self.proj = self._make_projector()
        # A deep stem is an nn.Sequential. timm reads this trait before the pretrained cfg.
        first_conv = "conv1" if isinstance(self.conv1, nn.Conv2d) else "conv1.0"
        self._traits = {**getattr(self, "_traits", {}), "first_conv": first_conv}
        self.reset_classifier(num_classes)

    def _make_projector(self) -> Projector:
        width = self.num_features * self.global_pool.feat_mult()
        sizes = width, self.proj_layers, self.proj_hidden_dim, self.proj_dim
        return Projector(*sizes, **get_device_dtype(self))

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return regular expressions of layer groups: timm's, plus the projector."""
        return {**super().group_matcher(coarse=coarse), "proj": r"^proj"}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Create a new classifier (none for 0 classes), and new pooling unless it is None.

        The projector keeps its weights, unless the new pooling changes its input width: then it is
        initialized again. With ``global_pool=""`` it is removed permanently.
        """
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        self.num_classes = num_classes
        width = self.num_features * self.global_pool.feat_mult()
        self.global_pool, self.fc = create_classifier(self.num_features, 0, global_pool)
        pooled_width = self.num_features * self.global_pool.feat_mult()
        if isinstance(self.proj, Projector):
            if not global_pool:
                self.proj = nn.Identity()
            elif pooled_width != width:
                self.proj = self._make_projector()
        if isinstance(self.proj, Projector):
            self.head_hidden_size = self.proj_dim
        else:
            self.head_hidden_size = pooled_width
            update_model_args(self, proj_dim=0)  # a saved copy must load without a projector
        sizes = self.head_hidden_size, num_classes
        if num_classes and self.linear_classifier:
            self.fc = nn.Linear(*sizes, **get_device_dtype(self))
        elif num_classes:
            self.fc = CosineClassifier(*sizes, self.temperature, **get_device_dtype(self))
        for module in (self.global_pool, self.proj, self.fc):
            module.train(self.training)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map feature maps, (B, num_features, H, W), to logits, or embeddings if pre_logits."""
        x = self.proj(self.global_pool(x))
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)


def _check_weights(found: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Drop parts of the head that ``model`` lacks, and check that all other weights match.

    The file of a complete model can thus initialize the smaller ones. timm loads with strict=False
    if the number of classes changes, so that it would accept other architectures.
    """
    wanted = model.state_dict()
    for part in ("fc.", "proj."):
        if not any(key.startswith(part) for key in wanted):
            found = {k: v for k, v in found.items() if not k.startswith(part)}
    # timm decides whether to load the classifier, and adapts the first convolution to other numbers
    # of input channels: neither is compared.
    body, expected = (
        {k: v for k, v in state.items() if not k.startswith("fc.")} for state in (found, wanted)
    )
    for key in {"conv1.weight", "conv1.0.weight"} & body.keys() & expected.keys():
        expected[key] = expected[key].new_empty(body[key].shape)
    if difference := checkpoints.mismatch(body, expected):
        name = model.pretrained_cfg["architecture"]
        raise RuntimeError(f"the weights do not match {name}: {difference}")
    return found


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 0,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "paper_ids": "arXiv:2206.15369",
        "paper_name": "No Reason for No Supervision: Improved Generalization in Supervised Models",
        **kwargs,
    }


def _naver(name: str) -> dict[str, Any]:
    return _cfg(
        num_classes=1000 if "_cls" in name else 0,
        license=naver.LICENSE,
        origin_url="https://github.com/naver/trex",
        hf_hub_id=f"trex-models/{name}",
    )


_cfgs: dict[str, Any] = {name: _naver(name) for name in naver.FILES}
default_cfgs = generate_default_cfgs({**_cfgs, "trex_resnet.untrained": _cfg(num_classes=1000)})
# Hub ids whose weights come from pretrained.resolve, unless the user names another source.
_BY_HUB_ID = {f"trex-models/{name}": name for name in naver.FILES}


def _create(
    cls: Any,
    variant: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | None = None,
    **kwargs: Any,
) -> Any:
    overlay = dict(pretrained_cfg_overlay or {})
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    given: dict[str, Tensor] | None = None  # weights that timm must not look up itself
    if pretrained and not cfg.source:
        if cfg.state_dict is not None or cfg.file is not None:
            given = _read(cfg, overlay)
        elif cfg.url or cfg.hf_hub_filename or cfg.hf_hub_id not in _BY_HUB_ID:
            if cfg.url and "hf_hub_id" not in overlay:
                overlay["hf_hub_id"] = None  # otherwise timm prefers it to the url
        else:
            found = load_file(resolve.fetch(_BY_HUB_ID[cfg.hf_hub_id], cache_dir))
            given = checkpoints.split(found).state_dict()
            licenses.notice()
    elif pretrained:
        folder = Path(cfg.file) if cfg.source == "local-dir" and cfg.file else None
        if (licenses.license_of(folder) or cfg.license) == naver.LICENSE:
            licenses.notice()
    if given is not None:
        overlay |= {"state_dict": {"given": True}, "file": None}

    def filter_fn(found: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
        model.pretrained_cfg.pop("state_dict", None)  # a placeholder, set above
        if given is not None:
            found = given
        else:
            found = checkpoints.split(found, num_classes=cfg.num_classes).state_dict()
        return _check_weights(found, model)

    try:
        return build_model_with_cfg(
            cls,
            variant,
            pretrained,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay=overlay,
            pretrained_filter_fn=filter_fn,
            cache_dir=cache_dir,
            **kwargs,
        )
    except RuntimeError as error:
        if given is None or not cfg.file:
            raise
        raise RuntimeError(f"{cfg.file}: {error}") from error


def _read(cfg: PretrainedCfg, overlay: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights of the file or state dict passed to timm, under our models' keys.

    Sets two entries of the overlay: the number of classes, by which timm decides whether to keep
    the classifier, and the license; if that is unknown, NAVER's is kept, to be safe.
    """
    contents: Any = cfg.state_dict
    if contents is None:
        contents = checkpoints.load_checkpoint(str(cfg.file))
    # timm's train.py passes num_classes < 0 with a file, to create a new head.
    num_classes = overlay.get("num_classes") if cfg.num_classes > 0 else 0
    try:
        checkpoint = checkpoints.split(contents, num_classes=num_classes)
    except checkpoints.CheckpointError as error:
        raise checkpoints.CheckpointError(f"{cfg.file or 'state_dict'}: {error}") from error
    if cfg.num_classes and checkpoint.classifier_weights is not None:
        overlay["num_classes"] = len(checkpoint.classifier_weights)
    path = Path(cfg.file) if cfg.file else None
    found = licenses.license_of(path, contents, checkpoint.form)
    if found == naver.LICENSE:
        licenses.notice()
        overlay["license"] = found
    elif found or checkpoint.form == "trainer":
        overlay |= {"license": found or None, "origin_url": None}
    return checkpoint.state_dict()


_TREX: dict[str, Any] = {"block": Bottleneck, "layers": (3, 4, 6, 3), "zero_init_last": False}
_TREX_HEAD = _TREX | {"proj_layers": 3}
_TREXSTAR_HEAD = _TREX | {"proj_layers": 1}


@register_model
def trex_resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """Build a t-ReX ResNet-50 backbone; 2048-d features."""
    return _create(ResNet, "trex_resnet50", pretrained, **_TREX | kwargs)


@register_model
def trexstar_resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """Build a t-ReX* ResNet-50 backbone; 2048-d features."""
    return _create(ResNet, "trexstar_resnet50", pretrained, **_TREX | kwargs)


@register_model
def trex_resnet50_proj(pretrained: bool = False, **kwargs: Any) -> TRexResNet:
    """Build a t-ReX ResNet-50 with projector; 256-d embeddings."""
    return _create(TRexResNet, "trex_resnet50_proj", pretrained, **_TREX_HEAD | kwargs)


@register_model
def trexstar_resnet50_proj(pretrained: bool = False, **kwargs: Any) -> TRexResNet:
    """Build a t-ReX* ResNet-50 with projector; 256-d embeddings."""
    return _create(TRexResNet, "trexstar_resnet50_proj", pretrained, **_TREXSTAR_HEAD | kwargs)


@register_model
def trex_resnet50_cls(pretrained: bool = False, **kwargs: Any) -> TRexResNet:
    """Build a t-ReX ResNet-50 with projector and cosine classifier; 1000 logits."""
    return _create(TRexResNet, "trex_resnet50_cls", pretrained, **_TREX_HEAD | kwargs)


@register_model
def trexstar_resnet50_cls(pretrained: bool = False, **kwargs: Any) -> TRexResNet:
    """Build a t-ReX* ResNet-50 with projector and cosine classifier; 1000 logits."""
    return _create(TRexResNet, "trexstar_resnet50_cls", pretrained, **_TREXSTAR_HEAD | kwargs)


# Modules of timm whose entry points build its ResNet class.
RESNET_MODULES = ("resnet", "res2net", "resnest", "sknet")


def _build_on(backbone: str, zero_init_last: bool = False, **kwargs: Any) -> TRexResNet:
    if not is_model_in_modules(backbone, RESNET_MODULES):
        raise ValueError(f"backbone must be a timm ResNet, got {backbone!r}")
    names = signature(TRexResNet._add_head).parameters.keys() & kwargs
    head = {name: kwargs.pop(name) for name in names}
    # An entry point holds the architecture's arguments, but always builds timm's own class.
    model: Any = model_entrypoint(backbone)(num_classes=0, zero_init_last=zero_init_last, **kwargs)
    model.__class__ = TRexResNet
    assert isinstance(model, TRexResNet)
    model._add_head(**head)
    return model


@register_model
def trex_resnet(pretrained: bool = False, backbone: str = "resnet50", **kwargs: Any) -> TRexResNet:
    """Build any timm ResNet, such as "resnext50_32x4d", with the t-ReX head; no weights."""
    model = _create(_build_on, "trex_resnet", pretrained, backbone=backbone, **kwargs)
    model.pretrained_cfg["first_conv"] = model._traits["first_conv"]
    return model
