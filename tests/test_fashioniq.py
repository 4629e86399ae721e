import json

import fashioniq
import numpy as np
import pytest
import torch
from conftest import DATA_DIR, needs_data, slow_rank, write_json
from harness import compose, parse_arguments, rank
from splits import Split


@pytest.fixture
def folder(tmp_path, pictures):
    root = tmp_path / "FashionIQ"
    (root / "images").mkdir(parents=True)
    for category in fashioniq.CATEGORIES:
        names = [f"{category}{i}" for i in range(6)]
        for name, picture in zip(names, pictures, strict=True):
            picture.save(root / "images" / f"{name}.png")
        captions = [
            {"target": names[1], "candidate": names[0], "captions": ["is red.", " has stripes, "]},
            {"target": names[3], "candidate": names[1], "captions": ["", "é" * 90]},
        ]
        write_json(root / f"captions/cap.{category}.val.json", captions)
        without = [{k: v for k, v in c.items() if k != "target"} for c in captions]
        write_json(root / f"captions/cap.{category}.test.json", without)
        for split in ("val", "test"):
            write_json(root / f"image_splits/split.{category}.{split}.json", names)
    return root


def load(folder, *flags) -> dict[str, Split]:
    args = parse_arguments(fashioniq.FASHIONIQ, ["--data_dir", str(folder), "--check_data", *flags])
    return fashioniq.load(args)


def test_layouts_are_found(folder, pictures):
    split = load(folder)["shirt"]
    assert split.texts[0] == ("is red and has stripes", "has stripes and is red")
    assert split.texts[1] == ("é" * 90, "é" * 90)  # an empty caption leaves the other alone
    (folder / "captions").rename(folder / "json")
    for path in (folder / "images").glob("shirt*"):
        (folder / "images/shirt").mkdir(exist_ok=True)
        path.rename(folder / "images/shirt" / path.name)
    assert load(folder)["shirt"].sources[0] == str(folder / "images/shirt/shirt0.png")
    for path in (folder / "images").glob("dress*"):
        path.rename(path.with_suffix(".jpg"))
    assert load(folder)["dress"].sources[0] == str(folder / "images/dress0.jpg")


def test_gallery_and_caption_order_are_switches(folder, run_script, model_dir):
    assert [len(s.image_ids) for s in load(folder).values()] == [6, 6, 6]
    smaller = load(folder, "--gallery", "val")["dress"]
    assert smaller.image_ids == ["dress0", "dress1", "dress3"] and smaller.truths == [[1], [2]]
    assert load(folder, "--caption_order", "reversed")["dress"].texts[0] == ("has stripes and is red",)
    flags = ["--model_name_or_path", model_dir, "--data_dir", folder, "--caption_order", "given", "--gallery", "val"]
    results, rankings = run_script(fashioniq.FASHIONIQ, *flags)
    assert results["protocol"]["gallery"] == "val" and results["protocol"]["caption_order"] == "given"
    assert results["fashioniq_dress_num_gallery_images"] == 3 and results["fashioniq_num_queries"] == 6
    assert rankings.category.tolist() == ["dress"] * 2 + ["shirt"] * 2 + ["toptee"] * 2
    assert all(row.reference in row.ranking for row in rankings.itertuples())  # the reference is not removed


def test_both_orders_are_averaged(folder, stage2, processor):
    both, given, reverse = (
        compose("tscir", stage2, processor, load(folder, "--caption_order", order)["dress"], torch.empty(0))
        for order in ("both", "given", "reversed")
    )
    torch.testing.assert_close(both, torch.nn.functional.normalize(given + reverse, dim=-1))


