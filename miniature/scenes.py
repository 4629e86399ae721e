"""Scenes of one or two drawn shapes: what a scene is, how it may be edited, and how near-duplicates are grouped."""

import random
from typing import NamedTuple


COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "brown", "white")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond", "hexagon", "crescent")
TEXTURES = ("plain", "striped", "dotted", "checked")
SIZES = ("small", "large")
POSITIONS = ("left", "right", "top", "bottom", "middle")
BACKGROUNDS = ("black", "grey", "navy", "beige", "mint", "lilac")
KINDS = ("recolour", "reshape", "retexture", "resize", "move", "add", "remove", "swap", "background")

# What the learner never meets, so that the test can ask for it (the CLIP itself has met all of it).
KINDS_NOT_IN_TRIPLETS = frozenset({"background"})
SHAPES_NOT_IN_TRIPLETS = frozenset({"heart"})
SHAPES_NOT_IN_STAGE1 = frozenset({"hexagon"})
PAIRS_NOT_IN_TRIPLETS = frozenset({("star", "green"), ("circle", "purple"), ("cross", "red"), ("diamond", "pink")})
PAIRS_NOT_IN_STAGE1 = frozenset({("square", "yellow"), ("ring", "blue"), ("triangle", "brown")})


class Shape(NamedTuple):
    """One drawn shape; every field is one of the tuples above."""

    shape: str
    colour: str
    texture: str
    size: str
    position: str


class Scene(NamedTuple):
    """One or two shapes of different kinds at different places, on a background."""

    shapes: tuple[Shape, ...]
    background: str

    @property
    def key(self) -> tuple:
        """The same for two scenes that a viewer cannot tell apart."""
        return tuple(sorted(self.shapes)), self.background


class Edit(NamedTuple):
    """A change of one scene: `kind` of KINDS, `index` of the shape it touches, `value` the new attribute or Shape."""

    kind: str
    index: int
    value: str | Shape | None


def free_positions(shapes: tuple[Shape, ...], count: int) -> list[str]:
    """Places where another shape may stand; the middle is for a scene of one shape, so that shapes never touch."""
    taken = {shape.position for shape in shapes}
    return [p for p in POSITIONS if p not in taken and (count == 1 or p != "middle")]


def random_shape(rng: random.Random, others: tuple[Shape, ...], count: int) -> Shape:
    return Shape(
        rng.choice([s for s in SHAPES if s not in {o.shape for o in others}]),
        rng.choice(COLOURS),
        rng.choice(TEXTURES),
        rng.choice(SIZES),
        rng.choice(free_positions(others, count)),
    )


def random_scene(rng: random.Random) -> Scene:
    count = 1 if rng.random() < 0.35 else 2
    shapes: tuple[Shape, ...] = ()
    for _ in range(count):
        shapes += (random_shape(rng, shapes, count),)
    return Scene(shapes, rng.choice(BACKGROUNDS))


def possible_kinds(scene: Scene) -> list[str]:
    if len(scene.shapes) == 2:
        return [k for k in KINDS if k != "add"]
    kinds = [k for k in KINDS if k not in ("remove", "swap")]
    return [k for k in kinds if k != "add" or scene.shapes[0].position != "middle"]


def random_edit(rng: random.Random, scene: Scene, kind: str) -> Edit:
    index = rng.randrange(len(scene.shapes))
    old = scene.shapes[index]
    others = scene.shapes[:index] + scene.shapes[index + 1 :]

    def another(values, current):
        return rng.choice([v for v in values if v != current])

    value: str | Shape | None = None
    if kind == "recolour":
        value = another(COLOURS, old.colour)
    elif kind == "reshape":
        value = another([s for s in SHAPES if s not in {o.shape for o in others}], old.shape)
    elif kind == "retexture":
        value = another(TEXTURES, old.texture)
    elif kind == "resize":
        value = another(SIZES, old.size)
    elif kind == "move":
        value = rng.choice(free_positions(scene.shapes, len(scene.shapes)))
    elif kind == "add":
        value = random_shape(rng, scene.shapes, 2)._replace(texture="plain")
    elif kind == "background":
        value = another(BACKGROUNDS, scene.background)
    return Edit(kind, index, value)


FIELD_OF_KIND = {
    "recolour": "colour",
    "reshape": "shape",
    "retexture": "texture",
    "resize": "size",
    "move": "position",
}


