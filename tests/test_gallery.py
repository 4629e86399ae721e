import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from conftest import ROOT
from PIL import Image

from modeling_tscir import (
    ComposedImageRetrievalPipeline,
    Gallery,
    GalleryError,
    TSCIRModel,
    TSCIRProcessor,
    exact_search,
    files,
    gallery_rows,
    indexing,
    shards,
)
from modeling_tscir.embedding import embed_images
from modeling_tscir.ranking import top_k


@pytest.fixture
def make(stage2, processor, picture_folder, tmp_path):
    """A gallery of the picture folder, or of another."""

    def make(images=picture_folder, folder=tmp_path / "gallery", **options):
        return Gallery.from_folder(images, folder, stage2, processor, progress=False, **options)

    return make


def test_ctrl_c_keeps_the_batches_that_are_done(make, stage2, processor, picture_folder, tmp_path, monkeypatch):
    """And others may read what is written, as far as they may read the rest of it."""
    encode, calls = stage2.get_image_features, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(stage2, "get_image_features", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(batch_size=2)
    gallery = Gallery(tmp_path / "gallery")
    assert len(gallery) == 4
    report = gallery.add(picture_folder, stage2, processor, batch_size=2, progress=False)
    assert report.added == 2 and report.unchanged == 4 and len(gallery) == 6
    modes = {path.stat().st_mode for path in gallery.folder.glob("shards/*/*")}
    assert len(modes) == 1


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8))


NAMES = ["0.png", "2.png", "4.png", "below/1.png", "below/3.png", "below/5.png"]


def test_it_holds_frozen_clips_embeddings_of_every_picture(make, stage2, processor, picture_folder):
    gallery = make(dtype="float32", shard_size=4)
    assert gallery.ids == NAMES and len(gallery.shards) == 2
    expected = embed_images(stage2, processor, [picture_folder / name for name in NAMES])
    assert torch.allclose(gallery.vectors(np.arange(6)), expected, atol=1e-6)
    half = make(folder=gallery.folder.with_name("half"))
    assert half.vectors(np.arange(6)).dtype == torch.float16
    assert torch.allclose(half.vectors(np.arange(6)).float(), expected, atol=1e-3)
    assert gallery.picture("2.png").tobytes() == Image.open(picture_folder / "2.png").tobytes()


def test_search_is_exact_across_shards(make):
    gallery = make(dtype="float32", shard_size=2)
    queries = torch.nn.functional.normalize(torch.randn(130, 24, generator=torch.Generator().manual_seed(0)), dim=-1)
    scores, rows = top_k(queries, gallery.vectors(np.arange(6)), 4)
    found = gallery.search(queries, 4)
    assert [[NAMES[i] for i in row] for row in rows.tolist()] == [[r["id"] for r in row] for row in found]
    assert [r["score"] for row in found for r in row] == pytest.approx(scores.flatten().tolist(), abs=1e-6)
    assert len(gallery.search(queries[:1], 100)[0]) == 6
    assert gallery.search(queries[:0]) == []
    for bad in (queries[:, :5], queries[0], queries * torch.nan):
        with pytest.raises(ValueError, match="quer"):
            gallery.search(bad)
    for options, message in (({"top_k": 0}, "top_k"), ({"top_k": 2.5}, "top_k"), ({"exclude": "0.png"}, "exclude")):
        with pytest.raises(ValueError, match=message):
            gallery.search(queries, **options)


def test_search_in_blocks_is_search_in_one(make, monkeypatch):
    gallery = make(dtype="float32", shard_size=1)
    queries = torch.nn.functional.normalize(torch.randn(5, 24, generator=torch.Generator().manual_seed(1)), dim=-1)
    expected = gallery.search(queries, 4)
    monkeypatch.setattr(exact_search, "ROWS_AT_A_TIME", 2)
    monkeypatch.setattr(exact_search, "QUERIES_AT_A_TIME", 2)
    for one, other in zip(gallery.search(queries, 4), expected, strict=True):
        assert [r["id"] for r in one] == [r["id"] for r in other]
        assert [r["score"] for r in one] == pytest.approx([r["score"] for r in other], abs=1e-6)


def test_equal_scores_keep_the_gallerys_order():
    scores = torch.tensor([[0.5, 0.9, 0.5, 0.5, -torch.inf], [0.1, 0.1, 0.1, 0.1, 0.1]])
    values, columns = exact_search.best(scores, 3)
    assert columns.tolist() == [[1, 0, 2], [0, 1, 2]] and values[0].tolist() == pytest.approx([0.9, 0.5, 0.5])


