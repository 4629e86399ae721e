import json
import os
import shutil
import threading

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from conftest import PICTURES, noise
from PIL import Image

from modeling_tscir import (
    ComposedImageRetrievalPipeline,
    Gallery,
    GalleryError,
    TSCIRModel,
    TSCIRProcessor,
    exact_search,
    gallery_rows,
)
from modeling_tscir.embedding import embed_images
from modeling_tscir.ranking import best_of_rows, top_k


def test_it_holds_frozen_clips_embeddings_of_every_picture(make_gallery, stage2, processor, picture_folder):
    gallery = make_gallery(dtype="float32", shard_size=4)
    assert gallery.ids == PICTURES and len(gallery.shards) == 2
    expected = embed_images(stage2, processor, [picture_folder / name for name in PICTURES])
    assert torch.allclose(gallery.vectors(np.arange(6)), expected, atol=1e-6)
    half = make_gallery(folder=gallery.folder.with_name("half"))
    assert half.vectors(np.arange(6)).dtype == torch.float16
    assert torch.allclose(half.vectors(np.arange(6)).float(), expected, atol=1e-3)
    assert gallery.picture("2.png").tobytes() == Image.open(picture_folder / "2.png").tobytes()


def test_search_is_exact_across_shards(make_gallery):
    gallery = make_gallery(dtype="float32", shard_size=2)
    queries = torch.nn.functional.normalize(torch.randn(130, 24, generator=torch.Generator().manual_seed(0)), dim=-1)
    scores, rows = top_k(queries, gallery.vectors(np.arange(6)), 4)
    found = gallery.search(queries, 4)
    assert [[PICTURES[i] for i in row] for row in rows.tolist()] == [[r["id"] for r in row] for row in found]
    assert [r["score"] for row in found for r in row] == pytest.approx(scores.flatten().tolist(), abs=1e-6)
    assert len(gallery.search(queries[:1], 100)[0]) == 6
    assert gallery.search(queries, np.int64(4)) == found
    assert gallery.search(queries[:0]) == []
    for bad in (queries[:, :5], queries[0], queries * torch.nan, "red", queries.numpy()):
        with pytest.raises(ValueError, match="quer"):
            gallery.search(bad)
    for options, message in (({"top_k": 0}, "top_k"), ({"top_k": 2.5}, "top_k"), ({"exclude": "0.png"}, "exclude")):
        with pytest.raises(ValueError, match=message):
            gallery.search(queries, **options)


def test_search_in_blocks_is_search_in_one(make_gallery, monkeypatch):
    gallery = make_gallery(dtype="float32", shard_size=1)
    queries = torch.nn.functional.normalize(torch.randn(5, 24, generator=torch.Generator().manual_seed(1)), dim=-1)
    expected = gallery.search(queries, 4)
    monkeypatch.setattr(exact_search, "ROWS_AT_A_TIME", 2)
    monkeypatch.setattr(exact_search, "QUERIES_AT_A_TIME", 2)
    for one, other in zip(gallery.search(queries, 4), expected, strict=True):
        assert [r["id"] for r in one] == [r["id"] for r in other]
        assert [r["score"] for r in one] == pytest.approx([r["score"] for r in other], abs=1e-6)


def test_equal_scores_keep_the_gallerys_order():
    scores = torch.tensor([[0.5, 0.9, 0.5, 0.5, -torch.inf], [0.1, 0.1, 0.1, 0.1, 0.1]])
    values, columns = best_of_rows(scores, 3)
    assert columns.tolist() == [[1, 0, 2], [0, 1, 2]] and values[0].tolist() == pytest.approx([0.9, 0.5, 0.5])


def test_names_whose_hashes_are_equal_are_told_apart(make_gallery, stage2, processor, picture_folder, monkeypatch):
    def few_hashes(names):
        return np.array([len(name) % 2 for name in names], dtype=np.uint64)

    monkeypatch.setattr(gallery_rows, "hashed", few_hashes)
    gallery = make_gallery(shard_size=2)
    names = ["0.png", "absent.png", "zero again.png", "4.png", "no.png", ""]
    known = {name: row for row, name in enumerate(gallery.table["id"].to_pylist())}
    assert gallery.rows.of(names).tolist() == [known.get(name, -1) for name in names]
    noise(10).save(picture_folder / "0.png")
    gallery.add(picture_folder, stage2, processor, progress=False)
    assert gallery.ids == sorted(known, key=lambda name: (name == "0.png", known[name])) and gallery.rows.live.all()


