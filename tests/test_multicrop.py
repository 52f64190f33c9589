"""Multi-crop batches: order, randomness and contents."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.images import save_image
from trex_models.data.decode import UnreadableImageError
from trex_models.data.fractals import FractalSource
from trex_models.data.image_files import FolderSource
from trex_models.data.loading import NUM_BUFFERS, load_batches
from trex_models.data.multicrop import (
    TREX_CROPS,
    CropSpec,
    EpochSampler,
    MultiCrop,
    MultiCropDataset,
    augment,
    draw_boxes,
    reduction_factor,
)
from trex_models.data.photometric import GLOBAL_AUGMENTATION, LOCAL_AUGMENTATION, NUM_PARAMETERS
from trex_models.data.sources import ArraySource
from trex_models.train.__main__ import parse
from trex_models.train.build import crop_specs

SPECS = [
    CropSpec(2, 24, (0.25, 1.0), GLOBAL_AUGMENTATION),
    CropSpec(3, 16, (0.05, 0.25), LOCAL_AUGMENTATION),
]


def dataset(seed: int = 0) -> MultiCropDataset:
    return MultiCropDataset(FractalSource(3, 5, 32), SPECS, seed)


def test_default_crops_are_those_of_the_paper() -> None:
    global_crops, local_crops = TREX_CROPS
    assert global_crops == CropSpec(1, 224, (0.25, 1.0), GLOBAL_AUGMENTATION)
    assert local_crops == CropSpec(8, 96, (0.05, 0.25), LOCAL_AUGMENTATION)
    assert MultiCropDataset(FractalSource(3, 5, 32)).specs == TREX_CROPS
    assert MultiCrop().specs == list(TREX_CROPS)


def test_shapes_and_labels() -> None:
    batch = dataset().__getitems__([(0, 0), (0, 7), (0, 14), (0, 3)])
    assert [c.shape for c in batch.crops] == [(8, 24, 24, 3), (12, 16, 16, 3)]
    assert [p.shape for p in batch.parameters] == [(8, NUM_PARAMETERS), (12, NUM_PARAMETERS)]
    assert batch.labels.tolist() == [0, 1, 2, 0]
    assert batch.crops[0].dtype == torch.uint8
    images = augment(batch, torch.device("cpu"))
    assert [i.shape for i in images] == [(8, 3, 24, 24), (12, 3, 16, 16)]
    assert all(i.is_contiguous(memory_format=torch.channels_last) for i in images)
    assert all(i.dtype == torch.float32 for i in images)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    together, alone = (dataset().__getitems__(keys) for keys in ([(0, 3), (0, 9)], [(0, 9)]))
    for spec, a, b, p, q in zip(
        SPECS, together.crops, alone.crops, together.parameters, alone.parameters, strict=True
    ):
        second = torch.arange(spec.count) * 2 + 1  # crop-major
        assert torch.equal(a[second], b)
        assert torch.equal(p[second], q)


def test_draws_differ_by_epoch_sample_seed_and_crop() -> None:
    first = dataset().__getitems__([(0, 3)])
    for seed, key in ((0, (1, 3)), (0, (0, 4)), (1, (0, 3))):
        other = dataset(seed).__getitems__([key])
        assert not torch.equal(first.parameters[0], other.parameters[0])
    assert not torch.equal(first.crops[0][0], first.crops[0][1])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_memory_is_written_over_only_after_the_next_batch_is_asked_for(workers: int) -> None:
    keys = [[(epoch, index) for index in range(4)] for epoch in range(12)]
    keys[5] = keys[5][:3]  # a smaller batch
    expected = [dataset().__getitems__(some) for some in keys]
    reusing = MultiCropDataset(dataset().source, SPECS, 0, num_buffers=NUM_BUFFERS)
    held = []
    for batch, other in zip(load_batches(reusing, keys, workers), expected, strict=True):
        time.sleep(0.05)  # lets the workers load ahead as far as possible
        for ours, alone in ((batch.crops, other.crops), (batch.parameters, other.parameters)):
            assert all(map(torch.equal, ours, alone))
        assert torch.equal(batch.labels, other.labels)
        held.append(batch)
    kept = [torch.equal(a.crops[0], b.crops[0]) for a, b in zip(held, expected, strict=True)]
    assert all(kept) == (workers == 0)
    assert all(kept[-workers:])


def test_epochs_are_permutations_without_the_last_part() -> None:
    sampler = EpochSampler(10, 4, epochs=3, seed=0)
    batches = list(sampler)
    assert len(batches) == len(sampler) == sampler.total_steps == 6
    orders = []
    for epoch in range(3):
        keys = [key for batch in batches[2 * epoch : 2 * epoch + 2] for key in batch]
        assert {e for e, _ in keys} == {epoch}
        indices = [i for _, i in keys]
        assert len(set(indices)) == 8
        assert set(indices) <= set(range(10))
        orders.append(indices)
    assert orders[0] != orders[1] != orders[2]
    with pytest.raises(ValueError, match="batch size 16 exceeds the dataset's 15 images"):
        EpochSampler(15, 16, 1, 0)
    with pytest.raises(ValueError, match="a multiple of the number of processes, 3 .*, got 4"):
        EpochSampler(15, 4, 1, 0, 0, 3)


@pytest.mark.parametrize("world_size", [2, 4])
def test_global_batches_do_not_depend_on_the_world_size(world_size: int) -> None:
    alone = list(EpochSampler(21, 8, 2, seed=3))
    ranks = [list(EpochSampler(21, 8, 2, 3, rank, world_size)) for rank in range(world_size)]
    for step, batch in enumerate(alone):
        assert [key for rank in ranks for key in rank[step]] == batch


@pytest.mark.parametrize("start", [0, 1, 2, 3, 5])
def test_sampler_continues_at_any_step(start: int) -> None:
    whole = list(EpochSampler(10, 4, 3, seed=0))
    assert list(EpochSampler(10, 4, 3, seed=0, start_step=start)) == whole[start:]


def test_substitutes_keep_their_label_and_index() -> None:
    """Crops, label and index at each position belong to the same image."""

    class Torn(ArraySource):
        def read(self, index: int) -> np.ndarray:
            if index in (2, 7):
                raise UnreadableImageError(f"image {index} is torn")
            return super().read(index)

    images = [np.full((50, 60, 3), 10 * index, np.uint8) for index in range(12)]
    source = Torn(images, [index % 3 for index in range(12)], ["a", "b", "c"])
    keys = [(0, 2), (0, 5), (0, 7), (1, 2)]
    batch = MultiCropDataset(source, SPECS, 0, substitute=True).__getitems__(keys)
    assert sorted(batch.unreadable) == [2, 7]
    assert batch.indices[1] == 5
    assert not {2, 7} & {*batch.indices.tolist()}
    assert batch.labels.tolist() == [index % 3 for index in batch.indices.tolist()]
    assert batch.labels[[0, 2, 3]].tolist() != [2 % 3, 7 % 3, 2 % 3]
    for spec, crops in zip(SPECS, batch.crops, strict=True):
        assert (crops == 10 * batch.indices.repeat(spec.count)[:, None, None, None]).all()


def test_no_crop_of_a_reduced_image_is_enlarged() -> None:
    """Boxes in an image that is reduced by the factor have sides of at least S pixels."""
    # sqrt(3/4 * 0.25 * 1034 * 1035) = 447.9 < 2 * 224. The last two only have the central box.
    sizes = [(375, 500), (1034, 1035), (1034, 1036), (3000, 4000), (9000, 440), (450, 9000)]
    assert [reduction_factor(TREX_CROPS, *size) for size in sizes] == [1, 1, 2, 4, 1, 2]
    rng, factors = np.random.default_rng(0), set()
    for _ in range(2000):
        height, width = np.exp(rng.uniform(3, 8, 2)).astype(int).tolist()
        low, size = float(rng.uniform(0.01, 1)), int(rng.integers(8, 256))
        spec = CropSpec(8, size, (low, float(rng.uniform(low, 1.5))), LOCAL_AUGMENTATION)
        factor = reduction_factor([spec], height, width)
        factors.add(factor)
        boxes = draw_boxes(rng, 8, -(-height // factor), -(-width // factor), spec.scale)
        assert factor == 1 or min(min(box[2:]) for box in boxes) >= size
    assert factors == {1, 2, 4}


def test_only_the_training_crops_are_decoded_at_reduced_size(tmp_path: Path) -> None:
    for label in "ab":
        save_image(tmp_path / label / "0.jpg", size=(400, 300), quality=95)
    source = FolderSource(tmp_path)
    auto = MultiCropDataset(source, SPECS)
    exact = MultiCropDataset(source, SPECS, decode="exact")
    assert exact.source is source
    assert auto.source.read(0).shape == (75, 100, 3)
    assert source.read(0).shape == (300, 400, 3)
    ours, others = (data.__getitems__([(0, 0), (0, 1)]) for data in (auto, exact))
    for crops, expected in zip(ours.crops, others.crops, strict=True):
        difference = (crops.float() - expected.float()).abs().mean()
        assert 0 < difference < 3
    assert all(map(torch.equal, ours.parameters, others.parameters))


@pytest.mark.parametrize("flip", [0, 1])
def test_flips_follow_the_options(flip: int) -> None:
    """Levels increase to the right, in the image and in crops that are not flipped."""
    kinds, settings = ("global", "local"), (f"flip={flip}", "jitter=0", "solarize=0")
    options = [f"--crops.{kind}-augmentation.{each}" for kind in kinds for each in settings]
    specs = crop_specs(parse("smoke", ["--output", "unused", *options]).crops)
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None] * 4, (64, 64, 3)).copy()
    source = ArraySource([ramp] * 20, np.zeros(20, np.int64), ["ramp"])
    batch = MultiCropDataset(source, specs).__getitems__([(0, index) for index in range(20)])
    for crops in augment(batch):
        rises = crops[..., -1].mean((1, 2)) > crops[..., 0].mean((1, 2))
        assert rises.tolist() == [not flip] * len(crops)
