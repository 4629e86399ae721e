"""What a grid's YAML file may say, and what is said of one that says something else."""

import pytest
import yaml
from ablation_data import MET
from ablation_grid import Grid
from conftest import ROOT


GRIDS = ["components", "paper", "queries", "alternatives", "number", "quality", "baselines", "readout", "forgetting",
         "tasks", "choices", "second_clip", "final_table", "final_defaults", "final_triplets",
         "final_number"]  # fmt: skip


GRID = Grid(
    seeds=[0, 1],
    stage1={"full": {}, "plain": {"num_injection_blocks": 0}},
    runs={"alone": {"stage1": "full"}, "whole": {"stage1": "full", "stage2": {}},
          "other": {"stage1": "plain", "stage2": {"lora_rank": 2}}},
    claims={"stage II helps": ["whole", "alone"], "injection helps": ["whole", "other"]},
)  # fmt: skip


@pytest.mark.parametrize("name", GRIDS)
def test_the_stored_grids_are_understood(name):
    grid = Grid.read(ROOT / f"eval/ablation/{name}.yaml")
    assert len(grid.seeds) == 5 and len(grid.claims) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": [0]}, "needs seeds, stage1, runs and claims"),
        ({"runs": {"a": {"stage1": "none"}}}, "run 'a': needs stage1, one of"),
        ({"runs": {"a": {"stage1": "full", "triplets": {"number": 0}}}}, "run 'a': a mixture has 1 to"),
        ({"runs": {"a": {"stage1": "full", "triplets": {"many": 5}}}}, "run 'a': .*unexpected keyword"),
        ({"claims": {"c": ["a", "b"]}}, r"claim 'c': \['a', 'b'\] are not two of"),
        ({"runs": {"a": {"method": "magic"}}}, "run 'a': methods and what they may have are"),
        ({"runs": {"a": {"method": "sum", "epochs": 3}}}, "run 'a': methods and what they may have are"),
        ({"measure": "tasks", "runs": {"a": {"method": "sum", "weight": 0.5}}}, r"methods .* have are \{\}"),
        ({"measure": "taste"}, "measure is one of retrieval, readout, forgetting, tasks, not 'taste'"),
        ({"claims": {"c": ["a", "a", "b"]}}, r"claim 'c': 'b' is none of"),
        ({"measure": "tasks", "runs": {"a": {"stage1": "full", "residual": 1}}}, "residual is for measure retrieval"),
        ({"measure": "tasks", "queries": {"weight": 0.2}}, "queries: weight is for measure retrieval"),
        ({"queries": {"weights": 0.2}}, "known are residual, weight, dtype, not weights"),
        ({"runs": {"a": {"stage1": "full", "weight": "a"}}}, "run 'a': weight is a number"),
        ({"queries": {"dtype": "float16"}}, "queries: dtype is float32 or bfloat16, not 'float16'"),
        (
            {"runs": {"w -1": {"stage1": "full"}, "w 1": {"stage1": "full"}}},
            r"runs: \['w -1', 'w 1'\] would share",
        ),
        ({"stage1": {"Full": {}, "full": {}}}, r"stage1: \['Full', 'full'\] would share their files, full"),
        ({"measure": "readout", "claims": {"c": ["a", "a", MET]}}, r"claim 'c': .* is none of"),
        ({"stage1": {"full": None}}, "stage1, 'full': names with what each has, {} for nothing, not None"),
        ({"runs": None}, "runs: names with what each has"),
        ({"runs": {"a": None}}, "runs, 'a': names with"),
        ({"claims": None}, "claims: names with what each has"),
        ({"claims": {"c": "ab"}}, "claim 'c': ab are not two of the runs"),
        ({"stage2": None}, "stage2: names with what each has"),
        ({"seeds": 3}, "seeds is a list of whole numbers, not 3"),
        ({"seeds": []}, r"seeds is a list of whole numbers, not \[\]"),
        ({"stage1": {False: {}}}, r"stage1: names are texts, not \[False\]; put them in quotes"),
        ({"runs": {1000: {"stage1": "full"}}}, r"runs: names are texts, not \[1000\]; put them in quotes"),
        ({"claims": {1: ["a", "a"]}}, r"claims: names are texts, not \[1\]"),
        (
            {"runs": {"0": {"stage1": "full"}, "1000": {"stage1": "full"}}, "claims": {"c": [1000, 0]}},
            r"claim 'c': \[1000, 0\] are not two of the runs \['0', '1000'\]",
        ),
        ({"stage1": {"1": {}}, "runs": {"a": {"stage1": 1}}}, r"run 'a': needs stage1, one of \['1'\]"),
        ({"measure": ["retrieval"]}, "measure is one of"),
        ({"worlds": ["test-1"]}, r"worlds is a list of val, test, final, last, not \['test-1'\]"),
        ({"worlds": ["final"], "measure": "tasks"}, "worlds other than val, test are for measure retrieval alone"),
    ],
)
def test_mistakes_in_a_grid_are_named(tmp_path, change, message):
    content = {"seeds": [0], "stage1": {"full": {}}, "runs": {"a": {"stage1": "full"}}, "claims": {}} | change
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content), "utf-8")
    with pytest.raises(ValueError, match=message):
        Grid.read(tmp_path / "grid.yaml")


def test_numbers_that_yaml_takes_for_texts_are_numbers(tmp_path):
    content = (
        "seeds: [0]\nstage1: {full: {learning_rate: 1e-4}}\nstage2: {weight_decay: 1e-3, mixed_precision: bf16}\n"
    )
    content += "runs: {a: {stage1: full, stage2: {learning_rate: 2e-4}}}\nclaims: {}\n"
    (tmp_path / "grid.yaml").write_text(content, "utf-8")
    grid = Grid.read(tmp_path / "grid.yaml")
    assert grid.stage1["full"] == {"learning_rate": 1e-4} and grid.runs["a"]["stage2"] == {"learning_rate": 2e-4}
    assert grid.stage2 == {"weight_decay": 1e-3, "mixed_precision": "bf16"}


def test_some_runs_of_a_grid_bring_their_claims():
    assert GRID.only(["alone", "whole"]).claims == {"stage II helps": ["whole", "alone"]}
    assert list(GRID.only(["other"]).runs) == ["other"] and GRID.only(list(GRID.runs)) == GRID
    with pytest.raises(ValueError, match="not \\['wholly'\\]"):
        GRID.only(["whole", "wholly"])
