"""The Accelerate loop of both stages: steps, log, validation, checkpoints, and what is left when it ends."""

import contextlib
import glob
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, ProjectConfiguration, set_seed
from arguments import LoopArguments
from checkpoints import (
    BACKBONE,
    find_checkpoint,
    keep_only_trained_tensors,
    refuse_code,
    refuse_unwritable_folder,
    refuse_used_folder,
    said_if_full,
    save_best,
    save_checkpoint,
)
from gradients import Objective, backward, compile_towers, hold_frozen_in_bf16
from rows import RowBatches
from stream import StreamBatches
from tqdm.auto import tqdm
from transformers import get_scheduler
from transformers.utils import logging
from validation import Validation

from modeling_tscir import TSCIRModel, TSCIRProcessor
from modeling_tscir.indexing import PATIENCE
from modeling_tscir.publishing import RECORD, read_record, versions


# What may change when a run goes on: it decides neither rows, nor steps, nor what is trained; and data and models may
# have been moved.
FREE_TO_CHANGE = {
    "output_dir", "resume_from_checkpoint", "logging_steps", "eval_steps", "save_steps", "save_total_limit",
    "report_to", "dataloader_num_workers", "feature_cache_gb", "feature_cache_dir", "feature_batch_size",
    "on_bad_image", "dataset_name", "model_name_or_path",
}  # fmt: skip
PROGRESS = "custom_checkpoint_1.pkl"  # by the order in which `train` registers what is kept


class Progress:
    """Optimizer steps done, the best validation so far and time spent, kept in checkpoints.

    Args:
        settings: the run's arguments and what else decides its steps; a checkpoint of others is refused.
    """

    def __init__(self, settings: dict):
        self.settings = {k: v for k, v in settings.items() if k not in FREE_TO_CHANGE}
        self.step, self.best = 0, 0.0
        self.begun, self.before = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        """Of training, runs that were interrupted included."""
        return self.before + time.perf_counter() - self.begun

    def state_dict(self) -> dict:
        return {"step": self.step, "best": self.best, "seconds": self.seconds, "settings": self.settings}

    def load_state_dict(self, state: dict) -> None:
        """Raises `ValueError` for a checkpoint of other arguments, as its schedule and order of rows are those."""
        before = state.get("settings", {})
        changed = [k for k, v in self.settings.items() if before.get(k, v) != v]
        if changed:
            told = ", ".join(f"{k} was {before[k]}, not {self.settings[k]}" for k in changed)
            raise ValueError(f"the checkpoint is of a run with other arguments: {told}; give those, or begin anew")
        self.step, self.best, self.before = state["step"], state["best"], state.get("seconds", 0.0)


