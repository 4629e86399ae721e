"""One model on all benchmarks: one table, beside the published numbers.

    python eval/run_all.py --model_name_or_path runs/stage2 --data_dir DATA --output_dir runs/all

DATA holds a folder for each benchmark (CIRR, FashionIQ, CIRCO, GeneCIS; docs/benchmarks.md). Writes each benchmark's
own files into a folder of its name, and results.json and table.md beside them. The truths of CIRR's and CIRCO's test
splits are with their servers: the table has val figures, and `--split test` writes the submissions for them.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmark_arguments import add_common_arguments, require_outputs
from circo import CIRCO
from cirr import CIRR
from fashioniq import FASHIONIQ
from genecis import GENECIS
from harness import Benchmark, check_data, effective_method, load_model, parse_arguments, prepare, run
from results import claim_folder, notes
from safetensors import SafetensorError


BENCHMARKS = {benchmark.name: benchmark for benchmark in (CIRR, CIRCO, FASHIONIQ, GENECIS)}
FOLDERS = {
    "cirr": ("CIRR", "cirr"),
    "circo": ("CIRCO", "circo"),
    "fashioniq": ("FashionIQ", "fashion-iq", "fashioniq"),
    "genecis": ("GeneCIS", "genecis"),
}
COLUMNS = {
    "cirr_recall_at_1": "CIRR R@1",
    "circo_map_at_5": "CIRCO mAP@5",
    "fashioniq_recall_at_10": "FashionIQ R@10",
    "genecis_recall_at_1": "GeneCIS R@1",
}


def arguments_of(benchmark: Benchmark, args: argparse.Namespace) -> argparse.Namespace:
    """The benchmark's own arguments: its switches at their defaults, and what all have in common."""
    folders = [args.data_dir / name for name in FOLDERS[benchmark.name]]
    own = parse_arguments(benchmark, ["--data_dir", str(args.data_dir), "--check_data"])
    for name, value in vars(args).items():
        if name not in ("benchmarks", "split"):
            setattr(own, name, value)
    own.data_dir = next((folder for folder in folders if folder.is_dir()), args.data_dir)
    own.split = args.split if benchmark.submissions is not None else "val"
    if args.output_dir is not None:
        own.output_dir = args.output_dir / benchmark.name
    return own


def of_each(args: argparse.Namespace, work: Callable[[Benchmark, argparse.Namespace], Any]) -> dict[str, Any]:
    """What `work` gives for every benchmark asked for, or one `ValueError` that names what is wrong with any."""
    done, problems = {}, []
    for name in args.benchmarks:
        try:
            done[name] = work(BENCHMARKS[name], arguments_of(BENCHMARKS[name], args))
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        hint = [f"or evaluate the others alone: --benchmarks {' '.join(done)}"] if done else []
        raise ValueError("\n".join([*problems, *hint]))
    return done


def published() -> dict:
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def table(results: dict[str, dict], model: str) -> str:
    """Markdown: this model's figures, then the published ones, in percent, with all that keeps them apart."""
    method = " ".join(sorted({several["method"] for several in results.values()}))
    flat = {name: value for several in results.values() for name, value in several.items()}
    known = published()
    lines = ["| method | " + " | ".join(COLUMNS.values()) + " | source |", "|---" * (len(COLUMNS) + 2) + "|"]
    own = [f"{100 * flat[name]:.2f}" if name in flat else "" for name in COLUMNS]
    splits = " and ".join(sorted({several["protocol"]["split"] for several in results.values()}))
    lines.append(f"| **{model}** ({method}) | " + " | ".join(own) + f" | this run; {splits} splits |")
    for row in known["rows"]:
        cells = [f"{row[name]:.2f}" if name in row else "" for name in COLUMNS]
        lines.append(f"| {row['method']} | " + " | ".join(cells) + f" | {row['source']} |")
    lines += ["", f"Published rows: {known['setting']}. Val and test figures of CIRR and CIRCO cannot be compared."]
    of_note: dict[str, list[str]] = {}
    for name, several in results.items():
        for note in notes(several):
            of_note.setdefault(note, []).append(name)
    for note, names in of_note.items():  # said once where it is so of all
        lines.append(note if len(names) == len(results) else note.replace("Note", f"Note, {', '.join(names)}", 1))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--split", default="val", choices=["val", "test"], help="test: CIRR's and CIRCO's submissions")
    parser.add_argument("--benchmarks", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    args = parser.parse_args(arguments)
    require_outputs(parser, args)
    try:
        if args.check_data:
            of_each(args, check_data)
            return
        loaded = of_each(args, lambda benchmark, own: benchmark.load(own))
        model = load_model(args)
        told = effective_method(model[0], args)  # a wrong choice is refused before anything is read
        claim_folder(args.output_dir, "published", ("table.md", "results.json"))
        ready = of_each(args, lambda benchmark, own: prepare(benchmark, loaded[benchmark.name], *model, own))
        results = of_each(args, lambda benchmark, own: run(benchmark, ready[benchmark.name], told, *model, own))
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"error: {error}")
    text = table(results, args.model_name_or_path)
    (args.output_dir / "table.md").write_text(text + "\n", encoding="utf-8")
    summary = {"results": results, "published": published()}
    (args.output_dir / "results.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    sys.stdout.write(f"{text}\n\nwritten to {args.output_dir}\n")


if __name__ == "__main__":
    main()
