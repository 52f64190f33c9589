"""Images from command-line arguments: folders, glob patterns, images and lists of images.

The name of an image is its path relative to the common parent folder of all arguments.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from trex_models.data.decode import IMAGE_EXTENSIONS, quoted
from trex_models.data.image_files import FileSource, list_folder, log_ignored, split_images, walk

_TYPES = f"(extensions: {' '.join(IMAGE_EXTENSIONS)})"


def find_images(arguments: Sequence[str]) -> tuple[FileSource, int]:
    """Find images by folders (searched recursively), patterns, paths and .txt lists, in order.

    Hidden files are ignored. Returns the images, all of one class, and the number of duplicates.
    """
    skipped: set[str] = set()
    found = [_find(argument, skipped) for argument in arguments]
    root = os.path.commonpath([folder for folder, _ in found])
    log_ignored(root, map(os.fsencode, skipped))
    paths = [path for _, paths in found for path in paths]
    unique = list(dict.fromkeys(paths))
    start = len(root.rstrip(os.sep)) + 1
    source = FileSource(root, [path[start:] for path in unique], [0] * len(unique), ["images"])
    return source, len(paths) - len(unique)


def names(source: FileSource) -> list[str]:
    """Return the paths of images relative to their root, with slashes."""
    return [Path(os.fsdecode(path)).as_posix() for path in source.paths.tolist()]


def printable(text: str) -> str:
    """Return a text that can be printed, even if it contains file names that are not UTF-8."""
    return os.fsencode(text).decode(errors="replace")


def absolute(path: Path) -> str:
    """Return an absolute path without dots; links are not resolved."""
    return os.path.normpath(Path.cwd() / path)


def _find(argument: str, skipped: set[str]) -> tuple[str, list[str]]:
    path = Path(argument).expanduser()
    if path.is_dir():
        found = _images_below(path, skipped)
        if not found:
            raise ValueError(f"{argument} contains no images {_TYPES}; pass another folder")
        return absolute(path), found
    if path.suffix.lower() == ".txt" and path.is_file():
        return _read_list(path)
    if path.is_file():
        _require_image(str(path), quoted(argument))
        return absolute(path.parent), [absolute(path)]
    if glob.has_magic(argument):
        return _match(argument, path, skipped)
    raise ValueError(
        f"{argument}: there is no such file or folder; pass images, folders, quoted patterns or "
        ".txt lists of images"
    )


def _images_below(folder: Path, skipped: set[str]) -> list[str]:
    root = absolute(folder).rstrip(os.sep)
    images, others = (
        [f"{root}{os.sep}{os.fsdecode(path)}" for path in paths]
        for paths in split_images(walk(folder))
    )
    skipped.update(others)
    return images


def _match(argument: str, pattern: Path, skipped: set[str]) -> tuple[str, list[str]]:
    parts = pattern.parts
    magic = [index for index, part in enumerate(parts) if glob.has_magic(part)]
    for index in magic:  # glob silently ignores folders that it cannot list; list_folder raises
        for folder in _glob(f"{Path(*parts[:index])}{os.sep}"):
            list_folder(os.fsencode(folder))
    matches = _glob(str(pattern))
    found: list[str] = []
    for match in map(Path, matches):
        if match.is_dir():
            found += _images_below(match, skipped)
        elif match.name.lower().endswith(IMAGE_EXTENSIONS):
            found.append(absolute(match))
        else:
            skipped.add(absolute(match))
    if not found:
        matched = f"{len(matches)} files and folders, but no images" if matches else "no files"
        raise ValueError(f"{argument} matches {matched}; correct the pattern")
    return absolute(Path(*parts[: magic[0]])), list(dict.fromkeys(found))


def _glob(pattern: str) -> list[str]:
    return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - ignores hidden files


def _read_list(path: Path) -> tuple[str, list[str]]:
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a list ({error}); save it as UTF-8") from error
    # File names may end in spaces, and contain characters at which splitlines() splits.
    rows = [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f"{path} lists no images; write one path per line")
    for number, line in rows:
        _require_image(line, f"{path}, line {number}: {quoted(line)}")
    found = [absolute(path.parent / Path(line).expanduser()) for _, line in rows]
    return os.path.commonpath({str(Path(file).parent) for file in found}), found


def _require_image(path: str, name: str) -> None:
    if not path.lower().endswith(IMAGE_EXTENSIONS):
        raise ValueError(f"{name} has no image extension {_TYPES}; a list of paths must be .txt")
