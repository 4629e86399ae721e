import json
import os
import re
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageDraw, ImageFont

import modeling_tscir
from modeling_tscir import Gallery, cli
from modeling_tscir.contact_sheet import LONGEST, font, wrapped


@pytest.fixture
def run(capsys):
    """Run `tscir`; gives exit code, stdout and stderr."""

    def run(*arguments):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def indexed(run, picture_folder, model_dir, tmp_path):
    frame = pd.DataFrame({"file_name": ["0.png", "2.png", "below/1.png"], "price": [10, 20, 30],
                          "colour": ["red", "blue", "red"]})  # fmt: skip
    frame.to_csv(picture_folder / "metadata.csv", index=False)
    (picture_folder / "broken.jpg").write_bytes(b"nothing")
    code, out, err = run("index", picture_folder, "-o", tmp_path / "g", "--model", model_dir)
    assert code == 0 and out == "" and "6 pictures added" in err and "broken.jpg: not a picture" in err
    return tmp_path / "g"


def test_help_shows_how_to_ask(run):
    code, out, _ = run("--help")
    assert code == 0 and all(
        command in out for command in ("tscir index", "tscir search", "tscir info", "tscir serve")
    )
    assert "in the colour of" in run("search", "--help")[1] and "IVF4096,PQ64" in run("index", "--help")[1]


def test_a_search_as_table_json_page_and_picture(run, indexed, picture_folder, tmp_path):
    query = ("search", indexed, "--image", picture_folder / "0.png", "--text", "red", "-k", 3)
    code, out, _ = run(*query)
    lines = out.strip().splitlines()
    assert code == 0 and len(lines) == 4 and lines[0].split() == ["score", "id", "more"]
    code, out, _ = run(*query, "--json")
    results = json.loads(out)
    assert [r["id"] for r in results] == [line.split()[1] for line in lines[1:]]
    assert f"{results[0]['score']:.3f}" == lines[1].split()[0]
    code, out, err = run(*query, "--html", tmp_path / "o.html", "--png", tmp_path / "o.png")
    page = (tmp_path / "o.html").read_text("utf-8")
    assert page.count("<figure>") == 3 and page.count("data:image/jpeg;base64,") == 4 and "http" not in page
    assert Image.open(tmp_path / "o.png").size[0] > 1000 and "o.html" in err and "where they were" not in err
    picture_folder.rename(tmp_path / "moved")
    _, _, err = run("search", indexed, "--text", "red", "-k", 3, "--png", tmp_path / "o.png")
    assert "3 of 3 pictures are not where they were indexed" in err and "tscir index THEIR_FOLDER --output" in err


def test_every_kind_of_query(run, indexed, picture_folder):
    def ids(*parts, k=6) -> list[str]:
        code, out, err = run("search", indexed, *parts, "-k", k, "--json")
        assert code == 0, err
        return [r["id"] for r in json.loads(out)]

    picture = picture_folder / "0.png"
    assert ids("--image", picture)[0] == "0.png"
    assert len(ids("--text", "red")) == 6
    assert ids("--id", "0.png") == ids("--image", picture)[1:]  # a picture of the gallery is not its own result
    two = ("--image", picture, "--text", "in the colour of", "--image", picture_folder / "2.png")
    turned = ("--image", picture_folder / "2.png", "--text", "in the colour of", "--image", picture)

    def scores(*parts) -> dict[str, float]:
        return {r["id"]: r["score"] for r in json.loads(run("search", indexed, *parts, "--json")[1])}

    assert scores(*two) != pytest.approx(scores(*turned), abs=1e-3)
    composed = ("--image", picture, "--text", "red")
    assert ids(*composed, "--weight", -1)[0] == "0.png" and ids(*composed, "--weight", 1) == ids("--text", "red")
    assert set(ids(*composed, "--where", "colour=red", "--where", "price>10")) == {"below/1.png"}
    assert set(ids(*composed, "--where", "price>=10", "--where", "price < 30")) == {"0.png", "2.png"}
    assert set(ids(*composed, "--where", "price==20")) == {"2.png"}
    assert len(ids(*composed, k=2)) == 2


