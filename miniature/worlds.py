"""The three worlds: which scenes and garments belong to training, to val and to test. No scene is in two of them.

Val and test are drawn first, from seeds of their own; training then draws anything else. Nothing here renders a
picture, so the whole division takes a second and every part of it can be made again on its own.
"""

import functools
import random
from collections.abc import Iterator
from typing import NamedTuple

from miniature.garments import CATEGORIES, Garment, changed_fields, random_garment, random_two_edits
from miniature.scenes import (
    KINDS,
    KINDS_NOT_IN_TRIPLETS,
    Group,
    Scene,
    allowed_in_stage1,
    allowed_in_triplets,
    apply,
    random_edit,
    random_group,
    random_scene,
)


GROUPS = {"val": 300, "test": 600}  # four queries and nine pictures each
FILLERS = {"val": 300, "test": 600}  # pictures that belong to no group
FURTHER_GROUPS = FURTHER_FILLERS = 600  # in each further world
FURTHER = {"val": tuple(f"val-{i}" for i in range(1, 5)), "test": tuple(f"test-{i}" for i in range(1, 5))}
# What was read before everything was chosen tells of later choices no more: nothing is ever chosen by these. The final
# table alone reads the last ones.
ALL_FURTHER = FURTHER | {
    "final": tuple(f"test-{i}" for i in range(5, 9)),
    "last": tuple(f"test-{i}" for i in range(9, 13)),
}
GARMENT_QUERIES = {"val": 200, "test": 400}  # in each of the three categories
GARMENT_FILLERS = {"val": 300, "test": 600}


class SceneWorld(NamedTuple):
    groups: tuple[Group, ...]
    fillers: tuple[Scene, ...]


class GarmentQuery(NamedTuple):
    reference: Garment
    target: Garment
    fields: tuple[str, str]


class GarmentWorld(NamedTuple):
    queries: dict[str, tuple[GarmentQuery, ...]]
    fillers: dict[str, tuple[Garment, ...]]


def draw_scene_world(name: str, num_groups: int, num_fillers: int, taken: set[tuple]) -> SceneWorld:
    """A world of scenes that are not `taken`, which then are."""
    rng = random.Random(f"scenes {name}")
    groups: list[Group] = []
    while len(groups) < num_groups:
        group = random_group(rng, frozenset(KINDS))
        if group is None:
            continue
        keys = {scene.key for scene in group.scenes}
        if not keys & taken:
            taken |= keys
            groups.append(group)
    fillers: list[Scene] = []
    while len(fillers) < num_fillers:
        scene = random_scene(rng)
        if scene.key not in taken:
            taken.add(scene.key)
            fillers.append(scene)
    return SceneWorld(tuple(groups), tuple(fillers))


@functools.cache
def scene_worlds() -> dict[str, SceneWorld]:
    """Groups and fillers of val and test, each scene once."""
    taken: set[tuple] = set()
    return {name: draw_scene_world(name, GROUPS[name], FILLERS[name], taken) for name in ("val", "test")}


@functools.cache
def further_scene_worlds() -> dict[str, SceneWorld]:
    """ALL_FURTHER's worlds, none of whose scenes is in another, for finer comparisons.

    Training sets leave out those that are named to `reserved_scenes`. The stored CLIP was trained without that
    knowledge: it has met one in 200 of their scenes of two shapes, and most scenes of one.
    """
    taken = set(reserved_scenes())
    names = [name for pair in zip(*FURTHER.values(), strict=True) for name in pair]
    names += [name for split in ALL_FURTHER if split not in FURTHER for name in ALL_FURTHER[split]]
    return {name: draw_scene_world(name, FURTHER_GROUPS, FURTHER_FILLERS, taken) for name in names}


@functools.cache
def garment_worlds() -> dict[str, GarmentWorld]:
    """Queries and fillers of val and test by category, each garment once."""
    taken: set[Garment] = set()
    worlds = {}
    for name in ("val", "test"):
        rng = random.Random(f"garments {name}")
        queries: dict[str, list[GarmentQuery]] = {c: [] for c in CATEGORIES}
        fillers: dict[str, list[Garment]] = {c: [] for c in CATEGORIES}
        for category in CATEGORIES:
            while len(queries[category]) < GARMENT_QUERIES[name]:
                reference = random_garment(rng, category)
                target, fields = random_two_edits(rng, reference)
                if reference != target and not {reference, target} & taken:
                    taken |= {reference, target}
                    queries[category].append(GarmentQuery(reference, target, fields))
            while len(fillers[category]) < GARMENT_FILLERS[name]:
                garment = random_garment(rng, category)
                if garment not in taken:
                    taken.add(garment)
                    fillers[category].append(garment)
        worlds[name] = GarmentWorld(
            {c: tuple(q) for c, q in queries.items()}, {c: tuple(f) for c, f in fillers.items()}
        )
    return worlds


