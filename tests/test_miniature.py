import io
import itertools
import json
import random
import re

import pytest
from conftest import ROOT
from PIL import Image

from miniature import build as build_module
from miniature import demo, summarise
from miniature.compare import SHOWN, read_benchmark
from miniature.garment_language import GARMENT_WORDINGS, garment_caption, garment_clause
from miniature.garments import CATEGORIES
from miniature.language import (
    ABSENT_CLAUSES,
    CLAUSES,
    GROUND_CLAUSES,
    RELATIONS,
    WORDINGS,
    change_caption,
    full_caption,
    modification,
    scene_caption,
)
from miniature.render import render
from miniature.scenes import (
    KINDS_NOT_IN_TRIPLETS,
    PAIRS_NOT_IN_STAGE1,
    PAIRS_NOT_IN_TRIPLETS,
    SHAPES_NOT_IN_STAGE1,
    SHAPES_NOT_IN_TRIPLETS,
    apply,
)
from miniature.worlds import (
    ALL_FURTHER,
    further_scene_worlds,
    garment_pairs,
    garment_worlds,
    lookalike_sets,
    reserved_garments,
    reserved_scenes,
    scene_worlds,
    stage1_scenes,
    training_garments,
    training_groups,
)


def scenes_of(world: str) -> list:
    groups, fillers = scene_worlds()[world]
    return [s for g in groups for s in g.scenes] + list(fillers)


def test_no_scene_is_in_two_worlds_or_twice_in_one():
    val, test = ([s.key for s in scenes_of(w)] for w in ("val", "test"))
    assert len({*val, *test}) == len(val) + len(test) == len(reserved_scenes())
    groups = itertools.islice(training_groups("any", for_triplets=False), 2000)
    assert not {s.key for g in groups for s in g.scenes} & reserved_scenes()
    assert not {s.key for s in itertools.islice(stage1_scenes("any"), 5000)} & reserved_scenes()
    garments = [
        g
        for world in garment_worlds().values()
        for c in CATEGORIES
        for g in (*world.fillers[c], *(g for q in world.queries[c] for g in q[:2]))
    ]
    assert len(set(garments)) == len(garments) == len(reserved_garments())
    assert not set(itertools.islice(training_garments("any"), 5000)) & reserved_garments()


def test_further_worlds_share_no_scene_with_any_other_or_with_the_training_that_leaves_them_out():
    keys = [s.key for groups, fillers in further_scene_worlds().values() for g in groups for s in g.scenes]
    keys += [s.key for _, fillers in further_scene_worlds().values() for s in fillers]
    assert len({*keys}) == len(keys) == 16 * 6000 and not {*keys} & reserved_scenes()
    every = tuple(ALL_FURTHER)
    assert reserved_scenes(every) == reserved_scenes() | {*keys}
    assert len(reserved_scenes(("val", "test"))) == len(reserved_scenes()) + 8 * 6000
    groups = itertools.islice(training_groups("any", for_triplets=True, further=every), 2000)
    assert not {s.key for g in groups for s in g.scenes} & {*keys}
    assert not {s.key for s in itertools.islice(stage1_scenes("any", further=every), 5000)} & {*keys}


def test_lookalikes_differ_in_shapes_and_places_alone_and_are_in_no_world():
    for scenes in itertools.islice(lookalike_sets("any", further=("test",)), 300):
        assert len({s.key for s in scenes}) == 8 and not {s.key for s in scenes} & reserved_scenes(("test",))
        seen = {(s.background, *sorted((o.colour, o.texture, o.size) for o in s.shapes)) for s in scenes}
        assert len(seen) == 1


def test_the_final_and_last_garment_queries_are_pairs_that_no_other_has():
    first = {q[:2] for queries in garment_worlds()["test"].queries.values() for q in queries}
    further, final, last = (
        {q[:2] for queries in garment_pairs(split, 300).values() for q in queries}
        for split in ("test", "final", "last")
    )
    assert len(final) == len(last) == 900 and not final & (first | further) and not last & (first | further | final)
    assert {g for pair in final | last for g in pair} <= {
        g for c, queries in garment_worlds()["test"].queries.items()
        for g in (*garment_worlds()["test"].fillers[c], *(g for q in queries for g in q[:2]))
    }  # fmt: skip


