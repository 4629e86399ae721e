import shutil

import ablation
import ablation_data
import numpy as np
import pandas as pd
import pytest
import yaml
from ablation import Grid, Runner
from ablation_data import Mixture
from conftest import ROOT

from miniature.compare import SHOWN


@pytest.mark.parametrize("name", ["components", "number", "quality", "baselines"])
def test_the_stored_grids_are_understood(name):
    grid = Grid.read(ROOT / f"eval/ablation/{name}.yaml")
    assert len(grid.seeds) == 5 and len(grid.claims) > 5


def write_pool(folder, quality: str, count: int) -> None:
    rows = {name: [f"{quality} {name} {i}" for i in range(count)] for name in ablation_data.COLUMNS}
    folder.mkdir(parents=True)
    pd.DataFrame(rows | {"more": range(count)}).to_parquet(folder / "train.parquet")


def test_mixtures_are_of_the_number_and_quality_asked_for(tmp_path):
    for quality in ("edits", "templates"):
        write_pool(tmp_path / quality, quality, 40)
    mixture = Mixture(number=40, templated=0.25, wrong=0.5)
    for part in ("out", "again"):
        ablation_data.write_mixture(tmp_path / part, tmp_path, mixture, seed=3)
    rows = pd.read_parquet(tmp_path / "out")
    assert rows.equals(pd.read_parquet(tmp_path / "again")) and list(rows.columns) == list(ablation_data.COLUMNS)
    assert [q.split()[0] for q in rows["quality"]] == ["edits"] * 30 + ["templates"] * 10
    numbers = {name: rows[name].str.split().str[-1] for name in ("reference", "target", "target_id")}
    pools = {name: rows[name].str.split().str[0] for name in ("reference", "target")}
    same = numbers["reference"].eq(numbers["target"]) & pools["reference"].eq(pools["target"])
    assert (~same).sum() == 20 and numbers["target"].eq(numbers["target_id"]).all()
    assert sorted(rows["target"]) == sorted(rows["reference"].str.replace("reference", "target"))  # each still once
    with pytest.raises(ValueError, match="has 40 triplets"):
        ablation_data.write_mixture(tmp_path / "more", tmp_path, Mixture(number=50), seed=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": [0]}, "needs seeds, stage1, runs and claims"),
        ({"runs": {"a": {"stage1": "none"}}}, "run 'a': needs stage1, one of"),
        ({"runs": {"a": {"stage1": "full", "triplets": {"number": 0}}}}, "run 'a': a mixture has 1 to"),
        ({"runs": {"a": {"stage1": "full", "triplets": {"many": 5}}}}, "run 'a': .*unexpected keyword"),
        ({"claims": {"c": ["a", "b"]}}, r"claim 'c': \['a', 'b'\] are not two of"),
    ],
)
def test_mistakes_in_a_grid_are_named(tmp_path, change, message):
    content = {"seeds": [0], "stage1": {"full": {}}, "runs": {"a": {"stage1": "full"}}, "claims": {}} | change
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content), "utf-8")
    with pytest.raises(ValueError, match=message):
        Grid.read(tmp_path / "grid.yaml")


GRID = Grid(
    seeds=[0, 1],
    stage1={"full": {}, "plain": {"num_injection_blocks": 0}},
    runs={"alone": {"stage1": "full"}, "whole": {"stage1": "full", "stage2": {}},
          "other": {"stage1": "plain", "stage2": {"lora_rank": 2}}},
    claims={"stage II helps": ["whole", "alone"], "injection helps": ["whole", "other"]},
)  # fmt: skip


