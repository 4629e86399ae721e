import json

import cirr
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmark_arguments import METHODS
from conftest import DATA_DIR, needs_data, slow_rank, write_json
from harness import parse_arguments, rank
from splits import Split


@pytest.fixture
def folder(tmp_path, pictures):
    """A split of six pictures and three queries in the official layout."""
    root = tmp_path / "CIRR"
    for split in ("val", "test1"):
        names = [f"{split}-{i}" for i in range(6)]
        (root / "dev").mkdir(parents=True, exist_ok=True)
        for name, picture in zip(names, pictures, strict=True):
            picture.save(root / "dev" / f"{name}.png")
        queries = [
            {
                "pairid": 10 + i,
                "reference": names[i],
                "target_hard": names[i + 1],
                "target_soft": {},
                "caption": caption,
                "img_set": {"id": i, "members": names, "reference_rank": i, "target_rank": i + 1},
            }
            for i, caption in enumerate(["red", "that " * 90, ""])
        ]
        if split == "test1":
            queries = [{k: q[k] for k in ("pairid", "reference", "caption", "img_set")} for q in queries]
        write_json(root / f"cirr/captions/cap.rc2.{split}.json", queries)
        write_json(root / f"cirr/image_splits/split.rc2.{split}.json", {n: f"./dev/{n}.png" for n in names})
    return root


def load(folder, split="val") -> Split:
    args = parse_arguments(cirr.CIRR, ["--data_dir", str(folder), "--split", split, "--check_data"])
    return cirr.load(args)[""]


def test_layouts_are_found(folder):
    split = load(folder)
    assert split.image_ids[split.references[1]] == "val-1" and split.query_ids == [10, 11, 12]
    assert split.candidates[1] == [0, 2, 3, 4, 5] and split.truths[1] == [2]
    (folder / "cirr").rename(folder / "x")
    (folder / "x" / "captions").rename(folder / "captions")
    (folder / "x" / "image_splits").rename(folder / "image_splits")
    assert load(folder).sources == split.sources
    (folder / "img_raw").mkdir()
    (folder / "dev").rename(folder / "img_raw" / "dev")
    assert load(folder).sources[0] == str(folder / "img_raw/dev/val-0.png")


def test_files_need_not_be_in_the_order_of_their_names(folder):
    path = folder / "cirr/image_splits/split.rc2.val.json"
    files = json.loads(path.read_text("utf-8"))
    write_json(path, {name: files[name] for name in sorted(files, reverse=True)})
    (folder / "dev/val-0.png").rename(folder / "dev/z.png")
    write_json(path, {**json.loads(path.read_text("utf-8")), "val-0": "./dev/z.png"})
    split = load(folder)
    assert split.image_ids == [f"val-{i}" for i in (5, 4, 3, 2, 1, 0)]
    names = [source.rsplit("/", 1)[1] for source in split.sources]
    assert names == [*(f"val-{i}.png" for i in (5, 4, 3, 2, 1)), "z.png"]
    assert split.references == [5, 4, 3] and split.truths == [[4], [3], [2]]


def test_what_is_missing_is_named(folder):
    path = folder / "cirr/captions/cap.rc2.val.json"
    records = json.loads(path.read_text("utf-8"))
    for change, message in (
        ({"caption": None}, r"cap\.rc2\.val\.json, record 1 has 'caption' = None"),
        ({"reference": "dev-99"}, r"record 1 names 'dev-99', which is not in split\.rc2\.val\.json"),
        ({"target_hard": "val-1"}, "record 1: the target must be another picture"),
        ({"img_set": {}}, "record 1, img_set lacks 'members'"),
        ({"pairid": 10}, "lists 1 queries more than once"),
        ({"img_set": {"members": [["val-1"]]}}, r"img_set has 'members' = \[\['val-1'\]\], which is no list of str"),
        ({"img_set": {"members": ["val-0", "val-2"]}}, "img_set should hold 6 different pictures, the reference"),
        ({"img_set": {"members": ["val-1", "val-2", "val-3", "val-4", "val-5"]}}, "should hold 6 different pictures"),
    ):
        write_json(path, [records[0], records[1] | change, records[2]])
        with pytest.raises(ValueError, match=message):
            load(folder)
    write_json(path, [records[0], {k: v for k, v in records[1].items() if k != "caption"}])
    with pytest.raises(ValueError, match=r"cap\.rc2\.val\.json, record 1 lacks 'caption'"):
        load(folder)
    path.write_text("[{", "utf-8")
    with pytest.raises(ValueError, match=r"cap\.rc2\.val\.json is not valid JSON"):
        load(folder)
    split_file = folder / "cirr/image_splits/split.rc2.val.json"
    split_file.write_text('{"val-0": "./dev/val-0.png", "val-0": "./dev/val-1.png"}', "utf-8")
    with pytest.raises(ValueError, match=r"split\.rc2\.val\.json holds \['val-0'\] more than once"):
        load(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"captions not found.*docs/benchmarks\.md"):
        load(folder)