def apply(scene: Scene, edit: Edit) -> Scene:
    """The edited scene. Indices refer to the scene that the edit was made for, also after another edit came first."""
    shapes = list(scene.shapes)
    if edit.kind in FIELD_OF_KIND:
        shapes[edit.index] = shapes[edit.index]._replace(**{FIELD_OF_KIND[edit.kind]: edit.value})
    elif edit.kind == "add":
        shapes.append(edit.value)
    elif edit.kind == "remove":
        del shapes[edit.index]
    elif edit.kind == "swap":
        first, second = shapes
        shapes = [first._replace(position=second.position), second._replace(position=first.position)]
    elif edit.kind == "background":
        return scene._replace(background=edit.value)
    return scene._replace(shapes=tuple(shapes))


def compatible(a: Edit, b: Edit) -> bool:
    """Whether both edits can hold at once, each saying something about another part of the scene."""
    if a.kind == b.kind and (a.kind in ("add", "remove", "swap", "background") or a.index == b.index):
        return False
    kinds = {a.kind, b.kind}
    if "swap" in kinds and kinds & {"move", "remove"}:
        return False
    if "add" in kinds and "move" in kinds:
        return False
    if kinds == {"move"} and a.value == b.value:
        return False
    if kinds == {"reshape"} and a.value == b.value:
        return False
    if "add" in kinds and "reshape" in kinds:
        added, reshaped = (a, b) if a.kind == "add" else (b, a)
        return added.value.shape != reshaped.value
    if "remove" in kinds:
        removed, other = (a, b) if a.kind == "remove" else (b, a)
        return other.kind == "background" or (other.kind in FIELD_OF_KIND and other.index != removed.index)
    return True


class Group(NamedTuple):
    """A reference with `edits`, the scene that each edit alone gives (`targets`), and the scenes that two edits give.

    `doubles[i]` holds the scenes in which edit i holds together with another one: they fit the text of edit i but not
    the reference. The other edits' targets fit the reference but not the text.
    """

    reference: Scene
    edits: tuple[Edit, ...]
    targets: tuple[Scene, ...]
    doubles: tuple[tuple[Scene, ...], ...]

    @property
    def scenes(self) -> tuple[Scene, ...]:
        unique = {scene.key: scene for row in self.doubles for scene in row}
        return (self.reference, *self.targets, *unique.values())


PAIRED_EDITS = ((0, 1), (2, 3), (0, 2), (1, 3))  # each of four edits stands in two double edits


def apply_both(scene: Scene, a: Edit, b: Edit) -> Scene:
    # A removal goes last, as it shifts the indices; so does an addition, which then meets the final shapes.
    first, second = sorted((a, b), key=lambda edit: edit.kind in ("remove", "add"))
    return apply(apply(scene, first), second)


def random_group(rng: random.Random, allowed_kinds: frozenset[str]) -> Group | None:
    """Four compatible edits of one random scene and their four double edits; None where the draw does not work out."""
    scene = random_scene(rng)
    kinds = [k for k in possible_kinds(scene) if k in allowed_kinds]
    edits: list[Edit] = []
    for _ in range(40):
        edit = random_edit(rng, scene, rng.choice(kinds))
        if all(compatible(edit, other) for other in edits):
            edits.append(edit)
        if len(edits) == 4:
            break
    else:
        return None
    doubles: list[list[Scene]] = [[] for _ in edits]
    for i, j in PAIRED_EDITS:
        both = apply_both(scene, edits[i], edits[j])
        doubles[i].append(both)
        doubles[j].append(both)
    group = Group(scene, tuple(edits), tuple(apply(scene, e) for e in edits), tuple(map(tuple, doubles)))
    return group if len({s.key for s in group.scenes}) == 9 else None


def allowed_in_triplets(scene: Scene) -> bool:
    return not any(
        s.shape in SHAPES_NOT_IN_TRIPLETS or (s.shape, s.colour) in PAIRS_NOT_IN_TRIPLETS for s in scene.shapes
    )


def allowed_in_stage1(scene: Scene) -> bool:
    return not any(s.shape in SHAPES_NOT_IN_STAGE1 or (s.shape, s.colour) in PAIRS_NOT_IN_STAGE1 for s in scene.shapes)
