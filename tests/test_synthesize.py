import argparse
import json
import os
import random
import shutil
from collections import Counter

import numpy as np
import pytest
import synthesize
import torch
from caption_pairs import Change, words_of
from conftest import DATA_DIR, needs_data
from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset
from datasets import Image as ImageFeature
from rows import UNFINISHED
from test_language_model import GOOD
from test_language_model import server as server  # noqa: PLC0414  (a fixture)


CAPTIONS = [
    "a red star on the left", "a blue star on the left", "a blue star on the right", "a red ring on the left",
    "a red star on the left with dots", "a green ring on the right",
]  # fmt: skip


@pytest.fixture
def data(pictures, tmp_path):
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    columns = {"image": [str(tmp_path / f"{i}.png") for i in range(6)], "caption": CAPTIONS}
    features = Features({"image": ImageFeature(), "caption": Value("string")})
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    return tmp_path / "data"


def run(data, output, *flags):
    synthesize.main(
        ["--dataset_name", str(data), "--output_dir", str(output), "--num_triplets", "8", *map(str, flags)]
    )
    return load_dataset(str(output), split="train")


def test_edits_are_told_by_template():
    rng = random.Random(0)
    texts = {synthesize.template_modification(words_of(CAPTIONS[0]), words_of(CAPTIONS[1]), rng) for _ in range(50)}
    assert {kind for _, kind in texts} == {"replace"} and ("blue instead of red", "replace") in texts
    assert len(texts) == len(synthesize.TEMPLATES["replace"])
    text, kind = synthesize.template_modification(words_of(CAPTIONS[4]), words_of(CAPTIONS[0]), rng)
    assert kind == "remove" and text.endswith("dots")
    text, kind = synthesize.template_modification(
        words_of("a red star on dots"), words_of("a blue star on rings"), rng
    )
    assert kind == "replace+replace" and all(word in text for word in ("red", "blue", "dots", "rings", " and "))
    text, kind = synthesize.template_modification(["a"], words_of("two dogs run"), rng, max_changes=0)
    assert kind == "caption" and "two dogs run" in text


def test_function_words_alone_are_no_change():
    assert synthesize.trimmed(Change(("on the", "in a"))) == ("", "")
    assert synthesize.trimmed(Change(("with a dog", ""))) == ("a dog", "")


def test_triplets_are_a_dataset_that_stage_two_reads(data, tmp_path, capsys):
    rows = run(data, tmp_path / "out")
    assert len(rows) == 6 and {"reference", "modification", "target", "source", "quality"} <= set(rows.column_names)
    assert rows[0]["reference"].size == (48, 40) and set(rows["quality"]) == {"low"}
    for row in rows:
        assert row["reference_id"] != row["target_id"]
        assert CAPTIONS[int(row["reference_id"])] == row["reference_caption"]
    report = json.loads(capsys.readouterr().out.split("\nwritten")[0])
    assert report["triplets"] == 6 and report["different_texts"] == len(set(rows["modification"]))
    card = (tmp_path / "out/README.md").read_text("utf-8")
    assert '"kinds"' in card and card.startswith("---")
    assert run(data, tmp_path / "again")["modification"][:] == rows["modification"][:]  # the same seed


def test_triplets_are_written_file_by_file(data, tmp_path, monkeypatch):
    """As all pictures of many triplets would neither be held nor fit one Arrow column."""
    whole = run(data, tmp_path / "whole")
    monkeypatch.setattr(synthesize, "ROWS_PER_FILE", 4)
    (tmp_path / "out" / UNFINISHED).mkdir(parents=True)  # of a run that was killed
    shutil.copy(
        tmp_path / "whole/data/train-00000-of-00001.parquet", tmp_path / "out" / UNFINISHED / "train-7.parquet"
    )
    with pytest.raises(
        FileNotFoundError, match="doesn't contain any data files"
    ):  # what was written aside is not trained on
        load_dataset(str(tmp_path / "out"), split="train")
    rows = run(data, tmp_path / "out")
    assert [path.name for path in sorted((tmp_path / "out/data").iterdir())] == [
        "train-00000-of-00002.parquet", "train-00001-of-00002.parquet",
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "data"]
    assert rows.features == whole.features and len(rows) == 6
    for row, other in zip(rows, whole, strict=True):
        assert row["reference"].tobytes() == other["reference"].tobytes()
        assert {k: v for k, v in row.items() if k not in ("reference", "target")} == {
            k: v for k, v in other.items() if k not in ("reference", "target")
        }


