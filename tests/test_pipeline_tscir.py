import http.server
import logging
import threading

import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import pipeline

import modeling_tscir
from modeling_tscir import BadImagesError, ComposedImageRetrievalPipeline


@pytest.fixture
def folder(stage2, processor, tmp_path):
    stage2.save_pretrained(tmp_path / "model", backbone="reference")
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
        server.shutdown()


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


def test_misuse_is_explained(cir, pictures):
    with pytest.raises(ValueError, match="index"):
        cir(image=pictures[0], text="red")
    cir.index(pictures)
    with pytest.raises(ValueError, match="lacks its text"):
        cir(image=pictures[0])
    with pytest.raises(ValueError, match="2 pictures and 1 texts"):
        cir(image=pictures[:2], text=["red"])
    with pytest.raises(TypeError, match="topk"):
        cir(image=pictures[0], text="red", topk=3)
    for nothing in ([], pictures[0]):
        with pytest.raises(ValueError, match="index takes"):
            cir.index(nothing)


def test_saving_a_pipeline_gives_a_folder_that_loads(cir, pictures, tmp_path):
    cir.index(pictures)
    expected = [r["id"] for r in cir(image=pictures[0], text="red")]
    cir.save_pretrained(tmp_path / "saved")
    again = pipeline("composed-image-retrieval", model=str(tmp_path / "saved")).index(pictures)
    assert [r["id"] for r in again(image=pictures[0], text="red")] == expected


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
