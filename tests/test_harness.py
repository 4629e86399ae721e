"""What every benchmark script shares, on CIRCO's layout and the small CLIP."""

import json
import os
from pathlib import Path

import circo
import harness
import pytest
import torch
from annotations import find_pictures
from conftest import randomised
from harness import compose, load_model, parse_arguments
from PIL import Image
from test_circo import folder as folder  # noqa: PLC0414  (a fixture)

from modeling_tscir import TSCIRProcessor
from modeling_tscir.adapters import lora_layers
from modeling_tscir.feature_cache import cached, feature_key, is_cached, keep
from modeling_tscir.images import pad_to_aspect_ratio


@pytest.mark.parametrize(("name", "ratio"), [("squarepad", 1.0), ("targetpad", 1.25), ("clip", None)])
def test_pictures_are_padded_as_told(model_dir, name, ratio):
    flags = ["--model_name_or_path", str(model_dir), "--data_dir", "x", "--output_dir", "y", "--preprocessing", name]
    assert load_model(parse_arguments(circo.CIRCO, flags))[1].padded_aspect_ratio == ratio


@pytest.fixture
def embedded(monkeypatch):
    """How many pictures were embedded, run by run."""
    counted = []
    embed_images = harness.embed_images

    def counting(model, processor, sources, *args, **kwargs):
        counted.append(len(sources))
        return embed_images(model, processor, sources, *args, **kwargs)

    monkeypatch.setattr(harness, "embed_images", counting)
    return counted