def test_what_is_wrong_is_named(folder):
    path = folder / "captions/cap.toptee.val.json"
    records = json.loads(path.read_text("utf-8"))
    for change, message in (
        ({"captions": ["one"]}, r"cap\.toptee\.val\.json, record 1 should have two captions, but has \['one'\]"),
        ({"candidate": "B0"}, r"record 1 names 'B0', which is not in split\.toptee\.val\.json"),
    ):
        write_json(path, [records[0], records[1] | change])
        with pytest.raises(ValueError, match=message):
            load(folder)
    write_json(path, [{k: v for k, v in records[0].items() if k != "target"}])
    with pytest.raises(ValueError, match="record 0 lacks 'target'"):
        load(folder)
    write_json(path, records)
    write_json(folder / "image_splits/split.toptee.val.json", ["toptee0", "toptee1", "toptee3", "toptee0"])
    with pytest.raises(ValueError, match=r"lists 1 pictures more than once, first \['toptee0'\]"):
        load(folder)


def test_what_any_category_misses_is_named_at_once(folder):
    (folder / "captions/cap.dress.val.json").unlink()
    (folder / "image_splits/split.toptee.val.json").unlink()
    with pytest.raises(ValueError, match=r"(?s)val captions of dress not found.*split\.toptee\.val\.json is missing"):
        load(folder)


def test_the_test_split_has_rankings_and_no_metrics(folder, run_script, model_dir):
    flags = ["--model_name_or_path", model_dir, "--data_dir", folder, "--split", "test"]
    results, rankings = run_script(fashioniq.FASHIONIQ, *flags)
    assert results["primary_metric"] is None and "fashioniq_recall_at_10" not in results
    with pytest.raises(ValueError, match="^--gallery val is made of the targets.*publish$"):  # said once
        load(folder, "--split", "test", "--gallery", "val")
    assert len(rankings) == 6 and all(len(ranking) == 6 for ranking in rankings.ranking)


def test_metrics_equal_a_slow_reference_on_rankings_with_ties():
    rng = np.random.default_rng(0)
    splits, ranked, expected = {}, {}, {}
    for category, n in zip(fashioniq.CATEGORIES, (60, 70, 80), strict=True):
        gallery = torch.from_numpy(rng.integers(-1, 2, (n, 4))).float()
        queries = torch.from_numpy(rng.integers(-1, 2, (400, 4))).float()
        pairs = rng.integers(0, n, (400, 2)).tolist()
        splits[category] = Split(
            image_ids=[str(i) for i in range(n)], sources=[], files=[], query_ids=list(range(400)),
            references=[r for r, _ in pairs], texts=[("",)] * 400, annotation_files=(), truths=[[t] for _, t in pairs],
        )  # fmt: skip
        ranked[category] = rank(splits[category], queries, gallery)
        places = [slow_rank((gallery @ queries[q]).tolist(), t, range(n)) for q, (_, t) in enumerate(pairs)]
        for k in (10, 50):
            expected[f"fashioniq_{category}_recall_at_{k}"] = np.mean([p <= k for p in places])
    for k in (10, 50):
        expected[f"fashioniq_recall_at_{k}"] = np.mean(
            [expected[f"fashioniq_{c}_recall_at_{k}"] for c in fashioniq.CATEGORIES]
        )
    assert fashioniq.metrics(splits, ranked) == pytest.approx(expected)


@needs_data
def test_real_annotations_have_the_published_counts(monkeypatch):
    monkeypatch.setattr(fashioniq, "find_pictures", lambda folders, names, suffixes=(): names)
    for flags in ([], ["--gallery", "val"], ["--split", "test"]):
        args = parse_arguments(fashioniq.FASHIONIQ, ["--data_dir", str(DATA_DIR), "--check_data", *flags])
        found = {c: (len(s.texts), len(s.image_ids)) for c, s in fashioniq.load(args).items()}
        assert found == fashioniq.FASHIONIQ.published_counts(args)
    original = load(DATA_DIR)
    empty = [sum(text[0] == text[1] and text[0] != "" for text in s.texts) for s in original.values()]
    assert empty[1] >= 1 and empty[2] >= 2  # the queries with one empty caption