def test_pictures_of_formats_that_are_not_read_are_told_as_such(run, model_dir, picture_folder, tmp_path):
    for name in ("a.HEIC", "b.heic", "notes.txt"):
        (picture_folder / name).write_bytes(b"x")
    _, _, err = run("index", picture_folder, "-o", tmp_path / "g", "--model", model_dir)
    assert "2 pictures of formats that are not read: 2 .heic. Store them as JPEG or PNG." in err
    assert "1 other files were not looked at: 1 .txt." in err


def test_info(run, indexed):
    code, out, _ = run("info", indexed)
    assert code == 0 and "6 pictures" in out and "broken.jpg: not a picture" in out
    assert "metadata    price (number), colour (text)" in out
    told = json.loads(run("info", indexed, "--json")[1])
    assert told["pictures"] == 6 and told["columns"] == {"price": "number", "colour": "text"}


def test_a_plain_clip_answers_training_free_and_says_so(run, clip_dir, picture_folder, tmp_path):
    code, _, err = run("index", picture_folder, "-o", tmp_path / "g", "--model", clip_dir)
    assert code == 0 and err.count("training-free") == 1
    code, out, err = run("search", tmp_path / "g", "--image", picture_folder / "0.png", "--text", "red")
    assert code == 0 and "training-free" in err and len(out.splitlines()) == 7


def test_milvus_by_its_address(run, picture_folder, model_dir, tmp_path):
    pytest.importorskip("milvus_lite")
    uri = f"{tmp_path / 'g.db'}#photos"
    code, _, err = run("index", picture_folder, "-o", uri, "--model", model_dir)
    assert code == 0 and "holds 6 pictures" in err, err
    code, out, _ = run("search", uri, "--id", "0.png", "--text", "red", "-k", 2, "--json")
    assert code == 0 and len(json.loads(out)) == 2
    assert "6 pictures" in run("info", uri)[1]
    assert "2: " not in err and "0 pictures added" in run("index", picture_folder, "-o", uri)[2]


