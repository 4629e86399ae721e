import shutil

import numpy as np
import pytest
import torch
from conftest import noise

from modeling_tscir import Gallery, GalleryError


def test_a_faiss_index_tells_its_recall_and_follows_the_gallery(make_gallery, picture_folder, stage2, processor):
    pytest.importorskip("faiss")
    for i in range(60):
        noise(100 + i).save(picture_folder / f"n{i}.png")
    gallery = make_gallery(dtype="float32")
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
    with pytest.raises(GalleryError, match="do not make a IVF4096,PQ8 index .*fewer cells"):
        gallery.build_index("IVF4096,PQ8")


@pytest.mark.parametrize("factory", [None, "Flat"])
def test_scores_are_of_fp32_within_autocast_too(make_gallery, factory):
    gallery = make_gallery()
    if factory:
        pytest.importorskip("faiss")
        gallery.build_index(factory)
    queries = torch.nn.functional.normalize(torch.randn(3, 24, generator=torch.Generator().manual_seed(0)), dim=-1)
    wanted = gallery.search(queries, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gallery.search(queries, 6) == wanted


def test_queries_that_a_gradient_may_flow_through_are_searched_with(make_gallery, stage2, composed):
    pytest.importorskip("faiss")
    gallery = make_gallery()
    gallery.build_index("Flat")
    queries = stage2.get_composed_features(**composed)
    assert queries.requires_grad
    assert gallery.search(queries, 3) == gallery.search(queries.detach(), 3)


@pytest.mark.parametrize("aside", [{"exact": True}, {"where": {"kind": "even"}}])
def test_searches_among_conditions_and_exact_ones_leave_an_index_aside(make_gallery, picture_folder, aside):
    pytest.importorskip("faiss")
    rows = [f"{path.relative_to(picture_folder)},even" for path in sorted(picture_folder.rglob("*.png"))]
    (picture_folder / "metadata.csv").write_text("\n".join(["file_name,kind", *rows]), "utf-8")
    gallery, query = make_gallery(dtype="float32"), torch.nn.functional.normalize(torch.ones(1, 24), dim=-1)
    expected = gallery.search(query, 3)
    gallery.build_index("Flat")
    gallery._search_index = lambda index, queries, k, wanted: (torch.zeros(1, k), torch.zeros(1, k).long())
    assert gallery.search(query, 3)[0][0]["score"] == 0 and gallery.search(query, 3, **aside) == expected


def test_an_index_that_is_lost_is_done_without(make_gallery, tmp_path):
    pytest.importorskip("faiss")
    gallery = make_gallery()
    gallery.build_index("Flat")
    query = torch.nn.functional.normalize(torch.ones(1, 24), dim=-1)
    expected = [r["id"] for r in gallery.search(query)[0]]
    assert [r["id"] for r in gallery.save(tmp_path / "copy").search(query)[0]] == expected
    next(gallery.folder.glob("faiss-*")).unlink()
    assert [r["id"] for r in Gallery(gallery.folder).search(query)[0]] == expected


def test_an_index_never_answers_for_another_state_of_the_gallery(make_gallery, picture_folder, stage2, processor):
    pytest.importorskip("faiss")
    writer = make_gallery()
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


def test_an_index_follows_pictures_that_moved(make_gallery, picture_folder, stage2, processor, tmp_path):
    pytest.importorskip("faiss")
    gallery = make_gallery()
    gallery.build_index("Flat")
    picture_folder.rename(tmp_path / "elsewhere")
    assert gallery.add(tmp_path / "elsewhere", stage2, processor, progress=False).moved == 6
    assert gallery._faiss() is not None and Gallery(gallery.folder)._faiss() is not None


def test_an_index_whose_rebuilding_was_interrupted_is_rebuilt(
    make_gallery, picture_folder, stage2, processor, monkeypatch
):
    pytest.importorskip("faiss")
    gallery = make_gallery()
    gallery.build_index("Flat")
    noise(30).save(picture_folder / "new.png")

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Gallery, "rebuild_index", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gallery.add(picture_folder, stage2, processor, progress=False)
    assert Gallery(gallery.folder)._faiss() is None
    assert gallery.add(picture_folder, stage2, processor, progress=False).unchanged == 7
    assert gallery._faiss() is not None and Gallery(gallery.folder)._faiss() is not None


@pytest.mark.parametrize("moment", ["_shard_sizes", "remember"])
def test_an_index_whose_building_was_interrupted_leaves_nothing(make_gallery, monkeypatch, moment):
    """Neither the new one, before it is known, nor the old one after that."""
    pytest.importorskip("faiss")
    gallery = make_gallery()
    gallery.build_index("Flat")
    (gallery.folder / "faiss-of-my-own.index").write_text("mine", "utf-8")
    real = getattr(Gallery, moment)

    def interrupted(self, **entries):
        if moment == "remember":
            real(self, **entries)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Gallery, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            gallery.build_index("HNSW8")
    assert len(list(gallery.folder.glob("faiss-*"))) == 3
    again = Gallery(gallery.folder)
    again.remove(["0.png"])
    assert again._faiss() is not None and len(list(gallery.folder.glob("faiss-*"))) == 2
    again.drop_index()
    assert [path.name for path in gallery.folder.glob("faiss-*")] == ["faiss-of-my-own.index"]


def test_an_index_that_cannot_be_rebuilt_goes_and_the_report_stays(make_gallery, picture_folder, stage2, processor):
    pytest.importorskip("faiss")
    for i in range(40):
        noise(100 + i).save(picture_folder / f"n{i}.png")
    gallery = make_gallery()
    gallery.build_index("IVF30,Flat")
    for i in range(35):
        (picture_folder / f"n{i}.png").unlink()
    (picture_folder / "bad.jpg").write_bytes(b"nothing")
    report = gallery.add(picture_folder, stage2, processor, progress=False)
    assert report.removed == 35 and [bad["id"] for bad in report.unreadable] == ["bad.jpg"]
    assert "index" not in Gallery(gallery.folder).info


def test_an_index_gives_as_many_as_are_asked_for(make_gallery, picture_folder):
    pytest.importorskip("faiss")
    for i in range(120):
        noise(100 + i).save(picture_folder / f"n{i}.png")
    gallery = make_gallery()
    gallery.build_index("IVF40,Flat")
    queries = gallery.vectors(np.arange(3)).float()
    found = gallery.search(queries, 126)  # more than eight of its cells hold
    assert [len(results) for results in found] == [126] * 3
    for mine, exact in zip(found, gallery.search(queries, 126, exact=True), strict=True):
        assert [result["id"] for result in mine] == [result["id"] for result in exact]


def test_an_index_that_cannot_hold_the_pictures_is_told_in_a_sentence(make_gallery):
    pytest.importorskip("faiss")
    gallery = make_gallery()
    with pytest.raises(GalleryError, match="6 pictures do not make a NSG8 index"):
        gallery.build_index("NSG8")
    assert len(gallery.search(gallery.vectors(np.array([0])).float(), 6)[0]) == 6


def test_many_copies_do_not_starve_an_index(make_gallery, picture_folder):
    pytest.importorskip("faiss")
    for i in range(150):
        shutil.copy(picture_folder / "0.png", picture_folder / f"copy{i:03d}.png")
    gallery = make_gallery()
    assert gallery.build_index("Flat")["recall_at_10"] > 0.99
    query = gallery.vectors(np.array([0])).float()
    assert len(gallery.search(query, 6)[0]) == 6 and len(gallery.search(query, 6, exclude=["copy003.png"])[0]) == 5
