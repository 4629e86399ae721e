"""A grid of trainings on the miniature, and which of the method's claims it bears out.

    python eval/ablation.py --config eval/ablation/components.yaml --output_dir runs/ablation

Trains every run of the grid with every seed, ranks the three benchmarks with each, and writes table.parquet and .csv,
claims.json and report.md. Whatever a folder holds already is not done again, so that an interrupted grid goes on, and
seeds can be added. Runs share the world, frozen features, galleries and stage I.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from comparisons import Effect, compared, holm, resampled_means, verdict


ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from miniature.build import build  # noqa: E402
from miniature.compare import (  # noqa: E402
    BENCHMARKS,
    CLIP,
    SHOWN,
    clusters_of,
    embed_galleries,
    query_values,
    read_benchmark,
)


PRIMARY = ("cirr_recall_at_1", "fashioniq_recall_at_10", "circo_map_at_5")


@dataclass
class Grid:
    """What a YAML file says: seeds, forms of stage I, runs, and claims about pairs of runs."""

    seeds: list[int]
    stage1: dict[str, dict]
    runs: dict[str, dict]
    claims: dict[str, list[str]]

    @classmethod
    def read(cls, path: Path) -> "Grid":
        """Raises `ValueError` for keys that are unknown or missing, and for runs and stages that are not there."""
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if set(content) != {"seeds", "stage1", "runs", "claims"}:
            raise ValueError(f"{path} needs seeds, stage1, runs and claims; it has {', '.join(content)}")
        grid = cls(**content)
        for name, run in grid.runs.items():
            if set(run) - {"stage1", "stage2"} or run.get("stage1") not in grid.stage1:
                raise ValueError(f"{path}, run {name!r}: needs stage1, one of {list(grid.stage1)}, and at most stage2")
        for claim, pair in grid.claims.items():
            if len(pair) != 2 or not set(pair) <= set(grid.runs):
                raise ValueError(f"{path}, claim {claim!r}: {pair} are not two of the runs {list(grid.runs)}")
        return grid


def slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name).lower().split())


class Runner:
    """Trains and evaluates, two things at a time, what a folder does not hold yet.

    Args:
        output: holds world/, cache/, and a folder a training.
        flags: further arguments of every training, such as few steps.
    """

    def __init__(self, output: Path, world: str, jobs: int, flags: list[str]):
        self.output, self.world, self.flags = output, world, flags
        self.pool = ThreadPoolExecutor(jobs)
        self.env = os.environ | {
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        self.stages: dict[Path, Future] = {}

    def once(self, folder: Path, work: Callable[[], None]) -> Future:
        """Work that makes `folder`, begun at most once."""
        if folder not in self.stages:
            self.stages[folder] = self.pool.submit(work)
        return self.stages[folder]

    def train(self, stage: int, start: Path, folder: Path, seed: int, choices: dict) -> None:
        if (folder / "training_arguments.json").is_file():  # written last
            return
        data = self.output / "world" / {1: "captions", 2: "triplets"}[stage]
        command = [sys.executable, f"train/stage{stage}.py"]
        command += ["--config", f"train/recipes/miniature_stage{stage}.yaml", "--seed", seed]
        command += ["--model_name_or_path", start, "--dataset_name", data, "--output_dir", folder]
        command += ["--feature_cache_dir", self.output / "cache", *self.flags]
        command += [str(part) for name, value in choices.items() for part in (f"--{name}", value)]
        if list(folder.glob("checkpoint-*")):
            command += ["--resume_from_checkpoint", "latest"]
        self._call(command, folder.with_suffix(".log"))

    def evaluate(self, model: Path) -> None:
        if not (model / f"{self.world}.parquet").is_file():
            command = [sys.executable, __file__, "--evaluate", model, "--output_dir", self.output]
            self._call([*command, "--world", self.world], model.with_suffix(".evaluation.log"))

    def _call(self, command: list, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w", encoding="utf-8") as file:
            done = subprocess.run([str(part) for part in command], cwd=ROOT, env=self.env, stderr=file, stdout=file)
        if done.returncode:
            last = log.read_text(encoding="utf-8")[-2000:]
            raise RuntimeError(f"{' '.join(map(str, command))} failed; see {log}\n{last}")

    def run(self, name: str, run: dict, grid: Grid, seed: int) -> tuple[Path, Future]:
        """The folder of a run's model, and what is done when it has been evaluated."""
        form = run["stage1"]
        first = self.output / "stage1" / f"{slug(form)}-{seed}"
        trained = self.once(first, lambda: self.train(1, CLIP, first, seed, grid.stage1[form]))
        if "stage2" not in run:
            return first, self.once(first / "evaluated", lambda: (trained.result(), self.evaluate(first)))
        second = self.output / "stage2" / f"{slug(name)}-{seed}"

        def work() -> None:
            trained.result()
            self.train(2, first, second, seed, run["stage2"] or {})
            self.evaluate(second)

        return second, self.once(second, work)


