"""The frozen backbone: loading any CLIPModel checkpoint, and telling one from another."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, CLIPModel, PreTrainedConfig
from transformers.utils import cached_file, logging

from .configuration_tscir import TSCIRConfig


# The modules that a checkpoint's folder may ask for.
CODE = (
    "configuration_tscir",
    "modeling_tscir",
    "processing_tscir",
    "pipeline_tscir",
)
logger = logging.get_logger(__name__)


def backbone_fingerprint(clip: CLIPModel) -> str:
    """Digest of a backbone: names, shapes and sixty-four values of every tensor, in their stored precision."""
    return fingerprint_of_tensors(clip.state_dict())


def fingerprint_of_tensors(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if "position_ids" in name:
            continue
        values = tensor.detach().flatten()
        count = min(64, len(values))
        # Whole numbers: torch.linspace rounds beyond the end of a tensor of 2**24 values or more.
        places = [i * (len(values) - 1) // max(1, count - 1) for i in range(count)]
        picked = values[places].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + picked.numpy().tobytes())
    return digest.hexdigest()[:32]


class ModelNotFoundError(OSError, ValueError):
    """There is no such model: an OSError for callers of `from_pretrained`, a sentence like any other for scripts."""


def refuse_other_models(path: str, hub: dict) -> None:
    """Raise `ValueError` unless `path` has a TSCIR configuration that asks for no code but its own."""
    if not os.path.isdir(path) and (os.path.isabs(path) or path.startswith(".") or path.count("/") > 1):
        raise ModelNotFoundError(f"there is no folder {path}")
    try:
        content = PreTrainedConfig.get_config_dict(path, **hub)[0]
    except OSError as error:
        raise ModelNotFoundError(f"the model {path!r} cannot be found or read: {why_not(path, error)}") from error
    place = os.path.join(path, hub.get("subfolder") or "")
    if not content:
        raise ValueError(f"there is no config.json in {place}; name what TSCIR's training wrote")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: its config.json is no model's configuration")
    found = content.get("model_type")
    if found == TSCIRConfig.model_type:
        refuse_foreign_code(path, content)
        return
    remedy = (
        f"For a plain CLIP use TSCIRModel.from_clip_pretrained({path!r}), then train/stage1.py."
        if found == "clip"
        else "Name a folder that TSCIR's training wrote, or a CLIP for TSCIRModel.from_clip_pretrained."
    )
    raise ValueError(f"{place} holds a model of type {found!r}, not a TSCIR model. {remedy}")


def refuse_foreign_code(path: str, config: dict) -> None:
    """A checkpoint's code lies beside it; one that names another repository's or another module is refused."""
    named = {}
    try:
        named |= dict(config.get("auto_map") or {})
        named |= {task: entry.get("impl") for task, entry in (config.get("custom_pipelines") or {}).items()}
        parts = [config, *(part for part in config.values() if isinstance(part, dict))]
        parts += [part for part in (config.get("clip_config") or {}).values() if isinstance(part, dict)]
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its config.json is no model's configuration: {error!r}") from error
    for part in parts:  # a kernel of the Hub's is code, too
        for name in ("attn_implementation", "_attn_implementation"):
            if "/" in str(part.get(name) or ""):
                named[name] = part[name]
    for name, code in named.items():
        for place in code if isinstance(code, (list, tuple)) else [code]:
            if place is not None and str(place).removeprefix(f"{path}--").split(".")[0] not in CODE:
                raise ValueError(
                    f"{path}: its config.json wants code from {place!r} ({name}), which is not this model's own; "
                    "nothing was loaded. Take that entry out, or use a checkpoint of a source you trust."
                )


@contextlib.contextmanager
def told_of_damage(path: str) -> Iterator[None]:
    """Errors of reading weights as `ValueError`, with what to do."""
    try:
        yield
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: its weights are damaged ({error}); fetch or write them again") from error


def refuse_other_forms(path: str, hub: dict) -> None:
    """Raise `ValueError` if an index of shards names anything but safetensors."""
    index = cached_file(
        path,
        "model.safetensors.index.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )
    if index is None:
        return
    try:
        names = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of weights: {error!r}") from error
    other = sorted(str(name) for name in names if not str(name).endswith(".safetensors"))
    if other:
        raise ValueError(f"{index} names {other[0]!r}; weights are read from safetensors alone")


def commit_of(cached: str) -> str | None:
    """The commit in the name of a file in the Hub's cache: .../snapshots/COMMIT/config.json."""
    folder = Path(cached).parent
    return folder.name if folder.parent.name == "snapshots" else None


def why_not(name: str, error: Exception) -> str:
    """In a sentence why a model cannot be read; what looks like a path and is none has little to do with the Hub."""
    if not os.path.exists(name) and (name.startswith((".", "~", os.sep)) or name.count("/") > 1):
        return f"there is no folder {name}"
    told = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    if os.path.exists(name) or "local folder" in told:
        return told
    return f"there is no folder {name} here, and from the Hub: {told}"


class BackboneNotFoundError(ValueError):
    """The backbone is not where it should be."""


def load_backbone(
    name: str | None, revision: str | None, dtype: torch.dtype, attn_implementation: str | None, **hub
) -> tuple[CLIPModel, str, str | None]:
    """A frozen CLIPModel in `dtype`, the fingerprint of its weights as stored, and its commit on the Hub.

    Args:
        hub: further arguments of `from_pretrained`: token, cache_dir, local_files_only.
    """
    if not name:
        raise ValueError(
            "this checkpoint holds no backbone and does not name one (backbone_name_or_path in config.json)"
        )
    hub |= {"revision": revision} if revision else {}
    try:
        config = AutoConfig.from_pretrained(name, **hub)
    except (OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise BackboneNotFoundError(
            f"the CLIP {name!r}{at} cannot be found or read: {why_not(name, error)}"
        ) from error
    if config.model_type != "clip":
        remedy = ""
        if config.model_type == TSCIRConfig.model_type:
            remedy = " TSCIRModel.from_pretrained loads it, and train/stage2.py goes on with it."
        raise ValueError(f"{name} holds a model of type {config.model_type!r}, not a CLIPModel.{remedy}")
    attn = {"attn_implementation": attn_implementation} if attn_implementation else {}
    refuse_other_forms(name, hub)
    try:
        with told_of_damage(name):
            clip, info = CLIPModel.from_pretrained(
                name, dtype="auto", use_safetensors=True, output_loading_info=True, **hub, **attn
            )
    except OSError as error:
        raise ValueError(
            f"{name} has no weights in safetensors, the one form that is read: {error} If you trust its pickle, write "
            f"it again with CLIPModel.from_pretrained({name!r}).save_pretrained(FOLDER), processor beside it."
        ) from error
    if lacking := sorted(info["missing_keys"]):
        raise ValueError(f"{name} lacks tensors of a CLIPModel: {lacking[:5]} (of {len(lacking)}); fetch it again")
    fingerprint = backbone_fingerprint(clip)
    clip = clip.to(dtype).requires_grad_(False)
    return clip, fingerprint, None if os.path.isdir(name) else commit_of(cached_file(name, "config.json", **hub))
