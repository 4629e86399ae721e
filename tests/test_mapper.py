import pytest
import torch
from transformers import initialization as init

from modeling_tscir import TSCIRModel
from modeling_tscir.mapper import InjectionBlock, PseudoWordMapper, initialise_mapper_weights


def new(num_blocks: int, seed: int = 0) -> PseudoWordMapper:
    torch.manual_seed(seed)
    mapper = PseudoWordMapper(24, 40, 32, 2, 48, num_blocks, 4, 0.1, "gelu", 24**0.5)
    initialise_mapper_weights(mapper, init)
    return mapper.eval()


def test_shapes():
    assert new(2)(torch.randn(5, 24), torch.randn(5, 16, 40)).shape == (5, 2, 32)
    assert new(0)(torch.randn(5, 24)).shape == (5, 2, 32)


def test_with_injection_it_starts_as_its_plain_mlp():
    mapper, images = new(2), torch.randn(5, 24)
    plain = mapper.mlp(images * 24**0.5).unflatten(-1, (2, -1))
    assert torch.equal(mapper(images, torch.randn(5, 16, 40)), plain)


@pytest.mark.parametrize(("named", "scale"), [("scaled", 24**0.5), ("normalized", 1.0)])
def test_a_model_scales_what_its_mapper_reads_as_its_configuration_says(clip_dir, named, scale):
    model = TSCIRModel.from_clip_pretrained(clip_dir, mapper_input=named, num_injection_blocks=0)
    model.add_mapper()
    images = torch.nn.functional.normalize(torch.randn(3, 24), dim=-1)
    expected = model.mapper.mlp(images * scale).unflatten(-1, (model.config.num_pseudo_words, -1))
    assert torch.equal(model.get_pseudo_words(images), expected)


def test_injection_reads_the_patches_once_it_has_learned():
    mapper, images = new(2), torch.randn(5, 24)
    torch.nn.init.normal_(mapper.output_projection.weight)
    assert not torch.allclose(mapper(images, torch.randn(5, 16, 40)), mapper(images, torch.randn(5, 16, 40)))


def test_blocks_add_to_the_words_that_they_are_given():
    """Those that add nothing hand on what the MLP made, which the way out then adds to itself, normalised."""
    mapper, images = new(2), torch.randn(5, 24)
    for block in mapper.blocks:
        for last in (block.attention.out_proj, block.feed_forward[-1]):
            torch.nn.init.zeros_(last.weight)
    torch.nn.init.eye_(mapper.output_projection.weight)
    plain = mapper.mlp(images * 24**0.5).unflatten(-1, (2, -1))
    expected = plain + torch.nn.functional.layer_norm(plain, (32,))
    torch.testing.assert_close(mapper(images, torch.randn(5, 16, 40)), expected)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_dropout_is_before_both_later_layers_of_the_mlp(share):
    torch.manual_seed(0)
    mapper, read = PseudoWordMapper(24, 40, 32, 2, 400, 0, 4, share, "gelu", 1.0).train(), []
    for layer in mapper.mlp:
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda _, inputs: read.append(float((inputs[0] == 0).float().mean())))
    mapper(torch.randn(20, 24))
    assert read == pytest.approx([0, share, share], abs=0.05)


def test_patches_that_are_missing_are_named():
    with pytest.raises(ValueError, match="patch_states"):
        new(1)(torch.randn(5, 24))


def test_every_parameter_learns():
    mapper = new(2).train()
    torch.nn.init.normal_(mapper.output_projection.weight)
    mapper(torch.randn(5, 24), torch.randn(5, 16, 40)).square().sum().backward()
    assert all(p.grad is not None for p in mapper.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_attention_through_the_few_queries_is_multihead_attention(training):
    """Values, gradients, and which weights dropout takes."""
    torch.manual_seed(0)
    block = InjectionBlock(hidden_size=24, num_heads=3, dropout=0.3).train(training)
    torch.nn.init.normal_(block.attention.in_proj_bias)
    states, patches = torch.randn(2, 4, 24, requires_grad=True), torch.randn(2, 10, 24, requires_grad=True)
    wanted = [states, patches, *block.attention.parameters()]
    torch.manual_seed(1)
    ours = block.attention(states, patches)
    torch.manual_seed(1)
    theirs, _ = torch.nn.MultiheadAttention.forward(block.attention, states, patches, patches, need_weights=False)
    assert torch.allclose(ours, theirs, atol=1e-5)
    upstream = torch.randn_like(ours)
    for own, other in zip(
        torch.autograd.grad(ours, wanted, upstream), torch.autograd.grad(theirs, wanted, upstream), strict=True
    ):
        assert torch.allclose(own, other, atol=1e-4)


@pytest.mark.parametrize("apart", ["mapper", "clip.vision_model", "clip.visual_projection", "clip.text_model"])
def test_parts_of_a_model_may_lie_on_disk(stage2, composed, tmp_path, apart):
    """Whose weights accelerate brings for each module's own forward."""
    stage2.save_adapter(tmp_path / "adapter")
    stage2.load_adapter(tmp_path / "adapter", "again")
    stage2.save_pretrained(tmp_path / "model")
    parts = [f"clip.{name}" for name, _ in stage2.clip.named_children()] + ["clip.logit_scale", "mapper"]
    places = {part: "disk" if part == apart else "cpu" for part in parts}
    split = TSCIRModel.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "off")
    with torch.no_grad():
        for name in ("default", "again"):
            expected = stage2.get_composed_features(**composed, adapter=name)
            assert torch.allclose(split.get_composed_features(**composed, adapter=name), expected, atol=1e-6)
