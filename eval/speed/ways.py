"""Every work in our way, in the peers' way with and without each lever, and its limit.

A way is a function of a `Setting` that prepares everything and gives what is timed: one call is one measurement.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from gradients import backward, compile_towers, hold_frozen_in_bf16
from harness import rank
from mining import Miner
from peers import FineTuningStep, Levers, LincirStep, Peer, Pic2WordStep, ranked
from setting import Setting  # a neighbour, which puts train/ and eval/ on the path
from splits import Split
from stage1 import Stage1Objective
from stage2 import Stage2Objective
from transformers.masking_utils import create_causal_mask

from modeling_tscir import ComposedImageRetrievalPipeline, Gallery, TSCIRModel, TSCIRProcessor
from modeling_tscir.adapters import ADAPTER_NAME, composing
from modeling_tscir.images import load_image
from modeling_tscir.metrics import mean_average_precision_at_k
from modeling_tscir.ranking import top_k


PEERS = Levers()


# ----- composed queries


def our_queries(setting: Setting, compiled: bool = False, **options) -> Callable:
    """Through the pipeline, with its `options`; result pictures are not decoded, as the peers return names."""
    model, processor = setting.model(1)
    if compiled:
        compile_towers(model)
    cir = ComposedImageRetrievalPipeline(model=model, processor=processor)
    cir.gallery_embeds = setting.embeds(setting.gallery)
    cir.gallery_ids = cir.gallery_sources = [f"{i:09d}.jpg" for i in range(setting.gallery)]
    queries = [{"image": path, "text": text} for path, text in zip(setting.photos, setting.texts, strict=True)]

    def run() -> None:
        cir(queries, top_k=10, return_images=False, **options)

    return run


def peers_queries(setting: Setting, levers: Levers = PEERS) -> Callable:
    peer = Peer(setting.clip, levers)
    gallery, names = setting.embeds(setting.gallery), np.array([f"{i:09d}.jpg" for i in range(setting.gallery)])

    def run() -> None:
        ranked(peer.queries(setting.photos, setting.texts), gallery, names, 10, levers)

    return run


def limit_of_queries(setting: Setting) -> Callable:
    """Pictures decoded, and each tower's own forward pass; no mapper, no search."""
    model, processor = setting.model(1)
    ids = processor.compose(setting.texts)["input_ids"]

    @torch.no_grad()
    def run() -> None:
        pixels = processor.pixel_values(setting.photos)
        model.clip.get_image_features(pixel_values=pixels.to(model.dtype))
        model.clip.get_text_features(input_ids=ids)

    return run


# ----- a gallery from files


def our_gallery(setting: Setting) -> Callable:
    """What `tscir index` does: files found, read, decoded, embedded and written."""
    model, processor = setting.model(0)
    pictures, gallery = links(setting), setting.folder / "gallery"

    def run() -> None:
        shutil.rmtree(gallery, ignore_errors=True)
        found = Gallery.from_folder(pictures, gallery, model, processor, progress=False)
        assert len(found) == setting.rows, (len(found), setting.rows)

    return run


def links(setting: Setting) -> Path:
    """A folder of as many files as are asked for, each with bytes of its own."""
    folder = setting.folder / f"pictures-{setting.rows}"
    if not folder.is_dir():
        folder.mkdir()
        for number, path in enumerate(setting.photos):
            content = Path(path).read_bytes()
            (folder / f"{number:07d}.jpg").write_bytes(content + number.to_bytes(4, "big"))
    return folder


def peers_gallery(setting: Setting, levers: Levers = PEERS) -> Callable:
    peer, paths = Peer(setting.clip, levers), setting.photos

    def run() -> None:
        peer.gallery(paths, 32)

    return run


def one_core(work: Callable[[Setting], Callable], setting: Setting) -> Callable:
    torch.set_num_threads(1)
    return work(setting)


def decoding(setting: Setting) -> Callable:
    processor = TSCIRProcessor.from_clip_pretrained(setting.clip)
    return lambda: [processor.pixel_values([load_image(path)]) for path in setting.photos]


def vision_forward(setting: Setting, size: int = 32) -> Callable:
    model, _ = setting.model(0)
    pixels = setting.pixels.to(model.dtype)

    @torch.no_grad()
    def run() -> None:
        for part in pixels.split(size):
            model.get_image_features(part)

    return run


# ----- training steps


