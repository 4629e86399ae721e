"""What people say of drawn scenes: captions (full or partial, as on the web) and modification texts.

Modification texts come in sets of wordings: one for each world, and one for captions that tell of changes. The test's
wordings never occur in training triplets or captions, though each of their words does: a small CLIP has no other
source of language.
"""

import random

from miniature.scenes import (
    BACKGROUNDS,
    COLOURS,
    FIELD_OF_KIND,
    SHAPES,
    TEXTURES,
    Edit,
    Scene,
    Shape,
)


PLACES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}


def with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def noun_phrase(shape: Shape, fields=("size", "texture", "colour"), place: bool = False) -> str:
    words = [getattr(shape, f) for f in ("size", "texture", "colour") if f in fields]
    phrase = with_article(" ".join([*words, shape.shape]))
    return f"{phrase} {PLACES[shape.position]}" if place else phrase


def full_caption(scene: Scene) -> str:
    """Everything that tells the scene from any other; the caption oracle's text."""
    shapes = " and ".join(noun_phrase(s, place=True) for s in sorted(scene.shapes, key=lambda s: s.position))
    return f"{shapes} on a {scene.background} background"


def full_variant(scene: Scene, rng: random.Random) -> str:
    shapes = list(scene.shapes)
    rng.shuffle(shapes)
    described = " and ".join(noun_phrase(s, place=True) for s in shapes)
    ground = scene.background
    return rng.choice(
        [
            f"{described} on a {ground} background",
            f"a {ground} background with {described}",
            f"{described} , {ground} background",
            f"a photo of {described} with {ground} behind",
        ]
    )


FRAMES = (
    "{np}",
    "a photo of {np}",
    "a picture of {np}",
    "this shows {np}",
    "there is {np}",
    "just {np}",
    "also {np}",
    "an image that has {np}",
)


def partial_caption(scene: Scene, rng: random.Random, frames: tuple[str, ...] = FRAMES) -> str:
    """A noun phrase or two, each attribute mentioned or not."""
    shapes = list(scene.shapes)
    rng.shuffle(shapes)
    if len(shapes) == 2 and rng.random() < 0.25:
        shapes.pop()
    phrases = [
        noun_phrase(s, [f for f in ("size", "texture", "colour") if rng.random() < 0.65], place=rng.random() < 0.55)
        for s in shapes
    ]
    text = rng.choice(frames).format(np=" and ".join(phrases))
    if rng.random() < 0.35:
        text += rng.choice(["", " ,"]) + rng.choice(
            [" on a {} background", " with {} behind", " with a {} background"]
        ).format(scene.background)
    return text


CLAUSES = {
    "colour": (
        "a photo of {noun} that is {new}",
        "{the} is {new}",
        "it is {new}",
        "{noun} , and {the} is now {new}",
        "{noun} in {new} , not {old}",
        "{noun} in {new} rather than {old}",
        "{noun} that should be {new}",
        "the colour of {the} has changed to {new}",
        "{the} was {old} and has been painted {new}",
        "{noun} , changed from {old} to {new}",
        "{new} instead of {old}",
        "{new} as the colour of {the}",
    ),
    "shape": (
        "{a_new} instead of {a_old}",
        "{a_new} rather than {a_old}",
        "{a_new} in place of {a_old}",
        "here {a_old} has been changed into {a_new}",
        "a photo of something that is {a_new}",
        "it is {a_new} , not {a_old}",
        "it was {a_old} and is now {a_new}",
        "there is no {old} , but there is {a_new}",
    ),
    "texture": (
        "a photo of {noun} that is {new}",
        "{the} is {new}",
        "it is {new}",
        "{noun} with a {new} pattern",
        "{noun} in a {new} look",
        "{noun} , {new} rather than {old}",
        "{noun} now with a {new} pattern on it",
        "{new} instead of {old}",
    ),
    "size": (
        "a photo of {noun} that is {new}",
        "{the} is {new}",
        "it is {new} in size",
        "{noun} , {new} rather than {old}",
        "a {new} one , not a {old} one",
        "{noun} {newer} than before",
        "{the} should be {newer}",
    ),
    "position": (
        "a photo of {noun} that is {new}",
        "{the} is {new}",
        "it is {new} now",
        "{noun} placed {new}",
        "{noun} moved {new}",
        "{new} , where {noun} goes",
        "{the} is {new} instead of {old}",
    ),
}
GROUND_CLAUSES = (
    "with a {new} background",
    "on {new}",
    "the background is {new}",
    "the background is {new} instead of {old}",
    "{new} behind everything",
    "a photo of {noun} that has a {new} background",
    "the background has been changed to {new}",
)
ABSENT_CLAUSES = (
    "without the {absent}",
    "no {absent}",
    "{noun} without any {absent}",
    "there is no {absent} any more",
    "it leaves out the {absent}",
    "the {absent} is gone",
)
RELATIONS = (
    "the {a} is {a_place} and the {b} is {b_place}",
    "two shapes , the {a} {a_place} and the {b} {b_place}",
    "{a_np} and another shape , {b_np}",
    "{a_np} with {b_np} too",
    "one more shape , {a_np} {a_place}",
    "both {a_np} and {b_np}",
    "the {b} is {b_place} , where the {a} was",
)


