"""Build, publish and verify models on the Hugging Face Hub.

Use build and publish for your own models. The maintainers run import-naver, build, publish, verify
in this order. Run them in a checkout. TREX_TRACEBACK=1 shows the traceback of an error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from hub.errors import HubError
from trex_models import cli
from trex_models.pretrained.manifest import WeightsError


def _call(arguments: Sequence[str]) -> Any:
    # Imported here, since `cli.run` reports missing packages.
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
    """Run a command and return its exit status, see `cli.run`; 1 if a check found a difference."""
    return cli.run(_call, arguments, "transfer", (HubError, WeightsError))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