def test_metrics_equal_a_slow_reference_on_rankings_with_ties():
    rng = np.random.default_rng(0)
    n, num_queries = 60, 1200
    # Small integers: exact scores, and many of them equal.
    gallery = torch.from_numpy(rng.integers(-1, 2, (n, 4))).float()
    queries = torch.from_numpy(rng.integers(-1, 2, (num_queries, 4))).float()
    picks = [rng.permutation(n)[:6].tolist() for _ in range(num_queries)]
    split = Split(
        image_ids=[str(i) for i in range(n)], sources=[], files=[], query_ids=list(range(num_queries)),
        references=[p[0] for p in picks], texts=[("",)] * num_queries, annotation_files=(),
        truths=[[p[1]] for p in picks], candidates=[sorted(p[1:]) for p in picks], exclude_reference=True,
    )  # fmt: skip
    found = cirr.metrics({"": split}, {"": rank(split, queries, gallery)})
    hits: dict[str, list[bool]] = {}
    for q, (reference, target, *others) in enumerate(picks):
        scores = (gallery @ queries[q]).tolist()
        place = slow_rank(scores, target, [i for i in range(n) if i != reference])
        among = slow_rank(scores, target, others)
        for k in (1, 5, 10, 50):
            hits.setdefault(f"cirr_recall_at_{k}", []).append(place <= k)
        for k in (1, 2, 3):
            hits.setdefault(f"cirr_subset_recall_at_{k}", []).append(among <= k)
    assert found == {name: float(np.mean(values)) for name, values in hits.items()}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(method, run_script, folder, model_dir, capsys):
    results, rankings = run_script(
        cirr.CIRR, "--model_name_or_path", model_dir, "--data_dir", folder, "--method", method
    )
    assert (results["cirr_num_queries"], results["cirr_num_gallery_images"]) == (3, 6)
    assert 0 <= results[results["primary_metric"]] <= results["cirr_recall_at_5"] <= 1
    assert results["protocol"]["reference_removed"] and results["method"] == method
    assert "cirr_subset_recall_at_1" in capsys.readouterr().out
    for row in rankings.itertuples():
        assert sorted([*row.ranking, row.reference]) == [f"val-{i}" for i in range(6)]
        assert list(row.ranking).index(row.truths[0]) + 1 <= row.truth_ranks[0]
    assert results["cirr_recall_at_1"] == (rankings.truth_ranks.str[0] == 1).mean()


def test_plain_clip_runs_training_free(run_script, folder, clip_dir):
    results, _ = run_script(cirr.CIRR, "--model_name_or_path", clip_dir, "--data_dir", folder)
    assert results["model"]["stage"] == 0 and len(results["model"]["backbone_fingerprint"]) == 32


def test_bad_pictures_are_refused_or_skipped_and_reported(run_script, folder, model_dir, tmp_path, capsys):
    (folder / "dev/val-1.png").write_bytes(b"")
    flags = ["--model_name_or_path", model_dir, "--data_dir", folder]
    with pytest.raises(SystemExit, match=r"(?s)1 of 6 pictures.*val-1: empty"):
        run_script(cirr.CIRR, *flags)
    assert not list((tmp_path / "out").iterdir())
    results, rankings = run_script(cirr.CIRR, *flags, "--on_bad_image", "skip")
    assert results["skipped_images"] == ["val-1"] and results["skipped_queries"] == 2
    assert "1 pictures were skipped, and with them 2 queries" in capsys.readouterr().out
    assert (results["cirr_num_queries"], results["cirr_num_gallery_images"]) == (1, 5)
    assert rankings.query_id.tolist() == ["12"]


