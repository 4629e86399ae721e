import json
from dataclasses import replace

import genecis
import numpy as np
import pytest
import torch
from conftest import slow_rank, write_json
from harness import parse_arguments, published_counts, rank
from PIL import Image
from splits import Split

from modeling_tscir.feature_cache import file_fingerprints


@pytest.fixture
def folder(tmp_path, pictures):
    root = tmp_path / "GeneCIS"
    for below, name in (("val2017", "{:012d}"), ("VG_100K_all", "{}")):
        (root / below).mkdir(parents=True)
        for number, picture in enumerate(pictures, 1):
            picture.save(root / below / f"{name.format(number)}.jpg")
    for task in genecis.TASKS:
        if task.endswith("object"):
            things = [{"val_image_id": i} for i in range(1, 7)]
        else:
            things = [{"image_id": i, "instance_bbox": [10, 5, 8 + i, 12]} for i in range(1, 7)]
        records = [
            {"reference": things[0], "target": things[1], "gallery": things[2:5], "condition": "red"},
            {"reference": things[1], "target": things[0], "gallery": things[3:6], "condition": ""},
        ]
        write_json(root / f"genecis/{task}.json", records)
    return root


def load(folder) -> dict[str, Split]:
    return genecis.load(parse_arguments(genecis.GENECIS, ["--data_dir", str(folder), "--check_data"]))


def test_candidates_are_the_target_and_its_gallery(folder):
    for task, split in load(folder).items():
        assert split.candidates == [[0, 2, 3, 4], [1, 3, 4, 5]] and split.truths == [[0], [1]]
        assert split.references == [1, 0] and len(split.sources) == 6
        if task.endswith("attribute"):
            assert split.image_ids[1] == "1 10 5 9 12" and split.sources[1].size[0] == split.sources[1].size[1]
        else:
            assert split.sources[1].endswith("val2017/000000000001.jpg")


def test_each_box_has_embeddings_of_its_own_in_the_cache(folder):
    """Boxes of one picture, which is one file, and another task whose boxes alone differ."""
    split = load(folder)["focus_attribute"]
    path, *box = split.files[1]
    assert file_fingerprints([(path, *box)]) != file_fingerprints([(path, *box[:3], box[3] + 1)])
    task = folder / "genecis/focus_attribute.json"
    task.write_text(task.read_text("utf-8").replace("[10, 5, 9, 12]", "[10, 5, 9, 11]"), "utf-8")
    other = load(folder)["focus_attribute"]
    changed = [a != b for a, b in zip(*map(file_fingerprints, (split.files, other.files)), strict=True)]
    assert changed == [i == 1 for i in range(6)]


def test_boxes_are_cut_out_with_what_surrounds_them():
    columns = np.tile(np.arange(200, dtype=np.uint8), (100, 1))
    image = Image.fromarray(np.stack([columns] * 3, axis=-1))
    # Begins 0.7 of the box's width before it and is 1.7 widths wide: from 100 - 14 to 100 - 14 + 34.
    cut = np.asarray(genecis.cut_out(image, [100, 40, 20, 20]))
    assert cut.shape == (34, 34, 3) and cut[0, 0, 0] == 86 and cut[0, -1, 0] == 119
    # Within the picture at its edges, and padded with black to a square.
    cut = np.asarray(genecis.cut_out(image, [0, 0, 20, 40]))
    assert cut.shape == (68, 68, 3) and cut[0, 0, 0] == 0 and cut[0, 17, 0] == 0 and cut[0, 50, 0] == 33


def test_all_tasks_run(folder, run_script, model_dir):
    flags = ["--model_name_or_path", model_dir, "--data_dir", folder]
    results, rankings = run_script(genecis.GENECIS, *flags)
    assert results["genecis_num_queries"] == 8 and "genecis_change_object_recall_at_1" in results
    tasks = [results[f"genecis_{task}_recall_at_1"] for task in genecis.TASKS]
    assert results[results["primary_metric"]] == pytest.approx(np.mean(tasks))
    assert {len(row) for row in rankings.candidates_ranking} == {4} and {len(row) for row in rankings.ranking} == {0}
    assert (rankings.target_rank_among_candidates == 1).mean() == pytest.approx(np.mean(tasks))


def test_lists_of_another_length_are_not_the_published_ones(folder):
    task = genecis.GENECIS
    args = parse_arguments(task, ["--data_dir", str(folder), "--check_data"])
    splits = load(folder)
    assert published_counts(task, args, splits)["focus_object"] == {
        "queries": 1960,
        "gallery_images": 15,
        "same": False,
    }
    for shortest, same in ((15, True), (14, False)):
        lists = [list(range(15))] * 1959 + [list(range(shortest))]
        split = replace(splits["focus_object"], query_ids=list(range(1960)), candidates=lists)
        assert published_counts(task, args, {"focus_object": split})["focus_object"]["same"] == same


