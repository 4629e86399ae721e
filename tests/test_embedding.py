"""Features and searches are in fp32, whatever dtype is torch's default at the moment: another thread that loads a
model in fp16 changes it for all."""

import numpy as np
import pytest
import torch
from transformers import CLIPModel

from modeling_tscir import ComposedImageRetrievalPipeline, TSCIRModel
from modeling_tscir.embedding import embed_images, embed_images_with_patches, embed_queries, embed_texts


@torch.no_grad()
def test_texts_of_as_many_tokens_share_a_batch(stage1, processor, monkeypatch):
    """However many letters they have: no padding is read that another order would spare."""
    short, long = "red that" * 3, ". ," * 6
    assert len(short) > len(long)
    counts = [len(ids) for ids in processor.tokenize([short])["input_ids"].tolist()]
    assert counts[0] < len(processor.tokenize([long])["input_ids"][0])
    texts, shapes = [long, short, "red"] * 4, []
    plain = stage1.get_text_features

    def watched(input_ids, **inputs):
        shapes.append(tuple(input_ids.shape))
        return plain(input_ids, **inputs)

    monkeypatch.setattr(stage1, "get_text_features", watched)
    embeds = embed_texts(stage1, processor, texts, 4)
    lengths = [len(processor.tokenize([text])["input_ids"][0]) for text in ("red", short, long)]
    assert shapes == [(4, length) for length in lengths]
    for text, embed in zip(texts, embeds, strict=True):
        expected = torch.nn.functional.normalize(plain(**processor(text=text)), dim=-1)[0]
        torch.testing.assert_close(embed, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_many_texts_go_through_the_text_tower_a_thousand_tokens_at_a_time(stage1, clip, processor):
    inputs, sizes = processor(text=["red that " * n for n in range(1, 13)] * 25), []
    stage1.clip.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    features = stage1.get_text_features(**inputs)
    assert max(sizes) <= 1024 < sum(sizes) and len(sizes) == -(-inputs["input_ids"].numel() // 1024)
    expected = clip.get_text_features(**inputs).pooler_output
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.full((length, length), float("-inf")).triu(1)[None, None]  # one for all texts
    torch.testing.assert_close(stage1.get_text_features(**inputs), expected, atol=1e-5, rtol=0)


def test_of_many_texts_a_few_are_tokenised_at_a_time(stage1, processor, monkeypatch):
    """As what the tokenizer makes of long ones is large before it is cut."""
    counts, plain = [], processor.token_ids
    monkeypatch.setattr(processor, "token_ids", lambda texts: counts.append(len(texts)) or plain(texts))
    embed_texts(stage1, processor, ["red", "that red", "that"] * 200, 64)
    assert sum(counts) == 600 and max(counts) <= 256
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"a batch needs at least one text, not {size}"):
            embed_texts(stage1, processor, ["red"], size)


@torch.no_grad()
def test_a_clip_whose_configuration_asks_for_tuples_gives_features(stage1, clip, processor, pictures):
    """As those that were made for TorchScript do."""
    texts, images = processor(text=["red", "that red"]), processor(images=pictures)
    expected = clip.get_text_features(**texts).pooler_output, clip.get_image_features(**images).pooler_output
    for tower in (stage1.clip.text_model, stage1.clip.vision_model):
        tower.config.return_dict = False
    assert torch.equal(stage1.get_text_features(**texts), expected[0])
    assert torch.equal(stage1.get_image_features(**images), expected[1])


@pytest.fixture
def half_by_default():
    """A switch; the dtype is torch's own again behind the test."""
    yield lambda: torch.set_default_dtype(torch.float16)
    torch.set_default_dtype(torch.float32)


def test_torchs_default_dtype_changes_no_result(stage2, processor, pictures, make_gallery, half_by_default):
    cir, gallery = ComposedImageRetrievalPipeline(model=stage2, processor=processor), make_gallery(dtype="float32")
    queries = [
        {"image": pictures[0], "text": "red"},
        {"text": "that"},
        {"image": pictures[1]},
        {"content": [pictures[0], "in", pictures[2]]},
    ]

    def results() -> list:
        found = [cir.index(place)(queries, return_images=False) for place in (pictures, gallery)]
        embeds = [
            embed_images(stage2, processor, pictures),
            embed_images_with_patches(stage2, processor, pictures)[0],
            embed_texts(stage2, processor, ["red", "that red"]),
            embed_queries(stage2, processor, pictures, [0, 1], ["red", "that"]),
            cir.embed(queries),
        ]
        assert {each.dtype for each in embeds} == {torch.float32}
        scores = [result["score"] for one in found for row in one for result in row]
        return [each.numpy() for each in embeds] + [np.array(scores)]

    before = results()
    half_by_default()
    for now, then in zip(results(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_an_adapter_that_is_loaded_leaves_torchs_default_dtype_alone(
    stage2, processor, clip_dir, tmp_path, monkeypatch
):
    """As other threads may be searching."""
    stage2.save_adapter(tmp_path / "adapter")
    CLIPModel.from_pretrained(clip_dir).half().save_pretrained(tmp_path / "half")
    model = TSCIRModel.from_clip_pretrained(tmp_path / "half", num_pseudo_words=2)
    model.add_mapper()
    model.mapper, model.config.backbone_fingerprint = stage2.mapper, stage2.config.backbone_fingerprint
    tower, seen = type(model.clip.text_model), []
    begun = tower.__init__

    def watched(self, *arguments, **options):
        seen.append(torch.get_default_dtype())
        begun(self, *arguments, **options)

    monkeypatch.setattr(tower, "__init__", watched)
    model.load_adapter(tmp_path / "adapter", "fashion")
    assert seen and set(seen) == {torch.float32}
