import http.server
import io
import logging
import threading
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import pipeline

import modeling_tscir
from modeling_tscir import BadImagesError, ComposedImageRetrievalPipeline, Gallery


@pytest.fixture
def folder(stage2, processor, tmp_path):
    stage2.save_pretrained(tmp_path / "model", backbone="reference")
    stage2.save_adapter(tmp_path / "fashion")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def cir(folder) -> ComposedImageRetrievalPipeline:
    return pipeline("composed-image-retrieval", model=folder)


def test_results_are_cosines_best_first(cir, stage2, processor, pictures):
    cir.index(pictures)
    results = cir(image=pictures[0], text="red", top_k=4)
    assert [set(r) for r in results] == [{"score", "id", "image"}] * 4
    with torch.no_grad():
        gallery = torch.nn.functional.normalize(stage2.get_image_features(**processor(images=pictures)), dim=-1)
        query = stage2.get_composed_features(**processor(images=pictures[0], text="red"))
    scores, order = (query @ gallery.T)[0].sort(descending=True)
    assert [r["id"] for r in results] == order[:4].tolist()
    assert [r["score"] for r in results] == pytest.approx(scores[:4].tolist(), abs=1e-5)
    assert all(r["image"].tobytes() == pictures[r["id"]].tobytes() for r in results)
    with torch.no_grad():
        more = stage2.get_composed_features(**processor(images=pictures[0], text="red"), residual=2.0)
    assert cir(image=pictures[0], text="red", residual=2.0)[0]["score"] == pytest.approx(
        float((more @ gallery.T).max()), abs=1e-5
    )
    bare = cir(image=pictures[0], text="red", top_k=4, return_images=False)
    assert bare == [{"score": r["score"], "id": r["id"]} for r in results]


def test_every_kind_of_gallery_gives_the_same_ranking(cir, pictures, picture_folder):
    names = [f"{'below/' if i % 2 else ''}{i}.png" for i in range(6)]
    cir.index(pictures)
    expected = [names[r["id"]] for r in cir(image=pictures[0], text="red")]
    assert len(expected) == 6
    cir.index(str(picture_folder))
    assert [r["id"] for r in cir(image=pictures[0], text="red")] == expected
    cir.index(picture_folder)
    assert [r["id"] for r in cir(image=str(picture_folder / "0.png"), text="red")] == expected
    cir.index([picture_folder / name for name in names])
    assert [r["id"] for r in cir(image=pictures[0], text="red")] == [str(picture_folder / n) for n in expected]
    rows = {"photo": [str(picture_folder / n) for n in names], "id": names}
    dataset = Dataset.from_dict(rows, features=Features({"photo": ImageFeature(), "id": Value("string")}))
    cir.index(dataset, image_column="photo")
    assert [r["id"] for r in cir(image=pictures[0], text="red")] == expected
    with pytest.raises(ValueError, match="no column 'image'"):
        cir.index(dataset)


@pytest.mark.parametrize("formatted", ["torch", "numpy", "arrow", "transform"])
def test_a_datasets_format_changes_neither_ids_nor_pictures(cir, stage2, processor, pictures, tmp_path, formatted):
    features = Features({"image": ImageFeature(), "id": Value("int64"), "price": Value("int64")})
    rows = Dataset.from_dict({"image": pictures, "id": list(range(10, 16)), "price": [5] * 6}, features=features)
    shown = rows.with_format(formatted) if formatted != "transform" else rows.with_transform(lambda batch: {"x": [1]})
    results, wanted = (cir.index(given)(image=pictures[0], text="red", top_k=3) for given in (shown, rows))
    assert results == wanted and type(results[0]["id"]) is int
    gallery = Gallery.create(tmp_path / "gallery", stage2, processor)
    assert gallery.add(shown, stage2, processor, progress=False).added == 6
    assert gallery.ids == [str(i) for i in range(10, 16)] and gallery.metadata["price"].tolist() == [5] * 6


def test_a_gallery_takes_the_place_of_what_was_indexed_before(cir, pictures, make_gallery):
    cir.index([*pictures, b"none"], on_bad_image="skip")
    assert cir.bad_images == [("6", "not a picture in any known format")]
    cir.index(make_gallery())
    assert cir.bad_images == [] and cir.gallery_ids == [] and cir.gallery_sources == []


