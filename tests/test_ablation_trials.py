from argparse import Namespace
from dataclasses import replace

import ablation_trials
import harness
import pandas as pd
import pytest
import torch
from ablation_data import settle_clip
from ablation_grid import Grid
from ablation_measures import RETRIEVAL
from conftest import ROOT
from fashioniq import FASHIONIQ
from harness import embed_pictures
from splits import Split

from modeling_tscir import TSCIRModel
from modeling_tscir.embedding import embed_images, embed_images_with_patches


@pytest.fixture
def split(pictures):
    return Split(image_ids=list("abcdef"), sources=pictures, files=[(name,) for name in "abcdef"], query_ids=[0, 1, 2],
                 references=[3, 0, 3], texts=[("red",), ("a", "b"), ("c",)], annotation_files=(),
                 truths=[[1], [2], [0]])  # fmt: skip


@pytest.mark.parametrize("blocks", [0, 1])
def test_queries_of_parts_are_those_that_a_grid_evaluates(clip_dir, stage0, processor, pictures, split, blocks):
    mapper = TSCIRModel.from_clip_pretrained(clip_dir, num_pseudo_words=2, num_injection_blocks=blocks)
    mapper.add_mapper()
    one = ablation_trials.Asked(FASHIONIQ, "val-1", "dress", split, embed_images(stage0, processor, pictures))
    patches = embed_images_with_patches(stage0, processor, [pictures[0], pictures[3]])[1]  # references, in order
    parts = ablation_trials.parts_of(one, mapper.eval(), processor, lambda: patches)
    for residual, weight in ((0, 0), (0.75, 0.2), (1.5, 0), (0, 0.6)):
        told = {"residual": residual, "weight": weight}
        expected = harness.compose("tscir", mapper, processor, split, one.pictures, **told)
        torch.testing.assert_close(ablation_trials.composed(one, parts, **told), expected, atol=1e-5, rtol=0)


def test_every_share_is_asked_of_val_alone(clip_dir, stage0, processor, split, tmp_path, monkeypatch):
    settle_clip(tmp_path, tmp_path / "trials", clip_dir)
    monkeypatch.setattr(ablation_trials, "RETRIEVAL", replace(RETRIEVAL, primary=("fashioniq_recall_at_10",)))
    monkeypatch.setattr(ablation_trials, "SHARES", [0.0, 0.3, 1.0])
    args = Namespace(cache_dir=None, on_bad_image="error", batch_size=8, dtype="float32")
    worlds = [(name, f"{name}-1", FASHIONIQ, args, {"dress": split}) for name in ("val", "test")]
    monkeypatch.setattr(ablation_trials, "splits_of_worlds", lambda output: iter(worlds))
    asked = ablation_trials.asked_of_val(tmp_path)
    assert [one.world for one in asked] == ["val-1"]
    rows = ablation_trials.of_shares(tmp_path, "sum")
    assert [row["weight"] for row in rows] == [0.0, 0.3, 1.0]
    pictures = embed_pictures(stage0, processor, split, args)
    for row in rows:
        queries = harness.compose("sum", stage0, processor, split, pictures, row["weight"])
        assert row["mean"] == ablation_trials.figures(asked, [queries])["mean"]


def test_the_final_table_has_every_method_as_the_best_of_its_trials():
    table = pd.read_csv(ROOT / "eval/ablation/trials.csv")
    best = {method: rows.loc[rows["mean"].idxmax()] for method, rows in table.groupby("method")}
    assert {method: len(rows) for method, rows in table.groupby("method")} == {
        method: 216 if method == "TSCIR" else 432 for method in best
    }
    grid = Grid.read(ROOT / "eval/ablation/final_table.yaml")
    for method in ("sum", "slerp"):
        assert grid.runs[method] == {"method": method, "weight": best[method]["weight"]}
    told = {name: best["combiner"][name] for name in ("epochs", "stop_after", "learning_rate")}
    assert grid.runs["combiner"] == {"method": "combiner"} | told
    for method, trainings in ablation_trials.TRAININGS.items():
        own = best[method]
        name = method if method == "TSCIR" else f"{method}-style"
        run, training = grid.queries | grid.runs[name], trainings[own["training"]]
        assert grid.stage1[run["stage1"]] == {k: v for k, v in training.items() if k != "stage2"}
        composing = grid.stage2 | run["stage2"] if "stage2" in run else {}
        assert composing == training.get("stage2", {})
        assert (run["residual"], run["weight"]) == (own["residual"], own["weight"])
        # As it was trained, or as the script leaves it.
        trained_in = ablation_trials.prompts_of(method, own["training"])[0]
        assert own["prompt"] == trained_in["prompt_template"]


def test_every_baseline_has_the_same_number_of_trials_and_the_method_leaves_room_for_those_before():
    pairs = len(ablation_trials.RESIDUALS) * len(ablation_trials.WEIGHTS)
    for method, trainings in ablation_trials.TRAININGS.items():
        asked = sum(len(ablation_trials.prompts_of(method, training)) for training in trainings)
        assert asked * pairs == (216 if method == "TSCIR" else 432), method
    assert len(set(ablation_trials.SHARES)) == len(ablation_trials.RATES) * ablation_trials.EPOCHS == 432


def test_trials_that_are_there_are_not_tried_again_unless_others_are_asked_for(tmp_path, monkeypatch):
    (tmp_path / "trials").mkdir()
    tried = []

    def trial(output, rate):
        tried.append((output, rate))
        return [{"rate": rate, "mean": 0.5}]

    for rate in (0.03, 0.003, 0.03):
        assert ablation_trials.kept(tmp_path, trial, rate) == [{"rate": rate, "mean": 0.5}]
    assert tried == [(tmp_path, 0.03), (tmp_path, 0.003)]
    monkeypatch.setattr(ablation_trials, "EPOCHS", 64)
    ablation_trials.kept(tmp_path, trial, 0.03)
    assert len(tried) == 3
