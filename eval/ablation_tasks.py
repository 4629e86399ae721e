"""What a trained model is asked beyond one edit of one picture: longer texts, two edits at once, a caption in place of
the picture, a second picture in place of words."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from ablation_data import plain_clip
from ablation_measures import Measure, load_trained, splits_of_worlds, write_table
from harness import embed_pictures
from splits import Split

from miniature.language import full_caption
from miniature.scenes import FIELD_OF_KIND, PAIRED_EDITS, Group, Scene, apply_both
from miniature.worlds import SceneWorld, further_scene_worlds
from modeling_tscir import TSCIRModel, TSCIRProcessor
from modeling_tscir.embedding import embed_references
from modeling_tscir.images import Selected
from modeling_tscir.ranking import rank_gallery


SHOWN = {
    "single_recall_at_1": "one edit",
    "longer_recall_at_1": "one edit in a longer text",
    "double_recall_at_1": "two edits in one text",
    "caption_recall_at_1": "a caption as the reference",
    "pair_recall_at_1": "a second picture shows what to take",
}
LONGER = (
    "everything else in the picture stays as it was before , there is only this one thing to change : {text}",
    "the same picture again , with nothing more to change in it than what is said here : {text}",
    "{text} , and that is the only thing here that is not as it was in the picture before",
)
BOTH = ("{first} and {second}", "{first} , {second}", "{second} and also {first}")
TAKEN = {  # by kind of edit, what the second picture shows
    "recolour": "with the {shape} in the colour of",
    "retexture": "with the pattern of this on the {shape} :",
    "background": "on the background of",
}


class Query(NamedTuple):
    """Pictures, by their place in the gallery, and texts, in order; `caption` may stand for the picture."""

    content: tuple[int | str, ...]
    truth: int
    group: int
    caption: str | None = None

    @property
    def pictures(self) -> list[int]:
        return [part for part in self.content if isinstance(part, int)]


def queries_of(world: SceneWorld, texts: list[str], rng: random.Random) -> dict[str, list[Query]]:
    """Queries of each task, by its metric's first word.

    Args:
        texts: modifications of the world's CIRR benchmark, in order: those of each group's four edits.
    """
    found: dict[str, list[Query]] = {metric.partition("_")[0]: [] for metric in SHOWN}
    for number, group in enumerate(world.groups):
        first = len(group.scenes) * number  # every group has as many
        place = {scene.key: first + i for i, scene in enumerate(group.scenes)}
        own = texts[4 * number : 4 * number + 4]
        for text, target in zip(own, group.targets, strict=True):
            truth = place[target.key]
            found["single"].append(Query((first, text), truth, number))
            found["longer"].append(Query((first, rng.choice(LONGER).format(text=text)), truth, number))
            found["caption"].append(Query((first, text), truth, number, full_caption(group.reference)))
        for i, j in PAIRED_EDITS:
            truth = place[apply_both(group.reference, group.edits[i], group.edits[j]).key]
            text = rng.choice(BOTH).format(first=own[i], second=own[j])
            found["double"].append(Query((first, text), truth, number))
        found["pair"] += pairs(group, place, number, world, rng)
    return found


def pairs(group: Group, place: dict, number: int, world: SceneWorld, rng: random.Random) -> Iterator[Query]:
    """Edits whose new attribute a filler of one shape shows."""
    fillers = len(world.groups) * len(group.scenes)
    for edit, target in zip(group.edits, group.targets, strict=True):
        if edit.kind not in TAKEN:
            continue
        alone = ((i, scene) for i, scene in enumerate(world.fillers) if len(scene.shapes) == 1)
        showing = [i for i, scene in alone if shown(scene, edit.kind) == edit.value]
        if showing:
            words = TAKEN[edit.kind].format(shape=group.reference.shapes[edit.index].shape)
            content = (place[group.reference.key], words, fillers + rng.choice(showing))
            yield Query(content, place[target.key], number)


def shown(scene: Scene, kind: str) -> str:
    return scene.background if kind == "background" else getattr(scene.shapes[0], FIELD_OF_KIND[kind])


def worlds_with_queries(output: Path) -> Iterator[tuple[str, str, Split, object, dict[str, list[Query]]]]:
    """Of val's and test's CIRR benchmarks: val or test, world, split, arguments and queries by task."""
    for name, world, benchmark, args, splits in splits_of_worlds(output):
        if benchmark.name == "cirr":
            texts = [wordings[0] for wordings in splits[""].texts]
            queries = queries_of(further_scene_worlds()[world], texts, random.Random(f"tasks {world}"))
            yield name, world, splits[""], args, queries


def prepare_tasks(output: Path, results: Path) -> None:
    """Every picture's embedding, into the cache; and to RESULTS/queries.parquet which queries there are."""
    clip = plain_clip(output)
    frames = []
    for name, world, split, args, tasks in worlds_with_queries(output):
        embed_pictures(*clip, split, args)
        for task, queries in tasks.items():
            clusters = [f"{world} {query.group}" for query in queries]
            frames.append(pd.DataFrame({"split": name, "benchmark": task, "cluster": clusters}))
    write_table(pd.concat(frames, ignore_index=True), results / "queries.parquet")


@torch.no_grad()
def composed(
    model: TSCIRModel, processor: TSCIRProcessor, sources, queries: list[Query], batch_size: int = 64
) -> torch.Tensor:
    """Query embeddings [Q, D], L2-normalised."""
    needed = sorted({picture for query in queries for picture in query.pictures})
    row = {picture: i for i, picture in enumerate(needed)}
    _, words = embed_references(model, processor, Selected(sources, needed), batch_size)
    found = []
    for start in range(0, len(queries), batch_size):
        batch = queries[start : start + batch_size]
        if batch[0].caption is not None:
            prompt = processor.compose([query.content[1] for query in batch], [query.caption for query in batch])
            own = words.new_empty(len(batch), 0, words.shape[-1])
        else:
            contents = [[part if isinstance(part, str) else None for part in query.content] for query in batch]
            prompt = processor.compose_contents(contents)
            own = words[[row[picture] for query in batch for picture in query.pictures]]
        inputs = (part.to(model.device) for part in (prompt["input_ids"], prompt["pseudo_mask"], own))
        found.append(model.encode_with_pseudo_words(*inputs).cpu())
    return torch.cat(found)


def evaluate_tasks(run: dict, result: Path, output: Path) -> None:
    """Whether the wanted picture comes first; a query's own pictures are removed from its ranking."""
    clip = plain_clip(output)
    trained = load_trained(run["model"])
    frames = []
    for name, _, split, args, tasks in worlds_with_queries(output):
        gallery = embed_pictures(*clip, split, args)
        for task, queries in tasks.items():
            made = composed(*trained, split.sources, queries)
            truths, own = [[query.truth] for query in queries], [query.pictures for query in queries]
            ranks = rank_gallery(made, gallery, 1, truths, own).truth_ranks[:, 0]
            values = (ranks == 1).numpy().astype(np.float32)
            frames.append(pd.DataFrame({"split": name, "metric": f"{task}_recall_at_1", "value": values}))
    write_table(pd.concat(frames, ignore_index=True), result)


TASKS = Measure(SHOWN, tuple(SHOWN), prepare_tasks, evaluate_tasks)
