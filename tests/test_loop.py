import sys
from dataclasses import dataclass, field

import pytest
import torch
from arguments import parse_arguments
from checkpoints import find_checkpoint, list_checkpoints
from gradients import gather_with_gradient
from rows import GroupedBatches


@dataclass
class Arguments:
    output_dir: str = field(default="", metadata={"help": "x"})
    learning_rate: float = field(default=0.1, metadata={"help": "x"})
    max_steps: int = field(default=5, metadata={"help": "x"})


@pytest.fixture
def parse(monkeypatch):
    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
        return parse_arguments(Arguments, description="x", required=("output_dir",))[0]

    return run


def test_flags_override_the_recipe_and_the_recipe_the_defaults(parse, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: here\nlearning_rate: 1.0e-3\nmax_steps: 7\n", "utf-8")
    args = parse("--config", recipe, "--max_steps", 9)
    assert (args.output_dir, args.learning_rate, args.max_steps) == ("here", 0.001, 9)


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("output_dir: a\nlerning_rate: 1\n", [], "unknown keys: lerning_rate"),
        ("learning_rate: 1\n", [], "missing: --output_dir"),
        ("output_dir: a\n", ["--max_step", "3"], "unrecognized arguments: --max_step"),
        ("output_dir: [\n", [], "recipe.yaml"),
    ],
)
def test_mistakes_are_named(parse, tmp_path, capsys, content, flags, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content, "utf-8")
    with pytest.raises(SystemExit):
        parse("--config", recipe, *flags)
    assert message in capsys.readouterr().err


def test_batches_cover_an_epoch_once_and_differ_between_epochs():
    batches = GroupedBatches(10, 3, seed=0)
    first, again = list(batches), list(batches)
    assert first == again and [len(b) for b in first] == [3, 3, 3] and len(batches) == 3
    assert len({row for batch in first for row in batch}) == 9
    batches.epoch = 1
    assert list(batches) != first
    assert list(GroupedBatches(10, 3, seed=1)) != first


def test_rows_of_a_group_share_a_batch():
    groups = [i % 6 for i in range(24)]
    for batch in GroupedBatches(24, 8, seed=3, groups=groups):
        assert sorted(groups[row] for row in batch) == sorted([groups[r] for r in batch[::4]] * 4)


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="per_device_train_batch_size"):
        GroupedBatches(7, 8, seed=0)


def test_only_whole_checkpoints_are_found_the_newest_last(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint"):
        find_checkpoint(str(tmp_path), "latest")
    for name in ("checkpoint-20", "checkpoint-100", "unfinished-checkpoint-200", "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert [p.name for p in list_checkpoints(str(tmp_path))] == ["checkpoint-20", "checkpoint-100"]
    assert find_checkpoint(str(tmp_path), "latest").name == "checkpoint-100"
    with pytest.raises(ValueError, match="no checkpoint at"):
        find_checkpoint(str(tmp_path), str(tmp_path / "gone"))


def test_gradients_flow_through_a_gather_of_one_process():
    x = torch.ones(2, 3, requires_grad=True)
    gather_with_gradient(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 3))
