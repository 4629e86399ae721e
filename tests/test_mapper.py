import pytest
import torch
from transformers import initialization as init

from modeling_tscir.mapper import PseudoWordMapper, initialise_mapper_weights


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


def test_injection_reads_the_patches_once_it_has_learned():
    mapper, images = new(2), torch.randn(5, 24)
    torch.nn.init.normal_(mapper.output_projection.weight)
    assert not torch.allclose(mapper(images, torch.randn(5, 16, 40)), mapper(images, torch.randn(5, 16, 40)))


def test_patches_that_are_missing_are_named():
    with pytest.raises(ValueError, match="patch_states"):
        new(1)(torch.randn(5, 24))


def test_every_parameter_learns():
    mapper = new(2).train()
    torch.nn.init.normal_(mapper.output_projection.weight)
    mapper(torch.randn(5, 24), torch.randn(5, 16, 40)).square().sum().backward()
    assert all(p.grad is not None for p in mapper.parameters())