def test_urls(cir, pictures, picture_folder):
    handler = type(
        "Handler",
        (http.server.SimpleHTTPRequestHandler,),
        {
            "__init__": lambda s, *a: http.server.SimpleHTTPRequestHandler.__init__(s, *a, directory=picture_folder),
            "log_message": lambda *a: None,
        },
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        cir.index([f"{base}/0.png", f"{base}/2.png"])
        assert cir(image=pictures[0], text="", top_k=1, weight=-1.0)[0]["id"] == f"{base}/0.png"
        with pytest.raises(BadImagesError, match="gone"):
            cir.index([f"{base}/0.png", f"{base}/gone.png"])
        assert "problem" not in cir(image=pictures[0])[0]  # the gallery before is whole
        pictures[0].save(picture_folder / "ä b.png")
        cir.index([f"{base}/ä b.png", "http://127.0.0.1:port/a.png"], on_bad_image="skip")
        assert [r["id"] for r in cir(text="red")] == [f"{base}/ä b.png"] and len(cir.bad_images) == 1
        server.shutdown()


def test_a_file_that_is_gone_since_costs_its_own_picture_alone(cir, pictures, picture_folder):
    cir.index(picture_folder)
    (picture_folder / "0.png").unlink()
    found = {r["id"]: r for r in cir(image=pictures[0], text="red")}
    assert len(found) == 6 and found["0.png"]["image"] is None
    assert str(picture_folder / "0.png") in found["0.png"]["problem"] and "missing" in found["0.png"]["problem"]
    assert all("problem" not in result for name, result in found.items() if name != "0.png")


@pytest.mark.parametrize("bad", [b"abc", {"path": "nope.png"}, {"bytes": b"abc", "path": "shop.png"}, "nope.png"])
def test_a_query_whose_picture_cannot_be_read_is_named(cir, pictures, bad):
    cir.index(pictures)
    queries = [{"image": pictures[0], "text": "red"}, {"text": "red"}, {"image": bad, "text": "red"}]
    name = bad if isinstance(bad, str) else bad.get("path") if isinstance(bad, dict) else ""
    for size in (1, 3):
        with pytest.raises(ValueError, match=f"^query 2: {name}"):
            cir(queries, batch_size=size)


def test_lists_of_queries_run_in_batches_and_give_the_same(cir, pictures):
    cir.index(pictures)
    queries = [
        {"image": p, "text": t}
        for p, t in zip(pictures, ["red", "", "that is a long one", "*", "x", "red red"], strict=True)
    ]
    alone = [cir(q) for q in queries]
    for together in (
        cir(queries, batch_size=4),
        cir(image=[q["image"] for q in queries], text=[q["text"] for q in queries]),
    ):
        for one, other in zip(alone, together, strict=True):
            assert [r["score"] for r in one] == pytest.approx([r["score"] for r in other], abs=1e-5)
            assert [r["id"] for r in one] == [r["id"] for r in other]
    assert [len(r) for r in cir(queries, top_k=2)] == [2] * 6


def test_bad_pictures_are_named_before_work_or_skipped(cir, pictures, picture_folder):
    (picture_folder / "broken.jpg").write_bytes(b"nothing")
    (picture_folder / "empty.png").write_bytes(b"")
    with pytest.raises(BadImagesError, match=r"(?s)2 of 8 pictures.*broken\.jpg.*empty\.png"):
        cir.index(picture_folder)
    assert cir.gallery_embeds is None
    cir.index(picture_folder, on_bad_image="skip")
    assert [name for name, _ in cir.bad_images] == ["broken.jpg", "empty.png"]
    assert len(cir(image=pictures[0], text="red")) == 6


def test_a_bad_picture_takes_no_other_of_its_id_with_it(cir, pictures):
    encoded = [{"bytes": encode(picture), "path": None} for picture in pictures[:3]]
    encoded[1]["bytes"] = b"nothing"
    features = Features({"image": ImageFeature(decode=False), "image_id": Value("string")})
    rows = Dataset.from_dict({"image": encoded, "image_id": ["shoe", "shoe", "hat"]}, features=features)
    cir.index(rows, on_bad_image="skip", id_column="image_id")
    assert cir.gallery_ids == ["shoe", "hat"] and [name for name, _ in cir.bad_images] == ["shoe"]


def encode(picture) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def test_misuse_is_explained(cir, pictures):
    with pytest.raises(ValueError, match="index"):
        cir(image=pictures[0], text="red")
    cir.index(pictures)
    for nothing in ({"text": ""}, {}, {"content": []}, {"image": None, "text": None}):
        with pytest.raises(ValueError, match="query 0 lacks its picture or text"):
            cir(nothing)
    for odd, message in (("red", "or a list of such, not 'red'"), (["red"], "query 0 is 'red'"),
                         ({"content": "red"}, "content is a list"), ({"image": 3.5}, "no picture"),
                         ({"img": pictures[0], "text": "red"}, "query 0 has 'img'"),
                         ({"text": "red", "weight": 1}, "query 0 has 'weight'"), ({"text": "  "}, "query 0 lacks"),
                         ({"content": ["red"], "text": "red"}, "query 0 has 'text'"),
                         ({"image": pictures[0], "text": 5}, "a text is a string, not 5"),
                         ({"image": {"score": 1.0, "id": 3}}, "return_images=False")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            cir(odd)
    with pytest.raises(ValueError, match=r"nowhere\.png: missing"):
        cir(image="nowhere.png", text="red")
    with pytest.raises(ValueError, match="of one picture and then a text, of no other order or number"):
        cir(content=["red", pictures[0]], residual=1.0)
    for odd in (5, "a"):
        with pytest.raises(ValueError, match="weight must be"):
            cir(text="red", weight=odd)
    with pytest.raises(ValueError, match=r"index one of its splits, such as dataset\['train'\]"):
        cir.index(DatasetDict(train=Dataset.from_dict({"image": ["a"]})))
    with pytest.raises(ValueError, match=r"a stream \(IterableDataset\) has no rows"):
        cir.index(Dataset.from_dict({"image": ["a"]}).to_iterable_dataset())
    with pytest.raises(ValueError, match="column 'image' of the dataset holds no pictures but .*int64"):
        cir.index(Dataset.from_dict({"image": [1, 2]}))
    for odd in (pictures[0], Path("a.jpg")):
        with pytest.raises(ValueError, match="a query is"):
            cir(odd)
    for odd in ("5", 0, 2.5):
        with pytest.raises(ValueError, match="top_k"):
            cir(text="red", top_k=odd)
    for call in (cir, cir.embed):
        with pytest.raises(ValueError, match="weight must be"):
            call(text="red", weight=2)
    for size in (0, -1):
        for call in (lambda size=size: cir(text="red", batch_size=size), lambda: cir.index(pictures, batch_size=0)):
            with pytest.raises(ValueError, match="batch_size is how many"):
                call()
    with pytest.raises(ValueError, match="processor=TSCIRProcessor"):
        ComposedImageRetrievalPipeline(model=cir.model)
    with pytest.raises(ValueError, match="content= holds"):
        cir(image=pictures[0], content=[pictures[0], "red"])
    with pytest.raises(ValueError, match="where, exclude and exact need a gallery"):
        cir(image=pictures[0], text="red", where={"a": 1})
    with pytest.raises(ValueError, match="2 pictures and 1 texts"):
        cir(image=pictures[:2], text=["red"])
    with pytest.raises(TypeError, match="topk"):
        cir(image=pictures[0], text="red", topk=3)
    for nothing in ([], pictures[0]):
        with pytest.raises(ValueError, match="index takes"):
            cir.index(nothing)


def test_what_is_no_list_of_pictures_is_told(cir, pictures, picture_folder, tmp_path):
    gallery = Gallery.from_folder(picture_folder, tmp_path / "g", cir.model, cir.processor, progress=False)
    with pytest.raises(ValueError, match=r"is a gallery; open it: index\(Gallery.load\('.*g'\)\)"):
        cir.index(tmp_path / "g")
    for wrong, kind in ((iter(pictures), "list_iterator"), (7, "int"), ([], "list")):
        with pytest.raises(ValueError, match=f"not a {kind}"):
            cir.index(wrong)
    with pytest.raises(ValueError, match=r"add takes a folder or a datasets.Dataset, not a list"):
        gallery.add(["a.jpg"], cir.model, cir.processor)


def test_a_plain_clip_model_is_refused_with_the_way_to_use_it(clip_dir):
    with pytest.raises(ValueError, match="TSCIRModel.from_clip_pretrained"):
        pipeline("composed-image-retrieval", model=str(clip_dir))


def cosines(cir, **query) -> list[float]:
    """Of one query with the gallery's pictures, in the gallery's order."""
    return [r["score"] for r in sorted(cir(top_k=6, **query), key=lambda r: r["id"])]


def test_a_picture_alone_and_a_text_alone_are_frozen_clips(cir, stage2, processor, pictures):
    cir.index(pictures)
    with torch.no_grad():
        gallery = torch.nn.functional.normalize(stage2.get_image_features(**processor(images=pictures)), dim=-1)
        text = torch.nn.functional.normalize(stage2.get_text_features(**processor(text="red")), dim=-1)
    assert cosines(cir, image=pictures[2]) == pytest.approx((gallery[2] @ gallery.T).tolist(), abs=1e-5)
    assert cosines(cir, text="red") == pytest.approx((text @ gallery.T)[0].tolist(), abs=1e-5)


def test_a_path_that_is_read_as_a_text_is_told(cir, pictures, tmp_path, monkeypatch):
    cir.index(pictures)
    pictures[0].save(tmp_path / "a.png")
    told = []
    monkeypatch.setattr("modeling_tscir.pipeline_inputs.logger.warning", told.append)
    for path in (str(tmp_path / "a.png"), "https://example.org/a.png"):
        cir(content=[path, "in the colour of", pictures[1]])
        assert f'{path!r} is read as a text; a picture is {{"image": {path!r}}}' in told.pop()
    cir(content=["red", pictures[1]])
    assert not told


def test_content_lists(cir, stage2, processor, pictures, picture_folder):
    cir.index(pictures)
    one = cosines(cir, image=pictures[0], text="red")
    assert cosines(cir, content=[pictures[0], "red"]) == pytest.approx(one, abs=1e-6)
    two = cosines(cir, content=[pictures[0], "in the colour of", pictures[1]])
    turned = cosines(cir, content=[pictures[1], "in the colour of", pictures[0]])
    assert max(abs(a - b) for a, b in zip(two, turned, strict=True)) > 1e-3
    assert max(abs(a - b) for a, b in zip(two, one, strict=True)) > 1e-3
    path = picture_folder / "0.png"
    for same in (path, {"image": str(path)}, {"image": pictures[0], "id": 3, "score": 0.2}, path.read_bytes()):
        assert cosines(cir, content=[same, "in the colour of", pictures[1]]) == pytest.approx(two, abs=1e-5)
    # By hand: the words of both pictures, in the prompt's order.
    ids = processor.compose_contents([[None, "in the colour of", None]])
    with torch.no_grad():
        _, words = stage2.encode_reference(processor.pixel_values(pictures[:2]))
        query = stage2.encode_with_pseudo_words(ids["input_ids"], ids["pseudo_mask"], words)
        gallery = torch.nn.functional.normalize(stage2.get_image_features(**processor(images=pictures)), dim=-1)
    assert two == pytest.approx((query @ gallery.T)[0].tolist(), abs=1e-5)


def test_queries_of_every_kind_in_one_call(cir, pictures):
    cir.index(pictures)
    queries = [
        {"text": "red"},
        {"content": [pictures[3], "with", pictures[4], "and", pictures[5]]},
        {"image": pictures[1]},
        {"image": pictures[1], "text": "red"},
        {"content": ["like", pictures[2]]},
    ]
    for weight in (0.0, -0.5, 0.5):
        alone = [cir(query, weight=weight) for query in queries]
        for one, other in zip(alone, cir(queries, weight=weight), strict=True):
            assert [r["id"] for r in one] == [r["id"] for r in other]
            assert [r["score"] for r in one] == pytest.approx([r["score"] for r in other], abs=1e-5)
    embeds = cir.embed(queries)
    assert embeds.shape[0] == 5 and torch.allclose(embeds.norm(dim=-1), torch.ones(5), atol=1e-5)
    cir.model.config.composed_weight = -0.4
    queries += [{"image": pictures[1], "text": ""}]
    alone = torch.cat([cir.embed(query) for query in queries])
    assert torch.allclose(cir.embed(queries), alone, atol=1e-6)


def test_embeddings_are_those_that_a_search_is_made_with(folder, pictures, monkeypatch):
    query = {"image": pictures[0], "text": "red"}
    plain = pipeline("composed-image-retrieval", model=folder)
    leaning = pipeline("composed-image-retrieval", model=folder, weight=0.9, batch_size=2)
    leaning.model.load_adapter(folder.parent / "fashion", "fashion")
    for options in ({}, {"weight": -0.5}, {"residual": 0.0}, {"adapter": "fashion"}):
        ranked = leaning.index(pictures)(query, top_k=6, **options)
        scores = leaning.embed(query, **options) @ leaning.gallery_embeds.T
        assert sorted(scores[0].tolist(), reverse=True) == pytest.approx([r["score"] for r in ranked], abs=1e-6)
    assert torch.allclose(leaning.embed(query), plain.embed(query, weight=0.9), atol=1e-6)
    with pytest.raises(ValueError, match="no composing adapter 'x'"):
        plain.embed(query, adapter="x")
    sizes, run = [], leaning.preprocess
    monkeypatch.setattr(leaning, "preprocess", lambda queries: sizes.append(len(queries)) or run(queries))
    assert leaning.embed([query] * 5).shape[0] == 5 and sizes == [2, 2, 1]
    read, features = [], leaning.model.get_image_features
    monkeypatch.setattr(leaning.model, "get_image_features", lambda x: read.append(len(x)) or features(x))
    assert len(leaning.index(pictures).gallery_ids) == 6 and read == [2, 2, 2]
    assert len(leaning.index(pictures, batch_size=4).gallery_ids) == 6 and read[3:] == [4, 2]


def test_a_result_is_refined_by_another_text(cir, pictures):
    cir.index(pictures)
    first = cir(image=pictures[0], text="red")
    assert cosines(cir, image=first[1], text="x") == cosines(cir, image=first[1]["image"], text="x")


def test_too_many_pictures_in_one_query_are_refused(cir, pictures):
    cir.index(pictures)
    with pytest.raises(ValueError, match="200 pictures in one query are more than"):
        cir(content=[pictures[0]] * 200)


def test_content_lists_without_training_are_means_of_their_pictures(stage0, processor, pictures):
    cir = ComposedImageRetrievalPipeline(model=stage0, processor=processor).index(pictures)
    both = cosines(cir, content=[pictures[0], "red", pictures[1]])
    assert both == pytest.approx(cosines(cir, content=[pictures[1], pictures[0], "red"]), abs=1e-5)
    assert both != pytest.approx(cosines(cir, content=[pictures[0], "red"]), abs=1e-4)
    alone = cosines(cir, image=pictures[0])
    for same in ([pictures[0], pictures[0]], [pictures[0], ""], [pictures[0], pictures[0], ""]):
        assert cosines(cir, content=same) == pytest.approx(alone, abs=1e-5)


def test_saving_a_pipeline_gives_a_folder_that_loads(cir, pictures, tmp_path):
    cir.index(pictures)
    expected = [r["id"] for r in cir(image=pictures[0], text="red")]
    cir.save_pretrained(tmp_path / "saved")
    again = pipeline("composed-image-retrieval", model=str(tmp_path / "saved")).index(pictures)
    assert [r["id"] for r in again(image=pictures[0], text="red")] == expected


def test_blanks_are_no_text(stage0, processor, pictures):
    cir = ComposedImageRetrievalPipeline(model=stage0, processor=processor).index(pictures)
    for text in ("", "  ", "\n"):
        assert torch.allclose(cir.embed(image=pictures[0], text=text), cir.embed(image=pictures[0]), atol=1e-6)


def test_plain_clip_answers_and_says_so(stage0, processor, pictures, caplog):
    from transformers.utils import logging as transformers_logging

    transformers_logging.get_logger("modeling_tscir.modeling_tscir").warning_once.cache_clear()
    logging.getLogger("transformers").propagate = True
    logging.getLogger("modeling_tscir").propagate = True
    cir = ComposedImageRetrievalPipeline(model=stage0, processor=processor)
    with caplog.at_level(logging.WARNING):
        cir.index(pictures)(image=pictures[0], text="red")
        cir(image=pictures[0], text="red")
    assert caplog.text.count("training-free") == 1


def test_without_a_model_it_loads_the_miniature_and_says_so(pictures, caplog):
    logging.getLogger("modeling_tscir").propagate = True
    with caplog.at_level(logging.WARNING):
        cir = pipeline("composed-image-retrieval")
    assert caplog.text.count("drawn pictures only") == 1
    assert cir.model.config.stage == 2
    assert len(cir.index(pictures)(image=pictures[0], text="red", top_k=3)) == 3


def test_importing_registers_the_task():
    assert modeling_tscir.__version__
    assert isinstance(Image.new("RGB", (1, 1)), Image.Image)
