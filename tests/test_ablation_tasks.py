import random

import ablation_tasks
import pytest
import torch

from miniature.language import full_caption
from miniature.worlds import draw_scene_world


@pytest.fixture(scope="module")
def small_world():
    return draw_scene_world("small", 12, 60, set())


def asked_of(world, seed: int = 0) -> dict[str, list[ablation_tasks.Query]]:
    texts = [f"edit {n} {i}" for n in range(len(world.groups)) for i in range(4)]
    return ablation_tasks.queries_of(world, texts, random.Random(seed))


def test_tasks_ask_for_the_scenes_that_their_words_describe(small_world):
    queries = asked_of(small_world)
    assert queries == asked_of(small_world)
    scenes = [scene for group in small_world.groups for scene in group.scenes] + list(small_world.fillers)
    assert {task: len(found) for task, found in queries.items() if task != "pair"} == dict.fromkeys(
        ("single", "longer", "double", "caption"), 48
    )
    for task, found in queries.items():
        for query in found:
            group, truth = small_world.groups[query.group], scenes[query.truth]
            assert scenes[query.pictures[0]] == group.reference
            if task in ("single", "longer", "caption"):
                told = next(i for i in range(4) if f"edit {query.group} {i}" in query.content[1])
                assert truth == group.targets[told]
            if task == "double":
                i, j = (i for i in range(4) if f"edit {query.group} {i}" in query.content[1])
                assert truth in group.doubles[i] and truth in group.doubles[j]
            if task == "caption":
                assert query.caption == full_caption(group.reference)
    assert all(
        len(long.content[1]) > 40 + len(short.content[1])
        for short, long in zip(queries["single"], queries["longer"], strict=True)
    )
    assert len(queries["pair"]) > 10
    for query in queries["pair"]:
        group, shows = small_world.groups[query.group], scenes[query.pictures[1]]
        edit = group.edits[group.targets.index(scenes[query.truth])]
        assert len(shows.shapes) == 1 and edit.value in (*shows.shapes[0], shows.background)


def test_tasks_are_composed_as_the_model_composes_them(small_world, stage2, processor, pictures):
    sources = [pictures[i % len(pictures)] for i in range(9 * 12 + 60)]
    queries = asked_of(small_world)
    for task in ("single", "pair", "caption"):
        made = ablation_tasks.composed(stage2, processor, sources, queries[task][:5], batch_size=2)
        for row, query in zip(made, queries[task][:5], strict=True):
            pixels = processor.pixel_values([sources[picture] for picture in query.pictures])
            content = [part if isinstance(part, str) else None for part in query.content]
            prompt = processor.compose_contents([content])
            if query.caption is not None:
                prompt = processor.compose([query.content[1]], [query.caption])
                words = torch.empty(1, 0, stage2.config.clip_config.text_config.hidden_size)
            else:
                words = stage2.encode_reference(pixels)[1]
            expected = stage2.encode_with_pseudo_words(prompt["input_ids"], prompt["pseudo_mask"], words)
            torch.testing.assert_close(row, expected[0], atol=1e-5, rtol=0)
