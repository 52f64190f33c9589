"""The maintainers' tools for weights on the Hub, from the command line.

    python -m hub import-naver --output DIR [--imagenet IMAGENET] [FILE ...]
    python -m hub build DIR/converted --output HUB
    python -m hub publish HUB/* [--dry-run]
    python -m hub verify

and for models of your own: python -m hub build RUN/export/backbone --output HUB --name NAME
--owner YOU --license ID --namespace YOU, which says how to publish it. A tool of the checkout: run
it there. TREX_TRACEBACK=1 shows where an error comes from.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi

from hub.build import NAMESPACE, Owner, build
from hub.errors import HubError
from hub.publish import publish
from hub.verify import verify
from trex_models import naver
from trex_models.cli import run
from trex_models.manifest import PACKAGED, WeightsError


def main(arguments: Sequence[str]) -> int:
    """Run a command; return its exit status.

    0; 1 where something was checked and differs; 2 with a message of one line on bad input, or
    where the Hub or NAVER's server does not do what was asked.
    """
    return run(_command, arguments, "transfer", errors=(HubError, WeightsError))


def _command(arguments: Sequence[str]) -> bool:
    options = _parser().parse_args(arguments)
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hub",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True)

    command = commands.add_parser("build", help="timm folders to Hub folders")
    command.add_argument("converted", type=Path, help="a timm folder, or a folder of them")
    command.add_argument("--output", type=Path, required=True, help="where the Hub folders go")
    command.add_argument("--name", help="of the repository, for one timm folder")
    command.add_argument("--license", metavar="ID", help="of a model of your own, as the Hub's ids")
    command.add_argument("--owner", help="whose weights they are, for a model of your own")
    command.add_argument("--results", type=Path, help="imagenet.json, for the cards")
    _add_namespace(command)
    command.set_defaults(run=_build)

    command = commands.add_parser("publish", help="Hub folders to the Hub")
    command.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    command.add_argument("--dry-run", action="store_true", help="say what would be sent")
    _add_namespace(command)
    _add_manifest(command)
    command.set_defaults(run=_publish)

    command = commands.add_parser("verify", help="published models against the manifest")
    command.add_argument("names", nargs="*", metavar="NAME", help="such as trex_resnet50.in1k")
    _add_manifest(command)
    command.set_defaults(run=_verify)

    command = commands.add_parser("import-naver", help="NAVER's files, fetched and converted")
    command.add_argument(
        "files", nargs="*", metavar="FILE", help="such as trex.pth; all by default"
    )
    command.add_argument("--output", type=Path, required=True, help="where everything goes")
    command.add_argument("--imagenet", type=Path, help="holds val and train, to measure top-1")
    _add_manifest(command)
    command.set_defaults(run=_import_naver)
    return parser


def _add_namespace(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--namespace", default=NAMESPACE, help="organisation or user (default: %(default)s)"
    )


def _add_manifest(command: argparse.ArgumentParser) -> None:
    default = Path(os.environ.get("TREX_MODELS_MANIFEST") or PACKAGED).expanduser()
    command.add_argument(
        "--manifest", type=Path, default=default, help="the manifest (default: %(default)s)"
    )


def _build(options: argparse.Namespace) -> bool:
    written = build(
        options.converted,
        options.output,
        name=options.name,
        owner=Owner(options.owner, options.license),
        namespace=options.namespace,
        results=options.results,
    )
    for folder in written:
        print(f"built {folder}")
    own = [str(folder) for folder in written if folder.name not in naver.FILES]
    if own:
        again = ", once built again with --namespace YOU" * (options.namespace == NAMESPACE)
        name = "YOU" if again else options.namespace
        print(
            f"publish your own{again}: python -m hub publish {shlex.join(own)} "
            f"--namespace {name} --manifest manifest.json"
        )
    return True


def _publish(options: argparse.Namespace) -> bool:
    publish(
        options.folders,
        HfApi(),
        namespace=options.namespace,
        manifest_path=options.manifest,
        dry_run=options.dry_run,
    )
    return True


def _verify(options: argparse.Namespace) -> bool:
    return verify(options.names, HfApi(), options.manifest)


def _import_naver(options: argparse.Namespace) -> bool:
    from hub.import_naver import FILES, import_naver

    return import_naver(
        options.output,
        options.files or FILES,
        manifest_path=options.manifest,
        imagenet=options.imagenet,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