def test_names_whose_hashes_are_equal_are_told_apart(make, stage2, processor, picture_folder, monkeypatch):
    def few_hashes(names):
        return np.array([len(name) % 2 for name in names], dtype=np.uint64)

    monkeypatch.setattr(gallery_rows, "hashed", few_hashes)
    gallery = make(shard_size=2)
    names = ["0.png", "absent.png", "zero again.png", "4.png", "no.png", ""]
    known = {name: row for row, name in enumerate(gallery.table["id"].to_pylist())}
    assert gallery.rows.of(names).tolist() == [known.get(name, -1) for name in names]
    noise(10).save(picture_folder / "0.png")
    gallery.add(picture_folder, stage2, processor, progress=False)
    assert gallery.ids == sorted(known, key=lambda name: (name == "0.png", known[name])) and gallery.rows.live.all()


def test_two_files_of_one_id_do_not_cost_the_first(make, tmp_path):
    folder = tmp_path / "clash"
    folder.mkdir()
    for name in (b"a\xff.png", b"a\\xff.png", b"b.png"):
        noise(len(name)).save(tmp_path / "one.png")
        shutil.copy(tmp_path / "one.png", os.path.join(os.fsencode(folder), name))
    gallery = make(folder)
    assert sorted(gallery.ids) == ["a\\xff.png", "b.png"]
    assert [bad["id"] for bad in gallery.unreadable] == ["a\\xff.png (a second file)"]


def test_ids_and_times_that_nothing_can_hold(make, stage2, processor, picture_folder):
    os.utime(picture_folder / "0.png", ns=(10**19, 10**19))
    gallery = make()
    assert "0.png" in gallery and "\udcff" not in gallery
    report = gallery.add(picture_folder, stage2, processor, progress=False)
    assert (report.added, report.changed, report.unchanged) == (0, 0, 6)
    with pytest.raises(KeyError):
        gallery.remove(["\udcff"])
    with pytest.raises(GalleryError, match="is no text"):
        gallery.add(picture_folder, stage2, processor, progress=False, prefix="\udcff")
    query = gallery.vectors(np.arange(1)).float()
    assert len(gallery.search(query, exclude={"0.png", "\udcff"})[0]) == 5
    for wrong in (None, "0.png", 3):
        with pytest.raises(ValueError, match="exclude is a list"):
            gallery.search(query, exclude=wrong)
    gallery.remove(pd.Series(["0.png"], index=[7]))
    assert len(gallery) == 5


def test_what_was_gone_from_a_folder_that_moved_is_gone(make, stage2, processor, picture_folder, tmp_path):
    gallery = make()
    (picture_folder / "0.png").unlink()
    (picture_folder / "2.png").unlink()
    (picture_folder / "2.png").mkdir()
    noise(3).save(picture_folder / "2.png/inner.png")
    (picture_folder / "4.png").write_bytes(b"broken")
    picture_folder.rename(tmp_path / "moved")
    report = gallery.add(tmp_path / "moved", stage2, processor, progress=False)
    assert sorted(gallery.ids) == ["2.png/inner.png", *(f"below/{i}.png" for i in (1, 3, 5))]
    assert (report.added, report.moved, report.removed) == (1, 3, 3)


def test_a_folder_that_is_away_keeps_its_other_pictures(make, stage2, processor, picture_folder, tmp_path):
    gallery = make()
    picture_folder.rename(tmp_path / "away")
    (tmp_path / "other").mkdir()
    noise(77).save(tmp_path / "other/0.png")
    report = gallery.add(tmp_path / "other", stage2, processor, progress=False)
    assert (report.changed, report.removed) == (1, 0) and len(gallery) == 6


def test_of_rows_with_one_id_the_last_is_live():
    contents = [f"{number:032x}" for number in (1, 2, 1, 2**127, 3)]
    table = pa.table({"id": ["a", "b", "a", "c", "a"], "content": contents})
    rows = gallery_rows.Rows(table)
    assert rows.live.tolist() == [False, True, False, True, True] and rows.of(["a", "d", "b"]).tolist() == [4, -1, 1]
    first, second, again, *others = rows.content.tolist()
    assert first == again and len({first, second, *others}) == 4
    empty = gallery_rows.Rows(table.slice(0, 0))
    assert empty.of(["a"]).tolist() == [-1] and not len(empty.content)


def test_files_are_compared_without_being_held(tmp_path):
    def file(name, path, size=1, changed=0):
        return files.File(name, os.fsencode(path), size, changed)

    new = files.FileList([file("same", "/a"), file("grown", "/b", 2), file("touched", "/c", 1, 5), file("new", "/d")])
    new.compare(
        [file("gone", "/e"), file("same", "/old"), file("same", "/a"), file("grown", "/b"), file("touched", "/x")]
    )
    todo, replacing = new.new_or_changed()
    assert [f.id for f in todo[:]] == ["grown", "touched", "new"] and replacing == 2 and len(todo) == 3
    assert todo[1:2] == [file("touched", "/c", 1, 5)] and pickle.loads(pickle.dumps(todo))[:] == todo[:]
    assert list(new.missing()) == [("gone", b"/e")]
    assert list(new.elsewhere()) == [(file("touched", "/c", 1, 5), b"/x", False)]


