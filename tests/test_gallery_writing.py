"""What changes a gallery's folder, or makes one, and is stopped or met by another, or refused."""

import shutil
import threading

import numpy as np
import pytest
from conftest import PICTURES, noise
from datasets import Dataset
from datasets import Image as DatasetImage

from modeling_tscir import Gallery, GalleryError, gallery, gallery_export


def test_a_search_in_another_thread_sees_pictures_as_they_were_or_as_they_are(
    make_gallery, stage2, processor, picture_folder, monkeypatch
):
    shutil.copy(picture_folder / "2.png", picture_folder / "2 again.png")
    made = make_gallery()
    queries, found, rows_of = made.vectors(np.arange(7)), [], gallery.Rows

    def slowly(table):
        found.append([row[0]["id"] for row in made.search(queries, 1)])  # as while a million names are read
        return rows_of(table)

    before = [row[0]["id"] for row in made.search(queries, 1)]
    noise(1).save(picture_folder / "1 more.png")
    (picture_folder / "0.png").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(gallery, "Rows", slowly)
        made.add(picture_folder, stage2, processor, progress=False)
    assert found[0] == found[1] == before and "1 more.png" in made and "0.png" not in made


def test_two_that_make_one_gallery_at_once_take_the_same(stage2, processor, picture_folder, tmp_path, monkeypatch):
    create, folder = Gallery.create, tmp_path / "gallery"

    def after_another(*arguments):
        create(*arguments)
        return create(*arguments)

    monkeypatch.setattr(Gallery, "create", after_another)
    assert len(Gallery.from_folder(picture_folder, folder, stage2, processor, progress=False)) == 6
    monkeypatch.setattr(Gallery, "create", create)
    written = gallery.write_json

    def as_another_did(path, content):
        written(path, content)
        path.with_name("moved away by it").rename(path)

    monkeypatch.setattr(gallery, "write_json", as_another_did)
    assert len(Gallery.from_folder(picture_folder, tmp_path / "other", stage2, processor, progress=False)) == 6


def test_one_gallery_in_several_threads_has_one_writer_at_a_time(make_gallery, stage2, processor, picture_folder):
    gallery = make_gallery()
    problems = []

    def add() -> None:
        try:
            gallery.add(picture_folder, stage2, processor, prefix="again/", progress=False)
        except GalleryError as error:
            problems.append(str(error))

    with gallery.locked():
        with gallery.locked():
            other = threading.Thread(target=add)
            other.start()
            other.join()
        gallery.remove(["0.png"])  # which is locked already
    assert len(problems) == 1 and "is being written by another process or thread" in problems[0]
    assert len(gallery) == len(Gallery(gallery.folder)) == 5
    add()
    assert len(problems) == 1 and len(gallery) == 11


@pytest.mark.parametrize("files", range(1, 8))
def test_a_copy_that_was_interrupted_is_no_gallery_of_fewer_pictures(make_gallery, tmp_path, monkeypatch, files):
    gallery = make_gallery(shard_size=2)
    copied, copy = [], shutil.copyfile

    def until_then(*arguments, **options):
        if len(copied) == files:
            raise KeyboardInterrupt
        copied.append(copy(*arguments, **options))
        return copied[-1]

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "copyfile", until_then)
        gallery.save(tmp_path / "copy")
    assert len(copied) == files  # of eight: two of each shard, and two beside them
    with pytest.raises(GalleryError, match="holds no gallery"):
        Gallery(tmp_path / "copy")
    assert gallery.save(tmp_path / "other").ids == gallery.ids


def test_a_gallery_from_parquet_is_one_with_its_metadata_alone(make_gallery, picture_folder, tmp_path, monkeypatch):
    (picture_folder / "metadata.csv").write_text("file_name,price\n0.png,5\n", "utf-8")
    gallery = make_gallery()
    gallery.to_parquet(tmp_path / "all.parquet")

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(gallery_export, "from_arrow", interrupted)
        Gallery.from_parquet(tmp_path / "all.parquet", tmp_path / "half")
    with pytest.raises(GalleryError, match="holds no gallery"):
        Gallery(tmp_path / "half")
    again = Gallery.from_parquet(tmp_path / "all.parquet", tmp_path / "whole")
    assert again.metadata.loc["0.png", "price"] == 5 and again.ids == gallery.ids


def test_a_gallery_of_another_precision_is_refused(make_gallery, stage2, processor):
    gallery = make_gallery(dtype="float32")
    with pytest.raises(GalleryError, match="stores float32, not float16; name a new one"):
        make_gallery(dtype="float16")
    for same in ("float32", None):
        assert make_gallery(dtype=same).info["dtype"] == "float32"
    assert Gallery.open_or_create(gallery.folder.with_name("new"), stage2, processor).info["dtype"] == "float16"


def test_a_model_without_its_processor_is_told(make_gallery, stage2, processor):
    folder = make_gallery().folder
    for given in ({"model": stage2}, {"processor": processor}):
        with pytest.raises(ValueError, match="give both, or neither"):
            Gallery.load(folder, **given)


def test_a_row_without_an_id_is_named(make_gallery, stage2, processor, picture_folder, tmp_path):
    rows = Dataset.from_dict({"image": [str(picture_folder / name) for name in PICTURES[:3]], "id": ["a", None, None]})
    gallery = Gallery.create(tmp_path / "rows", stage2, processor)
    with pytest.raises(GalleryError, match=r"column 'id' is empty in row 1 \(2 rows\)"):
        gallery.add(rows.cast_column("image", DatasetImage()), stage2, processor, progress=False)
    assert len(gallery) == 0