def newer(size: str, rng: random.Random) -> str:
    return rng.choice(["larger", "bigger"]) if size == "large" else "smaller"


def clause_caption(scene: Scene, rng: random.Random) -> str:
    """A sentence such as modifications are made of, true of this scene: "it is striped", "without the ring"."""
    shape = rng.choice(scene.shapes)
    noun = noun_phrase(shape, [f for f in ("size", "texture", "colour") if rng.random() < 0.3])
    the = rng.choice(["it", f"the {shape.shape}"])
    draw = rng.random()
    if draw < 0.12:
        old = rng.choice([b for b in BACKGROUNDS if b != scene.background])
        return rng.choice(GROUND_CLAUSES).format(new=scene.background, old=old, noun=noun)
    if draw < 0.22:
        absent = rng.choice([s for s in SHAPES if s not in {o.shape for o in scene.shapes}])
        return rng.choice(ABSENT_CLAUSES).format(absent=absent, noun=noun)
    if draw < 0.4 and len(scene.shapes) == 2:
        a, b = scene.shapes if rng.random() < 0.5 else scene.shapes[::-1]
        return rng.choice(RELATIONS).format(
            a=a.shape,
            b=b.shape,
            a_place=PLACES[a.position],
            b_place=PLACES[b.position],
            a_np=noun_phrase(a, [f for f in ("size", "colour") if rng.random() < 0.6]),
            b_np=noun_phrase(b, [f for f in ("size", "colour") if rng.random() < 0.6]),
        )
    field = rng.choice(list(CLAUSES))
    values = {"colour": COLOURS, "shape": SHAPES, "texture": TEXTURES, "size": ("small", "large"), "position": PLACES}
    present = {s.shape for s in scene.shapes} if field == "shape" else {getattr(shape, field)}
    old, new = rng.choice([v for v in values[field] if v not in present]), getattr(shape, field)
    if field == "position":
        old, new = PLACES[old], PLACES[new]
    noun = noun_phrase(shape, [f for f in ("size", "texture", "colour") if f != field and rng.random() < 0.4])
    return rng.choice(CLAUSES[field]).format(
        noun=noun, the=the, new=new, old=old, a_new=with_article(new), a_old=with_article(old), newer=newer(new, rng)
    )


def scene_caption(scene: Scene, rng: random.Random, full_share: float = 0.2, clause_share: float = 0.3) -> str:
    """A varied caption: full, or a clause, or (mostly) a partial description."""
    draw = rng.random()
    if draw < full_share:
        return full_variant(scene, rng)
    if draw < full_share + clause_share:
        return clause_caption(scene, rng)
    return partial_caption(scene, rng)


CHANGE_FRAMES = (
    "a photo of {before} that {change}",
    "{before} , {change}",
    "{before} , but {change}",
    "the same as {before} but {change}",
    "it was {before} , {change}",
    "{change} , was {before}",
)


def change_caption(before: Scene, edit: Edit, rng: random.Random) -> str:
    """What a picture shows, told as a change of another: "a red star on the left , but the star is now blue"."""
    described = full_variant(before, rng) if rng.random() < 0.6 else partial_caption(before, rng, ("{np}",))
    described = described.removeprefix("a photo of ")
    return rng.choice(CHANGE_FRAMES).format(before=described, change=modification(before, edit, "captions", rng))


