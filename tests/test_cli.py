"""What all commands share: paths with ``~``, and text that stdout cannot encode."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import convert.__main__ as convert
import hub.__main__ as hub
import trex_models.features.__main__ as features
import trex_models.train.__main__ as train
import trex_models.transfer.__main__ as transfer
from tests.processes import captured
from tests.runs import TINY
from trex_models import cli, demo, plot
from trex_models.train.checkpointing import lock_run_dir
from trex_models.train.recipes import smoke

Main = Callable[[Sequence[str]], int]


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = ["~/a b", "--output=~/x", "--data.path", "~", "--label=a=~/x", "a~/x", "--half"]
    home = ["/home/me/a b", "--output=/home/me/x", "--data.path", "/home/me", *given[4:]]
    assert cli.expand_arguments(given) == home


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (convert.main, "naver ~/absent --output=~/out"),
        (convert.main, "export --to=onnx --output=~/absent/x.onnx resnet18 --file=~/absent"),
        (demo.main, "--output=~/file"),
        (features.main, "extract ~/absent --model=pixels --output=~/x.npy"),
        (features.main, "extract ~ --model=pixels --output=~/file/x.npy"),
        (features.main, "neighbors ~/absent --query x"),
        (hub.main, "build ~/absent --output=~/out"),
        (hub.main, "publish ~/absent --dry-run"),
        (plot.main, "~/absent"),
        (train.main, "export ~/absent --output=~/out"),
        (train.main, "smoke --output=~/file"),
        (train.main, "smoke --output=~/run --data.source=folder --data.path=~/absent"),
        (train.main, "smoke --output=~/run --init-from=~/absent"),
        (transfer.main, "table ~/absent"),
        (transfer.main, "evaluate --model=pixels --datasets=own=~/absent --output=~/x.json"),
        (transfer.main, "evaluate --model=pixels --datasets=digits --output=~/file/x.json"),
    ],
)
def test_every_command_expands_home(
    main: Main, arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "file").touch()
    status, _, error = captured(main, *arguments.split())
    assert status == 2
    assert str(tmp_path / "home") in error
    assert "~" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_unencodable_output_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    assert train.main(["smoke", "--output", str(tmp_path / "日本"), *TINY]) == 0
    assert plot.main([str(tmp_path / "日本"), "--output", str(tmp_path / "caf\udce9.png")]) == 0
    assert b"u65e5\\u672c" in written.getvalue()
    assert written.getvalue().endswith(b"/caf\\udce9.png\n")


def test_a_run_is_not_written_where_its_export_cannot_be_read(tmp_path: Path) -> None:
    config = smoke(str(tmp_path / "caf\udce9"))
    with pytest.raises(ValueError, match="is not valid UTF-8"), lock_run_dir(config):
        pass
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("main", [convert.main, features.main, hub.main, train.main, transfer.main])
def test_no_command_prints_the_help_with_status_2(
    main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "python -m" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("main", "arguments", "metavar"),
    [
        (transfer.main, "table", "PATH"),
        (features.main, "neighbors f.npy --query", "STR"),
        (plot.main, "", "PATH"),
        (hub.main, "publish", "PATH"),
    ],
)
def test_the_parser_requires_a_list_that_must_not_be_empty(
    main: Main, arguments: str, metavar: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, status, said in (
        (arguments.split(), 2, "at least one value is required"),
        ([*arguments.split()[:1], "--help"], 0, f"{metavar} [{metavar} ...]"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == status
        printed = "".join(capsys.readouterr())
        assert said in printed
        assert f"[{metavar} [{metavar} ...]]" not in printed


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (
            train.main,
            "trex --optim.epoch 3 --output x",
            "--optim.epoch, 3; Perhaps .*--optim.epochs",
        ),
        (train.main, "trex", "Missing from python -m trex_models.train trex: --output STR"),
        (transfer.main, "table --markdwn ../..", r"Unrecognized options: --markdwn, \.\./\.\."),
        (train.main, f"trex --no {'/long' * 40}", f"--no {'/long' * 40}"),
        (
            transfer.main,
            "plot --kind pie --output x",
            "'pie' for argument '--kind'. Expected one of",
        ),
        (convert.main, "export resnet18 --output", "Missing value for argument '--output'"),
    ],
)
def test_usage_errors_are_one_line(
    main: Main, arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    out, error = capsys.readouterr()
    assert not out
    assert re.fullmatch(rf"error: .*{message}.*; see python -m \S+.* --help\n", error)


@pytest.mark.parametrize(
    ("main", "arguments", "shown"),
    [
        (train.main, "trex --help", r"--system.workers INT\n"),
        (transfer.main, "plot --help", r"\[PATH \.\.\.\].*--published \{paper,released\}\n"),
        (convert.main, "export --help", r"--features \{backbone,projector,logits\}\n"),
    ],
)
def test_help_shows_no_empty_defaults(
    main: Main, arguments: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments.split())
    help_text = capsys.readouterr().out
    assert re.search(shown, help_text, re.S)
    assert not re.search(r"\{None|default:\s*(None|''|)\)", help_text)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(("main", "start"), [(train.main, ["trex"]), (convert.main, [])])
def test_shell_completions_are_not_reformatted(
    main: Main, start: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*start, "--tyro-print-completion", "bash"])
    script = capsys.readouterr().out
    assert "complete" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
