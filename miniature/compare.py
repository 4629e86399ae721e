"""Every method on the miniature's three benchmarks, by the protocols and code of eval/.

What is tuned, the text's share in sum and slerp, is tuned on the val world; figures are the test world's.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from modeling_tscir import TSCIRModel, TSCIRProcessor
from modeling_tscir.embedding import embed_texts
from modeling_tscir.metrics import average_precision_at_k


ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "eval"))  # its scripts import each other by name, as they do when they are run

from circo import CIRCO  # noqa: E402
from cirr import CIRR  # noqa: E402
from fashioniq import FASHIONIQ  # noqa: E402
from harness import (  # noqa: E402
    Benchmark,
    compose,
    counts,
    embed_pictures,
    parse_arguments,
    rank,
)
from significance import mean_and_standard_error  # noqa: E402
from splits import Ranked, Split  # noqa: E402


CLIP = ROOT / "modeling_tscir" / "miniature_clip"
BENCHMARKS = {"CIRR": CIRR, "FashionIQ": FASHIONIQ, "CIRCO": CIRCO}
METHODS = {
    "image": "image only",
    "text": "text only",
    "sum": "sum, weight tuned on val",
    "slerp": "slerp, weight tuned on val",
    "mlp": "stage I, plain MLP mapper",
    "stage1": "stage I, injection and soft alignment",
    "stage1_moved": "stage I, with residual and text",
    "stage2_prompt": "stage II, prompt alone",
    "stage2": "stage II, with residual and text",
    "oracle": "caption oracle (target's full caption)",
}
PROMPT_ALONE = {"residual": 0.0, "weight": 0.0}
TRAINED = {  # the folder of each, and how its queries are made, where it is not as the model says
    "mlp": ("mlp", PROMPT_ALONE),
    "stage1": ("stage1", PROMPT_ALONE),
    "stage1_moved": ("stage1", {}),
    "stage2_prompt": ("stage2", PROMPT_ALONE),
    "stage2": ("stage2", {}),
}
SHOWN = {
    "cirr_recall_at_1": "R@1",
    "cirr_recall_at_10": "R@10",
    "cirr_recall_at_50": "R@50",
    "cirr_subset_recall_at_1": "subset R@1",
    "fashioniq_recall_at_10": "FashionIQ R@10",
    "circo_map_at_5": "CIRCO mAP@5",
}
WEIGHTS = [round(0.1 * i, 1) for i in range(1, 10)]


def read_benchmark(folder: str, world: Path, output: Path, num_queries: int | None):
    """A benchmark's arguments and splits, as its script reads them."""
    flags = ["--data_dir", str(world / folder), "--cache_dir", str(output / "cache"), "--check_data"]
    args = parse_arguments(BENCHMARKS[folder], flags)
    splits = BENCHMARKS[folder].load(args)
    if num_queries is not None:
        splits = {category: split.first_queries(num_queries) for category, split in splits.items()}
    return args, splits


def compare(output: Path, world: Path, short: bool, clip_dir: Path) -> tuple[dict[str, dict], dict[str, dict], tuple]:
    """Train nothing, evaluate everything.

    Args:
        output: the folder that holds the trained models, by method.
        world: the miniature world, built.
        short: few queries.
        clip_dir: the CLIP that they were trained on.

    Returns:
        Metrics by method; for each shown metric every query's value by method, with the queries' clusters; and CIRR's
        split, stage II queries and picture embeddings, to be drawn.
    """
    clip = TSCIRModel.from_clip_pretrained(clip_dir), TSCIRProcessor.from_clip_pretrained(clip_dir)
    models = {
        name: (TSCIRModel.from_pretrained(output / name), TSCIRProcessor.from_pretrained(output / name))
        for name in {folder for folder, _ in TRAINED.values()}
    }
    for model, _ in models.values():
        model.merge_adapter()
    results: dict[str, dict] = {method: {} for method in METHODS}
    per_query: dict[str, dict] = {}
    drawn = ()
    for folder, benchmark in BENCHMARKS.items():
        args, splits = read_benchmark(folder, world / "test", output, 200 if short else None)
        embeds = {category: embed_pictures(*clip, split, args) for category, split in splits.items()}
        weights = tuned_weights(folder, world / "val", output, clip, 100 if short else None)
        for method in METHODS:
            if method == "oracle" and folder != "CIRR":
                continue  # its captions are CIRR's alone
            queries = {
                category: queries_of(method, clip, models, split, embeds[category], weights, world)
                for category, split in splits.items()
            }
            ranked = {c: rank(split, queries[c], embeds[c]) for c, split in splits.items()}
            results[method] |= benchmark.metrics(splits, ranked) | counts(benchmark.name, splits)
            results[method] |= {f"{benchmark.name}_weight": weights[method]} if method in weights else {}
            for name, values in query_values(benchmark, splits, ranked).items():
                kept = per_query.setdefault(name, {"clusters": clusters_of(splits)})
                kept[method] = values.tolist()
                error = mean_and_standard_error(values, np.array(kept["clusters"]))[1]
                results[method][f"{name}_standard_error"] = error
            if folder == "CIRR" and method == "stage2":
                drawn = splits[""], queries[""], embeds[""]
    return results, per_query, drawn


