"""Images that a command line names: folders, glob patterns, files and lists of files.

A name is the image's path below the common folder of all that was named.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from trex_models.data.decode import IMAGE_EXTENSIONS, quoted
from trex_models.data.image_files import FileSource, list_folder, log_left_out, split_images, walk

_TYPES = f"(file types: {' '.join(IMAGE_EXTENSIONS)})"


def find_images(arguments: Sequence[str]) -> tuple[FileSource, int]:
    """Find images in folders, at any depth, by patterns, paths and .txt files of paths, in order.

    Hidden files do not count. Returns the images, all of one class, and how many were named again.
    """
    left_out: set[str] = set()
    found = [_look(argument, left_out) for argument in arguments]
    root = os.path.commonpath([folder for folder, _ in found])
    log_left_out(root, map(os.fsencode, left_out))
    named = [path for _, paths in found for path in paths]
    once = list(dict.fromkeys(named))
    start = len(root.rstrip(os.sep)) + 1
    source = FileSource(root, [path[start:] for path in once], [0] * len(once), ["images"])
    return source, len(named) - len(once)


def names(source: FileSource) -> list[str]:
    """Return the paths of images below their root, with slashes."""
    return [Path(os.fsdecode(path)).as_posix() for path in source.paths.tolist()]


def printable(text: str) -> str:
    """Return a text with file names, which need not be UTF-8, so that it can be printed."""
    return os.fsencode(text).decode(errors="replace")


def absolute(path: Path) -> str:
    """Return a path from the file system's root, without dots; links are not followed."""
    return os.path.normpath(Path.cwd() / path)


def _look(argument: str, left_out: set[str]) -> tuple[str, list[str]]:
    """Return an argument's folder and its images, all as absolute paths."""
    path = Path(argument).expanduser()
    if path.is_dir():
        found = _images_below(path, left_out)
        if not found:
            raise ValueError(f"{argument} holds no images {_TYPES}; name another folder")
        return absolute(path), found
    if path.suffix.lower() == ".txt" and path.is_file():
        return _look_into_list(path)
    if path.is_file():
        _require_image(str(path), quoted(argument))
        return absolute(path.parent), [absolute(path)]
    if glob.has_magic(argument):
        return _match(argument, path, left_out)
    raise ValueError(
        f"{argument}: there is no such file or folder; name images, folders, a pattern in quotes, "
        "or a .txt list of images"
    )


def _images_below(folder: Path, left_out: set[str]) -> list[str]:
    root = absolute(folder).rstrip(os.sep)
    images, others = (
        [f"{root}{os.sep}{os.fsdecode(path)}" for path in paths]
        for paths in split_images(walk(folder))
    )
    left_out.update(others)
    return images


def _match(argument: str, pattern: Path, left_out: set[str]) -> tuple[str, list[str]]:
    parts = pattern.parts
    magic = [place for place, part in enumerate(parts) if glob.has_magic(part)]
    for place in magic:  # glob leaves out folders that it cannot list; this raises
        for folder in _glob(f"{Path(*parts[:place])}{os.sep}"):
            list_folder(os.fsencode(folder))
    matches = _glob(str(pattern))
    found: list[str] = []
    for match in map(Path, matches):
        if match.is_dir():
            found += _images_below(match, left_out)
        elif match.name.lower().endswith(IMAGE_EXTENSIONS):
            found.append(absolute(match))
        else:
            left_out.add(absolute(match))
    if not found:
        matched = f"{len(matches)} files and folders, none of them an image" if matches else "none"
        raise ValueError(f"{argument} matches {matched}; correct the pattern")
    return absolute(Path(*parts[: magic[0]])), list(dict.fromkeys(found))


def _glob(pattern: str) -> list[str]:
    return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - it leaves out hidden files


def _look_into_list(path: Path) -> tuple[str, list[str]]:
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a list ({error}); save it as UTF-8") from error
    # File names may hold blanks at their ends, and characters that splitlines() takes for one.
    rows = [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f"{path} lists no images; write the path of one on each line")
    for number, line in rows:
        _require_image(line, f"{path}, line {number}: {quoted(line)}")
    found = [absolute(path.parent / Path(line).expanduser()) for _, line in rows]
    return os.path.commonpath({str(Path(file).parent) for file in found}), found


def _require_image(path: str, called: str) -> None:
    if not path.lower().endswith(IMAGE_EXTENSIONS):
        raise ValueError(f"{called} is no image by its name {_TYPES}; lists of paths are .txt")