def test_of_rows_with_one_id_the_last_is_live():
    contents = [f"{number:032x}" for number in (1, 2, 1, 2**127, 3)]
    table = pa.table({"id": ["a", "b", "a", "c", "a"], "content": contents})
    rows = gallery_rows.Rows(table)
    assert rows.live.tolist() == [False, True, False, True, True] and rows.of(["a", "d", "b"]).tolist() == [4, -1, 1]
    first, second, again, *others = rows.content.tolist()
    assert first == again and len({first, second, *others}) == 4
    empty = gallery_rows.Rows(table.slice(0, 0))
    assert empty.of(["a"]).tolist() == [-1] and not len(empty.content)


def test_the_pipeline_searches_it(make_gallery, stage2, processor, picture_folder):
    cir = ComposedImageRetrievalPipeline(model=stage2, processor=processor)
    cir.index(picture_folder)
    expected = cir(image=picture_folder / "0.png", text="red", top_k=3)
    cir.index(make_gallery(dtype="float32"))
    results = cir(image=picture_folder / "0.png", text="red", top_k=3)
    assert [r["id"] for r in results] == [r["id"] for r in expected]
    assert [r["score"] for r in results] == pytest.approx([r["score"] for r in expected], abs=1e-5)
    assert set(results[0]) == {"score", "id", "image", "path", "duplicates", "metadata"}
    os.remove(results[0]["path"])
    gone = cir(image=picture_folder / "0.png" if results[0]["id"] != "0.png" else noise(1), text="red", top_k=6)
    assert [(r["image"], r["problem"]) for r in gone if r["id"] == results[0]["id"]] == [(None, "missing")]
    assert cir(image=noise(1), text="red", exclude=["2.png"], top_k=6)[-1]["id"] != "2.png"


def test_removing(make_gallery):
    gallery = make_gallery(shard_size=4)
    with pytest.raises(KeyError, match="nowhere"):
        gallery.remove(["0.png", "nowhere"])
    gallery.remove(["0.png", "below/3.png", "below/5.png"])
    assert gallery.ids == ["2.png", "4.png", "below/1.png"] == Gallery(gallery.folder).ids
    query = torch.nn.functional.normalize(torch.ones(1, 24), dim=-1)
    assert len(gallery.search(query, 10)[0]) == 3


def test_duplicates_by_content_are_linked(make_gallery, picture_folder):
    shutil.copy(picture_folder / "0.png", picture_folder / "zero again.png")
    gallery = make_gallery(shard_size=2)
    assert gallery.duplicates() == [["0.png", "zero again.png"]]
    query = gallery.vectors(np.array([gallery.row("zero again.png")])).float()
    (results,) = gallery.search(torch.nn.functional.normalize(query, dim=-1), 10)
    assert results[0]["id"] == "0.png" and results[0]["duplicates"] == ["zero again.png"]
    assert len(results) == 6 and all(r["duplicates"] == [] for r in results[1:])
    assert len(gallery.search(query, 10, exclude=["0.png"])[0]) == 5


def test_metadata_and_conditions(make_gallery, picture_folder, stage2, processor):
    frame = pd.DataFrame({"file_name": ["0.png", "2.png", "below/1.png", "lost.png"], "price": [10, 20, 30, 40],
                          "colour": ["red", "blue", "red", "red"]})  # fmt: skip
    frame.to_csv(picture_folder / "metadata.csv", index=False)
    gallery = make_gallery()
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
        make_gallery(metadata=other)
    other.write_text("file_name,price\n0.png,3\n0.png,4\n", "utf-8")
    with pytest.raises(ValueError, match="'0.png' more than once"):
        make_gallery(metadata=other)
    for taken in ("id", "size", "path"):
        other.write_text(f"file_name,{taken}\n0.png,3\n", "utf-8")
        with pytest.raises(ValueError, match=f"may not be called '{taken}'"):
            make_gallery(folder=gallery.folder.with_name("new"), metadata=other)
        assert not list((gallery.folder.with_name("new") / "shards").iterdir())  # before any is embedded


