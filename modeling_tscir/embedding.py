"""Frozen features of many images or texts: decoding in threads, batches of one length, memory bounded."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from .images import ImageSource, Selected


TEXTS_A_BATCH = 256
BATCHES_OF_TEXTS = 64  # whose ids are held at once


def batches_ahead(model) -> int:
    """How many batches to decode beside a forward pass: none on a CPU, as both would want all of its cores."""
    return 0 if model.device.type == "cpu" else 2


def prefetched(function: Callable, items: Sequence, ahead: int) -> Iterator:
    """`function` of each item in order, computed in a thread up to `ahead` items early; with 0 when it is due."""
    if ahead == 0:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(function, item) for item in items[:ahead])
        for item in items[ahead:]:
            yield waiting.popleft().result()
            waiting.append(pool.submit(function, item))
        while waiting:
            yield waiting.popleft().result()


def image_batches(
    processor, sources: Sequence[ImageSource], batch_size: int, ahead: int = 0
) -> Iterator[torch.Tensor]:
    """pixel_values [<= batch_size, 3, H, W] of pictures in order, decoded in threads, up to `ahead` batches early.

    `sources` is indexed as it is needed.
    """
    if batch_size < 1:
        raise ValueError(f"a batch needs at least one picture, not {batch_size}")

    def prepare(start: int) -> torch.Tensor:
        rows = range(start, min(start + batch_size, len(sources)))
        return torch.cat(list(pool.map(lambda row: processor.pixel_values([sources[row]]), rows)))

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        yield from prefetched(prepare, range(0, len(sources), batch_size), ahead)


@torch.no_grad()
def embed_images(
    model, processor, sources: Sequence[ImageSource], batch_size: int = 64, progress: bool | str = False
) -> torch.Tensor:
    """L2-normalised image embeddings [len(sources), D], fp32, on the CPU."""
    embeds = torch.empty(len(sources), model.config.clip_config.projection_dim, dtype=torch.float32)
    start = 0
    for pixels in tracked(
        image_batches(processor, sources, batch_size, batches_ahead(model)), len(sources), batch_size, progress
    ):
        features = model.get_image_features(pixels.to(model.device, model.dtype))
        embeds[start : start + len(pixels)] = F.normalize(features.float(), dim=-1).cpu()
        start += len(pixels)
    return embeds


@torch.no_grad()
def embed_images_with_patches(
    model,
    processor,
    sources: Sequence[ImageSource],
    batch_size: int = 64,
    progress: bool | str = False,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Image embeddings [n, D] in fp32 and patch states [n, N, d_v] in `dtype`, on the CPU."""
    embeds, patches, start = None, None, 0
    for pixels in tracked(
        image_batches(processor, sources, batch_size, batches_ahead(model)), len(sources), batch_size, progress
    ):
        image_embeds, patch_states = model.encode_image(pixels.to(model.device, model.dtype))
        if embeds is None:
            embeds = torch.empty(len(sources), image_embeds.shape[1], dtype=torch.float32)
            patches = torch.empty(len(sources), *patch_states.shape[1:], dtype=dtype)
        embeds[start : start + len(pixels)] = image_embeds.float().cpu()
        patches[start : start + len(pixels)] = patch_states.cpu()
        start += len(pixels)
    return embeds, patches