def test_further_garment_queries_are_pairs_of_the_gallery_that_two_captions_tell_apart():
    world = garment_worlds()["val"]
    for category, queries in garment_pairs("val", 300).items():
        gallery = {*world.fillers[category], *(g for q in world.queries[category] for g in q[:2])}
        assert len({q[:2] for q in queries}) == 300 and {g for q in queries for g in q[:2]} <= gallery
        for query in queries:
            changed = query.reference._replace(**{f: getattr(query.target, f) for f in query.fields})
            assert changed._replace(pattern_colour=query.target.pattern_colour) == query.target
            assert "pattern" in query.fields or query.reference.pattern_colour == query.target.pattern_colour


def test_triplets_and_stage_one_leave_out_what_they_must():
    for group in itertools.islice(training_groups("any", for_triplets=True), 1000):
        assert not {e.kind for e in group.edits} & KINDS_NOT_IN_TRIPLETS
        shapes = [s for scene in (group.reference, *group.targets) for s in scene.shapes]
        assert not {s.shape for s in shapes} & SHAPES_NOT_IN_TRIPLETS
        assert not {(s.shape, s.colour) for s in shapes} & PAIRS_NOT_IN_TRIPLETS
    shapes = [s for scene in itertools.islice(stage1_scenes("any"), 5000) for s in scene.shapes]
    assert not {s.shape for s in shapes} & SHAPES_NOT_IN_STAGE1
    assert not {(s.shape, s.colour) for s in shapes} & PAIRS_NOT_IN_STAGE1
    tested = [s for scene in scenes_of("test") for s in scene.shapes]
    assert {s.shape for s in tested} >= SHAPES_NOT_IN_TRIPLETS | SHAPES_NOT_IN_STAGE1
    assert {(s.shape, s.colour) for s in tested} >= PAIRS_NOT_IN_TRIPLETS | PAIRS_NOT_IN_STAGE1


def bare(template: str) -> str:
    """A wording whatever its places are called: "the {shape}" and "{it}" are filled alike."""
    for name in ("the {shape}", "the {absent}", "{the}", "{noun}"):
        template = template.replace(name, "{it}")
    return template


def test_wordings_of_the_worlds_differ_though_not_their_words():
    for kind, wordings in WORDINGS["test"].items():
        assert not set(wordings) & set(WORDINGS["train"].get(kind, ())), kind
        assert not set(WORDINGS["val"][kind]) & set(WORDINGS["train"].get(kind, ())), kind
    said_in_captions = {bare(t) for wordings in CLAUSES.values() for t in wordings}
    said_in_captions |= {bare(t) for t in (*GROUND_CLAUSES, *ABSENT_CLAUSES, *RELATIONS)}
    said_in_captions |= {bare(t) for wordings in WORDINGS["captions"].values() for t in wordings}
    assert not {bare(t) for wordings in WORDINGS["test"].values() for t in wordings} & said_in_captions
    rng = random.Random(0)
    seen: set[str] = set()
    for group in itertools.islice(training_groups("any", for_triplets=True), 3000):
        seen |= {w for e in group.edits for w in modification(group.reference, e, "train", rng).split()}
    for scene in itertools.islice(stage1_scenes("any"), 16_000):
        seen |= set(scene_caption(scene, rng).split())
    for group in itertools.islice(training_groups("any", for_triplets=False), 1000):
        seen |= {w for e in group.edits for w in change_caption(group.reference, e, rng).split()}
    for garment in itertools.islice(training_garments("any"), 3000):
        seen |= set(garment_caption(garment, rng).split())
    for world in ("val", "test"):
        used = {
            w
            for group in scene_worlds()[world].groups
            for e in group.edits
            for w in modification(group.reference, e, world, rng).split()
        }
        used |= {
            w
            for c in CATEGORIES
            for q in garment_worlds()[world].queries[c]
            for field in q.fields
            for w in garment_clause(q.target, field, world, rng).split()
        }
        assert used <= seen | {"hexagon"}, world  # a shape held out of stage I, known to the CLIP
    assert GARMENT_WORDINGS["train"].keys() == GARMENT_WORDINGS["test"].keys()


