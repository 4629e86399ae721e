"""The arguments that every benchmark script has."""

import argparse
import math
import os
from pathlib import Path

import torch


DEFAULT_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tscir"
METHODS = ("tscir", "image", "text", "sum", "slerp")
PADDING = {"model": "as the model's processor says", "clip": None, "squarepad": 1.0, "targetpad": 1.25}
DTYPES = ("float32", "bfloat16", "float16")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_name_or_path", help="a trained folder, or a plain CLIP")
    parser.add_argument("--data_dir", type=Path, required=True, help="see docs/benchmarks.md")
    parser.add_argument("--output_dir", type=Path, help="gets results.json, rankings.parquet and submissions")
    parser.add_argument("--method", default="tscir", choices=METHODS)
    parser.add_argument(
        "--weight",
        type=float,
        help="sum and slerp: the text's share, 0 to 1 (0.5); tscir: -1 to 1 moves queries to the picture or text "
        "(the model's own)",
    )
    parser.add_argument(
        "--residual",
        type=float,
        help="tscir: how much of what pseudo-words leave out of their picture is added to queries (the model's own)",
    )
    parser.add_argument("--prompt_template", help="of composed queries; the model's own unless told")
    parser.add_argument(
        "--preprocessing",
        default="model",
        choices=PADDING,
        help="model: as the model was saved; clip: CLIP's resize and centre crop; squarepad, targetpad (1.25, as "
        "SEARLE's): padded with black before",
    )
    parser.add_argument("--on_bad_image", default="error", choices=["error", "skip"])
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch_size", type=positive, default=64)
    parser.add_argument("--cache_dir", type=Path, default=DEFAULT_CACHE, help="of gallery embeddings")
    parser.add_argument(
        "--check_data", action="store_true", help="only read annotations and pictures, and say what is missing"
    )


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def require_outputs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Errors for what only a check of the data can do without, and for what would fail after hours of work."""
    if args.weight is not None:
        if args.method in ("image", "text"):
            parser.error(f"--weight has no part in --method {args.method}")
        lowest = -1 if args.method == "tscir" else 0
        if not lowest <= args.weight <= 1:
            parser.error(f"--weight of --method {args.method} is from {lowest} to 1, not {args.weight}")
    if args.residual is not None:
        if not math.isfinite(args.residual):
            parser.error(f"--residual must be a number, not {args.residual}")
        if args.method != "tscir":
            parser.error(f"--residual has no part in --method {args.method}")
    if args.prompt_template is not None and args.method != "tscir":
        parser.error(f"--prompt_template has no part in --method {args.method}")
    if not args.check_data and (args.model_name_or_path is None or args.output_dir is None):
        parser.error("--model_name_or_path and --output_dir are needed (but for --check_data)")
