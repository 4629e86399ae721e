"""Recipes as they are stored: every key known, launch lines that the scripts understand, costs that can be counted."""

import re
import sys

import pytest
import yaml
from arguments import DataArguments, LoopArguments, parse_arguments
from conftest import ROOT
from stage1 import Stage1Arguments
from stage2 import Stage2Arguments
from training_cost import cost, stage1_line, stage2_line


RECIPES = sorted((ROOT / "train/recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_and_their_launch_lines_are_understood(path, monkeypatch):
    stage = {"1": Stage1Arguments, "2": Stage2Arguments}[path.stem[-1]]
    text = path.read_text("utf-8")
    comment = " ".join(line.lstrip("# ").rstrip("\\") for line in text.splitlines() if line.startswith("#"))
    lines = re.findall(rf"train/stage{path.stem[-1]}\.py(.*?\.yaml(?: --\w+ \d+)*)", comment)
    assert len(lines) == (0 if "miniature" in path.stem else 3)
    batches = set()
    for line in lines or [f"--config {path}"]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["script", *line.split()])
        loop, data, _ = parse_arguments(LoopArguments, DataArguments, stage, description="")
        batches.add(loop.per_device_train_batch_size)
        assert data.model_name_or_path and loop.output_dir
    if lines:
        # One, eight and thirty-two processes share one batch.
        whole = yaml.safe_load(text)["per_device_train_batch_size"]
        assert batches == {whole, whole // 8, whole // 32}


def test_costs_are_counted():
    """A ViT-B/32 reads a picture with 4.4 G multiplications and additions, as its authors say."""
    first = cost("ViT-B/32", 1)
    assert first["image_flops"] == pytest.approx(2 * 4.4e9, rel=0.02)
    assert first["trained"] == pytest.approx(10.6e6, rel=0.01)
    assert 2e9 < cost("ViT-B/32", 2)["step_flops"] < 8e9
    for line in (stage1_line("ViT-B/32"), stage2_line("ViT-B/32")):
        assert line.startswith("| ViT-B/32 |")
