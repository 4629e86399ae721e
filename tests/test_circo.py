import json

import circo
import numpy as np
import pytest
import torch
from conftest import DATA_DIR, needs_data, slow_rank, write_json
from harness import parse_arguments, rank
from splits import Split


@pytest.fixture
def folder(tmp_path, pictures):
    root = tmp_path / "CIRCO"
    coco = root / "COCO2017_unlabeled"
    (coco / "unlabeled2017").mkdir(parents=True)
    ids = [7, 100, 23, 5, 42, 9]
    for number, picture in zip(ids, pictures, strict=True):
        picture.save(coco / f"unlabeled2017/{number:012d}.jpg")
    images = [{"id": number, "file_name": f"{number:012d}.jpg"} for number in ids]
    write_json(coco / "annotations/image_info_unlabeled2017.json", {"images": images})
    records = [
        {
            "reference_img_id": 7,
            "target_img_id": target,
            "relative_caption": "is red",
            "shared_concept": "a thing",
            "gt_img_ids": truths,
            "id": number,
            "semantic_aspects": aspects,
        }
        for number, (target, truths, aspects) in enumerate(
            [(100, [100, 9], ["negation"]), (23, [23], ["negation", "addition"])]
        )
    ]
    write_json(root / "annotations/val.json", records)
    test = [{k: r[k] for k in ("reference_img_id", "relative_caption", "shared_concept", "id")} for r in records]
    write_json(root / "annotations/test.json", test)
    return root


def load(folder, *flags) -> Split:
    return circo.load(parse_arguments(circo.CIRCO, ["--data_dir", str(folder), "--check_data", *flags]))[""]


def test_layouts_are_found(folder):
    split = load(folder)
    assert split.image_ids == ["7", "100", "23", "5", "42", "9"] and split.truths == [[1, 5], [2]]
    assert not split.exclude_reference and split.texts == [("is red",)] * 2
    (folder / "COCO2017_unlabeled").rename(folder.parent / "COCO2017_unlabeled")
    assert [source.rsplit("/", 1)[1] for source in load(folder).sources][0] == "000000000007.jpg"


def test_shared_concept_is_a_switch(folder, run_script, model_dir):
    assert load(folder, "--shared_concept").texts[0] == ("find a thing but is red",)
    flags = ["--model_name_or_path", model_dir, "--data_dir", folder]
    assert run_script(circo.CIRCO, *flags)[0]["protocol"]["shared_concept"] is None
    results, _ = run_script(circo.CIRCO, *flags, "--shared_concept")
    assert results["protocol"]["shared_concept"] == circo.SHARED_CONCEPT
    assert results["primary_metric"] == "circo_map_at_5" and "circo_negation_map_at_10" in results


def test_what_is_wrong_is_named(folder):
    path = folder / "annotations/val.json"
    records = json.loads(path.read_text("utf-8"))
    for change, message in (
        ({"reference_img_id": 8}, r"val\.json, record 1 names 8, which is not in image_info_unlabeled2017\.json"),
        ({"gt_img_ids": [5]}, "record 1: gt_img_ids must hold each answer once, target_img_id 23 among them"),
        ({"gt_img_ids": [23, 23]}, "each answer once"),
        ({"semantic_aspects": "negation"}, "has 'semantic_aspects' = 'negation', which is no list"),
        ({"relative_caption": 3}, "has 'relative_caption' = 3, which is no str"),
    ):
        write_json(path, [records[0], records[1] | change])
        with pytest.raises(ValueError, match=message):
            load(folder)
    info = folder / "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json"
    write_json(info, {"images": [{"id": 7}, {"id": 7}]})
    with pytest.raises(ValueError, match=r"lists 1 pictures more than once, first \[7\]"):
        load(folder)


def test_metrics_equal_a_slow_reference_on_rankings_with_ties(tmp_path):
    rng = np.random.default_rng(0)
    n, num_queries = 80, 1000
    gallery = torch.from_numpy(rng.integers(-1, 2, (n, 4))).float()
    queries = torch.from_numpy(rng.integers(-1, 2, (num_queries, 4))).float()
    truths = [rng.permutation(n)[: rng.integers(1, 9)].tolist() for _ in range(num_queries)]
    aspects = [["odd"] if q % 2 else [] for q in range(num_queries)]
    write_json(tmp_path / "val.json", [{"id": q, "semantic_aspects": aspects[q]} for q in range(num_queries)])
    split = Split(
        image_ids=[str(i) for i in range(n)], sources=[], files=[], query_ids=list(range(num_queries)),
        references=[0] * num_queries, texts=[("",)] * num_queries, annotation_files=(tmp_path / "val.json",),
        truths=truths,
    )  # fmt: skip
    found = circo.metrics({"": split}, {"": rank(split, queries, gallery)})
    expected: dict[str, list] = {}
    for q in range(num_queries):
        scores = (gallery @ queries[q]).tolist()
        order = sorted(range(n), key=lambda i: (-scores[i], i in truths[q]))
        for k in (5, 10, 25, 50):
            hits, total = 0, 0.0
            for place, i in enumerate(order[:k], 1):
                hits += i in truths[q]
                total += hits / place if i in truths[q] else 0
            expected.setdefault(f"circo_map_at_{k}", []).append(total / min(len(truths[q]), k))
            if k == 10 and q % 2:
                expected.setdefault("circo_odd_map_at_10", []).append(total / min(len(truths[q]), k))
            place = slow_rank(scores, truths[q][0], range(n))
            expected.setdefault(f"circo_recall_at_{k}", []).append(place <= k)
    assert found == pytest.approx({name: np.mean(values) for name, values in expected.items()})


