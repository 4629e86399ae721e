"""Gallery embeddings on disk, computed once for a backbone, its preprocessing and a list of files."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from modeling_tscir import __version__
from modeling_tscir.backbone import backbone_fingerprint


logger = logging.get_logger(__name__)
DEFAULT_FOLDER = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tscir"


def digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


def preprocessing_of(processor) -> dict:
    """Everything of a processor that decides what the vision tower sees."""
    settings = processor.image_processor.to_dict()
    kept = {k: v for k, v in settings.items() if k not in ("auto_map", "image_processor_type", "processor_class")}
    return {"padded_aspect_ratio": processor.padded_aspect_ratio, **kept}


def cache_key(model, processor, files: list[tuple[str, ...]]) -> str:
    """Fingerprint of backbone, precision, preprocessing, package version, and the files' sizes and times of change.

    Mapper and composing adapters do not count: they never touch a gallery's embeddings.
    """
    sources = []
    for path, *rest in files:
        status = os.stat(path)
        sources.append([os.path.abspath(path), status.st_size, status.st_mtime_ns, *rest])
    backbone = model.config.backbone_fingerprint or backbone_fingerprint(model.clip)
    return digest([backbone, str(model.dtype), preprocessing_of(processor), __version__, sources])


def is_cached(folder: Path, key: str) -> bool:
    return (Path(folder) / f"{key}.safetensors").is_file()


def cached(folder: Path, key: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The tensor kept under `key`, computed and kept if it is not there or cannot be read."""
    path = Path(folder) / f"{key}.safetensors"
    if is_cached(folder, key):
        try:
            return load_file(path)["embeds"]
        except (SafetensorError, KeyError, OSError) as error:
            logger.warning(f"{path} cannot be read ({error}); computing it again")
    embeds = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as part:
        pass
    try:
        save_file({"embeds": embeds.contiguous()}, part.name)
        os.replace(part.name, path)
    finally:
        Path(part.name).unlink(missing_ok=True)
    return embeds