def test_a_gallery_whose_embedding_was_stopped_goes_on(folder, run_script, model_dir, monkeypatch, tmp_path):
    flags = ["--data_dir", folder, "--model_name_or_path", model_dir, "--batch_size", 2]
    whole, _ = run_script(circo.CIRCO, *flags)
    (tmp_path / "cache").rename(tmp_path / "whole")
    monkeypatch.setattr(harness, "BATCHES_A_PART", 1)
    embed_images, counted = harness.embed_images, []

    def stopped(model, processor, sources, *args, **kwargs):
        if len(counted) == 2:
            raise KeyboardInterrupt
        counted.append(len(sources))
        return embed_images(model, processor, sources, *args, **kwargs)

    monkeypatch.setattr(harness, "embed_images", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_script(circo.CIRCO, *flags)
    counted.clear()
    again, _ = run_script(circo.CIRCO, *flags)
    assert counted == [2]
    assert {k: v for k, v in again.items() if "_at_" in k} == {k: v for k, v in whole.items() if "_at_" in k} != {}
    kept = [[path.name for path in (tmp_path / name).iterdir()] for name in ("whole", "cache")]
    assert len(kept[0]) == 1 and kept[0] == kept[1]  # no part is left behind


def test_a_gallery_is_embedded_once(folder, run_script, model_dir, stage2, processor, tmp_path, embedded):
    flags = ["--data_dir", folder, "--model_name_or_path"]
    first, _ = run_script(circo.CIRCO, *flags, model_dir)
    again, _ = run_script(circo.CIRCO, *flags, model_dir, "--method", "image")
    assert embedded == [6] and first["data"] == again["data"]
    # Another mapper on the same backbone sees the same gallery; another preprocessing or precision does not.
    randomised(stage2.mapper.parameters(), 7)
    stage2.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    other, _ = run_script(circo.CIRCO, *flags, tmp_path / "other")
    assert embedded == [6]
    assert other["model"]["backbone_fingerprint"] == first["model"]["backbone_fingerprint"]
    assert other["model"]["trained_fingerprint"] != first["model"]["trained_fingerprint"]
    run_script(circo.CIRCO, *flags, model_dir, "--preprocessing", "squarepad")
    run_script(circo.CIRCO, *flags, model_dir, "--dtype", "bfloat16")
    assert embedded == [6] * 3
    # A picture that changed makes the gallery another, also where it is as long as before.
    picture = folder / "COCO2017_unlabeled/unlabeled2017/000000000007.jpg"
    Image.new("RGB", (40, 40), "red").save(picture)
    run_script(circo.CIRCO, *flags, model_dir)
    assert embedded == [6] * 4
    os.utime(picture, ns=(0, 10**18))
    run_script(circo.CIRCO, *flags, model_dir)
    assert embedded == [6] * 5


def test_a_cache_that_cannot_be_read_is_made_again(tmp_path):
    tensor = torch.randn(3, 4)
    for content in (None, b"", b"half of a fi"):
        if content is not None:
            (tmp_path / "key.safetensors").write_bytes(content)
        assert torch.equal(cached(tmp_path, "key", lambda: tensor), tensor)
    assert torch.equal(cached(tmp_path, "key", lambda: 1 / 0), tensor)
    with pytest.raises(ZeroDivisionError):
        cached(tmp_path, "other", lambda: 1 / 0)
    assert [path.name for path in tmp_path.iterdir()] == ["key.safetensors"]


def test_results_say_what_decides_them(folder, run_script, model_dir):
    flags = ["--data_dir", folder, "--model_name_or_path", model_dir, "--prompt_template", "{image} , {text}"]
    results, _ = run_script(circo.CIRCO, *flags, "--preprocessing", "targetpad")
    protocol = results["protocol"]
    assert protocol["prompt_template"] == "{image} , {text}" and protocol["split"] == "val"
    assert protocol["preprocessing"]["padded_aspect_ratio"] == 1.25
    assert protocol["preprocessing"]["size"] == {"shortest_edge": 32}
    assert set(results["data"]["annotations"]) == {"val.json", "image_info_unlabeled2017.json"}
    assert results["versions"]["tscir"] and "circo.py --data_dir" in results["command"]
    assert (results["circo_num_queries"], results["circo_num_gallery_images"]) == (2, 6)


def test_check_data_says_what_is_there_and_what_is_missing(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["circo.py", "--data_dir", str(folder), "--check_data"])
    harness.main(circo.CIRCO)
    printed = capsys.readouterr().out
    assert "circo val: 2 queries, but published: 220" in printed
    assert "circo val: 6 pictures, but published: 123403" in printed
    assert "no pictures cannot be read" in printed
    pictures = folder / "COCO2017_unlabeled/unlabeled2017"
    (pictures / "000000000042.jpg").write_bytes(b"no picture")
    with pytest.raises(SystemExit, match=r"(?s)1 of 6 pictures cannot be read.*42: not a picture"):
        harness.main(circo.CIRCO)
    for name in ("000000000042.jpg", "000000000005.jpg"):
        (pictures / name).unlink()
    with pytest.raises(SystemExit, match=r"(?s)2 of 6 pictures cannot be read:\s+5: missing\s+42: missing"):
        harness.main(circo.CIRCO)


def test_pictures_are_found_where_the_first_folder_has_them(tmp_path):
    """One that the first folder lacks does not send those behind it elsewhere, nor does a folder's odd name."""
    first, second = tmp_path / "a {} b" / "images", tmp_path / "resized"
    for place in (first, second):
        place.mkdir(parents=True)
        for name in ("1.jpg", "2.jpg", "3.png", "3.jpg", "4.png"):
            (place / name).touch()
    (first / "2.jpg").unlink()
    (tmp_path / "link").symlink_to(first)
    found = find_pictures([tmp_path / "link" / ".." / "images", second], ["1", "2", "3", "4", "5"], [".jpg", ".png"])
    link = tmp_path / "link" / ".." / "images"
    assert found == [link / "1.jpg", second / "2.jpg", link / "3.jpg", link / "4.png", link / "5.jpg"]
    assert found[0].is_file()
    assert find_pictures([tmp_path], ["./resized/1.jpg"]) == [second / "1.jpg"]


def test_embeddings_that_are_no_numbers_are_not_kept(run_script, folder, model_dir, monkeypatch, tmp_path):
    flags = ["--model_name_or_path", model_dir, "--data_dir", folder]
    embed_images = harness.embed_images
    monkeypatch.setattr(harness, "embed_images", lambda *args, **kwargs: embed_images(*args, **kwargs) * float("nan"))
    with pytest.raises(SystemExit, match="picture embeddings hold NaN or infinite values, and are not kept"):
        run_script(circo.CIRCO, *flags)
    monkeypatch.setattr(harness, "embed_images", embed_images)
    results, _ = run_script(circo.CIRCO, *flags)
    assert 0 <= results["circo_map_at_5"] <= 1


def test_the_cache_is_read_by_others_and_its_own_loss_is_no_error(tmp_path, monkeypatch):
    keep(tmp_path / "cache", "key", torch.ones(2, 2))
    (tmp_path / "plain").touch()
    path = tmp_path / "cache/key.safetensors"
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode

    def closed(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", closed)  # as in a folder that is another user's
    monkeypatch.setattr(os, "stat", lambda *args, **kwargs: closed(None))
    assert not is_cached(tmp_path / "cache", "key")
    assert cached(tmp_path / "cache", "key", lambda: torch.zeros(1)).tolist() == [0]


def test_features_are_of_the_class_that_read_the_pixels(stage0, processor, monkeypatch):
    before = feature_key(stage0, processor, [])
    other = type("CLIPImageProcessor", (type(processor.image_processor),), {})
    monkeypatch.setattr(processor.image_processor, "__class__", other)
    assert feature_key(stage0, processor, []) != before


def test_what_is_needed_is_asked_for(folder, monkeypatch, capsys, model_dir):
    with pytest.raises(SystemExit):
        parse_arguments(circo.CIRCO, ["--data_dir", str(folder)])
    assert "--model_name_or_path and --output_dir are needed" in capsys.readouterr().err
    flags = ["--data_dir", str(folder), "--output_dir", "o", "--model_name_or_path", str(model_dir)]
    for wrong, message in (
        (["--batch_size", "-3"], "no whole number of at least 1"),
        (["--weight", "nan"], "from -1 to 1, not nan"),
        (["--method", "sum", "--weight", "-0.5"], "from 0 to 1, not -0.5"),
        (["--method", "image", "--weight", "0.5"], "--weight has no part in --method image"),
        (["--method", "sum", "--residual", "0.5"], "--residual has no part in --method sum"),
    ):
        with pytest.raises(SystemExit):
            parse_arguments(circo.CIRCO, [*flags, *wrong])
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="--device nonsense cannot be used"):
        load_model(parse_arguments(circo.CIRCO, [*flags, "--device", "nonsense"]))
    with pytest.raises(ValueError, match="--model_name_or_path no/such cannot be read"):
        load_model(parse_arguments(circo.CIRCO, [*flags[:4], "--model_name_or_path", "no/such"]))
    with pytest.raises(ValueError, match="/no/such cannot be read: there is no folder /no/such"):
        load_model(parse_arguments(circo.CIRCO, [*flags[:4], "--model_name_or_path", "/no/such"]))
    with pytest.raises(ValueError, match="needs one {image}"):
        load_model(parse_arguments(circo.CIRCO, [*flags, "--prompt_template", "a photo of * that {text}"]))


def test_queries_are_evaluated_through_merged_adapters_and_are_the_same(folder, tmp_path, stage2, processor, pictures):
    stage2.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    flags = ["--data_dir", str(folder), "--output_dir", "o", "--model_name_or_path", str(tmp_path / "model")]
    model, own = load_model(parse_arguments(circo.CIRCO, flags))
    inputs = own(images=pictures[:2], text=["red", "that b"])
    layers = []
    for layer in lora_layers(model):
        layer.register_forward_hook(lambda *_: layers.append(1))
    torch.testing.assert_close(model.get_composed_features(**inputs), stage2.get_composed_features(**inputs))
    assert not layers


def test_what_was_used_is_what_is_recorded(folder, run_script, model_dir, clip_dir, capsys):
    flags = ["--data_dir", folder, "--model_name_or_path"]
    assert run_script(circo.CIRCO, *flags, model_dir, "--method", "slerp")[0]["weight"] == 0.5
    assert run_script(circo.CIRCO, *flags, model_dir)[0]["weight"] == 0.2
    plain, _ = run_script(circo.CIRCO, *flags, clip_dir)
    assert (plain["method"], plain["weight"]) == ("slerp", 0.5)
    assert plain["published_counts"] == {"circo": {"queries": 220, "gallery_images": 123_403, "same": False}}
    assert "circo has not the published numbers" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="name a training-free method"):
        run_script(circo.CIRCO, *flags, clip_dir, "--weight", "0.5")
    assert run_script(circo.CIRCO, *flags, model_dir, "--residual", "1")[0]["residual"] == 1
    assert run_script(circo.CIRCO, *flags, model_dir)[0]["residual"] == 0.75