def make_accelerator(args: LoopArguments, *others) -> Accelerator:
    """The run's Accelerator, its seed set.

    Args:
        others: the run's further arguments, of data and stage.

    Raises:
        ValueError: if there is no checkpoint to go on from, or one of other arguments, an earlier run's where a new
            one is to begin, or nothing can be written.
    """
    if args.report_to not in ("none", "all", *map(str, get_available_trackers())):
        raise ValueError(
            f"--report_to {args.report_to} is not installed, or not known to Accelerate: nothing is tracked"
        )
    logging.disable_progress_bar()  # a bar for every checkpoint would drown the log
    accelerator = Accelerator(
        # By count alone: a step at the end of a loader's epoch, too, would be out of step with rows and mining.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir, automatic_checkpoint_naming=False),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    args.mixed_precision = accelerator.mixed_precision
    set_seed(args.seed)
    # Before any feature is computed, as that may take hours.
    refuse_unwritable_folder(args.output_dir)
    folder = find_checkpoint(args.output_dir, args.resume_from_checkpoint) if args.resume_from_checkpoint else None
    if folder is None or folder.resolve().parent != Path(args.output_dir).resolve():
        refuse_used_folder(args.output_dir)
    if folder is not None:
        refuse_code(folder)
    if folder is not None and (kept := folder / PROGRESS).is_file():
        told = {k: v for given in (args, *others) for k, v in vars(given).items() if v is not None}
        told["num_processes"] = accelerator.num_processes
        Progress(told).load_state_dict(torch.load(kept, map_location="cpu", weights_only=True))
    accelerator.wait_for_everyone()
    return accelerator


def steps_of(args: LoopArguments, batches: RowBatches | StreamBatches) -> int:
    """Optimizer steps of the whole run; a step that a part of an epoch begins is done."""
    return args.max_steps if args.max_steps > 0 else math.ceil(batches.steps_an_epoch * args.num_train_epochs)


def train(
    accelerator: Accelerator,
    objective: Objective,
    model: TSCIRModel,
    processor: TSCIRProcessor,
    batches: RowBatches | StreamBatches,
    args: LoopArguments,
    record: dict,
    validation: Validation | None = None,
    before_step: Callable[[int], dict[str, float]] | None = None,
    checkpointed: tuple = (),
) -> None:
    """Train `model`'s current stage and write it to `args.output_dir`.

    Args:
        objective: around `model`; its loss's terms are logged.
        batches: this process's, from any step on.
        record: further entries of `training_arguments.json`, as the data's arguments are.
        validation: given on the main process alone; run every `args.eval_steps` and at the end, and the weights of
            the best mean reciprocal rank are kept in `best/`.
        before_step: called with the number of the coming optimizer step, as mining does; what it gives is logged.
        checkpointed: further objects with `state_dict` and `load_state_dict`.
    """
    trained = model.trainable_parameters()
    hold_frozen_in_bf16(model, accelerator)
    if args.torch_compile:
        compile_towers(model)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": args.weight_decay},
            {"params": [p for p in trained.values() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=args.learning_rate,
        betas=(0.9, 0.98),
        fused=accelerator.device.type in ("cpu", "cuda"),
    )
    objective, optimizer = accelerator.prepare(objective, optimizer)
    total = steps_of(args, batches)
    warmup = int(args.warmup_steps * total) if args.warmup_steps < 1 else int(args.warmup_steps)
    if warmup > total:
        accelerator.print(f"--warmup_steps {warmup}: the run has {total} steps, and never comes to --learning_rate")
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup, total)
    settings = record | vars(args)
    for name in [name for name, value in settings.items() if value is None]:
        for holder in (model.config, processor):  # defaults may change: what was not told is kept as what it was
            settings[name] = getattr(holder, name, settings[name])
    for name in ("model_name_or_path", "dataset_name"):
        if any(glob.iglob(settings[name])):  # of this machine, not a name on the Hub
            settings[name] = os.path.abspath(settings[name])
    progress = Progress(settings | batches.size | {"num_processes": accelerator.num_processes})
    before = read_record(settings["model_name_or_path"], model.hub_commit)
    settings |= {} if before is None else {"previous_stage": before}  # which made the model that this one begins with
    accelerator.register_for_checkpointing(scheduler, progress, batches, *checkpointed)
    keep_only_trained_tensors(accelerator, model, trained)
    if args.report_to != "none":
        accelerator.init_trackers("tscir", config=for_trackers(progress.settings | settings))
    if args.resume_from_checkpoint:
        folder = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
        accelerator.load_state(str(folder))
        if progress.step > total:  # as of a checkpoint from before arguments were kept in it
            raise ValueError(f"{folder} is at step {progress.step}, beyond the {total} steps of this run")
        accelerator.print(f"resumed from {folder} at step {progress.step}")
        progress.best = max(progress.best, best_so_far(args.output_dir))
        if not Path(args.output_dir, "best").is_dir():  # as of a run that goes on in a new folder
            progress.best = 0.0
    interrupt, stop = Interrupt(accelerator), False
    bar = tqdm(
        total=total, initial=progress.step, disable=not accelerator.is_main_process, desc=f"stage {model.config.stage}"
    )
    log = Log(accelerator, bar, args)
    model.train()
    micro_step = 0
    stream = batches.from_step(progress.step)
    while progress.step < total and not stop:
        if before_step is not None and micro_step == 0:
            with accelerator.autocast():
                log.add(before_step(progress.step) or {})
        # Keyed by place, so that dropout is the same in a run that was interrupted.
        place = progress.step * args.gradient_accumulation_steps + micro_step
        seed = (args.seed * 1_000_003 + place) * 4099 + accelerator.process_index
        with accelerator.accumulate(objective):
            terms = backward(accelerator, objective, next(stream), args.gradient_cache_chunk, seed)
            if accelerator.sync_gradients:
                limit = args.max_grad_norm if args.max_grad_norm > 0 else float("inf")
                terms["gradient_norm"] = accelerator.clip_grad_norm_(list(trained.values()), limit)
            optimizer.step()
            optimizer.zero_grad()
        log.add(terms)
        micro_step = 0 if accelerator.sync_gradients else micro_step + 1
        if micro_step:
            continue
        scheduler.step()
        progress.step += 1
        log.step(progress.step, scheduler.get_last_lr()[0], last=progress.step == total)
        saving = progress.step == total or (args.save_steps and progress.step % args.save_steps == 0)
        if saving or progress.step % args.logging_steps == 0:
            refuse_no_numbers(accelerator, terms, progress.step)
        if validation is not None and (progress.step % args.eval_steps == 0 or progress.step == total):
            with accelerator.autocast():
                values = validation()
            log.write(progress.step, values)
            if values["validation_mrr"] > progress.best:
                progress.best = values["validation_mrr"]
                with save_best(args.output_dir, model, processor, {"step": progress.step, **values}) as folder:
                    write_record(folder, settings, accelerator, progress)
        saved = None
        if args.save_steps and progress.step % args.save_steps == 0 and progress.step < total:
            saved = save_checkpoint(accelerator, args.output_dir, progress.step, args.save_total_limit)
        stop = interrupt.came_to_any(progress.step)
    interrupted = stop and progress.step < total
    if interrupted:
        if saved is None:
            refuse_no_numbers(accelerator, terms, progress.step)
        folder = saved or save_checkpoint(accelerator, args.output_dir, progress.step, args.save_total_limit)
        accelerator.print(f"interrupted at step {progress.step}; go on with --resume_from_checkpoint {folder}")
    stream.close()  # its workers end, for which it may have to wait
    bar.close()
    interrupt.restore()
    if interrupted:
        sys.exit(130)
    skipped = batches.skipped_images()  # which all processes must ask for
    model.eval()
    if accelerator.is_main_process:
        if model.config.backbone_name_or_path == os.path.join("..", BACKBONE):
            model.config.backbone_name_or_path = BACKBONE
        with said_if_full(args.output_dir, "the trained model", Path(args.output_dir, "unfinished-model")):
            model.save_pretrained(args.output_dir, backbone="reference")
            processor.save_pretrained(args.output_dir)
            write_record(Path(args.output_dir), settings | {"skipped_images": skipped}, accelerator, progress)
    accelerator.print(f"trained {progress.step} steps; written to {args.output_dir}")
    # The process group must not be freed by DDP's destructor, which holds the interpreter's lock while gloo's threads
    # wait for it: a run that had ended would hang.
    del objective, optimizer
    accelerator.free_memory()
    accelerator.end_training()


def for_trackers(settings: dict) -> dict[str, bool | int | float | str]:
    """A run's settings as every tracker takes them: a list as a text, and of the stage before nothing."""
    told = {name: " ".join(value) if isinstance(value, (list, tuple)) else value for name, value in settings.items()}
    return {name: value for name, value in told.items() if isinstance(value, (bool, int, float, str))}


def refuse_no_numbers(accelerator: Accelerator, terms: dict[str, torch.Tensor], step: int) -> None:
    """Raise `ValueError` for a loss or a gradient that training cannot come back from."""
    for what, value in (("loss", terms["loss"]), ("gradient's norm", terms["gradient_norm"])):
        # A scaler leaves steps of such a gradient out.
        if not torch.isfinite(value) and (what == "loss" or accelerator.scaler is None):
            raise ValueError(
                f"the {what} of step {step} is {value.item()}: nothing is written, and checkpoints from before stay; "
                "lower --learning_rate, or train in fp32 or bf16"
            )


def best_so_far(output_dir: str) -> float:
    """The validation of the weights in `best/`, which may be of a step behind the checkpoint that is gone on from."""
    path = Path(output_dir, "best", "validation.json")
    return json.loads(path.read_text(encoding="utf-8"))["validation_mrr"] if path.is_file() else 0.0


def write_record(folder: Path, settings: dict, accelerator: Accelerator, progress: Progress) -> None:
    """`training_arguments.json`: everything that somebody needs to train the same again, and a card to tell of it."""
    record = settings | {"num_processes": accelerator.num_processes}
    record |= {"hours": progress.seconds / 3600, "hardware": hardware(accelerator), "versions": versions()}
    (folder / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")


def hardware(accelerator: Accelerator) -> str:
    """What a run was computed on, in words."""
    if accelerator.device.type == "cuda":
        return f"{accelerator.num_processes} x {torch.cuda.get_device_name(accelerator.device)}"
    count = accelerator.num_processes
    return f"{count} process{'es' if count > 1 else ''} of {torch.get_num_threads()} threads, CPU {cpu_name()}"


def cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


class Interrupt:
    """Ctrl-C or SIGTERM ends the run behind a step; a second Ctrl-C stops at once."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.came = accelerator, False
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number, frame):
        self.came = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def came_to_any(self, step: int) -> bool:
        """Whether it came to any process: the same in all, so that none waits for one that has left the loop. Several
        ask each other every tenth step, as they wait for their devices to do so."""
        if self.accelerator.num_processes == 1:
            return self.came
        if step % 10:
            return False
        came = torch.tensor(float(self.came), device=self.accelerator.device)
        return bool(self.accelerator.reduce(came, "sum").item())


class Log:
    """Averages of every term between two log lines, with learning rate and throughput, on screen and in trackers."""

    def __init__(self, accelerator: Accelerator, bar: tqdm, args: LoopArguments):
        self.accelerator, self.bar, self.args = accelerator, bar, args
        self.rows_a_step = (
            args.per_device_train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        )
        self._restart()

    def _restart(self) -> None:
        self.values: dict[str, list] = {}
        self.steps, self.start = 0, time.perf_counter()

    def add(self, terms: dict) -> None:
        """Terms of a batch; tensors stay where they are until a line is due, so that no device is waited for."""
        for name, value in terms.items():
            self.values.setdefault(name, []).append(value.detach() if torch.is_tensor(value) else value)

    def step(self, step: int, learning_rate: float, last: bool) -> None:
        self.steps += 1
        self.bar.update()
        if step % self.args.logging_steps and not last:
            return
        means = {name: float(sum(values) / len(values)) for name, values in self.values.items()}
        seconds = time.perf_counter() - self.start
        self.write(
            step, means | {"learning_rate": learning_rate, "rows_per_second": self.steps * self.rows_a_step / seconds}
        )
        self._restart()

    def write(self, step: int, values: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            line = "  ".join(f"{k} {v:.3g}" for k, v in values.items())
            self.bar.write(f"step {step}  {line}", file=sys.stderr)
        self.accelerator.log(values, step=step)
