"""What is measured: works at fixed sizes, and how their cost grows."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from peers import Levers
from ways import (
    decoding,
    limit_of_queries,
    lincirs_stage1,
    one_core,
    our_evaluation,
    our_gallery,
    our_mining,
    our_queries,
    our_ranking,
    our_stage1,
    our_stage2,
    peers_evaluation,
    peers_gallery,
    peers_queries,
    peers_ranking,
    peers_stage1,
    peers_stage2,
    product_and_partial_sort,
    text_forward_and_backward,
    vision_forward,
)


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
COMPILED, APART = "ours, + torch.compile", "ours, + each token by itself"
QUERIES = {
    "ours": our_queries,
    COMPILED: partial(our_queries, compiled=True),
    "ours, + prompt alone": partial(our_queries, residual=0.0, weight=0.0),
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
            COMPILED: partial(our_stage1, cached=False, compiled=True),
            APART: partial(our_stage1, cached=False, apart=True),
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
            COMPILED: partial(our_stage1, cached=True, compiled=True),
            APART: partial(our_stage1, cached=True, apart=True),
            **with_levers(peers_stage1, short_texts=SHORT, cached_pictures=CACHED, bf16=BF16),
            "LinCIR's way": lincirs_stage1,
        },
        (40, None),
    ),
    "stage II step": Work(
        {"ViT-B/32": {"rows": 32}, "ViT-L/14": {"rows": 8}},
        {
            "ours": our_stage2,
            COMPILED: partial(our_stage2, compiled=True),
            APART: partial(our_stage2, apart=True),
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