@torch.no_grad()
def embed_texts(
    model, processor, texts: Sequence[str], batch_size: int = TEXTS_A_BATCH, progress: bool | str = False
) -> torch.Tensor:
    """L2-normalised embeddings [len(texts), D] of plain texts, fp32, on the CPU; texts of as many tokens share a
    batch."""
    if batch_size < 1:
        raise ValueError(f"a batch needs at least one text, not {batch_size}")
    embeds = torch.empty(len(texts), model.config.clip_config.projection_dim, dtype=torch.float32)

    def batches() -> Iterator[tuple[list[int], list[list[int]]]]:
        for start in range(0, len(texts), batch_size * BATCHES_OF_TEXTS):
            rows = range(start, min(start + batch_size * BATCHES_OF_TEXTS, len(texts)))
            ids: dict[int, list[int]] = {}
            for first in range(0, len(rows), TEXTS_A_BATCH):  # as long texts have many ids before they are cut
                some = rows[first : first + TEXTS_A_BATCH]
                ids |= zip(some, processor.token_ids([texts[row] for row in some]), strict=True)
            order = sorted(rows, key=lambda row: len(ids[row]))
            for first in range(0, len(order), batch_size):
                batch = order[first : first + batch_size]
                yield batch, [ids[row] for row in batch]

    for rows, ids in tracked(batches(), len(texts), batch_size, progress):
        inputs = {k: v.to(model.device) for k, v in processor.padded(ids).items()}
        features = model.get_text_features(**inputs)
        embeds[torch.tensor(rows)] = F.normalize(features.float(), dim=-1).cpu()
    return embeds


@torch.no_grad()
def embed_references(
    model, processor, sources: Sequence[ImageSource], batch_size: int = 64, progress: bool | str = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Image embeddings [n, D] and pseudo-words [n, M, d_t] (None at stage 0) of references, fp32, on the CPU."""
    embeds, words = [], []
    for pixels in tracked(
        image_batches(processor, sources, batch_size, batches_ahead(model)), len(sources), batch_size, progress
    ):
        image_embeds, pseudo_words = model.encode_reference(pixels.to(model.device, model.dtype))
        if image_embeds.dtype != torch.float32:  # of length 1 but for its own rounding
            image_embeds = F.normalize(image_embeds.float(), dim=-1)
        embeds.append(image_embeds.cpu())
        if pseudo_words is not None:
            words.append(pseudo_words.float().cpu())
    return torch.cat(embeds), torch.cat(words) if words else None


@torch.no_grad()
def embed_queries(
    model,
    processor,
    sources: Sequence[ImageSource],
    references: Sequence[int],
    texts: Sequence[str],
    batch_size: int = 64,
    weight: float | None = None,
    progress: bool | str = False,
    encoded: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    residual: float | None = None,
) -> torch.Tensor:
    """Composed queries [len(texts), D], L2-normalised, fp32, on the CPU.

    Text i changes the picture `sources[references[i]]`. A picture is encoded once, however many texts change it, and
    not at all if none does. Texts of like length share a batch. `weight` and `residual` are
    `TSCIRModel.get_composed_features`'s. `encoded` is what `embed_references` gives for the
    distinct references, in ascending order, where it is known already.
    """
    unique = sorted(set(references))
    row_of = {source: row for row, source in enumerate(unique)}
    rows = [row_of[source] for source in references]
    if encoded is None:
        encoded = embed_references(model, processor, Selected(sources, unique), batch_size, progress)
    image_embeds, words = encoded
    queries = torch.empty(len(texts), image_embeds.shape[1], dtype=torch.float32)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        inputs = {k: v.to(model.device) for k, v in query_inputs(processor, [texts[i] for i in batch]).items()}
        index = torch.tensor([rows[i] for i in batch])
        inputs["image_embeds"] = image_embeds[index].to(model.device, model.dtype)
        if words is not None:
            inputs["pseudo_words"] = words[index].to(model.device, model.dtype)
        queries[torch.tensor(batch)] = (
            model.get_composed_features(**inputs, weight=weight, residual=residual).float().cpu()
        )
    return queries


def query_inputs(processor, texts: list[str]) -> dict[str, torch.Tensor]:
    """The text side of composed queries, as `TSCIRModel.get_composed_features` names it."""
    plain = processor.tokenize(texts)
    return processor.compose(texts) | {
        "modification_ids": plain["input_ids"],
        "modification_mask": plain["attention_mask"],
    }


def tracked(batches: Iterator[torch.Tensor], total: int, batch_size: int, progress: bool | str) -> Iterator:
    description = progress if isinstance(progress, str) else None
    return tqdm(
        batches, desc=description, total=-(-total // batch_size), disable=not progress, unit="batch", leave=False
    )
