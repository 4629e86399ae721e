import pytest
from transformers import AutoConfig, CLIPConfig

from modeling_tscir import TSCIRConfig


def test_round_trip(tmp_path):
    config = TSCIRConfig(
        clip_config=CLIPConfig(projection_dim=48), stage=2, lora_rank=3, soft_alignment_temperature=0.25
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is TSCIRConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert (loaded.clip_config.projection_dim, loaded.lora_rank, loaded.soft_alignment_temperature) == (48, 3, 0.25)


def test_a_live_backbone_configuration_is_left_alone():
    backbone = CLIPConfig()
    backbone._attn_implementation = "eager"
    TSCIRConfig(clip_config=backbone)
    assert backbone._attn_implementation == "eager"


def test_openai_end_of_text_id_is_the_last_id():
    assert TSCIRConfig(clip_config=CLIPConfig(text_config={"eos_token_id": 2})).text_eos_token_id == 49407
    assert TSCIRConfig(clip_config=CLIPConfig(text_config={"eos_token_id": 7})).text_eos_token_id == 7


@pytest.mark.parametrize(
    "bad",
    [
        {"stage": 3},
        {"num_pseudo_words": 0},
        {"num_injection_blocks": -1},
        {"training_free_weight": 1.5},
        {"composed_weight": -1.5},
        {"residual": float("nan")},
        {"soft_alignment_temperature": 0},
        {"mined_negative_weight": -0.1},
        {"soft_alignment_temperature": float("nan")},
        {"gce_q": 1.1},
        {"mapper_hidden_size": 0},
        {"num_injection_heads": 0},
        {"num_injection_heads": 5},
        {"lora_rank": 0},
        {"lora_alpha": 0},
        {"lora_target_modules": "q_proj"},
        {"adapters": "fashion"},
    ],
)
def test_impossible_choices_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TSCIRConfig(**bad)
