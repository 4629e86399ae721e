"""Arguments that both stages share, from a recipe and from flags."""

import math
import sys
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import get_args, get_origin

import yaml
from transformers import HfArgumentParser


# Those of transformers that need to be told no more than the steps.
SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
              "inverse_sqrt")  # fmt: skip


@dataclass
class LoopArguments:
    """Names are transformers' TrainingArguments', but for mixed_precision and what that has not. Defaults differ in
    batch size, learning rate and its schedule, weight decay, epochs, seed, and the steps between logs, validations
    and saves."""

    output_dir: str = field(default="", metadata={"help": "Where the trained folder and its checkpoints go."})
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Rows a process takes per step."})
    gradient_cache_chunk: int = field(
        default=0,
        metadata={
            "help": "Rows whose activations are held at a time; the loss sees the whole batch all the same. 0: all."
        },
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Steps whose gradients are averaged. Does not enlarge the set of negatives."}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Highest learning rate of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay, on matrices alone."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": f"One of {', '.join(SCHEDULERS)}."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warm-up, or a share of all if below 1."})
    num_train_epochs: float = field(default=10, metadata={"help": "Passes over the data, unless max_steps is given."})
    max_steps: int = field(default=-1, metadata={"help": "Optimizer steps in all; -1 leaves it to num_train_epochs."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm; 0 never."})
    seed: int = field(default=0, metadata={"help": "Of initialisation, order of data and dropout."})
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, bf16 or fp16 autocast; accelerate's own setting, or no, unless told."}
    )
    torch_compile: bool = field(
        default=False, metadata={"help": "Compile the towers' encoders, which pays on GPUs; the same up to rounding."}
    )
    logging_steps: int = field(default=20, metadata={"help": "Optimizer steps between two log lines."})
    eval_steps: int = field(
        default=200, metadata={"help": "Optimizer steps between two validations on validation_rows."}
    )
    save_steps: int = field(default=500, metadata={"help": "Optimizer steps between two checkpoints; 0 never."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints kept, the newest; 0: all."})
    report_to: str = field(default="none", metadata={"help": "none, or a tracker of Accelerate such as tensorboard."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint folder, or 'latest' of output_dir."}
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Worker processes where pictures are decoded."})

    def __post_init__(self):
        for name, least in (("per_device_train_batch_size", 1), ("gradient_accumulation_steps", 1),
                            ("gradient_cache_chunk", 0), ("logging_steps", 1), ("eval_steps", 1), ("save_steps", 0),
                            ("save_total_limit", 0), ("dataloader_num_workers", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, not {getattr(self, name)}")
        if self.lr_scheduler_type not in SCHEDULERS:
            raise ValueError(f"--lr_scheduler_type is one of {', '.join(SCHEDULERS)}, not {self.lr_scheduler_type}")
        for name in ("learning_rate", "weight_decay", "warmup_steps"):  # before features, which may take hours
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name} must be at least 0, not {getattr(self, name)}")
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(f"--max_steps must be at least 1, or -1 for --num_train_epochs, not {self.max_steps}")
        if self.max_steps == -1 and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"--num_train_epochs must be above 0, not {self.num_train_epochs}")


@dataclass
class DataArguments:
    """Where the training data comes from."""

    model_name_or_path: str = field(default="", metadata={"help": "Hub name or folder of the model to start from."})
    dataset_name: str = field(
        default="",
        metadata={"help": "Hub name, local folder, or files ('shards/*.tar', 'data.parquet') that `datasets` loads."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on; slices are allowed."})
    validation_rows: int = field(
        default=0, metadata={"help": "Rows held out of training, on which the best weights are chosen; 0: none."}
    )
    feature_cache_gb: float = field(
        default=4.0,
        metadata={
            "help": "Patch states are computed once if they fit into this many GB of a process, else at every step."
        },
    )
    feature_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder that keeps frozen features for the next run on the same data; of stage1.py on rows "
            "that are no stream, and of stage2.py's pictures."
        },
    )
    feature_batch_size: int = field(default=128, metadata={"help": "Pictures a forward pass of the frozen towers."})
    on_bad_image: str = field(default="error", metadata={"help": "error, or skip: go on without unreadable rows."})

    def __post_init__(self):
        for name in ("feature_batch_size", "validation_rows"):
            least = int(name == "feature_batch_size")
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, not {getattr(self, name)}")
        if self.on_bad_image not in ("error", "skip"):
            raise ValueError(f"--on_bad_image must be error or skip, not {self.on_bad_image}")


def _is_list(kind: type) -> bool:
    return any(get_origin(one) is list for one in (kind, *get_args(kind)))


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Every argument once, with its default if it has one, and the description's lines as they are."""

    def _format_action_invocation(self, action: Action) -> str:
        names = [name for name in action.option_strings if "-" not in name[2:]]  # dashes between words are taken, too
        return f"{', '.join(names)} {self._format_args(action, 'VALUE')}".rstrip()

    def _get_help_string(self, action: Action) -> str:
        return action.help if action.default in (None, "") else super()._get_help_string(action)


def parse_arguments(*classes: type, description: str, required: tuple[str, ...] = ()) -> tuple:
    """One dataclass instance each, from `--config recipe.yaml` overridden by flags.

    Raises:
        SystemExit: for unknown flags, unknown keys of the recipe (all named), missing required arguments, or values
            that cannot be.
    """
    usage = "%(prog)s [--config RECIPE] [--argument VALUE ...]"
    parser = HfArgumentParser(
        classes, usage=usage, description=description, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", help="YAML file of arguments; flags override it.")
    for action in parser._actions:
        if action.dest in required:
            action.help = f"{action.help} (required)"
    config = parser.parse_known_args()[0].config
    if config:
        try:
            recipe = yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            parser.error(f"--config {config}: {error}")
        if not isinstance(recipe, dict):
            parser.error(f"--config {config}: holds no arguments, each a key with its value")
        known = {f.name for c in classes for f in fields(c)}
        if unknown := sorted(set(recipe) - known):
            parser.error(f"{config} has unknown keys: {', '.join(unknown)}; known are: {', '.join(sorted(known))}")
        if recipe.get("mixed_precision") is False:
            recipe["mixed_precision"] = "no"  # which YAML takes for a truth value
        lists = {f.name for c in classes for f in fields(c) if _is_list(f.type)}
        for name, value in recipe.items():
            if value is None:
                parser.error(f"{config}: {name} has no value")
            if isinstance(value, dict) or (isinstance(value, list) != (name in lists)):
                parser.error(f"{config}: {name} takes {'a list' if name in lists else 'one value'}, not {value!r}")
        # As text, so that values are checked as flags are, whatever YAML takes them for.
        parser.set_defaults(**{k: v if isinstance(v, list) else str(v) for k, v in recipe.items()})
    found, unknown = parser.parse_known_args()
    values = vars(found)
    if unknown:
        near = get_close_matches(unknown[0].partition("=")[0], [f"--{name}" for name in values], 1)
        hint = f"did you mean {near[0]}? " if near else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; {hint}--help lists all")
    if missing := [name for name in required if not values[name]]:
        parser.error("missing: " + ", ".join(f"--{name}" for name in missing))
    try:
        return tuple(c(**{f.name: values[f.name] for f in fields(c)}) for c in classes)
    except ValueError as error:
        parser.error(str(error))


def run_as_script(main: Callable[[], None]) -> None:
    """`main`, whose `ValueError`s are sentences for the user, as the system's errors are: they end it without a
    traceback."""
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
