"""The published CLIPs' configurations, with random weights or none."""

import json
import subprocess

import pytest
import torch
from backbones import check_contract, check_shapes, empty_model, main
from clip_shapes import BACKBONES
from transformers import CLIPConfig, CLIPTextModel, SiglipConfig, SiglipModel

from modeling_tscir import TSCIRModel


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbones_shapes(name):
    sizes = check_shapes(empty_model(BACKBONES[name]))
    counted = {"patch32": 151.3, "b32": 151.3, "base-patch16": 149.6, "large-patch14": 427.6, "l14": 427.6,
               "patch14-336": 427.9, "ViT-H": 986.1, "bigG": 2539.6}  # fmt: skip
    known = [millions for part, millions in counted.items() if part in name]
    assert sizes["frozen"] / 1e6 == pytest.approx(known[-1], abs=0.1)  # what the published checkpoints have
    assert sizes["trained"] < 0.2 * sizes["frozen"]


def small(config: CLIPConfig) -> CLIPConfig:
    """The same configuration, of two narrow layers."""
    content = config.to_dict()
    narrow = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return CLIPConfig(**content | {part: content[part] | narrow for part in ("text_config", "vision_config")})


@pytest.mark.parametrize("name", BACKBONES)
def test_the_contract_on_small_ones(name, tmp_path):
    check_contract(small(BACKBONES[name]), tmp_path, torch.float32)


def test_a_backbone_whose_process_is_killed_is_a_line_of_the_table(monkeypatch, capsys):
    names = list(BACKBONES)[:2]
    killed = subprocess.CompletedProcess([], -9, stdout="", stderr="")
    monkeypatch.setattr("backbones.subprocess.run", lambda *_, **__: killed)
    monkeypatch.setattr("sys.argv", ["backbones.py", "--run", "float32", "--backbones", *names])
    main()
    assert capsys.readouterr().out.count("| fails: exit status -9 |  |") == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14-336"])
def test_the_contract_at_full_size(name, tmp_path):
    check_contract(BACKBONES[name], tmp_path, torch.float32)


def test_what_is_no_clip_is_told(clip, tmp_path):
    part = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    SiglipModel(SiglipConfig(text_config=part, vision_config=part | {"image_size": 32})).save_pretrained(
        tmp_path / "s"
    )
    CLIPTextModel(clip.config.text_config).save_pretrained(tmp_path / "t")
    (tmp_path / "open_clip").mkdir()
    (tmp_path / "open_clip/config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 512}}), "utf-8")
    for folder, message in (
        ("s", "type 'siglip', not a CLIPModel"),
        ("t", "type 'clip_text_model', not a CLIPModel"),
        ("open_clip", "cannot be found or read"),
        ("none", "cannot be found or read"),
    ):
        with pytest.raises(ValueError, match=message):
            TSCIRModel.from_clip_pretrained(tmp_path / folder)