def evaluate(model: Path, output: Path, world: str) -> None:
    """Write every query's value of every metric to MODEL/WORLD.parquet."""
    from harness import compose, embed_pictures, rank

    from modeling_tscir import TSCIRModel, TSCIRProcessor

    clip = TSCIRModel.from_clip_pretrained(CLIP), TSCIRProcessor.from_clip_pretrained(CLIP)
    trained = TSCIRModel.from_pretrained(model), TSCIRProcessor.from_pretrained(model)
    frames = []
    for folder, benchmark in BENCHMARKS.items():
        args, splits = read_benchmark(folder, output / "world" / world, output, None)
        ranked = {}
        for category, split in splits.items():
            pictures = embed_pictures(*clip, split, args)
            ranked[category] = rank(split, compose("tscir", *trained, split, pictures), pictures)
        for metric, values in query_values(benchmark, splits, ranked).items():
            frames.append(pd.DataFrame({"metric": metric, "cluster": clusters_of(splits), "value": values}))
    part = model / f"{world}.part"
    pd.concat(frames).to_parquet(part)
    os.replace(part, model / f"{world}.parquet")


def collect(folders: dict[tuple[str, int], Path], world: str) -> pd.DataFrame:
    """One row a run, seed, metric and query."""
    frames = []
    for (run, seed), folder in folders.items():
        frame = pd.read_parquet(folder / f"{world}.parquet")
        frame["query"] = frame.groupby("metric").cumcount()
        frames.append(frame.assign(run=run, seed=seed))
    return pd.concat(frames, ignore_index=True)


def by_seed(table: pd.DataFrame, run: str, metric: str) -> tuple[np.ndarray, list]:
    """A run's values [S, Q] of a metric, and the queries' clusters."""
    rows = table[(table["run"] == run) & (table["metric"] == metric)]
    first = rows[rows["seed"] == rows["seed"].iloc[0]]
    return rows.pivot(index="seed", columns="query", values="value").to_numpy(), first["cluster"].tolist()


def summarise(table: pd.DataFrame, grid: Grid) -> tuple[pd.DataFrame, list[dict], list[dict]]:
    """The tidy table, the verdict on each claim, and each claim's effect on each metric."""
    tidy = table.groupby(["run", "seed", "metric"], sort=False)["value"].agg(["mean", "size"]).reset_index()
    tidy = tidy.rename(columns={"mean": "value", "size": "queries"})
    claims, details = [], []
    for claim, pair in grid.claims.items():
        parts = {}
        for metric in SHOWN:
            (better, clusters), (other, _) = (by_seed(table, run, metric) for run in pair)
            parts[metric] = (better - other, clusters)
            details.append({"claim": claim, "metric": metric, **compared([parts[metric]])._asdict()})
        effect = compared([parts[metric] for metric in PRIMARY])
        claims.append({"claim": claim, "runs": pair, **effect._asdict()})
    for claim, p in zip(claims, holm([claim["p_value"] for claim in claims]), strict=True):
        numbers = Effect(**{name: claim[name] for name in Effect._fields})
        claim["p_value_holm"] = p
        claim["verdict"] = verdict(numbers, p)
    return tidy, claims, details