def test_test_split_writes_a_valid_submission(folder, run_script, model_dir, tmp_path):
    _, rankings = run_script(circo.CIRCO, "--model_name_or_path", model_dir, "--data_dir", folder, "--split", "test")
    content = json.loads((tmp_path / "out/submission.json").read_text("utf-8"))
    assert list(content) == ["0", "1"] and sorted(content["0"]) == [5, 7, 9, 23, 42, 100]
    assert content["1"] == [int(name) for name in rankings.ranking[1]]


def test_broken_submissions_are_refused():
    good = {"0": list(range(50)), "1": list(range(10, 60))}
    circo.check_submission(good, [0, 1], range(60))
    for broken, message in (
        (good | {"0": list(range(49))}, "query 0 has 49 pictures, not 50"),
        (good | {"0": [*range(49), 0]}, "query 0 names a picture more than once"),
        (good | {"0": [*range(49), 60]}, r"query 0 names \[60\], not in the gallery"),
        ({"0": good["0"]}, r"1 queries are missing, first \['1'\]"),
        (good | {"2": good["0"]}, r"unknown queries: \['2'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            circo.check_submission(broken, [0, 1], range(60))
    with pytest.raises(ValueError, match="whole numbers"):
        circo.check_submission({"0": [str(i) for i in range(50)]}, [0])


@needs_data
@pytest.mark.parametrize(("name", "number"), [("val", 220), ("test", 800)])
def test_real_annotations_and_example_submissions(monkeypatch, tmp_path, name, number):
    annotations = DATA_DIR / "circo/annotations" / f"{name}.json"
    records = json.loads(annotations.read_text("utf-8"))
    ids = {r["reference_img_id"] for r in records} | {t for r in records for t in r.get("gt_img_ids", [])}
    # The list of COCO's pictures is not at hand: these, and others up to the published number.
    ids = [*sorted(ids), *(n for n in range(1, 600_000) if n not in ids)][:123_403]
    (tmp_path / "annotations").symlink_to(annotations.parent)
    write_json(tmp_path / "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json",
               {"images": [{"id": n} for n in ids]})  # fmt: skip
    monkeypatch.setattr(circo, "find_pictures", lambda folders, names, suffixes=(): names)
    split = load(tmp_path, "--split", name)
    assert (len(split.texts), len(split.image_ids)) == (number, 123_403)
    args = parse_arguments(circo.CIRCO, ["--data_dir", "x", "--split", name, "--check_data"])
    assert circo.CIRCO.published_counts(args) == {"": (number, 123_403)}
    if name == "val":
        assert np.mean([len(t) for t in split.truths]) == pytest.approx(4.16, abs=0.005)
        assert max(len(t) for t in split.truths) == 14
    example = json.loads((DATA_DIR / f"circo/submission_examples/submission_{name}.json").read_text("utf-8"))
    circo.check_submission(example, split.query_ids)
    with pytest.raises(ValueError, match="query 7 has 49 pictures"):
        circo.check_submission(example | {"7": example["7"][:49]}, split.query_ids)


def test_half_a_surrogate_does_not_cost_the_run_its_files(folder, run_script, model_dir):
    """As JSON has it where a text was cut within an emoji; queries have a question mark for it, too."""
    path = folder / "annotations/val.json"
    records = json.loads(path.read_text("utf-8"))
    records[0]["relative_caption"] = "is red \ud83d"
    write_json(path, records)
    results, rankings = run_script(circo.CIRCO, "--model_name_or_path", model_dir, "--data_dir", folder)
    assert results["circo_num_queries"] == 2 and list(rankings.texts[0]) == ["is red ?"]


def test_an_error_does_not_print_a_whole_file(folder):
    info = folder / "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json"
    for images, message in (
        ([{"id": 7}] * 5 + list(range(123_403)), r"which is no list of dict: 0 is none"),
        ({str(i): {"id": i} for i in range(123_403)}, r"has 'images' = {'0': {'id': 0}, .*\.\.\., which is no list"),
    ):
        write_json(info, {"images": images})
        with pytest.raises(ValueError, match=message) as refused:
            load(folder)
        assert len(str(refused.value)) < 500
