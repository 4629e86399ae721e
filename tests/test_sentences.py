import pytest
import torch
from ways import read_by_tower


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


@torch.no_grad()
def test_a_state_is_computed_once_and_padding_never(stage2, processor):
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
