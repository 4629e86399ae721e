import pytest
import torch
from ways import read_by_tower

from modeling_tscir import queries


@pytest.fixture
def many(stage2, processor):
    """Prompts, pseudo-words and modifications of 256 rows, and gradients of what all of them are pulled to."""
    ids = processor.compose(["red", "that is a much longer one", ", and then red", ""] * 64)
    words = torch.randn(256, processor.num_pseudo_words, 32, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(stage2.config.clip_config.projection_dim, generator=torch.Generator().manual_seed(1))
    trained = [*stage2.trainable_parameters().values()]

    def gradients(read, dtype=torch.float32) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            embeds = read(ids["input_ids"], ids["pseudo_mask"], words)
        return [g.clone() for g in torch.autograd.grad((embeds.float() @ weights).sum(), trained)]

    return gradients


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_queries_and_their_gradients_are_those_of_clips_own_encoder(stage2, processor, attention):
    stage2.set_attn_implementation(attention)
    texts = ["red", "that is a much longer one , and then red", "", "red " * 90]
    prompts, asked = processor.compose(texts), processor(text=texts)["input_ids"]
    ids, mask = prompts["input_ids"], prompts["pseudo_mask"]
    words = torch.randn(len(texts), processor.num_pseudo_words, 32, generator=torch.Generator().manual_seed(0))
    words.requires_grad_()
    trained = [words, *stage2.trainable_parameters().values()]
    alone_ids = ids.clone()
    alone_ids[torch.arange(len(ids)), mask.int().argmax(-1) + mask.sum(-1)] = stage2.config.text_eos_token_id
    expected = (
        read_by_tower(stage2, ids, mask, words),
        read_by_tower(stage2, alone_ids, mask, words),
        read_by_tower(stage2, asked, torch.zeros_like(asked).bool(), words[:0]),
    )
    found = stage2.encode_query_parts(ids, mask, words, asked)
    weights = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    losses = [sum((weights * part.sin()).sum() for part in parts) for parts in (found, expected)]
    for ours, theirs in zip(*(torch.autograd.grad(loss, trained) for loss in losses), strict=True):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(stage2.encode_with_pseudo_words(ids, mask, words), expected[0], atol=1e-6, rtol=1e-5)


def test_a_large_batchs_gradients_keep_their_precision(stage2, many):
    def far(found: list[torch.Tensor]) -> float:
        return max(((f - e).abs().max() / e.abs().max()).item() for f, e in zip(found, expected, strict=True))

    expected = many(stage2.encode_with_pseudo_words)
    ours = far(many(stage2.encode_with_pseudo_words, torch.bfloat16))
    theirs = far(many(lambda *given: read_by_tower(stage2, *given), torch.bfloat16))
    assert 1e-4 < ours < 2 * theirs


def test_gradients_are_the_same_each_time(many, stage2):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = (many(stage2.encode_with_pseudo_words) for _ in range(6))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@torch.no_grad()
def test_what_stands_under_the_mask_does_not_matter(stage2, composed):
    expected = stage2.get_composed_features(**composed)
    for odd in (stage2.config.text_eos_token_id, -100):
        ids = composed["input_ids"].masked_fill(composed["pseudo_mask"], odd)
        assert torch.equal(stage2.get_composed_features(**{**composed, "input_ids": ids}), expected)


def test_a_pseudo_word_behind_its_texts_end_is_refused(stage2):
    eos = stage2.config.text_eos_token_id
    ids, mask = torch.tensor([[5, 1, 0, eos, 0], [5, 1, 0, 0, eos]]), torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 2] = mask[0, 4] = mask[1, 2] = mask[1, 3] = True
    with pytest.raises(ValueError, match="3 places, before the end of a text, for 4 pseudo-words"):
        stage2.encode_with_pseudo_words(ids, mask, torch.zeros(2, 2, 32))


@torch.no_grad()
def test_adapters_that_are_merged_or_deleted_meanwhile(stage2, composed, tmp_path, monkeypatch):
    stage2.save_adapter(tmp_path / "adapter")
    stage2.load_adapter(tmp_path / "adapter", "further")
    expected = stage2.get_composed_features(**composed)
    real = queries.embed_words

    def with_meanwhile(act) -> None:
        monkeypatch.setattr(queries, "embed_words", lambda *given: (real(*given), act())[0])

    with_meanwhile(stage2.merge_adapter)
    torch.testing.assert_close(stage2.get_composed_features(**composed), expected, atol=1e-6, rtol=1e-5)
    with_meanwhile(lambda: stage2.delete_adapter("further"))
    with pytest.raises(ValueError, match="'further' was deleted meanwhile"):
        stage2.get_composed_features(**composed, adapter="further")


@torch.no_grad()
def test_a_state_is_computed_once_and_padding_never(stage2, processor):
    processor.image_template, processor.prompt_template = "a photo of {image}", "a photo of {image} that {text}"
    texts = ["red", "that red red", ""]
    prompts, asked = processor.compose(texts), processor(text=texts)["input_ids"]
    ids, mask = prompts["input_ids"], prompts["pseudo_mask"]
    words = torch.randn(3, processor.num_pseudo_words, 32)
    first, last = (stage2.clip.text_model.encoder.layers[i].mlp for i in (0, -1))
    computed = []
    for layer in (first, last):
        layer.register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0].shape[:-1].numel()))
    lengths = [int((row == stage2.config.text_eos_token_id).int().argmax()) + 1 for row in ids]
    start = int(mask[0].int().argmax())  # tokens that every prompt begins with
    assert lengths[0] != lengths[1] and start > 1
    stage2.encode_with_pseudo_words(ids, mask, words)
    assert computed == [sum(lengths) - 2 * start, 3]
    # Parts add an EOS of their own, and the modifications, which share their first token.
    computed.clear()
    stage2.encode_query_parts(ids, mask, words, asked)
    texts_own = [int((row == stage2.config.text_eos_token_id).int().argmax()) for row in asked]
    assert computed == [sum(lengths) - 2 * start + 3 + 1 + sum(texts_own), 9]


@torch.no_grad()
def test_a_compiled_model_makes_the_same_queries(stage2, composed):
    expected = stage2.get_composed_features(**composed)
    found = torch.compile(stage2.get_composed_features, backend="eager")(**composed)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    torch.compiler.reset()


@torch.no_grad()
def test_more_tokens_than_the_text_tower_reads_are_refused(stage2, processor):
    ids = torch.full((1, 78), stage2.config.text_eos_token_id)
    with pytest.raises(ValueError, match="78 tokens, and the text tower reads at most 77"):
        stage2.encode_with_pseudo_words(ids, torch.zeros_like(ids).bool(), torch.zeros(0, 4, 32))
