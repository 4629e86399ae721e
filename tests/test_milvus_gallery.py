import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import noise
from PIL import Image

from modeling_tscir import ComposedImageRetrievalPipeline, Gallery, GalleryError, TSCIRProcessor, milvus_gallery
from modeling_tscir.cli import main
from modeling_tscir.metadata import Condition
from modeling_tscir.milvus import as_filter, connect, is_milvus
from modeling_tscir.milvus_gallery import MilvusGallery, open_gallery


pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")


@pytest.fixture
def address(request, tmp_path):
    """A file of milvus-lite's, or a server that listens on loopback."""
    if getattr(request, "param", "file") == "file":
        yield str(tmp_path / "g.db")
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "milvus_lite.cmdline", "server", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen([*command, "--data-dir", str(tmp_path / "data")], stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture
def both(address, stage2, processor, picture_folder, tmp_path):
    """The same pictures in a folder's gallery and in Milvus's."""
    shutil.copy(picture_folder / "0.png", picture_folder / "again.png")
    (picture_folder / "broken.jpg").write_bytes(b"nothing")
    frame = pd.DataFrame({"file_name": ["0.png", "2.png", "below/1.png"], "price": [10, 20, 30],
                          "colour": ["red", 'bl"ue', "red"], "größe": ["é", "é", "中"]})  # fmt: skip
    frame.to_csv(picture_folder / "metadata.csv", index=False)
    options = {"progress": False, "shard_size": 3}
    local = Gallery.from_folder(picture_folder, tmp_path / "g", stage2, processor, dtype="float32", **options)
    remote = MilvusGallery.from_folder(picture_folder, f"{address}#shop", stage2, processor, **options)
    yield local, remote
    remote.client.close()


def test_a_file_outlives_the_process_that_made_it(clip_dir, picture_folder, tmp_path):
    """As `tscir index`, then `tscir search` and `tscir info`, run it."""
    program = [sys.executable, "-m", "modeling_tscir.cli"]
    name = str(tmp_path / "g.db")
    for words in (["index", picture_folder, "--output", name, "--model", clip_dir], ["search", name, "--text", "red"],
                  ["info", name], ["index", picture_folder, "--output", name, "--model", clip_dir]):  # fmt: skip
        done = subprocess.run([*program, *map(str, words)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    assert "6 as they were" in done.stderr


QUERIES = torch.nn.functional.normalize(torch.randn(5, 24, generator=torch.Generator().manual_seed(0)), dim=-1)


def plain(results: list[list[dict]]) -> list:
    """Results without scores, whose last digits differ, and with missing metadata as none."""
    return [
        [
            r | {"score": round(r["score"], 4), "metadata": {k: v for k, v in r["metadata"].items() if v == v}}
            for r in row
        ]
        for row in results
    ]


@pytest.mark.parametrize("address", ["file", "server"], indirect=True)
def test_it_answers_as_a_folders_gallery_does(both):
    local, remote = both
    assert remote.ids == sorted(local.ids) and len(remote) == 7 and "2.png" in remote and "x" not in remote
    assert remote.duplicates() == local.duplicates() == [["0.png", "again.png"]]
    assert remote.unreadable == local.unreadable and [b["id"] for b in remote.unreadable] == ["broken.jpg"]
    for options in ({}, {"top_k": 2}, {"where": {"colour": "red"}}, {"where": {"price": (">", 10)}},
                    {"where": {"colour": 'bl"ue'}}, {"where": {"colour": ["red", "x"], "price": ("<=", 20)}},
                    {"where": {"price": ("!=", 10)}}, {"exclude": ["again.png"]}, {"where": {"größe": "é"}},
                    {"where": {"größe": ["中"]}}, {"where": {"colour": []}}, {"where": {"price": (">", np.int64(10))}},
                    {"where": {"price": [np.float32(20), 7]}},
                    {"where": {"colour": ("not in", ["red"])}}, {"where": {"colour": ("not in", [])}},
                    {"where": [("price", ">", 10), ("price", "<", 30)]}):  # fmt: skip
        mine, other = plain(remote.search(QUERIES, **options)), plain(local.search(QUERIES, **options))
        assert [[r["id"] for r in row] for row in mine] == [[r["id"] for r in row] for row in other], options
        assert mine == other, options
    assert remote.picture("2.png").tobytes() == local.picture("2.png").tobytes()


@pytest.mark.parametrize("address", ["file", "server"], indirect=True)
def test_it_follows_the_folder_and_survives_closing(both, stage2, processor, picture_folder):
    _, remote = both
    uri = remote.uri
    remote.client.close()
    remote = open_gallery(uri)
    assert isinstance(remote, MilvusGallery) and len(remote) == 7
    Image.fromarray(np.full((40, 48, 3), 7, dtype=np.uint8)).save(picture_folder / "2.png")
    (picture_folder / "4.png").unlink()
    pd.DataFrame({"file_name": ["0.png"], "price": [99]}).to_csv(picture_folder / "metadata.csv", index=False)
    report = remote.add(picture_folder, stage2, processor, progress=False)
    assert (report.added, report.changed, report.removed, report.unchanged) == (0, 1, 1, 5)
    assert {r["id"] for r in remote.search(QUERIES, where={"price": 99})[0]} == {"0.png"}
    remote.remove(["0.png"])
    assert "0.png" not in remote and len(remote) == 5
    with pytest.raises(KeyError, match="0.png"):
        remote.remove(["0.png"])
    with pytest.raises(ValueError, match="remove takes a list of ids, not '2.png'"):
        remote.remove("2.png")
    assert "2.png" in remote
    remote.client.close()


def test_a_column_that_becomes_text_is_text_for_every_picture(both, stage2, processor, tmp_path):
    (tmp_path / "more").mkdir()
    for i in range(3):
        noise(50 + i).save(tmp_path / f"more/{i}.png")
    prices = {"0.png": 10, "1.png": "on request", "2.png": True}
    lines = [json.dumps({"file_name": name, "price": price}) for name, price in prices.items()]
    (tmp_path / "more/metadata.jsonl").write_text("\n".join(lines), "utf-8")
    for gallery in both:
        gallery.add(tmp_path / "more", stage2, processor, prefix="more/", progress=False)
    expected = {10: {"0.png", "more/0.png"}, "20": {"2.png"}, "on request": {"more/1.png"}}
    for price, ids in expected.items():
        found = [plain(gallery.search(QUERIES, where={"price": price})) for gallery in both]
        assert found[0] == found[1] and {r["id"] for r in found[0][0]} == ids
    with pytest.raises(ValueError, match="holds texts"):
        both[1].search(QUERIES, where={"price": None})


def test_a_column_without_values_changes_no_kind(both, stage2, processor, tmp_path):
    (tmp_path / "more").mkdir()
    noise(50).save(tmp_path / "more/0.png")
    (tmp_path / "more/metadata.jsonl").write_text('{"file_name": "0.png", "price": null, "new": null}', "utf-8")
    for gallery in both:
        gallery.add(tmp_path / "more", stage2, processor, prefix="more/", progress=False)
        assert {r["id"] for r in gallery.search(QUERIES, where={"price": (">", 15)})[0]} == {"2.png", "below/1.png"}
    (tmp_path / "more/metadata.jsonl").write_text('{"file_name": "0.png", "price": 40, "new": 7}', "utf-8")
    for gallery in both:
        gallery.add(tmp_path / "more", stage2, processor, prefix="more/", progress=False)
        found = gallery.search(QUERIES, where={"price": (">", 35), "new": ("<", 8)})[0]
        assert [r["id"] for r in found] == ["more/0.png"]


def test_columns_go_with_the_last_of_their_values(both, stage2, processor, picture_folder, tmp_path):
    (tmp_path / "more").mkdir()
    noise(50).save(tmp_path / "more/0.png")
    (tmp_path / "more/metadata.csv").write_text("file_name,price\n0.png,40\n", "utf-8")
    (picture_folder / "metadata.csv").write_text("file_name,new\n0.png,7\n", "utf-8")
    for gallery in both:
        gallery.add(tmp_path / "more", stage2, processor, prefix="more/", progress=False)
        gallery.add(picture_folder, stage2, processor, progress=False)
        found = {r["id"]: r["metadata"] for r in gallery.search(QUERIES)[0]}
        assert found["0.png"] == {"price": None, "new": 7} and found["more/0.png"] == {"price": 40, "new": None}
        with pytest.raises(ValueError, match=r"no column 'colour' in .*; it has price, new"):
            gallery.search(QUERIES, where={"colour": "red"})


@pytest.mark.parametrize("page", [2, 500])
def test_file_names_may_hold_any_character(stage2, processor, picture_folder, tmp_path, monkeypatch, page):
    monkeypatch.setattr("modeling_tscir.milvus_gallery.ROWS_AT_A_TIME", page)
    names = ["it's.png", "a','0.png", 'quo"te.png', "back\\slash.png", "grün 紅.png", "c\x1b[1m.png",
             "\\u001b.png", "\\\x0c\b\x7f.png", "new\r\n\tline.png"]  # fmt: skip
    for number, name in enumerate(names):
        noise(number).save(picture_folder / name)
    uri = str(tmp_path / "g.db")
    remote = MilvusGallery.from_folder(picture_folder, uri, stage2, processor)
    assert set(names) < set(remote.ids) and all(name in remote for name in names)
    assert "none','0.png" not in remote and remote.content("x' or id != '") is None
    assert remote.source("it's.png") == str(picture_folder / "it's.png")
    rows = [{"file_name": name, name: name} for name in names]
    (picture_folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    remote.add(picture_folder, stage2, processor, progress=False)
    for name in names:
        for condition in (name, [name, "none"]):
            assert [r["id"] for r in remote.search(QUERIES, where={name: condition})[0]] == [name]
        (picture_folder / name).unlink()
    remote = MilvusGallery.from_folder(picture_folder, uri, stage2, processor)
    assert not set(names) & set(remote.ids) and len(remote) == 6


def test_the_pipeline_searches_it(both, stage2, processor, picture_folder):
    local, remote = both
    cir = ComposedImageRetrievalPipeline(model=stage2, processor=processor)
    found = [cir.index(g)(image=picture_folder / "2.png", text="red", top_k=3) for g in (local, remote)]
    assert [r["id"] for r in found[0]] == [r["id"] for r in found[1]]
    assert found[1][0]["image"].size == (48, 40)


def test_refusals(both, stage2, clip_dir, tmp_path, pictures):
    _, remote = both
    squeezed = TSCIRProcessor.from_clip_pretrained(clip_dir, padded_aspect_ratio=1.25)
    with pytest.raises(GalleryError, match="another preprocessing"):
        remote.check(stage2, squeezed)
    with pytest.raises(GalleryError, match="holds no gallery"):
        MilvusGallery(str(tmp_path / "none.db"))
    with pytest.raises(GalleryError, match="keeps no pictures"):
        remote.add(pictures, stage2, squeezed)
    with pytest.raises(ValueError, match="queries are"):
        remote.search(QUERIES[:, :3])
    with pytest.raises(ValueError, match="top_k is 20000, and Milvus gives at most 16384 results"):
        remote.search(QUERIES, 20_000)
    with pytest.raises(ValueError, match="give both, or neither"):
        MilvusGallery.load(remote.uri, stage2)
    assert (
        is_milvus("http://host:19530#shop") and is_milvus("a.db") and not is_milvus("a") and not is_milvus("/a.db/g")
    )
    hostile = as_filter(Condition('a"] or 1 == 1', "=", 'x" or ""==""'))
    assert hostile == 'metadata["a\\"] or 1 == 1"] == "x\\" or \\"\\"==\\"\\""'
    for where in ({"nope": 1}, {"price": ("<", "c")}, {"colour": ("in", "red")}, {"colour": None}):
        with pytest.raises(ValueError):
            remote.search(QUERIES, where=where)
    assert not (tmp_path / "none.db").exists()  # nothing is made by looking


def test_fewer_results_than_were_asked_for_are_told_where_copies_fill_what_milvus_gives(both, monkeypatch):
    local, remote = both
    told = []
    monkeypatch.setattr(milvus_gallery.logger, "warning", told.append)
    assert len(remote.search(QUERIES[:1], np.int64(7))[0]) == len(local) - 1 and told == []  # one is a copy
    monkeypatch.setattr(milvus_gallery, "MAX_FOUND", len(local))
    assert len(remote.search(QUERIES[:1], len(local))[0]) == len(local) - 1
    assert len(told) == 1 and f"gives {len(local)} pictures to one search, of which fewer than" in told[0]


def test_what_milvus_refuses_is_told(both, monkeypatch):
    from pymilvus import MilvusException

    def refuse(*_, **__):
        raise MilvusException(message="no such thing")

    _, remote = both
    for call in ("query", "delete"):
        monkeypatch.setattr(remote.client, call, refuse)
    for action in (
        lambda: "0.png" in remote,
        lambda: remote.ids,
        lambda: len(remote),
        lambda: remote.forget({"0.png"}),
    ):
        with pytest.raises(GalleryError, match=r"g\.db#shop: .*no such thing"):
            action()


def test_a_name_may_end_with_a_slash(both):
    """As shells complete a folder's, which milvus-lite's is."""
    _, remote = both
    address, _, collection = remote.uri.partition("#")
    assert is_milvus("a.db/") and is_milvus("a.db//#shop") and not is_milvus("/a.db/g/") and not is_milvus("/")
    assert open_gallery(f"{address}/#{collection}").ids == remote.ids


def test_a_server_that_does_not_answer_is_named(stage2, processor):
    with pytest.raises(GalleryError, match="http://127.0.0.1:9 cannot be opened"):
        MilvusGallery.open_or_create("http://127.0.0.1:9#shop", stage2, processor)


def test_without_pymilvus_one_is_told_what_to_install(stage2, processor, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(GalleryError, match="pip install pymilvus milvus-lite"):
        MilvusGallery.open_or_create(str(tmp_path / "g.db"), stage2, processor)


def test_one_whose_making_was_interrupted_is_made_anew(stage2, processor, picture_folder, tmp_path):
    uri = str(tmp_path / "g.db")
    MilvusGallery.create(uri, stage2, processor).client.close()
    client = connect(uri)
    client.drop_collection("gallery_info")
    client.close()
    with pytest.raises(GalleryError, match="holds no gallery"):
        MilvusGallery(uri)
    gallery = MilvusGallery.from_folder(picture_folder, uri, stage2, processor, progress=False)
    assert len(gallery) == 6
    gallery.client.close()


def test_a_new_one_wants_a_model(picture_folder, tmp_path, capsys):
    assert main(["index", str(picture_folder), "--output", str(tmp_path / "new.db")]) != 0
    assert "name a model: --model" in capsys.readouterr().err
