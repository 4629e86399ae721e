"""Checkpoints of a run: what is trained, with the state to go on from; written aside and moved into place."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from modeling_tscir import TSCIRModel, TSCIRProcessor
from modeling_tscir.backbone import fingerprint_of_tensors
from modeling_tscir.checkpoint import DELTA_NAME


BACKBONE = "backbone"


def keep_only_trained_tensors(accelerator: Accelerator, model: TSCIRModel, trained: dict[str, nn.Parameter]) -> None:
    """Leave the frozen backbone out of checkpoints: they hold what `save_pretrained` writes by reference."""

    def save(models, weights, output_dir):
        if accelerator.is_main_process:
            model.save_pretrained(output_dir, backbone="reference")
        weights.clear()

    def load(models, input_dir):
        models.clear()
        tensors = load_file(Path(input_dir, DELTA_NAME))
        refuse_another_start(Path(input_dir), model, {n: t for n, t in tensors.items() if n not in trained})
        if {n: t.shape for n, t in tensors.items() if n in trained} != {n: p.shape for n, p in trained.items()}:
            raise ValueError(
                f"{input_dir} holds other tensors than this run trains; give the arguments it was begun with"
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(tensors[name])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def refuse_another_start(checkpoint: Path, model: TSCIRModel, frozen: dict[str, torch.Tensor]) -> None:
    """Raise `ValueError` where a run that goes on began with another CLIP, or another mapper, than this model has."""
    before = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("backbone_fingerprint")
    now, own = model.config.backbone_fingerprint, model.state_dict()
    other = "CLIP" if before and now and before != now else None
    if any(n in own and not torch.equal(own[n].cpu(), t.to(own[n].dtype)) for n, t in frozen.items()):
        other = "mapper"
    if other is not None:
        raise ValueError(
            f"{checkpoint} was trained from another {other} than --model_name_or_path has now; give the model that "
            "the run was begun with, or begin anew"
        )


def refuse_code(checkpoint: Path) -> None:
    """Raise `ValueError` for state that is more than tensors and plain values: Accelerate would run what it says."""
    for path in sorted(checkpoint.glob("custom_checkpoint_*.pkl")):
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever torch makes of bytes that are none of its own
            raise ValueError(f"{path} is damaged, or holds more than tensors and plain values") from error


def keep_backbone(accelerator: Accelerator, model: TSCIRModel, output_dir: str) -> None:
    """Write the backbone of a model loaded whole to `output_dir`/backbone, unless it is what is found by its name.

    What is trained is written by reference to it, and would not load, or with other weights than it was trained on.
    """
    name, folder = model.config.backbone_name_or_path, Path(output_dir, BACKBONE)
    # Less the composing adapters, which a model of stage II has there already.
    state = model.clip.state_dict().items()
    tensors = {name.replace(".base_layer", ""): tensor for name, tensor in state if ".lora_" not in name}
    fingerprint = fingerprint_of_tensors(tensors)
    is_named = model.config.backbone_fingerprint in (None, fingerprint)
    if is_named and name and (os.path.isdir(name) or not os.path.isabs(name)):
        return
    if accelerator.is_main_process:
        aside = folder.with_name(f"unfinished-{BACKBONE}")
        with said_if_full(output_dir, "the backbone", aside):
            model.clip.save_pretrained(aside, state_dict=dict(tensors))
        shutil.rmtree(folder, ignore_errors=True)  # of another run
        os.replace(aside, folder)
    accelerator.wait_for_everyone()
    model.config.backbone_name_or_path = os.path.join("..", BACKBONE)  # from checkpoints, so that all may be moved
    model.config.backbone_revision, model.config.backbone_fingerprint = None, fingerprint


@contextlib.contextmanager
def said_if_full(output_dir: str, what: str, aside: Path) -> Iterator[None]:
    """`SystemExit` saying why `what` could not be written, as on a full disk; what was written before stays."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        free = shutil.disk_usage(output_dir).free / 2**20
        shutil.rmtree(aside, ignore_errors=True)
        kept = list_checkpoints(output_dir)
        raise SystemExit(
            f"error: {what} could not be written: {error}\n"
            f"{output_dir} has {free:.0f} MiB free. "
            "Make room, then go on with --resume_from_checkpoint latest; the last good one is "
            f"{kept[-1] if kept else 'none'}"
        ) from error