def test_a_picture_that_is_not_there_is_named_or_skipped_like_one_that_cannot_be_read(
    run_script, folder, model_dir, capsys
):
    for name in ("val-1.png", "val-4.png"):
        (folder / "dev" / name).unlink()
    flags = ["--model_name_or_path", model_dir, "--data_dir", folder]
    with pytest.raises(SystemExit, match=r"(?s)2 of 6 pictures.*val-1: missing.*val-4: missing.*--on_bad_image skip"):
        run_script(cirr.CIRR, *flags)
    results, _ = run_script(cirr.CIRR, *flags, "--on_bad_image", "skip")
    assert results["skipped_images"] == ["val-1", "val-4"] and results["cirr_num_gallery_images"] == 4
    (folder / "dev").rename(folder / "elsewhere")
    with pytest.raises(SystemExit, match=r"6 of 6 pictures are missing.*looked for .*docs/benchmarks\.md says"):
        run_script(cirr.CIRR, *flags, "--on_bad_image", "skip")


def test_a_wrong_choice_is_refused_before_anything_is_read_or_removed(run_script, folder, clip_dir, tmp_path):
    flags = ["--model_name_or_path", clip_dir, "--data_dir", folder]
    run_script(cirr.CIRR, *flags, "--method", "slerp")
    (folder / "dev/val-1.png").write_bytes(b"")
    with pytest.raises(SystemExit, match="plain CLIP without a mapper; name a training-free method"):
        run_script(cirr.CIRR, *flags, "--weight", "0.3")
    assert (tmp_path / "out/results.json").is_file()