@pytest.mark.parametrize("world", ["val", "test"])
def test_neither_half_of_a_query_suffices(world):
    keys = {s.key for s in scenes_of(world)}
    for group in scene_worlds()[world].groups:
        assert len({s.key for s in group.scenes}) == 9
        for edit, target, doubles in zip(group.edits, group.targets, group.doubles, strict=True):
            assert apply(group.reference, edit) == target and target.key in keys
            assert len(doubles) == 2 and not {d.key for d in doubles} & {target.key, group.reference.key}
            others = [t for t in group.targets if t is not target]
            assert len({t.key for t in others}) == 3 and target.key not in {t.key for t in others}


def test_captions_tell_scenes_apart():
    captions = [full_caption(s) for s in scenes_of("test")]
    assert len(set(captions)) == len(captions)


def test_pictures_depend_on_their_seed_alone():
    scene = scenes_of("val")[0]
    assert (render(scene, "a") == render(scene, "a")).all() and (render(scene, "a") != render(scene, "b")).any()
    assert render(scene, "a").shape == (64, 64, 3)


@pytest.fixture(scope="module")
def world(tmp_path_factory, request):
    """The whole world's layouts with fewer training pictures, written twice."""
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)
    patch.setattr(build_module, "NUM_CAPTIONED_SCENES", 40)
    patch.setattr(build_module, "NUM_CAPTIONED_GARMENTS", 10)
    patch.setattr(build_module, "NUM_TRIPLETS", 40)
    folders = [tmp_path_factory.mktemp(name) / "world" for name in ("a", "b")]
    for folder in folders:
        build_module.build(folder)
    return folders


def test_the_same_seed_gives_the_same_bytes(world):
    a, b = ({p.relative_to(f): p for p in f.rglob("*") if p.is_file()} for f in world)
    assert a.keys() == b.keys() and len(a) > 20_000
    chosen = [p for p in a if p.suffix in (".json", ".parquet", ".md")] + list(a)[::97]
    assert all(a[p].read_bytes() == b[p].read_bytes() for p in chosen)


def test_the_real_loaders_read_it(world):
    from datasets import load_dataset

    captions = load_dataset(str(world[0] / "captions"), split="train")
    assert captions.column_names == ["image", "caption"] and len(captions) == 50
    triplets = load_dataset(str(world[0] / "triplets"), split="train")
    assert {"reference", "modification", "target", "source", "quality"} <= set(triplets.column_names)
    assert len(triplets) == 40 and triplets[0]["reference"].size == (64, 64)
    for name, queries, pictures in (("val", 1200, 3000), ("test", 2400, 6000)):
        split = read_benchmark("CIRR", world[0] / name, world[0], None)[1][""]
        assert (len(split.texts), len(split.image_ids)) == (queries, pictures)
        assert all(len({*m, r}) == 6 for m, r in zip(split.candidates, split.references, strict=True))
    fashioniq = read_benchmark("FashionIQ", world[0] / "test", world[0], None)[1]
    assert {c: (len(s.texts), len(s.image_ids)) for c, s in fashioniq.items()} == dict.fromkeys(
        ("dress", "shirt", "toptee"), (400, 1400)
    )
    circo = read_benchmark("CIRCO", world[0] / "test", world[0], None)[1][""]
    assert len(circo.image_ids) == 6000 and len(circo.texts) > 800 and all(len(t) >= 2 for t in circo.truths)


