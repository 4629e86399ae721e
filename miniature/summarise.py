"""Several seeds of the demo in one table, with the paired differences that the README speaks of.

    for seed in 0 1 2; do python -m miniature.demo --output_dir runs/seed$seed --seed $seed; done
    python -m miniature.summarise runs/seed0 runs/seed1 runs/seed2

Standard errors are of the mean over seeds, clustered by reference: queries of one reference are not independent.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from eval.significance import mean_and_standard_error
from miniature.demo import METHODS, SHOWN


QUERIES_PER_REFERENCE = 4
DIFFERENCES = (("stage2", "sum", 1), ("stage2", "stage1", 1), ("stage1", "mlp", 1), ("stage1", "mlp", 10))


def read(folder: Path, name: str) -> dict:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run python -m miniature.demo --output_dir {folder} first")
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="what the demo wrote, one folder a seed")
    args = parser.parse_args()
    results = [read(folder, "results.json") for folder in args.folders]
    ranks = [read(folder, "ranks.json") for folder in args.folders]
    lines = [f"{'mean of ' + str(len(results)) + ' seeds':42}" + "".join(f"{title:>14}" for title in SHOWN.values())]
    for method, title in METHODS.items():
        values = [[100 * result[method][f"cirr_{name}"] for result in results] for name in SHOWN]
        lines.append(f"{title:42}" + "".join(f"{np.mean(v):>14.1f}" for v in values))
    r1 = {method: np.mean([result[method]["cirr_recall_at_1"] for result in results]) for method in METHODS}
    best = max(("image", "text", "sum", "slerp"), key=r1.__getitem__)
    closed = (r1["stage2"] - r1[best]) / (r1["oracle"] - r1[best])
    lines += ["", f"R@1: stage II closes {closed:.0%} of the distance from {best} to the caption oracle"]
    lines.append(f"R@1: stage II is {r1['stage2'] / r1['stage1']:.2f} times stage I")
    for method, other, k in DIFFERENCES:
        hits = [
            np.mean([np.asarray(seed[name]) <= k for seed in ranks], axis=0, dtype=float) for name in (method, other)
        ]
        mean, error = mean_and_standard_error(hits[0] - hits[1], np.arange(len(hits[0])) // QUERIES_PER_REFERENCE)
        lines.append(f"R@{k}: {method} - {other} = {100 * mean:+.1f} ± {100 * error:.2f} points, paired")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
