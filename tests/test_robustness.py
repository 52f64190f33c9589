"""Task robustness: layouts of ImageNet's variants, and predictions among their classes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from timm.data import ImageNetInfo

from tests.models import TINY, save_model
from tests.replicas import refused, touch
from trex_models.transfer import readers, robustness
from trex_models.transfer.__main__ import main
from trex_models.transfer.datasets import DATASETS, Dataset, OpenedDataset, Sizes, open_checked
from trex_models.transfer.readers import imagenet_classes, timm_file
from trex_models.transfer.report import read_report
from trex_models.transfer.task import Context, Plan

WNIDS = ImageNetInfo().label_names()[::20]  # 50 classes
SUBSETS = {
    name: [index for index, wnid in enumerate(WNIDS) if wnid in imagenet_classes(title)]
    for name, title in (("imagenet-a", "ImageNet-A"), ("imagenet-r", "ImageNet-R"))
}
REAL = [[], [7], [3, 9], *([index] for index in range(47))]


@pytest.fixture
def _few_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(name: str) -> str:
        return "\n".join(wnid for wnid in timm_file(name).split() if wnid in WNIDS)

    monkeypatch.setattr(readers, "timm_file", kept)
    monkeypatch.setattr(robustness, "timm_file", lambda _: json.dumps(REAL))
    for name, dataset in DATASETS.items():
        if dataset.kind == "imagenet":
            monkeypatch.setitem(DATASETS, name, small(dataset))


def small(dataset: Dataset) -> Dataset:
    count = len(SUBSETS.get(dataset.name, WNIDS))
    return replace(dataset, sizes=Sizes(count, None, count))


def scores(opened: OpenedDataset, logits: np.ndarray) -> dict[str, float]:
    class Cache:
        def features(self, *_: Any) -> np.ndarray:
            return logits

    stand_in: Any = Cache()
    entry = robustness.Robustness().evaluate(opened, Context(stand_in, stand_in, Plan()))
    return {name: score["value"] for name, score in entry["scores"].items()}


def test_lists_of_timm() -> None:
    synsets = imagenet_classes()
    for title in ("ImageNet-A", "ImageNet-R"):
        indices = timm_file(f"{title.lower().replace('-', '_')}_indices.txt").split()
        assert imagenet_classes(title) == [synsets[int(index)] for index in indices]
    real = json.loads(timm_file("imagenet_real_labels.json"))
    assert (len(real), sum(not labels for labels in real)) == (50000, 3163)


@pytest.mark.usefixtures("_few_classes")
@pytest.mark.parametrize(
    "name", ["imagenet-v2", "numbered", "imagenet-a", "imagenet-r", "imagenet-sketch"]
)
def test_predictions_are_among_the_classes_of_the_dataset(tmp_path: Path, name: str) -> None:
    numbered, name = name == "numbered", name.replace("numbered", "imagenet-v2")
    indices = SUBSETS.get(name, list(range(50)))
    folders = [str(index) if numbered else WNIDS[index] for index in indices]
    touch(tmp_path / name, [*(f"{folder}/x.jpg" for folder in folders), "README.txt", "0.jpg"])
    opened = open_checked(DATASETS[name], tmp_path)
    (source,) = opened.sources
    rows = range(len(indices))
    truth = [indices[folders.index(Path(source.name(i)).parent.name)] for i in rows]
    logits = np.full((len(rows), 50), 99, np.float32)  # of other classes
    logits[:, indices] = np.random.default_rng(0).normal(size=(len(rows), len(rows)))
    logits[rows, truth] = 9
    result = scores(opened, logits)
    assert result == dict.fromkeys(["top-1", "top-5"] if len(rows) == 50 else ["top-1"], 1.0)
    logits[:, indices[:4]] += 20
    found = scores(opened, logits)
    assert found.pop("top-5", 1) == 1
    assert found == {"top-1": pytest.approx(4 / len(rows))}
    (tmp_path / name / folders[-1]).rename(tmp_path / name / "n99999999")
    assert f"class folders of {opened.dataset.title}; missing" in refused(opened.dataset, tmp_path)


@pytest.mark.usefixtures("_few_classes")
def test_real_labels_are_those_of_the_file_name(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).permutation(50) + 1
    touch(tmp_path / "imagenet/val", map("{}/ILSVRC2012_val_{:08d}.JPEG".format, WNIDS, numbers))
    opened = open_checked(DATASETS["imagenet-real"], tmp_path)
    assert (
        "; 1 images without any are left out"
        in robustness.Robustness().protocol(opened, Plan())["ReaL"]
    )
    logits = np.zeros((50, 50), np.float32)
    for row, number in zip(logits, numbers, strict=True):
        row[REAL[number - 1][-1:]] = 1
    result = scores(opened, logits)
    assert (result["ReaL"], result["top-1"] < 0.2) == (1, True)
    logits = np.eye(50, dtype=np.float32)
    other = next(i for i in range(50) if not any(i in subset for subset in SUBSETS.values()))
    logits[:, other] = 2
    result = scores(opened, logits)
    assert result.items() >= {"top-1": 0.02, "top-5": 1.0}.items()
    assert result["ReaL"] == pytest.approx(sum(other in labels for labels in REAL) / 49)
    assert [v for k, v in result.items() if k.startswith("top-1, ImageNet-")] == [1, 1]
    touch(tmp_path, [f"imagenet/val/{WNIDS[0]}/ILSVRC2012_val_00000051.JPEG"])
    source: Any = DATASETS["imagenet-real"].open(tmp_path)[0]
    with pytest.raises(ValueError, match=r"51\.JPEG has no number from 1 to 50, by which"):
        robustness.real_labels(source)


@pytest.mark.usefixtures("_few_classes")
def test_other_models_are_refused_before_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in (("four", 4), ("right", 1000)):
        cfg = {"input_size": [3, 32, 32], "license": "mit"}
        save_model(tmp_path / name, "resnet10t", cfg, num_classes=count, **TINY)
    out = tmp_path / "out.json"
    options = f"--datasets imagenet-a --data-root {tmp_path} --output {out} --workers 0".split()
    for model, message in (
        ("pixels", "pixels has no classifier (trex_resnet50_cls and resnet50.a1_in1k have one)"),
        (f"{tmp_path}/four", "has 4 logits, but the task robustness needs the 1,000"),
        ("resnet10t --untrained", "--untrained has no classifier for the task robustness"),
    ):
        assert main(["evaluate", *options, "--model", *model.split()]) == 2
        assert message in capsys.readouterr().err
    touch(tmp_path, [f"imagenet-a/{WNIDS[index]}/x.jpg" for index in SUBSETS["imagenet-a"]])
    assert main(["evaluate", *options, "--model", f"{tmp_path}/right"]) == 0
    entry = read_report(out)["tasks"]["robustness"]["imagenet-a"]
    share = 1 / len(SUBSETS["imagenet-a"])  # all images are the same
    assert entry["scores"]["top-1"]["value"] == share
    assert "train" not in entry
