"""Shared code of all commands: subcommands, help, output, errors and exit status.

A command is a function. Its keyword-only parameters are the options, parameters annotated with
`tyro.conf.Positional` are positional, and its Google-style docstring is the help.
"""

from __future__ import annotations

import ast
import inspect
import io
import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import is_dataclass
from errno import EISDIR
from functools import cache, partial, wraps
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints
from unittest.mock import patch

from trex_models.atomic import existing_folder

if TYPE_CHECKING:
    from tqdm import tqdm

Command = Callable[..., Any]


class Stopped(Exception):  # noqa: N818 - not an error
    """Requested end of a command with a message; ``on_all_ranks``: only rank 0 prints it."""

    def __init__(self, message: str, status: int, on_all_ranks: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.on_all_ranks = on_all_ranks


def main(
    commands: Command | Mapping[str, Command],
    arguments: Sequence[str],
    *,
    prog: str,
    description: str | None = None,
    extra: str,
    errors: tuple[type[Exception], ...] = (),
) -> int:
    """Parse a command line with `call`, run the command with `run`; return the exit status."""
    work = partial(call, commands, prog=prog, description=description)
    return run(work, arguments, extra, errors)


def call(
    commands: Command | Mapping[str, Command],
    arguments: Sequence[str],
    *,
    prog: str,
    description: str | None = None,
    **options: Any,
) -> Any:
    """Parse a command line with tyro, call the command and return its result.

    Help (status 0) and usage errors (status 2) are printed and raise SystemExit. ``prog`` is the
    program's name in the help, ``description`` the help of a program with subcommands, and
    ``options`` are further arguments of tyro.
    """
    import tyro

    parse: Any = tyro.cli
    if isinstance(commands, Mapping):
        parse = tyro.extras.subcommand_cli_from_dict
        if not arguments:
            with suppress(SystemExit):
                call(commands, ["--help"], prog=prog, description=description)
            raise SystemExit(2)
        commands = {name: _deferred(command) for name, command in commands.items()}
    else:
        commands = _deferred(commands)
    options = {"config": (tyro.conf.FlagCreatePairsOff,), **options}
    shows_help = bool({"-h", "--help"} & set(arguments))
    printed, failed = io.StringIO(), io.StringIO()
    unwrapped = patch.dict(os.environ, {} if shows_help else {"COLUMNS": "9999"})
    try:
        with unwrapped, redirect_stdout(printed), redirect_stderr(failed):
            parsed = parse(
                commands, args=list(arguments), prog=prog, description=description, **options
            )
    except SystemExit as stop:
        if stop.code:
            print(f"error: {_usage_error(failed.getvalue())}", file=sys.stderr)
        raise
    finally:
        print(_tidy(printed.getvalue()) if shows_help else printed.getvalue(), end="")
    return parsed() if isinstance(parsed, partial) else parsed


def _tidy(text: str) -> str:
    """Remove empty defaults from tyro's help, and wrap the descriptions of commands."""
    text = re.sub(r"\s*\(default:\s*(None|''|)\)", "", text).replace("{None,", "{")
    text = re.sub(r"(?:\{None\}\|\{|\[)\[(\w+) \[\1\s+\.\.\.\]\][\]}]", r"[\1 ...]", text)
    text = re.sub(r"\{None\}\|(\S+)", r"\1       ", text)
    width = shutil.get_terminal_size().columns
    fits = ((len(line) <= width, line.rstrip()) for line in text.splitlines())
    return "".join(f"{line if fit else textwrap.fill(line, width)}\n" for fit, line in fits)


def _deferred(command: Command) -> Command:
    """Wrap a command so that parsing returns a call of it, and does not run it yet."""
    _adapt(command)
    if is_dataclass(command):
        return command

    @wraps(command)
    def bind(*args: Any, **kwargs: Any) -> Any:
        return partial(command, *args, **kwargs)

    return bind


def _usage_error(text: str) -> str:
    """Return tyro's usage error, a title and sections, as one line without descriptions."""
    sections = [part for part in re.split(r"\n +-{3,} *\n", text)[1:] if "helptext: " not in part]
    lines = [" ".join(re.findall(r"^ {1,6}(\S.*?) *$", part, re.M)) for part in sections]
    message = re.sub(r"(values|\))\.;", r"\1;", "; ".join(lines) or text)  # tyro's full stops
    message = re.sub("For full helptext, (run|see):?", "see", message)
    message = re.sub(r"^Error parsing (\w+\.[\w-]+): ", r"--\1.", message)  # and the field
    return re.sub(r"^Error parsing (\w+: (?=--))?", "", message)  # our messages name the option


@cache
def _adapt(command: Any) -> None:
    """Adapt a command to tyro: join the lines of descriptions, and reject empty lists."""
    if not is_dataclass(command):
        command.__doc__ = re.sub(r"\n {8,}(?=\S)", " ", inspect.getdoc(command) or "")
        for name, parameter in inspect.signature(command).parameters.items():
            if parameter.default is parameter.empty:
                hint = get_type_hints(command, include_extras=True)[name]
                command.__annotations__[name] = _one_or_more(hint)
        return
    kind: Any = command
    fields = {}
    source: Any = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    for field, text in pairwise(source.body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            fields[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    for section in get_type_hints(command).values():
        if is_dataclass(section):
            _adapt(section)  # type: ignore[arg-type]  # is hashable
    entries = "".join(f"\n    {name}: {text}" for name, text in fields.items())
    summary = (inspect.getdoc(command) or "").partition("\n\nArgs:")[0]
    if fields:  # not of a library class, whose docstring describes its fields
        command.__doc__ = f"{summary}\n\nArgs:{entries}"


def _one_or_more(hint: Any) -> Any:
    """Make the type hint of a list or tuple parameter require at least one value."""
    from tyro import conf, constructors

    bare = hint.__origin__ if get_origin(hint) is Annotated else hint
    container: Any = get_origin(bare)
    if container not in (list, tuple):
        return hint
    item = get_args(bare)[0]

    def convert(texts: list[str]) -> Any:
        if not texts:
            raise ValueError("at least one value is required")
        return container(map(item, texts))

    metavar = "{0} [{0} ...]".format(item.__name__.upper())
    spec = constructors.PrimitiveConstructorSpec(
        "*", metavar, convert, lambda _: True, lambda items: [str(item) for item in items]
    )
    return Annotated[hint, spec, conf.arg(metavar=metavar, help_behavior_hint="(required)")]


def run(
    work: Callable[[list[str]], bool | None],
    arguments: Sequence[str],
    extra: str,
    errors: tuple[type[Exception], ...] = (),
) -> int:
    """Run a command and return its exit status.

    The status is 0; 1 if ``work`` returns False or another process failed; 2, with a short message,
    for invalid input (ValueError, OSError, ImportError or one of ``errors``) or out of memory; and
    128 + the signal's number if stopped. ``TREX_TRACEBACK=1`` shows tracebacks. ``extra`` is the
    pip extra that the command requires.
    """
    try:
        passed = work(expand_arguments(arguments))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Stopped as stopped:
        if not stopped.on_all_ranks or not rank():
            print(("" if stopped.on_all_ranks else process_prefix()) + str(stopped))
        return stopped.status
    except Exception as error:
        out_of_memory = type(error).__name__ == "OutOfMemoryError"  # torch's
        known = isinstance(error, (ValueError, OSError, ImportError, *errors)) or out_of_memory
        status = getattr(error, "exit_status", 2 if known else None)
        if os.environ.get("TREX_TRACEBACK") or status is None:
            raise
        message, shared = str(error), getattr(error, "on_all_ranks", False)
        if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("trex_models"):
            remedy = f"pip install '.[{extra}]' in a clone"
            message = f"this command requires the package {error.name}: {remedy}"
        elif out_of_memory:
            message = f"{first_line(error)} Use a smaller batch size"
        if not shared or not rank():
            for line in message.splitlines():
                print(f"error: {'' if shared else process_prefix()}{line}", file=sys.stderr)
        return status
    except KeyboardInterrupt:
        if not rank():
            print("interrupted; run the same command again to continue", file=sys.stderr)
        return 128 + signal.SIGINT
    return 1 if passed is False else 0


def rank() -> int:
    """Return this process's rank under torchrun; 0 for a single process."""
    return int(os.environ.get("RANK", "0"))


def process_prefix() -> str:
    """Return the prefix of a message from one of several processes."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return f"process {rank()} of {processes}: " if processes > 1 else ""


def expand_arguments(arguments: Sequence[str]) -> list[str]:
    """Expand ``~`` in arguments, and make stdout escape unsupported characters."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # stderr's default
    # Shells do not expand --output=~/x and quoted arguments.
    parts = [re.fullmatch(r"(--[^=]*=|)(.*)", text, re.S) for text in arguments]
    return [part[1] + os.path.expanduser(part[2]) for part in parts if part]  # noqa: PTH111 - arguments, not paths


def require_writable(output: Path, *suffixes: str) -> None:
    """Check that ``--output`` has one of the suffixes and can be written."""
    if output.suffix not in suffixes:
        raise ValueError(f"--output must be a {' or '.join(suffixes)} file, got {output}")
    try:
        with TemporaryFile(dir=existing_folder(output.parent)):
            pass
        if output.is_dir():
            raise IsADirectoryError(EISDIR, "is a folder")
    except OSError as error:
        raise ValueError(
            f"--output {output} cannot be written ({error.strerror}); choose another path"
        ) from error


def require_at_least(minimum: int, **options: int) -> None:
    """Raise a ValueError if an option, named by its parameter, is below the minimum."""
    for name, value in options.items():
        if value < minimum:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be at least {minimum}, got {value}")


def progress_bar(total: float, description: str, unit: str, **options: Any) -> tqdm[Any]:
    """Return a progress bar with rate and remaining time, shown if stderr is a terminal."""
    from tqdm import tqdm

    scaled = unit.startswith(" ")  # a leading space abbreviates large counts: 12k samples
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=scaled,
        dynamic_ncols=True,
        **{"disable": None, **options},
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, and the next one if it ends with a colon."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Format rows as lines of a table: first column left-aligned, others right-aligned."""
    width, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        "  ".join([first.ljust(width), *map(str.rjust, others, widths)]) for first, *others in rows
    ]
