"""What a grid's values come to: its report, and the verdicts of all grids together."""

import json

import ablation
import ablation_report
import numpy as np
import pandas as pd
import pytest
import yaml
from ablation_data import MET, NEW_KIND, NOVELTIES
from ablation_grid import MEASURES
from ablation_measures import write_table
from ablation_report import collect, report, summarise
from conftest import ROOT
from test_ablation_grid import GRID

from miniature.compare import SHOWN


def test_the_report_tells_effects_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    strength = {"alone": 0.2, "whole": 0.6, "other": 0.6}
    frames = []
    for run, share in strength.items():
        for seed in range(5):
            for metric in SHOWN:
                value = (rng.random(300) < share).astype(float)
                cluster = [f"c{i // 2}" for i in range(300)]
                new = np.resize(NOVELTIES, 300) if metric.startswith("cirr") else ""
                if run == "other" and metric == "cirr_recall_at_1":
                    value = np.where(new == NEW_KIND, 0.0, np.where(new == MET, 1.0, value))
                frames.append(pd.DataFrame({"metric": metric, "cluster": cluster, "value": value, "query": range(300),
                                            "run": run, "seed": seed, "novelty": new}))  # fmt: skip
    table = pd.concat(frames, ignore_index=True)
    claimed = GRID.claims | {"new kinds are found": ["whole", "other", NEW_KIND]}
    tidy, claims, details = summarise(table, claimed, MEASURES["retrieval"])
    assert len(tidy) == 3 * 5 * len(SHOWN) and set(tidy["queries"]) == {300}
    assert [claim["verdict"] for claim in claims] == ["holds", "cannot be told", "holds"]
    assert claims[2]["effect"] == pytest.approx(0.6, abs=0.1) and abs(claims[1]["effect"]) < 0.05
    assert claims[0]["effect"] == pytest.approx(0.4, abs=0.05) and claims[0]["ci_low"] > 0.3
    assert {"claim", "verdict", "effect", "ci_low", "ci_high"} <= set(claims[0])
    text = report(table, list(GRID.runs), claims, details, MEASURES["retrieval"], "small grid", tmp_path)
    assert "of 75, 75, 75, 75 queries" in text and "| other | " in text
    assert "| stage II helps | +" in text and "300 (R@1)" in text
    assert (tmp_path / "effects.png").stat().st_size > 5000


def test_what_is_new_in_a_query_is_told_by_its_own_world(tmp_path, monkeypatch):
    """Worlds in the order of their queries, whatever their names."""
    of_worlds = {"test-2": [MET, NEW_KIND], "test-1": [NEW_KIND, NEW_KIND, MET]}
    monkeypatch.setattr(ablation_report, "novelties", of_worlds.get)
    clusters = [f"{world} {i}" for world, new in of_worlds.items() for i in range(len(new))]
    write_table(pd.DataFrame({"split": "test", "benchmark": "cirr", "cluster": clusters}), tmp_path / "q.parquet")
    values = {"split": "test", "metric": "cirr_recall_at_1", "value": np.arange(5.0)}
    write_table(pd.DataFrame(values), tmp_path / "run.parquet")
    table = collect({("run", 0): tmp_path / "run.parquet"}, tmp_path / "q.parquet", "test")
    assert table["novelty"].tolist() == [MET, NEW_KIND, NEW_KIND, NEW_KIND, MET]
    assert table["cluster"].tolist() == clusters and table["value"].tolist() == [0, 1, 2, 3, 4]


def test_reports_of_several_grids_are_gathered(tmp_path, monkeypatch, capsys):
    """From stored query values alone, by world; what is said of test lies in one file beside the grids."""
    monkeypatch.setattr(ablation_report, "novelties", lambda world: list(np.resize(NOVELTIES, 200)))
    rng = np.random.default_rng(0)
    for name, better in (("first", 0.6), ("second", 0.2)):
        results = tmp_path / name
        grid = vars(GRID) | {
            "runs": {k: GRID.runs[k] for k in ("alone", "whole")},
            "claims": {name: ["whole", "alone"]},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(grid), "utf-8")
        queries = [
            {"split": split, "benchmark": benchmark, "cluster": f"{split}-1 {i // 2}"}
            for split in ("val", "test")
            for benchmark in ("cirr", "fashioniq", "circo")
            for i in range(200)
        ]
        write_table(pd.DataFrame(queries), results / "queries.parquet")
        for run, share in (("alone", 0.2), ("whole", better)):
            for seed in GRID.seeds:
                values = [
                    {
                        "split": split,
                        "metric": metric,
                        "value": float(rng.random() < (share if split == "test" else 0.5)),
                    }
                    for split in ("val", "test")
                    for metric in SHOWN
                    for _ in range(200)
                ]
                write_table(pd.DataFrame(values), results / f"queries/{run}-{seed}.parquet")
        for world in ("val", "test"):
            flags = ["--config", tmp_path / f"{name}.yaml", "--output_dir", tmp_path / "out", "--results_dir", results]
            monkeypatch.setattr("sys.argv", ["ablation.py", *map(str, flags), "--world", world])
            ablation.main()
            assert f"| {name} | " in (results / world / "report.md").read_text("utf-8")
            assert len(pd.read_csv(results / world / "table.csv")) == 2 * 2 * len(SHOWN)
    gathered = json.loads((tmp_path / "claims.json").read_text("utf-8"))
    assert [(claim["grid"], claim["verdict"]) for claim in gathered] == [
        ("first", "holds"),
        ("second", "cannot be told"),
    ]
    assert gathered[0]["ci_low"] < gathered[0]["effect"] < gathered[0]["ci_high"]
    on_val = json.loads((tmp_path / "first/val/claims.json").read_text("utf-8"))[0]
    assert gathered[0]["val"] == {name: on_val[name] for name in ("verdict", "effect", "ci_low", "ci_high")}
    table = (tmp_path / "claims.md").read_text("utf-8")
    assert f"| [first](first/test/report.md) | first | {100 * gathered[0]['effect']:+.1f} (" in table