def test_another_ones_card_is_not_written_over(data, tmp_path):
    """As in a repository that the triplets are to go into; our own, of triplets that were removed, is."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text("# Mine, made with `train/synthesize.py`", "utf-8")
    with pytest.raises(SystemExit, match=r"out/README\.md .* would be replaced: choose another --output_dir"):
        run(data, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["README.md"]
    run(data, tmp_path / "again")
    shutil.rmtree(tmp_path / "again/data")
    run(data, tmp_path / "again")


def test_references_are_drawn_from_all_rows():
    """And no more are looked at than give twice the triplets, as filters may drop half."""
    words = [f"w{i}" for i in range(200)]
    rng = np.random.default_rng(0)
    captions = [list(rng.choice(words, 5)) for _ in range(1000)]
    args = argparse.Namespace(num_triplets=20, min_similarity=0.1, max_similarity=0.95, seed=0)
    pairs = synthesize.near_in_words(args, captions, list(range(1000)))
    assert len(pairs) == len({row for row, _ in pairs}) == 40
    assert 300 < np.median([row for row, _ in pairs]) < 700
    assert pairs == synthesize.near_in_words(args, captions, list(range(1000)))
    args.num_triplets = 1500  # three of each
    found = Counter(row for row, _ in synthesize.near_in_words(args, captions, list(range(1000))))
    assert len(found) == 1000 and set(found.values()) == {3}


def test_filters_by_clip(data, tmp_path, clip_dir, capsys):
    with pytest.raises(SystemExit, match="no triplet was left"):
        run(data, tmp_path / "a", "--model_name_or_path", clip_dir, "--min_caption_fit", 1)
    with pytest.raises(SystemExit, match="pictures nearly identical"):
        run(data, tmp_path / "b", "--model_name_or_path", clip_dir, "--min_caption_fit", -1,
            "--max_image_similarity", -1)  # fmt: skip
    with pytest.raises(SystemExit, match="caption does not tell them apart.*lower --min_caption_gain"):
        run(
            data,
            tmp_path / "c",
            "--model_name_or_path",
            clip_dir,
            "--min_caption_gain",
            2,
            "--max_image_similarity",
            1,
        )
    lenient = ["--min_caption_fit", -1, "--max_image_similarity", 1.1, "--min_caption_gain", -2]
    rows = run(data, tmp_path / "d", "--model_name_or_path", clip_dir, *lenient)
    assert len(rows) == 8 and set(rows["kind"]) == {"caption"}
    assert all(row["target_caption"] in row["modification"] for row in rows)


def test_a_picture_that_its_caption_does_not_fit_is_neither_reference_nor_target(data, tmp_path, monkeypatch, capsys):
    images = torch.nn.functional.normalize(torch.ones(6, 6) + torch.eye(6), dim=-1)
    texts = images.clone()
    texts[4] = -images[4]
    monkeypatch.setattr(synthesize, "embeddings_of", lambda rows, args: (images, texts))
    flags = ["--model_name_or_path", "clip", "--min_caption_gain", -2, "--max_image_similarity", 1.1]
    rows = run(data, tmp_path / "out", *flags, "--num_triplets", 60)
    assert set(rows["reference_id"]) == set(rows["target_id"]) == {"0", "1", "2", "3", "5"}
    report = json.loads(capsys.readouterr().out.split("\nwritten")[0])
    assert report["dropped"]["caption does not fit its picture"] == 10  # of all pairs of six


def test_limits_of_the_other_kind_of_pairs_are_refused(data, tmp_path, clip_dir, capsys):
    for flags in (["--min_caption_gain", 0.1], ["--model_name_or_path", clip_dir, "--min_similarity", 0.1]):
        with pytest.raises(SystemExit):
            run(data, tmp_path / "out", *flags)
    assert "--min_similarity is for pairs made without --model_name_or_path" in capsys.readouterr().err


def test_flags_that_would_do_nothing_are_refused(data, tmp_path, capsys):
    for flags, message in (
        (["--language_model", "m"], "--quality high and --language_model need one another"),
        (["--endpoint", "http://127.0.0.1:9/v1"], "--endpoint is for --quality high"),
        (["--attempts", 0], "--attempts is at least 1"),
        (["--device", "nowhere"], "--device nowhere is not to be had"),
    ):
        with pytest.raises(SystemExit):
            run(data, tmp_path / "out", *flags)
        assert message in capsys.readouterr().err


def test_texts_written_by_a_language_model(data, tmp_path, server, capsys):  # noqa: F811
    server.script = ["no", GOOD]
    flags = ["--quality", "high", "--language_model", "m", "--endpoint", server.url]
    flags += ["--prompt_price", 2, "--completion_price", 3]
    rows = run(data, tmp_path / "out", *flags, "--workers", 1)
    report = json.loads(capsys.readouterr().out.split("\nwritten")[0])
    assert set(rows["modification"]) == {"make it red"} and set(rows["quality"]) == {"high"}
    assert report["writing"]["written"] == 6 and report["writing"]["cost"] == pytest.approx(7 * (50 * 2 + 9 * 3) / 1e6)
    asked = len(server.requests)
    shutil.rmtree(tmp_path / "out" / "data")  # as if interrupted before the triplets were written
    run(data, tmp_path / "out", *flags)
    assert len(server.requests) == asked  # all from the cache
    again = json.loads(capsys.readouterr().out.split("\nwritten")[0])["writing"]
    assert again["from cache"] == 6 and again["cost"] == report["writing"]["cost"]  # of all that was asked
    with pytest.raises(SystemExit):
        run(data, tmp_path / "x", "--quality", "high")


def test_what_is_missing_is_named(data, tmp_path):
    with pytest.raises(SystemExit, match=r"lacks columns \['text \(the caption\)'\]"):
        run(data, tmp_path / "out", "--caption_column", "text")
    with pytest.raises(SystemExit, match="--id_column picture: .* has no such column"):
        run(data, tmp_path / "out", "--id_column", "picture")
    with pytest.raises(SystemExit, match=r"lacks columns \['x \(the picture\)'\]"):
        run(data, tmp_path / "out", "--image_column", "x")
    rows = load_dataset(str(data), split="train")
    rows.remove_columns("image").to_parquet(tmp_path / "texts/train.parquet")
    with pytest.raises(SystemExit, match="neither pictures"):
        run(tmp_path / "texts", tmp_path / "out")
    rows.remove_columns("image").add_column("image", [1] * 6).to_parquet(tmp_path / "numbers/train.parquet")
    with pytest.raises(SystemExit, match="column image of .* holds no pictures but"):
        run(tmp_path / "numbers", tmp_path / "out")
    with pytest.raises(SystemExit, match=r"--dataset_name .*nowhere, split train, cannot be loaded, or is empty: "):
        run(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(SystemExit, match="--output_dir .* cannot be used: .*file is no folder"):
        run(data, tmp_path / "file")


def test_triplets_that_are_there_are_not_replaced_and_too_few_are_told(data, tmp_path, capsys):
    first = run(data, tmp_path / "out", "--num_triplets", "1000")
    assert (
        f"{len(first)} triplets are fewer than 1000; lower --min_similarity or raise --max_similarity"
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit, match="holds triplets already: choose another --output_dir"):
        run(data, tmp_path / "out")
    with pytest.raises(SystemExit):
        run(data, tmp_path / "other", "--num_triplets", "0")
    assert "--num_triplets is at least 1, not 0" in capsys.readouterr().err


def test_a_picture_is_never_paired_with_itself(data, tmp_path):
    """Which rows are of one picture is told by ids where there are any, and by the pictures where there are none."""
    captions = [f"same{i} near{i // 2}" for i in range(6)] + [f"same{i}" for i in range(6)]
    rows = load_dataset(str(data), split="train").remove_columns("caption")
    without = concatenate_datasets([rows, rows]).add_column("caption", captions)
    some = without.add_column("image_id", ["0", "1", "2", None, " ", "5", "0", "1", "2", None, None, "5"])
    for name, given in (("without", without), ("some", some)):
        given.to_parquet(tmp_path / name / "train.parquet")
        made = run(tmp_path / name, tmp_path / f"{name}-out", "--min_similarity", 0.01, "--num_triplets", 60)
        assert len(made) == 6
        shown: dict[str, set[bytes]] = {}
        for row in made:
            assert row["reference"].tobytes() != row["target"].tobytes()
            for side in ("reference", "target"):
                shown.setdefault(row[f"{side}_id"], set()).add(row[side].tobytes())
        assert len(shown) == 6 and all(len(pictures) == 1 for pictures in shown.values()) and "None" not in shown


def test_a_reference_has_no_text_twice(data, tmp_path, server, capsys):  # noqa: F811
    """As a query of it would have two targets, each of which is the other's negative."""
    server.script = [GOOD]
    flags = ["--quality", "high", "--language_model", "m", "--endpoint", server.url]
    rows = run(data, tmp_path / "out", *flags, "--min_similarity", 0.01, "--num_triplets", 30)
    assert len(rows) == len(set(rows["reference_id"]))
    report = json.loads(capsys.readouterr().out.split("\nwritten")[0])
    assert report["dropped"]["the same reference and text"] == report["pairs"] - len(rows) > 0


