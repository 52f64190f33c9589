"""``python -m hub build --results``: our measured results in model cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
from huggingface_hub import EvalResultEntry, HfApi, ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results

from hub import cards
from hub.__main__ import main as hub_main
from hub.build_folders import build_folders
from hub.hub_folder import EVAL_RESULTS, HubModel, load_folder
from hub.publish import publish
from hub.results import merge_results
from hub.verify import verify
from tests.images import save_colors
from tests.loopback_hub import LFS_WARNING, HubServer
from tests.models import tiny_classifier, tiny_folder
from trex_models.evaluation.frozen_model import weights_digest
from trex_models.pretrained import naver
from trex_models.transfer.__main__ import main as transfer_main
from trex_models.transfer.report import results_by_task
from trex_models.transfer.retrieval import Retrieval

OWNER: dict[str, Any] = {"owner": "Ada", "license": "cc-by-4.0"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and, in ``reports``, the reports on them and on pixels."""
    work = tmp_path_factory.mktemp("results")
    save_colors(work / "data" / "train", 5, 32)
    save_colors(work / "data" / "test", 7, 32)
    models = tiny_folder(work / "models" / "small"), tiny_classifier(work / "models" / "cls")
    command = f"evaluate --model {models[0]},{models[1]},pixels --datasets mine={work}/data"
    command += f" --output {work}/reports --task classification,few-shot,retrieval --shots 1,2"
    command += " --episodes 2 --seeds 1 --workers 0 --device cpu"
    with pytest.MonkeyPatch.context() as patch:  # no pictures, which take most of the time
        patch.setattr(Retrieval, "has_picture", False)
        assert transfer_main(command.split()) == 0
    for path in (work / "reports").glob("*.json"):
        path.rename(path.with_name(path.name.rpartition("-")[2]))
    return work


def header(folder: Path) -> dict[Any, Any]:
    data: Any = ModelCard.load(folder / "README.md").data
    _, results = model_index_to_eval_results(data.to_dict()["model-index"])
    return {(result.dataset_type, result.metric_name): result for result in results}


def test_each_model_gets_its_own_results(work: Path, tmp_path: Path) -> None:
    paths = [work / "reports" / f"{name}.json" for name in ("cls", "small")]
    command = f"build {work}/models --output {tmp_path} --owner Ada --license mit --namespace ada"
    assert hub_main([*command.split(), "--results", *map(str, paths)]) == 0
    for path in paths:
        report, folder = json.loads(path.read_text()), tmp_path / path.stem
        results, text = header(folder), (folder / "README.md").read_text()
        merged = merge_results([report], f"ada/{folder.name}")
        assert list(results.values()) == [result for result, _ in merged]
        linear = results["mine", "classification: top-1 of a linear classifier (%)"]
        assert linear.metric_value == round(100 * report["datasets"]["mine"]["top1"]["mean"], 2)
        for (task, name), entry in results_by_task(report).items():
            for score, found in entry.get("scores", {}).items():
                result = results[name, f"{task}: {score} (%)"]
                value, start, end = (100 * x for x in (found["value"], *found["interval"]))
                assert result.metric_value == round(value, 2)
                assert ("feature-extraction" in result.task_type) is (task == "retrieval")
                row = f"| {task}, {name}: {score} | 21 | {value:.1f} ({start:.1f} to {end:.1f}) |"
                assert row in text
        for words in (
            "**Measured by the maintainers of this repository**",
            f"{report['created'][:10]}, with trex_models {report['versions']['trex_models']}, ",
            f"{path.stem}: this repository, weights {report['model']['weights_sha256'][:12]}",
            "few-shot, mine: episodes: 2; images: the smallest hashes of",
        ):
            assert words in text
        assert not any(words in text for words in (str(work), "Not reported", "\n\n\n"))
        assert not (folder / EVAL_RESULTS).exists()


