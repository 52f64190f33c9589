from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models import ResNet, save_for_hf
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from trex_models import CosineClassifier, Projector, TRexResNet

BACKBONES = ["trex_resnet50", "trexstar_resnet50"]
PROJ = ["trex_resnet50_proj", "trexstar_resnet50_proj"]
CLS = ["trex_resnet50_cls", "trexstar_resnet50_cls"]
SIX = BACKBONES + PROJ + CLS
# A small ResNet with a deep stem, a projector and a classifier.
TINY: dict[str, Any] = {
    "backbone": "resnet10t",
    "channels": [24, 48, 96, 192],
    "proj_layers": 1,
    "proj_hidden_dim": 64,
    "proj_dim": 48,
    "num_classes": 7,
}


def images(batch: int = 2, size: int = 64) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def create(name: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


def tiny(**kwargs: Any) -> Any:
    return create("trex_resnet", **(TINY | kwargs))


def save_and_reload(model: nn.Module, folder: Path, **kwargs: Any) -> Any:
    save_for_hf(model, str(folder), safe_serialization=True)
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


def test_names_tags_and_defaults() -> None:
    assert timm.list_models("trex*") == sorted([*SIX, "trex_resnet"])
    assert timm.list_models("trex*", module="trex") == timm.list_models("trex*")
    tagged = {f"{name}.in1k" for name in BACKBONES} | {f"{name}.in1k_r2" for name in SIX}
    assert set(timm.list_pretrained("trex*")) == tagged
    for name in SIX:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg is not None
        assert cfg.tag == ("in1k" if name in BACKBONES else "in1k_r2")


@pytest.mark.parametrize("name", timm.list_pretrained("trex*"))
def test_pretrained_cfg(name: str) -> None:
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    assert (
        cfg.to_dict(remove_null=False).items()
        >= {
            "hf_hub_id": f"trex-models/{name}",
            "num_classes": 1000 if "_cls." in name else 0,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "classifier": "fc",
            "first_conv": "conv1",
            "license": "cc-by-nc-sa-4.0",
            "paper_ids": "arXiv:2206.15369",
            "origin_url": "https://github.com/naver/trex",
        }.items()
    )
    assert cfg.paper_name
    assert not cfg.url


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_is_torchvisions(name: str) -> None:
    model = create(name)
    assert type(model) is ResNet
    assert len(model.state_dict()) == 318
    reference = torchvision.models.resnet50().eval()
    reference.fc = nn.Identity()
    reference.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(images()), reference(images()))
    assert model(images()).shape == (2, 2048)
    assert isinstance(create(name, num_classes=10).fc, nn.Linear)


@pytest.mark.parametrize("name", SIX)
def test_residual_blocks_start_with_batchnorm_at_one(name: str) -> None:
    assert create(name).layer1[0].bn3.weight.eq(1).all()
    assert create(name, zero_init_last=True).layer1[0].bn3.weight.eq(0).all()


@pytest.mark.parametrize(
    "backbone", ["resnet18", "resnet10t", "resnet26d", "resnext50_32x4d", "seresnet50"]
)
def test_head_on_other_resnets(backbone: str, tmp_path: Path) -> None:
    kwargs = {"channels": TINY["channels"]} if backbone == "resnet10t" else {}
    model = create("trex_resnet", backbone=backbone, proj_layers=1, num_classes=5, **kwargs)
    stock = timm.create_model(backbone, num_classes=0, **kwargs).eval()
    weights = model.state_dict()
    stock.load_state_dict({k: v for k, v in weights.items() if not k.startswith(("proj", "fc"))})
    assert torch.equal(model.fc(model.proj(stock(images()))), model(images()))
    first_conv = model.pretrained_cfg["first_conv"]
    assert model.get_submodule(first_conv).in_channels == 3
    assert torch.equal(save_and_reload(model, tmp_path)(images()), model(images()))
    with pytest.raises(TypeError):
        timm.create_model("trex_resnet", backbone=backbone, no_such_argument=1)


@pytest.mark.parametrize(
    "backbone", ["no_such_model", "vit_tiny_patch16_224", "resnetv2_50", "hf-hub:timm/resnet18"]
)
def test_backbone_must_be_a_resnet(backbone: str) -> None:
    with pytest.raises(ValueError, match="backbone must be a timm ResNet, got"):
        timm.create_model("trex_resnet", backbone=backbone, device="meta")


def test_reset_classifier_keeps_the_projector_at_the_same_width() -> None:
    model = tiny()
    projector = model.proj
    embeddings = model.forward_head(model.forward_features(images()), pre_logits=True)
    model.reset_classifier(3)
    assert model.num_classes == 3
    assert isinstance(model.fc, CosineClassifier)
    assert model.get_classifier().weight.shape == (3, 48)
    assert model(images()).shape == (2, 3)
    model.reset_classifier(0)
    assert torch.equal(model(images()), embeddings)
    model.reset_classifier(0, "max")  # the pooled width is the same
    assert model.proj is projector
    model.reset_classifier(3, "catavgmax")
    assert isinstance(model.proj, Projector)
    assert model.proj is not projector
    assert model(images()).shape == (2, 3)
    assert model.head_hidden_size == 48