def test_features_that_cannot_be_kept_are_not_lost(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert torch.equal(cached(tmp_path / "file" / "below", "key", lambda: torch.ones(2)), torch.ones(2))


def test_composed_queries_equal_the_models_own(folder, stage2, processor, pictures):
    split = circo.load(parse_arguments(circo.CIRCO, ["--data_dir", str(folder), "--check_data"]))[""]
    queries = compose("tscir", stage2, processor, split, torch.empty(0))
    with torch.no_grad():
        expected = stage2.get_composed_features(**processor(images=[split.sources[0]] * 2, text=["is red"] * 2))
        more = stage2.get_composed_features(
            **processor(images=[split.sources[0]] * 2, text=["is red"] * 2), residual=2.0
        )
    torch.testing.assert_close(queries, expected, atol=1e-5, rtol=0)
    added = compose("tscir", stage2, processor, split, torch.empty(0), residual=2.0)
    torch.testing.assert_close(added, more, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="unknown method"):
        compose("product", stage2, processor, split, queries[:1].repeat(6, 1))
    with pytest.raises(ValueError, match="between 0 and 1, not 2"):
        compose("sum", stage2, processor, split, queries[:1].repeat(6, 1), weight=2)


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("tscir", {}),
        ("tscir", {"weight": 0.6}),
        ("tscir", {"residual": 0.1}),
        ("image", {}),
        ("text", {}),
        ("sum", {"weight": 0.2}),
        ("slerp", {"weight": 0.2}),
        ("slerp", {}),
    ],
)
def test_scores_are_those_of_queries_made_one_by_one(folder, run_script, model_dir, stage2, processor, method, told):
    """Whatever order texts and references are in, and whatever was told."""
    path = folder / "annotations/val.json"
    records = json.loads(path.read_text("utf-8"))
    asked = [(23, "has a text that is a good deal longer than the others"), (7, "is red"), (23, "red and blue")]
    records = [records[0] | {"id": n, "reference_img_id": r, "relative_caption": t} for n, (r, t) in enumerate(asked)]
    path.write_text(json.dumps(records), "utf-8")
    flags = [flag for name, value in told.items() for flag in (f"--{name}", value)]
    flags += ["--data_dir", folder, "--model_name_or_path", model_dir]
    _, rankings = run_script(circo.CIRCO, *flags, "--method", method)
    split = circo.load(parse_arguments(circo.CIRCO, ["--data_dir", str(folder), "--check_data"]))[""]

    @torch.no_grad()
    def unit(features):
        return torch.nn.functional.normalize(features, dim=-1)

    gallery = {
        name: unit(stage2.get_image_features(**processor(images=source)))
        for name, source in zip(split.image_ids, split.sources, strict=True)
    }
    assert rankings["query_id"].astype(str).tolist() == ["0", "1", "2"]
    for (reference, text), ranking, scores in zip(asked, rankings["ranking"], rankings["scores"], strict=True):
        picture, words = gallery[str(reference)], unit(stage2.get_text_features(**processor(text=text)))
        if method == "tscir":
            source = split.sources[split.image_ids.index(str(reference))]
            with torch.no_grad():
                query = stage2.get_composed_features(**processor(images=source, text=text), **told)
        elif method == "slerp":
            share, angle = told.get("weight", 0.5), torch.arccos((picture * words).sum())
            parts = torch.sin((1 - share) * angle) * picture + torch.sin(share * angle) * words
            query = parts / torch.sin(angle)
        else:
            query = {"image": picture, "text": words, "sum": unit(0.8 * picture + 0.2 * words)}[method]
        expected = {name: (query @ one.T).item() for name, one in gallery.items()}
        assert dict(zip(map(str, ranking), scores, strict=True)) == pytest.approx(expected, abs=1e-5)