def report(table: pd.DataFrame, grid: Grid, claims: list[dict], details: list[dict], world: str, output: Path) -> str:
    """Markdown, with a picture of the effects beside it."""
    seeds = sorted(table["seed"].unique())
    counts = {m: int((table["metric"] == m).sum() / len(seeds) / table["run"].nunique()) for m in PRIMARY}
    lines = [
        f"# {output.name}: what each part does\n",
        f"Miniature, {world} world, seeds {', '.join(map(str, seeds))}; queries: "
        + ", ".join(f"{n:,} ({SHOWN[m]})" for m, n in counts.items())
        + ". Percent, mean over seeds, and 95% intervals of a bootstrap over seeds and references.\n",
        "| run | " + " | ".join(SHOWN.values()) + " |",
        "|" + "---|" * (len(SHOWN) + 1),
    ]
    rng = np.random.default_rng(0)
    for run in grid.runs:
        cells = []
        for metric in SHOWN:
            values, clusters = by_seed(table, run, metric)
            low, high = np.quantile(resampled_means(values, clusters, rng, 2000), [0.025, 0.975])
            cells.append(f"{100 * values.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})")
        lines.append(f"| {run} | " + " | ".join(cells) + " |")
    lines += [
        "\nEach claim compares two runs on the mean of "
        + ", ".join(SHOWN[m] for m in PRIMARY)
        + "; p-values are corrected for the number of claims (Holm).\n",
        "| claim | effect, points | 95% interval | p | verdict |",
        "|---|---|---|---|---|",
    ]
    for c in claims:
        interval = f"{100 * c['ci_low']:+.1f} to {100 * c['ci_high']:+.1f}"
        lines.append(
            f"| {c['claim']} | {100 * c['effect']:+.1f} | {interval} | {c['p_value_holm']:.2g} | {c['verdict']} |"
        )
    lines.append("\n![Effect of each part on each metric, with 95% intervals](effects.png)\n")
    draw(claims, details, output / "effects.png")
    return "\n".join(lines)


def draw(claims: list[dict], details: list[dict], path: Path) -> None:
    """A panel a metric: each claim's effect with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(SHOWN), figsize=(16, 1 + 0.45 * len(claims)), sharey=True)
    names = [claim["claim"] for claim in claims]
    for axis, (metric, title) in zip(axes, SHOWN.items(), strict=True):
        rows = {d["claim"]: d for d in details if d["metric"] == metric}
        middle = np.array([100 * rows[name]["effect"] for name in names])
        low, high = (np.array([100 * rows[name][side] for name in names]) for side in ("ci_low", "ci_high"))
        axis.errorbar(middle, range(len(names)), xerr=[middle - low, high - middle], fmt="o", color="black", capsize=3)
        axis.axvline(0, color="grey", linewidth=1)
        axis.set_title(f"{title}, points", fontsize=9)
    axes[0].set_yticks(range(len(names)), names, fontsize=9)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "eval/ablation/components.yaml")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--world", default="val", choices=["val", "test"], help="choose on val, read test once")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the configuration's")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1), help="trainings at a time")
    parser.add_argument("--max_steps", type=int, help="few, to see that everything works")
    parser.add_argument("--evaluate", type=Path, help=argparse.SUPPRESS)  # one model, in a process of its own
    args = parser.parse_args()
    if args.evaluate is not None:
        evaluate(args.evaluate, args.output_dir, args.world)
        return
    args.output_dir = args.output_dir.resolve()
    grid = Grid.read(args.config)
    seeds = args.seeds or grid.seeds
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if not (args.output_dir / "world" / "README.md").is_file():
        build(args.output_dir / "world")
    embed_galleries(args.output_dir, args.output_dir / "world")
    flags = [] if args.max_steps is None else ["--max_steps", str(args.max_steps)]
    runner = Runner(args.output_dir, args.world, args.jobs, flags)
    work = {
        (name, seed): runner.run(name, run, grid, seed) for seed in seeds for name, run in grid.runs.items()
    }  # seed by seed, so that an interrupted grid has whole seeds
    for number, ((name, seed), (_, done)) in enumerate(work.items(), start=1):
        done.result()
        print(f"{number} of {len(work)}: {name}, seed {seed}", flush=True)
    table = collect({key: folder for key, (folder, _) in work.items()}, args.world)
    tidy, claims, details = summarise(table, grid)
    tidy.to_parquet(args.output_dir / "table.parquet")
    tidy.to_csv(args.output_dir / "table.csv", index=False)
    (args.output_dir / "claims.json").write_text(json.dumps(claims, indent=2), encoding="utf-8")
    text = report(table, grid, claims, details, args.world, args.output_dir)
    (args.output_dir / "report.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