def test_runs_share_stage_one_and_what_is_there_is_not_done_again(tmp_path, monkeypatch):
    commands = []

    def call(self, command, log):
        commands.append([str(part) for part in command])
        if "--evaluate" in command:
            command[command.index("--evaluate") + 2].parent.mkdir(parents=True, exist_ok=True)
            command[command.index("--evaluate") + 2].write_bytes(b"x")
        else:
            folder = command[command.index("--output_dir") + 1]
            folder.mkdir(parents=True)
            (folder / "training_arguments.json").write_text("{}", "utf-8")

    monkeypatch.setattr(Runner, "_call", call)
    output, results = tmp_path / "out", tmp_path / "results"

    def run_all() -> None:
        commands.clear()
        runner = Runner(output, results, 2, ["--max_steps", "3"])
        for done in [runner.run(n, r, GRID, s) for s in GRID.seeds for n, r in GRID.runs.items()]:
            done.result()

    run_all()
    trainings = [c for c in commands if "--evaluate" not in c]
    assert len(trainings) == 2 * (2 + 2) and len(commands) - len(trainings) == 6
    second = next(c for c in trainings if c[c.index("--output_dir") + 1] == str(output / "stage2/other-1"))
    assert second[1] == "train/stage2.py" and second[second.index("--lora_rank") + 1] == "2"
    assert second[second.index("--seed") + 1] == "1"
    assert second[second.index("--model_name_or_path") + 1] == str(output / "stage1/plain-1")
    assert second[second.index("--dataset_name") + 1] == str(output / "training-1/triplets")
    run_all()
    assert commands == []
    shutil.move(output, tmp_path / "lost")
    run_all()  # results alone are enough
    assert commands == []
    shutil.move(tmp_path / "lost", output)
    (results / "queries/whole-0.parquet").unlink()
    (output / "stage2/whole-0/training_arguments.json").unlink()
    (output / "stage2/whole-0/checkpoint-20").mkdir()
    monkeypatch.setattr(Runner, "_call", lambda self, command, log: commands.append([str(c) for c in command]))
    run_all()
    assert len(commands) == 2 and commands[0][-2:] == ["--resume_from_checkpoint", "latest"]


def test_the_report_tells_effects_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    strength = {"alone": 0.2, "whole": 0.6, "other": 0.6}
    frames = []
    for run, share in strength.items():
        for seed in GRID.seeds:
            for metric in SHOWN:
                value = (rng.random(300) < share).astype(float)
                cluster = [f"c{i // 2}" for i in range(300)]
                frames.append(pd.DataFrame({"metric": metric, "cluster": cluster, "value": value, "query": range(300),
                                            "run": run, "seed": seed}))  # fmt: skip
    table = pd.concat(frames, ignore_index=True)
    tidy, claims, details = ablation.summarise(table, GRID)
    assert len(tidy) == 3 * 2 * len(SHOWN) and set(tidy["queries"]) == {300}
    assert [claim["verdict"] for claim in claims] == ["holds", "cannot be told"]
    assert claims[0]["effect"] == pytest.approx(0.4, abs=0.05) and claims[0]["ci_low"] > 0.3
    assert {"claim", "verdict", "effect", "ci_low", "ci_high"} <= set(claims[0])
    text = ablation.report(table, GRID, claims, details, "small grid", tmp_path)
    assert "| stage II helps | +" in text and "300 (R@1)" in text
    assert (tmp_path / "effects.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_small_grid_from_beginning_to_end(tmp_path, monkeypatch, capsys):
    content = {
        "seeds": [0],
        "stage1": {"full": {}},
        "runs": {"alone": {"stage1": "full"}, "TSCIR": {"stage1": "full", "stage2": {}}},
        "claims": {"adapters help": ["TSCIR", "alone"]},
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content), "utf-8")
    flags = ["--config", tmp_path / "grid.yaml", "--output_dir", tmp_path / "out", "--max_steps", 2]
    monkeypatch.setattr("sys.argv", ["ablation.py", *map(str, flags)])
    ablation.main()
    assert "| adapters help |" in (tmp_path / "out/results/report.md").read_text("utf-8")
    table = pd.read_csv(tmp_path / "out/results/table.csv")
    assert set(table["run"]) == {"alone", "TSCIR"} and table["queries"].min() > 4000