class Step:
    """A step of ours as `train/loop.py` makes it: loss, gradient, clipping, AdamW."""

    def __init__(
        self, objective, model: TSCIRModel, batch: dict[str, torch.Tensor], accelerator: Accelerator, chunk: int = 0
    ):
        self.batch, self.accelerator, self.chunk = batch, accelerator, chunk
        self.trained = list(model.trainable_parameters().values())
        hold_frozen_in_bf16(model, accelerator)
        optimizer = torch.optim.AdamW(self.trained, lr=1e-3, fused=True)
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        model.train()

    def __call__(self) -> None:
        backward(self.accelerator, self.objective, self.batch, self.chunk)
        self.accelerator.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def accelerator_of(setting: Setting) -> Accelerator:
    return Accelerator(cpu=True, mixed_precision="bf16" if setting.dtype == "bfloat16" else "no")


def read_by_tower(
    model: TSCIRModel, input_ids: torch.Tensor, pseudo_mask: torch.Tensor, pseudo_words: torch.Tensor
) -> torch.Tensor:
    """`model.encode_with_pseudo_words` by CLIP's own encoder, each token of a padded batch by itself."""
    tower, ends = model.clip.text_model, (input_ids == model.config.text_eos_token_id).int().argmax(-1)
    words = tower.embeddings.token_embedding(input_ids)
    hidden = tower.embeddings(inputs_embeds=words.masked_scatter(pseudo_mask[..., None], pseudo_words.to(words)))
    mask = create_causal_mask(tower.config, hidden, None, None)
    with composing(tower, model.active_adapter):
        hidden = tower.encoder(inputs_embeds=hidden, attention_mask=mask, is_causal=True).last_hidden_state
    pooled = tower.final_layer_norm(hidden)[torch.arange(len(ends)), ends]
    return F.normalize(model.clip.text_projection(pooled), dim=-1)


def our_stage1(setting: Setting, cached: bool, compiled: bool = False, apart: bool = False) -> Callable:
    """A step of `train/stage1.py`, with `--torch_compile` if it is to be `compiled`; each token `apart`, as before."""
    accelerator = accelerator_of(setting)
    model, processor = setting.model(1, "float32")
    if compiled:
        compile_towers(model)
    if apart:
        model.encode_with_pseudo_words = partial(read_by_tower, model)
    objective = Stage1Objective(model, processor)
    batch = {"caption_embeds": setting.embeds(setting.rows), "pixel_values": setting.pixels}
    if cached:
        batch |= objective.frozen({"pixel_values": batch.pop("pixel_values")})
    return Step(objective, model, batch, accelerator)


def peers_stage1(setting: Setting, levers: Levers = PEERS) -> Callable:
    return Pic2WordStep(Peer(setting.clip, levers), setting.pixels)


def lincirs_stage1(setting: Setting) -> Callable:
    return LincirStep(Peer(setting.clip, Levers()), setting.texts)


def our_stage2(setting: Setting, compiled: bool = False, apart: bool = False) -> Callable:
    """With mined negatives in the loss; mining itself is measured by the number of triplets."""
    accelerator = accelerator_of(setting)
    model, processor = setting.model(2, "float32")
    if compiled:
        compile_towers(model)
    if apart:
        model.encode_with_pseudo_words = partial(read_by_tower, model)
    return Step(Stage2Objective(model), model, stage2_batch(setting, model, processor), accelerator)


def stage2_batch(setting: Setting, model: TSCIRModel, processor: TSCIRProcessor) -> dict[str, torch.Tensor]:
    """Random features, as `Stage2Data` and a miner would give them."""
    prompts, count = processor.compose(setting.texts), model.config.num_mined_negatives
    words = model.config.num_pseudo_words, model.config.clip_config.text_config.hidden_size
    batch = {name: prompts[name] for name in ("input_ids", "pseudo_mask")}
    batch |= {"pseudo_words": 0.02 * torch.randn(setting.rows, *words), "rows": torch.arange(setting.rows)}
    batch |= {"reference_embeds": setting.embeds(setting.rows), "target_embeds": setting.embeds(setting.rows, 1)}
    batch |= {"target_ids": batch["rows"], "mined_mask": torch.ones(setting.rows, count, dtype=torch.bool)}
    batch["mined_embeds"] = setting.embeds(setting.rows * count, 2).unflatten(0, (setting.rows, count))
    return batch


def peers_stage2(setting: Setting, levers: Levers = PEERS) -> Callable:
    return FineTuningStep(Peer(setting.clip, levers), setting.pixels, setting.pixels.flip(0), setting.texts)


