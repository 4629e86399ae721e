"""Frozen features on disk, computed once for a backbone, its preprocessing and the pictures or texts they are of."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from .backbone import fingerprint_of_tensors


logger = logging.get_logger(__name__)
# The first number is raised whenever this package decodes or embeds pictures or texts otherwise than before.
MADE_BY = (1, transformers.__version__)


def digest(content) -> str:
    """Thirty-two hexadecimal digits that tell JSON-like content from any other."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


def preprocessing_of(processor) -> dict:
    """Everything of a processor that decides what the vision tower sees."""
    settings = processor.image_processor.to_dict()
    kept = {k: v for k, v in settings.items() if k not in ("auto_map", "image_processor_type", "processor_class")}
    return {"padded_aspect_ratio": processor.padded_aspect_ratio, **kept}


def tokenizer_of(processor) -> list:
    """Everything of a processor that decides what the text tower reads."""
    tokenizer = processor.tokenizer
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {k: v for k, v in settings.items() if k not in ("padding", "truncation")}  # as the last call left them
    return [processor.max_length, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, kept]


def architecture_of(model) -> list:
    """What decides a backbone's features beside its tensors."""
    names = ("hidden_act", "num_attention_heads", "layer_norm_eps", "eos_token_id")
    config = model.config.clip_config
    return [getattr(part, name, None) for part in (config.text_config, config.vision_config) for name in names]


def feature_key(model, processor, content: Sequence) -> str:
    """Fingerprint of backbone, precision, preprocessing, version of this code, and what the features are of.

    Mapper and composing adapters do not count: they never touch frozen features.

    Args:
        content: JSON-like, such as `file_fingerprints` of pictures, or texts with `tokenizer_of` the processor.
    """
    # Of the tensors as they are: those of a checkpoint saved whole may be other than the backbone it was trained with.
    tensors = model.clip.state_dict().items()
    backbone = fingerprint_of_tensors({k.replace(".base_layer", ""): v for k, v in tensors if ".lora_" not in k})
    reader = type(processor.image_processor).__name__  # two of one preprocessing differ by a level or so
    how = [str(model.dtype), architecture_of(model), reader, preprocessing_of(processor), *MADE_BY]
    return digest([backbone, *how, content])


def file_fingerprints(files: Sequence[tuple]) -> list[list]:
    """Path, size and time of change of each file, and what else is given with it (a box that is cut out); of one that
    cannot be reached, as a dead link, its path alone."""
    found = []
    for path, *rest in files:
        try:
            status = os.stat(path)
        except OSError:
            found.append([os.path.abspath(path), *rest])
            continue
        found.append([os.path.abspath(path), status.st_size, status.st_mtime_ns, *rest])
    return found


def state_of(name: str) -> list | str:
    """A file's fingerprint, or the name where there is no such file, as of an address."""
    return file_fingerprints([(name,)]) if os.path.exists(name) else name


def picture_name(picture: dict) -> str:
    """What equal pictures share, still encoded as `datasets` gives them: a digest of the bytes, or the path."""
    content = picture["bytes"]
    return picture["path"] if content is None else hashlib.sha256(content).hexdigest()


def pictures_digest(pictures: Iterable[dict]) -> str:
    """Of many such pictures; files count with their size and time of change."""
    named = ((picture_name(picture), picture["bytes"] is None) for picture in pictures)
    return digest([state_of(name) if a_file else name for name, a_file in named])


def is_cached(folder: str | os.PathLike, key: str) -> bool:
    return os.path.isfile(_path(folder, key))


def cached(folder: str | os.PathLike | None, key: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The tensor kept under `key`, computed and kept if it is not there or cannot be read; no folder, no cache."""
    features = kept(folder, key)
    if features is None:
        features = compute()
        keep(folder, key, features)
    return features


def cached_in_parts(
    folder: str | os.PathLike | None, key: str, count: int, size: int, compute: Callable[[range], torch.Tensor]
) -> torch.Tensor:
    """As `cached`, of `count` rows, `compute` giving `size` of them at a time: what was done before a run was stopped
    is not done again."""
    if count <= size:
        return cached(folder, key, lambda: compute(range(count)))
    if (features := kept(folder, key)) is not None:
        return features
    parts = {f"{key}-{start}-{size}": range(start, min(start + size, count)) for start in range(0, count, size)}
    features = torch.cat([cached(folder, name, partial(compute, rows)) for name, rows in parts.items()])
    keep(folder, key, features)
    if folder is not None and is_cached(folder, key):
        for name in parts:
            with contextlib.suppress(OSError):
                _path(folder, name).unlink(missing_ok=True)
    return features


def kept(folder: str | os.PathLike | None, key: str) -> torch.Tensor | None:
    """The tensor kept under `key`; None if it is not there, or with a warning if it cannot be read."""
    if folder is None or not os.path.isfile(path := _path(folder, key)):  # nor where the folder is closed to us
        return None
    try:
        return load_file(path)["features"]
    except (SafetensorError, KeyError, OSError) as error:
        logger.warning(f"{path} cannot be read ({error}); computing it again")
        return None


def keep(folder: str | os.PathLike | None, key: str, features: torch.Tensor) -> None:
    """Keep a tensor under `key`; a warning where it cannot be written."""
    if folder is None:
        return
    path = _path(folder, key)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        mode = part.stat().st_mode
        save_file({"features": features.contiguous()}, part)
        part.chmod(mode)  # safetensors lets its owner alone read it, and a cache may be shared
        os.replace(part, path)  # never half a file under its name
    except (OSError, SafetensorError) as error:
        logger.warning(f"{path} cannot be written ({error}); the next run computes it again")
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _path(folder: str | os.PathLike, key: str) -> Path:
    return Path(folder) / f"{key}.safetensors"