def garment_pairs(split: str, per_category: int) -> dict[str, tuple[GarmentQuery, ...]]:
    """Further queries in the galleries of `split`, final's and last's in those of test: random pairs that differ in
    two attributes, each pair once, and none in two splits."""
    world = split if split in FURTHER else "test"
    splits = list(ALL_FURTHER)
    earlier = [] if split in FURTHER else splits[splits.index("test") : splits.index(split)]
    known = [garment_pairs(one, per_category) for one in earlier]
    queries = {}
    for category in CATEGORIES:
        source = garment_worlds()[world]
        garments = [g for query in source.queries[category] for g in query[:2]] + list(source.fillers[category])
        rng = random.Random(f"pairs {split} {category}")
        before = {query[:2] for one in (*known, source.queries) for query in one[category]} if known else set()
        drawn: dict[tuple[Garment, Garment], GarmentQuery] = {}
        while len(drawn) < per_category:
            reference, target = rng.sample(garments, 2)
            changed = changed_fields(reference, target)
            if len(changed) == 2 and (reference, target) not in before:
                rng.shuffle(changed)
                drawn[reference, target] = GarmentQuery(reference, target, (changed[0], changed[1]))
        queries[category] = tuple(drawn.values())
    return queries


@functools.cache
def reserved_scenes(further: tuple[str, ...] = ()) -> frozenset[tuple]:
    """Keys of all scenes of val and test, and of the further worlds of these of ALL_FURTHER."""
    names = [name for split in further for name in ALL_FURTHER[split]]
    worlds = [*scene_worlds().values(), *(further_scene_worlds()[name] for name in names)]
    return frozenset(
        scene.key
        for world in worlds
        for scene in (*world.fillers, *(s for group in world.groups for s in group.scenes))
    )


@functools.cache
def reserved_garments() -> frozenset[Garment]:
    return frozenset(
        garment
        for world in garment_worlds().values()
        for category in CATEGORIES
        for garment in (*world.fillers[category], *(g for q in world.queries[category] for g in q[:2]))
    )


def training_groups(seed: str, for_triplets: bool, further: tuple[str, ...] = ()) -> Iterator[Group]:
    """Groups of near-duplicates of the training world, without end; `for_triplets` leaves out what those lack.

    Scenes of the `further` worlds of these splits are left out as well.
    """
    rng = random.Random(seed)
    kinds = frozenset(KINDS) - KINDS_NOT_IN_TRIPLETS if for_triplets else frozenset(KINDS)
    reserved = reserved_scenes(further)
    while True:
        group = random_group(rng, kinds)
        if group is None or any(scene.key in reserved for scene in group.scenes):
            continue
        if for_triplets and not all(allowed_in_triplets(s) for s in (group.reference, *group.targets)):
            continue
        yield group


def lookalike_sets(seed: str, further: tuple[str, ...] = ()) -> Iterator[tuple[Scene, ...]]:
    """Sets of eight scenes, without end, that differ in nothing but which shapes they show and where."""
    rng = random.Random(seed)
    reserved = reserved_scenes(further)
    while True:
        scene = random_scene(rng)
        found: dict[tuple, Scene] = {}
        for _ in range(60):
            scene = apply(scene, random_edit(rng, scene, rng.choice(["reshape", "move"])))
            if scene.key not in reserved:
                found[scene.key] = scene
            if len(found) == 8:
                yield tuple(found.values())
                break


def stage1_scenes(seed: str, further: tuple[str, ...] = ()) -> Iterator[Scene]:
    rng = random.Random(seed)
    reserved = reserved_scenes(further)
    while True:
        scene = random_scene(rng)
        if scene.key not in reserved and allowed_in_stage1(scene):
            yield scene


def training_garments(seed: str) -> Iterator[Garment]:
    rng = random.Random(seed)
    while True:
        garment = random_garment(rng)
        if garment not in reserved_garments():
            yield garment
