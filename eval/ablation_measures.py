"""What the runs of a grid are compared by: retrieval on further worlds, what their pseudo-words hold, or what training
took from CLIP's own retrieval."""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from ablation_data import DEVICE, plain_clip  # and puts the project's folder on the path
from combiner import Combiner, fit_combiner
from datasets import Image, load_dataset
from harness import compose, embed_pictures, rank
from splits import Split

from miniature.build import pictures
from miniature.compare import BENCHMARKS, SHOWN, clusters_of, query_values, read_benchmark
from miniature.language import full_caption
from miniature.scenes import Scene, random_scene
from miniature.worlds import ALL_FURTHER, FURTHER
from modeling_tscir import TSCIRModel, TSCIRProcessor
from modeling_tscir.embedding import embed_images, embed_images_with_patches, embed_texts
from modeling_tscir.feature_cache import cached, digest, feature_key, file_fingerprints
from modeling_tscir.images import Selected
from modeling_tscir.ranking import rank_gallery


@dataclass(frozen=True)
class Measure:
    """A way to compare runs.

    Args:
        shown: metrics and their names in reports; a metric begins with its benchmark's name.
        primary: those whose mean decides claims.
        prepare: writes RESULTS/queries.parquet, which queries there are, and what all runs share to OUTPUT.
        evaluate: writes every query's value of every metric, in the order of queries.parquet, of a run: a trained
            folder as {"model"}, or {"method"} and what it needs.
        methods: those it can evaluate on the plain CLIP.
    """

    shown: dict[str, str]
    primary: tuple[str, ...]
    prepare: Callable[[Path, Path], None]
    evaluate: Callable[[dict, Path, Path], None]
    methods: tuple[str, ...] = ()


# ----- retrieval


def splits_of_worlds(output: Path):
    """Of each further world that is there: its split, world, benchmark, arguments and splits of the benchmark."""
    for split, worlds in ALL_FURTHER.items():
        for world in worlds:
            for folder, benchmark in BENCHMARKS.items():
                if (output / "worlds" / world / folder).is_dir():
                    yield split, world, benchmark, *read_benchmark(folder, output / "worlds" / world, output, None)


def embed_worlds(output: Path, results: Path) -> None:
    """Every picture's embedding, into the cache; and to RESULTS/queries.parquet which queries there are."""
    clip = plain_clip(output)
    frames = []
    for split, world, benchmark, args, splits in splits_of_worlds(output):
        for part in splits.values():
            embed_pictures(*clip, part, args)
        clusters = [f"{world} {cluster}" for cluster in clusters_of(splits)]
        frames.append(pd.DataFrame({"split": split, "benchmark": benchmark.name, "cluster": clusters}))
    write_table(pd.concat(frames, ignore_index=True), results / "queries.parquet")


def evaluate_retrieval(run: dict, result: Path, output: Path) -> None:
    clip = plain_clip(output)
    queries_of = composer(run, clip, output)
    frames = []
    for split, _, benchmark, args, splits in splits_of_worlds(output):
        ranked = {}
        for category, part in splits.items():
            pictures = embed_pictures(*clip, part, args)
            ranked[category] = rank(part, queries_of(part, pictures), pictures)
        for metric, values in query_values(benchmark, splits, ranked).items():
            frames.append(pd.DataFrame({"split": split, "metric": metric, "value": values.astype(np.float32)}))
    write_table(pd.concat(frames, ignore_index=True), result)


def reference_patches(output: Path, clip: tuple[TSCIRModel, TSCIRProcessor], part: Split) -> torch.Tensor:
    """P(x) [n, N, d_v], fp32, of a split's distinct references, from the cache where they are there."""
    rows = sorted(set(part.references))
    key = feature_key(*clip, ["patches", *file_fingerprints([part.files[row] for row in rows])])
    pictures = Selected(part.sources, rows)
    return cached(output / "cache", key, lambda: embed_images_with_patches(*clip, pictures, dtype=torch.float32)[1])