def test_skipped_pictures_leave_queries_that_do_not_need_them(folder, run_script, model_dir):
    path = folder / "annotations/val.json"
    records = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps([*records, records[0] | {"id": 2, "reference_img_id": 5, "gt_img_ids": [100, 42, 9]}]))
    (folder / "COCO2017_unlabeled/unlabeled2017/000000000009.jpg").write_bytes(b"")
    dead = folder / "COCO2017_unlabeled/unlabeled2017/000000000023.jpg"
    dead.unlink()
    dead.symlink_to("nowhere.jpg")
    flags = ["--data_dir", folder, "--model_name_or_path", model_dir, "--on_bad_image", "skip"]
    results, rankings = run_script(circo.CIRCO, *flags)
    assert results["skipped_images"] == ["23", "9"] and results["circo_num_gallery_images"] == 4
    assert rankings.query_id.tolist() == ["0", "2"]
    assert [list(t) for t in rankings.truths] == [["100"], ["100", "42"]]
    assert (results["skipped_queries"], results["skipped_truths_of_other_queries"]) == (1, 2)
    for path in (folder / "COCO2017_unlabeled/unlabeled2017").iterdir():
        if path.stem.lstrip("0") in ("7", "5"):
            path.write_bytes(b"")  # every reference
    with pytest.raises(SystemExit, match="every query of this split needs a picture that cannot be read"):
        run_script(circo.CIRCO, *flags)


