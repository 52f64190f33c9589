"""Task segmentation: scores, windows, training crops, exact resume, layouts of masks, models."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import confusion_matrix

from tests.replicas import write
from trex_models.data.scenes import SceneSource
from trex_models.evaluation import segmentation_head
from trex_models.evaluation.frozen_model import FrozenModel
from trex_models.evaluation.segmentation_head import LinearSegmentation, Settings
from trex_models.transfer import segmentation as task
from trex_models.transfer.__main__ import main
from trex_models.transfer.datasets import DATASETS, OpenedDataset, Sizes, open_checked, select

SMALL = Settings(iterations=6, batch_size=2, crop=32)


PLAIN = replace(SMALL.augmentation, jitter=0.0)
COLORS = np.array([*product((20, 220), repeat=3), (120, 120, 120)], np.uint8)


class Colored(SceneSource):
    """Scenes whose colors give away the class."""

    def read(self, index: int) -> np.ndarray:
        return COLORS[self.mask(index)]


def pixels() -> FrozenModel:
    return FrozenModel.load("pixels", features="features_only")


def miou(model: FrozenModel, source: Any, settings: Settings, path: Path) -> float:
    segmenter = LinearSegmentation(model, len(source.classes), settings, path, "key")
    segmenter.train(source, "test")
    return float(np.nanmean(segmentation_head.class_iou(segmenter.test(source, "test").sum(0))))


def test_iou_equals_that_of_a_confusion_matrix() -> None:
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 4, (2, 20, 30), dtype=np.uint8)
    labels[labels == 2] = 0  # only predicted
    labels[:5] = 255
    counts = segmentation_head.class_counts(
        torch.from_numpy(predicted), torch.from_numpy(labels), 6
    ).numpy()
    valid = labels != 255
    matrix = confusion_matrix(labels[valid], predicted[valid], labels=range(6))
    correct = matrix.diagonal()
    assert np.array_equal(counts, [correct, matrix.sum(0), matrix.sum(1)])
    for label, iou in enumerate(segmentation_head.class_iou(counts)):
        is_true, is_found = labels[valid] == label, predicted[valid] == label
        union = (is_true | is_found).sum()
        assert iou == (is_true & is_found).sum() / union if union else np.isnan(iou)


def test_windows_cover_an_axis() -> None:
    expected = {512: [0], 513: [0, 1], 853: [0, 341], 854: [0, 341, 342]}
    assert {
        length: segmentation_head.window_starts(length, 512, 341) for length in expected
    } == expected
    starts = segmentation_head.window_starts(2048, 512, 341)
    assert set().union(*(range(s, s + 512) for s in starts)) == set(range(2048))


def test_merged_windows_equal_the_plain_computation(resized: list[Any]) -> None:
    torch.manual_seed(0)
    logits, size = torch.randn(4, 150, 3, 3), (70, 90)
    boxes = [(slice(y, y + 32), slice(x, x + 32)) for y in (0, 8) for x in (0, 20)]
    total, overlaps = torch.zeros(150, 40, 52), torch.zeros(40, 52)
    for window, (rows, columns) in zip(logits, boxes, strict=True):
        total[:, rows, columns] += F.interpolate(window[None], (32, 32), mode="bilinear")[0]
        overlaps[rows, columns] += 1
    upsampled = F.interpolate((total / overlaps)[None], size, mode="bilinear")[0]
    one = F.interpolate(logits[:1], (32, 32), mode="bilinear")[0].argmax(0)
    labels = segmentation_head.merge_windows(logits, boxes, (40, 52), size)
    assert torch.equal(labels.long(), upsampled.argmax(0))
    assert max(out.numel() for _, out in resized[-150:]) == 70 * 90  # one class at a time
    assert torch.equal(
        segmentation_head.merge_windows(logits[:1], boxes[:1], (32, 32), (32, 32)).long(), one
    )


def test_training_crops_move_images_and_masks_alike() -> None:
    settings = Settings(crop=48, scale=(0.4, 1.5), augmentation=PLAIN)
    crops = segmentation_head._TrainingCrops(Colored(10, 96), settings, (1.0, 1.0, 1.0))
    images, masks = (batch.numpy() for batch in crops.__getitems__(range(60)))
    inside = masks != 255
    assert np.array_equal(images.min(3) < 255, inside)
    assert 0.02 < np.mean(~inside) < 0.4
    assert (images[inside] == COLORS[masks[inside]]).mean() > 0.8  # all but resized borders
    shares = [np.bincount(m[m != 255]).max() / np.sum(m != 255) for m in masks]
    assert np.mean(np.array(shares) < 0.75) > 0.7
    again = crops.__getitems__(range(30, 32))
    assert np.array_equal(again[0], images[30:32])


def test_learning_rate() -> None:
    rates = [Settings().learning_rate(i) for i in (0, 750, 1500, 20_000, 39_999)]
    expected = [1e-9, 0.5 * (1 - 750 / 4e4) * 1e-3, (1 - 1500 / 4e4) * 1e-3, 5e-4, 2.5e-8]
    assert rates == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("method", "calls"), [("_step", 4), ("_segment", 3)])
def test_an_interrupted_evaluation_continues_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, calls: int
) -> None:
    source = SceneSource(5, 40)
    expected = miou(pixels(), source, SMALL, tmp_path / "a.safetensors")
    monkeypatch.setattr(segmentation_head, "_SAVE_EVERY", 0.0)
    original, left = getattr(LinearSegmentation, method), [calls]

    def interrupted(self: LinearSegmentation, *args: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(LinearSegmentation, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        miou(pixels(), source, SMALL, tmp_path / "b.safetensors")
    left[0] = 100
    assert miou(pixels(), source, SMALL, tmp_path / "b.safetensors") == expected
    total = SMALL.iterations if method == "_step" else len(source)
    assert 100 - left[0] == total - (calls - 1)  # nothing was repeated
    heads = [(tmp_path / f"{name}.safetensors").read_bytes() for name in "ab"]
    assert heads[0] == heads[1]


def test_informative_features_score_higher(tmp_path: Path) -> None:
    settings = replace(SMALL, iterations=40, crop=64, lr=0.02, augmentation=PLAIN)
    found = miou(pixels(), Colored(6, 64), settings, tmp_path / "a.safetensors")
    blind = pixels()
    blind.model.register_forward_hook(lambda _m, _i, output: 0 * output)
    assert 3 * miou(blind, Colored(6, 64), settings, tmp_path / "b.safetensors") < found


@pytest.mark.parametrize(
    ("name", "channels", "stride"),
    [
        *[("test_resnet", 96, 32), ("test_efficientnet", 64, 32), ("test_vit", 64, 16)],
        *[("test_mambaout", 64, 32), ("pixels", 192, 8)],
    ],
)
def test_feature_maps_of_any_size(name: str, channels: int, stride: int) -> None:
    frozen = FrozenModel.load(name, features="features_only", untrained=True)
    with torch.inference_mode():
        maps = frozen.model(torch.rand(1, 3, 128, 192))
    assert maps.shape == (1, channels, 128 // stride, 192 // stride)
    assert (frozen.shape[0], frozen.metadata["stride"]) == (channels, stride)


def test_scenes_are_deterministic_and_list_their_classes() -> None:
    source, later = SceneSource(6, 64), SceneSource(2, 64, first=4)
    assert np.array_equal(source.read(4), later.read(0))
    assert source.digest() != later.digest()
    for index in range(6):
        visible = set(np.unique(source.mask(index)).tolist()) - {0}
        assert set(np.flatnonzero(source.targets[index]) + 1) == visible
    assert source.targets.dtype == np.int8


# Layouts. Images are 8 x 6 pixels; a mask has label k in row k, 255 elsewhere.


def add(root: Path, images: str, masks: str, names: str, labels: range = range(3)) -> None:
    for name in names.split():
        for folder, suffix in ((images, "jpg"), (masks, "png")):
            (root / folder).mkdir(parents=True, exist_ok=True)
            pixels = np.full((6, 8), 255, np.uint8)
            pixels[: len(labels)] = np.array(labels)[:, None]
            Image.fromarray(pixels).save(root / folder / f"{name}.{suffix}")


def own(path: Path) -> OpenedDataset:
    return open_checked(select(f"mine={path}")[0], Path("/absent"))


def test_layouts_of_the_published_datasets(tmp_path: Path) -> None:
    voc, ade = tmp_path / "VOCdevkit/VOC2012", tmp_path / "ADEChallengeData2016"
    for split, ade_split, names in (("train", "training", "a b"), ("val", "validation", "c")):
        add(voc, "JPEGImages", "SegmentationClass", names, range(6))
        write(voc / "ImageSets/Segmentation" / f"{split}.txt", *names.split())
        add(ade, f"images/{ade_split}", f"annotations/{ade_split}", names, range(4))
    write(ade / "objectInfo150.txt", "Idx\tName", "1\twall", "2\tbox, case", "3\tsky")
    found = open_checked(replace(DATASETS["ade20k"], sizes=Sizes(3, 2, 1)), tmp_path)
    train: Any = found.sources[0]
    assert train.classes == ["wall", "box", "sky"]
    assert train.mask(0)[:, 0].tolist() == [255, 0, 1, 2, 255, 255]
    with pytest.raises(ValueError, match=r"voc2012: no training mask has the class bus \(label 6"):
        open_checked(replace(DATASETS["voc2012"], sizes=Sizes(21, 2, 1)), tmp_path)


@pytest.mark.parametrize("layout", ["train test", "train val test", ""])
def test_own_folders(tmp_path: Path, layout: str) -> None:
    for part in layout.split():
        add(tmp_path, f"{part}/images", f"{part}/masks", f"{part}1 {part}2")
    if not layout:
        add(tmp_path, "images", "masks", "a b c d e f g h i j")
    write(tmp_path / "classes.txt", "sea", "land", "sky")
    parts = own(tmp_path).sources
    assert [len(part) for part in parts] == {"train test": [2, 2], "": [8, 2]}.get(layout, [4, 2])
    assert parts[1].classes == ["sea", "land", "sky"]
    (tmp_path / "classes.txt").unlink()
    assert own(tmp_path).sources[0].classes == ["class 0", "class 1", "class 2"]


def save(path: str, *labels: int, shape: tuple[int, ...] = (6, 4), dtype: Any = np.uint8) -> Any:
    pixels = np.tile(np.array(labels, dtype), shape)
    return lambda root: Image.fromarray(pixels).save(root / path)


A, B = "train/masks/a.png", "test/masks/b.png"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / A).unlink(), "masks/a.png is missing; each image needs"),
        (lambda root: (root / "test/images/b.jpg").unlink(), "images contains no images"),
        (save("test/masks/c.png", 0), "c.png is the mask of no image"),
        (save("test/images/b.bmp", 0), "b.png is the mask of two images"),
        (save(A, 0, shape=(8, 6)), "a.png has 6 x 8 pixels, but the image, upright, 8 x 6"),
        (save(A, 0, shape=(6, 8, 3)), "a.png has the mode RGB; save class indices"),
        (save(A, 0, 300, dtype=np.uint16), "a.png has labels up to 300"),
        (save(A, 0, 2), r"no training mask has the class class 1 \(label 1"),
        (save(B, 0, 3), "b.png has the label 3, but there are 3 classes"),
        (save(B, 255, 255), "test pixels are all ignored; add masks with two classes"),
        (
            lambda root: [save(path, 0, 0)(root) for path in (A, B)],
            "training masks have one class; add masks with two classes",
        ),
        (lambda root: (root / A).write_bytes(b""), "a.png cannot be read as an image"),
    ],
)
def test_bad_masks_are_reported(tmp_path: Path, change: Any, message: str) -> None:
    add(tmp_path, "train/images", "train/masks", "a")
    add(tmp_path, "test/images", "test/masks", "b")
    change(tmp_path)
    with pytest.raises(ValueError, match=f"^mine: .*{message}.*; needed: "):
        own(tmp_path)


def test_masks_match_images_rotated_by_exif(tmp_path: Path) -> None:
    add(tmp_path, "images", "masks", "a b c")
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in "abc":
        Image.new("RGB", (6, 8)).save(tmp_path / f"images/{name}.jpg", exif=exif)
    assert own(tmp_path).sources[0].read(0).shape == (6, 8, 3)


def test_the_command_writes_scores_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add(tmp_path, "images", "masks", "a b c d e")
    monkeypatch.setitem(task._DATASETS, "mine", SMALL)
    arguments = f"evaluate --model pixels --datasets mine={tmp_path} --iterations 3 --workers 0"
    assert main([*arguments.split(), "--output", str(tmp_path / "r.json")]) == 0
    entry = json.loads((tmp_path / "r.json").read_text())["tasks"]["segmentation"]["mine"]
    assert entry["segmentation"]["iterations"] == 3
    assert (entry["stride"], entry["channels"], len(entry["class_iou"])) == (8, 192, 3)
    assert re.search("mIoU .* %, pixel accuracy", capsys.readouterr().out)
    assert (tmp_path / "r.mine.segmentation.png").stat().st_size > 1000
    # A changed test image is tested again, with the same head.
    for part in ("images", "masks"):
        shutil.move(tmp_path / part, tmp_path / "train" / part)
        (tmp_path / "test" / part).mkdir(parents=True)
    add(tmp_path, "test/images", "test/masks", "z")
    steps: list[int] = []
    step = LinearSegmentation._step

    def counted(*arguments: Any) -> None:
        steps.append(1)
        step(*arguments)

    monkeypatch.setattr(LinearSegmentation, "_step", counted)
    for _ in range(2):
        (tmp_path / "test/images/z.jpg").touch()
        os.utime(tmp_path / "test/images/z.jpg", (len(steps), len(steps)))
        assert main([*arguments.split(), "--output", str(tmp_path / "r.json")]) == 0
    assert len(steps) == 3


def test_one_image_is_not_enough(tmp_path: Path) -> None:
    add(tmp_path, "images", "masks", "a")
    with pytest.raises(ValueError, match="has one image, but training and testing need one each"):
        own(tmp_path)


@pytest.mark.cuda
def test_cuda_scores_are_those_of_the_cpu(tmp_path: Path) -> None:
    source, settings = SceneSource(5, 64), replace(SMALL, crop=64)
    scores = []
    for device in ("cpu", "cuda"):
        model = FrozenModel.load(
            "resnet10t", features="features_only", untrained=True, device=device
        )
        scores.append(miou(model, source, settings, tmp_path / f"{device}.safetensors"))
    assert scores[1] == pytest.approx(scores[0], abs=0.05)