@torch.no_grad()
def pseudo_words(model: TSCIRModel, embeds: torch.Tensor, patches: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Pseudo-words [n, M, d_t] of pictures' v(x) [n, D] and, if the mapper reads them, P(x) [n, N, d_v]; on CPU."""
    embeds = embeds.to(model.device, model.dtype)
    if not model.mapper.needs_patches:
        return model.get_pseudo_words(embeds).cpu()
    parts = zip(embeds.split(256), patches().split(256), strict=True)
    return torch.cat([model.get_pseudo_words(v, p.to(v)).cpu() for v, p in parts])


def load_trained(folder: str, dtype: str = "float32") -> tuple[TSCIRModel, TSCIRProcessor]:
    """A trained folder, ready for many queries."""
    model = TSCIRModel.from_pretrained(folder, dtype=getattr(torch, dtype)).to(DEVICE)
    model.merge_adapter()
    return model, TSCIRProcessor.from_pretrained(folder)


def composer(
    run: dict, clip: tuple[TSCIRModel, TSCIRProcessor], output: Path
) -> Callable[[Split, torch.Tensor], torch.Tensor]:
    """Queries [Q, D] of a split, given its pictures' embeddings: by a trained model, or by a method on plain CLIP."""
    if "model" in run:
        trained = load_trained(run["model"], run.get("dtype", "float32"))

        def composed(part: Split, pictures: torch.Tensor) -> torch.Tensor:
            embeds = pictures[torch.tensor(sorted(set(part.references)))]
            encoded = embeds, pseudo_words(trained[0], embeds, lambda: reference_patches(output, clip, part))
            told = {"residual": run.get("residual"), "weight": run.get("weight")}
            return compose("tscir", *trained, part, pictures, encoded=encoded, **told)

        return composed
    if run["method"] != "combiner":
        return lambda part, pictures: compose(run["method"], *clip, part, pictures, run.get("weight"))
    more = {name: run[name] for name in ("epochs", "learning_rate") if name in run}
    *_, combiner = islice(fit_on_triplets(clip, Path(run["triplets"]), run["seed"], **more), run.get("stop_after"))

    @torch.no_grad()
    def queries(part: Split, pictures: torch.Tensor) -> torch.Tensor:
        told = compose("text", *clip, part, pictures)
        return combiner(pictures[torch.tensor(part.references)], told)

    return queries


def fit_on_triplets(
    clip: tuple[TSCIRModel, TSCIRProcessor], triplets: Path, seed: int, **choices
) -> Iterator[Combiner]:
    """`fit_combiner` on a folder of triplets, which is given the choices."""
    rows = load_dataset("parquet", data_files=str(triplets / "*.parquet"), split="train")
    references, targets = (
        embed_images(*clip, rows.cast_column(name, Image(decode=False))[name]) for name in ("reference", "target")
    )
    texts = embed_texts(*clip, list(rows["modification"]))
    return fit_combiner(references, texts, targets, clip[0].logit_scale, seed, **choices)


def write_table(table: pd.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    table.to_parquet(part, compression="zstd")
    os.replace(part, path)


# ----- what a pseudo-word holds

ATTRIBUTES = ("shape", "colour", "texture", "size", "position", "background")
SCENES = 4000  # to fit on, of val and of test, each
RIDGES = (0.01, 0.1, 1.0, 10.0, 100.0)


@cache
def readout_scenes() -> dict[str, list[Scene]]:
    """Scenes of one shape, each once."""
    rng = random.Random("readout")
    scenes: dict[tuple, Scene] = {}
    while len(scenes) < 3 * SCENES:
        scene = random_scene(rng)
        if len(scene.shapes) == 1:
            scenes[scene.key] = scene
    every = list(scenes.values())
    return {part: every[i * SCENES : (i + 1) * SCENES] for i, part in enumerate(("fit", "val", "test"))}


def labels_of(scenes: list[Scene]) -> dict[str, np.ndarray]:
    """Each attribute of every scene."""
    return {name: np.array([getattr(s if name == "background" else s.shapes[0], name) for s in scenes])
            for name in ATTRIBUTES}  # fmt: skip


def readout_features(output: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """v(x) [N, D] and P(x) [N, n, d_v] of a part's pictures, from the cache where they are there."""
    clip = plain_clip(output)
    scenes = readout_scenes()[part]
    both = cache(lambda: embed_images_with_patches(*clip, pictures(scenes, f"readout {part}")))
    key = feature_key(*clip, ["readout", part, digest([scene.key for scene in scenes])])
    embeds = cached(output / "cache", key, lambda: both()[0])
    return embeds, cached(output / "cache", f"{key}-patches", lambda: both()[1])


def prepare_readout(output: Path, results: Path) -> None:
    for part in readout_scenes():
        readout_features(output, part)
    columns = [{"split": part, "benchmark": "readout", "cluster": str(i)} for part in FURTHER for i in range(SCENES)]
    write_table(pd.DataFrame(columns), results / "queries.parquet")


@torch.no_grad()
def pseudo_sentences(model: TSCIRModel, processor: TSCIRProcessor, embeds: torch.Tensor, patches: torch.Tensor):
    """q(x) [N, D], what the text tower reads in an image's prompt, its pseudo-words alone unless told."""
    prompt, found = processor.compose([""]), []
    for words in pseudo_words(model, embeds, lambda: patches).split(256):
        ids, mask = (prompt[name].to(model.device).expand(len(words), -1) for name in ("input_ids", "pseudo_mask"))
        found.append(model.encode_with_pseudo_words(ids, mask, words.to(model.device)).cpu())
    return torch.cat(found)


def read_linearly(fit: torch.Tensor, labels: np.ndarray, others: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Labels of other rows [N', D] by ridge regression on rows `fit` [N, D]; its strength is chosen on a fifth."""
    names, classes = np.unique(labels, return_inverse=True)
    wanted = torch.nn.functional.one_hot(torch.from_numpy(classes)).double()
    mean, deviation = fit.mean(0), fit.std(0)

    def rows(values: torch.Tensor) -> torch.Tensor:
        scaled = (values - mean) / deviation
        return torch.cat([scaled, torch.ones(len(values), 1)], dim=1).double()

    def solved(chosen: slice, ridge: float) -> torch.Tensor:
        x, y = rows(fit[chosen]), wanted[chosen]
        return torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1]).double(), x.T @ y)

    kept = len(fit) * 4 // 5
    held_out, answers = rows(fit[kept:]), torch.from_numpy(classes[kept:])
    right = [((held_out @ solved(slice(kept), ridge)).argmax(1) == answers).sum().item() for ridge in RIDGES]
    weights = solved(slice(None), RIDGES[int(np.argmax(right))])
    return {part: names[(rows(values) @ weights).argmax(1).numpy()] for part, values in others.items()}


def evaluate_readout(run: dict, result: Path, output: Path) -> None:
    features = {part: readout_features(output, part) for part in readout_scenes()}
    if "model" in run:
        trained = load_trained(run["model"])
        sentences = {part: pseudo_sentences(*trained, *both) for part, both in features.items()}
    else:
        sentences = {part: embeds for part, (embeds, _) in features.items()}  # what CLIP itself has of the picture
    labels = {part: labels_of(scenes) for part, scenes in readout_scenes().items()}
    fit = sentences.pop("fit")
    frames = []
    for name in ATTRIBUTES:
        for part, told in read_linearly(fit, labels["fit"][name], sentences).items():
            values = (told == labels[part][name]).astype(np.float32)
            frames.append(pd.DataFrame({"split": part, "metric": f"readout_{name}", "value": values}))
    write_table(pd.concat(frames, ignore_index=True), result)


# ----- forgetting


def prepare_forgetting(output: Path, results: Path) -> None:
    for part in FURTHER:
        readout_features(output, part)
    columns = [
        {"split": part, "benchmark": "forgetting", "cluster": str(i)} for part in FURTHER for i in range(SCENES)
    ]
    write_table(pd.DataFrame(columns), results / "queries.parquet")


@torch.no_grad()
def evaluate_forgetting(run: dict, result: Path, output: Path) -> None:
    """Whether each picture comes first: for its caption and for another rendering of its scene, both by the trained
    model's plain features, and for its own pseudo-words."""
    trained = load_trained(run["model"])
    frames = []
    for part in FURTHER:
        scenes = readout_scenes()[part]
        gallery = embed_images(*trained, pictures(scenes, f"readout {part}"))
        queries = {
            "text_to_image": embed_texts(*trained, [full_caption(scene) for scene in scenes]),
            "image_to_image": embed_images(*trained, pictures(scenes, f"again {part}")),
            "itself": pseudo_sentences(*trained, *readout_features(output, part)),
        }
        for name, embeds in queries.items():
            ranks = rank_gallery(embeds, gallery, 1, truths=[[i] for i in range(len(scenes))]).truth_ranks[:, 0]
            values = (ranks == 1).numpy().astype(np.float32)
            frames.append(pd.DataFrame({"split": part, "metric": f"forgetting_{name}", "value": values}))
    write_table(pd.concat(frames, ignore_index=True), result)


FORGOTTEN = {
    "forgetting_text_to_image": "text to image R@1",
    "forgetting_image_to_image": "image to image R@1",
    "forgetting_itself": "pseudo-words to their picture R@1",
}
RETRIEVAL = Measure(
    SHOWN,
    ("cirr_recall_at_1", "fashioniq_recall_at_10", "circo_map_at_5"),
    embed_worlds,
    evaluate_retrieval,
    ("image", "sum", "slerp", "combiner"),
)
READOUT = Measure(
    {f"readout_{name}": name for name in ATTRIBUTES},
    tuple(f"readout_{name}" for name in ATTRIBUTES),
    prepare_readout,
    evaluate_readout,
    ("image",),
)
FORGETTING = Measure(FORGOTTEN, tuple(FORGOTTEN)[:2], prepare_forgetting, evaluate_forgetting)
