"""Models that are evaluated without training: NAVER's, and others of the paper's figure."""

from __future__ import annotations

from pathlib import Path

from benchmarks.reproduce.plan import PAPER, Model
from convert.official import convert_official
from trex_models.atomic import cache_folder
from trex_models.pretrained import figure, naver
from trex_models.pretrained.manifest import load_manifest
from trex_models.transfer.published import reported

CACHE = Path("cache")


def find(folder: Path, output: Path) -> list[Model]:
    """Return NAVER's models in a folder of their files or of timm folders, or in the cache.

    Files are converted to OUTPUT/converted first. Embeddings (``_proj``) have no results to compare
    with and are left out.

    Raises:
        ValueError: There is none.
    """
    sources = {}
    for name, files in naver.FILES.items():
        if "_proj" in name:
            continue
        if folder == CACHE and naver.cached(name, cache_folder(), load_manifest()):
            sources[name] = name
        elif (folder / name / "model.safetensors").exists():
            sources[name] = str(folder / name)
        elif present := [folder / file for file in files if (folder / file).exists()]:
            converted = output / "converted" / name
            if not (converted / "model.safetensors").exists():
                convert_official(present[-1], converted.parent)
            sources[name] = str(converted)
    if not sources:
        raise ValueError(
            f"--from-released {folder} has none of {', '.join(naver.ALL_FILES)} and no converted "
            "model; download them with python -m hub import-naver --output DIR and pass DIR/files"
        )
    return [
        Model(name=name, title=name, source=source, released=reported(name))
        for name, source in sources.items()
    ]


def figure_models() -> list[Model]:
    """Return the other models of the paper's figure whose files were downloaded before."""
    titles = figure.TITLES
    return [
        Model(name=name, title=titles[name], source=name, paper=PAPER.get(titles[name]))
        for name in figure.FIGURE[:-2]  # the last two are t-ReX
        if figure.is_available(name)
    ]