def test_metadata_of_any_kind_goes_through_everything(make_gallery, picture_folder, tmp_path):
    lines = ['{"file_name": "4.png", "size_name": 42, "ok": true, "year": 1999, "score_x": 0.5, "none": null}',
             '{"file_name": "below/1.png", "size_name": "XL", "ok": false, "colour": "None"}']  # fmt: skip
    (picture_folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    gallery = make_gallery(shard_size=2)
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


def test_a_gallery_stays_itself_when_the_working_directory_changes(
    make_gallery, tmp_path, monkeypatch, picture_folder
):
    pd.DataFrame({"file_name": ["0.png"], "price": [3]}).to_csv(picture_folder / "metadata.csv", index=False)
    make_gallery()
    monkeypatch.chdir(tmp_path)
    gallery = Gallery("gallery")
    monkeypatch.chdir("/")
    assert gallery.metadata.loc["0.png", "price"] == 3


def test_another_backbone_or_preprocessing_is_refused_and_other_adapters_are_not(
    make_gallery, stage1, processor, clip_dir, tmp_path
):
    gallery = make_gallery()
    other = TSCIRModel.from_clip_pretrained(clip_dir)
    with torch.no_grad():
        other.clip.visual_projection.weight.mul_(1.5)
    other.clip.save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        if (clip_dir / name).is_file():
            shutil.copy(clip_dir / name, tmp_path / "other")
    with pytest.raises(GalleryError, match="another backbone"):
        Gallery.load(gallery.folder, TSCIRModel.from_clip_pretrained(tmp_path / "other"), processor)
    other = TSCIRModel.from_clip_pretrained(clip_dir)
    other.config.clip_config.vision_config.hidden_act = "gelu"  # of the same tensors
    with pytest.raises(GalleryError, match="another architecture"):
        Gallery.load(gallery.folder, other, processor)
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
def test_damage_is_told(make_gallery, name, content, message):
    gallery = make_gallery()
    (gallery.folder / name).write_bytes(content)
    with pytest.raises(GalleryError, match=message):
        Gallery(gallery.folder)
    with pytest.raises(GalleryError, match="holds no gallery"):
        Gallery(gallery.folder / "shards")


def test_saving_a_copy(make_gallery, tmp_path):
    gallery = make_gallery()
    copy = gallery.save(tmp_path / "copy")
    assert copy.ids == gallery.ids
    with pytest.raises(GalleryError, match="not empty"):
        gallery.save(tmp_path / "copy")


def test_parquet_there_and_back(make_gallery, picture_folder, tmp_path):
    frame = pd.DataFrame({"file_name": ["0.png", "below/1.png"], "price": [10, 20], "colour": ["red", None]})
    frame.to_csv(picture_folder / "metadata.csv", index=False)
    gallery = make_gallery(shard_size=4)
    gallery.remove(["2.png"])
    gallery.to_parquet(tmp_path / "g.parquet")
    table = pd.read_parquet(tmp_path / "g.parquet")
    assert table["id"].tolist() == gallery.ids and table.loc[0, "price"] == 10
    assert np.linalg.norm(table.loc[3, "embedding"]) == pytest.approx(1, abs=1e-3)
    # A shard whose every row is replaced elsewhere, as after a crash before its rows were forgotten, has no row.
    gallery.write_rows(gallery.next_shard(), gallery.table.slice(0, 3).to_pylist(), gallery.embeds[0][:3])
    gallery.reload()
    ids = gallery.ids
    gallery.to_parquet(tmp_path / "g.parquet")
    again = Gallery.from_parquet(tmp_path / "g.parquet", tmp_path / "again")
    assert (
        sorted(again.ids) == sorted(ids) == sorted(gallery.ids)
        and again.info["fingerprint"] == gallery.info["fingerprint"]
    )
    query = torch.nn.functional.normalize(torch.ones(1, 24), dim=-1)
    for where in (None, {"colour": "red"}, {"price": (">", 10)}):
        mine, other = again.search(query, 9, where)[0], gallery.search(query, 9, where)[0]
        assert [(r["id"], r["score"], r["path"]) for r in mine] == [(r["id"], r["score"], r["path"]) for r in other]
    table.to_parquet(tmp_path / "foreign.parquet")
    with pytest.raises(GalleryError, match="no Parquet file of a gallery"):
        Gallery.from_parquet(tmp_path / "foreign.parquet", tmp_path / "third")
    with pytest.raises(GalleryError, match="not empty"):
        Gallery.from_parquet(tmp_path / "g.parquet", tmp_path / "again")


def test_two_writers_one_after_the_other_see_each_others_work(make_gallery):
    first = make_gallery(shard_size=3)
    second = Gallery(first.folder)
    first.remove(["2.png"])
    second.remove(["0.png"])
    assert Gallery(first.folder).ids == second.ids == [n for n in PICTURES if n not in ("0.png", "2.png")]
    with pytest.raises(KeyError, match="0.png"):
        first.remove(["0.png"])


def test_what_excludes_is_a_list_of_ids(make_gallery):
    gallery = make_gallery()
    query = gallery.vectors(np.array([0])).float()
    for wrong in ("0.png", [0], [os.path.join], 7, iter(["0.png"])):
        with pytest.raises(ValueError, match="exclude is a list of ids, which are texts, not"):
            gallery.search(query, 6, exclude=wrong)
    assert len(gallery.search(query, 6, exclude={"0.png", "unknown.png"})[0]) == 5


def test_a_folder_whose_making_was_interrupted_is_taken(stage2, processor, picture_folder, tmp_path):
    (tmp_path / "g/shards").mkdir(parents=True)
    (tmp_path / "g/gallery.json.part").write_text('{"form', "utf-8")
    assert len(Gallery.from_folder(picture_folder, tmp_path / "g", stage2, processor, progress=False)) == 6
    (tmp_path / "other/shards/of my own").mkdir(parents=True)
    with pytest.raises(GalleryError, match="holds no gallery; name a new folder"):
        Gallery.create(tmp_path / "other", stage2, processor)


def test_one_writer_at_a_time(make_gallery, picture_folder, stage2, processor):
    gallery = make_gallery()
    with gallery.locked(), pytest.raises(GalleryError, match="written by another process"):
        Gallery(gallery.folder).add(picture_folder, stage2, processor, progress=False)


def test_what_a_process_left_that_died_over_a_shard_does_no_harm(make_gallery, picture_folder, stage2, processor):
    gallery = make_gallery(shard_size=3)
    shard = gallery.shards[0]
    for suffix in (".part", ".gone"):
        shutil.copytree(shard, shard.with_suffix(suffix))
        (shard.with_suffix(suffix) / "rows.arrow").unlink()
    # Rewritten without its second row, but the old version was still there.
    gallery.remove(["2.png"])
    assert [path.name for path in gallery.shards] == ["000000-1", "000001"]
    shutil.copytree(gallery.shards[1], shard)
    again = Gallery(gallery.folder)
    assert again.shards == gallery.shards and again.ids == [name for name in PICTURES if name != "2.png"]
    assert again.add(picture_folder, stage2, processor, progress=False).added == 1
    assert sorted(path.name for path in (gallery.folder / "shards").iterdir()) == ["000000-1", "000001", "000002"]
    again.remove(["0.png", "4.png"])
    assert [path.name for path in again.shards] == ["000001", "000002"]


def test_a_reader_follows_a_writer_that_rewrites_shards(make_gallery, picture_folder, stage2, processor):
    gallery = make_gallery(shard_size=1)
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


def test_lists_in_metadata_become_text(make_gallery, picture_folder):
    rows = [
        {"file_name": "0.png", "tags": ["red", "dress"]},
        {"file_name": "2.png", "tags": []},
        {"file_name": "4.png"},
    ]
    (picture_folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    gallery = make_gallery()
    assert gallery.metadata["tags"]["0.png"] == "red, dress" and pd.isna(gallery.metadata["tags"]["4.png"])