def test_test_split_writes_valid_submissions(run_script, folder, model_dir, tmp_path, capsys):
    flags = ["--model_name_or_path", model_dir, "--data_dir", folder, "--split", "test"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/recall_submission.json").write_text("another run's")
    (folder / "dev/test1-1.png").rename(folder / "moved")
    (folder / "dev/test1-1.png").write_bytes(b"")
    with pytest.raises(SystemExit, match="needs every query and picture"):
        run_script(cirr.CIRR, *flags, "--on_bad_image", "skip")
    for what in ([], ["--check_data"]):
        with pytest.raises(SystemExit, match=r"(?s)test1-1: empty.*needs every query and picture") as refused:
            run_script(cirr.CIRR, *flags, *what)
        assert "--on_bad_image skip" not in str(refused.value)  # which would be refused next
    assert not list((tmp_path / "out").iterdir())  # nothing that could be uploaded by mistake
    (folder / "moved").replace(folder / "dev/test1-1.png")
    results, rankings = run_script(cirr.CIRR, *flags)
    assert results["primary_metric"] is None and "not public" in capsys.readouterr().out
    for metric, column, length in (("recall", "ranking", 5), ("recall_subset", "candidates_ranking", 3)):
        content = json.loads((tmp_path / f"out/{metric}_submission.json").read_text("utf-8"))
        assert content.pop("version") == "rc2" and content.pop("metric") == metric
        assert list(content) == ["10", "11", "12"]
        for row in rankings.itertuples():
            assert content[row.query_id] == list(getattr(row, column))[:length]
            assert row.reference not in content[row.query_id]


def test_broken_submissions_are_refused():
    names = [f"test1-{i}" for i in range(60)]
    good = {"version": "rc2", "metric": "recall", "1": names[:50], "2": names[10:]}
    cirr.check_submission(good, [1, 2], names)
    cirr.check_submission({"version": "rc2", "metric": "recall_subset", "1": names[:3]}, [1], names)
    for broken, message in (
        (good | {"metric": "recall@1"}, '"metric"'),
        (good | {"1": names[:49]}, "query 1 has 49 pictures, not 50"),
        (good | {"1": names[:51]}, "query 1 has 51 pictures, not 50"),
        (good | {"1": names[:49] + names[:1]}, "query 1 names a picture more than once"),
        (good | {"1": [*names[:49], "dev-7"]}, r"query 1 names \['dev-7'\], not in the gallery"),
        ({k: v for k, v in good.items() if k != "2"}, r"1 queries are missing, first \['2'\]"),
        (good | {"3": names[:50]}, r"unknown queries: \['3'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            cirr.check_submission(broken, [1, 2], names)
    long = [n + "x" * 3000 for n in names]
    rows = {str(q): long[:50] for q in range(50)}
    with pytest.raises(ValueError, match="bytes; the server takes"):
        cirr.check_submission({"version": "rc2", "metric": "recall"} | rows, range(50), long)


def real_split(monkeypatch, split):
    monkeypatch.setattr(cirr, "find_pictures", lambda folders, names, suffixes=(): names)
    return load(DATA_DIR, split)


@needs_data
@pytest.mark.parametrize(("name", "counts"), [("val", (4181, 2297)), ("test", (4148, 2315))])
def test_real_annotations_have_the_published_counts(monkeypatch, name, counts):
    split = real_split(monkeypatch, name)
    assert (len(split.texts), len(split.image_ids)) == counts
    args = parse_arguments(cirr.CIRR, ["--data_dir", "x", "--split", name, "--check_data"])
    assert cirr.CIRR.published_counts(args) == {"": counts}
    assert {len(c) for c in split.candidates} == {5}
    assert sum(not text.strip() for (text,) in split.texts) == (name == "test")


@needs_data
def test_real_test_split_gives_submissions_that_the_server_takes(monkeypatch):
    split = real_split(monkeypatch, "test")
    generator = torch.Generator().manual_seed(0)
    gallery = F.normalize(torch.randn(2315, 16, generator=generator), dim=-1)
    queries = F.normalize(torch.randn(4148, 16, generator=generator), dim=-1)
    files = cirr.submissions(split, rank(split, queries, gallery))
    assert {len(content) for content in files.values()} == {4150}
    assert max(len(json.dumps(content)) for content in files.values()) <= 5 * 10**6


def test_short_lists_that_lost_a_wrong_answer_are_told(run_script, folder, model_dir, capsys):
    """Easier for it, they are not the benchmark's."""
    (folder / "dev/val-5.png").write_bytes(b"")  # neither a reference nor a target
    flags = ["--model_name_or_path", model_dir, "--data_dir", folder, "--on_bad_image", "skip"]
    results, _ = run_script(cirr.CIRR, *flags)
    records = json.loads((folder / "cirr/captions/cap.rc2.val.json").read_text("utf-8"))
    shorter = sum("val-5" in record["img_set"]["members"] for record in records)
    assert results["skipped_queries"] == 0 and results["queries_with_shorter_lists"] == shorter > 0
    assert f"{shorter} queries have fewer wrong candidates for it" in capsys.readouterr().out


def test_a_prompt_is_recorded_where_there_is_one(run_script, folder, model_dir):
    flags = ["--model_name_or_path", model_dir, "--data_dir", folder]
    results, _ = run_script(cirr.CIRR, *flags, "--prompt_template", "{image}, {text}")
    assert results["protocol"]["prompt_template"] == "{image}, {text}"
    results, _ = run_script(cirr.CIRR, *flags, "--method", "sum")
    assert results["protocol"]["prompt_template"] is None
    with pytest.raises(SystemExit):
        run_script(cirr.CIRR, *flags, "--method", "sum", "--prompt_template", "{image}, {text}")


def test_a_path_that_is_none_is_named(folder, run_script, model_dir):
    path = folder / "cirr/image_splits/split.rc2.val.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"val-0": 7}), "utf-8")
    with pytest.raises(SystemExit, match=r"split\.rc2\.val\.json has 'val-0' = 7, which is no str"):
        run_script(cirr.CIRR, "--model_name_or_path", model_dir, "--data_dir", folder)
