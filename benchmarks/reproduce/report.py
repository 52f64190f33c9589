"""The report of a reproduction in Markdown, and its figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from benchmarks.reproduce import compare, estimate
from benchmarks.reproduce.plan import MEANINGLESS, SETS, Plan
from trex_models.transfer import pictures
from trex_models.transfer.report import summary


def render(plan: Plan, state: Mapping[str, Any], reports: Sequence[dict[str, Any]]) -> str:
    """Return the report of everything that was done so far."""
    titles = {model.name: model.title for model in plan.known}
    lines = [f"# Reproduction of t-ReX, scale {plan.scale_name}", ""]
    if plan.is_dry:
        lines += [f"**{MEANINGLESS}.** They show that each stage works.", ""]
    lines += _machine(state)
    if check := state.get("check"):
        lines += [
            "",
            "## Images",
            "",
            *_datasets(check, {n for r in reports for n in r["datasets"]}),
        ]
    if found := state.get("estimate"):
        lines += ["", f"## Estimate{', scale full' * plan.is_dry}", ""]
        lines += [estimate.format_arithmetic(found["arithmetic"])]
        for name, rate in found["measured"].items():
            speed = f"{rate['images_per_second']:g} images/s, {rate['hours']:g} hours"
            lines.append(
                f"- Measured here, {titles.get(name, name)} at scale {plan.scale_name}: {speed}"
            )
    if trained := state.get("train"):
        lines += ["", "## Training", "", "| model | hours of steps | command |", "|---|---|---|"]
        for name, run in trained.items():
            hours = f"{run['seconds'] / 3600:.2f}" if "seconds" in run else "-"
            lines.append(f"| {titles.get(name, name)} | {hours} | `{run['command']}` |")
    if reports:
        lines += ["", "## Results", "", *_results(reports)]
    if found := state.get("compare"):
        lines += ["", "## Comparison with the authors' results", "", *_comparison(found, titles)]
    if found := state.get("figure"):
        lines += ["", f"![top-1 on the training task against transfer]({found})"]
    if found := state.get("folders"):
        lines += ["", "## Folders for the Hub", "", *(f"- `{path}`" for path in found)]
    return "\n".join(lines) + "\n"


def _machine(state: Mapping[str, Any]) -> list[str]:
    machine, versions = state["machine"], state["versions"]
    gpus = ", ".join(f"{g['name']} ({g['gigabytes']} GB)" for g in state["gpus"]) or "no GPU"
    return [
        f"- Machine: {machine['processor']}, {machine['cores']} cores, {gpus}",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}",
        f"- Models: {', '.join(state['models'])}",
    ]


def _datasets(check: Mapping[str, Any], evaluated: Set[str]) -> list[str]:
    lines = ["| dataset | classes | training images | test images |", "|---|---|---|---|"]
    for name, (classes, train, test) in check["datasets"].items():
        lines.append(f"| {name} | {classes:,} | {train:,} | {test:,} |")
    if missing := [name for name in check["missing"] if name not in evaluated]:
        count = f"{len(missing)} of {len(SETS[15])}"
        lines += ["", f"**Missing; excluded from all means: {', '.join(missing)}** ({count})."]
    return lines


def _results(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return top-1 of each model on each dataset, and the means; one column per model."""
    labels = [report["model"]["label"] for report in reports]
    lines = [f"| top-1, % | {' | '.join(labels)} |", "|---" * (1 + len(labels)) + "|"]
    titles = {n: entry["title"] for report in reports for n, entry in report["datasets"].items()}
    for name, title in titles.items():
        entries = [report["datasets"].get(name) for report in reports]
        cells = [f"{100 * entry['top1']['mean']:.2f}" if entry else "-" for entry in entries]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    for count, names in SETS.items():
        means = [compare.transfer_mean(report, names) for report in reports]
        if any(mean["count"] for mean in means):
            found = " or ".join(sorted({str(mean["count"]) for mean in means}))
            title = f"mean log-odds, {found} of the {count} datasets"
            cells = [
                f"{m['mean']:.3f} +- {m['half_width']:.3f}" if m["count"] else "-" for m in means
            ]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return [*lines, "", "Details, protocols and versions: `linear/` and `transfer/`."]


def _comparison(found: Mapping[str, Any], titles: Mapping[str, str]) -> list[str]:
    lines = []
    if found["published"]:
        lines += ["| model | score | ours | authors | difference | tolerance | verdict |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in found["published"]:
            score = f"{_SCORES[row['score']]} ({row['source']})"
            cells = [titles.get(row["model"], row["model"]), score, "-"]
            cells += [_number(row, row["authors"]), "-", "-", row["verdict"]]
            if row["ours"] is not None:
                cells[2] = f"{_number(row, row['ours'])} +- {_number(row, row['half_width'])}"
                cells[4] = _number(row, row["difference"], sign="+")
                cells[5] = _number(row, row["tolerance"])
            lines.append(f"| {' | '.join(cells)} |")
    else:
        lines += ["The authors have no results at this scale."]
    if found["claims"]:
        lines += [
            "",
            "| claim of the paper | difference | authors' | verdict |",
            "|---|---|---|---|",
        ]
        for row in found["claims"]:
            ours = f"{_number(row, row['difference'], '+')} +- {_number(row, row['half_width'])}"
            theirs = "-" if row["authors"] is None else _number(row, row["authors"], "+")
            lines.append(f"| {row['claim']} | {ours} | {theirs} | {row['verdict']} |")
    return [*lines, "", *(f"- {line}" for line in compare.BASIS)]


_SCORES = {
    "top1": "top-1, %",
    "transfer": "mean log-odds",
    "prototypes": "top-1 of its prototypes, %; the authors' is of a linear layer",
}


def _number(row: Mapping[str, Any], value: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}" if row["score"] == "transfer" else f"{100 * value:{sign}.2f}"


def draw(plan: Plan, reports: Sequence[dict[str, Any]], names: Sequence[str]) -> Any:
    """Draw models in the paper's figure, with means over the given datasets.

    The authors' results are added where they are comparable: over the 13 datasets of the figure.
    """
    shown = []
    for each in reports:
        kept = {name: each["datasets"][name] for name in names}
        task = {plan.scale.task: each["datasets"][plan.scale.task]}
        shown.append(each | {"datasets": task | kept, "transfer": summary(kept)})
    comparable = len(names) == len(SETS[13]) and not plan.scale.subset
    figure = pictures.scatter(shown, "paper" if comparable else None)
    if plan.is_dry:
        figure.suptitle(MEANINGLESS, x=0.06, ha="left", color="tab:red", fontweight="bold")
    return figure
