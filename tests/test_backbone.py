from types import SimpleNamespace

import pytest
import stage2 as stage2_script
import torch

from modeling_tscir import TSCIRModel
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


def test_a_name_that_is_no_folder_is_named(launch, tmp_path, monkeypatch):
    """An OSError, as `from_pretrained` has it everywhere, and a ValueError, which scripts tell without a traceback."""
    monkeypatch.chdir(tmp_path)
    message = "the model 'runs/stge1' cannot be found or read: there is no folder runs/stge1 here, and from the Hub: "
    for kind in (OSError, ValueError):
        with pytest.raises(kind, match=message):
            TSCIRModel.from_pretrained("runs/stge1")
    for name, told in (("runs/stge1", message), (tmp_path / "none", f"there is no folder {tmp_path}/none")):
        with pytest.raises(ValueError, match=told):
            launch(stage2_script, name, tmp_path / "out")
    with pytest.raises(ValueError, match="there is no folder runs/clp here, and from the Hub: "):
        TSCIRModel.from_clip_pretrained("runs/clp")