def test_the_pipeline_searches_it(make, stage2, processor, picture_folder):
    cir = ComposedImageRetrievalPipeline(model=stage2, processor=processor)
    cir.index(picture_folder)
    expected = cir(image=picture_folder / "0.png", text="red", top_k=3)
    cir.index(make(dtype="float32"))
    results = cir(image=picture_folder / "0.png", text="red", top_k=3)
    assert [r["id"] for r in results] == [r["id"] for r in expected]
    assert [r["score"] for r in results] == pytest.approx([r["score"] for r in expected], abs=1e-5)
    assert set(results[0]) == {"score", "id", "image", "path", "duplicates", "metadata"}
    os.remove(results[0]["path"])
    gone = cir(image=picture_folder / "0.png" if results[0]["id"] != "0.png" else noise(1), text="red", top_k=6)
    assert [(r["image"], r["problem"]) for r in gone if r["id"] == results[0]["id"]] == [(None, "missing")]
    assert cir(image=noise(1), text="red", exclude=["2.png"], top_k=6)[-1]["id"] != "2.png"


def test_only_new_and_changed_files_are_read(make, stage2, processor, picture_folder, monkeypatch):
    gallery = make(shard_size=2)
    before = gallery.vectors(np.array([gallery.row("4.png")]))
    noise(10).save(picture_folder / "0.png")
    noise(11).save(picture_folder / "new.png")
    (picture_folder / "2.png").unlink()
    read = []
    original = indexing.read_file
    monkeypatch.setattr(indexing, "read_file", lambda path: read.append(os.path.basename(path)) or original(path))
    report = gallery.add(picture_folder, stage2, processor, progress=False)
    assert sorted(read) == [b"0.png", b"new.png"]
    assert (report.added, report.changed, report.unchanged, report.removed) == (1, 1, 4, 1)
    assert sorted(gallery.ids) == sorted(["0.png", "new.png", *NAMES[2:]])
    assert torch.equal(gallery.vectors(np.array([gallery.row("4.png")])), before)
    fresh = make(folder=gallery.folder.with_name("fresh"))
    for name in gallery.ids:
        mine, other = (g.vectors(np.array([g.row(name)])) for g in (gallery, fresh))
        assert torch.allclose(mine.float(), other.float(), atol=1e-3), name
    again = Gallery(gallery.folder)
    assert again.ids == gallery.ids and again.rows.live.all()
    assert gallery.add(picture_folder, stage2, processor, progress=False).unchanged == 6


def test_removing(make):
    gallery = make(shard_size=4)
    with pytest.raises(KeyError, match="nowhere"):
        gallery.remove(["0.png", "nowhere"])
    gallery.remove(["0.png", "below/3.png", "below/5.png"])
    assert gallery.ids == ["2.png", "4.png", "below/1.png"] == Gallery(gallery.folder).ids
    query = torch.nn.functional.normalize(torch.ones(1, 24), dim=-1)
    assert len(gallery.search(query, 10)[0]) == 3


def test_unreadable_files_are_named_and_nothing_is_lost(make, picture_folder, stage2, processor):
    (picture_folder / "broken.jpg").write_bytes(b"nothing")
    (picture_folder / "empty.png").write_bytes(b"")
    (picture_folder / "notes.txt").write_text("x", "utf-8")
    gallery = make()
    report = gallery.add(picture_folder, stage2, processor, progress=False)
    assert gallery.unreadable == report.unreadable
    assert [(bad["id"], bad["reason"]) for bad in report.unreadable] == [
        ("broken.jpg", "not a picture in any known format"),
        ("empty.png", "empty"),
    ]
    assert report.other_files == {".txt": 1} and gallery.ids == NAMES
    text = "\n".join(report.sentences())
    assert "broken.jpg: not a picture" in text and "1 .txt" in text
    (picture_folder / "0.png").write_bytes(b"broken now")
    report = gallery.add(picture_folder, stage2, processor, progress=False)
    assert "0.png" not in gallery.ids and "0.png" in [bad["id"] for bad in report.unreadable]
    noise(3).save(picture_folder / "empty.png")
    assert gallery.add(picture_folder, stage2, processor, progress=False).added == 1
    assert {bad["id"] for bad in gallery.unreadable} == {"broken.jpg", "0.png"}


def test_duplicates_by_content_are_linked(make, picture_folder):
    shutil.copy(picture_folder / "0.png", picture_folder / "zero again.png")
    gallery = make(shard_size=2)
    assert gallery.duplicates() == [["0.png", "zero again.png"]]
    query = gallery.vectors(np.array([gallery.row("zero again.png")])).float()
    (results,) = gallery.search(torch.nn.functional.normalize(query, dim=-1), 10)
    assert results[0]["id"] == "0.png" and results[0]["duplicates"] == ["zero again.png"]
    assert len(results) == 6 and all(r["duplicates"] == [] for r in results[1:])
    assert len(gallery.search(query, 10, exclude=["0.png"])[0]) == 5