def test_reset_classifier_without_pooling_drops_the_projector() -> None:
    model = tiny()
    model.reset_classifier(0, "")
    assert model(images()).shape == (2, 192, 2, 2)
    assert not any(key.startswith(("proj", "fc")) for key in model.state_dict())
    model.reset_classifier(4, "avg")  # for good
    assert model.head_hidden_size == 192
    assert model.fc.weight.shape == (4, 192)
    assert model(images()).shape == (2, 4)
    model = tiny().double()
    model.reset_classifier(3, "catavgmax")
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not any(m.training for m in model.modules())
    model.train().reset_classifier(4)
    assert all(m.training for m in model.modules())


def test_head_arguments() -> None:
    torch.testing.assert_close(tiny(temperature=0.2)(images()), tiny()(images()) / 2)
    model = tiny(proj_dim=0, num_classes=0)
    assert model(images()).shape == (2, 192)
    assert model.head_hidden_size == model.num_features == 192
    for name, argument in {"proj_layers": "hidden_layers", "temperature": "temperature"}.items():
        with pytest.raises(ValueError, match=argument):
            tiny(**{name: -1})


def test_dropout_before_the_classifier() -> None:
    model = tiny(drop_rate=0.5)
    x = torch.ones(2, 192, 2, 2)
    torch.testing.assert_close(model.forward_head(x), tiny().forward_head(x))
    model.train()
    dropped = model.forward_head(x, pre_logits=True)
    assert 0.2 < dropped.eq(0).float().mean() < 0.8


# Arguments of each call of reset_classifier: new classes, a new pool, embeddings, no head, ...
RESETS: list[list[tuple[Any, ...]]] = [
    *([], [(3,)], [(3, "catavgmax")], [(0,)], [(0, "")]),
    [(0, ""), (3, "avg")],
]


@pytest.mark.parametrize("resets", RESETS)
@pytest.mark.parametrize("name", ["trex_resnet", "trexstar_resnet50_proj", "trex_resnet50_cls"])
def test_saved_copy_is_equal(name: str, resets: list[tuple[Any, ...]], tmp_path: Path) -> None:
    shallow: dict[str, Any] = {"layers": (1, 1, 1, 1), "proj_hidden_dim": 64}
    model = tiny() if name == "trex_resnet" else create(name, **shallow)
    for arguments in resets:
        model.reset_classifier(*arguments)
    reloaded = save_and_reload(model, tmp_path)
    assert torch.equal(reloaded(images()), model(images()))
    assert type(reloaded) is TRexResNet