# One tuple of wordings a kind and world. {it} is "it" or "the star"; {new} and {old} are attributes.
WORDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "recolour": ("make {it} {new}", "{it} is {new}", "change the colour of {it} to {new}", "{it} in {new}",
                     "turn {it} {new}", "{new} instead of {old}", "it is the same but {it} is {new}"),
        "reshape": ("turn the {old} into {a_new}", "make the {old} {a_new}", "{a_new} instead of the {old}",
                    "replace the {old} with {a_new}", "change the {old} to {a_new}", "the {old} becomes {a_new}"),
        "retexture": ("make {it} {new}", "{it} is {new}", "give {it} a {new} pattern", "change {it} to {new}",
                      "{it} {new} instead of {old}", "{it} in a {new} pattern"),
        "resize": ("make {it} {newer}", "{it} is {newer}", "a {newer} {shape}", "change {it} to a {new} one",
                   "{it} in {new}", "the {shape} is {new} , not {old}"),
        "move": ("move {it} {place}", "put {it} {place}", "{it} is {place}", "{it} {place} instead of {old_place}",
                 "shift {it} so that it is {place}", "{it} goes {place}"),
        "add": ("add {np} {place}", "put {np} {place}", "with {np} {place} too", "and {np} {place}",
                "there is also {np} {place}", "the same and {np} {place}"),
        "remove": ("remove the {shape}", "without the {shape}", "no {shape}", "take the {shape} away",
                   "delete the {shape}", "only the {other} is there"),
        "swap": ("swap the {shape} and the {other}", "the {shape} and the {other} trade places",
                 "exchange the two shapes", "swap the two", "the two shapes change places with each other"),
    },
    # What captions of the CLIP's own training say of a picture beside another one, see `change_caption`.
    "captions": {
        "recolour": ("{it} is now {new}", "{it} in {new} this time", "{new} , not {old} , for {it}",
                     "with {it} made {new}", "turns {it} from {old} to {new}"),
        "reshape": ("{a_new} takes the place of the {old}", "the {old} turned into {a_new}",
                    "with {a_new} and no {old}", "makes {a_new} of the {old}"),
        "retexture": ("{it} is now {new}", "with a {new} look for {it}", "{it} made {new} , not {old}",
                      "makes {it} {new}"),
        "resize": ("{it} is now {newer}", "makes {it} {newer}", "{it} is {new} this time",
                   "with {it} {new} , not {old}"),
        "move": ("{it} is now {place}", "puts {it} {place}", "{it} , not {old_place} but {place}",
                 "with {it} put {place}"),
        "add": ("and now also {np} {place}", "adds {np} {place}", "with one more , {np} {place}",
                "{np} put {place} too"),
        "remove": ("now without the {shape}", "but no {shape}", "takes away the {shape}", "with only the {other}"),
        "swap": ("the {shape} and the {other} swapped", "with the two shapes swapped",
                 "the {shape} now where the {other} was", "puts each of the two where the other was"),
        "background": ("now on a {new} background", "with {new} and not {old} behind", "makes the background {new}",
                       "the background is {new} this time"),
    },
    "val": {
        "recolour": ("{it} painted {new}", "has {it} in {new} and not in {old}", "{it} becomes {new}"),
        "reshape": ("the {old} is now {a_new}", "there is {a_new} where the {old} was"),
        "retexture": ("has {it} in a {new} look", "with {it} {new} and not {old}"),
        "resize": ("with {it} {newer} than before", "there is a {new} {shape} and not a {old} one"),
        "move": ("has {it} {place} and not {old_place}", "take {it} from there and put it {place}"),
        "add": ("has {np} {place} too", "there is another shape , {np} {place}"),
        "remove": ("there is no {shape}", "has the {other} only"),
        "swap": ("the {shape} is where the {other} was and the {other} where the {shape} was", "trade the two shapes"),
        "background": ("on a {new} background", "with {new} behind and not {old}"),
    },
    "test": {
        "recolour": ("has {new} as the colour of {it}", "{it} should now be {new}",
                     "{it} has been changed from {old} to {new}"),
        "reshape": ("has {a_new} in place of the {old}", "has {a_new} there rather than {a_old}",
                    "the {old} has been changed into {a_new}"),
        "retexture": ("with a {new} pattern on {it}", "{it} {new} rather than {old}", "{it} should now be {new}"),
        "resize": ("{it} should now be {newer}", "a {new} {shape} rather than a {old} one", "has {it} {new} in size"),
        "move": ("has {it} placed {place}", "{it} should now be {place}", "with {it} moved {place}"),
        "add": ("also has {np} {place}", "one more shape , {np} , goes {place}", "with another shape {place} , {np}"),
        "remove": ("the {shape} has gone away", "has no {shape} any more", "leaves out the {shape}"),
        "swap": ("the two shapes changed places",
                 "the {shape} should be where the {other} is , and the other one where it was",
                 "both shapes trade places"),
        "background": ("has {new} as the background", "the background should now be {new}",
                       "with {new} behind everything instead of {old}"),
    },
}  # fmt: skip


def modification(scene: Scene, edit: Edit, world: str, rng: random.Random) -> str:
    """A text that asks for `edit` of `scene`, in the wordings of `world`.

    It alone, with the scene, fixes the target: an added shape is named in full, and a scene of two shapes says which.
    """
    shape = scene.shapes[edit.index]
    others = [s for s in scene.shapes if s is not shape]
    words = {"shape": shape.shape, "other": others[0].shape if others else "", "it": f"the {shape.shape}"}
    if not others and rng.random() < 0.5:
        words["it"] = "it"
    templates = WORDINGS[world][edit.kind]
    if edit.kind in FIELD_OF_KIND:
        old = getattr(shape, FIELD_OF_KIND[edit.kind])
        words |= {"old": old, "new": edit.value, "a_old": with_article(old), "a_new": with_article(edit.value)}
        if edit.kind == "resize":
            words["newer"] = newer(edit.value, rng)
        if edit.kind == "move":
            words |= {"place": PLACES[edit.value], "old_place": PLACES[old]}
        if edit.kind == "recolour" and others and others[0].colour == old:
            # "red instead of blue" would not say which of two blue shapes is meant
            templates = [t for t in templates if "{it}" in t]
    elif edit.kind == "add":
        words |= {"np": noun_phrase(edit.value), "place": PLACES[edit.value.position]}
    elif edit.kind == "background":
        words |= {"old": scene.background, "new": edit.value}
    return rng.choice(templates).format(**words)