def test_pairs_go_on_until_there_are_enough(data, tmp_path, server, capsys):  # noqa: F811
    """Where a language model refuses some, and no further, as answers cost."""
    server.script = ["no", GOOD]
    flags = ["--quality", "high", "--language_model", "m", "--endpoint", server.url, "--attempts", 1]
    rows = run(data, tmp_path / "out", *flags, "--num_triplets", 2)
    assert len(rows) == 2 and len(server.requests) == 3 and "fewer" not in capsys.readouterr().err


def test_pictures_that_cannot_be_read_are_named_by_their_files(data, tmp_path):
    (tmp_path / "3.png").write_bytes(b"nothing")
    with pytest.raises(SystemExit, match=r"row 3: not a picture.*3\.png"):
        run(data, tmp_path / "out")


def test_rows_without_a_caption_are_named_or_left_out(data, tmp_path):
    rows = load_dataset(str(data), split="train")
    texts = [*CAPTIONS[:1], None, *CAPTIONS[2:4], "  ", *CAPTIONS[5:]]
    rows.remove_columns("caption").add_column("caption", texts).to_parquet(tmp_path / "holes/train.parquet")
    with pytest.raises(SystemExit, match=r"(?s)2 of 6 .*row 1: no text in column caption.*row 4: no text"):
        run(tmp_path / "holes", tmp_path / "a")
    kept = run(tmp_path / "holes", tmp_path / "b", "--on_bad_image", "skip")
    assert {*kept["reference_id"], *kept["target_id"]} == {"0", "2", "3", "5"}


def test_an_endpoint_that_never_answers_is_named(data, tmp_path, monkeypatch):
    flags = ["--quality", "high", "--language_model", "m", "--endpoint", "http://127.0.0.1:9/v1", "--attempts", 1]
    with pytest.raises(
        SystemExit, match=r"m wrote nothing usable for \d+ pairs: .*; the last time: .*Connection refused"
    ):
        run(data, tmp_path / "a", *flags)
    monkeypatch.setattr("language_model.HOPELESS", 3)
    with pytest.raises(
        SystemExit, match=r"m wrote nothing usable for \d pairs in a row, .*Connection refused.* goes on"
    ):
        run(data, tmp_path / "b", *flags)


@needs_data
def test_real_captions_without_pictures(tmp_path):
    file = DATA_DIR / "coco_captions/captions_val2017.json"
    rows = run("json", tmp_path / "out", "--data_files", os.fspath(file), "--json_field", "annotations")
    assert len(rows) == 8 and "reference" not in rows.column_names
    assert rows[0]["reference_caption"] != rows[0]["target_caption"]
