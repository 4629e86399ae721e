"""Write the miniature world to disk, in the formats that real data has.

    python -m miniature.build --output_dir runs/miniature/world

    captions/       captioned images of the training world (parquet: image, caption), for stage I
    triplets/       synthetic triplets of the training world (parquet: reference, modification, target), for stage II
    {val,test}/CIRR, FashionIQ, CIRCO    benchmarks of the other two worlds, laid out as the real ones are

The same seed gives the same bytes. Both benchmark worlds carry their truths, under the split name "val" that real
benchmarks publish truths for.
"""

import argparse
import io
import itertools
import json
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from miniature.garment_language import garment_caption, garment_clause
from miniature.garments import CATEGORIES, Garment
from miniature.language import full_caption, modification, noun_phrase, scene_caption
from miniature.render import render
from miniature.scenes import Scene
from miniature.worlds import (
    ALL_FURTHER,
    FURTHER,
    GarmentQuery,
    SceneWorld,
    further_scene_worlds,
    garment_pairs,
    garment_worlds,
    scene_worlds,
    stage1_scenes,
    training_garments,
    training_groups,
)


NUM_CAPTIONED_SCENES = 12_000
NUM_CAPTIONED_GARMENTS = 2_000
NUM_TRIPLETS = 4_000
CIRCO_KINDS = frozenset({"recolour", "reshape", "retexture", "background"})  # edits that leave size and place open
FASHIONIQ_NAMES = {"dress": "dress", "shirt": "shirt", "top": "toptee"}


def encode(thing: Scene | Garment, seed: str, file_format: str) -> bytes:
    buffer = io.BytesIO()
    options = {"compress_level": 1} if file_format == "png" else {"quality": 95}
    Image.fromarray(render(thing, seed)).save(buffer, file_format, **options)
    return buffer.getvalue()


def pictures(things: Sequence[Scene | Garment], seed: str, file_format: str = "png") -> list[bytes]:
    seeds = [f"{seed} {i}" for i in range(len(things))]
    with ProcessPoolExecutor() as pool:
        return list(pool.map(encode, things, seeds, itertools.repeat(file_format), chunksize=256))


def write_pictures(paths: Sequence[Path], things: Sequence[Scene | Garment], seed: str) -> None:
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)
    file_format = "jpeg" if paths[0].suffix == ".jpg" else "png"
    for path, content in zip(paths, pictures(things, seed, file_format), strict=True):
        path.write_bytes(content)


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_parquet(path: Path, columns: dict[str, list], images: Sequence[str]) -> None:
    features = Features({name: ImageFeature() if name in images else Value("string") for name in columns})
    columns = {
        name: [{"bytes": content, "path": None} for content in values] if name in images else values
        for name, values in columns.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns, features=features).to_parquet(path)


def write_captions(output: Path, seed: int, further: tuple[str, ...] = ()) -> None:
    rng = random.Random(f"captions {seed}")
    scenes = stage1_scenes(f"stage1 {seed}", further)
    things: list[Scene | Garment] = list(itertools.islice(scenes, NUM_CAPTIONED_SCENES))
    things += itertools.islice(training_garments(f"stage1 {seed}"), NUM_CAPTIONED_GARMENTS)
    captions = [scene_caption(t, rng) if isinstance(t, Scene) else garment_caption(t, rng) for t in things]
    columns = {"image": pictures(things, f"captions {seed}"), "caption": captions}
    write_parquet(output / "captions" / "train-00000-of-00001.parquet", columns, images=["image"])


