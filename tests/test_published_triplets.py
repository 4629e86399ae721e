"""Small files of the published forms; each becomes a dataset that stage II trains on."""

import csv
import json
import shutil

import published_triplets
import pytest
import stage2 as stage2_script
import torch
from arguments import DataArguments
from datasets import Image, load_dataset
from rows import UNFINISHED
from stage2 import Stage2Arguments, Stage2Data
from test_stream import encoded, write_tar


@pytest.fixture
def coco(tmp_path, pictures):
    for i in range(6):
        path = tmp_path / "coco/val2014" / f"COCO_val2014_{i:012d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures[i].save(path)
    return tmp_path / "coco"


def run(tmp_path, source, annotations, *flags):
    published_triplets.main(
        [source, "--annotations", str(annotations), "--output_dir", str(tmp_path / "out"), *map(str, flags)]
    )
    return load_dataset(str(tmp_path / "out"), split="train")


def lasco_records(count: int) -> list[dict]:
    def picture(i: int) -> list:
        return [i, f"val2014/COCO_val2014_{i:012d}.jpg"]

    return [
        {"qid": n, "query-image": picture(n), "query-text": f"text {n}", "target-image": picture(n + 1)}
        for n in range(count)
    ]


def test_lasco(tmp_path, coco, pictures):
    (tmp_path / "lasco.json").write_text(json.dumps(lasco_records(5)), "utf-8")
    rows = run(tmp_path, "lasco", tmp_path / "lasco.json", "--image_dir", coco)
    assert rows["modification"][:] == [f"text {n}" for n in range(5)]
    assert rows[2]["reference"].size == pictures[2].size and rows[2]["target_id"] == rows[3]["reference_id"] == "3"
    assert set(rows["source"]) == {"lasco"} and set(rows["quality"]) == {"published"}
    assert len(run(tmp_path, "lasco", tmp_path / "lasco.json", "--image_dir", coco, "--max_rows", 2)) == 2
    assert len(run(tmp_path, "lasco", tmp_path / "lasco.json", "--image_dir", coco, "--rows_per_file", 2)) == 5


@pytest.mark.parametrize("name", ["q_texts", "q_text"])
def test_megapairs(tmp_path, coco, name):
    path = "val2014/COCO_val2014_{:012d}.jpg".format
    records = [{"q_img": path(0), name: ["a", "b"], "t_img": path(1), "hns": [path(2)]},
               {"q_img": path(2), name: ["c"], "t_img": path(3), "hns": []}]  # fmt: skip
    (tmp_path / "megapairs.jsonl").write_text("\n".join(map(json.dumps, records)), "utf-8")
    rows = run(tmp_path, "megapairs", tmp_path / "megapairs.jsonl", "--image_dir", coco)
    assert rows["modification"][:] == ["a", "b", "c"]
    assert rows["target_id"][:] == [path(1), path(1), path(3)]


