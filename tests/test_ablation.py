import json
import shutil
import time
from dataclasses import asdict, replace

import ablation
import ablation_data
import pandas as pd
import pytest
import yaml
from ablation import Runner
from ablation_data import Mixture, settle_clip
from ablation_grid import MEASURES, Grid
from conftest import ROOT
from test_ablation_grid import GRID, GRIDS

from miniature.compare import CLIP


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


@pytest.mark.parametrize(("templated", "pools"), [(0, {"edits"}), (1, {"templates"}), (0.5, {"edits", "templates"})])
def test_only_the_pools_that_mixtures_take_from_are_made(monkeypatch, tmp_path, templated, pools):
    for what in ("build_further", "write_training_data"):
        monkeypatch.setattr(ablation_data, what, lambda folder, **_: folder.mkdir())
    monkeypatch.setattr(ablation_data, "write_triplets", lambda folder, **_: write_pool(folder, "edits", 40))
    monkeypatch.setattr(ablation_data, "write_templates", lambda folder, **_: write_pool(folder, "templates", 40))
    mixture = Mixture(number=40, templated=templated)
    ablation_data.make_data(tmp_path, [3], {mixture})
    assert {path.name for path in (tmp_path / "pools-3").iterdir()} == pools
    rows = pd.read_parquet(ablation_data.triplets_of(tmp_path, 3, mixture))
    assert len(rows) == 40 and {quality.split()[0] for quality in rows["quality"]} == pools


def test_training_data_leave_out_the_worlds_that_a_grid_asks_for(monkeypatch, tmp_path):
    left_out = []
    monkeypatch.setattr(ablation_data, "build_further", lambda folder, splits: [
        (folder / ablation_data.ALL_FURTHER[split][0]).mkdir(parents=True) for split in splits])  # fmt: skip
    monkeypatch.setattr(ablation_data, "write_training_data",
                        lambda folder, seed, further: (folder.mkdir(), left_out.append(further)))  # fmt: skip
    ablation_data.make_data(tmp_path / "usual", [3])
    ablation_data.make_data(tmp_path / "last", [3], splits=["final"])
    assert left_out == [("val", "test"), ("val", "test", "final")]
    with pytest.raises(ValueError, match="usual was made for other worlds, .* may show scenes of final; name another"):
        ablation_data.make_data(tmp_path / "usual", [4], splits=["final"])
    with pytest.raises(ValueError, match="last was made for other worlds"):
        ablation_data.make_data(tmp_path / "last", [4])
    assert len(left_out) == 2
    for seed, splits in ((3, ["final", "last"]), (4, ["final"])):  # which both splits' worlds are read by
        ablation_data.make_data(tmp_path / "both", [seed], splits=splits)
    assert left_out[2:] == [("val", "test", "final", "last")] * 2


def test_results_of_another_run_are_not_taken_for_this_ones(tmp_path):
    runner = Runner(tmp_path, tmp_path / "results", 1, [])
    runner.settle(GRID)
    runner.settle(GRID.only(["other"]))
    changes = ({"queries": {"weight": 0.5}}, {"stage2": {"gce_q": 0}}, {"measure": "tasks"}, {"worlds": ["final"]},
               {"stage1": GRID.stage1 | {"full": {"max_steps": 3}}},
               {"runs": GRID.runs | {"whole": {"method": "sum", "weight": 0.1}}})  # fmt: skip
    for change in changes:
        with pytest.raises(
            ValueError, match="has results of a run '(alone|whole)' that was .* and is .* now; name an"
        ):
            runner.settle(replace(GRID, **change))
    runner.settle(replace(GRID, runs=GRID.runs | {"new": {"method": "sum", "weight": 0.1}}))


@pytest.mark.parametrize("name", GRIDS)
def test_stored_results_are_of_the_stored_grids(name, tmp_path):
    folder = ROOT / "eval/ablation" / name
    if folder.is_dir():
        shutil.copy(folder / "runs.json", tmp_path / "runs.json")
        Runner(tmp_path, tmp_path, 1, []).settle(Grid.read(folder.with_suffix(".yaml")))
        assert (tmp_path / "runs.json").read_bytes() == (folder / "runs.json").read_bytes()


