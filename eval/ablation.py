"""A grid of trainings on the miniature, and which of the method's claims it bears out.

    python eval/ablation.py --config eval/ablation/components.yaml --output_dir runs/ablation

Trains every run of the grid with every seed, each seed on training data of its own, ranks the further worlds of val
and test with each, and writes to --results_dir every query's value by run and seed, table.parquet and .csv,
claims.json and report.md. What either folder holds already is not done again: an interrupted grid goes on, also on
another machine from its results alone, and seeds can be added. Runs share data, features, galleries and stage I.
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
from ablation_data import ROOT, Mixture, make_data, of_seed, triplets_of
from comparisons import Effect, compared, holm, resampled_means, verdict
from harness import compose, embed_pictures, rank

from miniature.compare import (  # noqa: E402  (ablation_data puts its folder on the path)
    BENCHMARKS,
    CLIP,
    SHOWN,
    clusters_of,
    query_values,
    read_benchmark,
)
from miniature.worlds import FURTHER  # noqa: E402
from modeling_tscir import TSCIRModel, TSCIRProcessor


PRIMARY = ("cirr_recall_at_1", "fashioniq_recall_at_10", "circo_map_at_5")


@dataclass
class Grid:
    """What a YAML file says: seeds, forms of stage I, runs, and claims about pairs of runs.

    Forms and runs are arguments of train/stage1.py and stage2.py; a form may name another `script`.
    """

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
            if set(run) - {"stage1", "stage2", "triplets"} or run.get("stage1") not in grid.stage1:
                raise ValueError(
                    f"{path}, run {name!r}: needs stage1, one of {list(grid.stage1)}, and at most stage2 and triplets"
                )
            try:
                mixture_of(run)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, run {name!r}: {error}") from error
        for claim, pair in grid.claims.items():
            if len(pair) != 2 or not set(pair) <= set(grid.runs):
                raise ValueError(f"{path}, claim {claim!r}: {pair} are not two of the runs {list(grid.runs)}")
        return grid


def mixture_of(run: dict) -> Mixture | None:
    """The triplets of a run; None for the recipe's own."""
    return Mixture(**run["triplets"]) if "triplets" in run else None


def slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name).lower().split())


