"""The maintainers' tools for weights on the Hub; build and publish are for your own models, too.

In this order: import-naver, build, publish, verify. Tools of the checkout: run them there.
TREX_TRACEBACK=1 shows where an error comes from.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from hub.errors import HubError
from trex_models import cli
from trex_models.pretrained.manifest import WeightsError


def _call(arguments: Sequence[str]) -> Any:
    # Imported where `run` explains a package that is not installed.
    from hub.build_folders import build_folders
    from hub.import_naver import import_naver
    from hub.publish import publish
    from hub.verify import verify

    commands: dict[str, cli.Command] = {
        "build": build_folders,
        "publish": publish,
        "verify": verify,
        "import-naver": import_naver,
    }
    return cli.call(commands, arguments, prog="python -m hub", description=__doc__)


def main(arguments: Sequence[str]) -> int:
    """Run a command; return its exit status, as `cli.run`: 1 if a check found a difference."""
    return cli.run(_call, arguments, "transfer", (HubError, WeightsError))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
