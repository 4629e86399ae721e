"""What each stage's loss is made of, by its configuration."""

import pytest
import torch
import torch.nn.functional as F
from stage1 import Stage1Objective
from stage2 import Stage2Objective

from modeling_tscir.losses import composing_loss


def unit(seed: int, *shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_pseudo_sentences_are_to_meet_pictures_and_to_stand_near_captions(stage1, processor):
    objective, pictures, captions = Stage1Objective(stage1, processor), torch.eye(6, 24), unit(0, 6, 24)
    features = {"image_embeds": pictures, "caption_embeds": captions}
    as_pictures, as_captions = (objective.loss(queries, features) for queries in (pictures, captions))
    assert as_pictures["image_loss"] < 1e-4 < as_captions["image_loss"]
    assert as_captions["soft_alignment_loss"].abs() < 1e-4 < as_pictures["soft_alignment_loss"]
    assert (as_pictures["image_similarity"] - 1).abs() < 1e-5 > (as_captions["caption_similarity"] - 1).abs()
    assert as_pictures["caption_similarity"] == pytest.approx(as_captions["image_similarity"].item(), abs=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.4, 3.0])
def test_soft_alignment_has_the_weight_and_the_temperature_of_the_configuration(stage1, processor, weight):
    stage1.config.soft_alignment_weight, stage1.config.soft_alignment_temperature = weight, 1e-4
    queries, pictures, captions = unit(0, 6, 24), unit(1, 6, 24), unit(2, 6, 24)
    best = (pictures * captions).sum(-1).argmax()  # whose caption alone counts, at such a temperature
    features = {"image_embeds": pictures, "caption_embeds": captions}
    terms = Stage1Objective(stage1, processor).loss(queries, features)
    expected = weight * (1 - queries[best] @ captions[best])
    assert (terms["loss"] - terms["image_loss"]).item() == pytest.approx(expected.item(), abs=1e-5)
    assert ("soft_alignment_loss" in terms) == (weight > 0)


def test_everything_that_is_told_of_negatives_counts_in_stage_two(stage2):
    config = stage2.config
    config.reference_negative_weight, config.mined_negative_weight, config.gce_q = 0.4, 0.6, 0.5
    queries, targets, references, mined = unit(0, 6, 24), unit(1, 6, 24), unit(2, 6, 24), unit(3, 6, 3, 24)
    told = {
        "target_ids": torch.tensor([0, 1, 1, 2, 3, 3]),
        "reference_embeds": references,
        "reference_weight": 0.4,
        "mined_embeds": mined,
        "mined_mask": torch.arange(18).view(6, 3) % 4 > 0,
        "mined_weight": 0.6,
        "gce_q": 0.5,
    }
    held = ("target_ids", "reference_embeds", "mined_embeds", "mined_mask")
    features = {"target_embeds": targets, **{name: told[name] for name in held}}
    terms = Stage2Objective(stage2).loss(queries, features)
    for left_out in (None, *told):
        given = {name: value for name, value in told.items() if name != left_out}
        loss = composing_loss(queries, targets, stage2.logit_scale, **given)
        assert torch.allclose(loss, terms["loss"]) == (left_out is None), left_out
    assert terms["mined_share"].item() == pytest.approx(13 / 18)