@contextlib.contextmanager
def save_best(output_dir: str, model: TSCIRModel, processor: TSCIRProcessor, validation: dict) -> Iterator[Path]:
    """Write model, processor and `validation.json`, and what the caller adds to the folder it is given, to `best/`:
    aside first, then moved into place.

    Raises:
        SystemExit: as `save_checkpoint`.
    """
    final, aside, old = (Path(output_dir, name) for name in ("best", "unfinished-best", "replaced-best"))
    shutil.rmtree(aside, ignore_errors=True)
    with said_if_full(output_dir, f"the best weights, of step {validation['step']},", aside):
        model.save_pretrained(aside, backbone="reference")
        processor.save_pretrained(aside)
        (aside / "validation.json").write_text(json.dumps(validation, indent=2), encoding="utf-8")
        yield aside
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(aside, final)
    shutil.rmtree(old, ignore_errors=True)


def save_checkpoint(accelerator: Accelerator, output_dir: str, step: int, limit: int) -> Path:
    """Write `checkpoint-STEP` aside and move it into place, then drop the oldest beyond `limit`.

    Raises:
        SystemExit: saying why it could not be written, as on a full disk; checkpoints from before stay as they are.
    """
    final = Path(output_dir, f"checkpoint-{step}")
    aside = final.with_name(f"unfinished-{final.name}")
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    accelerator.wait_for_everyone()
    with said_if_full(output_dir, f"the checkpoint of step {step}", aside):
        accelerator.save_state(str(aside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        remove_replaced(output_dir)  # of a run that was killed as it did
        if final.exists():  # of before, where an earlier one was gone on from
            os.replace(final, replaced(final))
        os.replace(aside, final)
        # Later ones too, where an earlier was gone on from.
        others = [path for path in list_checkpoints(output_dir) if path != final]
        for old in others[: max(0, len(others) - limit + 1)] if limit > 0 else []:
            os.replace(old, replaced(old))
        remove_replaced(output_dir)
    accelerator.wait_for_everyone()
    return final


def replaced(checkpoint: Path) -> Path:
    """Where a checkpoint waits to be removed, so that half of it is never taken for one."""
    aside = checkpoint.with_name(f"replaced-{checkpoint.name}")
    while os.path.lexists(aside):  # one of before, which could not be removed
        aside = aside.with_name(f"{aside.name}-again")
    return aside


def remove_replaced(output_dir: str) -> None:
    for folder in Path(output_dir).glob("replaced-checkpoint-*"):
        shutil.rmtree(folder, ignore_errors=True)  # the next time, where a network's disk holds it still


def list_checkpoints(output_dir: str) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def refuse_unwritable_folder(output_dir: str) -> None:
    """Raise `ValueError` if nothing can be written there, which would otherwise be found at the first checkpoint."""
    folder = Path(output_dir).absolute()
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        why = "may not be written to" if nearest.is_dir() else "is no folder"
        raise ValueError(f"--output_dir {output_dir} cannot be used: {nearest} {why}; name another")


def refuse_used_folder(output_dir: str) -> None:
    """Raise `ValueError` if a new run would begin among an earlier run's files, or write over a model."""
    checkpoints = list_checkpoints(output_dir)
    found = [p.name for p in (*checkpoints, Path(output_dir, "best")) if p.exists()]
    if found:
        remedy = "go on with it by --resume_from_checkpoint latest, " if checkpoints else ""  # the best alone is none
        raise ValueError(
            f"{output_dir} holds {', '.join(found)} of an earlier run: {remedy}choose another --output_dir, or remove "
            f"{'them' if len(found) > 1 else 'it'}"
        )
    if Path(output_dir, "config.json").is_file():
        raise ValueError(
            f"{output_dir} holds a model, which this run would write over: choose another --output_dir, or remove it"
        )


def find_checkpoint(output_dir: str, wanted: str) -> Path:
    """The folder of a checkpoint, or of the newest one. Raises `ValueError` where there is none."""
    if wanted != "latest":
        if not Path(wanted, DELTA_NAME).is_file() or not list(Path(wanted).glob("random_states_*")):
            within = list_checkpoints(wanted)
            hint = f"; the newest below it is {within[-1]}" if within else ""
            raise ValueError(f"--resume_from_checkpoint {wanted} is no checkpoint{hint}")
        return Path(wanted)
    found = list_checkpoints(output_dir)
    if not found:
        raise ValueError(
            f"{output_dir} holds no checkpoint to resume from; one is written every --save_steps steps, and at Ctrl-C"
        )
    return found[-1]
