"""What people say of drawn garments: captions, and relative captions as FashionIQ's annotators write them."""

import random

from miniature.garments import Garment
from miniature.language import FRAMES, with_article


GARMENT_FULL = (
    "a {length} {pattern} {colour} {category} with {sleeves} and a {neckline} neck",
    "a {colour} {category} , {length} and {pattern} , with a {neckline} neckline and {sleeves}",
)
SLEEVE_WORDS = {"no": "no sleeves", "short": "short sleeves", "long": "long sleeves"}


def pattern_words(garment: Garment) -> str:
    return garment.pattern if garment.pattern_colour is None else f"{garment.pattern_colour} {garment.pattern}"


def garment_caption(garment: Garment, rng: random.Random) -> str:
    g = garment
    if rng.random() < 0.35:
        return rng.choice(GARMENT_FULL).format(
            length=g.length,
            pattern=pattern_words(g),
            colour=g.colour,
            category=g.category,
            sleeves=SLEEVE_WORDS[g.sleeves],
            neckline=g.neckline,
        )
    if rng.random() < 0.4:
        return rng.choice(["it ", f"the {g.category} ", "this one "]) + garment_clause(
            g, rng.choice(("colour", "pattern", "sleeves", "length", "neckline")), "train", rng
        )
    words = [w for w in (g.length, pattern_words(g), g.colour) if rng.random() < 0.55]
    text = rng.choice(FRAMES).format(np=with_article(" ".join([*words, g.category])))
    extras = [e for e in (SLEEVE_WORDS[g.sleeves], f"a {g.neckline} neck") if rng.random() < 0.4]
    return f"{text} with {' and '.join(extras)}" if extras else text


GARMENT_WORDINGS = {
    "train": {
        "colour": ("is {colour}", "is more {colour}", "comes in {colour}"),
        "pattern": ("is {pattern}", "has a {pattern} pattern"),
        "sleeves": ("has {sleeves}", "comes with {sleeves}"),
        "length": ("is {length} in length", "is {longer}"),
        "neckline": ("has a {neckline} neck", "has a {neckline} neckline"),
    },
    "val": {
        "colour": ("is in {colour}", "has the colour {colour}"),
        "pattern": ("comes in a {pattern} look", "is now {pattern}"),
        "sleeves": ("is with {sleeves}",),
        "length": ("is {longer} than before",),
        "neckline": ("is with a {neckline} neckline",),
    },
    "test": {
        "colour": ("should be {colour}", "has {colour} as the colour"),
        "pattern": ("should be {pattern}", "is in a {pattern} pattern"),
        "sleeves": ("should be with {sleeves}",),
        "length": ("should be {longer}",),
        "neckline": ("should be with a {neckline} neck",),
    },
}


def garment_clause(garment: Garment, field: str, world: str, rng: random.Random) -> str:
    """One relative caption about `field` of the wanted garment, as FashionIQ's annotators write them."""
    return rng.choice(GARMENT_WORDINGS[world][field]).format(
        colour=garment.colour,
        pattern=pattern_words(garment),
        sleeves=SLEEVE_WORDS[garment.sleeves],
        length=garment.length,
        longer="longer" if garment.length == "long" else "shorter",
        neckline=garment.neckline,
    )
