"""What is measured: each work in our way, in the peers' way with and without each lever, and its limit.

A way is a function of a `Setting` that prepares everything and gives what is timed: one call is one measurement.
"""

import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peers import FineTuningStep, Levers, LincirStep, Peer, Pic2WordStep, ranked
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "train"), str(ROOT / "eval")]
from clip_shapes import SHAPES  # noqa: E402
from gradients import backward  # noqa: E402  (found on the path just set)
from harness import rank  # noqa: E402
from mining import Miner  # noqa: E402
from splits import Split  # noqa: E402
from stage1 import Stage1Objective  # noqa: E402
from stage2 import Stage2Objective  # noqa: E402

from modeling_tscir import ComposedImageRetrievalPipeline, Gallery, TSCIRModel, TSCIRProcessor  # noqa: E402
from modeling_tscir.adapters import ADAPTER_NAME, composing  # noqa: E402
from modeling_tscir.images import load_image  # noqa: E402
from modeling_tscir.metrics import mean_average_precision_at_k  # noqa: E402
from modeling_tscir.ranking import top_k  # noqa: E402


WORDS = [
    "a",
    "the",
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "star",
    "striped",
    "dotted",
    "large",
    "small",
    "left",
    "right",
    "top",
    "on",
    "with",
    "and",
]
PEERS = Levers()
GALLERY = 10_000  # pictures that a query is compared with


@dataclass(frozen=True)
class Setting:
    """Where the inputs are and how large the work is.

    Args:
        folder: what `write_inputs` wrote.
        shape: of the CLIP, one of `clip_shapes.SHAPES`.
        dtype: the precision of our inference, the faster on this machine.
        rows: queries, rows of a training step, or pictures.
        gallery: pictures that queries are compared with.
    """

    folder: Path
    shape: str
    dtype: str
    rows: int = 1
    gallery: int = GALLERY

    @property
    def clip(self) -> Path:
        return self.folder / self.shape.replace("/", "-")

    @property
    def photos(self) -> list[str]:
        every = sorted(str(path) for path in (self.folder / "photos").iterdir())
        return [every[i % len(every)] for i in range(self.rows)]

    @property
    def texts(self) -> list[str]:
        """Sentences as long as CIRR's, whose 10th, 50th and 90th percentiles are 7, 11 and 18 tokens."""
        rng = random.Random(0)
        counts = [min(40, max(3, round(rng.lognormvariate(np.log(11), 0.37)))) for _ in range(self.rows)]
        return [" ".join(rng.choices(WORDS, k=count)) for count in counts]

    @property
    def pixels(self) -> torch.Tensor:
        return torch.randn(self.rows, 3, 224, 224, generator=torch.Generator().manual_seed(0))

    def model(self, stage: int, dtype: str | None = None) -> tuple[TSCIRModel, TSCIRProcessor]:
        """At a stage of training, all of it of random weights."""
        torch.manual_seed(0)
        model = TSCIRModel.from_clip_pretrained(self.clip, dtype=getattr(torch, dtype or self.dtype))
        if stage:
            model.add_mapper()
        if stage == 2:
            model.add_adapters()
        return model.eval(), TSCIRProcessor.from_clip_pretrained(self.clip)

    def embeds(self, count: int, seed: int = 0) -> torch.Tensor:
        width = SHAPES[self.shape].projection_dim
        return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def write_inputs(folder: Path, shapes: list[str], photos: int) -> None:
    """CLIPs of random weights with the miniature's tokenizer, of which WORDS are a token each, and JPEG files."""
    miniature = ROOT / "modeling_tscir/miniature_clip"
    for shape in shapes:
        setting = Setting(folder, shape, "float32")
        torch.manual_seed(0)
        CLIPModel(with_ids_of(miniature, SHAPES[shape])).save_pretrained(setting.clip)
        CLIPImageProcessorPil().save_pretrained(setting.clip)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(miniature / name, setting.clip)
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir(parents=True)
    for number in range(photos):
        # Soft shapes and some grain: files of about 20 kB, as a shop's of this size are.
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((400, 533), Image.BICUBIC)
        grain = rng.normal(0, 4, (533, 400, 1))
        picture = Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8))
        picture.save(folder / "photos" / f"{number:05d}.jpg", quality=80)


