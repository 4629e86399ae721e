"""Build the miniature world, train both stages, compare them with their baselines, and draw what they retrieve.

    python -m miniature.demo --output_dir runs/miniature

Writes results.json, page.html and page.png. `--short` does the same with few training steps and queries: it shows that
everything works, not how well.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers.utils import logging

from miniature.build import build, is_world
from miniature.compare import BENCHMARKS, CLIP, compare, table
from miniature.result_page import Row, write_html, write_png
from modeling_tscir.ranking import top_k


RECIPES = Path("train/recipes")
NUM_PICTURED = 14


def launch(stage: int, output: Path, model: Path, world: Path, seed: int, *flags: str) -> None:
    script, recipe = f"train/stage{stage}.py", RECIPES / f"miniature_stage{stage}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", script, "--config", str(recipe)]
    data = world / {1: "captions", 2: "triplets"}[stage]
    command += ["--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(output)]
    shutil.rmtree(output, ignore_errors=True)  # an earlier demo's, over which training would not write
    subprocess.run([*command, "--seed", str(seed), *flags], check=True)


def train_all(output: Path, world: Path, seed: int, short: bool, clip: Path) -> None:
    few = ["--max_steps", "12", "--dataset_train_split", "train[:1024]"] if short else []
    cache = ["--feature_cache_dir", str(output / "cache")]
    plain = ["--num_injection_blocks", "0", "--soft_alignment_weight", "0"]
    # Training leaves a core half idle, so the galleries and the baseline are worked on beside it.
    with ThreadPoolExecutor() as beside:
        embed = [sys.executable, "-m", "miniature.compare", str(output), str(world), str(clip)]
        galleries = beside.submit(subprocess.run, embed, check=True)
        launch(1, output / "stage1", clip, world, seed, *few, *cache)
        mlp = beside.submit(launch, 1, output / "mlp", clip, world, seed, *few, *cache, *plain)
        launch(2, output / "stage2", output / "stage1", world, seed, *few)
        galleries.result(), mlp.result()


def draw(output: Path, test, queries: torch.Tensor, image_embeds: torch.Tensor) -> None:
    """Evenly spaced test queries, not chosen by how well they went, with their top five."""
    step = len(test.query_ids) // NUM_PICTURED
    picked = [i * step + i % 4 for i in range(NUM_PICTURED)]
    _, found = top_k(queries[picked], image_embeds, 5, exclude=[[test.references[i]] for i in picked])
    rows = [
        Row(
            reference=Path(test.sources[test.references[i]]),
            text=test.texts[i][0],
            found=[Path(test.sources[j]) for j in indices],
            target=Path(test.sources[test.truths[i][0]]),
        )
        for i, indices in zip(picked, found.tolist(), strict=True)
    ]
    write_png(rows, output / "page.png")
    write_html(rows, output / "page.html")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/miniature"), help="new, or an earlier demo's, which is replaced"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the training set drawn and of the training")
    parser.add_argument("--clip", type=Path, default=CLIP, help="another stand-in CLIP, see miniature/train_clip.py")
    parser.add_argument("--short", action="store_true")
    args = parser.parse_args()
    logging.disable_progress_bar()
    start = time.time()
    world = args.output_dir / "world"
    if args.output_dir.is_dir() and any(args.output_dir.iterdir()) and not is_world(world):
        sys.exit(f"error: {args.output_dir} holds something else than an earlier demo; name a new folder")
    if not (args.clip / "config.json").is_file():
        sys.exit(f"error: --clip {args.clip} holds no CLIP")
    print(f"drawing the world into {world}", flush=True)
    build(world, seed=args.seed)
    train_all(args.output_dir, world, args.seed, args.short, args.clip)
    results, per_query, drawn = compare(args.output_dir, world, args.short, args.clip)
    draw(args.output_dir, *drawn)
    for name, content, indent in (("results", results, 2), ("per_query", per_query, None)):
        (args.output_dir / f"{name}.json").write_text(json.dumps(content, indent=indent), encoding="utf-8")
    print("\nThe miniature's test world, percent ± standard error (the first four columns are CIRR's)\n")
    print(table(results) + "\n")
    for folder, benchmark in BENCHMARKS.items():
        number = [results["stage2"][f"{benchmark.name}_num_{what}"] for what in ("queries", "gallery_images")]
        print(f"{folder}: {number[0]} queries, {number[1]} pictures")
    if args.short:
        print("\nA short run: these figures show that everything works, not how well.")
    print(
        f"\n{args.output_dir}/results.json, page.html and page.png written; {time.time() - start:.0f} seconds in all"
    )


if __name__ == "__main__":
    main()
