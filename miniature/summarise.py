"""Several seeds of the demo in one table, with the paired differences that the README speaks of.

    for seed in 0 1 2; do python -m miniature.demo --output_dir runs/seed$seed --seed $seed; done
    python -m miniature.summarise runs/seed0 runs/seed1 runs/seed2

Standard errors are of the mean over seeds, clustered by reference: queries of one reference are not independent.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from miniature.compare import METHODS, SHOWN, mean_and_standard_error


DIFFERENCES = (
    ("stage2", "sum"),
    ("stage2", "stage1"),
    ("stage2", "stage1_moved"),
    ("stage2", "stage2_prompt"),
    ("stage2_prompt", "stage1"),
    ("stage1", "mlp"),
)


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
    per_query = [read(folder, "per_query.json") for folder in args.folders]
    lines = [f"{'mean of ' + str(len(results)) + ' seeds':42}" + "".join(f"{title:>16}" for title in SHOWN.values())]
    for method, title in METHODS.items():
        values = [[100 * result[method][name] for result in results if name in result[method]] for name in SHOWN]
        lines.append(f"{title:42}" + "".join(f"{np.mean(v):>16.1f}" if v else f"{'':16}" for v in values))
    r1 = {method: np.mean([result[method]["cirr_recall_at_1"] for result in results]) for method in METHODS}
    best = max(("image", "text", "sum", "slerp"), key=r1.__getitem__)
    closed = (r1["stage2"] - r1[best]) / (r1["oracle"] - r1[best])
    lines += ["", f"R@1: stage II closes {closed:.0%} of the distance from {best} to the caption oracle"]
    for method, other in (("stage2", "stage1"), ("stage2", "stage1_moved"), ("stage2_prompt", "stage1")):
        lines.append(f"R@1: {METHODS[method]} is {r1[method] / r1[other]:.2f} times {METHODS[other]}")
    for method, other in DIFFERENCES:
        for name, title in SHOWN.items():
            difference = np.mean(
                [np.array(seed[name][method]) - np.array(seed[name][other]) for seed in per_query], axis=0
            )
            mean, error = mean_and_standard_error(difference, np.array(per_query[0][name]["clusters"]))
            lines.append(f"{title}: {method} - {other} = {100 * mean:+.1f} ± {100 * error:.2f} points, paired")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
