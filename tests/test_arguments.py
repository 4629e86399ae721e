import sys
from dataclasses import dataclass, field

import pytest
from arguments import parse_arguments


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