def test_saved_config(tmp_path: Path) -> None:
    save_for_hf(tiny(), str(tmp_path), safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "trex_resnet"
    assert config["model_args"].items() >= TINY.items()
    assert config["pretrained_cfg"]["first_conv"] == "conv1.0"
    reloaded = create(f"local-dir:{tmp_path}", pretrained=True, in_chans=1)
    assert reloaded.conv1[0].in_channels == 1
    new_head = create(f"local-dir:{tmp_path}", pretrained=True, num_classes=2)
    assert new_head.fc.weight.shape == (2, 48)
    assert torch.equal(new_head.proj[1].fc.weight, tiny().proj[1].fc.weight)


@pytest.fixture(scope="module")
def cls_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "cls.pth"
    torch.save(create("trex_resnet50_cls").state_dict(), path)
    return path


def load(name: str, file: Path, **kwargs: Any) -> Any:
    overlay = {"file": str(file)}
    return create(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def test_one_file_serves_all_three(cls_file: Path) -> None:
    whole = load("trex_resnet50_cls", cls_file)
    assert torch.equal(whole(images()), create("trex_resnet50_cls")(images()))
    features = whole.forward_features(images())
    embeddings = whole.forward_head(features, pre_logits=True)
    assert torch.equal(load("trex_resnet50_proj", cls_file)(images()), embeddings)
    backbone = load("trex_resnet50", cls_file)
    assert torch.equal(backbone(images()), features.mean((2, 3)))
    for name, width in [("trex_resnet50", 2048), ("trex_resnet50_cls", 256)]:
        tuned = load(name, cls_file, num_classes=10)
        assert tuned.fc.weight.shape == (10, width)
        assert torch.equal(tuned.conv1.weight, whole.conv1.weight)
    wrapped = load("trex_resnet50_cls", cls_file, features_only=True)
    assert torch.equal(wrapped(images())[-1], features)
    assert load("trex_resnet50_proj", cls_file, in_chans=1).conv1.in_channels == 1
    for num_classes in (1000, 10):  # its projector is another one
        with pytest.raises(RuntimeError, match=r"do not match trexstar_resnet50_cls: .*proj\."):
            load("trexstar_resnet50_cls", cls_file, num_classes=num_classes)


def test_backbone_file_with_a_new_classifier(tmp_path: Path) -> None:
    torch.save(create("trex_resnet50").state_dict(), tmp_path / "backbone.pth")
    model = load("trex_resnet50", tmp_path / "backbone.pth", num_classes=10)
    assert model(images()).shape == (2, 10)
    message = r"do not match trex_resnet50_proj: .*proj\.1\.fc\.weight"
    with pytest.raises(RuntimeError, match=message):
        load("trex_resnet50_proj", tmp_path / "backbone.pth")


@pytest.mark.parametrize(
    ("other", "first"),
    [
        *(("resnet18", ""), ("resnet101", ""), ("resnet50d", ""), ("test_vit", "")),
        ("wide_resnet50_2", r"layer1\.0\.conv1\.weight is"),
    ],
)
def test_file_of_another_architecture(other: str, first: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        state = timm.create_model(other, num_classes=0).state_dict()
    zeros = {key: torch.zeros(t.shape, dtype=t.dtype) for key, t in state.items()}
    torch.save(zeros, tmp_path / "other.pth")
    message = rf"other\.pth: the weights do not match trex_resnet50: {first}"
    for num_classes in (0, 10):
        with pytest.raises(RuntimeError, match=message):
            load("trex_resnet50", tmp_path / "other.pth", num_classes=num_classes)


def test_autocast_and_bfloat16() -> None:
    model = tiny()
    expected = model(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.forward_features(images()).dtype == torch.bfloat16
        logits = model(images())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=0.3, rtol=0.05)
    logits = copy.deepcopy(model).bfloat16()(images().bfloat16())
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, atol=0.5, rtol=0.1)


@pytest.mark.parametrize("name", SIX)
def test_device_and_dtype_arguments(name: str) -> None:
    model = timm.create_model(name, num_classes=3, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert all(b.is_meta for b in model.buffers())
    assert {b.dtype for b in model.buffers()} == {torch.bfloat16, torch.int64}  # counters


@pytest.mark.parametrize("name", ["trex_resnet", "trexstar_resnet50_proj"])
def test_script(name: str) -> None:
    model = tiny() if name == "trex_resnet" else create(name)
    torch.testing.assert_close(torch.jit.script(model)(images()), model(images()))


@pytest.mark.parametrize("num_classes", [0, 7])
def test_compile_as_one_graph(num_classes: int) -> None:
    model = tiny(num_classes=num_classes)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), model(images()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = compiled(images())
    assert output.dtype == (torch.float32 if num_classes else torch.bfloat16)


@pytest.mark.parametrize("num_classes", [0, 7])
def test_export_with_dynamic_shapes(num_classes: int) -> None:
    model = tiny(backbone="resnet18", num_classes=num_classes)
    batch, rows, columns = (torch.export.Dim(name, min=2) for name in ("batch", "rows", "columns"))
    # Multiples of the stride: torch 2.11 knows no sizes that are odd somewhere on the way.
    shapes = {0: batch, 2: 32 * rows, 3: 32 * columns}
    program: Any = torch.export.export(
        model, (images(),), dynamic_shapes={"x": shapes}, strict=False
    )
    x = torch.randn(5, 3, 96, 160)
    torch.testing.assert_close(program.module()(x), model(x))


def test_layer_decay_groups() -> None:
    model = create("trex_resnet50_cls")
    groups = param_groups_layer_decay(model, weight_decay=0.0, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scales) == len(list(model.parameters()))
    scale = {name: scales[id(p)] for name, p in model.named_parameters()}
    assert scale["fc.weight"] == 1
    projector = {value for name, value in scale.items() if name.startswith("proj.")}
    assert projector == {0.5}
    assert scale["layer4.2.conv1.weight"] == 0.25
    assert scale["conv1.weight"] == min(scale.values()) == 0.5**18  # 16 blocks between


def test_one_training_step_moves_every_parameter() -> None:
    model = tiny(drop_path_rate=0.1).train()
    model.set_grad_checkpointing()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(images(4)), torch.arange(4)).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert name.endswith("fc.bias") or not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "fx", "getter"])
def test_features_only(feature_cls: str) -> None:
    model = tiny(features_only=True, feature_cls=feature_cls, output_stride=16, num_classes=None)
    maps = model(images())
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    sizes = {64: 32, 24: 16, 48: 8, 96: 4, 192: 4}
    assert [tuple(m.shape[1:]) for m in maps] == [(c, side, side) for c, side in sizes.items()]