def test_runs_share_stage_one_and_what_is_there_is_not_done_again(tmp_path, monkeypatch):
    commands = []

    def call(self, command, log):
        commands.append([str(part) for part in command])
        if "--evaluate" in command:
            command[command.index("--evaluate") + 3].parent.mkdir(parents=True, exist_ok=True)
            command[command.index("--evaluate") + 3].write_bytes(b"x")
        else:
            folder = command[command.index("--output_dir") + 1]
            folder.mkdir(parents=True)
            flags = dict(zip(command[2::2], command[3::2], strict=False))
            given = {
                k: int(flags[f"--{k}"])
                for k in ("lora_rank", "num_injection_blocks", "max_steps")
                if f"--{k}" in flags
            }
            (folder / "training_arguments.json").write_text(json.dumps(given), "utf-8")

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
    second = next(c for c in trainings if c[c.index("--output_dir") + 1] == str(output / "short/stage2/other-1"))
    assert second[1] == "train/stage2.py" and second[second.index("--lora_rank") + 1] == "2"
    assert second[second.index("--seed") + 1] == "1"
    assert second[second.index("--model_name_or_path") + 1] == str(output / "short/stage1/plain-1")
    assert second[second.index("--dataset_name") + 1] == str(output / "training-1/triplets")
    run_all()
    assert commands == []
    shutil.move(output, tmp_path / "lost")
    run_all()  # results alone are enough
    assert commands == []
    shutil.move(tmp_path / "lost", output)
    (results / "queries/whole-0.parquet").unlink()
    (output / "short/stage2/whole-0/training_arguments.json").unlink()
    (output / "short/stage2/whole-0/checkpoint-20").mkdir()
    monkeypatch.setattr(Runner, "_call", lambda self, command, log: commands.append([str(c) for c in command]))
    run_all()
    assert len(commands) == 2 and commands[0][-2:] == ["--resume_from_checkpoint", "latest"]


def test_a_folder_of_another_training_is_not_taken_for_this_one(tmp_path):
    (tmp_path / "stage2").mkdir()
    (tmp_path / "stage2/training_arguments.json").write_text('{"lora_rank": 4, "seed": 0}', "utf-8")
    runner = Runner(tmp_path, tmp_path / "results", 1, [])
    runner.train(2, tmp_path, tmp_path, tmp_path / "stage2", 0, {"lora_rank": 4}, {})
    runner.train(2, tmp_path, tmp_path, tmp_path / "stage2", 0, {}, {"lora_rank": 4, "max_steps": 1})
    for other in ({"lora_rank": 2}, {}):  # neither for one with other defaults
        with pytest.raises(ValueError, match=r"was trained with \{'lora_rank': 4\}, not"):
            runner.train(2, tmp_path, tmp_path, tmp_path / "stage2", 0, other, {})
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1/training_arguments.json").write_text('{"image_template": "a photo of {image}"}', "utf-8")
    with pytest.raises(ValueError, match=r"was trained with \{'image_template': 'a photo of \{image\}'\}, not"):
        runner.train(1, tmp_path, tmp_path, tmp_path / "stage1", 0, {}, {})


def test_a_training_is_one_of_its_data_start_and_arguments_too(tmp_path, monkeypatch):
    """Also of those that are no fields of a configuration, whichever of the two has them; begun or done."""
    begun = []

    def call(self, command, log):
        begun.append(command)
        folder = command[command.index("--output_dir") + 1]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "training_arguments.json").write_text('{"num_train_epochs": 12}', "utf-8")

    monkeypatch.setattr(Runner, "_call", call)
    folder, own = tmp_path / "stage2/TSCIR-0", {"num_train_epochs": 12}
    start, data = tmp_path / "stage1/full-0", tmp_path / "training-0/triplets"

    def train(output=tmp_path, start=start, data=data, choices=own, inherited=None):
        Runner(output, tmp_path / "results", 1, []).train(2, start, data, folder, 0, choices, inherited or {})

    others = ({"choices": {}}, {"choices": own | {"learning_rate": 1e-4}}, {"data": tmp_path / "training-0/mixture"},
              {"start": tmp_path / "stage1/plain-0"}, {"inherited": {"learning_rate": 0}})  # fmt: skip
    for record in (True, False):
        train()
        if not record:
            (folder / "training_arguments.json").unlink()
            (folder / "checkpoint-3").mkdir()
        for other in others:
            with pytest.raises(ValueError, match="TSCIR-0 was trained with .*, not .*; remove it, or rename the run"):
                train(**other)
    assert len(begun) == 1
    shutil.rmtree(folder)
    train(choices={})  # of which nothing is there any more
    assert len(begun) == 2


def test_runs_that_are_evaluated_otherwise_share_a_training(tmp_path, monkeypatch):
    trained, choices, evaluated = [], [], []

    def train(self, stage, start, data, folder, seed, given, inherited):
        trained.append(folder)
        choices.append(given)

    monkeypatch.setattr(Runner, "train", train)
    monkeypatch.setattr(Runner, "evaluate", lambda self, run, result, measure: evaluated.append((result.stem, run)))
    runs = {"alone": {"stage1": "full"}, "whole": {"stage1": "full", "stage2": {}},
            "more": {"stage1": "full", "stage2": {}, "residual": 0.5}}  # fmt: skip
    common = {"stage2": {"lora_rank": 2}, "queries": {"residual": 0, "weight": 0.1}}
    grid = Grid(seeds=[0], stage1={"full": {}}, runs=runs, claims={}, **common)
    runner = Runner(tmp_path, tmp_path / "results", 1, [])
    for done in [runner.run(name, run, grid, 0) for name, run in runs.items()]:
        done.result()
    first, second = tmp_path / "stage1/full-0", tmp_path / "stage2/whole-0"
    assert trained == [first, second, second]  # where nothing is left to do for the second time
    assert choices == [{}, {"lora_rank": 2}, {"lora_rank": 2}]
    assert evaluated == [
        ("alone-0", {"residual": 0, "weight": 0.1, "model": str(first)}),
        ("whole-0", {"residual": 0, "weight": 0.1, "model": str(second)}),
        ("more-0", {"residual": 0.5, "weight": 0.1, "model": str(second)}),
    ]