def write_triplets(output: Path, seed: int, further: tuple[str, ...] = (), number: int | None = None) -> None:
    """True edits in the training wordings, two of each reference."""
    rng = random.Random(f"triplets {seed}")
    drawn = training_groups(f"triplets {seed}", for_triplets=True, further=further)
    groups = list(itertools.islice(drawn, (number or NUM_TRIPLETS) // 2))
    references = pictures([g.reference for g in groups], f"references {seed}")
    targets = pictures([t for g in groups for t in g.targets[:2]], f"targets {seed}")
    columns: dict[str, list] = {"reference": [], "modification": [], "target": [], "source": [], "quality": []}
    columns |= {"reference_id": [], "target_id": []}
    for i, group in enumerate(groups):
        for j, edit in enumerate(group.edits[:2]):
            columns["reference"].append(references[i])
            columns["modification"].append(modification(group.reference, edit, "train", rng))
            columns["target"].append(targets[2 * i + j])
            columns["source"].append(f"miniature {edit.kind}")
            columns["quality"].append("high")
            columns["reference_id"].append(f"{i}")
            columns["target_id"].append(f"{i}-{j}")
    write_parquet(output / "triplets" / "train-00000-of-00001.parquet", columns, images=["reference", "target"])


def scenes_of(world: str) -> SceneWorld:
    return scene_worlds()[world] if world in scene_worlds() else further_scene_worlds()[world]


def wordings_of(world: str) -> str:
    """A further world speaks as the one it is named for."""
    return world.partition("-")[0]


def write_cirr(output: Path, world: str) -> None:
    """CIRR's layout. Each query's six-picture set: its reference, its target, two pictures that fit the text but not
    the reference, and two that fit the reference but not the text."""
    groups, fillers = scenes_of(world)
    rng = random.Random(f"cirr {world}")
    names: list[str] = []
    scenes: list[Scene] = []
    queries = []
    for number, group in enumerate(groups):
        members = {scene.key: f"dev-{number}-{i}-img0" for i, scene in enumerate(group.scenes)}
        names += members.values()
        scenes += group.scenes
        for i, edit in enumerate(group.edits):
            others = [members[t.key] for j, t in enumerate(group.targets) if j != i]
            subset = [members[group.reference.key], members[group.targets[i].key]]
            subset += [members[s.key] for s in group.doubles[i]] + rng.sample(others, 2)
            rng.shuffle(subset)
            reference, target = members[group.reference.key], members[group.targets[i].key]
            queries.append(
                {
                    "pairid": len(queries),
                    "reference": reference,
                    "target_hard": target,
                    "target_soft": {target: 1.0},
                    "caption": modification(group.reference, edit, wordings_of(world), rng),
                    "img_set": {
                        "id": number,
                        "members": subset,
                        "reference_rank": subset.index(reference),
                        "target_rank": subset.index(target),
                    },
                }
            )
    names += [f"dev-filler-{i}-img0" for i in range(len(fillers))]
    scenes += fillers
    root = output / world / "CIRR"
    write_pictures([root / "dev" / f"{name}.png" for name in names], scenes, f"cirr {world}")
    write_json(root / "cirr/captions/cap.rc2.val.json", queries)
    write_json(root / "cirr/image_splits/split.rc2.val.json", {name: f"./dev/{name}.png" for name in names})
    # Not part of CIRR: what the caption oracle reads.
    write_json(root / "full_captions.json", {n: full_caption(s) for n, s in zip(names, scenes, strict=True)})


def write_fashioniq(output: Path, world: str) -> None:
    write_garment_queries(output / world / "FashionIQ", world, garment_worlds()[world].queries)


def write_garment_queries(
    root: Path, world: str, queries: dict[str, tuple[GarmentQuery, ...]], drawn_as: str | None = None
) -> None:
    """FashionIQ's layout, with `queries` among `world`'s garments; another name to draw as gives other pictures."""
    drawn_as = drawn_as or world
    rng = random.Random(f"fashioniq {drawn_as}")
    worlds = garment_worlds()[world]
    for category in CATEGORIES:
        name = FASHIONIQ_NAMES[category]
        garments: dict[str, Garment] = {}
        for i, query in enumerate(worlds.queries[category]):
            garments |= {f"{name}{i:05d}R": query.reference, f"{name}{i:05d}T": query.target}
        garments |= {f"{name}{i:05d}F": garment for i, garment in enumerate(worlds.fillers[category])}
        names = {garment: identifier for identifier, garment in garments.items()}
        captions = []
        for query in queries[category]:
            pair = [garment_clause(query.target, field, world, rng) for field in query.fields]
            captions.append({"target": names[query.target], "candidate": names[query.reference], "captions": pair})
        files = [root / "images" / f"{garment}.png" for garment in garments]
        write_pictures(files, list(garments.values()), f"fashioniq {drawn_as} {name}")
        write_json(root / f"captions/cap.{name}.val.json", captions)
        write_json(root / f"image_splits/split.{name}.val.json", list(garments))


def kept_in_circo(scene: Scene) -> tuple:
    """What a CIRCO-like query fixes: sizes and places are free, so several pictures are true."""
    return tuple(sorted((s.shape, s.colour, s.texture) for s in scene.shapes)), scene.background


def write_circo(output: Path, world: str) -> None:
    groups, fillers = scenes_of(world)
    rng = random.Random(f"circo {world}")
    scenes = [s for g in groups for s in g.scenes] + list(fillers)
    ids = rng.sample(range(1, 600_000), len(scenes))
    by_content: dict[tuple, list[int]] = {}
    for scene, number in zip(scenes, ids, strict=True):
        by_content.setdefault(kept_in_circo(scene), []).append(number)
    records = []
    for i, group in enumerate(groups):
        for j, edit in enumerate(group.edits):
            truths = by_content[kept_in_circo(group.targets[j])]
            if edit.kind not in CIRCO_KINDS or len(truths) < 2 or ids[9 * i] in truths:
                continue
            target = ids[9 * i + 1 + j]
            concept = " and ".join(noun_phrase(s, ("texture", "colour")) for s in group.reference.shapes)
            records.append(
                {
                    "reference_img_id": ids[9 * i],
                    "target_img_id": target,
                    "relative_caption": modification(group.reference, edit, wordings_of(world), rng),
                    "shared_concept": concept,
                    "gt_img_ids": [target, *(t for t in truths if t != target)],
                    "id": len(records),
                    "semantic_aspects": ["direct_addressing"],
                }
            )
    root = output / world / "CIRCO"
    folder = root / "COCO2017_unlabeled" / "unlabeled2017"
    write_pictures([folder / f"{number:012d}.jpg" for number in ids], scenes, f"circo {world}")
    info = {"images": [{"id": n, "file_name": f"{n:012d}.jpg", "height": 64, "width": 64} for n in ids]}
    write_json(root / "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json", info)
    write_json(root / "annotations/val.json", records)


CARD = Path(__file__).with_name("dataset_card.md")
WRITERS: dict[str, Callable[[Path, str], None]] = {
    "cirr": write_cirr,
    "fashioniq": write_fashioniq,
    "circo": write_circo,
}


def build(output: Path, benchmarks: Sequence[str] = tuple(WRITERS), seed: int = 0) -> None:
    """Write the whole world, or only some of its benchmarks.

    Args:
        output (`Path`): the folder; a world that it holds is made anew.
        benchmarks: of "cirr", "fashioniq" and "circo".
        seed (`int`): draws another training set from the same training world; benchmarks do not depend on it.

    Raises:
        ValueError: if the folder holds anything else.
    """
    if output.is_dir() and any(output.iterdir()) and not is_world(output):
        raise ValueError(f"{output} is no world of the miniature's, and would be removed; name a new folder")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    (output / "README.md").write_text(CARD.read_text(encoding="utf-8"), encoding="utf-8")
    write_captions(output, seed)
    write_triplets(output, seed)
    for world in ("val", "test"):
        for name in benchmarks:
            WRITERS[name](output, world)


def is_world(folder: Path) -> bool:
    """Whether a folder is one that `build` made, or began to make."""
    card = folder / "README.md"
    return card.is_file() and card.read_bytes() == CARD.read_bytes()


def build_further(output: Path, splits: Sequence[str] = tuple(FURTHER), per_category: int = 1400) -> None:
    """The further worlds' benchmarks, at least 4,000 queries each for each of these of ALL_FURTHER.

    CIRR's layout in two worlds (4,800 queries), CIRCO's in four, FashionIQ's once, with `per_category` queries among
    the pictures that the world has anyway, since there are no more garments.
    """
    for split in splits:
        names = ALL_FURTHER[split]
        for name in names[:2]:
            write_cirr(output, name)
        for name in names:
            write_circo(output, name)
        pairs = garment_pairs(split, per_category)
        write_garment_queries(output / names[0] / "FashionIQ", wordings_of(names[0]), pairs, drawn_as=split)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="new, or a world, which is made anew")
    parser.add_argument("--benchmarks", nargs="*", choices=list(WRITERS), default=list(WRITERS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        build(args.output_dir, args.benchmarks, args.seed)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
