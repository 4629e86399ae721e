"""What frozen features are kept under, and what a run that was stopped leaves of them."""

import pytest
import torch

from modeling_tscir.feature_cache import cached_in_parts, feature_key, tokenizer_of


def set_in(part: str, name: str, value):
    return lambda model, processor: setattr(getattr(model.config.clip_config, part), name, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda model, processor: model.bfloat16(),  # whose weights, of a checkpoint in bf16, stay the same
        set_in("vision_config", "hidden_act", "relu"),
        set_in("text_config", "hidden_act", "relu"),
        set_in("vision_config", "num_attention_heads", 2),
        set_in("text_config", "eos_token_id", 2),
        lambda model, processor: setattr(processor.image_processor, "image_mean", [0.5, 0.5, 0.5]),
        lambda model, processor: setattr(processor, "padded_aspect_ratio", 1.25),
    ],
)
def test_features_are_kept_by_all_that_decides_them(stage0, processor, change):
    stage0.bfloat16().float()
    before = feature_key(stage0, processor, ["a"])
    assert feature_key(stage0, processor, ["a"]) == before != feature_key(stage0, processor, ["b"])
    change(stage0, processor)
    assert feature_key(stage0, processor, ["a"]) != before


def test_a_text_that_is_cut_elsewhere_is_another(processor):
    before = tokenizer_of(processor)
    processor.tokenizer.model_max_length = 30
    assert tokenizer_of(processor) != before


def test_parts_of_another_size_are_not_put_together(tmp_path):
    """As where a run was stopped, and goes on with another --batch_size."""

    def compute(rows: range) -> torch.Tensor:
        if rows.start >= 4 and rows.stop - rows.start == 2:
            raise KeyboardInterrupt
        return torch.arange(rows.start, rows.stop)

    with pytest.raises(KeyboardInterrupt):
        cached_in_parts(tmp_path, "key", 8, 2, compute)
    assert cached_in_parts(tmp_path, "key", 8, 4, compute).tolist() == list(range(8))


@pytest.mark.parametrize("size", [4, 8])
def test_that_kept_features_cannot_be_read_is_said_once(tmp_path, caplog, size):
    (tmp_path / "key.safetensors").write_bytes(b"half of it")
    features = cached_in_parts(tmp_path, "key", 8, size, lambda rows: torch.arange(rows.start, rows.stop))
    assert features.tolist() == list(range(8)) and caplog.text.count("cannot be read") == 1