def with_ids_of(clip: Path, config: CLIPConfig) -> CLIPConfig:
    """The configuration, for texts of another CLIP's tokenizer."""
    text = CLIPConfig.from_pretrained(clip).text_config
    ids = {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    content = config.to_dict()
    return CLIPConfig(**content | {"text_config": content["text_config"] | ids})


# ----- composed queries


def our_queries(setting: Setting, compiled: bool = False) -> Callable:
    """Through the pipeline; result pictures are not decoded, as the peers return names."""
    model, processor = setting.model(1)
    if compiled:
        model.clip.vision_model.compile()
        model.clip.text_model.encoder.compile(dynamic=True)
    cir = ComposedImageRetrievalPipeline(model=model, processor=processor)
    cir.gallery_embeds = setting.embeds(setting.gallery)
    cir.gallery_ids = cir.gallery_sources = [f"{i:09d}.jpg" for i in range(setting.gallery)]
    queries = [{"image": path, "text": text} for path, text in zip(setting.photos, setting.texts, strict=True)]

    def run() -> None:
        cir(queries, top_k=10, return_images=False)

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

    def __init__(self, objective, model: TSCIRModel, batch: dict[str, torch.Tensor], accelerator: Accelerator):
        self.batch, self.accelerator = batch, accelerator
        self.trained = list(model.trainable_parameters().values())
        optimizer = torch.optim.AdamW(self.trained, lr=1e-3, fused=True)
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        model.train()

    def __call__(self) -> None:
        backward(self.accelerator, self.objective, self.batch)
        self.accelerator.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def accelerator_of(setting: Setting) -> Accelerator:
    return Accelerator(cpu=True, mixed_precision="bf16" if setting.dtype == "bfloat16" else "no")


def our_stage1(setting: Setting, cached: bool) -> Callable:
    accelerator = accelerator_of(setting)
    model, processor = setting.model(1, "float32")
    objective = Stage1Objective(model, processor)
    batch = {"caption_embeds": setting.embeds(setting.rows), "pixel_values": setting.pixels}
    if cached:
        batch |= objective.frozen({"pixel_values": batch.pop("pixel_values")})
    return Step(objective, model, batch, accelerator)


def peers_stage1(setting: Setting, levers: Levers = PEERS) -> Callable:
    return Pic2WordStep(Peer(setting.clip, levers), setting.pixels)


def lincirs_stage1(setting: Setting) -> Callable:
    return LincirStep(Peer(setting.clip, Levers()), setting.texts)


def our_stage2(setting: Setting) -> Callable:
    """With mined negatives in the loss; mining itself is measured by the number of triplets."""
    accelerator = accelerator_of(setting)
    model, processor = setting.model(2, "float32")
    prompts, count = processor.compose(setting.texts), model.config.num_mined_negatives
    words = model.config.num_pseudo_words, model.config.clip_config.text_config.hidden_size
    batch = {name: prompts[name] for name in ("input_ids", "pseudo_mask")}
    batch |= {"pseudo_words": 0.02 * torch.randn(setting.rows, *words), "rows": torch.arange(setting.rows)}
    batch |= {"reference_embeds": setting.embeds(setting.rows), "target_embeds": setting.embeds(setting.rows, 1)}
    batch |= {"target_ids": batch["rows"], "mined_mask": torch.ones(setting.rows, count, dtype=torch.bool)}
    batch["mined_embeds"] = setting.embeds(setting.rows * count, 2).unflatten(0, (setting.rows, count))
    return Step(Stage2Objective(model), model, batch, accelerator)


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

    def prompts(self, rows: list[int]) -> dict[str, torch.Tensor]:
        prompt = self.processor.compose([self.texts[i] for i in rows])
        return {name: prompt[name] for name in ("input_ids", "pseudo_mask")}


def our_mining(setting: Setting) -> Callable:
    """Mined negatives of the rows of a step, among as many targets as the gallery is large."""
    model, processor = setting.model(2)
    config = model.config
    data = RandomTriplets(setting, processor, config.num_pseudo_words, config.clip_config.text_config.hidden_size)
    rows = list(range(setting.rows))
    return lambda: Miner(data, model, 1).mine(rows, config.num_mined_negatives, config.mined_negative_ceiling)


@dataclass(frozen=True)
class Work:
    """A work in all ways.

    Args:
        sizes: of a `Setting`, by shape.
        ways: "ours", "peers"; of several that begin with "limit" the longest counts; others are peers by their names,
            and levers, which begin with "+": the peers' way with one of ours.
        targets: how many times faster than the peers, and how near the limit, we mean to be on two cores with AMX.
    """

    sizes: dict[str, dict[str, int]]
    ways: dict[str, Callable]
    targets: tuple[float, float | None]


@dataclass(frozen=True)
class Curve:
    """How a work's cost grows.

    Args:
        size: one of a `Setting`'s sizes, and the `values` it takes; others are `fixed`.
        peers_until: where the peers' way ends for want of memory or time.
    """

    ways: dict[str, Callable]
    size: str
    values: tuple[int, ...]
    fixed: dict[str, int]
    peers_until: int


def with_levers(peers: Callable, **levers: Levers) -> dict[str, Callable]:
    return {"peers": peers} | {f"+ {n.replace('_', ' ')}": partial(peers, levers=own) for n, own in levers.items()}


SHORT, BF16, CACHED = Levers(short_texts=True), Levers(bf16=True), Levers(cached=True)
SORT, NAMES = Levers(partial_sort=True), Levers(few_names=True)
QUERIES = {
    "ours": our_queries,
    "ours, + torch.compile": partial(our_queries, compiled=True),
    "limit": limit_of_queries,
    **with_levers(peers_queries, short_texts=SHORT, bf16=BF16, partial_sort=SORT, few_names=NAMES),
}
WORKS = {
    "composed query": Work({"ViT-B/32": {"rows": 1}, "ViT-L/14": {"rows": 1}}, QUERIES, (3, 1.3)),
    "composed queries, batch of 32": Work({"ViT-B/32": {"rows": 32}, "ViT-L/14": {"rows": 32}}, QUERIES, (5, 1.2)),
    "gallery from JPEG files": Work(
        {"ViT-B/32": {"rows": 128}, "ViT-L/14": {"rows": 32}},
        {
            "ours": our_gallery,
            "limit: decoding on one core": partial(one_core, decoding),
            "limit: forward on one core": partial(one_core, vision_forward),
            **with_levers(peers_gallery, bf16=BF16),
        },
        (3, 1.2),
    ),
    "stage I step, features not cached": Work(
        {"ViT-B/32": {"rows": 32}, "ViT-L/14": {"rows": 8}},
        {
            "ours": partial(our_stage1, cached=False),
            "limit": vision_forward,
            **with_levers(peers_stage1, short_texts=SHORT, bf16=BF16),
            "LinCIR's way": lincirs_stage1,
        },
        (8, 1.3),
    ),
    "stage I step, features cached": Work(
        {"ViT-B/32": {"rows": 32}, "ViT-L/14": {"rows": 8}},
        {
            "ours": partial(our_stage1, cached=True),
            **with_levers(peers_stage1, short_texts=SHORT, cached_pictures=CACHED, bf16=BF16),
            "LinCIR's way": lincirs_stage1,
        },
        (40, None),
    ),
    "stage II step": Work(
        {"ViT-B/32": {"rows": 32}, "ViT-L/14": {"rows": 8}},
        {
            "ours": our_stage2,
            "limit": text_forward_and_backward,
            **with_levers(
                peers_stage2, short_texts=SHORT, cached_pictures=CACHED, adapters=Levers(adapters=True), bf16=BF16
            ),
        },
        (15, 1.2),
    ),
    "evaluation of CIRCO's size": Work(
        {"ViT-L/14": {"rows": 800, "gallery": 123_403}},
        {
            "ours": our_evaluation,
            "limit": product_and_partial_sort,
            **with_levers(peers_evaluation, partial_sort=SORT, few_names=NAMES),
        },
        (20, 1.5),
    ),
}
CURVES = {
    "searching for one query, by gallery": Curve(
        {"ours": our_ranking, "peers": peers_ranking}, "gallery", (1000, 10_000, 100_000, 10**6), {"rows": 1}, 10**6
    ),
    "evaluating 800 queries, by gallery": Curve(
        {"ours": our_evaluation, "peers": peers_evaluation}, "gallery", (1000, 10_000, 100_000, 1_000_000),
        {"rows": 800}, 100_000,
    ),
    "composed queries, by batch": Curve(
        {"ours": our_queries, "peers": peers_queries}, "rows", (1, 4, 16, 64), {}, 64
    ),
    "gallery from JPEG files, by pictures": Curve(
        {"ours": our_gallery, "peers": peers_gallery}, "rows", (32, 128, 512), {}, 512
    ),
    "stage I step, features not cached, by batch": Curve(
        {"ours": partial(our_stage1, cached=False), "peers": peers_stage1}, "rows", (4, 16, 64), {}, 64
    ),
    "stage I step, features cached, by batch": Curve(
        {"ours": partial(our_stage1, cached=True), "peers": peers_stage1}, "rows", (4, 16, 64, 256), {}, 64
    ),
    "stage II step, by batch": Curve(
        {"ours": our_stage2, "peers": peers_stage2}, "rows", (4, 16, 64, 256), {}, 64
    ),
    "mining for a step of 32, by triplets": Curve(
        {"ours": our_mining}, "gallery", (1000, 10_000, 100_000, 1_000_000), {"rows": 32}, 0
    ),
}  # fmt: skip
