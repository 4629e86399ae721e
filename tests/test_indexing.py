import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import PICTURES, ROOT, noise

from modeling_tscir import Gallery, GalleryError, TSCIRModel, TSCIRProcessor, files, indexing, shards


def test_ctrl_c_keeps_the_batches_that_are_done(
    make_gallery, stage2, processor, picture_folder, tmp_path, monkeypatch
):
    """And others may read what is written, as far as they may read the rest of it."""
    encode, calls = stage2.get_image_features, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(stage2, "get_image_features", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_gallery(batch_size=2)
    gallery = Gallery(tmp_path / "gallery")
    assert len(gallery) == 4
    report = gallery.add(picture_folder, stage2, processor, batch_size=2, progress=False)
    assert report.added == 2 and report.unchanged == 4 and len(gallery) == 6
    modes = {path.stat().st_mode for path in gallery.folder.glob("shards/*/*")}
    assert len(modes) == 1


def test_only_new_and_changed_files_are_read(make_gallery, stage2, processor, picture_folder, monkeypatch):
    gallery = make_gallery(shard_size=2)
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
    assert sorted(gallery.ids) == sorted(["0.png", "new.png", *PICTURES[2:]])
    assert torch.equal(gallery.vectors(np.array([gallery.row("4.png")])), before)
    fresh = make_gallery(folder=gallery.folder.with_name("fresh"))
    for name in gallery.ids:
        mine, other = (g.vectors(np.array([g.row(name)])) for g in (gallery, fresh))
        assert torch.allclose(mine.float(), other.float(), atol=1e-3), name
    again = Gallery(gallery.folder)
    assert again.ids == gallery.ids and again.rows.live.all()
    assert gallery.add(picture_folder, stage2, processor, progress=False).unchanged == 6


def test_unreadable_files_are_named_and_nothing_is_lost(make_gallery, picture_folder, stage2, processor):
    (picture_folder / "broken.jpg").write_bytes(b"nothing")
    (picture_folder / "empty.png").write_bytes(b"")
    (picture_folder / "notes.txt").write_text("x", "utf-8")
    gallery = make_gallery()
    report = gallery.add(picture_folder, stage2, processor, progress=False)
    assert gallery.unreadable == report.unreadable
    assert [(bad["id"], bad["reason"]) for bad in report.unreadable] == [
        ("broken.jpg", "not a picture in any known format"),
        ("empty.png", "empty"),
    ]
    assert report.other_files == {".txt": 1} and gallery.ids == PICTURES
    text = "\n".join(report.sentences())
    assert "broken.jpg: not a picture" in text and "1 .txt" in text
    (picture_folder / "0.png").write_bytes(b"broken now")
    report = gallery.add(picture_folder, stage2, processor, progress=False)
    assert "0.png" not in gallery.ids and "0.png" in [bad["id"] for bad in report.unreadable]
    assert (report.added, report.changed, report.unchanged, report.removed) == (0, 0, 5, 1)
    noise(3).save(picture_folder / "empty.png")
    assert gallery.add(picture_folder, stage2, processor, progress=False).added == 1
    assert {bad["id"] for bad in gallery.unreadable} == {"broken.jpg", "0.png"}


def test_files_that_change_while_they_are_read_are_noticed(
    make_gallery, picture_folder, stage2, processor, monkeypatch
):
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
    assert list(new.elsewhere()) == [(file("touched", "/c", 1, 5), file("touched", "/x"))]


def test_two_files_of_one_id_do_not_cost_the_first(make_gallery, tmp_path):
    folder = tmp_path / "clash"
    folder.mkdir()
    for name in (b"a\xff.png", b"a\\xff.png", b"b.png"):
        noise(len(name)).save(tmp_path / "one.png")
        shutil.copy(tmp_path / "one.png", os.path.join(os.fsencode(folder), name))
    gallery = make_gallery(folder)
    assert sorted(gallery.ids) == ["a\\xff.png", "b.png"]
    assert {os.path.basename(path) for path in gallery.dataset()["path"]} <= {"a\\xff.png", "a\\udcff.png", "b.png"}
    assert [bad["id"] for bad in gallery.unreadable] == ["a\\xff.png (a second file)"]


def test_ids_and_times_that_nothing_can_hold(make_gallery, stage2, processor, picture_folder):
    os.utime(picture_folder / "0.png", ns=(10**19, 10**19))
    gallery = make_gallery()
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


def test_a_single_id_is_no_list_of_ids(pictures, stage2, processor, tmp_path):
    """Its letters may be ids."""
    rows = datasets.Dataset.from_dict({"image": pictures[:3]}, features=datasets.Features({"image": datasets.Image()}))
    gallery = Gallery.create(tmp_path / "g", stage2, processor)
    gallery.add(rows, stage2, processor, progress=False)
    with pytest.raises(ValueError, match="remove takes a list of ids, not '12'"):
        gallery.remove("12")
    assert len(gallery) == 3


def test_what_became_no_regular_file_is_gone(make_gallery, picture_folder, stage2, processor):
    gallery = make_gallery()
    (picture_folder / "0.png").unlink()
    os.mkfifo(picture_folder / "0.png")
    report = gallery.add(picture_folder, stage2, processor, progress=False)
    assert report.removed == 1 and "0.png" not in gallery
    assert [bad["id"] for bad in report.unreadable] == ["0.png"]


def test_a_folder_within_another_under_its_own_prefix(make_gallery, picture_folder, stage2, processor):
    gallery = make_gallery(picture_folder / "below", prefix="b/")
    report = gallery.add(picture_folder, stage2, processor, prefix="all/", progress=False)
    assert (report.added, report.removed) == (6, 0) and len(gallery) == 9


def test_two_folders_need_prefixes(make_gallery, picture_folder, stage2, processor, tmp_path):
    gallery = make_gallery()
    shutil.copytree(picture_folder, tmp_path / "copy")
    with pytest.raises(GalleryError, match="use another prefix"):
        gallery.add(tmp_path / "copy", stage2, processor, progress=False)
    gallery.add(tmp_path / "copy", stage2, processor, prefix="copy/", progress=False)
    assert len(gallery) == 12 and gallery.add(picture_folder, stage2, processor, progress=False).removed == 0


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


def test_rows_that_are_numbered_are_not_those_of_another_dataset(pictures, stage2, processor, tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    first = datasets.Dataset.from_dict({"image": pictures[:4]}, features=features)
    other = datasets.Dataset.from_dict({"image": pictures[4:6]}, features=features)
    gallery = Gallery.create(tmp_path / "g", stage2, processor)
    gallery.add(first, stage2, processor, progress=False)
    with pytest.raises(GalleryError, match=r"'0' already, of another dataset; use another prefix.*id_column"):
        gallery.add(other, stage2, processor, progress=False)
    assert len(gallery) == 4 and gallery.picture("0").tobytes() == pictures[0].tobytes()
    assert gallery.add(other, stage2, processor, prefix="b/", progress=False).added == 2
    grown = datasets.Dataset.from_dict({"image": [noise(1), *pictures[1:5]]}, features=features)
    report = gallery.add(grown, stage2, processor, progress=False)
    assert (report.added, report.changed, report.unchanged) == (1, 1, 3)


@pytest.mark.parametrize(
    ("dtype", "remedy"), [(torch.float32, "are its weights whole"), (torch.float16, "float32.*--precision float32")]
)
def test_embeddings_that_are_no_numbers_are_refused(make_gallery, stage2, dtype, remedy):
    with torch.no_grad():
        stage2.to(dtype).clip.visual_projection.weight[0, 0] = torch.nan
    with pytest.raises(GalleryError, match=rf"NaN or infinite values for pictures such as 0\.png.*{remedy}"):
        make_gallery()


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": -1}, {"shard_size": -1}])
def test_sizes_are_positive(make_gallery, options):
    with pytest.raises(GalleryError, match="at least 1"):
        make_gallery(**options)


def test_files_of_others_among_the_shards_are_left_alone(make_gallery, picture_folder, stage2, processor):
    """As Finder and Windows leave them wherever a person looks."""
    gallery = make_gallery()
    (gallery.folder / "shards/.DS_Store").write_bytes(b"x")
    (gallery.folder / "shards/000007.part").mkdir()  # half a shard, of a process that died
    noise(30).save(picture_folder / "new.png")
    assert gallery.add(picture_folder, stage2, processor, progress=False).added == 1
    assert {path.name for path in (gallery.folder / "shards").iterdir()} == {".DS_Store", "000000", "000001"}


def test_where_folders_cannot_be_locked_it_is_said_and_done_without(make_gallery, monkeypatch, caplog):
    """As on some network file systems; a writer that is there is another matter."""
    import fcntl

    gallery, other = make_gallery(), make_gallery()
    with gallery.locked(), pytest.raises(GalleryError, match="another process"):
        other.remove(["0.png"])

    def held(*_):
        raise PermissionError(errno.EACCES, "Permission denied")  # as over SMB

    monkeypatch.setattr(fcntl, "flock", held)
    with pytest.raises(GalleryError, match="another process"):
        gallery.remove(["0.png"])

    def not_there(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", not_there)
    gallery.remove(["0.png"])
    assert "0.png" not in gallery and "cannot be locked (No locks available)" in caplog.text


def test_a_full_disk_keeps_what_was_done(make_gallery, picture_folder, stage2, processor, monkeypatch):
    real = shards.save_file
    calls = []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(GalleryError, match="No space left.*kept"):
        make_gallery(shard_size=2)
    gallery = Gallery(picture_folder.parent / "gallery")
    assert gallery.ids == PICTURES[:2]
    report = gallery.add(picture_folder, stage2, processor, progress=False, shard_size=2)
    assert (report.added, report.unchanged) == (4, 2) and gallery.ids == PICTURES


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
    assert gallery.ids == PICTURES and [bad["id"] for bad in gallery.unreadable] == ["broken.jpg"]
    assert done.stderr.decode().count("6 pictures added") == 1
