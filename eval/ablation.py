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
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import yaml
from ablation_data import ROOT, clip_folder, make_data, of_seed, settle_clip, triplets_of
from ablation_grid import MEASURES, QUERIES, Grid, mixture_of, slug
from ablation_report import collect, report, summarise

from miniature.worlds import ALL_FURTHER
from modeling_tscir import TSCIRConfig
from modeling_tscir.processing_tscir import IMAGE_TEMPLATE, PROMPT_TEMPLATE


DEFAULTS = TSCIRConfig().to_dict() | {"image_template": IMAGE_TEMPLATE, "prompt_template": PROMPT_TEMPLATE}


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
        """Unless the folder is there, of the same choices; `inherited` are those of the stage before.

        What was asked for is kept beside the folder, whose own record does not tell it from defaults.

        Raises:
            ValueError: for a folder that was trained, or begun, by another grid's run of the name.
        """
        choices, record = dict(choices), folder / "training_arguments.json"
        begun = bool(list(folder.glob("checkpoint-*")))
        told = folder.with_suffix(".json")
        own = {"start": os.path.relpath(start, self.output), "data": os.path.relpath(data, self.output)}
        own = json.loads(json.dumps(own | {"flags": self.flags, "before": inherited} | choices))
        if (begun or record.is_file()) and told.is_file():
            before = json.loads(told.read_text(encoding="utf-8"))
            self.refuse_others(folder, {k: (before.get(k), own.get(k)) for k in before | own})
        if record.is_file():  # written last
            held = json.loads(record.read_text(encoding="utf-8"))
            untold = {k: v for k, v in (DEFAULTS | inherited).items() if k in DEFAULTS and held.get(k) is not None}
            asked = untold | ({"max_steps": int(self.flags[1])} if self.flags else {}) | choices
            self.refuse_others(folder, {k: (held.get(k), v) for k, v in asked.items() if k != "script"})
            return
        told.parent.mkdir(parents=True, exist_ok=True)
        told.write_text(json.dumps(own), encoding="utf-8")
        command = [sys.executable, choices.pop("script", f"train/stage{stage}.py")]
        command += ["--config", f"train/recipes/miniature_stage{stage}.yaml", "--seed", seed]
        command += ["--model_name_or_path", start, "--dataset_name", data, "--output_dir", folder]
        command += ["--feature_cache_dir", self.output / "cache", *self.flags]
        for name, value in choices.items():
            command += [f"--{name}", *(value if isinstance(value, list) else [value])]
        if begun:
            command += ["--resume_from_checkpoint", "latest"]
        self._call(command, folder.with_suffix(".log"))

    @staticmethod
    def refuse_others(folder: Path, pairs: dict[str, tuple]) -> None:
        """Raise `ValueError` where the first of a pair, what a folder was trained with, is not what is asked for."""
        other = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        if other:
            held, right = ({name: pair[i] for name, pair in other.items()} for i in (0, 1))
            raise ValueError(f"{folder} was trained with {held}, not {right}; remove it, or rename the run")

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

    def first_stage(self, form: str, grid: Grid, seed: int) -> tuple[Path, Future]:
        """The folder of a form of stage I, and what is done when it is there."""
        folder = self.trained / "stage1" / f"{slug(form)}-{seed}"
        captions, clip = of_seed(self.output, seed) / "captions", clip_folder(self.output)
        return folder, self.once(folder, lambda: self.train(1, clip, captions, folder, seed, grid.stage1[form], {}))

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
        first, trained = self.first_stage(form, grid, seed)
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
    flags = [] if args.max_steps is None else ["--max_steps", str(args.max_steps)]
    if flags:
        results = results / "short"
    try:
        whole = Grid.read(args.config)
        if args.world not in whole.worlds:
            raise ValueError(f"{args.config} has the worlds {', '.join(whole.worlds)}, and no {args.world}")
        grid = whole.only(args.runs or list(whole.runs))
        seeds = args.seeds or grid.seeds
        fingerprint = settle_clip(args.output_dir, results, args.clip)
        runner = Runner(args.output_dir, results, args.jobs, flags)
        runner.settle(grid)
        files = {(name, seed): runner.result(name, seed) for seed in seeds for name in grid.runs}
        if not all(file.is_file() for file in files.values()):
            mixtures = {mixture_of(run) for run in grid.runs.values()} - {None}
            make_data(args.output_dir, seeds, mixtures, grid.worlds)
            MEASURES[grid.measure].prepare(args.output_dir, results)
    except (OSError, ValueError, yaml.YAMLError) as error:
        sys.exit(f"error: {error}")
    # Seed by seed, so that an interrupted grid has whole seeds, and each one's forms of stage I before the runs, which
    # would wait for them side by side.
    work = {}
    for seed in seeds:
        missing = [run for name, run in grid.runs.items() if not files[name, seed].is_file()]
        for form in dict.fromkeys(run["stage1"] for run in missing if "stage1" in run):
            runner.first_stage(form, grid, seed)
        work |= {(name, seed): runner.run(name, grid.runs[name], grid, seed) for name in grid.runs}
    try:
        for number, ((name, seed), done) in enumerate(work.items(), start=1):
            done.result()
            print(f"{number} of {len(work)}: {name}, seed {seed}", flush=True)
    except BaseException:
        runner.pool.shutdown(wait=False, cancel_futures=True)  # what is begun ends; nothing else begins
        raise
    table = collect(files, results / "queries.parquet", args.world)
    measure = MEASURES[grid.measure]
    tidy, claims, details = summarise(table, grid.claims, measure, len(whole.claims))
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
    """What every grid in a folder says of its claims, and of the same on val; figures are shares."""
    kept = ("verdict", "effect", "ci_low", "ci_high")
    found = []
    for path in sorted(
        path for world in ALL_FURTHER if world != "val" for path in folder.glob(f"*/{world}/claims.json")
    ):
        before = path.parents[1] / "val" / "claims.json"
        known = {}
        if before.is_file():
            known = {claim["claim"]: claim for claim in json.loads(before.read_text(encoding="utf-8"))}
        for claim in json.loads(path.read_text(encoding="utf-8")):
            own = {"grid": path.parents[1].name, "world": path.parent.name, "claim": claim["claim"]}
            own |= {name: claim[name] for name in kept}
            on_val = known.get(claim["claim"])
            if on_val is not None and on_val["runs"] == claim["runs"]:  # else another that had the name before
                own["val"] = {name: on_val[name] for name in kept}
            found.append(own)
    return found


def table_of(claims: list[dict]) -> str:
    """Markdown: every gathered claim, percentage points, by the grid whose report tells more."""

    def told(claim: dict | None) -> str:
        if claim is None:
            return " | "
        effect, low, high = (f"{100 * claim[name]:+.1f}" for name in ("effect", "ci_low", "ci_high"))
        return f"{effect} ({low} to {high}) | {claim['verdict']}"

    lines = ["# Every claim on the test, final or last worlds, and on val", ""]
    lines += ["Percentage points with 95% intervals; verdicts are Holm-corrected within each grid and world.", ""]
    lines += ["| grid | claim | effect | verdict | effect on val | verdict on val |", "|---|---|---|---|---|---|"]
    for claim in claims:
        report_of = f"[{claim['grid']}]({claim['grid']}/{claim['world']}/report.md)"
        lines.append(f"| {report_of} | {claim['claim']} | {told(claim)} | {told(claim.get('val'))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