def test_files_that_change_while_they_are_read_are_noticed(make, picture_folder, stage2, processor, monkeypatch):
    path = os.fsencode(picture_folder / "0.png")
    status = os.stat(path)
    times = iter(range(10))

    def changing(name):
        found = os.stat_result(status) if name == path else real(name)
        if name == path:
            os.utime(path, ns=(0, status.st_mtime_ns + 1 + next(times)))
            found = real(name)
        return found

    real = os.stat
    monkeypatch.setattr(indexing.os, "stat", changing)
    with pytest.raises(ValueError, match="changed while it was read"):
        indexing.read_file(path)


def test_metadata_and_conditions(make, picture_folder, stage2, processor):
    frame = pd.DataFrame({"file_name": ["0.png", "2.png", "below/1.png", "lost.png"], "price": [10, 20, 30, 40],
                          "colour": ["red", "blue", "red", "red"]})  # fmt: skip
    frame.to_csv(picture_folder / "metadata.csv", index=False)
    gallery = make()
    query = torch.nn.functional.normalize(torch.ones(1, 24), dim=-1)

    def ids(where) -> set[str]:
        return {r["id"] for r in gallery.search(query, 10, where)[0]}

    assert ids({"colour": "red"}) == {"0.png", "below/1.png"}
    assert ids({"colour": "red", "price": (">", 10)}) == {"below/1.png"}
    assert ids({"price": ("<=", 20)}) == {"0.png", "2.png"} and ids({"colour": ("!=", "red")}) == {"2.png"}
    assert ids({"colour": ["blue", "green"]}) == {"2.png"} and ids({"price": (">", 99)}) == set()
    assert ids({"colour": ("not in", ["blue"])}) == {"0.png", "below/1.png"} and ids({"colour": []}) == set()
    assert ids([("price", ">", 10), ("price", "<", "30")]) == {"2.png"} and ids({"price": "20"}) == {"2.png"}
    result = next(r for r in gallery.search(query, 10)[0] if r["id"] == "2.png")
    assert result["metadata"] == {"price": 20, "colour": "blue"}
    for where, message in (({"size": 3}, "no column 'size'"), ({"price": ("~", 3)}, "unknown operator"),
                           ({"price": ("<", "x")}, "cannot be compared"), ({"price": True}, "cannot be compared"),
                           ({"price": ("<", [3])}, "a list goes with in"), ({"colour": ("in", "red")}, "with a list"),
                           ({"price": (1, 2, 3)}, "write .operator, value."), ({"colour": None}, "cannot be compared"),
                           ("colour=red", "write {column: value}"), (["colour=red"], "write {column: value}"),
                           ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ids(where)
    frame.loc[0, "price"] = 99
    frame.to_csv(picture_folder / "metadata.csv", index=False)
    report = gallery.add(picture_folder, stage2, processor, progress=False)
    assert report.metadata_without_picture == ["lost.png"] and report.unchanged == 6
    assert report.metadata_rows == 4 and report.other_files == {}
    assert ids({"price": 99}) == {"0.png"} == set(Gallery(gallery.folder).metadata.query("price == 99").index)
    # A row that goes from the file goes from the gallery; without a file what is known stays.
    frame.iloc[:1].to_csv(picture_folder / "metadata.csv", index=False)
    gallery.add(picture_folder, stage2, processor, progress=False)
    assert ids({"colour": "red"}) == {"0.png"} and ids({"price": 20}) == set()
    (picture_folder / "metadata.csv").unlink()
    gallery.add(picture_folder, stage2, processor, progress=False)
    assert ids({"price": 99}) == {"0.png"}
    other = picture_folder / "other.csv"
    other.write_text("name,price\n0.png,3\n", "utf-8")
    with pytest.raises(ValueError, match="no column file_name"):
        make(metadata=other)
    other.write_text("file_name,price\n0.png,3\n0.png,4\n", "utf-8")
    with pytest.raises(ValueError, match="'0.png' more than once"):
        make(metadata=other)
    for taken in ("id", "size", "path"):
        other.write_text(f"file_name,{taken}\n0.png,3\n", "utf-8")
        with pytest.raises(ValueError, match=f"may not be called '{taken}'"):
            make(folder=gallery.folder.with_name("new"), metadata=other)
        assert not list((gallery.folder.with_name("new") / "shards").iterdir())  # before any is embedded


def test_metadata_of_any_kind_goes_through_everything(make, picture_folder, tmp_path):
    lines = ['{"file_name": "4.png", "size_name": 42, "ok": true, "year": 1999, "score_x": 0.5, "none": null}',
             '{"file_name": "below/1.png", "size_name": "XL", "ok": false, "colour": "None"}']  # fmt: skip
    (picture_folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    gallery = make(shard_size=2)
    query = torch.nn.functional.normalize(torch.ones(1, 24), dim=-1)
    found = {r["id"]: r["metadata"] for r in gallery.search(query)[0]}
    assert found["4.png"] == {
        "size_name": "42",
        "ok": True,
        "year": 1999,
        "score_x": 0.5,
        "none": None,
        "colour": None,
    }
    assert isinstance(found["4.png"]["year"], int) and set(found["0.png"].values()) == {None}
    json.dumps(found, allow_nan=False)
    for where in ({"size_name": 42}, {"ok": True}, {"ok": "true"}, {"year": "1999"}):
        assert [r["id"] for r in gallery.search(query, where=where)[0]] == ["4.png"], where
    assert [r["id"] for r in gallery.search(query, where={"colour": "None"})[0]] == ["below/1.png"]
    assert gallery.dataset()[2]["size_name"] == "42" and gallery.dataset()[0]["ok"] is None
    gallery.to_parquet(tmp_path / "g.parquet")
    again = Gallery.from_parquet(tmp_path / "g.parquet", tmp_path / "again")
    assert {r["id"]: r["metadata"] for r in again.search(query)[0]} == found


def test_a_pictures_folder_that_moved_or_is_named_through_a_link(make, picture_folder, stage2, processor, tmp_path):
    gallery = make()
    (tmp_path / "link").symlink_to(picture_folder)
    assert gallery.add(tmp_path / "link", stage2, processor, progress=False).unchanged == 6
    picture_folder.rename(tmp_path / "moved")
    (tmp_path / "link").unlink()
    report = gallery.add(tmp_path / "moved", stage2, processor, progress=False)
    assert (report.added, report.unchanged, report.moved, report.removed) == (0, 6, 6, 0)
    assert Gallery(gallery.folder).picture("0.png").size == (48, 40)


def test_a_linked_folder_that_is_away_loses_nothing(make, picture_folder, stage2, processor, tmp_path):
    (tmp_path / "disk").mkdir()
    noise(1).save(tmp_path / "disk" / "far.png")
    (picture_folder / "mounted").symlink_to(tmp_path / "disk")
    (picture_folder / "again").symlink_to(picture_folder / "below")
    gallery = make()
    assert "mounted/far.png" in gallery and not gallery.unreadable
    assert gallery.add(picture_folder, stage2, processor, progress=False).linked == ["again"]
    (tmp_path / "disk").rename(tmp_path / "away")
    report = gallery.add(picture_folder, stage2, processor, progress=False)
    assert report.removed == 0 and "mounted/far.png" in gallery
    assert [bad["id"] for bad in report.unreadable] == ["mounted"]


def test_a_folder_within_another_under_its_own_prefix(make, picture_folder, stage2, processor):
    gallery = make(picture_folder / "below", prefix="b/")
    report = gallery.add(picture_folder, stage2, processor, prefix="all/", progress=False)
    assert (report.added, report.removed) == (6, 0) and len(gallery) == 9


def test_a_gallery_stays_itself_when_the_working_directory_changes(make, tmp_path, monkeypatch, picture_folder):
    pd.DataFrame({"file_name": ["0.png"], "price": [3]}).to_csv(picture_folder / "metadata.csv", index=False)
    make()
    monkeypatch.chdir(tmp_path)
    gallery = Gallery("gallery")
    monkeypatch.chdir("/")
    assert gallery.metadata.loc["0.png", "price"] == 3


def test_embeddings_that_are_no_numbers_are_refused(make, stage2):
    with torch.no_grad():
        stage2.clip.visual_projection.weight[0, 0] = torch.nan
    with pytest.raises(GalleryError, match=r"NaN or infinite values for pictures such as 0\.png"):
        make()


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": -1}, {"shard_size": -1}])
def test_sizes_are_positive(make, options):
    with pytest.raises(GalleryError, match="at least 1"):
        make(**options)


def test_datasets_rows_are_kept_in_the_gallery(pictures, stage2, processor, tmp_path):
    rows = datasets.Dataset.from_dict(
        {"image": pictures, "id": [f"p{i}" for i in range(6)], "price": list(range(6))},
        features=datasets.Features({"image": datasets.Image(), "id": datasets.Value("string"),
                                    "price": datasets.Value("int64")}),
    )  # fmt: skip
    gallery = Gallery.create(tmp_path / "g", stage2, processor)
    assert gallery.add(rows, stage2, processor, progress=False, shard_size=4).added == 6
    again = Gallery(tmp_path / "g")
    assert again.picture("p3").tobytes() == pictures[3].tobytes()
    assert again.metadata.loc["p3", "price"] == 3
    # Again, as after an interruption: what is there is passed over, and what differs is taken anew.
    other = rows.map(lambda row: {"image": noise(5)} if row["id"] == "p5" else row)
    report = gallery.add(other, stage2, processor, progress=False)
    assert (report.added, report.changed, report.unchanged) == (0, 1, 5) and len(gallery) == 6
    assert gallery.add(rows, stage2, processor, progress=False, prefix="more/").added == 6
    table = gallery.dataset()
    assert table.num_rows == 12 and len(table[0]["embedding"]) == 24 and table[7]["id"] == "more/p1"
    shard = datasets.Dataset.from_file(str(gallery.shards[0] / "rows.arrow"))
    assert shard[1]["id"] == "p1"


def test_two_folders_need_prefixes(make, picture_folder, stage2, processor, tmp_path):
    gallery = make()
    shutil.copytree(picture_folder, tmp_path / "copy")
    with pytest.raises(GalleryError, match="use another prefix"):
        gallery.add(tmp_path / "copy", stage2, processor, progress=False)
    gallery.add(tmp_path / "copy", stage2, processor, prefix="copy/", progress=False)
    assert len(gallery) == 12 and gallery.add(picture_folder, stage2, processor, progress=False).removed == 0


def test_another_backbone_or_preprocessing_is_refused_and_other_adapters_are_not(
    make, stage1, processor, clip_dir, tmp_path
):
    gallery = make()
    other = TSCIRModel.from_clip_pretrained(clip_dir)
    with torch.no_grad():
        other.clip.visual_projection.weight.mul_(1.5)
    other.clip.save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        if (clip_dir / name).is_file():
            shutil.copy(clip_dir / name, tmp_path / "other")
    with pytest.raises(GalleryError, match="another backbone"):
        Gallery.load(gallery.folder, TSCIRModel.from_clip_pretrained(tmp_path / "other"), processor)
    squeezed = TSCIRProcessor.from_clip_pretrained(clip_dir, padded_aspect_ratio=1.25)
    with pytest.raises(GalleryError, match="another preprocessing"):
        Gallery.load(gallery.folder, stage1, squeezed)
    # Other mapper, other adapters, no adapters: a picture's embedding is the same.
    for model in (TSCIRModel.from_clip_pretrained(clip_dir), stage1):
        Gallery.load(gallery.folder, model, processor)
    fresh = TSCIRModel.from_clip_pretrained(clip_dir, num_pseudo_words=2)
    fresh.add_mapper()
    fresh.add_adapters()
    with torch.no_grad():
        for parameter in fresh.trainable_parameters().values():
            parameter.add_(0.1)
    report = Gallery.load(gallery.folder, fresh, processor).add(
        tmp_path / "pictures", fresh, processor, progress=False
    )
    assert report.unchanged == 6
    again = Gallery.from_folder(tmp_path / "pictures", tmp_path / "anew", fresh, processor, progress=False)
    assert torch.equal(again.vectors(np.arange(6)), gallery.vectors(np.arange(6)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gallery.json", b"{", "cannot be read"),
        ("gallery.json", b'{"format": 99}', "format 99"),
        ("shards/000000/rows.arrow", b"nothing", "cannot be read"),
        ("shards/000000/embeds.safetensors", b"nothing", "cannot be read"),
        ("gallery.json", b'{"format": 1}', "cannot be read"),
    ],
)
def test_damage_is_told(make, name, content, message):
    gallery = make()
    (gallery.folder / name).write_bytes(content)
    with pytest.raises(GalleryError, match=message):
        Gallery(gallery.folder)
    with pytest.raises(GalleryError, match="holds no gallery"):
        Gallery(gallery.folder / "shards")


def test_a_faiss_index_tells_its_recall_and_follows_the_gallery(make, picture_folder, stage2, processor):
    pytest.importorskip("faiss")
    for i in range(60):
        noise(100 + i).save(picture_folder / f"n{i}.png")
    gallery = make(dtype="float32")
    built = gallery.build_index("IVF4,Flat")
    assert 0.5 < built["recall_at_10"] <= 1
    queries = gallery.vectors(np.arange(66))
    assert [row[0]["id"] for row in gallery.search(queries, 3)] == gallery.ids
    assert gallery.build_index("Flat")["recall_at_10"] > 0.99  # of scores that are equal but for rounding
    exact, found = gallery.search(queries, 5, exact=True), gallery.search(queries, 5)
    for one, other in zip(exact, found, strict=True):
        assert [r["score"] for r in one] == pytest.approx([r["score"] for r in other], abs=1e-6)
    gallery.remove(["n3.png"])
    assert "n3.png" not in {r["id"] for row in gallery.search(queries, 66) for r in row}
    noise(7).save(picture_folder / "new.png")
    gallery.add(picture_folder, stage2, processor, progress=False)
    assert sum(Gallery(gallery.folder).info["index"]["shards"].values()) == len(gallery.rows.live) == 67
    assert len(list(gallery.folder.glob("faiss-*"))) == 1
    with pytest.raises(GalleryError, match="does not understand"):
        gallery.build_index("Nonsense12")
    with pytest.raises(GalleryError, match="do not train"):
        gallery.build_index("IVF4096,PQ8")


def test_saving_a_copy(make, tmp_path):
    gallery = make()
    copy = gallery.save(tmp_path / "copy")
    assert copy.ids == gallery.ids
    with pytest.raises(GalleryError, match="not empty"):
        gallery.save(tmp_path / "copy")


def test_parquet_there_and_back(make, picture_folder, tmp_path):
    frame = pd.DataFrame({"file_name": ["0.png", "below/1.png"], "price": [10, 20], "colour": ["red", None]})
    frame.to_csv(picture_folder / "metadata.csv", index=False)
    gallery = make(shard_size=4)
    gallery.remove(["2.png"])
    gallery.to_parquet(tmp_path / "g.parquet")
    table = pd.read_parquet(tmp_path / "g.parquet")
    assert table["id"].tolist() == gallery.ids and table.loc[0, "price"] == 10
    assert np.linalg.norm(table.loc[3, "embedding"]) == pytest.approx(1, abs=1e-3)
    again = Gallery.from_parquet(tmp_path / "g.parquet", tmp_path / "again")
    assert again.ids == gallery.ids and again.info["fingerprint"] == gallery.info["fingerprint"]
    query = torch.nn.functional.normalize(torch.ones(1, 24), dim=-1)
    for where in (None, {"colour": "red"}, {"price": (">", 10)}):
        mine, other = again.search(query, 9, where)[0], gallery.search(query, 9, where)[0]
        assert [(r["id"], r["score"], r["path"]) for r in mine] == [(r["id"], r["score"], r["path"]) for r in other]
    table.to_parquet(tmp_path / "foreign.parquet")
    with pytest.raises(GalleryError, match="no Parquet file of a gallery"):
        Gallery.from_parquet(tmp_path / "foreign.parquet", tmp_path / "third")
    with pytest.raises(GalleryError, match="not empty"):
        Gallery.from_parquet(tmp_path / "g.parquet", tmp_path / "again")


def test_two_writers_one_after_the_other_see_each_others_work(make):
    first = make(shard_size=3)
    second = Gallery(first.folder)
    first.remove(["2.png"])
    second.remove(["0.png"])
    assert Gallery(first.folder).ids == second.ids == [n for n in NAMES if n not in ("0.png", "2.png")]
    with pytest.raises(KeyError, match="0.png"):
        first.remove(["0.png"])


def test_an_index_that_is_lost_is_done_without(make, tmp_path):
    pytest.importorskip("faiss")
    gallery = make()
    gallery.build_index("Flat")
    query = torch.nn.functional.normalize(torch.ones(1, 24), dim=-1)
    expected = [r["id"] for r in gallery.search(query)[0]]
    assert [r["id"] for r in gallery.save(tmp_path / "copy").search(query)[0]] == expected
    next(gallery.folder.glob("faiss-*")).unlink()
    assert [r["id"] for r in Gallery(gallery.folder).search(query)[0]] == expected


def test_an_index_never_answers_for_another_state_of_the_gallery(make, picture_folder, stage2, processor):
    pytest.importorskip("faiss")
    writer = make()
    writer.build_index("Flat")
    readers = [Gallery(writer.folder), Gallery(writer.folder)]  # their indexes are read when they first search
    queries = writer.vectors(np.arange(6)).float()
    expected = [[r["id"] for r in row] for row in writer.search(queries, 6, exact=True)]
    noise(30).save(picture_folder / "new.png")
    writer.add(picture_folder, stage2, processor, progress=False)
    assert [[r["id"] for r in row] for row in readers[0].search(queries, 6)] == expected
    writer.remove(writer.ids[:3])
    assert [[r["id"] for r in row] for row in readers[1].search(queries, 6)] == expected
    # All replaced by as many others: no shard has an old one's name, so that an old index could not pass for a new.
    old = set(writer._shard_sizes())
    writer.remove(writer.ids)
    assert "index" not in writer.info and not list(writer.folder.glob("faiss-*"))
    writer.add(picture_folder, stage2, processor, progress=False)
    assert not old & set(writer._shard_sizes())


def test_an_index_that_cannot_be_rebuilt_goes_and_the_report_stays(make, picture_folder, stage2, processor):
    pytest.importorskip("faiss")
    for i in range(40):
        noise(100 + i).save(picture_folder / f"n{i}.png")
    gallery = make()
    gallery.build_index("IVF30,Flat")
    for i in range(35):
        (picture_folder / f"n{i}.png").unlink()
    (picture_folder / "bad.jpg").write_bytes(b"nothing")
    report = gallery.add(picture_folder, stage2, processor, progress=False)
    assert report.removed == 35 and [bad["id"] for bad in report.unreadable] == ["bad.jpg"]
    assert "index" not in Gallery(gallery.folder).info


def test_many_copies_do_not_starve_an_index(make, picture_folder):
    pytest.importorskip("faiss")
    for i in range(150):
        shutil.copy(picture_folder / "0.png", picture_folder / f"copy{i:03d}.png")
    gallery = make()
    assert gallery.build_index("Flat")["recall_at_10"] > 0.99
    query = gallery.vectors(np.array([0])).float()
    assert len(gallery.search(query, 6)[0]) == 6 and len(gallery.search(query, 6, exclude=["copy003.png"])[0]) == 5


def test_one_writer_at_a_time(make, picture_folder, stage2, processor):
    gallery = make()
    with gallery.locked(), pytest.raises(GalleryError, match="written by another process"):
        Gallery(gallery.folder).add(picture_folder, stage2, processor, progress=False)


def test_a_full_disk_keeps_what_was_done(make, picture_folder, stage2, processor, monkeypatch):
    real = shards.save_file
    calls = []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(GalleryError, match="No space left.*kept"):
        make(shard_size=2)
    gallery = Gallery(picture_folder.parent / "gallery")
    assert gallery.ids == NAMES[:2]
    report = gallery.add(picture_folder, stage2, processor, progress=False, shard_size=2)
    assert (report.added, report.unchanged) == (4, 2) and gallery.ids == NAMES


def test_what_a_process_left_that_died_over_a_shard_does_no_harm(make, picture_folder, stage2, processor):
    gallery = make(shard_size=3)
    shard = gallery.shards[0]
    for suffix in (".part", ".gone"):
        shutil.copytree(shard, shard.with_suffix(suffix))
        (shard.with_suffix(suffix) / "rows.arrow").unlink()
    # Rewritten without its second row, but the old version was still there.
    gallery.remove(["2.png"])
    assert [path.name for path in gallery.shards] == ["000000-1", "000001"]
    shutil.copytree(gallery.shards[1], shard)
    again = Gallery(gallery.folder)
    assert again.shards == gallery.shards and again.ids == [name for name in NAMES if name != "2.png"]
    assert again.add(picture_folder, stage2, processor, progress=False).added == 1
    assert sorted(path.name for path in (gallery.folder / "shards").iterdir()) == ["000000-1", "000001", "000002"]
    again.remove(["0.png", "4.png"])
    assert [path.name for path in again.shards] == ["000001", "000002"]


def test_a_reader_follows_a_writer_that_rewrites_shards(make, picture_folder, stage2, processor):
    gallery = make(shard_size=1)
    stop, problems = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                assert len(Gallery(gallery.folder)) >= 5
            except Exception as error:
                problems.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(6):
        noise(number).save(picture_folder / "0.png")
        gallery.add(picture_folder, stage2, processor, progress=False)
    stop.set()
    reader.join()
    assert not problems, problems[:3]


def tscir(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "modeling_tscir.cli", *map(str, arguments)], cwd=ROOT, stderr=subprocess.PIPE, **options
    )


def test_killed_at_any_moment_it_goes_on_from_the_last_whole_shard(model_dir, tmp_path):
    (tmp_path / "many").mkdir()
    for i in range(120):
        noise(i).save(tmp_path / "many" / f"{i:03d}.png")
    command = ("index", tmp_path / "many", "--output", tmp_path / "g", "--model", model_dir, "--shard_size", 8,
               "--batch_size", 4)  # fmt: skip
    kills = 0
    for count in (1, 6):
        process = tscir(*command)
        while process.poll() is None and len(list((tmp_path / "g").glob("shards/*"))) < count:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    kept = len(Gallery(tmp_path / "g"))
    assert kills == 2 and kept >= 8
    process = tscir(*command)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert f"{120 - kept} pictures added, 0 changed, {kept} as they were" in errors.decode()
    gallery = Gallery(tmp_path / "g")
    assert sorted(gallery.ids) == [f"{i:03d}.png" for i in range(120)]
    model, processor = TSCIRModel.from_pretrained(model_dir), TSCIRProcessor.from_pretrained(model_dir)
    whole = Gallery.from_folder(tmp_path / "many", tmp_path / "whole", model, processor, progress=False, batch_size=4)
    for name in gallery.ids:
        mine, other = (g.vectors(np.array([g.row(name)])).float() for g in (gallery, whole))
        assert torch.allclose(mine, other, atol=1e-3)


def test_two_processes_build_one_gallery(model_dir, tmp_path, picture_folder):
    (picture_folder / "broken.jpg").write_bytes(b"nothing")
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m",
               "modeling_tscir.cli", "index", picture_folder, "-o", tmp_path / "g", "--model", model_dir,
               "--shard_size", 1]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    gallery = Gallery(tmp_path / "g")
    assert gallery.ids == NAMES and [bad["id"] for bad in gallery.unreadable] == ["broken.jpg"]
    assert done.stderr.decode().count("6 pictures added") == 1
