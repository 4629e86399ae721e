"""What a grid's YAML file says: seeds, forms of stage I, runs, and claims about them."""

import contextlib
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml
from ablation_data import NOVELTIES, Mixture
from ablation_measures import FORGETTING, READOUT, RETRIEVAL
from ablation_tasks import TASKS

from miniature.worlds import ALL_FURTHER, FURTHER


MEASURES = {"retrieval": RETRIEVAL, "readout": READOUT, "forgetting": FORGETTING, "tasks": TASKS}
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
        for what in ("claims", "stage2", "queries"):
            if not isinstance(content.get(what, {}), dict):
                raise ValueError(f"{path}, {what}: names with what each has, {{}} for nothing, not {content[what]!r}")
        seeds = content["seeds"]
        if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
            raise ValueError(f"{path}: seeds is a list of whole numbers, not {seeds!r}")
        for what in ("stage1", "runs"):
            for name, given in [(None, content[what]), *dict(content[what] or {}).items()]:
                if not isinstance(given, dict):
                    where = what if name is None else f"{what}, {name!r}"
                    raise ValueError(f"{path}, {where}: names with what each has, {{}} for nothing, not {given!r}")
        for what in ("stage1", "runs", "claims"):
            if others := [name for name in content[what] if not isinstance(name, str)]:  # as 1000, or no
                raise ValueError(f"{path}, {what}: names are texts, not {others}; put them in quotes")
        if str(content.get("measure", "retrieval")) not in MEASURES:
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
            elif set(run) - {"stage1", "stage2", "triplets", *QUERIES} or run.get("stage1") not in list(grid.stage1):
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
            names = list(grid.runs)
            if not isinstance(pair, list) or len(pair) not in (2, 3) or any(name not in names for name in pair[:2]):
                raise ValueError(f"{path}, claim {claim!r}: {pair} are not two of the runs {names}")
            known = (*(NOVELTIES if grid.measure == "retrieval" else ()), *MEASURES[grid.measure].shown)
            if any(name not in known for name in pair[2:]):
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
