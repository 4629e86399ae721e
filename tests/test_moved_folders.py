"""Folders that moved, are away just now, or are led to by links, when they are indexed again."""

import shutil

import pytest
from conftest import noise

from modeling_tscir import Gallery, GalleryError


def test_what_was_gone_from_a_folder_that_moved_is_gone(make_gallery, stage2, processor, picture_folder, tmp_path):
    gallery = make_gallery()
    (picture_folder / "0.png").unlink()
    (picture_folder / "2.png").unlink()
    (picture_folder / "2.png").mkdir()
    noise(3).save(picture_folder / "2.png/inner.png")
    (picture_folder / "4.png").write_bytes(b"broken")
    picture_folder.rename(tmp_path / "moved")
    report = gallery.add(tmp_path / "moved", stage2, processor, progress=False)
    assert sorted(gallery.ids) == ["2.png/inner.png", *(f"below/{i}.png" for i in (1, 3, 5))]
    assert (report.added, report.moved, report.removed) == (1, 3, 3)


def test_a_folder_that_is_away_keeps_its_other_pictures(make_gallery, stage2, processor, picture_folder, tmp_path):
    gallery = make_gallery()
    picture_folder.rename(tmp_path / "away")
    (tmp_path / "other").mkdir()
    noise(77).save(tmp_path / "other/0.png")
    before = gallery.content("0.png")
    with pytest.raises(GalleryError, match=r"'0.png' already, of .*another picture.*prefix, or another gallery"):
        gallery.add(tmp_path / "other", stage2, processor, progress=False)
    assert gallery.content("0.png") == before and len(gallery) == 6
    assert gallery.add(tmp_path / "other", stage2, processor, prefix="other/", progress=False).added == 1


def test_a_copy_of_other_times_is_the_folder_that_it_was_copied_from(
    make_gallery, picture_folder, stage2, processor, tmp_path
):
    gallery = make_gallery()
    shutil.copytree(picture_folder, tmp_path / "copy", copy_function=shutil.copyfile)
    noise(77).save(tmp_path / "copy/0.png")  # the first, and another by now
    (tmp_path / "copy/2.png").unlink()
    shutil.rmtree(picture_folder)
    report = gallery.add(tmp_path / "copy", stage2, processor, progress=False)
    assert (report.added, report.removed) == (0, 1) and len(gallery) == 5
    assert gallery.path(gallery.row("below/1.png")) == str(tmp_path / "copy/below/1.png")


def test_links_to_what_is_away_lose_nothing(make_gallery, picture_folder, stage2, processor, tmp_path):
    (tmp_path / "disk").mkdir()
    noise(1).save(tmp_path / "disk/far.png")
    (picture_folder / "far.png").symlink_to(tmp_path / "disk/far.png")
    gallery = make_gallery()
    (tmp_path / "disk").rename(tmp_path / "away")
    report = gallery.add(picture_folder, stage2, processor, progress=False)
    assert report.removed == 0 and "far.png" in gallery
    assert [bad["id"] for bad in report.unreadable] == ["far.png"]
    (picture_folder / "far.png").unlink()
    assert gallery.add(picture_folder, stage2, processor, progress=False).removed == 1


def test_what_is_away_stays_under_every_prefix(make_gallery, picture_folder, stage2, processor, tmp_path):
    (tmp_path / "disk").mkdir()
    noise(1).save(tmp_path / "disk/far.png")
    (picture_folder / "below/in").symlink_to(tmp_path / "disk")
    (picture_folder / "below/far.png").symlink_to(tmp_path / "disk/far.png")
    gallery = make_gallery()
    gallery.add(picture_folder / "below", stage2, processor, prefix="b/", progress=False)
    before = gallery.ids
    assert {"below/in/far.png", "b/in/far.png", "below/far.png", "b/far.png"} < set(before)
    (tmp_path / "disk").rename(tmp_path / "away")
    for folder, prefix in ((picture_folder / "below", "b/"), (picture_folder, "")):
        report = gallery.add(folder, stage2, processor, prefix=prefix, progress=False)
        assert report.removed == 0 and len(report.unreadable) == 2 and gallery.ids == before
    for name in ("in", "far.png"):
        (picture_folder / "below" / name).unlink()
    assert gallery.add(picture_folder / "below", stage2, processor, prefix="b/", progress=False).removed == 4


def test_a_moved_folder_keeps_what_cannot_be_read(make_gallery, picture_folder, stage2, processor, tmp_path):
    gallery = make_gallery()
    picture_folder.rename(tmp_path / "moved")
    (tmp_path / "moved/below").rename(tmp_path / "away")
    (tmp_path / "moved/below").symlink_to(tmp_path / "nowhere")
    report = gallery.add(tmp_path / "moved", stage2, processor, progress=False)
    assert (report.moved, report.removed) == (3, 0) and len(gallery) == 6


def test_what_is_gone_from_a_linked_folder_is_gone(make_gallery, picture_folder, stage2, processor, tmp_path):
    (tmp_path / "disk").mkdir()
    for i in range(2):
        noise(i).save(tmp_path / f"disk/{i}.png")
    (picture_folder / "holiday").symlink_to(tmp_path / "disk")
    gallery = make_gallery()
    assert "holiday/0.png" in gallery
    (tmp_path / "disk/0.png").unlink()
    assert gallery.add(picture_folder, stage2, processor, progress=False).removed == 1
    assert "holiday/0.png" not in gallery and "holiday/1.png" in gallery


def test_a_pictures_folder_that_moved_or_is_named_through_a_link(
    make_gallery, picture_folder, stage2, processor, tmp_path
):
    gallery = make_gallery()
    (tmp_path / "link").symlink_to(picture_folder)
    assert gallery.add(tmp_path / "link", stage2, processor, progress=False).unchanged == 6
    picture_folder.rename(tmp_path / "moved")
    (tmp_path / "link").unlink()
    report = gallery.add(tmp_path / "moved", stage2, processor, progress=False)
    assert (report.added, report.unchanged, report.moved, report.removed) == (0, 6, 6, 0)
    assert Gallery(gallery.folder).picture("0.png").size == (48, 40)


def test_a_linked_folder_that_is_away_loses_nothing(make_gallery, picture_folder, stage2, processor, tmp_path):
    (tmp_path / "disk").mkdir()
    noise(1).save(tmp_path / "disk" / "far.png")
    (picture_folder / "mounted").symlink_to(tmp_path / "disk")
    (picture_folder / "again").symlink_to(picture_folder / "below")
    gallery = make_gallery()
    assert "mounted/far.png" in gallery and not gallery.unreadable
    assert gallery.add(picture_folder, stage2, processor, progress=False).linked == ["again"]
    (tmp_path / "disk").rename(tmp_path / "away")
    report = gallery.add(picture_folder, stage2, processor, progress=False)
    assert report.removed == 0 and "mounted/far.png" in gallery
    assert [bad["id"] for bad in report.unreadable] == ["mounted"]
