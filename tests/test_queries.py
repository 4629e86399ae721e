import pytest
import torch
from conftest import TEXTS

from modeling_tscir.queries import slerp


@torch.no_grad()
def test_plain_clip_answers_training_free_by_slerp(stage0, composed, clip, processor, pictures):
    image = clip.get_image_features(pixel_values=composed["pixel_values"]).pooler_output
    text = clip.get_text_features(**processor(text=TEXTS)).pooler_output
    image, text = (torch.nn.functional.normalize(x, dim=-1) for x in (image, text))
    features = stage0.get_composed_features(**composed)
    torch.testing.assert_close(features, slerp(image, text, 0.5))
    stage0.config.training_free_weight = 0.3
    torch.testing.assert_close(stage0.get_composed_features(**composed), slerp(image, text, 0.3))
    torch.testing.assert_close(stage0.get_composed_features(**composed, weight=0.5), slerp(image, text, 0.65))
    torch.testing.assert_close(stage0.get_composed_features(**composed, weight=-0.5), slerp(image, text, 0.15))
    stage0.config.training_free_weight = 0.5
    torch.testing.assert_close(stage0.get_composed_features(**composed, weight=1.0), text)
    torch.testing.assert_close(stage0.get_composed_features(**composed, weight=-1.0), image)
    rows = stage0.get_composed_features(**composed, weight=torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(rows, torch.stack([text[0], image[1]]))
    torch.testing.assert_close(stage0(**composed).query_embeds, features)
    with pytest.raises(ValueError, match="leave out of a picture; a plain CLIP has none"):
        stage0.get_composed_features(**composed, residual=1.0)


@torch.no_grad()
def test_weight_moves_a_query_to_its_image_or_its_text(stage2, composed, processor):
    query = stage2.get_composed_features(**composed, weight=0)
    image = stage2.encode_image(composed["pixel_values"])[0]
    ids = processor(text=TEXTS)["input_ids"]  # the modification is read through the adapters, as its prompt is
    text = stage2.encode_with_pseudo_words(ids, torch.zeros_like(ids).bool(), image.new_zeros(0, 2, 32))
    torch.testing.assert_close(stage2.get_composed_features(**composed, weight=-1.0), image)
    plain = torch.nn.functional.normalize(stage2.get_text_features(**processor(text=TEXTS)), dim=-1)
    torch.testing.assert_close(stage2.get_composed_features(**composed, weight=1.0), plain)
    rows = stage2.get_composed_features(**composed, weight=torch.tensor([1.0, 0.3]))
    torch.testing.assert_close(rows, torch.stack([plain[0], slerp(query, text, 0.3)[1]]))
    torch.testing.assert_close(stage2.get_composed_features(**composed, weight=0.3), slerp(query, text, 0.3))
    rows = stage2.get_composed_features(**composed, weight=torch.tensor([0.3, -1.0]))
    torch.testing.assert_close(rows, torch.stack([slerp(query, text, 0.3)[0], image[1]]))
    stage2.config.composed_weight = 0.3
    torch.testing.assert_close(stage2.get_composed_features(**composed), slerp(query, text, 0.3))
    with pytest.raises(ValueError, match="weight"):
        stage2.get_composed_features(**composed, weight=1.5)


@torch.no_grad()
def test_the_residual_is_what_pseudo_words_leave_out_of_their_picture(stage2, composed, processor):
    image, words = stage2.encode_reference(composed["pixel_values"])
    query = stage2.encode_with_pseudo_words(composed["input_ids"], composed["pseudo_mask"], words)
    alone = processor.compose([""] * len(TEXTS))
    sentence = stage2.encode_with_pseudo_words(alone["input_ids"], alone["pseudo_mask"], words)
    expected = torch.nn.functional.normalize(query + 0.7 * (image - sentence), dim=-1)
    torch.testing.assert_close(stage2.get_composed_features(**composed, residual=0.7, weight=0), expected)
    torch.testing.assert_close(stage2.get_composed_features(**composed, residual=0, weight=0), query)
    stage2.config.residual, stage2.config.composed_weight = 0.7, 0.0
    torch.testing.assert_close(stage2.get_composed_features(**composed), expected)
    moved = stage2.get_composed_features(**composed, weight=-0.3)
    torch.testing.assert_close(moved, slerp(expected, image, 0.3))
    rows = stage2.get_composed_features(**composed, residual=torch.tensor([0.7, 0.0]))
    torch.testing.assert_close(rows, torch.stack([expected[0], query[1]]))
    with pytest.raises(ValueError, match="residual=0 and weight=0 do without"):
        stage2.get_composed_features(
            input_ids=composed["input_ids"], pseudo_mask=composed["pseudo_mask"], pseudo_words=words
        )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_what_a_query_is_made_of_comes_out_of_one_pass(stage2, processor, pictures, attention):
    """Prompt, pictures alone and modification change nothing of each other, and are what a pass for each gives."""
    stage2.set_attn_implementation(attention)
    texts = ["red", "that is a much longer one , and then red", "", "red " * 90]
    prompts, alone = processor.compose(texts), processor.compose([""] * len(texts))
    ids, places, asked = prompts["input_ids"], prompts["pseudo_mask"], processor(text=texts)["input_ids"]
    words = stage2.encode_reference(processor(images=pictures[: len(texts)])["pixel_values"])[1]
    passes = []
    stage2.clip.text_model.encoder.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    together = stage2.encode_query_parts(ids, places, words, asked)
    assert len(passes) == 1
    expected = [
        stage2.encode_with_pseudo_words(ids, places, words),
        stage2.encode_with_pseudo_words(alone["input_ids"], alone["pseudo_mask"], words),
        stage2.encode_with_pseudo_words(asked, torch.zeros_like(asked).bool(), words[:0]),
    ]
    for found, one in zip(together, expected, strict=True):
        torch.testing.assert_close(found, one, atol=1e-6, rtol=1e-5)
    without = stage2.encode_query_parts(ids, places, words)
    for found, one in zip(without, expected[:2], strict=True):
        torch.testing.assert_close(found, one, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_an_empty_text_moves_no_query_and_several_references_have_no_residual(stage2, processor, pictures):
    empty = processor(images=pictures[:2], text=["", "red"])
    assert stage2.config.composed_weight > 0 and stage2.config.residual > 0
    unmoved = stage2.get_composed_features(**empty, weight=0)
    torch.testing.assert_close(stage2.get_composed_features(**empty)[0], unmoved[0])
    assert not torch.allclose(stage2.get_composed_features(**empty)[1], unmoved[1])
    prompts, plain = processor.compose_contents([[None, "red"], [None, "red", None]]), processor(text=["red", "red"])
    inputs = {k: v for k, v in prompts.items() if k != "attention_mask"}
    inputs |= {"pixel_values": processor(images=pictures[:3])["pixel_values"], "image_counts": [1, 2]}
    inputs |= {"modification_ids": plain["input_ids"], "modification_mask": plain["attention_mask"]}
    bare, ours = stage2.get_composed_features(**inputs, residual=0, weight=0), stage2.get_composed_features(**inputs)
    torch.testing.assert_close(ours[1], bare[1])
    assert not torch.allclose(ours[0], bare[0])


@pytest.mark.parametrize("stage", ["stage0", "stage2"])
@torch.no_grad()
def test_of_several_references_their_mean_direction_is_what_weight_moves_to(request, processor, pictures, stage):
    model = request.getfixturevalue(stage)
    prompts, plain = processor.compose_contents([[None, "red", None]]), processor(text=["red"])
    inputs = {k: v for k, v in prompts.items() if k != "attention_mask"}
    inputs |= {"modification_ids": plain["input_ids"], "modification_mask": plain["attention_mask"]}
    inputs |= {"pixel_values": processor(images=pictures[:2])["pixel_values"], "image_counts": [2]}
    first, second = model.encode_image(inputs["pixel_values"])[0]
    assert first @ second < 0.99
    mean = torch.nn.functional.normalize(first + second, dim=-1)[None]
    start = model.get_composed_features(**inputs, weight=0)
    torch.testing.assert_close(model.get_composed_features(**inputs, weight=-0.4), slerp(start, mean, 0.4))


def test_slerp_keeps_length_and_angle():
    a, b = torch.tensor([[1.0, 0]]), torch.tensor([[0, 1.0]])
    torch.testing.assert_close(slerp(a, b, 1 / 3), torch.tensor([[3**0.5 / 2, 0.5]]))
    assert torch.equal(slerp(a, a, 0.3), a)


def test_missing_inputs_are_named(stage0, stage1, processor, pictures):
    with pytest.raises(ValueError, match="pixel_values"):
        stage1.get_composed_features(input_ids=torch.ones(1, 4).long())
    with pytest.raises(ValueError, match="pseudo_mask"):
        stage1.get_composed_features(pixel_values=processor(images=pictures[0])["pixel_values"])


def test_a_models_own_step_towards_the_picture_is_for_queries_with_a_text(stage2, processor, pictures):
    inputs = processor(images=pictures[:2], text=["", "red"])
    resting = stage2.get_composed_features(**inputs, weight=0.0)
    told = stage2.get_composed_features(**inputs, weight=-0.4)
    stage2.config.composed_weight = -0.4
    own = stage2.get_composed_features(**inputs)
    assert torch.allclose(own, torch.stack([resting[0], told[1]]), atol=1e-6)
    assert not torch.allclose(told[0], resting[0], atol=1e-3)