def test_an_index_and_its_recall(run, indexed, picture_folder):
    pytest.importorskip("faiss")
    code, _, err = run("index", picture_folder, "-o", indexed, "--index", "Flat")
    assert code == 0 and re.search(r"index Flat: finds \d+\.\d% of the exact ten best", err)
    assert "index       Flat" in run("info", indexed)[1]
    code, _, err = run("index", picture_folder, "-o", indexed, "--index", "NONSENSE")
    assert code == 2 and "does not understand" in err and "index       Flat" in run("info", indexed)[1]
    code, _, err = run("index", picture_folder, "-o", indexed, "--index", "IVF4096,Flat")
    assert code == 2 and "do not make" in err and "index       Flat" in run("info", indexed)[1]
    code, _, err = run("index", picture_folder, "-o", indexed, "--index", "none")
    assert code == 0 and "index       " not in run("info", indexed)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "{g}"], "a query needs --image, --id or --text"),
        (["search", "{g}", "--id", "none"], "no picture with the id 'none'"),
        (["search", "{g}", "--image", "none.png"], "none.png: missing"),
        (["search", "{g}", "--text", "a", "--png", "a.xyz"], "ending in .png"),
        (["search", "{g}", "--text", "a", "--html", "no/a.html"], "a folder that is there"),
        (["search", "{g}", "--text", "a", "--where", "price"], "write it as column=value"),
        (["search", "{g}", "--text", "a", "--where", "size=3"], "no column 'size'"),
        (["search", "{g}", "--text", "a", "--weight", "3"], "--weight must be between"),
        (["search", "nowhere", "--text", "a"], "holds no gallery; make one with: tscir index"),
        (["index", "nowhere", "-o", "{g}"], "is not a folder"),
        (["index", "{p}", "-o", "{p}", "--model", "{m}"], "holds no gallery; name a new folder"),
        (["index", "{p}", "-o", "{g}x"], "name a model"),
        (["index", "{p}", "-o", "{g}x", "--model", "no/such-model"], "'no/such-model' cannot be found"),
        (["info", "{p}"], "pictures holds no gallery; make one with: tscir index"),
        (["index", "{p}", "-o", "{p}/0.png/g", "--model", "{m}"], "0.png is a file; name a folder"),
        (
            ["index", "{p}", "-o", "{g}x", "--model", "./no-such"],
            "there is no folder ./no-such; --model",
        ),
        (["search", "{g}", "--text", "a", "--top-k", "3"], "unrecognized arguments: --top-k 3; did you mean --top_k?"),
        (["index", "{p}", "-o", "{g}", "--dtype", "float32"], "stores float16, not float32"),
        (["index", "{p}", "-o", "{g}.db", "--dtype", "float16", "--model", "{m}"], "Milvus stores float32"),
        (["index", "{p}", "-o", "{g}.db", "--index", "Flat", "--model", "{m}"], "Milvus keeps an index of its own"),
    ],
)
def test_mistakes_are_one_sentence_each(run, indexed, picture_folder, model_dir, arguments, message):
    arguments = [a.format(g=indexed, p=picture_folder, m=model_dir) for a in arguments]
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("--text", "a", "--weight", "3"), "--weight must be between -1 and 1, not 3.0"),
        (("--text", "a", "-k", "0"), "--top_k must be at least 1, not 0"),
        (("--id", "none", "--text", "a"), "no picture with the id 'none'"),
        (("--image", "none.png", "--text", "a"), "--image none.png: missing"),
        (("--text", "a", "--where", "size=3"), "no column 'size' in"),
        (("--text", "a", "--where", "price<x"), "cannot be compared with 'x'"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(run, indexed, monkeypatch, asked, message):
    monkeypatch.setattr(cli, "load_pipeline", lambda *given: pytest.fail("loaded"))
    code, out, err = run("search", indexed, *asked)
    assert code == 2 and out == "" and message in err


def test_metadata_that_cannot_be_read_is_told_before_a_model_is_loaded(run, picture_folder, model_dir, monkeypatch):
    monkeypatch.setattr(cli, "load_pipeline", lambda *given: pytest.fail("loaded"))
    index = "index", picture_folder, "-o", picture_folder.parent / "g", "--model", model_dir
    code, out, err = run(*index, "--metadata", picture_folder / "none.csv")
    assert code == 2 and out == "" and "none.csv cannot be read" in err
    code, out, err = run(*index, "--prefix", "\udcff")
    assert code == 2 and "prefix '\\udcff' is no text" in err
    (picture_folder / "metadata.csv").write_text("name,price\na.png,3\n", "utf-8")
    code, out, err = run(*index)
    assert code == 2 and out == "" and "metadata.csv has no column file_name; it has name, price" in err


def test_conditions_that_no_picture_meets_are_told(run, indexed):
    code, out, err = run("search", indexed, "--text", "a", "--where", 'colour="red"', "--where", "price>5")
    assert code == 0 and out.strip().endswith("nothing found")
    assert "no picture meets --where 'colour=\"red\"' --where 'price>5'; a value stands without quotes" in err
    code, out, err = run("search", indexed, "--text", "a", "--where", "colour=red")
    assert code == 0 and len(out.splitlines()) == 3 and "no picture meets" not in err
    assert "no other picture meets" in run("search", indexed, "--id", "2.png", "--text", "a", "--where", "price=20")[2]


def test_letters_of_other_languages_are_drawn():
    if font(13).getname()[0] == ImageFont.load_default(13).getname()[0]:
        pytest.skip("this system has none of the fonts")
    assert len({bytes(font(13).getmask(letter)) for letter in "uüжλ"}) == 4


def test_a_long_query_is_cut_where_it_is_seen():
    draw = ImageDraw.Draw(Image.new("RGB", (10, 10)))
    assert wrapped("a red dress", draw, 400) == "a red dress"
    chinese = wrapped("红色连衣裙" * 20, draw, 400).split("\n")
    assert "".join(chinese) == "红色连衣裙" * 20 and len(chinese) > 1
    assert max(draw.textlength(line, font=font(18)) for line in chinese) <= 400
    lines = wrapped("word " * 200, draw, 400).split("\n")
    assert len(lines) == 6 and lines[-1].endswith("word …") and not any("…" in line for line in lines[:-1])


def test_an_empty_gallery_is_not_searched(run, model_dir, tmp_path):
    (tmp_path / "none").mkdir()
    assert run("index", tmp_path / "none", "-o", tmp_path / "g", "--model", model_dir)[0] == 2
    code, out, err = run("search", tmp_path / "g", "--text", "red")
    assert code == 2 and out == "" and "holds no pictures" in err


def test_a_picture_that_its_format_does_not_hold_is_refused(run, indexed, tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_tscir.contact_sheet.LONGEST", {".webp": 600})
    query = ("search", indexed, "--text", "red", "-k", 6)
    code, _, err = run(*query, "--png", tmp_path / "o.webp")
    assert code == 2 and "o.webp: 6 results make 804 pixels in height, of which it holds 600; name a .png" in err
    assert not (tmp_path / "o.webp").exists() and run(*query, "--png", tmp_path / "o.png")[0] == 0


@pytest.mark.parametrize("suffix", [".webp", ".jpg"])
def test_the_longest_pictures_are_as_long_as_that(suffix, tmp_path):
    longest = LONGEST[suffix]
    Image.new("RGB", (1, longest)).save(tmp_path / f"a{suffix}")
    with pytest.raises((OSError, ValueError)):
        Image.new("RGB", (1, longest + 1)).save(tmp_path / f"b{suffix}")


def test_a_gallery_that_one_may_only_read_is_named(run, indexed, picture_folder):
    (indexed / ".lock").unlink()
    (indexed / ".lock").mkdir()  # as root may write everywhere
    code, out, err = run("index", picture_folder, "-o", indexed)
    assert code == 2 and f"{indexed} cannot be written to (Is a directory)" in err and "another gallery" in err


def test_a_reader_that_has_enough_is_no_mistake(indexed):
    """As in tscir info G | head -1."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "modeling_tscir.cli", "info", indexed]
    done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=200)
    os.close(writing)
    assert done.returncode == 141 and "roken" not in done.stderr, done.stderr


def test_strict_tells_by_its_exit_code(run, indexed, picture_folder):
    assert run("index", picture_folder, "-o", indexed)[0] == 0
    assert run("index", picture_folder, "-o", indexed, "--strict")[0] == 1


def test_the_precision_is_the_one_asked_for(run, picture_folder, model_dir, tmp_path, monkeypatch):
    made = {}
    for precision in (None, "float16", "bfloat16"):
        asked = () if precision is None else ("--precision", precision)
        gallery = tmp_path / str(precision)
        code, _, err = run("index", picture_folder, "-o", gallery, "--model", model_dir, "--dtype", "float32", *asked)
        assert code == 0, err
        made[precision] = torch.tensor(Gallery.load(gallery).dataset()["embedding"][:])
        code, _, err = run("search", gallery, "--image", picture_folder / "0.png", "--text", "red", *asked)
        assert code == 0, err
    exact = made.pop(None)
    for precision, embeds in made.items():
        assert not torch.equal(embeds, exact) and torch.cosine_similarity(embeds, exact).min() > 0.999, precision


def test_a_gpu_computes_in_half_precision_unless_told(model_dir, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(modeling_tscir, "ComposedImageRetrievalPipeline", lambda **made: made)
    made = cli.load_pipeline(str(model_dir))
    assert made["device"] == "cuda" and made["model"].dtype == torch.float16
    assert cli.load_pipeline(str(model_dir), "float32")["model"].dtype == torch.float32
    monkeypatch.undo()
    assert cli.load_pipeline(str(model_dir)).model.dtype == torch.float32
