"""Convert checkpoints from the command line.

    python -m convert naver FILE OUT_DIR [--model NAME.TAG] [--momentum-encoder]
                                         [--num-classes N] [--tag TAG]
    python -m convert export MODEL --to torchvision|onnx --out PATH [--file FILE]
                                   [--output features|embeddings|logits]
                                   [--with-preprocessing] [--half] [--overwrite]

A tool of the checkout: run it there. TREX_TRACEBACK=1 shows where an error comes from.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from trex_models.cli import run


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status: 0, or 2 with a short message on bad input."""
    return run(_command, arguments, "export")


def _command(arguments: Sequence[str]) -> None:
    options = _parser().parse_args(arguments)
    options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m convert", description="Convert checkpoints.")
    commands = parser.add_subparsers(title="commands", required=True)
    naver = commands.add_parser(
        "naver",
        help="an official file to timm folders",
        description="Convert an official t-ReX file, a backbone or a full training state, to timm "
        "folders named as the Hub's repositories, and report what became of each of its keys.",
    )
    naver.add_argument("file", type=Path, metavar="FILE", help="the .pth file")
    naver.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="where to write the folders")
    naver.add_argument(
        "--model",
        metavar="NAME.TAG",
        help="what a backbone file is if its name does not tell, such as trex_resnet50.in1k",
    )
    naver.add_argument(
        "--momentum-encoder", action="store_true", help="convert the momentum encoder's weights"
    )
    naver.add_argument(
        "--num-classes", type=int, metavar="N", help="classes of the bank (default: 1000)"
    )
    naver.add_argument("--tag", help="tag of the folders (default: by the file)")
    naver.set_defaults(run=_naver)
    export = commands.add_parser(
        "export",
        help="a model to torchvision or ONNX",
        description="Export a model to a state dict of torchvision's ResNets or an ONNX graph, "
        "after checking that it gives the model's outputs.",
    )
    export.add_argument(
        "model", metavar="MODEL", help="a timm model, the folder of one, or a finished run"
    )
    export.add_argument("--to", required=True, choices=("torchvision", "onnx"))
    export.add_argument(
        "--out", type=Path, required=True, metavar="PATH", help=".pth, .safetensors or .onnx"
    )
    export.add_argument(
        "--file", type=Path, help="your copy of the weights, such as an official file"
    )
    export.add_argument(
        "--output",
        choices=("features", "embeddings", "logits"),
        help="where to cut the model: behind the backbone, behind the projector, or at the end "
        "(default: the model's own output)",
    )
    export.add_argument(
        "--with-preprocessing",
        action="store_true",
        help="for ONNX: the graph takes uint8 images, B x H x W x 3, and normalises them",
    )
    export.add_argument("--half", action="store_true", help="for ONNX: float16 inside")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    export.set_defaults(run=_export)
    return parser


def _naver(options: argparse.Namespace) -> None:
    from convert.naver import convert

    convert(
        options.file,
        options.out_dir,
        model=options.model,
        momentum_encoder=options.momentum_encoder,
        num_classes=options.num_classes,
        tag=options.tag,
        say=partial(print, flush=True),
    )


def _export(options: argparse.Namespace) -> None:
    from convert.export import export

    export(
        options.model,
        options.to,
        options.out,
        file=options.file,
        output=options.output,
        with_preprocessing=options.with_preprocessing,
        half=options.half,
        overwrite=options.overwrite,
        say=partial(print, flush=True),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
