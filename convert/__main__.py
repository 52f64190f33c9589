"""Convert NAVER's files to timm folders, and models to torchvision and ONNX.

Run it in a checkout of the repository. TREX_TRACEBACK=1 shows the traceback of an error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from trex_models import cli


def _call(arguments: Sequence[str]) -> Any:
    # Imported here, since `cli.run` reports missing packages.
    from convert.export_model import export_model
    from convert.official import convert_official

    commands: dict[str, cli.Command] = {"naver": convert_official, "export": export_model}
    return cli.call(commands, arguments, prog="python -m convert", description=__doc__)


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status, see `cli.run`."""
    return cli.run(_call, arguments, "export")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