def test_where_the_target_stands_in_the_list_does_not_matter():
    rng = np.random.default_rng(0)
    gallery = torch.from_numpy(rng.integers(-1, 2, (50, 3))).float()
    queries = torch.from_numpy(rng.integers(-1, 2, (1000, 3))).float()
    picks = [rng.permutation(50)[:15].tolist() for _ in queries]

    def recalls(place: int) -> dict:
        candidates = [p[1 : 1 + place] + p[:1] + p[1 + place :] for p in picks]
        split = Split(
            image_ids=[""] * 50, sources=[], files=[], query_ids=list(range(1000)), references=[0] * 1000,
            texts=[("",)] * 1000, annotation_files=(), truths=[p[:1] for p in picks], candidates=candidates,
            ranks_gallery=False,
        )  # fmt: skip
        return genecis.metrics({"focus_object": split}, {"focus_object": rank(split, queries, gallery)})

    places = [slow_rank((gallery @ queries[q]).tolist(), p[0], p) for q, p in enumerate(picks)]
    expected = {f"genecis_focus_object_recall_at_{k}": np.mean([r <= k for r in places]) for k in (1, 2, 3)}
    assert recalls(0) == recalls(7) == recalls(14)
    assert {k: v for k, v in recalls(0).items() if "object" in k} == pytest.approx(expected)


def test_a_query_that_skipping_leaves_nothing_wrong_is_skipped_too(folder, run_script, model_dir):
    for number in (3, 4, 5):  # all of the first query's but its target, and all but one of the second's
        (folder / f"val2017/{number:012d}.jpg").write_bytes(b"")
    flags = ["--model_name_or_path", model_dir, "--data_dir", folder, "--on_bad_image", "skip"]
    results, _ = run_script(genecis.GENECIS, *flags)
    assert results["genecis_num_queries"] == 6 and results["skipped_queries"] == 2


def test_a_picture_that_cannot_be_cut_out_is_named_or_skipped(folder, run_script, model_dir):
    (folder / "VG_100K_all/6.jpg").write_bytes(b"")
    flags = ["--model_name_or_path", model_dir, "--data_dir", folder]
    with pytest.raises(SystemExit, match=r"(?s)2 of 24 pictures cannot be read.*6 10 5 14 12: empty"):
        run_script(genecis.GENECIS, *flags)
    results, _ = run_script(genecis.GENECIS, *flags, "--on_bad_image", "skip")
    assert results["skipped_images"] == ["6 10 5 14 12"] * 2 and results["genecis_num_queries"] == 8
    for box in ([10, 10, 0.1, 0.1], [199.9, 99.9, 0.1, 0.1]):  # of less than a pixel
        assert genecis.cut_out(Image.new("RGB", (200, 100)), box).size == (1, 1)
    with pytest.raises(ValueError, match="lies outside the picture of 200 x 100"):
        genecis.cut_out(Image.new("RGB", (200, 100)), [300, 5, 10, 10])


def test_galleries_that_hold_their_target_and_ids_as_texts_are_read_as_published(folder):
    path = folder / "genecis/focus_attribute.json"
    records = json.loads(path.read_text("utf-8"))
    records[0]["gallery"][0] = records[0]["target"]
    for record in records:
        for thing in (record["reference"], record["target"], *record["gallery"]):
            thing["image_id"] = str(thing["image_id"])
    write_json(path, records)
    split = load(folder)["focus_attribute"]
    assert split.candidates == [[0, 0, 2, 3], [1, 2, 3, 4]] and split.image_ids[0] == "2 10 5 10 12"
    pictures = torch.eye(5)
    assert rank(split, pictures[:2], pictures).candidates.truth_ranks.tolist() == [[2], [1]]


def test_boxes_are_of_the_pixels_as_they_are_stored(folder):
    picture = Image.new("RGB", (48, 40))
    picture.paste((255, 0, 0), (10, 5, 19, 17))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "VG_100K_all/2.jpg", exif=exif, quality=95)
    split = load(folder)["focus_attribute"]
    place = split.image_ids.index("2 10 5 10 12")
    assert np.asarray(split.sources[place]).reshape(-1, 3)[:, 0].max() > 200
    cut = np.asarray(genecis.cut_out(picture, [10, 5, 10, 12]))
    assert split.sources[place].size == (cut.shape[1], cut.shape[0])


def test_what_is_wrong_is_named(folder):
    path = folder / "genecis/focus_attribute.json"
    records = json.loads(path.read_text("utf-8"))
    records[1]["gallery"][0] = {"image_id": 3, "instance_bbox": [0, 0, 0, 5]}
    write_json(path, records)
    with pytest.raises(ValueError, match=r"focus_attribute\.json, record 1 has the box \[0, 0, 0, 5\]"):
        load(folder)
    records[1]["gallery"][0] = {"image_id": 3}
    write_json(path, records)
    with pytest.raises(ValueError, match=r"record 1 lacks 'instance_bbox'"):
        load(folder)
    good = {"image_id": 5, "instance_bbox": [1, 2, 3, 4]}
    for box in (["1", "2", "3", "4"], [1, 2, None, 4], [1, 2, 3], [1, 2, float("nan"), 4], [True, 2, "3", 4]):
        records[1]["gallery"] = [good | {"instance_bbox": box}]
        write_json(path, records)
        with pytest.raises(ValueError, match=r"record 1 has the box .*, which is no \[x, y, width, height\]"):
            load(folder)
    records[1]["gallery"] = []
    write_json(path, records)
    with pytest.raises(ValueError, match=r"focus_attribute\.json, record 1 has an empty gallery"):
        load(folder)
    records[1]["gallery"] = [3, 4]
    write_json(path, records)
    with pytest.raises(ValueError, match=r"record 1 has 'gallery' = \[3, 4\], which is no list of dict"):
        load(folder)
    (folder / "genecis/change_object.json").unlink()
    path.unlink()
    with pytest.raises(ValueError, match="GeneCIS's focus_attribute not found"):
        load(folder)
