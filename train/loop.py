"""What both stages share: arguments, data loading, and the Accelerate loop with its checkpoints."""

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import ProjectConfiguration, set_seed
from checkpoints import find_checkpoint, keep_only_trained_tensors, save_checkpoint
from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from torch import nn
from tqdm.auto import tqdm
from transformers import HfArgumentParser, get_scheduler
from transformers.utils import logging

from modeling_tscir import TSCIRModel, TSCIRProcessor
from modeling_tscir.images import find_bad_images, handle_bad_images


@dataclass
class LoopArguments:
    """Names are transformers' TrainingArguments'. Differing defaults: seed 0, mixed_precision by its own name."""

    output_dir: str = field(default="", metadata={"help": "Where the trained folder and its checkpoints go."})
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Rows a process takes per step."})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Steps whose gradients are averaged. Does not enlarge the set of negatives."}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Highest learning rate of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay, on matrices alone."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Any scheduler of transformers."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warm-up, or a share of all if below 1."})
    num_train_epochs: int = field(default=10, metadata={"help": "Passes over the data, unless max_steps is given."})
    max_steps: int = field(default=-1, metadata={"help": "Optimizer steps in all; -1 leaves it to num_train_epochs."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm; 0 never."})
    seed: int = field(default=0, metadata={"help": "Of initialisation, order of data and dropout."})
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16 autocast."})
    logging_steps: int = field(default=20, metadata={"help": "Optimizer steps between two log lines."})
    save_steps: int = field(default=500, metadata={"help": "Optimizer steps between two checkpoints; 0 never."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints kept."})
    report_to: str = field(default="none", metadata={"help": "none, or a tracker of Accelerate such as tensorboard."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint folder, or 'latest' of output_dir."}
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Worker processes where pictures are decoded."})


@dataclass
class DataArguments:
    """Where the training data comes from."""

    model_name_or_path: str = field(default="", metadata={"help": "Hub name or folder of the model to start from."})
    dataset_name: str = field(default="", metadata={"help": "Hub name or local folder that `datasets` can load."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on; slices are allowed."})
    feature_cache_gb: float = field(
        default=4.0,
        metadata={"help": "Patch states are computed once if they fit into this many GB, else again at every step."},
    )
    feature_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder that keeps embeddings of pictures and captions for the next run on the same data."},
    )
    feature_batch_size: int = field(default=128, metadata={"help": "Pictures a forward pass of the frozen towers."})
    on_bad_image: str = field(default="error", metadata={"help": "error, or skip: go on without unreadable pictures."})


def parse_arguments(*classes: type, description: str, required: tuple[str, ...] = ()) -> tuple:
    """One dataclass instance each, from `--config recipe.yaml` overridden by flags.

    Raises:
        SystemExit: for unknown flags, unknown keys of the recipe (all named), or missing required arguments.
    """
    parser = HfArgumentParser(classes, description=description, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of arguments; flags override it.")
    config = parser.parse_known_args()[0].config
    if config:
        try:
            recipe = yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            parser.error(f"--config {config}: {error}")
        known = {f.name for c in classes for f in fields(c)}
        if unknown := sorted(set(recipe) - known):
            parser.error(f"{config} has unknown keys: {', '.join(unknown)}; known are: {', '.join(sorted(known))}")
        parser.set_defaults(**recipe)
    values = vars(parser.parse_args())
    if missing := [name for name in required if not values[name]]:
        parser.error("missing: " + ", ".join(f"--{name}" for name in missing))
    return tuple(c(**{f.name: values[f.name] for f in fields(c)}) for c in classes)


def load_rows(
    data: DataArguments, columns: dict[str, str], images: list[str]
) -> tuple[Dataset, list[tuple[str, str]]]:
    """The training split with its pictures still encoded, every picture checked, and (where, why) of those skipped.

    Args:
        columns: needed column and what it holds, for the error that names what is missing.
        images: those of them that are pictures.

    Raises:
        ValueError: for missing columns or an empty split. BadImagesError: naming every unreadable picture.
    """
    # datasets keeps a stale copy of a local folder whose README names configurations (seen in 5.2).
    local = data.dataset_config is not None and Path(data.dataset_name).is_dir()
    fresh = {"download_mode": "force_redownload", "verification_mode": "no_checks"} if local else {}
    rows = load_dataset(data.dataset_name, data.dataset_config, split=data.dataset_train_split, **fresh)
    missing = [f"{name} ({what})" for name, what in columns.items() if name not in rows.column_names]
    if missing:
        raise ValueError(f"{data.dataset_name} lacks columns {missing}; it has {rows.column_names}")
    if len(rows) == 0:
        raise ValueError(f"{data.dataset_name}, split {data.dataset_train_split}, has no rows")
    bad: list[tuple[str, str]] = []
    for column in images:
        rows = rows.cast_column(column, ImageFeature(decode=False))
        bad += find_bad_images(rows[column], [f"row {i}, column {column}" for i in range(len(rows))])
    handle_bad_images(bad, len(rows) * len(images), data.on_bad_image)
    skipped = {int(name.split()[1].rstrip(",")) for name, _ in bad}
    return (rows.select([i for i in range(len(rows)) if i not in skipped]) if skipped else rows), bad


class GroupedBatches:
    """Batches of row numbers, shuffled by (seed, epoch) alone; rows of a group share one. None is incomplete.

    The loop sets `epoch`. There is no `set_epoch`, as Accelerate would call it with a count that restarts on resuming.

    Args:
        groups: a group's name for every row, or None where every row stands alone.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int, groups: list | None = None):
        if num_rows < batch_size:
            raise ValueError(
                f"{num_rows} rows do not fill a batch of {batch_size}; lower --per_device_train_batch_size"
            )
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        members: dict = {}
        for row, group in enumerate(groups if groups is not None else range(num_rows)):
            members.setdefault(group, []).append(row)
        self.members = list(members.values())
        self.num_rows = num_rows
        self.drop_last = True

    def __len__(self) -> int:
        return self.num_rows // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.members), generator=generator).tolist()
        rows = [row for i in order for row in self.members[i]]
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield rows[start : start + self.batch_size]


def gather_with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """Rows of all processes, in the order of ranks; gradients flow back to the process they came from."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    if not tensor.is_floating_point():
        parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)
    import torch.distributed.nn.functional as dist

    return torch.cat(dist.all_gather(tensor.contiguous()))


def whole_batch(batch: dict) -> dict:
    return batch  # the dataset makes whole batches


class Progress:
    """Optimizer steps done, kept in checkpoints."""

    def __init__(self):
        self.step = 0

    def state_dict(self) -> dict:
        return {"step": self.step}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]


def make_accelerator(args: LoopArguments) -> Accelerator:
    logging.disable_progress_bar()  # a bar for every checkpoint would drown the log
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir, automatic_checkpoint_naming=False),
    )
    set_seed(args.seed)
    return accelerator


def train(
    accelerator: Accelerator,
    objective: nn.Module,
    model: TSCIRModel,
    processor: TSCIRProcessor,
    dataset: torch.utils.data.Dataset,
    args: LoopArguments,
    skipped_images: list[tuple[str, str]],
    groups: list | None = None,
    before_step: Callable[[int], None] | None = None,
    checkpointed: tuple = (),
) -> None:
    """Train `model`'s current stage and write it to `args.output_dir`.

    Args:
        objective: a module around `model`; called with a batch, it returns scalars by name. "loss" is minimised, and
            all are logged.
        dataset: gives a whole batch for a list of row numbers, by `__getitems__`.
        skipped_images: (where, why) of pictures left out, for the record.
        groups: a name for every row; rows of one name share a batch.
        before_step: called with the number of the coming optimizer step, as mining does.
        checkpointed: further objects with `state_dict` and `load_state_dict`.
    """
    sampler = GroupedBatches(len(dataset), args.per_device_train_batch_size, args.seed, groups)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=whole_batch,
        num_workers=args.dataloader_num_workers,
    )
    trained = model.trainable_parameters()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": args.weight_decay},
            {"params": [p for p in trained.values() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=args.learning_rate,
        betas=(0.9, 0.98),
    )
    objective, optimizer, loader = accelerator.prepare(objective, optimizer, loader)
    steps_an_epoch = max(1, len(loader) // args.gradient_accumulation_steps)
    total = args.max_steps if args.max_steps > 0 else steps_an_epoch * args.num_train_epochs
    warmup = int(args.warmup_steps * total) if args.warmup_steps < 1 else int(args.warmup_steps)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup, total)
    progress = Progress()
    accelerator.register_for_checkpointing(scheduler, progress, *checkpointed)
    keep_only_trained_tensors(accelerator, model, trained)
    if args.report_to != "none":
        accelerator.init_trackers("tscir", config={k: v for k, v in vars(args).items() if v is not None})
    if args.resume_from_checkpoint:
        folder = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
        accelerator.load_state(str(folder))
        accelerator.print(f"resumed from {folder} at step {progress.step}")
    interrupted = Interrupt()
    bar = tqdm(
        total=total, initial=progress.step, disable=not accelerator.is_main_process, desc=f"stage {model.config.stage}"
    )
    log = Log(accelerator, bar, args)
    while progress.step < total and not interrupted:
        epoch, done = divmod(progress.step, steps_an_epoch)
        sampler.epoch = epoch
        model.train()
        batches = skip_first_batches(loader, done * args.gradient_accumulation_steps) if done else loader
        for number, batch in enumerate(batches):
            # Rows that do not fill a last accumulated step are left for the next epoch's shuffle.
            if number // args.gradient_accumulation_steps + done >= steps_an_epoch:
                break
            # Keyed by place, so that dropout is the same in a run that was interrupted.
            place = progress.step * args.gradient_accumulation_steps + number % args.gradient_accumulation_steps
            torch.manual_seed((args.seed * 1_000_003 + place) * 4099 + accelerator.process_index)
            if before_step is not None and number % args.gradient_accumulation_steps == 0:
                before_step(progress.step)
            with accelerator.accumulate(objective):
                with accelerator.autocast():
                    terms = objective(batch)
                accelerator.backward(terms["loss"])
                if accelerator.sync_gradients and args.max_grad_norm > 0:
                    accelerator.clip_grad_norm_(list(trained.values()), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            scheduler.step()
            progress.step += 1
            log.step(progress.step, terms, scheduler.get_last_lr()[0])
            if args.save_steps and progress.step % args.save_steps == 0 and progress.step < total:
                save_checkpoint(accelerator, args.output_dir, progress.step, args.save_total_limit)
            if interrupted or progress.step >= total:
                break
    bar.close()
    interrupted.restore()
    if interrupted and progress.step < total:
        folder = save_checkpoint(accelerator, args.output_dir, progress.step, args.save_total_limit)
        accelerator.print(f"interrupted at step {progress.step}; go on with --resume_from_checkpoint {folder}")
        sys.exit(130)
    accelerator.wait_for_everyone()
    model.eval()
    if accelerator.is_main_process:
        model.save_pretrained(args.output_dir, backbone="reference")
        processor.save_pretrained(args.output_dir)
        settings = vars(args) | {"num_processes": accelerator.num_processes, "skipped_images": skipped_images}
        Path(args.output_dir, "training_arguments.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    accelerator.end_training()


class Interrupt:
    """True once Ctrl-C or SIGTERM came; a second Ctrl-C stops at once."""

    def __init__(self):
        self.came = False
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number, frame):
        self.came = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.came


class Log:
    """Averages of every term between two log lines, with learning rate and throughput, on screen and in trackers."""

    def __init__(self, accelerator: Accelerator, bar: tqdm, args: LoopArguments):
        self.accelerator, self.bar, self.args = accelerator, bar, args
        self.rows_a_step = (
            args.per_device_train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        )
        self._restart()

    def _restart(self) -> None:
        self.sums: dict[str, float] = {}
        self.count, self.start = 0, time.perf_counter()

    def step(self, step: int, terms: dict[str, torch.Tensor], learning_rate: float) -> None:
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach() if torch.is_tensor(value) else value)
        self.count += 1
        self.bar.update()
        if step % self.args.logging_steps:
            return
        values = {name: total / self.count for name, total in self.sums.items()}
        values |= {
            "learning_rate": learning_rate,
            "rows_per_second": self.count * self.rows_a_step / (time.perf_counter() - self.start),
        }
        if self.accelerator.is_main_process:
            line = "  ".join(f"{k} {v:.3g}" for k, v in values.items())
            self.bar.write(f"step {step}  {line}", file=sys.stderr)
        self.accelerator.log(values, step=step)
        self._restart()
