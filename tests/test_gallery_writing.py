"""What changes a gallery's folder, or makes one, and is stopped or met by another."""

import shutil
import threading

import pytest

from modeling_tscir import Gallery, GalleryError, gallery_export


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