def text_forward_and_backward(setting: Setting) -> Callable:
    """The text tower with its adapters, from word embeddings to sentence embeddings and back."""
    accelerator = accelerator_of(setting)
    model, processor = setting.model(2, "float32")
    model.trainable_parameters()
    ids, tower = processor.compose(setting.texts)["input_ids"], model.clip.text_model

    def run() -> None:
        with accelerator.autocast(), composing(tower, ADAPTER_NAME):
            tower(input_ids=ids).pooler_output.sum().backward()
        model.zero_grad()

    return run


# ----- ranking


def our_ranking(setting: Setting) -> Callable:
    """What the pipeline and a gallery do once a query is embedded."""
    queries, gallery = setting.embeds(setting.rows, 1), setting.embeds(setting.gallery)
    names = [f"{i:012d}" for i in range(setting.gallery)]

    def run() -> list[list[str]]:
        return [[names[i] for i in row] for row in top_k(queries, gallery, 10)[1].tolist()]

    return run


def peers_ranking(setting: Setting, levers: Levers = PEERS) -> Callable:
    queries, gallery = setting.embeds(setting.rows, 1), setting.embeds(setting.gallery)
    names = np.array([f"{i:012d}" for i in range(setting.gallery)])
    return lambda: ranked(queries, gallery, names, 10, levers).tolist()


TRUTHS = 4  # right answers a query, as in CIRCO


def judged(setting: Setting) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries near their right answers, a gallery, and which those are."""
    generator = torch.Generator().manual_seed(0)
    gallery = setting.embeds(setting.gallery)
    truths = torch.randint(0, setting.gallery, (setting.rows, TRUTHS), generator=generator)
    noise = torch.randn(setting.rows, gallery.shape[1], generator=generator)
    return F.normalize(gallery[truths].sum(1) + 0.25 * noise, dim=-1), gallery, truths


def our_evaluation(setting: Setting) -> Callable:
    queries, gallery, truths = judged(setting)
    split = Split(
        image_ids=[str(i) for i in range(len(gallery))],
        sources=[],
        files=[],
        query_ids=list(range(len(queries))),
        references=[0] * len(queries),
        texts=[("",)] * len(queries),
        annotation_files=(),
        truths=[list(dict.fromkeys(row)) for row in truths.tolist()],
    )
    return lambda: mean_average_precision_at_k(rank(split, queries, gallery).gallery.truth_ranks.numpy(), 50)


def peers_evaluation(setting: Setting, levers: Levers = PEERS) -> Callable:
    queries, gallery, truths = judged(setting)
    names = np.array([f"{i:012d}" for i in range(len(gallery))])
    wanted = [names[np.unique(row)] for row in truths.numpy()]

    def run() -> float:
        found, precisions = ranked(queries, gallery, names, 50, levers), []
        for row, own in zip(found, wanted, strict=True):
            hits = np.isin(row, own)
            precisions.append((np.cumsum(hits) * hits / np.arange(1, 51)).sum() / len(own))
        return float(np.mean(precisions))

    return run


def product_and_partial_sort(setting: Setting) -> Callable:
    queries, gallery, _ = judged(setting)

    def run() -> None:
        for part in queries.split(128):
            torch.topk(part @ gallery.T, 50, dim=1)

    return run


class RandomTriplets:
    """As many triplets as are asked for, as `train/stage2.py` holds them once their features are computed."""

    def __init__(self, setting: Setting, processor: TSCIRProcessor, num_pseudo_words: int, word_dim: int):
        count, few = setting.gallery, setting.texts
        self.processor, self.texts = processor, [few[i % len(few)] for i in range(count)]
        self.target_embeds, self.target_ids = setting.embeds(count), torch.arange(count)
        self.pseudo_words = 0.02 * torch.randn(count, num_pseudo_words, word_dim)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        prompt = self.processor.compose([self.texts[i] for i in rows])
        batch = {name: prompt[name] for name in ("input_ids", "pseudo_mask")}
        return batch | {name: getattr(self, name)[rows] for name in ("pseudo_words", "target_embeds")}


def our_mining(setting: Setting) -> Callable:
    """Mined negatives of the rows of a step, among as many targets as the gallery is large."""
    model, processor = setting.model(2)
    config = model.config
    data = RandomTriplets(setting, processor, config.num_pseudo_words, config.clip_config.text_config.hidden_size)
    rows = list(range(setting.rows))
    return lambda: Miner(data, model, 1).mine(rows, config.num_mined_negatives, config.mined_negative_ceiling)