def test_fashioniq_and_circo_layouts(world):
    root = world[0] / "test"
    for category in ("dress", "shirt", "toptee"):
        queries = json.loads((root / f"FashionIQ/captions/cap.{category}.val.json").read_text("utf-8"))
        split = json.loads((root / f"FashionIQ/image_splits/split.{category}.val.json").read_text("utf-8"))
        assert len(queries) == 400 and len(split) == len(set(split)) == 1400
        assert all(len(q["captions"]) == 2 and {q["candidate"], q["target"]} <= set(split) for q in queries)
        assert all((root / "FashionIQ/images" / f"{name}.png").is_file() for name in split)
    records = json.loads((root / "CIRCO/annotations/val.json").read_text("utf-8"))
    info = json.loads((root / "CIRCO/COCO2017_unlabeled/annotations/image_info_unlabeled2017.json").read_text("utf-8"))
    ids = {image["id"] for image in info["images"]}
    assert len(ids) == 6000 and [r["id"] for r in records] == list(range(len(records))) and len(records) > 800
    for record in records:
        truths = record["gt_img_ids"]
        assert truths[0] == record["target_img_id"] and len(set(truths)) == len(truths) >= 2 and set(truths) <= ids
        assert record["reference_img_id"] not in truths
    path = root / f"CIRCO/COCO2017_unlabeled/unlabeled2017/{truths[0]:012d}.jpg"
    assert Image.open(io.BytesIO(path.read_bytes())).format == "JPEG"


def test_stored_configurations_name_no_folder_of_a_machine():
    for path in (ROOT / "modeling_tscir").rglob("*.json"):
        assert not re.search(r'": "(/|[A-Z]:|~)', path.read_text("utf-8")), path


def test_stored_weights_are_small():
    stored = list((ROOT / "modeling_tscir").rglob("*.safetensors"))
    assert sorted(p.parent.name for p in stored) == ["miniature_checkpoint", "miniature_clip"]
    assert sum(p.stat().st_size for p in stored) <= 12 * 2**20


def test_seeds_are_averaged_and_compared_in_pairs(tmp_path, monkeypatch, capsys):
    shares = dict.fromkeys(("image", "text", "slerp", "mlp"), 0.0) | {"sum": 0.25, "stage1": 0.5, "stage2": 1.0}
    shares |= {"stage1_moved": 0.5, "stage2_prompt": 1.0}
    shares["oracle"] = 1.25  # no such share, but a number whose distances are easily read
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        values = {m: {f"{n}": share + seed / 1000 for n in SHOWN} for m, share in shares.items()}
        clusters = {"clusters": [str(i // 4) for i in range(12)]}
        hits = {m: [float(i % 4 < 4 * share) for i in range(12)] for m, share in shares.items()}
        (folder / "results.json").write_text(json.dumps(values))
        (folder / "per_query.json").write_text(json.dumps(dict.fromkeys(SHOWN, clusters | hits)))
    monkeypatch.setattr("sys.argv", ["summarise", str(tmp_path / "0"), str(tmp_path / "1")])
    summarise.main()
    printed = capsys.readouterr().out
    assert "stage II closes 75% of the distance from sum" in printed and "2.00 times stage I" in printed
    assert "R@1: stage2 - sum = +75.0 ± 0.00" in printed  # every reference differs alike
    assert "CIRCO mAP@5: stage1 - mlp = +50.0" in printed and "25.1" in printed  # the mean of 25.0 and 25.1, rounded
    monkeypatch.setattr("sys.argv", ["summarise", str(tmp_path / "2")])
    with pytest.raises(FileNotFoundError, match="miniature.demo"):
        summarise.main()


def test_folders_of_something_else_are_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.tex").write_text("mine", "utf-8")
    with pytest.raises(ValueError, match="work is no world of the miniature's, and would be removed"):
        build_module.build(tmp_path / "work", [])
    monkeypatch.setattr("sys.argv", ["demo.py", "--output_dir", str(tmp_path / "work")])
    with pytest.raises(SystemExit, match="work holds something else than an earlier demo"):
        demo.main()
    assert (tmp_path / "work/thesis.tex").read_text("utf-8") == "mine"


def test_a_clip_that_is_not_there_costs_no_earlier_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "build", lambda world, seed: pytest.fail(f"{world} is drawn anew"))
    monkeypatch.setattr("sys.argv", ["demo.py", "--output_dir", str(tmp_path / "new"), "--clip", "runs/sharp_klip"])
    with pytest.raises(SystemExit, match="error: --clip runs/sharp_klip holds no CLIP"):
        demo.main()
