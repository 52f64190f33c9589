"""ImageNet-CoG: five levels of ImageNet-21K concepts, ever farther from ImageNet-1K's.

Sariyildiz et al., "Concept Generalization in Visual Representation Learning", ICCV 2021. The user
gives two list files: which concepts (WordNet ids) make up the levels, and which images of each
concept are to fit on and to test on, as JSON or as pickles.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trex_models.data.image_files import FileSource
from trex_models.transfer.readers import read_json
from trex_models.unpickling import PlainUnpickler

NUM_LEVELS = 5
_SUFFIXES = (".json", ".pkl", ".pickle")


def cog(root: Path, level: int) -> tuple[FileSource, FileSource]:
    """Return a level's training and test images.

    Args:
        root: Holds ``imagenet21k/<wnid>/<file>``, ``cog/levels.*`` and ``cog/splits.*``.
        level: 1 to 5.

    Raises:
        ValueError: A list is missing, has an unknown layout, or is a pickle of anything but
            containers, strings and numbers.
    """
    levels_file, splits_file = (_found(root / "cog", stem) for stem in ("levels", "splits"))
    levels, content = _content(levels_file), _content(splits_file)
    try:
        return _sources(
            root / "imagenet21k", _levels(levels, levels_file)[level - 1], content, splits_file
        )
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"{levels_file} or {splits_file} has an unknown layout ({error}); "
            "docs/transfer_data.md shows those that are read"
        ) from error


def _sources(
    folder: Path, concepts: list[str], content: Any, splits_file: Path
) -> tuple[FileSource, FileSource]:
    parts: tuple[list[str], list[str]] = ([], [])
    labels: tuple[list[int], list[int]] = ([], [])
    for label, concept in enumerate(concepts):
        for part, names in enumerate(_images(content, concept, splits_file)):
            parts[part].extend(
                name if "/" in name else f"{concept}/{name}" for name in map(_text, names)
            )
            labels[part].extend([label] * len(names))
    train, test = (
        FileSource(folder, paths, numbers, concepts)
        for paths, numbers in zip(parts, labels, strict=True)
    )
    return train, test


def _found(folder: Path, stem: str) -> Path:
    """Return the list file of a name, whichever its type."""
    found = [
        path for path in (folder / f"{stem}{suffix}" for suffix in _SUFFIXES) if path.is_file()
    ]
    if len(found) != 1:
        raise ValueError(
            f"{folder} holds {len(found) or 'no'} files {stem}.* ({', '.join(_SUFFIXES)}), one is "
            "needed"
        )
    return found[0]


def _content(path: Path) -> Any:
    """Return what a list file holds."""
    if path.suffix == ".json":
        return read_json(path)
    with path.open("rb") as file:
        try:
            return PlainUnpickler(file).load()
        except Exception as error:  # a damaged pickle raises anything
            raise ValueError(
                f"{path} cannot be read as lists of names ({error}); write it as JSON"
            ) from error


def _levels(content: Any, path: Path) -> list[list[str]]:
    """Return the concepts of each level, sorted, from any of the shapes that we read."""
    levels: dict[int, set[str]] = {}
    if not isinstance(content, Mapping):
        levels = {number: set(map(_text, names)) for number, names in enumerate(content)}
    else:
        for key, value in content.items():
            if isinstance(value, str | bytes | int):  # concept -> level
                levels.setdefault(_number(value, path), set()).add(_text(key))
            else:  # level -> concepts
                levels[_number(key, path)] = set(map(_text, value))
    if len(levels) != NUM_LEVELS:
        raise ValueError(f"{path} has {len(levels)} levels, not {NUM_LEVELS}: a list of 5 lists")
    return [sorted(levels[number]) for number in sorted(levels)]


def _images(content: Any, concept: str, path: Path) -> tuple[Any, Any]:
    """Return a concept's training and test images, from any of the shapes that we read."""
    try:
        if "train" in content:  # part -> concept -> images
            return content["train"][concept], _test(content)[concept]
        parts = content[concept]  # concept -> part -> images, or a pair
        if isinstance(parts, Mapping):
            return parts["train"], _test(parts)
        train, test = parts
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} has no lists train and test of the concept {concept}") from error
    return train, test


def _test(parts: Mapping[str, Any]) -> Any:
    return parts["test"] if "test" in parts else parts["val"]


def _number(level: object, path: Path) -> int:
    """Return the number of a level called 3, "3", "L3" or "level3"."""
    digits = re.findall(r"\d+", _text(level))
    if len(digits) != 1:
        raise ValueError(f"{path}: {level!r} names no level; call them 1 to {NUM_LEVELS}")
    return int(digits[0])


def _text(value: object) -> str:
    if not isinstance(value, str | bytes | int):
        raise ValueError(f"expected a name or a number in the lists of CoG, got {type(value)}")
    return os.fsdecode(value) if isinstance(value, bytes) else str(value)