def test_reports_are_combined(work: Path, tmp_path: Path) -> None:
    path, model = work / "reports" / "cls.json", work / "models" / "cls"
    report = json.loads(path.read_text())
    report["datasets"] = {"imagenet": report["datasets"]["mine"]}
    entry = report["tasks"]["retrieval"]["mine"] | {"whitening": {"dataset": "pets"}}
    entry["scores"]["mAP"]["value"] = 0.123
    report["tasks"] = {"retrieval": {"mine": entry}}
    report["model"]["weights_sha256"] = weights_digest(load_folder(model))  # as for logits
    other = tmp_path / "other.json"
    other.write_text(json.dumps(report))
    (folder,) = build_folders(model, tmp_path / "hub", **OWNER, results=(path, other, path))
    results = header(folder)
    assert len(results) == 11 + 2 + 5
    assert results["mine", "retrieval: mAP, PCA whitening on pets (%)"].metric_value == 12.3
    assert results["imagenet", "classification: top-1 of k-NN (%)"].dataset_split == "validation"
    assert (folder / "README.md").read_text().count("with trex_models") == 2
    merged = merge_results([report | {"path": other}], "x/y")
    cfg: Any = timm.get_pretrained_cfg("trex_resnet50")
    config = {"num_classes": 0, "num_features": 2048, "pretrained_cfg": cfg.to_dict()}
    naver_model = HubModel("trex_resnet50.in1k", model, config, "backbone", is_stock=True)
    card = cards.render(naver_model, naver.LICENSE, None, "x", merged)
    assert card.index("**authors' results**") < card.index("## Measured results")
    assert not any(words in card for words in ("Not measured by us", "\n\n\n"))


@pytest.mark.filterwarnings(LFS_WARNING)
def test_results_on_benchmarks_are_published(
    work: Path, tmp_path: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("publish", "verify"):
        monkeypatch.setattr(f"hub.{module}.HfApi", lambda: HfApi(server.url, token="hf_write"))
    load = pytest.importorskip("yaml").safe_load
    path, manifest = work / "reports" / "small.json", tmp_path / "manifest.json"
    model, options = work / "models" / "small", {**OWNER, "results": (path,)}
    (folder,) = build_folders(model, tmp_path, **options, benchmark=("mine=a/b/c",))
    (entry,) = parse_eval_result_entries(load((folder / EVAL_RESULTS).read_text()))
    created, (result, *_) = json.loads(path.read_text())["created"], header(folder).values()
    notes = f"{result.metric_name}; protocol and versions in the model card"
    assert entry == EvalResultEntry("a/b", "c", result.metric_value, date=created, notes=notes)
    publish((folder,), manifest=manifest)
    assert verify(manifest=manifest)
    build_folders(model, tmp_path, **options)
    with pytest.raises(ValueError, match="unexpected files on the Hub: .eval_results/trex_models"):
        publish((folder,), manifest=manifest)


def test_unfit_reports_are_refused(work: Path, tmp_path: Path) -> None:
    small, changed = work / "reports" / "small.json", tmp_path / "changed.json"
    report = json.loads(small.read_text())
    mine = report["tasks"]["retrieval"]["mine"] | {"scores": {"mAP": {"value": 2}}}
    for path, changes, benchmark, message in (
        (small.with_stem("pixels"), {}, (), r"pixels is untrained \(random weights or pixels\); e"),
        (small.with_stem("cls"), {}, (), "cls has weights [0-9a-f]{12}, not those of small; eval"),
        (changed, {"complete": False}, (), r"not completely evaluated \(to continue, run python"),
        (changed, {"tasks": {"retrieval": {"mine": mine}}}, (), "mine, .* is 200, but .*; pass"),
        (changed, {}, ("mine",), "--benchmark mine must be DATASET=OWNER/NAME/TASK_ID with"),
        (changed, {}, ("pets=a/b/c",), "pets=a/b/c must be .* reports on the model: mine"),
    ):
        changed.write_text(json.dumps(report | changes))
        options: dict[str, Any] = {**OWNER, "results": (small, path), "benchmark": benchmark}
        with pytest.raises(ValueError, match=message) as error:
            build_folders(work / "models" / "small", tmp_path / "hub", **options)
        assert str(error.value).startswith("--benchmark" if benchmark else str(path))
        assert not (tmp_path / "hub").exists()
