"""From every query's value by run and seed to tables, verdicts on claims, and pictures."""

import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
from ablation_data import NOVELTIES, novelties
from ablation_measures import Measure
from comparisons import Effect, compared, holm, verdict


def collect(files: dict[tuple[str, int], Path], queries: Path, split: str) -> pd.DataFrame:
    """One row a run, seed, metric and query; "novelty" is one of NOVELTIES for CIRR's queries."""
    known = pd.read_parquet(queries)
    known = known[known["split"] == split]
    clusters = {name: rows["cluster"].to_numpy() for name, rows in known.groupby("benchmark")}
    worlds = pd.Series(clusters["cirr"]).str.partition(" ")[0].unique() if "cirr" in clusters else ()
    novelty = {"cirr": [new for world in worlds for new in novelties(world)]}
    frames = []
    for (run, seed), file in files.items():
        table = pd.read_parquet(file)
        for metric, rows in table[table["split"] == split].groupby("metric", sort=False):
            columns = {"run": run, "seed": seed, "metric": metric, "query": range(len(rows))}
            benchmark = str(metric).partition("_")[0]
            columns |= {"value": rows["value"].to_numpy(), "cluster": clusters[benchmark]}
            columns["novelty"] = novelty.get(benchmark, "")
            frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def by_seed(table: pd.DataFrame, run: str, metric: str, novelty: str | None = None) -> tuple[np.ndarray, list]:
    """A run's values [S, Q] of a metric, and the queries' clusters; of all queries, or of those with a novelty."""
    rows = table[(table["run"] == run) & (table["metric"] == metric)]
    if novelty is not None:
        rows = rows[rows["novelty"] == novelty]
    first = rows[rows["seed"] == rows["seed"].iloc[0]]
    return rows.pivot(index="seed", columns="query", values="value").to_numpy(), first["cluster"].tolist()


def summarise(
    table: pd.DataFrame, grid_claims: dict[str, list[str]], measure: Measure, number: int | None = None
) -> tuple[pd.DataFrame, list[dict], list[dict]]:
    """The tidy table, the verdict on each claim, and each claim's effect on each metric.

    Claims are corrected for their number, or for the `number` of a whole grid of which they are some.
    """
    tidy = table.groupby(["run", "seed", "metric"], sort=False)["value"].agg(["mean", "size"]).reset_index()
    tidy = tidy.rename(columns={"mean": "value", "size": "queries"})
    claims, details = [], []
    for claim, (*pair, only) in ((name, [*runs, None][:3]) for name, runs in grid_claims.items()):
        novelty = only if only in NOVELTIES else None
        asked = measure.primary if only is None else measure.primary[:1] if novelty else (only,)
        parts = {}
        for metric in measure.shown if only is None else asked:
            (better, clusters), (other, _) = (by_seed(table, run, metric, novelty) for run in pair)
            parts[metric] = (better - other, clusters)
            details.append({"claim": claim, "metric": metric, **compared([parts[metric]])._asdict()})
        effect = compared([parts[metric] for metric in asked])
        claims.append({"claim": claim, "runs": grid_claims[claim], **effect._asdict()})
    for claim, p in zip(claims, holm([claim["p_value"] for claim in claims], number), strict=True):
        numbers = Effect(**{name: claim[name] for name in Effect._fields})
        claim["p_value_holm"] = p
        claim["verdict"] = verdict(numbers, p)
    return tidy, claims, details


def report(
    table: pd.DataFrame,
    runs: list[str],
    claims: list[dict],
    details: list[dict],
    measure: Measure,
    title: str,
    output: Path,
) -> str:
    """Markdown, with a picture of the effects beside it."""
    shown, primary, seeds = measure.shown, measure.primary, sorted(table["seed"].unique())
    counts = {m: int((table["metric"] == m).sum() / len(seeds) / table["run"].nunique()) for m in primary}
    lines = [
        f"# The miniature's {title}\n",
        f"Seeds {', '.join(map(str, seeds))}; queries: "
        + ", ".join(f"{n:,} ({shown[m]})" for m, n in counts.items())
        + ". Percent, mean over seeds, and 95% intervals: a bootstrap over references, and "
        + ("Student's t over seeds.\n" if len(seeds) > 1 else "nothing for seeds: one seed tells of no claim.\n"),
        "| run | " + " | ".join(shown.values()) + " |",
        "|" + "---|" * (len(shown) + 1),
    ]
    for run in runs:
        cells = []
        for metric in shown:
            own = compared([by_seed(table, run, metric)])
            cells.append(f"{100 * own.effect:.1f} ({100 * own.ci_low:.1f} to {100 * own.ci_high:.1f})")
        lines.append(f"| {run} | " + " | ".join(cells) + " |")
    if primary[0].startswith("cirr"):
        lines += by_novelty(table[table["metric"] == primary[0]], runs)
    lines += [
        "\nEach claim compares two runs on the mean of "
        + ", ".join(shown[m] for m in primary)
        + ", or on what its name says where that is less; p-values are corrected for the number of claims (Holm).\n",
        "| claim | effect, points | 95% interval | p | verdict |",
        "|---|---|---|---|---|",
    ]
    for c in claims:
        interval = f"{100 * c['ci_low']:+.1f} to {100 * c['ci_high']:+.1f}"
        lines.append(
            f"| {c['claim']} | {100 * c['effect']:+.1f} | {interval} | {c['p_value_holm']:.2g} | {c['verdict']} |"
        )
    lines.append("\n![Effect of each part on each metric, with 95% intervals](effects.png)\n")
    draw(claims, details, shown, output / "effects.png")
    return "\n".join(lines)


def by_novelty(values: pd.DataFrame, runs: list[str]) -> list[str]:
    """A table of R@1 by what training had not met."""
    sizes = values.drop_duplicates("query")["novelty"].value_counts()
    means = values.groupby(["run", "novelty"])["value"].mean()
    lines = [
        f"\nR@1 by what a query holds, of {', '.join(f'{sizes[new]:,}' for new in NOVELTIES)} queries:\n",
        "| run | " + " | ".join(NOVELTIES) + " |",
        "|" + "---|" * (len(NOVELTIES) + 1),
    ]
    return lines + [
        f"| {run} | " + " | ".join(f"{100 * means[run, new]:.1f}" for new in NOVELTIES) + " |" for run in runs
    ]


def draw(claims: list[dict], details: list[dict], shown: dict[str, str], path: Path) -> None:
    """A panel a metric: each claim's effect with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(shown), figsize=(16, 1 + 0.45 * len(claims)), sharey=True)
    names = [claim["claim"] for claim in claims]
    for axis, (metric, title) in zip(axes, shown.items(), strict=True):
        rows = {d["claim"]: d for d in details if d["metric"] == metric}
        places = [place for place, name in enumerate(names) if name in rows]
        middle, low, high = (
            np.array([100 * rows[names[place]][part] for place in places]) for part in ("effect", "ci_low", "ci_high")
        )
        axis.errorbar(middle, places, xerr=[middle - low, high - middle], fmt="o", color="black", capsize=3)
        axis.axvline(0, color="grey", linewidth=1)
        axis.set_title(textwrap.fill(f"{title}, points", 24), fontsize=9)
    axes[0].set_yticks(range(len(names)), names, fontsize=9)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