class Runner:
    """Trains and evaluates, two things at a time, what neither folder holds yet.

    Args:
        output: holds worlds/, training data by seed, cache/, and a folder a training.
        results: receives a file of query values by run and seed.
        flags: further arguments of every training, such as few steps.
    """

    def __init__(self, output: Path, results: Path, jobs: int, flags: list[str]):
        self.output, self.results, self.flags = output, results, flags
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

    def train(self, stage: int, start: Path, data: Path, folder: Path, seed: int, choices: dict) -> None:
        if (folder / "training_arguments.json").is_file():  # written last
            return
        choices = dict(choices)
        command = [sys.executable, choices.pop("script", f"train/stage{stage}.py")]
        command += ["--config", f"train/recipes/miniature_stage{stage}.yaml", "--seed", seed]
        command += ["--model_name_or_path", start, "--dataset_name", data, "--output_dir", folder]
        command += ["--feature_cache_dir", self.output / "cache", *self.flags]
        command += [str(part) for name, value in choices.items() for part in (f"--{name}", value)]
        if list(folder.glob("checkpoint-*")):
            command += ["--resume_from_checkpoint", "latest"]
        self._call(command, folder.with_suffix(".log"))

    def evaluate(self, model: Path, result: Path) -> None:
        command = [sys.executable, __file__, "--evaluate", model, result, "--output_dir", self.output]
        self._call(command, model.with_suffix(".evaluation.log"))

    def _call(self, command: list, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w", encoding="utf-8") as file:
            done = subprocess.run([str(part) for part in command], cwd=ROOT, env=self.env, stderr=file, stdout=file)
        if done.returncode:
            last = log.read_text(encoding="utf-8")[-2000:]
            raise RuntimeError(f"{' '.join(map(str, command))} failed; see {log}\n{last}")

    def result(self, name: str, seed: int) -> Path:
        """The file of a run's query values."""
        return self.results / "queries" / f"{slug(name)}-{seed}.parquet"

    def run(self, name: str, run: dict, grid: Grid, seed: int) -> Future:
        """Is done when a run's query values are there."""
        result = self.result(name, seed)
        if result.is_file():
            return self.once(result, lambda: None)
        form = run["stage1"]
        first = self.output / "stage1" / f"{slug(form)}-{seed}"
        captions = of_seed(self.output, seed) / "captions"
        trained = self.once(first, lambda: self.train(1, CLIP, captions, first, seed, grid.stage1[form]))
        triplets = triplets_of(self.output, seed, mixture_of(run))
        second = self.output / "stage2" / f"{slug(name)}-{seed}"

        def work() -> None:
            trained.result()
            if "stage2" in run:
                self.train(2, first, triplets, second, seed, run["stage2"] or {})
            self.evaluate(second if "stage2" in run else first, result)

        return self.once(result, work)


def splits_of_worlds(output: Path):
    """Of val's and test's benchmarks in each of their worlds: val or test, world, benchmark, arguments and splits."""
    for split, worlds in FURTHER.items():
        for world in worlds:
            for folder, benchmark in BENCHMARKS.items():
                if (output / "worlds" / world / folder).is_dir():
                    yield split, world, benchmark, *read_benchmark(folder, output / "worlds" / world, output, None)


def embed_worlds(output: Path, results: Path) -> None:
    """Every picture's embedding, into the cache; and to RESULTS/queries.parquet which queries there are."""
    clip = TSCIRModel.from_clip_pretrained(CLIP), TSCIRProcessor.from_clip_pretrained(CLIP)
    frames = []
    for split, world, benchmark, args, splits in splits_of_worlds(output):
        for part in splits.values():
            embed_pictures(*clip, part, args)
        clusters = [f"{world} {cluster}" for cluster in clusters_of(splits)]
        frames.append(pd.DataFrame({"split": split, "benchmark": benchmark.name, "cluster": clusters}))
    write_table(pd.concat(frames, ignore_index=True), results / "queries.parquet")


def evaluate(model: Path, result: Path, output: Path) -> None:
    """Write every query's value of every metric, in the order of queries.parquet."""
    clip = TSCIRModel.from_clip_pretrained(CLIP), TSCIRProcessor.from_clip_pretrained(CLIP)
    trained = TSCIRModel.from_pretrained(model), TSCIRProcessor.from_pretrained(model)
    frames = []
    for split, _, benchmark, args, splits in splits_of_worlds(output):
        ranked = {}
        for category, part in splits.items():
            pictures = embed_pictures(*clip, part, args)
            ranked[category] = rank(part, compose("tscir", *trained, part, pictures), pictures)
        for metric, values in query_values(benchmark, splits, ranked).items():
            frames.append(pd.DataFrame({"split": split, "metric": metric, "value": values.astype(np.float32)}))
    write_table(pd.concat(frames, ignore_index=True), result)


def write_table(table: pd.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    table.to_parquet(part, compression="zstd")
    os.replace(part, path)


def collect(files: dict[tuple[str, int], Path], queries: Path, split: str) -> pd.DataFrame:
    """One row a run, seed, metric and query."""
    known = pd.read_parquet(queries)
    known = known[known["split"] == split]
    clusters = {name: rows["cluster"].to_numpy() for name, rows in known.groupby("benchmark")}
    frames = []
    for (run, seed), file in files.items():
        table = pd.read_parquet(file)
        for metric, rows in table[table["split"] == split].groupby("metric", sort=False):
            columns = {"run": run, "seed": seed, "metric": metric, "query": range(len(rows))}
            columns |= {"value": rows["value"].to_numpy(), "cluster": clusters[str(metric).partition("_")[0]]}
            frames.append(pd.DataFrame(columns))
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


def report(table: pd.DataFrame, grid: Grid, claims: list[dict], details: list[dict], title: str, output: Path) -> str:
    """Markdown, with a picture of the effects beside it."""
    seeds = sorted(table["seed"].unique())
    counts = {m: int((table["metric"] == m).sum() / len(seeds) / table["run"].nunique()) for m in PRIMARY}
    lines = [
        f"# The miniature's {title}\n",
        f"Seeds {', '.join(map(str, seeds))}; queries: "
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
    parser.add_argument("--output_dir", type=Path, required=True, help="data, features and trained models")
    parser.add_argument("--results_dir", type=Path, help="values, tables and report; OUTPUT_DIR/results unless told")
    parser.add_argument("--world", default="val", choices=["val", "test"], help="choose on val, read test once")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the configuration's")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1), help="trainings at a time")
    parser.add_argument("--max_steps", type=int, help="few, to see that everything works")
    parser.add_argument("--evaluate", type=Path, nargs=2, help=argparse.SUPPRESS)  # one model, in its own process
    args = parser.parse_args()
    args.output_dir = args.output_dir.resolve()
    if args.evaluate is not None:
        evaluate(*args.evaluate, args.output_dir)
        return
    results = (args.results_dir or args.output_dir / "results").resolve()
    grid = Grid.read(args.config)
    seeds = args.seeds or grid.seeds
    flags = [] if args.max_steps is None else ["--max_steps", str(args.max_steps)]
    runner = Runner(args.output_dir, results, args.jobs, flags)
    files = {(name, seed): runner.result(name, seed) for seed in seeds for name in grid.runs}
    if not all(file.is_file() for file in files.values()):
        mixtures = {mixture_of(run) for run in grid.runs.values()} - {None}
        make_data(args.output_dir, seeds, mixtures)
        embed_worlds(args.output_dir, results)
    # Seed by seed, so that an interrupted grid has whole seeds.
    work = {(name, seed): runner.run(name, grid.runs[name], grid, seed) for name, seed in files}
    for number, ((name, seed), done) in enumerate(work.items(), start=1):
        done.result()
        print(f"{number} of {len(work)}: {name}, seed {seed}", flush=True)
    table = collect(files, results / "queries.parquet", args.world)
    tidy, claims, details = summarise(table, grid)
    tidy.to_parquet(results / "table.parquet")
    tidy.to_csv(results / "table.csv", index=False)
    (results / "claims.json").write_text(json.dumps(claims, indent=2), encoding="utf-8")
    text = report(table, grid, claims, details, f"{args.config.stem}, {args.world} worlds", results)
    (results / "report.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
