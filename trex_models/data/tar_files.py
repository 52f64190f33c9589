"""Images in tar files, read in place: class folders, or pairs of image and label (WebDataset)."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from trex_models.atomic import cache_folder, replacing
from trex_models.cli import progress_bar
from trex_models.data.decode import IMAGE_EXTENSIONS, decode_image, unreadable_error
from trex_models.data.image_files import FileSource, log_ignored, walk
from trex_models.data.sources import digest, encode_labels

_SUFFIXES = (b".tar", b".tgz", b".tar.gz", b".tar.bz2", b".tar.xz", b".tar.zst")
_Image = tuple[str, int, str, int, int]  # name, number of the tar file, key, offset, size


class TarSource(FileSource):
    """Source of images in a tar file, or in all tar files of a folder at any depth.

    With labels, ``KEY.cls`` (a text) is the label of ``KEY.jpg`` in its tar file; a key ends at the
    first dot of a name, and ``KEY.mask.png`` is ignored. Otherwise, the folders below the images'
    common root are the classes, or the tar files, if no image is in a folder. Images are sorted by
    class and name, as in FolderSource. Their positions are cached until a tar file's size or
    modification time changes.

    Args:
        path: Tar file or folder of tar files, which must not be compressed.
        classes: Class names of the training set; by default, the sorted class folders or labels
            (labels numerically if all are integers).

    Raises:
        ValueError: A tar file is compressed or incomplete, a label is missing, ambiguous or
            unknown, or there are no images or fewer than 2 classes.
    """

    def __init__(self, path: str | Path, classes: Sequence[str] | None = None) -> None:
        path = Path(path)
        root, tars = path.parent, [os.fsencode(path.name)]
        if not path.is_file():
            root, tars = path, sorted(n for n in walk(path) if n.lower().endswith(_SUFFIXES))
        self.tars = FileSource(root, tars, [0] * len(tars), ["tar file"])
        paths, self.positions, labels = _open_index(path, self.tars)
        names = labels.tolist()
        classes, codes = encode_labels(
            names, classes or list(dict.fromkeys(names)), str(path), lambda i: os.fsdecode(paths[i])
        )
        super().__init__(root, paths, codes, classes)

    def read(self, index: int) -> np.ndarray:
        """Return one image, (H, W, 3) uint8 RGB; raise a ValueError if it is unreadable."""
        tar, offset, size = self.positions[index].tolist()
        try:  # opened each time, because forked workers would share the position in the file
            with open(self.tars.name(tar), "rb", buffering=0) as file:  # noqa: PTH123 - faster
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise unreadable_error(self.name(index), error) from error
        return decode_image(data, self.name(index), self.reduction)

    def digest(self) -> str:
        """Return a hash of the paths without the root, the image sizes, labels and classes."""
        return digest(super().digest(), self.positions[:, 2])

    def files(self, part: slice = slice(None)) -> list[bytes]:
        """Return the full path of the tar file of each image or of a slice of them."""
        tars = self.tars.files()
        return [tars[number] for number in self.positions[part, 0].tolist()]


def _open_index(path: Path, tars: FileSource) -> list[np.ndarray]:
    """Return paths (FILE.tar:NAME), positions (tar file, offset, size) and labels of the images."""
    from filelock import FileLock

    key = digest("format 2", tars.stats()[:, :2], *tars.paths.tolist())
    index = list[np.ndarray]()
    file = cache_folder() / "tar" / f"{digest(str(path.resolve()))[:32]}.npz"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):  # one process builds the index, others wait
            with suppress(Exception), file.open("rb") as stream:  # any type, if it is damaged
                saved = np.load(stream)
                index = [saved[name] for name in saved.files[1:] if saved["arr_0"] == key]
            if not index:
                index = _build_index(path, tars)
                with replacing(file) as stream:
                    np.savez(stream, np.array(key), *index)
    except (OSError, NotImplementedError) as error:  # no space, no permission, or no file locks
        raise ValueError(f"{error}; set TREX_MODELS_CACHE to another folder") from error
    return index


def _build_index(path: Path, tars: FileSource) -> list[np.ndarray]:
    images, others = list[_Image](), list[bytes]()
    texts: dict[tuple[int, str], str] = {}
    for tar in progress_bar(len(tars), f"index of {path}", "tar file", iterable=range(len(tars))):
        for name, offset, size, text in _scan(tars.name(tar)):
            key = re.sub(r"\.[^/]*$", "", name)
            if name.lower().endswith(IMAGE_EXTENSIONS):
                images.append((name, tar, key, offset, size))
            elif text is None:
                others.append(os.fsencode(f"./{name}"))
            elif (first := texts.setdefault((tar, key), text)) != text:
                where = f"{tars.name(tar)}:{name}"
                raise ValueError(f"{where} is both {first!r} and {text!r}; remove one of the files")
    images = list({image[:2]: image for image in images}.values())  # as after unpacking
    if texts:  # KEY.mask.png is not the image of KEY
        named, images = images, [i for i in images if i[0][len(i[2]) :].lower() in IMAGE_EXTENSIONS]
        others += [os.fsencode(f"./{name}") for name, *_ in set(named).difference(images)]
    if not images:
        raise ValueError(f"{path} contains no images in tar files; add some (.jpg, for example)")
    labels = [texts.get(image[1:3], "") for image in images] if texts else _folders(images, tars)
    if texts and "" in labels:
        name, tar, key, *_ = images[labels.index("")]
        where = f"{tars.name(tar)}:{name}"
        raise ValueError(f"{where} has no label; add it as text in {key}.cls, or remove the image")
    log_ignored(path, others + [b"image"] * labels.count(""))
    order = map(int, labels) if texts and all(map(str.isdecimal, labels)) else labels
    rows = sorted(row for row in zip(order, images, labels, strict=True) if row[-1])
    paths = [tars.paths[image[1]] + b":" + os.fsencode(image[0]) for _, image, _ in rows]
    positions = [(tar, *position) for _, (_, tar, _, *position), _ in rows]
    return [np.array(paths), np.array(positions), np.array([label for *_, label in rows])]


def _scan(file: str) -> Iterator[tuple[str, int, int, str | None]]:
    """Yield name, offset, size and, of a label, the text of each member that is not hidden."""
    name = "the start"
    try:
        with Path(file).open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            while member := tar.next():
                tar.members = []  # type: ignore[attr-defined]  # it keeps all: 1 GB for a million
                name, text = os.path.normpath(member.name).lstrip("/"), None
                if member.isdir() or "/." in f"/{name}":
                    continue
                if not member.isreg() or member.issparse():
                    name += " (link or sparse)"  # ignored and counted
                elif name.lower().endswith(".cls"):
                    stream.seek(member.offset_data)
                    text = stream.read(member.size).decode(errors="backslashreplace").strip()
                yield name, member.offset_data, member.size, text
            stream.seek(tar.offset)
            if stream.read(512) != bytes(512):  # tarfile stops at a damaged header without error
                raise tarfile.ReadError("no end-of-archive marker")
            while rest := stream.read(1 << 20):
                if rest.strip(b"\0"):  # tarfile ignores what cat or tar --concatenate appends
                    raise tarfile.ReadError("data after the end-of-archive marker")
    except (OSError, tarfile.TarError) as error:
        raise ValueError(
            f"{file} is not a complete, uncompressed tar file ({error}, after {name}); copy it "
            "again, or decompress it (gunzip), because compressed files have no random access"
        ) from error


def _folders(images: Sequence[_Image], tars: FileSource) -> list[str]:
    """Return the class folder of each image, '' if there is none, or the name of its tar file."""
    folders = {name.rpartition("/")[0] for name, *_ in images}
    if folders == {""}:
        return [Path(tars.name(tar)).stem for _, tar, *_ in images]
    root = os.path.commonpath(folders if len(folders) > 1 else [min(folders).rpartition("/")[0]])
    below = (name[len(root) :].lstrip("/") for name, *_ in images)
    return [name.rpartition("/")[0].partition("/")[0] for name in below]
