"""CIRCO's evaluation from cached embeddings, beside a full argsort with string ids.

    python eval/speed/circo_ranking.py

800 queries, 123,403 pictures, 768 dimensions, four right answers a query, random numbers. Each way runs in processes
of its own, in turns; seconds are from opening the cache to the metrics, without imports; memory is the process's peak.
Both ways must give the same mAP@50.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file


sys.path.append(str(Path(__file__).resolve().parent.parent))

from harness import rank  # noqa: E402
from splits import Split  # noqa: E402

from modeling_tscir.metrics import mean_average_precision_at_k  # noqa: E402


NUM_QUERIES, NUM_PICTURES, WIDTH, NUM_TRUTHS = 800, 123_403, 768, 4
WAYS = ("ours", "argsort")


def write_embeddings(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    gallery = F.normalize(torch.randn(NUM_PICTURES, WIDTH, generator=generator), dim=-1)
    truths = torch.stack([torch.randperm(NUM_PICTURES, generator=generator)[:NUM_TRUTHS] for _ in range(NUM_QUERIES)])
    noise = torch.randn(NUM_QUERIES, WIDTH, generator=generator)
    queries = F.normalize(gallery[truths].sum(1) + 0.25 * noise, dim=-1)
    save_file({"embeds": gallery, "queries": queries, "truths": truths}, path)


def ours(path: Path) -> float:
    cache = load_file(path)
    split = Split(
        image_ids=[str(i) for i in range(NUM_PICTURES)],
        sources=[],
        files=[],
        query_ids=list(range(NUM_QUERIES)),
        references=[0] * NUM_QUERIES,
        texts=[("",)] * NUM_QUERIES,
        annotation_files=(),
        truths=cache["truths"].tolist(),
    )
    ranked = rank(split, cache["queries"], cache["embeds"])
    return mean_average_precision_at_k(ranked.gallery.truth_ranks.numpy(), 50)


def argsort(path: Path) -> float:
    """Distances, a full argsort, names of the whole ranking, and comparison of names, as public evaluators do it."""
    cache = load_file(path)
    names = np.array([f"{i:012d}" for i in range(NUM_PICTURES)])
    truths = names[cache["truths"].numpy()]
    distances = 1 - cache["queries"] @ cache["embeds"].T
    ranked_names = names[torch.argsort(distances, dim=-1).numpy()]
    precisions = []
    for q in range(NUM_QUERIES):
        hits = np.isin(ranked_names[q, :50], truths[q])
        precision = np.cumsum(hits) * hits / np.arange(1, 51)
        precisions.append(precision.sum() / min(NUM_TRUTHS, 50))
    return float(np.mean(precisions))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--only", choices=["write", *WAYS], help=argparse.SUPPRESS)
    parser.add_argument("--embeddings", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only == "write":
        write_embeddings(args.embeddings)
        return
    if args.only:
        start = time.perf_counter()
        score = {"ours": ours, "argsort": argsort}[args.only](args.embeddings)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"seconds": seconds, "peak_gib": peak, "map_at_50": score}))
        return
    with tempfile.TemporaryDirectory() as folder:
        embeddings = Path(folder) / "embeddings.safetensors"
        # In a process of its own: a child's peak memory begins with its parent's.
        subprocess.run([sys.executable, __file__, "--only", "write", "--embeddings", str(embeddings)], check=True)
        runs: dict[str, list[dict]] = {way: [] for way in WAYS}
        for _ in range(args.repetitions):
            for way in WAYS:
                command = [sys.executable, __file__, "--only", way, "--embeddings", str(embeddings)]
                runs[way].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    assert len({round(run["map_at_50"], 9) for several in runs.values() for run in several}) == 1, runs
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print("| way | seconds (median, range) | peak GiB |\n|---|---|---|")
    for way, several in runs.items():
        seconds = sorted(run["seconds"] for run in several)
        peak = max(run["peak_gib"] for run in several)
        print(f"| {way} | {statistics.median(seconds):.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f}) | {peak:.2f} |")
    ratios = sorted(
        theirs["seconds"] / own["seconds"] for own, theirs in zip(runs["ours"], runs["argsort"], strict=True)
    )
    print(f"\nratio, paired: {statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})")


if __name__ == "__main__":
    main()
