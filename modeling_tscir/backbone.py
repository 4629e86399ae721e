"""The frozen backbone: loading any CLIPModel checkpoint, and telling one from another."""

import hashlib

import torch
from transformers import AutoConfig, CLIPModel, PreTrainedConfig

from .configuration_tscir import TSCIRConfig


def backbone_fingerprint(clip: CLIPModel) -> str:
    """Digest of a backbone: names, shapes and sixty-four values of every tensor, in their stored precision."""
    digest = hashlib.sha256()
    for name, tensor in sorted(clip.state_dict().items()):
        if "position_ids" in name:
            continue
        values = tensor.detach().flatten()
        count = min(64, len(values))
        # Whole numbers: torch.linspace rounds beyond the end of a tensor of 2**24 values or more.
        places = [i * (len(values) - 1) // max(1, count - 1) for i in range(count)]
        picked = values[places].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + picked.numpy().tobytes())
    return digest.hexdigest()[:32]


def refuse_other_model_types(path: str, hub: dict) -> None:
    found = PreTrainedConfig.get_config_dict(path, **hub)[0].get("model_type")
    if found == TSCIRConfig.model_type:
        return
    remedy = (
        f"For a plain CLIP use TSCIRModel.from_clip_pretrained({path!r}), then train/stage1.py."
        if found == "clip"
        else "Name a folder that TSCIR's training wrote, or a CLIP for TSCIRModel.from_clip_pretrained."
    )
    raise ValueError(f"{path} holds a model of type {found!r}, not a TSCIR model. {remedy}")


def load_backbone(
    name: str | None, revision: str | None, dtype: torch.dtype, attn_implementation: str | None
) -> tuple[CLIPModel, str, str | None]:
    """A frozen CLIPModel in `dtype`, the fingerprint of its weights as stored, and its commit on the Hub."""
    if not name:
        raise ValueError(
            "this checkpoint holds no backbone and does not name one (backbone_name_or_path in config.json)"
        )
    hub = {"revision": revision} if revision else {}
    try:
        config = AutoConfig.from_pretrained(name, **hub)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the backbone {name!r} (revision {revision}) cannot be found or read: {error}. If it lies elsewhere now, "
            "set backbone_name_or_path in the checkpoint's config.json to that folder or Hub name."
        ) from error
    if config.model_type != "clip":
        remedy = " Load it with TSCIRModel.from_pretrained." if config.model_type == TSCIRConfig.model_type else ""
        raise ValueError(f"{name} holds a model of type {config.model_type!r}, not a CLIPModel.{remedy}")
    attn = {"attn_implementation": attn_implementation} if attn_implementation else {}
    clip = CLIPModel.from_pretrained(name, dtype="auto", use_safetensors=True, **hub, **attn)
    fingerprint = backbone_fingerprint(clip)
    clip = clip.to(dtype).requires_grad_(False)
    return clip, fingerprint, getattr(clip.config, "_commit_hash", None)
