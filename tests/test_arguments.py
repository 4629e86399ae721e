import re
import sys
from dataclasses import dataclass, field

import pytest
from arguments import DataArguments, LoopArguments, parse_arguments, run_as_script


@dataclass
class Arguments:
    output_dir: str = field(default="", metadata={"help": "x"})
    learning_rate: float = field(default=0.1, metadata={"help": "x"})
    max_steps: int = field(default=5, metadata={"help": "x"})
    mixed_precision: str = field(default="no", metadata={"help": "x"})
    targets: list[str] | None = field(default=None, metadata={"help": "x"})
    is_given: bool = field(default=False, metadata={"help": "x"})


@pytest.fixture
def parse(monkeypatch):
    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
        return parse_arguments(Arguments, description="x", required=("output_dir",))[0]

    return run


def test_flags_override_the_recipe_and_the_recipe_the_defaults(parse, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: here\nlearning_rate: 1.0e-3\nmax_steps: 7\n", "utf-8")
    recipe.write_text(recipe.read_text("utf-8") + "mixed_precision: no\n", "utf-8")  # a truth value of YAML's
    args = parse("--config", recipe, "--max_steps", 9)
    assert args.mixed_precision == "no"
    assert (args.output_dir, args.learning_rate, args.max_steps) == ("here", 0.001, 9)
    recipe.write_text("output_dir: 2026-01-31\nis_given: yes\n", "utf-8")  # a date, where a text is wanted
    assert parse("--config", recipe) == Arguments(output_dir="2026-01-31", is_given=True)
    assert not parse("--config", recipe, "--is_given", "no").is_given


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("output_dir: a\nlerning_rate: 1\n", [], "unknown keys: lerning_rate"),
        (
            "output_dir: a\n",
            ["--lerning_rate", "1"],
            "--lerning_rate 1; did you mean --learning_rate? --help lists all",
        ),
        (
            "output_dir: a\n",
            ["--max_steps=3", "--xyz=1", "here"],
            "unrecognized arguments: --xyz=1 here; --help lists",
        ),
        ("learning_rate: 1\n", [], "missing: --output_dir"),
        ("output_dir: a\n", ["--max_step", "3"], "unrecognized arguments: --max_step"),
        ("output_dir: [\n", [], "recipe.yaml"),
        ("output_dir: a\nmax_steps: 2.5\n", [], "invalid int value: '2.5'"),
        ("output_dir: a\nlearning_rate: yes\n", [], "invalid float value: 'True'"),
        ("output_dir: a\nmax_steps:\n", [], "max_steps has no value"),
        ("output_dir: a\nmax_steps: [1, 2]\n", [], "max_steps takes one value, not [1, 2]"),
        ("output_dir: a\nmax_steps: {a: 1}\n", [], "max_steps takes one value"),
        ("output_dir: a\ntargets: q_proj\n", [], "targets takes a list, not 'q_proj'"),
        ("- output_dir\n", [], "holds no arguments"),
    ],
)
def test_mistakes_are_named(parse, tmp_path, capsys, content, flags, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content, "utf-8")
    with pytest.raises(SystemExit):
        parse("--config", recipe, *flags)
    told = capsys.readouterr().err
    assert message in told and "--mixed_precision" not in told  # nor every other argument


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logging_steps": 0}, "--logging_steps must be at least 1, not 0"),
        ({"eval_steps": 0}, "--eval_steps must be at least 1"),
        ({"gradient_cache_chunk": -2}, "--gradient_cache_chunk must be at least 0"),
        ({"save_total_limit": -1}, "--save_total_limit must be at least 0, not -1"),
        ({"max_steps": 0}, "--max_steps must be at least 1, or -1 for --num_train_epochs, not 0"),
        ({"num_train_epochs": 0}, "--num_train_epochs must be above 0, not 0"),
        ({"num_train_epochs": float("nan")}, "--num_train_epochs must be above 0, not nan"),
        ({"warmup_steps": -5}, "--warmup_steps must be at least 0, not -5"),
        ({"learning_rate": -1e-3}, "--learning_rate must be at least 0, not -0.001"),
        ({"learning_rate": float("nan")}, "--learning_rate must be at least 0, not nan"),
        ({"weight_decay": float("inf")}, "--weight_decay must be at least 0, not inf"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau"},
            "--lr_scheduler_type is one of linear, .* not reduce",
        ),
    ],
)
def test_numbers_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LoopArguments(**change)


def test_errors_for_the_user_end_a_script_without_a_traceback():
    for error in (ValueError("the column is missing"), PermissionError(13, "Permission denied", "config.json")):

        def main(error=error):
            raise error

        with pytest.raises(SystemExit, match=f"error: {re.escape(str(error))}"):
            run_as_script(main)
    with pytest.raises(ValueError, match="--on_bad_image must be error or skip, not ignore"):
        DataArguments(on_bad_image="ignore")


@pytest.mark.parametrize("change", [{"feature_batch_size": 0}, {"validation_rows": -3}])
def test_numbers_of_rows_that_cannot_be_are_refused(change):
    with pytest.raises(ValueError, match=f"--{next(iter(change))} must be at least"):
        DataArguments(**change)


def test_help_keeps_the_description_as_it_is_written(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    command = (
        "accelerate launch train/stage1.py --model_name_or_path openai/clip-vit-large-patch14 \\\n    --dataset_name x"
    )
    with pytest.raises(SystemExit):
        parse_arguments(Arguments, description=f"Stage I.\n\n    {command}", required=())
    told = capsys.readouterr().out
    assert command in told and "(default: 0.1)" in told


def test_help_tells_each_argument_once_and_no_default_that_is_none(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    with pytest.raises(SystemExit):
        parse_arguments(Arguments, description="x", required=("output_dir",))
    told = capsys.readouterr().out
    for name in ("output_dir", "learning_rate", "targets", "is_given"):
        assert told.count(name) == 1 and name.replace("_", "-") not in told.replace(name, "")
    assert "x (required)" in told and "(default: )" not in told and "(default: None)" not in told
