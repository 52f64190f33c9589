"""The parts as a library: their names, documentation, and use in other people's loops."""

from __future__ import annotations

import inspect
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import trex_models
import trex_models.data
import trex_models.evaluation
import trex_models.method
from tests.documentation import ROOT, python_blocks
from tests.images import save_colors
from trex_models import Projector
from trex_models.data import (
    GLOBAL_AUGMENTATION,
    LOCAL_AUGMENTATION,
    CropSpec,
    FractalSource,
    MultiCrop,
)
from trex_models.data.decode import decode_image
from trex_models.evaluation import knn_accuracy, knn_votes
from trex_models.method import (
    LOOK,
    CosineSoftmax,
    Encoder,
    MemoryBank,
    MomentumEncoder,
    OnlineClassMeans,
    TReX,
    build_optimizer,
)

NAMES = {
    "trex_models": "CheckpointError CosineClassifier Projector TRexResNet WeightsError __version__",
    "trex_models.data": (
        "GLOBAL_AUGMENTATION LOCAL_AUGMENTATION TREX_CROPS ArraySource Batch CenterCrop CropSpec "
        "CsvSource EpochSampler FolderSource FractalSource HuggingFaceSource MultiCrop "
        "MultiCropDataset PhotometricAugmentation Source TarSource UnreadableImageError augment "
        "load_batches"
    ),
    "trex_models.evaluation": (
        "LogisticFit extract_features knn_accuracy knn_votes logistic nearest_neighbors "
        "preprocessing"
    ),
    "trex_models.method": (
        "LOOK CosineSoftmax Distillation Encoder LinearSoftmax MemoryBank MomentumEncoder "
        "Objective OnlineClassMeans TReX build_backbone build_optimizer learning_rates"
    ),
}
# Where each part of the method is from: papers, and equations of t-ReX.
SOURCES = {
    "Projector": ("2206.15369", "section 3.1"),
    "CosineClassifier": ("2206.15369", "quation 1"),
    "CosineSoftmax": ("2206.15369", "quation 1"),
    "OnlineClassMeans": ("2206.15369", "quation 2"),
    "TReX": ("2206.15369", "section 3"),
    "Encoder": ("t-ReX section 3.1",),
    "MemoryBank": ("2206.15369", "section 3.2", "1911.05722"),
    "MomentumEncoder": ("1911.05722", "Eq. 2"),
    "LOOK": ("2110.06014", "reconstruction"),
    "Distillation": ("2408.05088", "2104.14294"),
    "MultiCrop": ("2206.15369", "2006.09882"),
    "MultiCropDataset": ("2206.15369", "2006.09882"),
    "PhotometricAugmentation": ("2104.14294",),
    "build_optimizer": ("2206.15369",),
    "learning_rates": ("2206.15369",),
    "knn_accuracy": ("1805.01978", "2104.14294"),
    "knn_votes": ("1805.01978",),
}
PUBLIC: dict[str, Any] = {
    name: getattr(sys.modules[module], name)
    for module, names in NAMES.items()
    for name in names.split()
}
DOCUMENTED = {
    name: found
    for name, found in PUBLIC.items()
    if (inspect.isclass(found) or inspect.isfunction(found))
    and not name.endswith("Error")
    and name not in ("Source", "TRexResNet")
}
PAGE = (ROOT / "docs" / "library.md").read_text()


@pytest.mark.parametrize("module", NAMES)
def test_public_names_are_these(module: str) -> None:
    found = sys.modules[module].__all__
    assert sorted(found) == sorted(NAMES[module].split())
    assert all(hasattr(sys.modules[module], name) for name in found)


def test_the_page_has_all_names() -> None:
    elsewhere = {"CheckpointError", "TRexResNet", "WeightsError", "__version__"}
    missing = [name for name in PUBLIC if f"`{name}`" not in PAGE and name not in elsewhere]
    assert not missing


@pytest.mark.parametrize("name", DOCUMENTED)
def test_help_tells_arguments_results_errors_and_shapes(name: str) -> None:
    found = DOCUMENTED[name]
    assert what_help_lacks(found) == []
    text = inspect.getdoc(found) or ""
    assert [source for source in SOURCES.get(name, ()) if source not in text] == []
    if inspect.isclass(found):
        for method, function in vars(found).items():
            if inspect.isfunction(function) and not method.startswith("_"):
                assert function.__doc__, f"{name}.{method}"


