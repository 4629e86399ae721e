"""Build the miniature world, train both stages, compare them with their baselines, and draw what they retrieve.

    python -m miniature.demo --output_dir runs/miniature

Writes results.json, page.html and page.png. `--short` does the same with few training steps and queries: it shows that
everything works, not how well.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from eval.cirr import CIRR, compose, load_cirr, metrics, mix, query_ranks
from eval.significance import mean_and_standard_error
from miniature.build import build
from miniature.result_page import Row, write_html, write_png
from modeling_tscir import TSCIRModel, TSCIRProcessor
from modeling_tscir.embedding import embed_images, embed_texts
from modeling_tscir.ranking import top_k


CLIP = Path("modeling_tscir/miniature_clip")
RECIPES = Path("train/recipes")
METHODS = {
    "image": "image only",
    "text": "text only",
    "sum": "sum, weight tuned on val",
    "slerp": "slerp, weight tuned on val",
    "mlp": "stage I, plain MLP mapper",
    "stage1": "stage I, injection and soft alignment",
    "stage2": "stage II",
    "oracle": "caption oracle (target's full caption)",
}
SHOWN = {"recall_at_1": "R@1", "recall_at_10": "R@10", "recall_at_50": "R@50", "subset_recall_at_1": "subset R@1"}
WEIGHTS = [round(0.1 * i, 1) for i in range(1, 10)]
NUM_PICTURED = 14


def launch(stage: int, output: Path, model: Path, world: Path, seed: int, *flags: str) -> None:
    script, recipe = f"train/stage{stage}.py", RECIPES / f"miniature_stage{stage}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", script, "--config", str(recipe)]
    data = world / {1: "captions", 2: "triplets"}[stage]
    command += ["--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(output)]
    subprocess.run([*command, "--seed", str(seed), *flags], check=True)


def train_all(output: Path, world: Path, seed: int, short: bool) -> None:
    few = ["--max_steps", "12", "--dataset_train_split", "train[:1024]"] if short else []
    launch(1, output / "mlp", CLIP, world, seed, "--num_injection_blocks", "0", "--soft_alignment_weight", "0", *few)
    launch(1, output / "stage1", CLIP, world, seed, *few)
    launch(2, output / "stage2", output / "stage1", world, seed, *few)


def first_queries(data: CIRR, count: int) -> CIRR:
    """The same gallery with fewer queries."""
    return CIRR(data.names, data.paths, *(column[:count] for column in data[2:]))


def tuned_weight(method: str, val: CIRR, images: torch.Tensor, texts: torch.Tensor, gallery: torch.Tensor) -> float:
    """The text's share with the best R@1 on the val world."""
    recalls = [
        float((query_ranks(mix(method, images, texts, weight), gallery, val)[0] == 1).mean()) for weight in WEIGHTS
    ]
    return WEIGHTS[int(np.argmax(recalls))]


def evaluate(output: Path, world: Path, short: bool) -> dict[str, dict]:
    """Metrics of every method on the test world; also draws the page."""
    clip = TSCIRModel.from_clip_pretrained(CLIP), TSCIRProcessor.from_clip_pretrained(CLIP)
    val, test = (load_cirr(world / name / "CIRR") for name in ("val", "test"))
    if short:
        val, test = first_queries(val, 100), first_queries(test, 200)
    galleries = {
        name: embed_images(*clip, [str(p) for p in data.paths], progress=f"{name} gallery")
        for name, data in (("val", val), ("test", test))
    }
    val_texts = embed_texts(*clip, val.captions)
    val_images = galleries["val"][val.references]
    weights = {m: tuned_weight(m, val, val_images, val_texts, galleries["val"]) for m in ("sum", "slerp")}
    captions = json.loads((world / "test/CIRR/full_captions.json").read_text(encoding="utf-8"))
    queries = {
        method: compose(method, *clip, test, galleries["test"], weights.get(method, 0.5))
        for method in ("image", "text", "sum", "slerp")
    }
    for method in ("mlp", "stage1", "stage2"):
        folder = output / method
        model = TSCIRModel.from_pretrained(folder), TSCIRProcessor.from_pretrained(folder)
        queries[method] = compose("tscir", *model, test, galleries["test"], 0.0)
    queries["oracle"] = embed_texts(*clip, [captions[test.names[t]] for t in test.targets])
    results = {}
    for method in METHODS:
        ranks, subset_ranks = query_ranks(queries[method], galleries["test"], test)
        results[method] = metrics(ranks, subset_ranks, test)
        for name in SHOWN:
            values = subset_ranks if name.startswith("subset") else ranks
            hits = values <= int(name.rsplit("_", 1)[1])
            results[method][f"cirr_{name}_standard_error"] = mean_and_standard_error(hits, test.references)[1]
        results[method] |= {"weight": weights[method]} if method in weights else {}
        results[method]["ranks"] = ranks.tolist()
    draw(output, test, queries, galleries["test"])
    return results


def draw(output: Path, test: CIRR, queries: dict[str, torch.Tensor], gallery: torch.Tensor) -> None:
    """Evenly spaced test queries, not chosen by how well they went, with the top five of stage II."""
    step = len(test.captions) // NUM_PICTURED
    picked = [i * step + i % 4 for i in range(NUM_PICTURED)]
    _, found = top_k(queries["stage2"][picked], gallery, 5, exclude=[[test.references[i]] for i in picked])
    rows = [
        Row(
            reference=test.paths[test.references[i]],
            text=test.captions[i],
            found=[test.paths[j] for j in indices],
            target=test.paths[test.targets[i]],
        )
        for i, indices in zip(picked, found.tolist(), strict=True)
    ]
    write_png(rows, output / "page.png")
    write_html(rows, output / "page.html")


def table(results: dict[str, dict]) -> str:
    """One line a method, in percent, with standard errors clustered by reference."""
    lines = [f"{'':42}" + "".join(f"{title:>16}" for title in SHOWN.values())]
    for method, title in METHODS.items():
        values = results[method]
        cells = [
            f"{100 * values[f'cirr_{name}']:.1f} ± {100 * values[f'cirr_{name}_standard_error']:.1f}" for name in SHOWN
        ]
        lines.append(f"{title:42}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/miniature"))
    parser.add_argument("--seed", type=int, default=0, help="of the training set drawn and of the training")
    parser.add_argument("--short", action="store_true")
    args = parser.parse_args()
    logging.disable_progress_bar()
    start = time.time()
    world = args.output_dir / "world"
    print(f"drawing the world into {world}", flush=True)
    build(world, ["cirr"], args.seed)
    train_all(args.output_dir, world, args.seed, args.short)
    results = evaluate(args.output_dir, world, args.short)
    ranks = {method: values.pop("ranks") for method, values in results.items()}
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    (args.output_dir / "ranks.json").write_text(json.dumps(ranks), encoding="utf-8")
    number = results["stage2"]["cirr_num_queries"], results["stage2"]["cirr_num_gallery_images"]
    print(f"\nminiature CIRR, test world: {number[0]} queries, {number[1]} pictures, percent ± standard error\n")
    print(table(results))
    if args.short:
        print("\nA short run: these figures show that everything works, not how well.")
    print(
        f"\n{args.output_dir}/results.json, page.html and page.png written; {time.time() - start:.0f} seconds in all"
    )


if __name__ == "__main__":
    main()