def test_pictures_that_were_embedded_are_not_decoded_again(folder, run_script, model_dir, monkeypatch):
    """Whatever is done with those that cannot be read: there was none."""
    flags = ["--data_dir", folder, "--model_name_or_path", model_dir, "--method", "image", "--on_bad_image"]
    run_script(circo.CIRCO, *flags, "skip")
    monkeypatch.setattr(harness, "find_bad_images", lambda sources, ids: pytest.fail("decoded again"))
    for what in ("skip", "error"):
        assert run_script(circo.CIRCO, *flags, what)[0]["skipped_images"] == []


def test_padding(clip_dir, tmp_path):
    wide = Image.new("RGB", (200, 50), "white")
    assert pad_to_aspect_ratio(wide, 1).size == (200, 200) and pad_to_aspect_ratio(wide, 1.25).size == (200, 160)
    assert pad_to_aspect_ratio(wide, 4) is wide
    assert pad_to_aspect_ratio(wide.rotate(90, expand=True), 1.25).size == (160, 200)
    assert pad_to_aspect_ratio(wide, 1).getpixel((100, 74)) == (0, 0, 0)
    assert pad_to_aspect_ratio(wide, 1).getpixel((100, 76)) == (255, 255, 255)
    processor = TSCIRProcessor.from_clip_pretrained(clip_dir, padded_aspect_ratio=1)
    processor.save_pretrained(tmp_path)
    again = TSCIRProcessor.from_pretrained(tmp_path)
    assert again.padded_aspect_ratio == 1
    assert torch.equal(again.pixel_values([wide]), processor(images=wide)["pixel_values"])
    assert not torch.equal(
        again.pixel_values([wide]), TSCIRProcessor.from_clip_pretrained(clip_dir).pixel_values([wide])
    )
    with pytest.raises(ValueError, match="longer side over the shorter"):
        TSCIRProcessor.from_clip_pretrained(clip_dir, padded_aspect_ratio=0.5)