def what_help_lacks(found: Callable[..., Any]) -> list[str]:
    """Return what a reader of an object's docstring would not learn."""
    text = inspect.getdoc(found) or ""
    arguments, _, _ = text.partition("Args:")[2].partition("\n\n")
    lacks = [
        f"argument {name}"
        for name in inspect.signature(found).parameters
        if not re.search(rf"^    {name}: \S", arguments, re.MULTILINE)
    ]
    if inspect.isclass(found):
        bodies = [vars(found).get(name) for name in ("__init__", "__post_init__")]
    else:
        bodies = [found]
        if not re.search(r"\bReturns?\b|\bYield|, then a cosine|SGD|Create|Find|Run|Fit", text):
            lacks.append("result")
    checks = [body for body in bodies if inspect.isfunction(body)]
    if any("raise ValueError" in source(body) for body in checks) and "Raises:" not in text:
        lacks.append("errors")
    tensors = re.findall(r"Tensor|ndarray", str(inspect.signature(found)))
    if tensors and not re.search(r"\(\w[\w *]*,", text):
        lacks.append("shapes")
    return lacks


def source(function: Callable[..., Any]) -> str:
    """Return a function's source; "" of one that dataclasses made."""
    try:
        return inspect.getsource(function)
    except OSError:
        return ""


def test_the_loop_of_the_page_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_colors(tmp_path / "train", 12, 40)
    save_colors(tmp_path / "val", 11, 40)
    loop, *_ = python_blocks(PAGE)
    for old, new in (
        ("convnext_atto", "test_resnet"),
        ("batch_size=256, epochs=100", "batch_size=12, epochs=12"),
        ("workers=8", "workers=0"),
        ("10 * sampler.steps_per_epoch", "4"),
        ("MemoryBank(8192", "MemoryBank(48"),
        ("OnlineClassMeans(bank))", "OnlineClassMeans(bank), ema_momentum=0.5)"),
        ("Projector(backbone.num_features)", "Projector(backbone.num_features, 1, 256)"),
        (", TREX_CROPS)", ", SMALL)"),
        ("CenterCrop(", "CenterCrop(size=(32, 32), "),
        ('"cuda" if torch.cuda.is_available() else "cpu"', '"cpu"'),
    ):
        assert loop.count(old) == 1, old
        loop = loop.replace(old, new)
    small = [
        CropSpec(1, 32, (0.5, 1.0), GLOBAL_AUGMENTATION),
        CropSpec(2, 16, (0.3, 0.6), LOCAL_AUGMENTATION),
    ]
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"SMALL": small}
    exec(loop, namespace)
    losses = torch.stack(namespace["losses"])
    assert len(losses) == namespace["bank"].batches == 36
    assert losses[:8].mean() > 1
    assert losses[-8:].mean() < 0.7  # ln 3 = 1.1 where nothing is learned
    accuracy = float(capsys.readouterr().out.removeprefix("k-NN: ").strip().rstrip("%"))
    assert accuracy > 80  # chance is 33
    backbone = timm.create_model("test_resnet", num_classes=0)
    backbone.load_state_dict(torch.load(tmp_path / "backbone.pth", weights_only=True))


BANK = MemoryBank(8, 4, 3)
SPECS = [
    CropSpec(2, 24, (0.25, 1.0), GLOBAL_AUGMENTATION),
    CropSpec(3, 16, (0.05, 0.25), LOCAL_AUGMENTATION),
]


def test_a_data_set_of_torchvision_and_a_plain_loader_train(tmp_path: Path) -> None:
    save_colors(tmp_path, 4, 40)
    torch.manual_seed(0)
    loader = DataLoader(ImageFolder(tmp_path, MultiCrop(SPECS)), batch_size=4, shuffle=True)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    method = TReX(Encoder(backbone, Projector(8, 1, 16, 6)), OnlineClassMeans(MemoryBank(8, 6, 3)))
    optimizer = build_optimizer(method, lr=0.1)
    before = [parameter.clone() for parameter in method.encoder.parameters()]
    for crops, labels in loader:
        assert [tuple(crop.shape) for crop in crops] == [(4, 3, 24, 24)] * 2 + [(4, 3, 16, 16)] * 3
        loss, logits = method(crops, labels)
        assert logits.shape == (20, 3)
        optimizer.zero_grad()
        loss.backward()
        method.update_bank(crops, labels)
        optimizer.step()
    assert not any(map(torch.equal, before, method.encoder.parameters()))
    bank = method.objective.bank
    assert bank is not None
    assert bank.batches == 3
    assert bank.indices.tolist() == [-1] * 8
    assert bank.written.tolist() == [2] * 4 + [1] * 4


