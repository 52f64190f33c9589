"""t-ReX ResNets: backbones, and whole models with projector and cosine classifier.

t-ReX (Sariyildiz et al., "No Reason for No Supervision: Improved Generalization in Supervised
Models", ICLR 2023, arXiv 2206.15369): supervised pre-training with multi-crop augmentation, a
projector that is thrown away afterwards, and a cosine softmax loss.

Three models of each of t-ReX (3 hidden layers in the projector) and t-ReX* (1 hidden layer):

- ``trex_resnet50``: the backbone, stock timm ResNet, 2048-d features.
- ``trex_resnet50_proj``: backbone and projector, 256-d embeddings.
- ``trex_resnet50_cls``: backbone, projector and cosine classifier, 1000 logits.

and ``trex_resnet``, the same head on any ResNet of timm. Weights ``in1k`` are the paper's; the
authors published their backbones alone. ``in1k_r2`` were retrained with the released code.
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
    (``global_pool=""``) there is no projector, for it maps pooled features.

    Args:
        block: Class of the residual blocks.
        layers: Blocks of each stage.
        num_classes: C, outputs of the cosine classifier. 0 for none: the model returns embeddings.
        global_pool: timm's name of the pooling; "" for none.
        proj_layers: L, hidden layers of the projector.
        proj_hidden_dim: Width of these layers.
        proj_dim: D, width of the embeddings. 0 for no projector.
        temperature: tau of the cosine softmax.
        linear_classifier: Classify by a linear layer with bias, not by cosines.
        zero_init_last: Start the last BatchNorm of each residual block at 0. t-ReX does not.
        **kwargs: timm's ResNet takes them, such as ``device`` and ``dtype``.

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
        # A deep stem is a sequence. timm reads this trait before the pretrained cfg.
        first_conv = "conv1" if isinstance(self.conv1, nn.Conv2d) else "conv1.0"
        self._traits = {**getattr(self, "_traits", {}), "first_conv": first_conv}
        self.reset_classifier(num_classes)

    def _make_projector(self) -> Projector:
        width = self.num_features * self.global_pool.feat_mult()
        sizes = width, self.proj_layers, self.proj_hidden_dim, self.proj_dim
        return Projector(*sizes, **get_device_dtype(self))

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns of layer groups: stem, blocks, then the projector as one."""
        return {**super().group_matcher(coarse=coarse), "proj": r"^proj"}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a fresh classifier of C classes, or none for 0; None keeps the pooling.

        The projector stays, with its weights. It is made afresh where the new pooling changes
        its input's width, and dropped for good where the new pooling is none ("").
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


def _fit(found: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Leave out the parts of the head that ``model`` lacks; check that the rest matches.

    The file of a whole model thus serves the smaller ones, too. timm loads without strictness where
    the number of classes changes, and would accept another architecture's file.
    """
    wanted = model.state_dict()
    for part in ("fc.", "proj."):
        if not any(key.startswith(part) for key in wanted):
            found = {k: v for k, v in found.items() if not k.startswith(part)}
    # timm knows whether the classifier is to be loaded, and adapts the first layer to other numbers
    # of input channels.
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
# Weights without an explicit source are fetched by these names.
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
    """Build by timm, after finding and reading the weights."""
    overlay = dict(pretrained_cfg_overlay or {})
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    given: dict[str, Tensor] | None = None  # what timm is not to look for
    if pretrained and not cfg.source:
        if cfg.state_dict is not None or cfg.file is not None:
            given = _read(cfg, overlay)
        elif cfg.url or cfg.hf_hub_filename or cfg.hf_hub_id not in _BY_HUB_ID:
            if cfg.url and "hf_hub_id" not in overlay:
                overlay["hf_hub_id"] = None  # timm would prefer it to the url
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
        model.pretrained_cfg.pop("state_dict", None)  # it is the weights' no more
        if given is not None:
            found = given
        else:
            found = checkpoints.split(found, num_classes=cfg.num_classes).state_dict()
        return _fit(found, model)

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
    """Return the weights of the file or the state dict that was given to timm, in our names.

    Writes into the overlay their number of classes, which decides whether timm keeps their
    classifier, and their license; unless it is unknown, for they may be NAVER's, saved again.
    """
    contents: Any = cfg.state_dict
    if contents is None:
        contents = checkpoints.load_checkpoint(str(cfg.file))
    # Below 0 where timm's train.py is given a file: the head is to be new.
    num_classes = overlay.get("num_classes") if cfg.num_classes > 0 else 0
    try:
        checkpoint = checkpoints.split(contents, num_classes=num_classes)
    except checkpoints.CheckpointError as error:
        raise checkpoints.CheckpointError(f"{cfg.file or 'state_dict'}: {error}") from error
    if cfg.num_classes and checkpoint.class_weights is not None:
        overlay["num_classes"] = len(checkpoint.class_weights)
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
    """t-ReX backbone, 2048-d features."""
    return _create(ResNet, "trex_resnet50", pretrained, **_TREX | kwargs)


@register_model
def trexstar_resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """t-ReX* backbone, 2048-d features."""
    return _create(ResNet, "trexstar_resnet50", pretrained, **_TREX | kwargs)


@register_model
def trex_resnet50_proj(pretrained: bool = False, **kwargs: Any) -> TRexResNet:
    """t-ReX backbone and projector, 256-d embeddings."""
    return _create(TRexResNet, "trex_resnet50_proj", pretrained, **_TREX_HEAD | kwargs)


@register_model
def trexstar_resnet50_proj(pretrained: bool = False, **kwargs: Any) -> TRexResNet:
    """t-ReX* backbone and projector, 256-d embeddings."""
    return _create(TRexResNet, "trexstar_resnet50_proj", pretrained, **_TREXSTAR_HEAD | kwargs)


@register_model
def trex_resnet50_cls(pretrained: bool = False, **kwargs: Any) -> TRexResNet:
    """t-ReX backbone, projector and class prototypes, 1000 cosine logits."""
    return _create(TRexResNet, "trex_resnet50_cls", pretrained, **_TREX_HEAD | kwargs)


@register_model
def trexstar_resnet50_cls(pretrained: bool = False, **kwargs: Any) -> TRexResNet:
    """t-ReX* backbone, projector and class prototypes, 1000 cosine logits."""
    return _create(TRexResNet, "trexstar_resnet50_cls", pretrained, **_TREXSTAR_HEAD | kwargs)


# timm's model files that build its ResNet class.
RESNET_MODULES = ("resnet", "res2net", "resnest", "sknet")


def _build_on(backbone: str, zero_init_last: bool = False, **kwargs: Any) -> TRexResNet:
    if not is_model_in_modules(backbone, RESNET_MODULES):
        raise ValueError(f"backbone {backbone!r} is not one of timm's ResNets")
    names = signature(TRexResNet._add_head).parameters.keys() & kwargs
    head = {name: kwargs.pop(name) for name in names}
    # timm's entry points hold each architecture's arguments, and build only the stock class.
    model: Any = model_entrypoint(backbone)(num_classes=0, zero_init_last=zero_init_last, **kwargs)
    model.__class__ = TRexResNet
    assert isinstance(model, TRexResNet)
    model._add_head(**head)
    return model


@register_model
def trex_resnet(pretrained: bool = False, backbone: str = "resnet50", **kwargs: Any) -> TRexResNet:
    """t-ReX head on any ResNet of timm, such as ``backbone="resnext50_32x4d"``; no weights."""
    model = _create(_build_on, "trex_resnet", pretrained, backbone=backbone, **kwargs)
    model.pretrained_cfg["first_conv"] = model._traits["first_conv"]
    return model
