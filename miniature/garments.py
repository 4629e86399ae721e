"""Drawn garments: what a garment is and how it may be edited."""

import random
from typing import NamedTuple

from miniature.scenes import COLOURS


CATEGORIES = ("dress", "shirt", "top")
PATTERNS = ("plain", "striped", "dotted", "checked")
SLEEVES = ("no", "short", "long")
LENGTHS = ("short", "long")
NECKLINES = ("round", "v", "square")


class Garment(NamedTuple):
    """One garment; `pattern_colour` is None where the pattern is plain."""

    category: str
    colour: str
    pattern: str
    pattern_colour: str | None
    sleeves: str
    length: str
    neckline: str

    @property
    def key(self) -> tuple:
        return tuple(self)


EDITABLE = ("colour", "pattern", "sleeves", "length", "neckline")


def random_garment(rng: random.Random, category: str | None = None) -> Garment:
    colour = rng.choice(COLOURS)
    pattern = rng.choice(PATTERNS)
    pattern_colour = None if pattern == "plain" else rng.choice([c for c in COLOURS if c != colour])
    return Garment(
        category or rng.choice(CATEGORIES),
        colour,
        pattern,
        pattern_colour,
        rng.choice(SLEEVES),
        rng.choice(LENGTHS),
        rng.choice(NECKLINES),
    )


def random_two_edits(rng: random.Random, garment: Garment) -> tuple[Garment, tuple[str, str]]:
    """A garment that differs in two attributes, and their names: one for each of a query's two captions."""
    first, second = rng.sample(EDITABLE, 2)
    edited = garment
    for field in (first, second):
        edited = change(rng, edited, field)
    return edited, (first, second)


def changed_fields(reference: Garment, target: Garment) -> list[str]:
    """The attributes whose edits turn `reference` into `target`; none if no such edits do."""
    fields = [field for field in EDITABLE if getattr(reference, field) != getattr(target, field)]
    same_pattern_recoloured = "pattern" not in fields and reference.pattern_colour != target.pattern_colour
    return [] if same_pattern_recoloured else fields


def change(rng: random.Random, garment: Garment, field: str) -> Garment:
    if field == "pattern":
        pattern = rng.choice([p for p in PATTERNS if p != garment.pattern])
        colour = None if pattern == "plain" else rng.choice([c for c in COLOURS if c != garment.colour])
        return garment._replace(pattern=pattern, pattern_colour=colour)
    if field == "colour":
        return garment._replace(
            colour=rng.choice([c for c in COLOURS if c not in (garment.colour, garment.pattern_colour)])
        )
    values = {"sleeves": SLEEVES, "length": LENGTHS, "neckline": NECKLINES}[field]
    return garment._replace(**{field: rng.choice([v for v in values if v != getattr(garment, field)])})