def embed_galleries(output: Path, world: Path, clip_dir: Path) -> None:
    """Every picture of both worlds, into the cache that `compare` reads."""
    clip = TSCIRModel.from_clip_pretrained(clip_dir), TSCIRProcessor.from_clip_pretrained(clip_dir)
    for name in ("test", "val"):
        for folder in BENCHMARKS:
            args, splits = read_benchmark(folder, world / name, output, None)
            for split in splits.values():
                embed_pictures(*clip, split, args)


def tuned_weights(folder: str, world: Path, output: Path, clip, num_queries: int | None) -> dict[str, float]:
    """The text's share in sum and slerp with the best primary metric on the val world."""
    benchmark = BENCHMARKS[folder]
    args, splits = read_benchmark(folder, world, output, num_queries)
    embeds = {category: embed_pictures(*clip, split, args) for category, split in splits.items()}
    best = {}
    for method in ("sum", "slerp"):
        figures = []
        for weight in WEIGHTS:
            ranked = {
                c: rank(split, compose(method, *clip, split, embeds[c], weight), embeds[c])
                for c, split in splits.items()
            }
            figures.append(benchmark.metrics(splits, ranked)[benchmark.primary_metric])
        best[method] = WEIGHTS[int(np.argmax(figures))]
    return best


def queries_of(
    method: str, clip, models: dict, split: Split, embeds: torch.Tensor, weights: dict[str, float], world: Path
) -> torch.Tensor:
    if method == "oracle":
        captions = json.loads((world / "test/CIRR/full_captions.json").read_text(encoding="utf-8"))
        return embed_texts(*clip, [captions[split.image_ids[truths[0]]] for truths in split.truths])
    if method in TRAINED:
        folder, told = TRAINED[method]
        return compose("tscir", *models[folder], split, embeds, **told)
    return compose(method, *clip, split, embeds, weights.get(method))


def query_values(benchmark: Benchmark, splits: dict[str, Split], ranked: dict[str, Ranked]) -> dict[str, np.ndarray]:
    """For each shown metric of the benchmark, every query's own value; its mean is the metric."""
    values = {}
    for name in (n for n in SHOWN if n.startswith(benchmark.name)):
        kind, depth = name.removeprefix(f"{benchmark.name}_").rsplit("_at_", 1)
        if kind == "map":
            ranks = ranked[""].gallery.truth_ranks.numpy()
            values[name] = np.array([average_precision_at_k(row, int(depth)) for row in ranks])
            continue
        place = "candidates" if kind.startswith("subset") else "gallery"
        ranks = np.concatenate([getattr(ranked[c], place).truth_ranks[:, 0].numpy() for c in splits])
        values[name] = (ranks <= int(depth)).astype(float)
    return values


def clusters_of(splits: dict[str, Split]) -> list[str]:
    """Queries of one reference are not independent."""
    return [f"{category} {reference}" for category, split in splits.items() for reference in split.references]


def table(results: dict[str, dict]) -> str:
    """One line a method, in percent, with standard errors clustered by reference."""
    lines = [f"{'':42}" + "".join(f"{title:>16}" for title in SHOWN.values())]
    for method, title in METHODS.items():
        values = results[method]
        cells = [
            f"{100 * values[name]:.1f} ± {100 * values[f'{name}_standard_error']:.1f}" if name in values else ""
            for name in SHOWN
        ]
        lines.append(f"{title:42}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    embed_galleries(*map(Path, sys.argv[1:]))