def test_crops_of_the_transform_follow_torchs_generator_and_come_from_the_image() -> None:
    flat = np.full((50, 60, 3), (10, 200, 90), np.uint8)
    flip = trex_models.data.PhotometricAugmentation(flip=1, jitter=0, gray=0, blur=0, solarize=0)
    crops = MultiCrop([CropSpec(2, 8, (0.1, 1.0), flip)])(flat)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (torch.tensor([10, 200, 90]) / 255 - mean) / std
    assert len(crops) == 2
    for crop in crops:
        torch.testing.assert_close(crop, expected[:, None, None].expand(3, 8, 8))

    image, transform = FractalSource(1, 1, 40).read(0), MultiCrop(SPECS)
    torch.manual_seed(0)
    first, second = transform(image), transform(image)
    torch.manual_seed(0)
    again = transform(Image.fromarray(image).convert("RGBA"))
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, second))
    assert not torch.equal(first[0], first[1])


def test_pil_images_are_converted_as_files_are() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    rng = np.random.default_rng(0)
    hidden = rng.integers(0, 256, (20, 30, 4), dtype=np.uint8)
    hidden[..., 3] = 0
    gray = Image.fromarray(rng.integers(0, 65536, (20, 30), dtype=np.uint16))
    turned = Image.fromarray(hidden[..., :3])
    transform = MultiCrop(SPECS)
    for image, options in ((gray, {}), (turned, {"exif": exif}), (Image.fromarray(hidden), {})):
        file = io.BytesIO()
        image.save(file, "PNG", **options)
        crops = []
        for given in (decode_image(file.getvalue(), "x"), Image.open(file)):
            torch.manual_seed(0)
            crops.append(transform(given))
        assert all(map(torch.equal, *crops))


def test_backbones_without_pooling_are_rejected() -> None:
    encoder = Encoder(nn.Conv2d(3, 8, 3), Projector(8))
    with pytest.raises(ValueError, match=r"vector per image, not \(2, 8, 6, 6\).*num_classes=0"):
        encoder(torch.randn(2, 3, 8, 8))


def test_accuracy_of_neighbors_is_that_of_their_votes() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 90)
    features = np.eye(4, 16)[labels] + 0.6 * rng.standard_normal((90, 16))
    references, queries = (features[:60], labels[:60]), (features[60:], labels[60:])
    accuracy = knn_accuracy(*references, *queries, k=5)
    x, y, z, w = (torch.from_numpy(part) for part in (*references, *queries))
    votes = knn_votes(x, y, z, num_classes=4, k=5)
    right = (votes.argmax(1).numpy() == labels[60:]).sum()
    assert 10 < right < 30
    assert accuracy == right / 30
    assert knn_accuracy(x, y, z, w, k=5) == accuracy
    assert knn_accuracy(x, y, z, w + 4) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MemoryBank(0, 4, 3), "at least 1, got size=0"),
        (lambda: BANK.enqueue(torch.randn(2, 5), torch.zeros(2)), r"\(B, 4\).*\(2, 5\)"),
        (lambda: BANK.enqueue(torch.randn(2, 4), torch.zeros(3)), r"got \(2, 4\) and"),
        (lambda: MomentumEncoder(nn.Linear(2, 2), 1.5), r"in \[0, 1\], got 1.5"),
        (lambda: OnlineClassMeans(BANK, 0.0), "temperature must be positive, got 0.0"),
        (lambda: CosineSoftmax(4, 3, -1.0), "temperature must be positive, got -1.0"),
        (lambda: LOOK(BANK, temperature=0.0), "temperature must be positive"),
        (lambda: LOOK(BANK, neighbors=0), "neighbors must be at least 1, got 0"),
        (lambda: CropSpec(0, 24, (0.1, 1.0), GLOBAL_AUGMENTATION), "at least 1, got 0 and 24"),
        (lambda: MultiCrop(SPECS)(Image.new("F", (9, 9))), "no defined range"),
        (
            lambda: knn_accuracy(np.eye(2), np.arange(2), np.eye(2), np.arange(3)),
            "labels of the queries must be 2",
        ),
    ],
)
def test_wrong_arguments_are_rejected(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
