from types import SimpleNamespace

import torch

from modeling_tscir.backbone import backbone_fingerprint


def fingerprint(**tensors) -> str:
    return backbone_fingerprint(SimpleNamespace(state_dict=lambda: tensors))


def test_it_tells_values_shapes_and_names_apart():
    a = torch.randn(40, 30)
    changed = a.clone()
    changed[-1, -1] += 1e-6
    same = fingerprint(a=a)
    assert same == fingerprint(a=a.clone())
    assert len({same, fingerprint(a=changed), fingerprint(a=a.view(30, 40)), fingerprint(b=a)}) == 4


def test_tensors_of_any_size():
    """As large as CLIP's word embeddings (49,408 x 512), and the scalar logit scale."""
    assert fingerprint(a=torch.ones(1).expand(49_408 * 512)) != fingerprint(a=torch.ones(1).expand(49_409 * 512))
    assert fingerprint(a=torch.tensor(2.0)) != fingerprint(a=torch.tensor(3.0))