def test_runs_that_share_a_training_never_train_at_once(tmp_path, monkeypatch):
    """Though their owner has its result already, and its folder is gone."""
    at_once, most = [], []

    def train(self, stage, start, data, folder, seed, given, inherited):
        at_once.append(folder)
        most.append(at_once.count(folder))
        time.sleep(0.1)
        at_once.remove(folder)

    monkeypatch.setattr(Runner, "train", train)
    monkeypatch.setattr(Runner, "evaluate", lambda *given: None)
    more = {f"more {i}": {"stage1": "full", "stage2": {}, "residual": i} for i in range(3)}
    grid = Grid(seeds=[0], stage1={"full": {}}, runs={"whole": {"stage1": "full", "stage2": {}}, **more}, claims={})
    runner = Runner(tmp_path, tmp_path / "results", 4, [])
    runner.result("whole", 0).parent.mkdir(parents=True)
    runner.result("whole", 0).write_bytes(b"x")
    for done in [runner.run(name, run, grid, 0) for name, run in grid.runs.items()]:
        done.result()
    assert len(most) == 4 and max(most) == 1


def test_another_clip_has_folders_of_its_own(tmp_path, clip_dir, monkeypatch):
    """Its copy goes on with the grid, trains stage I, and what is of another CLIP is refused."""
    output, results = tmp_path / "out", tmp_path / "results"
    fingerprint = settle_clip(output, results, clip_dir)
    assert fingerprint != settle_clip(tmp_path / "packaged", tmp_path / "its results", None)
    assert settle_clip(output, results, None) == settle_clip(output, results, clip_dir) == fingerprint
    assert json.loads((results / "clip.json").read_text("utf-8")) == {"fingerprint": fingerprint}
    commands = []
    monkeypatch.setattr(Runner, "_call", lambda self, command, log: commands.append([str(c) for c in command]))
    Runner(output, results, 1, []).run("alone", GRID.runs["alone"], GRID, 0).result()
    assert commands[0][commands[0].index("--model_name_or_path") + 1] == str(output / "clip")
    with pytest.raises(ValueError, match=fingerprint):
        settle_clip(tmp_path / "packaged", results, None)
    with pytest.raises(ValueError, match=fingerprint):
        settle_clip(output, tmp_path / "its results", None)
    with pytest.raises(ValueError, match=fingerprint):
        settle_clip(output, results, CLIP)
    with pytest.raises(ValueError, match=fingerprint):
        settle_clip(tmp_path / "packaged", tmp_path / "new", clip_dir)
    with pytest.raises(ValueError, match=fingerprint):
        settle_clip(tmp_path / "fresh", results, None)
    assert settle_clip(tmp_path / "fresh", results, clip_dir) == fingerprint  # which the refusal left as it was
    assert (tmp_path / "packaged/clip/model.safetensors").is_file()  # the package may go, what is trained stays whole


def test_a_grid_ends_with_its_first_error(tmp_path, monkeypatch):
    begun = []

    def call(self, command, log):
        begun.append(command)
        time.sleep(0.02)
        raise RuntimeError("no space left")

    monkeypatch.setattr(Runner, "_call", call)
    monkeypatch.setattr(ablation, "make_data", lambda *_: None)
    monkeypatch.setitem(MEASURES, "retrieval", replace(MEASURES["retrieval"], prepare=lambda *_: None))
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(asdict(GRID) | {"seeds": list(range(50))}), "utf-8")
    flags = ["--config", tmp_path / "grid.yaml", "--output_dir", tmp_path / "out", "--jobs", 1]
    monkeypatch.setattr("sys.argv", ["ablation.py", *map(str, flags)])
    with pytest.raises(RuntimeError, match="no space left"):
        ablation.main()
    time.sleep(0.5)
    assert 1 <= len(begun) < 10


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--runs", "wholly"], r"error: runs of this grid are .*, not \['wholly'\]"),
        (["--clip", "nowhere"], "error: .*nowhere"),
        (["--world", "last"], "error: .* has the worlds val, test, and no last"),
    ],
)
def test_what_cannot_be_asked_of_a_grid_is_told_in_a_sentence(tmp_path, monkeypatch, flags, message):
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(asdict(GRID)), "utf-8")
    own = ["ablation.py", "--config", str(tmp_path / "grid.yaml"), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", own + flags)
    monkeypatch.setattr(ablation, "make_data", None)
    with pytest.raises(SystemExit, match=message):
        ablation.main()


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
    assert "| adapters help |" in (tmp_path / "out/results/grid/short/val/report.md").read_text("utf-8")
    table = pd.read_csv(tmp_path / "out/results/grid/short/val/table.csv")
    assert set(table["run"]) == {"alone", "TSCIR"} and table["queries"].min() > 4000