def test_cc_coir(tmp_path, pictures):
    (tmp_path / "train/26").mkdir(parents=True)
    pictures[0].save(tmp_path / "train/26/aa.jpg")
    pictures[1].save(tmp_path / "train/26/b.b.png")
    with open(tmp_path / "cc.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["txt1", "txt2", "edit", "pth1", "pth2"], ["x", "y", "make it, red", "26/aa", "26/b.b"]])
    rows = run(tmp_path, "cc-coir", tmp_path / "cc.csv", "--image_dir", tmp_path / "train")
    assert rows[0]["modification"] == "make it, red" and rows[0]["target"].size == pictures[1].size


def test_tar_shards(tmp_path, stage1, processor):
    text = json.dumps({"edit": "in red", "other": 1}).encode()
    samples = {str(n): {"in.png": encoded(n), "out.png": encoded(n + 9), "json": text} for n in range(5)}
    write_tar(tmp_path / "0.tar", samples)
    keys = ["--keys", "in.png", "out.png", "json.edit"]
    rows = run(tmp_path, "webdataset", tmp_path / "*.tar", *keys, "--rows_per_file", 2)
    assert rows["modification"][:] == ["in red"] * 5 and rows[0]["target"].size == (36, 36)
    # Keys may begin anew in each shard: pictures are told by their content.
    write_tar(tmp_path / "1.tar", {str(n): samples[str(n)] | {"in.png": encoded(n + 5)} for n in range(5)})
    rows = run(tmp_path, "webdataset", tmp_path / "*.tar", *keys)
    rows = rows.cast_column("reference", Image(decode=False)).cast_column("target", Image(decode=False))
    dataset = Stage2Data(rows, stage1, processor, DataArguments(), Stage2Arguments())
    assert dataset.references.tolist() == list(range(10)) and dataset.target_ids.tolist() == [0, 1, 2, 3, 4] * 2
    with pytest.raises(SystemExit, match=r"lack json.text; they have .*in.png, json, json.edit"):
        run(tmp_path, "webdataset", tmp_path / "*.tar", "--keys", "in.png", "out.png", "json.text")
    with pytest.raises(SystemExit, match="--keys"):
        run(tmp_path, "webdataset", tmp_path / "*.tar")
    with pytest.raises(SystemExit, match=r"no file matches .*gone-\*\.tar"):
        run(tmp_path, "webdataset", tmp_path / "gone-*.tar", *keys)
    (tmp_path / "1.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:9000])
    with pytest.raises(SystemExit, match=r"1\.tar is damaged or holds no sample: unexpected end of data"):
        run(tmp_path, "webdataset", tmp_path / "*.tar", *keys)


RTD = [
    {
        "reference_caption": f"a red star {n}",
        "conditioning_caption": "in blue",
        "target_caption": f"a blue one {n}",
    }
    for n in range(9)
]


def test_text_triplets_train_composing_adapters(tmp_path, launch, stage1, processor):
    (tmp_path / "rtd.json").write_text(json.dumps(RTD), "utf-8")
    rows = run(tmp_path, "rtd", tmp_path / "rtd.json")
    assert {"reference_caption", "modification", "target_caption"} <= set(rows.column_names)
    dataset = Stage2Data(rows, stage1, processor, DataArguments(), Stage2Arguments())
    batch = dataset.__getitems__([1, 4])
    with torch.no_grad():
        queries = stage1.encode_with_pseudo_words(batch["input_ids"], batch["pseudo_mask"], batch["pseudo_words"])
        prompt = processor.tokenize(["a red star 1 in blue"])
        expected = stage1.get_text_features(**prompt)
        target = stage1.get_text_features(**processor.tokenize(["a blue one 4"]))
    normalised = torch.nn.functional.normalize
    torch.testing.assert_close(queries[:1], normalised(expected, dim=-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(batch["target_embeds"][1:], normalised(target, dim=-1), atol=1e-5, rtol=0)

    stage1.save_pretrained(tmp_path / "stage1", backbone="reference")
    processor.save_pretrained(tmp_path / "stage1")
    flags = ["--dataset_name", tmp_path / "out", "--max_steps", 4, "--hard_negative_refresh", 2]
    trained = launch(stage2_script, tmp_path / "stage1", tmp_path / "stage2", *flags)
    assert any(v.any() for k, v in trained.items() if "lora_B" in k)


@pytest.mark.parametrize("name", ["input", "caption"])
def test_instructpix2pix(tmp_path, name):
    records = [{name: "a dog", "edit": "make it a cat", "output": "a cat", "url": "u"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n", "utf-8")
    (row,) = run(tmp_path, "instructpix2pix", tmp_path / "prompts.jsonl")
    assert (row["reference_caption"], row["modification"], row["target_caption"]) == (
        "a dog", "make it a cat", "a cat",
    )  # fmt: skip


def test_pictures_by_path_train_stage_two(tmp_path, coco, launch, stage1, processor):
    (tmp_path / "lasco.json").write_text(json.dumps(lasco_records(5) * 4), "utf-8")
    run(tmp_path, "lasco", tmp_path / "lasco.json", "--image_dir", coco)
    stage1.save_pretrained(tmp_path / "stage1", backbone="reference")
    processor.save_pretrained(tmp_path / "stage1")
    launch(stage2_script, tmp_path / "stage1", tmp_path / "s2", "--dataset_name", tmp_path / "out", "--max_steps", 2)


def test_rows_that_a_killed_run_left_are_not_taken_for_this_ones(tmp_path, coco):
    (tmp_path / "lasco.json").write_text(json.dumps(lasco_records(3)), "utf-8")
    flags = ["lasco", tmp_path / "lasco.json", "--image_dir", coco]
    whole = run(tmp_path, *flags, "--rows_per_file", 1)
    shutil.copytree(tmp_path / "out/data", tmp_path / "out" / UNFINISHED)
    assert len(load_dataset(str(tmp_path / "out"), split="train")) == len(whole)
    assert run(tmp_path, *flags)["modification"] == whole["modification"]
    (tmp_path / "out/data").rename(tmp_path / "out/.replaced-data")  # killed as the new was put in its place
    (tmp_path / "lasco.json").write_text("[]", "utf-8")
    with pytest.raises(SystemExit, match="holds no triplet"):
        run(tmp_path, *flags)
    assert load_dataset(str(tmp_path / "out"), split="train")["modification"][:] == whole["modification"][:]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data", "left_out.txt"]


def test_another_set_does_not_take_the_place_of_one_that_is_there(tmp_path, coco):
    (tmp_path / "lasco.json").write_text(json.dumps(lasco_records(3)), "utf-8")
    run(tmp_path, "lasco", tmp_path / "lasco.json", "--image_dir", coco)
    (tmp_path / "rtd.json").write_text(json.dumps(RTD), "utf-8")
    with pytest.raises(SystemExit, match="out holds other data, of lasco, .* choose another folder"):
        run(tmp_path, "rtd", tmp_path / "rtd.json")
    (tmp_path / "out/left_out.txt").unlink()  # as where somebody chose among these triplets, or wrote them anew
    with pytest.raises(SystemExit, match="out holds other data, of lasco, .* choose another folder"):
        run(tmp_path, "lasco", tmp_path / "lasco.json", "--image_dir", coco)
    assert len(load_dataset(str(tmp_path / "out"), split="train")) == 3


def test_files_as_windows_or_an_editor_leave_them(tmp_path, coco):
    """With a byte order mark, or blank lines before a list."""
    content = json.dumps(lasco_records(3))
    (tmp_path / "marked.json").write_text(content, "utf-8-sig")
    (tmp_path / "blank.json").write_text(f"\n \n{content}", "utf-8")
    for name in ("marked", "blank"):
        assert len(run(tmp_path, "lasco", tmp_path / f"{name}.json", "--image_dir", coco)) == 3


def test_data_of_others_is_not_written_over(tmp_path, coco):
    """As what synthesize.py wrote, for which a language model may have been paid."""
    (tmp_path / "lasco.json").write_text(json.dumps(lasco_records(3)), "utf-8")
    (tmp_path / "out/data").mkdir(parents=True)
    (tmp_path / "out/data/train-00000-of-00001.parquet").write_bytes(b"precious")
    with pytest.raises(SystemExit, match="out holds other data, .* choose another folder"):
        run(tmp_path, "lasco", tmp_path / "lasco.json", "--image_dir", coco)
    assert (tmp_path / "out/data/train-00000-of-00001.parquet").read_bytes() == b"precious"


def test_what_cannot_be_used_is_named_or_listed(tmp_path, coco, capsys):
    records = lasco_records(6)  # the last target is missing
    records[1]["query-text"] = ""
    (tmp_path / "lasco.json").write_text(json.dumps(records), "utf-8")
    flags = [tmp_path / "lasco.json", "--image_dir", coco]
    with pytest.raises(SystemExit, match=r"(?s)2 of 6 .*triplet 1: no modification.*triplet 5: no picture .*06\.jpg"):
        run(tmp_path, "lasco", *flags)
    assert not list((tmp_path / "out").rglob("*.parquet"))
    (tmp_path / "out/data").mkdir()
    (tmp_path / "out/data/mine.txt").write_text("precious", "utf-8")
    with pytest.raises(SystemExit, match="out holds other data, of mine.txt, which this would replace"):
        run(tmp_path, "lasco", *flags, "--on_bad_image", "skip")
    assert (tmp_path / "out/data/mine.txt").read_text("utf-8") == "precious"
    (tmp_path / "out/data/mine.txt").unlink()
    rows = run(tmp_path, "lasco", *flags, "--on_bad_image", "skip")
    assert len(rows) == 4 and "2 left out" in capsys.readouterr().out
    assert len((tmp_path / "out/left_out.txt").read_text("utf-8").splitlines()) == 2
    with pytest.raises(SystemExit, match="No such file"):
        run(tmp_path, "lasco", tmp_path / "nothing", "--image_dir", coco)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["data", "left_out.txt"]  # as it was before
    assert len(list((tmp_path / "out/data").iterdir())) == 1
    records = [{"q_img": "a", "q_texts": [], "t_img": "b"}, {"q_img": "a", "q_texts": [["x"]], "t_img": "b"}]
    (tmp_path / "odd.jsonl").write_text("\n".join(map(json.dumps, records)), "utf-8")
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(SystemExit, match=r"(?s)0: no modification.*1: modification is no text: \['x'\]"):
        run(tmp_path, "megapairs", tmp_path / "odd.jsonl", "--image_dir", coco)
    with pytest.raises(SystemExit, match="not of the form of megapairs: .* of another form .*'q_text'"):
        run(tmp_path, "megapairs", *flags)
    (tmp_path / "half.jsonl").write_text('{"input": "a", "edit": "b", "output": "c"}\n{"input', "utf-8")
    with pytest.raises(SystemExit, match=r"half\.jsonl, line 2"):
        run(tmp_path, "instructpix2pix", tmp_path / "half.jsonl")
    with pytest.raises(SystemExit):
        run(tmp_path, "lasco", tmp_path / "lasco.json")
    assert "--image_dir" in capsys.readouterr().err
    (tmp_path / "odd.json").write_text('[{"query-image": [1, "a", 2], "target-image": [1, "a"]}]', "utf-8")
    with pytest.raises(SystemExit, match=r"odd\.json is not of the form of lasco: .*\[COCO id, path\]"):
        run(tmp_path, "lasco", tmp_path / "odd.json", "--image_dir", coco)
    for flags, message in (
        (["--image_dir", coco], "--image_dir is for cc-coir, lasco, megapairs"),
        (["--keys", "a", "b", "c"], "--keys is for webdataset"),
        (["--rows_per_file", 0], "--rows_per_file must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            run(tmp_path, "rtd", tmp_path / "odd.json", *flags)
        assert message in capsys.readouterr().err


def test_a_record_of_another_form_is_named(tmp_path, coco):
    """Where it stands in the file, as there may be millions."""
    path = "val2014/COCO_val2014_{:012d}.jpg".format
    good = {"q_img": path(0), "q_texts": ["a", "b"], "t_img": path(1)}
    (tmp_path / "lasco.json").write_text(json.dumps([*lasco_records(3), {"query-text": "x"}]), "utf-8")
    (tmp_path / "mega.jsonl").write_text("\n\n".join(map(json.dumps, [good, good, [1]])), "utf-8")
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(good).encode() + b'\n{"q_img": "caf\xe9"}')
    (tmp_path / "short.csv").write_text("pth1,pth2,edit\nval2014/a,val2014/b,x\nval2014/a\n", "utf-8")
    (tmp_path / "latin.csv").write_bytes(b"pth1,pth2,edit\n0,1,caf\xe9\n")
    (tmp_path / "huge.csv").write_text("pth1,pth2,edit\nval2014/a,val2014/b,x\n0,1," + "x" * (2**24 + 9), "utf-8")
    for source, file, message in (
        ("lasco", "lasco.json", r"record 3 is of another form \(KeyError\('query-image'"),
        ("megapairs", "mega.jsonl", r"line 5 is of another form"),
        ("megapairs", "latin.jsonl", r"cannot be read: 'utf-8' codec"),
        ("cc-coir", "short.csv", r"line 3 is of another form"),
        ("cc-coir", "latin.csv", r"cannot be read: 'utf-8' codec"),
        ("cc-coir", "huge.csv", r"cannot be read beyond line 2: field larger than field limit"),
    ):
        with pytest.raises(SystemExit, match=rf"error: .*{file}.* {message}"):
            run(tmp_path, source, tmp_path / file, "--image_dir", coco, "--on_bad_image", "skip")


def test_keys_that_name_no_picture_are_told(tmp_path):
    sample = {"in.png": encoded(1), "txt": b"hello", "json": json.dumps({"edit": "in red", "x": 3}).encode()}
    write_tar(tmp_path / "0.tar", {"first": sample})
    for key, holds in (("txt", "'hello'"), ("json.x", "3"), ("json", "{'edit")):
        with pytest.raises(SystemExit, match=rf"0\.tar.* sample first .*{key} holds no picture but {holds}.*--keys"):
            run(tmp_path, "webdataset", tmp_path / "*.tar", "--keys", "in.png", key, "json.edit")


def test_what_is_left_out_is_named_by_its_record_with_a_remedy_of_its_source(tmp_path, coco):
    """A triplet's number is none of the file's where a record has several texts, or the samples several shards."""
    path = "val2014/COCO_val2014_{:012d}.jpg".format
    records = [{"q_img": path(0), "q_texts": ["a", "b"], "t_img": path(n)} for n in (1, 99)]
    (tmp_path / "mega.jsonl").write_text("\n\n".join(map(json.dumps, records)), "utf-8")
    with pytest.raises(SystemExit, match=r"(?s)line 3, triplet 2: no picture .*99\.jpg.*\nCheck --image_dir, or"):
        run(tmp_path, "megapairs", tmp_path / "mega.jsonl", "--image_dir", coco)
    (tmp_path / "rtd.json").write_text(json.dumps([RTD[0], RTD[1] | {"target_caption": " "}]), "utf-8")
    with pytest.raises(SystemExit, match=r"record 1, triplet 1: no target_caption\nGo on without them by --on_bad"):
        run(tmp_path, "rtd", tmp_path / "rtd.json")
    sample = {"in.png": encoded(1), "out.png": encoded(2), "json": json.dumps({"edit": "in red"}).encode()}
    for shard, text in enumerate(("in red", " ")):
        samples = {f"s{n}": sample | {"json": json.dumps({"edit": text}).encode()} for n in range(2)}
        write_tar(tmp_path / f"{shard}.tar", samples)
    flags = [tmp_path / "*.tar", "--keys", "in.png", "out.png", "json.edit"]
    with pytest.raises(SystemExit, match=r"1\.tar, sample s0, triplet 2: no modif.*(?s:.*)\nCheck --keys, or go on"):
        run(tmp_path, "webdataset", *flags)
    assert len(run(tmp_path, "webdataset", *flags, "--on_bad_image", "skip")) == 2
    assert "1.tar, sample s1, triplet 3: no modification" in (tmp_path / "out/left_out.txt").read_text("utf-8")


def test_a_sample_without_a_member_is_left_out_and_one_of_another_form_is_told(tmp_path, capsys):
    good = {"in.png": encoded(1), "out.png": encoded(2), "json": json.dumps({"edit": "in red"}).encode()}
    bare = {name: content for name, content in good.items() if name != "json"}
    flags = [tmp_path / "*.tar", "--keys", "in.png", "out.png", "json.edit"]
    write_tar(tmp_path / "0.tar", {f"s{n}": bare if n == 6 else good for n in range(8)})
    with pytest.raises(SystemExit, match=r"0\.tar, sample s6, triplet 6: no modification"):
        run(tmp_path, "webdataset", *flags)
    assert len(run(tmp_path, "webdataset", *flags, "--on_bad_image", "skip")) == 7
    write_tar(tmp_path / "0.tar", {f"s{n}": good | ({"json": b"[1]"} if n == 6 else {}) for n in range(8)})
    with pytest.raises(SystemExit, match=r"error: .*0\.tar, beyond sample s5, is damaged or of another form: 'list'"):
        run(tmp_path, "webdataset", *flags)
