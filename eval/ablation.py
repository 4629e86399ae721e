"""A grid of trainings on the miniature, and which of the method's claims it bears out.

    python eval/ablation.py --config eval/ablation/components.yaml --output_dir runs/ablation

Trains every run of the grid with every seed, each seed on training data of its own, ranks the further worlds of val
and test with each, and writes to --results_dir every query's value by run and seed, and to val/ or test/ in it
table.parquet and .csv, claims.json and report.md. What either folder holds already is not done again: an interrupted
grid goes on, also on another machine from its results alone, and seeds can be added. Runs share data, features,
galleries and stage I. Verdicts on test, and on val, of all grids that lie side by side are gathered beside them, in
claims.json and claims.md.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml
from ablation_data import NOVELTIES, ROOT, Mixture, clip_folder, make_data, of_seed, settle_clip, triplets_of
from ablation_measures import FORGETTING, READOUT, RETRIEVAL
from ablation_report import collect, report, summarise
from ablation_tasks import TASKS

from miniature.worlds import ALL_FURTHER, FURTHER
from modeling_tscir import TSCIRConfig
from modeling_tscir.processing_tscir import IMAGE_TEMPLATE, PROMPT_TEMPLATE


MEASURES = {"retrieval": RETRIEVAL, "readout": READOUT, "forgetting": FORGETTING, "tasks": TASKS}
DEFAULTS = TSCIRConfig().to_dict() | {"image_template": IMAGE_TEMPLATE, "prompt_template": PROMPT_TEMPLATE}
# On the plain CLIP, instead of the two stages, and what each may be given.
METHODS = {
    "image": set(),
    "sum": {"weight"},
    "slerp": {"weight"},
    "combiner": {"epochs", "learning_rate", "stop_after", "triplets"},
}
# How a trained model's queries are made, where it is not as its configuration says, and in which precision.
QUERIES = ("residual", "weight", "dtype")


@dataclass
class Grid:
    """What a YAML file says: seeds, forms of stage I, runs, and claims about pairs of runs.

    Forms and runs are arguments of train/stage1.py and stage2.py; a form may name another `script`, and a run may be
    evaluated with a `residual` and a `weight` of its queries, in a `dtype`. What all runs have unless they say
    otherwise is given once: `stage2`, arguments, and `queries`, of these three. A claim names two runs, the better one
    first, and may add one of NOVELTIES: it is then of R@1 on those of CIRR's queries alone; or one of the measure's
    metrics, of which it is then alone. `measure`, one of MEASURES, is what runs are compared by, in the further
    `worlds` of these of ALL_FURTHER, of which no training shows a scene.
    """

    seeds: list[int]
    stage1: dict[str, dict]
    runs: dict[str, dict]
    claims: dict[str, list[str]]
    measure: str = "retrieval"
    worlds: list[str] = field(default_factory=lambda: list(FURTHER))
    stage2: dict = field(default_factory=dict)
    queries: dict = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Grid":
        """Raises `ValueError` for keys that are unknown or missing, and for runs and stages that are not there."""
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        content = content if isinstance(content, dict) else {}
        if set(content) - {"measure", "worlds", "stage2", "queries"} != {"seeds", "stage1", "runs", "claims"}:
            raise ValueError(
                f"{path} needs seeds, stage1, runs and claims, and may have measure, worlds, stage2 and queries; "
                f"it has {', '.join(map(str, content)) or 'none of them'}"
            )
        for what in ("stage1", "runs"):
            for name, given in [(None, content[what]), *dict(content[what] or {}).items()]:
                if not isinstance(given, dict):
                    where = what if name is None else f"{what}, {name!r}"
                    raise ValueError(f"{path}, {where}: names with what each has, {{}} for nothing, not {given!r}")
        if content.get("measure", "retrieval") not in MEASURES:
            raise ValueError(f"{path}: measure is one of {', '.join(MEASURES)}, not {content['measure']!r}")
        worlds = content.get("worlds", list(FURTHER))
        if not isinstance(worlds, list) or not worlds or not set(worlds) <= set(ALL_FURTHER):
            raise ValueError(f"{path}: worlds is a list of {', '.join(ALL_FURTHER)}, not {worlds!r}")
        if set(worlds) != set(FURTHER) and content.get("measure", "retrieval") != "retrieval":
            raise ValueError(f"{path}: worlds other than {', '.join(FURTHER)} are for measure retrieval alone")
        grid = cls(**content)
        for what in ("stage1", "runs"):
            names = getattr(grid, what)
            if same := [name for name, count in Counter(map(slug, names)).items() if count > 1]:
                several = [name for name in names if slug(name) == same[0]]
                raise ValueError(f"{path}, {what}: {several} would share their files, {same[0]}; rename one")
        grid.stage1 = {name: numbers(choices) for name, choices in grid.stage1.items()}
        grid.stage2 = numbers(grid.stage2)
        for run in grid.runs.values():
            if "stage2" in run:
                run["stage2"] = numbers(run["stage2"] or {})
        check_queries(f"{path}, queries", grid.queries, grid.measure)
        for name, run in grid.runs.items():
            if "method" in run:
                allowed = {name: METHODS[name] for name in MEASURES[grid.measure].methods}
                if run["method"] not in allowed or set(run) - allowed[run["method"]] - {"method"}:
                    raise ValueError(f"{path}, run {name!r}: methods and what they may have are {allowed}")
            elif set(run) - {"stage1", "stage2", "triplets", *QUERIES} or run.get("stage1") not in grid.stage1:
                raise ValueError(
                    f"{path}, run {name!r}: needs stage1, one of {list(grid.stage1)}, and at most stage2, triplets, "
                    + ", ".join(QUERIES)
                )
            else:
                check_queries(f"{path}, run {name!r}", {k: run[k] for k in QUERIES if k in run}, grid.measure)
            try:
                mixture_of(run)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, run {name!r}: {error}") from error
        for claim, pair in grid.claims.items():
            if len(pair) not in (2, 3) or not set(pair[:2]) <= set(grid.runs):
                raise ValueError(f"{path}, claim {claim!r}: {pair} are not two of the runs {list(grid.runs)}")
            known = (*(NOVELTIES if grid.measure == "retrieval" else ()), *MEASURES[grid.measure].shown)
            if not set(pair[2:]) <= set(known):
                raise ValueError(f"{path}, claim {claim!r}: {pair[2]!r} is none of {known}")
        return grid

    def definition(self, name: str) -> dict:
        """All that a run's results depend on, but its seed and this package's defaults."""
        run = self.runs[name]
        compared = {"measure": self.measure}
        if set(self.worlds) != set(FURTHER):
            compared["worlds"] = self.worlds
        if "method" in run:
            return compared | run
        own = run | {"stage1": self.stage1[run["stage1"]]} | compared
        own |= {key: value for key, value in self.queries.items() if key not in run}
        return own | ({"stage2": self.stage2 | run["stage2"]} if "stage2" in run else {})

    def trained_as(self, run: dict) -> str:
        """The first run with the same training, whatever it is evaluated with."""

        def training(one: dict) -> dict:
            return {k: v for k, v in one.items() if k not in QUERIES}

        return next(name for name, other in self.runs.items() if training(other) == training(run))

    def only(self, runs: list[str]) -> "Grid":
        """The grid of these runs, and of the claims about them. Raises `ValueError` for runs that it does not have."""
        if not set(runs) <= set(self.runs):
            raise ValueError(f"runs of this grid are {list(self.runs)}, not {sorted(set(runs) - set(self.runs))}")
        claims = {claim: pair for claim, pair in self.claims.items() if set(pair[:2]) <= set(runs)}
        return replace(self, runs={name: run for name, run in self.runs.items() if name in runs}, claims=claims)


def numbers(choices: dict) -> dict:
    """Arguments of a training, in which YAML takes 1e-4 for a text."""

    def number(value):
        with contextlib.suppress(ValueError):
            return float(value) if isinstance(value, str) else value
        return value

    return {name: number(value) for name, value in choices.items()}


def check_queries(where: str, told: dict, measure: str) -> None:
    """Raise `ValueError` for what cannot be told of a run's queries."""
    if set(told) - set(QUERIES):
        raise ValueError(f"{where}: known are {', '.join(QUERIES)}, not {', '.join(set(told) - set(QUERIES))}")
    for name, value in told.items():
        if measure != "retrieval":
            raise ValueError(f"{where}: {name} is for measure retrieval, not {measure}")
        if name == "dtype" and value not in ("float32", "bfloat16"):
            raise ValueError(f"{where}: dtype is float32 or bfloat16, not {value!r}")
        if name != "dtype" and not isinstance(value, (int, float)):
            raise ValueError(f"{where}: {name} is a number, not {value!r}")


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
        flags: further arguments of every training, such as few steps; these lie in short/, apart from whole ones.
    """

    def __init__(self, output: Path, results: Path, jobs: int, flags: list[str]):
        self.output, self.results, self.flags = output, results, flags
        self.trained = output / "short" if flags else output
        self.pool = ThreadPoolExecutor(jobs)
        self.env = os.environ | {
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        self.stages: dict[Path, Future] = {}
        self.locks: dict[Path, threading.Lock] = {}

    def once(self, folder: Path, work: Callable[[], None]) -> Future:
        """Work that makes `folder`, begun at most once."""
        if folder not in self.stages:
            self.stages[folder] = self.pool.submit(work)
        return self.stages[folder]

    def train(
        self, stage: int, start: Path, data: Path, folder: Path, seed: int, choices: dict, inherited: dict
    ) -> None:
        """Unless the folder is there, of the same choices; `inherited` are those of the stage before."""
        choices, record = dict(choices), folder / "training_arguments.json"
        if record.is_file():  # written last
            held = json.loads(record.read_text(encoding="utf-8"))
            untold = {k: v for k, v in (DEFAULTS | inherited).items() if k in DEFAULTS and held.get(k) is not None}
            asked = untold | ({"max_steps": int(self.flags[1])} if self.flags else {}) | choices
            other = {k: held.get(k) for k, v in asked.items() if k != "script" and held.get(k) != v}
            if other:
                right = {k: asked[k] for k in other}
                raise ValueError(f"{folder} was trained with {other}, not {right}; remove it, or rename the run")
            return
        command = [sys.executable, choices.pop("script", f"train/stage{stage}.py")]
        command += ["--config", f"train/recipes/miniature_stage{stage}.yaml", "--seed", seed]
        command += ["--model_name_or_path", start, "--dataset_name", data, "--output_dir", folder]
        command += ["--feature_cache_dir", self.output / "cache", *self.flags]
        for name, value in choices.items():
            command += [f"--{name}", *(value if isinstance(value, list) else [value])]
        if list(folder.glob("checkpoint-*")):
            command += ["--resume_from_checkpoint", "latest"]
        self._call(command, folder.with_suffix(".log"))

    def evaluate(self, run: dict, result: Path, measure: str) -> None:
        command = [sys.executable, __file__, "--evaluate", measure, json.dumps(run), result]
        self._call([*command, "--output_dir", self.output], self.output / "evaluation" / f"{result.stem}.log")

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

    def settle(self, grid: Grid) -> None:
        """Keep what each run is beside its results. Raises `ValueError` for results of another run of that name."""
        path = self.results / "runs.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for name in grid.runs:
            own = json.loads(json.dumps(grid.definition(name)))
            if known.setdefault(name, own) != own:
                raise ValueError(
                    f"{self.results} has results of a run {name!r} that was {known[name]}, and is {own} now; name "
                    "another --results_dir, or rename the run"
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")

    def run(self, name: str, run: dict, grid: Grid, seed: int) -> Future:
        """Is done when a run's query values are there."""
        result = self.result(name, seed)
        if result.is_file():
            return self.once(result, lambda: None)
        triplets = triplets_of(self.output, seed, mixture_of(run))
        if "method" in run:
            given = run | {"triplets": str(triplets), "seed": seed}
            return self.once(result, lambda: self.evaluate(given, result, grid.measure))
        form = run["stage1"]
        first = self.trained / "stage1" / f"{slug(form)}-{seed}"
        captions, clip = of_seed(self.output, seed) / "captions", clip_folder(self.output)
        trained = self.once(first, lambda: self.train(1, clip, captions, first, seed, grid.stage1[form], {}))
        owner = grid.trained_as(run)
        second = self.trained / "stage2" / f"{slug(owner)}-{seed}"
        # A run that shares another's training waits until that one is done.
        before = trained if owner == name else self.run(owner, grid.runs[owner], grid, seed)

        # Its owner may have its result and no folder any more: those who share it then train it one after the other.
        alone = self.locks.setdefault(second, threading.Lock())

        def work() -> None:
            trained.result(), before.result()
            if "stage2" in run:
                choices = grid.stage2 | (run["stage2"] or {})
                with alone:
                    self.train(2, first, triplets, second, seed, choices, grid.stage1[form])
            told = grid.queries | {k: run[k] for k in QUERIES if k in run}
            self.evaluate(told | {"model": str(second if "stage2" in run else first)}, result, grid.measure)

        return self.once(result, work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "eval/ablation/components.yaml")
    parser.add_argument("--output_dir", type=Path, required=True, help="data, features and trained models")
    parser.add_argument(
        "--results_dir", type=Path, help="values, tables, report; OUTPUT_DIR/results/CONFIG unless told"
    )
    parser.add_argument("--clip", type=Path, help="another stand-in CLIP, for new folders")
    parser.add_argument("--world", default="val", choices=list(ALL_FURTHER), help="choose on val, read test once")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the configuration's")
    parser.add_argument("--runs", nargs="+", help="these of the configuration's alone, and the claims about them")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1), help="trainings at a time")
    parser.add_argument("--max_steps", type=int, help="few, to see that everything works; kept apart, in short/")
    parser.add_argument("--evaluate", nargs=3, help=argparse.SUPPRESS)  # one model, in its own process
    args = parser.parse_args()
    args.output_dir = args.output_dir.resolve()
    if args.evaluate is not None:
        measure, run, result = args.evaluate
        MEASURES[measure].evaluate(json.loads(run), Path(result), args.output_dir)
        return
    results = (args.results_dir or args.output_dir / "results" / args.config.stem).resolve()
    try:
        whole = Grid.read(args.config)
    except (OSError, ValueError, yaml.YAMLError) as error:
        sys.exit(f"error: {error}")
    if args.world not in whole.worlds:
        sys.exit(f"error: {args.config} has the worlds {', '.join(whole.worlds)}, and no {args.world}")
    grid = whole.only(args.runs or list(whole.runs))
    seeds = args.seeds or grid.seeds
    flags = [] if args.max_steps is None else ["--max_steps", str(args.max_steps)]
    if flags:
        results = results / "short"
    fingerprint = settle_clip(args.output_dir, results, args.clip)
    runner = Runner(args.output_dir, results, args.jobs, flags)
    runner.settle(grid)
    files = {(name, seed): runner.result(name, seed) for seed in seeds for name in grid.runs}
    if not all(file.is_file() for file in files.values()):
        mixtures = {mixture_of(run) for run in grid.runs.values()} - {None}
        make_data(args.output_dir, seeds, mixtures, grid.worlds)
        MEASURES[grid.measure].prepare(args.output_dir, results)
    # Seed by seed, so that an interrupted grid has whole seeds.
    work = {(name, seed): runner.run(name, grid.runs[name], grid, seed) for name, seed in files}
    try:
        for number, ((name, seed), done) in enumerate(work.items(), start=1):
            done.result()
            print(f"{number} of {len(work)}: {name}, seed {seed}", flush=True)
    except BaseException:
        runner.pool.shutdown(wait=False, cancel_futures=True)  # what is begun ends; nothing else begins
        raise
    table = collect(files, results / "queries.parquet", args.world)
    measure = MEASURES[grid.measure]
    tidy, claims, details = summarise(table, grid.claims, measure)
    folder = results / args.world
    folder.mkdir(exist_ok=True)
    tidy.to_parquet(folder / "table.parquet")
    tidy.to_csv(folder / "table.csv", index=False)
    (folder / "claims.json").write_text(json.dumps(claims, indent=2), encoding="utf-8")
    title = f"{args.config.stem}, {args.world} worlds, stand-in CLIP {fingerprint[:8]}"
    if len(grid.runs) < len(whole.runs):
        title += f", {len(grid.runs)} of {len(whole.runs)} runs"
    text = report(table, list(grid.runs), claims, details, measure, title, folder)
    (folder / "report.md").write_text(text, encoding="utf-8")
    print(text)
    if gathered := gather(results.parent):
        (results.parent / "claims.json").write_text(json.dumps(gathered, indent=2) + "\n", encoding="utf-8")
        (results.parent / "claims.md").write_text(table_of(gathered), encoding="utf-8")


