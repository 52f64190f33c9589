"""Convert NAVER's files to timm folders, and models to torchvision and ONNX.

A tool of the checkout: run it there. TREX_TRACEBACK=1 shows where an error comes from.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from trex_models import cli


def _call(arguments: Sequence[str]) -> Any:
    # Imported where `run` explains a package that is not installed.
    from convert.export_model import export_model
    from convert.official import convert_official

    commands: dict[str, cli.Command] = {"naver": convert_official, "export": export_model}
    return cli.call(commands, arguments, prog="python -m convert", description=__doc__)


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status, as `cli.run`."""
    return cli.run(_call, arguments, "export")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