def test_a_claim_on_val_is_of_the_same_runs(tmp_path):
    numbers = {"verdict": "holds", "effect": 0.2, "ci_low": 0.1, "ci_high": 0.3}
    for world, baseline in (("val", "sum 0.6"), ("test", "sum 0.7")):
        claims = [{"claim": "better than the sum", "runs": ["TSCIR", baseline], **numbers},
                  {"claim": "adapters help", "runs": ["TSCIR", "stage I"], **numbers}]  # fmt: skip
        (tmp_path / "grid" / world).mkdir(parents=True)
        (tmp_path / "grid" / world / "claims.json").write_text(json.dumps(claims), "utf-8")
    assert ["val" in claim for claim in ablation.gather(tmp_path)] == [False, True]


def test_some_runs_of_a_grid_are_told_apart_no_sooner_than_all(tmp_path, monkeypatch, capsys):
    """Else one could choose those whose claims are few."""
    monkeypatch.setattr(ablation_report, "novelties", lambda world: list(np.resize(NOVELTIES, 40)))
    runs = {name: {"method": "sum", "weight": 0.1 * i} for i, name in enumerate("abcd")}
    claims = {f"{one} is better than a": [one, "a"] for one in "bcd"}
    grid = vars(GRID) | {"runs": runs, "claims": claims}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid), "utf-8")
    results, rng = tmp_path / "results", np.random.default_rng(0)
    queries = [{"split": "val", "benchmark": benchmark, "cluster": f"val-1 {i}"}
               for benchmark in ("cirr", "fashioniq", "circo") for i in range(40)]  # fmt: skip
    write_table(pd.DataFrame(queries), results / "queries.parquet")
    for run in runs:
        for seed in GRID.seeds:
            values = [{"split": "val", "metric": metric, "value": rng.random() + (run == "b")}
                      for metric in SHOWN for _ in range(40)]  # fmt: skip
            write_table(pd.DataFrame(values), results / f"queries/{run}-{seed}.parquet")
    found = []
    for some in ([], ["--runs", "a", "b"]):
        flags = ["--config", tmp_path / "grid.yaml", "--output_dir", tmp_path / "out", "--results_dir", results]
        monkeypatch.setattr("sys.argv", ["ablation.py", *map(str, flags), *some])
        ablation.main()
        found.append(json.loads((results / "val/claims.json").read_text("utf-8")))
    whole, alone = found
    assert len(whole) == 3 and [claim["claim"] for claim in alone] == ["b is better than a"]
    assert alone[0]["p_value_holm"] == whole[0]["p_value_holm"] == pytest.approx(3 * whole[0]["p_value"])


def test_stored_verdicts_are_those_of_the_stored_grids():
    stored = json.loads((ROOT / "eval/ablation/claims.json").read_text("utf-8"))
    assert stored == ablation.gather(ROOT / "eval/ablation")
    assert (ROOT / "eval/ablation/claims.md").read_text("utf-8") == ablation.table_of(stored)


def test_a_claim_may_be_of_one_metric_alone():
    won = "double_recall_at_1"
    kept = {"query": range(50), "cluster": [str(i) for i in range(50)], "novelty": ""}
    frames = [
        pd.DataFrame(kept | {"run": run, "seed": seed, "metric": metric, "value": float(run == "a" and metric == won)})
        for run in "ab"
        for seed in (0, 1)
        for metric in MEASURES["tasks"].shown
    ]
    claimed = {"two edits": ["a", "b", "double_recall_at_1"], "one edit": ["a", "b", "single_recall_at_1"]}
    _, claims, details = summarise(pd.concat(frames, ignore_index=True), claimed, MEASURES["tasks"])
    assert [claim["effect"] for claim in claims] == [1, 0] and len(details) == 2