def gather(folder: Path) -> list[dict]:
    """What every grid in a folder says of its claims on test or final, and of the same on val; figures are shares."""
    kept = ("verdict", "effect", "ci_low", "ci_high")
    found = []
    for path in sorted([*folder.glob("*/test/claims.json"), *folder.glob("*/final/claims.json")]):
        before = path.parents[1] / "val" / "claims.json"
        known = {}
        if before.is_file():
            known = {claim["claim"]: claim for claim in json.loads(before.read_text(encoding="utf-8"))}
        for claim in json.loads(path.read_text(encoding="utf-8")):
            own = {"grid": path.parents[1].name, "world": path.parent.name, "claim": claim["claim"]}
            own |= {name: claim[name] for name in kept}
            if claim["claim"] in known:
                own["val"] = {name: known[claim["claim"]][name] for name in kept}
            found.append(own)
    return found


def table_of(claims: list[dict]) -> str:
    """Markdown: every gathered claim, percentage points, by the grid whose report tells more."""

    def told(claim: dict | None) -> str:
        if claim is None:
            return " | "
        effect, low, high = (f"{100 * claim[name]:+.1f}" for name in ("effect", "ci_low", "ci_high"))
        return f"{effect} ({low} to {high}) | {claim['verdict']}"

    lines = ["# Every claim on the test worlds or the final ones, and on val", ""]
    lines += ["Percentage points with 95% intervals; verdicts are Holm-corrected within each grid and world.", ""]
    lines += ["| grid | claim | effect | verdict | effect on val | verdict on val |", "|---|---|---|---|---|---|"]
    for claim in claims:
        report_of = f"[{claim['grid']}]({claim['grid']}/{claim['world']}/report.md)"
        lines.append(f"| {report_of} | {claim['claim']} | {told(claim)} | {told(claim.get('val'))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
