"""What was measured, as results.json and as Markdown with pictures."""

import json
import os
import platform
import sys
from pathlib import Path

import accelerate
import peft
import torch
import transformers


sys.path[:0] = [str(Path(__file__).resolve().parents[2])]
from works import CURVES, WORKS  # noqa: E402  (a neighbour, which sets the path)


sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "train")]
from loop import cpu_name  # noqa: E402


LIBRARIES = (torch, transformers, peft, accelerate)


def machine() -> dict:
    """What figures depend on."""
    capabilities = torch.cpu.get_capabilities()
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "amx": bool(capabilities.get("amx_bf16", False)),
        "versions": {"python": platform.python_version(), **{lib.__name__: lib.__version__ for lib in LIBRARIES}},
    }


def name_of(machine: dict) -> str:
    return f"{machine['cpu']}, {machine['cores']} cores, {'with' if machine['amx'] else 'without'} AMX"


def times(ratio: dict | None) -> str:
    """A ratio with its range."""
    return "" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def aim(target: float | None, reached: bool) -> str:
    """A target, and whether the median lies within it."""
    return "" if target is None else f"{target}" if reached else f"{target}, not reached"


def of(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def one_line(line: dict) -> str:
    ratios = f"{times(line['vs_peers'])} times the peers, {times(line['vs_limit'])} of the limit"
    return f"{line['work']}, {line['shape']}: {ratios}"


def entries(figures: dict) -> list[dict]:
    """results.json: how many times as fast as the peers, and how many times as long as the limit."""
    lines = [(f"{line['work']}, {line['shape']}", line["vs_peers"], line["vs_limit"]) for line in figures["works"]]
    lines.append(("import modeling_tscir", None, figures["imports"]["ratio"]))
    return [
        {
            "work": work,
            "vs_peers": None if peers is None else round(peers["median"], 2),
            "vs_limit": None if limit is None else round(limit["median"], 2),
            "spread": {
                name: None if ratio is None else [round(ratio["low"], 2), round(ratio["high"], 2)]
                for name, ratio in (("vs_peers", peers), ("vs_limit", limit))
            },
            "machine": name_of(figures["machine"]),
        }
        for work, peers, limit in lines
    ]


def write_report(figures: dict, folder: Path) -> None:
    """results.json, speed.md and, where curves were measured, growth.png in `folder`."""
    (folder / "results.json").write_text(json.dumps(entries(figures), indent=1) + "\n", encoding="utf-8")
    if figures["curves"]:
        draw_growth(figures["curves"], folder / "growth.png")
    (folder / "speed.md").write_text("\n".join(sections(figures)) + "\n", encoding="utf-8")


def sections(figures: dict) -> list[str]:
    """The report's lines."""
    m, p = figures["machine"], figures["precision"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    slower = times(figures["bf16_over_fp32"])
    gain = 1 / figures["bf16_over_fp32"]["median"] if figures["dtype"] == "bfloat16" else 1
    without = "" if m["amx"] else f" This processor has none, and gains {gain:.1f} times by its precision."
    lines = [
        "# How fast\n",
        f"`python eval/speed/benchmark.py --output_dir runs/speed` on {name_of(m)},",
        f"{m['threads']} threads; {versions}.",
        f"CLIPs of random weights, texts as long as CIRR's, photos of 400 x 533. Ours computes in {figures['dtype']},",
        f"the faster here (bf16 takes {slower} times as long as fp32); the peers compute in fp32.",
        f"Medians of {figures['rounds']} paired runs with their range.\n",
        f"The targets are for two cores with AMX, and suppose that bf16 is four times as fast as fp32.{without}\n",
        "| work | model | rows | ours | times as fast as the peers | target | times as long as the limit | target "
        "| peak GiB, ours / peers |",
        "|" + "---|" * 9,
    ]
    for line in figures["works"]:
        target, peak = WORKS[line["work"]].targets, line["peak_gib"]
        cells = [line["work"], line["shape"], f"{line['rows']:,}", of(line["seconds"]["ours"])]
        peers, limit = line["vs_peers"], line["vs_limit"]
        cells += [times(peers), aim(target[0], peers["median"] >= target[0]), times(limit)]
        cells += [aim(target[1], limit is None or limit["median"] <= target[1])]
        cells += [f"{peak['ours']:.2f} / {peak['peers']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    imports = figures["imports"]
    cells = ["`import modeling_tscir`", "", "", of(imports["seconds"]["ours"]), "", "", times(imports["ratio"]), "1.1"]
    cells.append(f"{imports['peak_gib']['ours']:.2f} / {imports['peak_gib']['limit']:.2f} (limit)")
    lines += [
        f"| {' | '.join(cells)} |",
        "\nThe limit: decoding and the two towers' forward passes (queries); the larger of decoding and",
        "forward on one core each (gallery); the frozen vision tower's forward pass (stage I); the text",
        "tower with adapters, forward and backward (stage II); matrix product and partial sort",
        "(evaluation); `import transformers` with CLIP. Peak memory is what a process holds of its own",
        "during a call, without weights, which are mapped from their file (but with the frozen ones that",
        "training in bf16 rounds), and without the peers' decoding processes; of the import it is the whole.\n",
        "## One lever at a time\n",
        "How many times as fast as the peers' way it is with one of ours alone, and LinCIR's way, which",
        "sees no picture; and how many times as fast as ours with `torch.compile`, which queries would get",
        "from 1.3 on, and training has as `--torch_compile`; once compiled, which takes about half a minute,",
        "for texts of one length.\n",
        "| work | model | lever | times as fast |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {line['work']} | {line['shape']} | {name} | {times(ratio)} |"
        for line in figures["works"]
        for name, ratio in line["others"].items()
    ]
    lines += [
        "\n## Precision\n",
        f"Features in fp32 differ from CLIPModel's by at most {p['fp32_difference']:.1g}; in bf16 their",
        f"cosine is at least {p['bf16_least_cosine']:.5f}. The miniature's checkpoint, {p['queries']:,}",
        f"queries of its val world among {p['pictures']:,} pictures with near-duplicates: in bf16 the least",
        f"cosine is {p['least_cosine_pictures']:.5f} of pictures and {p['least_cosine_queries']:.5f} of",
        f"queries; {100 * p['same_ten']:.1f}% of the queries have the same ten pictures first,",
        f"{100 * p['same_one']:.1f}% the same one. In fp16 {100 * p['same_ten_fp16']:.1f}% have the same ten; where",
        "nothing is rounded to bf16 but weights and inputs of the layers' matrix products,",
        f"{100 * p['same_ten_products']:.1f}%.\n",
    ]
    if figures["curves"]:
        lines += growth(figures["curves"])
    return lines


def shape_of(point: dict) -> str:
    """The CLIP of a curve's point; figures from before all curves told it are of the first one."""
    return point.get("shape", "ViT-B/32")


def growth(points: list[dict]) -> list[str]:
    """The report's lines of how cost grows."""
    lines = [
        "## How cost grows\n",
        "![Seconds and peak memory by size](growth.png)\n",
        f"{shape_of(points[0])}; medians of three.\n",
        "| work | size | seconds, ours / peers | peak GiB, ours / peers |",
        "|---|---|---|---|",
    ]
    for name in CURVES:
        own = {(p["size"], p["way"]): p for p in points if p["curve"] == name}
        for size in sorted({size for size, _ in own}):
            both = [own.get((size, way)) for way in ("ours", "peers")]
            seconds = " / ".join("" if p is None else f"{median(p['seconds']):.3g}" for p in both)
            peak = " / ".join("" if p is None else f"{p['peak_gib']:.2f}" for p in both)
            lines.append(f"| {name} | {size:,} | {seconds} | {peak} |")
    return lines


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def draw_growth(points: list[dict], path: Path) -> None:
    """Two panels a curve, one below the other: seconds and peak memory, both by size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(p["curve"] for p in points))
    columns = 4
    rows = -(-len(names) // columns)
    figure, axes = pyplot.subplots(2 * rows, columns, figsize=(4.2 * columns, 5 * rows), squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)
    for number, name in enumerate(names):
        for part, (label, value) in enumerate(
            (("seconds", lambda p: median(p["seconds"])), ("peak GiB", lambda p: p["peak_gib"]))
        ):
            axis = axes[2 * (number // columns) + part][number % columns]
            axis.set_visible(True)
            for way, style in (("ours", "o-"), ("peers", "s--")):
                own = [p for p in points if p["curve"] == name and p["way"] == way]
                if own:
                    axis.plot([p["size"] for p in own], [value(p) for p in own], style, label=way)
            axis.set_xscale("log")
            sizes = sorted({p["size"] for p in points if p["curve"] == name})
            axis.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
            axis.minorticks_off()
            axis.set_ylabel(label)
            if part == 0:
                axis.set_yscale("log")
                axis.set_title(name, fontsize=9)
                axis.legend(fontsize=8)
            else:
                axis.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
