"""State dicts of the published shapes against forwards written here, from the layers that the peers' papers give."""

import math
import shutil
import sys

import convert
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from modeling_tscir import TSCIRModel, TSCIRProcessor
from modeling_tscir.embedding import embed_queries


WIDTH, HIDDEN, WORDS = 24, 96, 32  # the small CLIP's projection; its text tower


def tensors(shapes: dict[str, tuple], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in shapes.items()}


def published(name: str, width: int = WIDTH, words: int = WORDS) -> dict:
    """A checkpoint's content, in the layout that the peer publishes; for ViT-L/14 both widths are 768."""
    if name == "pic2word":
        middle = 512 if width == 768 else 48
        shapes = {"layers.0.0": (middle, width), "layers.1.0": (middle, middle), "fc_out": (words, middle)}
    else:
        hidden = 4 * width
        shapes = {"layers.0": (hidden, width), "layers.3": (hidden, hidden), "layers.6": (words, hidden)}
    both = {f"{layer}.weight": shape for layer, shape in shapes.items()}
    both |= {f"{layer}.bias": shape[:1] for layer, shape in shapes.items()}
    state = tensors(both)
    if name == "pic2word":
        prefixed = {f"module.{key}": value for key, value in state.items()}
        return {"epoch": 30, "name": "x", "state_dict": {}, "state_dict_img2text": prefixed, "optimizer": None}
    return {"epoch": 3, "Phi": state}


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def independent_forward(name: str, content: dict, features: torch.Tensor) -> torch.Tensor:
    if name == "pic2word":
        state = {k[len("module.") :]: v for k, v in content["state_dict_img2text"].items()}
        layers, activation = ("layers.0.0", "layers.1.0", "fc_out"), lambda x: x.clamp(min=0)
    else:
        state, layers, activation = content["Phi"], ("layers.0", "layers.3", "layers.6"), gelu
    for i, layer in enumerate(layers):
        features = features @ state[f"{layer}.weight"].T + state[f"{layer}.bias"]
        features = activation(features) if i < 2 else features
    return features


@pytest.mark.parametrize("name", ["pic2word", "searle", "lincir"])
def test_a_converted_folder_gives_the_peers_pseudo_words_and_queries(
    name, clip, clip_dir, pictures, tmp_path, monkeypatch
):
    content = published(name)
    torch.save(content, tmp_path / "peer.pt")
    flags = ["--format", name, "--checkpoint", tmp_path / "peer.pt"]
    flags += ["--model_name_or_path", clip_dir, "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, flags)])
    convert.main()
    model = TSCIRModel.from_pretrained(tmp_path / "out")
    processor = TSCIRProcessor.from_pretrained(tmp_path / "out")
    assert model.config.stage == 1 and not model.mapper.needs_patches
    pixels = processor(images=pictures[:3])["pixel_values"]
    with torch.no_grad():
        features = clip.get_image_features(pixel_values=pixels).pooler_output
        expected = independent_forward(name, content, features)
        embeds, words = model.encode_reference(pixels)
    torch.testing.assert_close(words[:, 0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(embeds, features / features.norm(dim=-1, keepdim=True))
    # The whole query: the pseudo-word stands where the peer's placeholder stands in its own prompt.
    between = " ," if name == "pic2word" else " that"
    tokenizer = processor.tokenizer
    ids = [tokenizer(t, add_special_tokens=False).input_ids for t in ("a photo of", between + " red")]
    row = [tokenizer.bos_token_id, *ids[0], 0, *ids[1], tokenizer.eos_token_id]
    with torch.no_grad():
        table = clip.text_model.embeddings.token_embedding
        handle = table.register_forward_hook(
            lambda module, inputs, output: output.index_put((torch.arange(3), torch.tensor(1 + len(ids[0]))), expected)
        )
        text = clip.get_text_features(input_ids=torch.tensor([row] * 3)).pooler_output
        handle.remove()
    found = embed_queries(model, processor, pictures, [0, 1, 2], ["red"] * 3)
    torch.testing.assert_close(found, text / text.norm(dim=-1, keepdim=True), atol=1e-5, rtol=1e-5)
    assert processor.padded_aspect_ratio == (1.25 if name == "searle" else None)
    assert processor.image_template == "a photo of {image}"
    with pytest.raises(SystemExit, match="out holds a model, which this run would write over"):
        convert.main()


@pytest.mark.parametrize("name", ["pic2word", "searle", "lincir"])
def test_the_published_sizes(name, clip_dir, pictures, tmp_path):
    """768 to 512 to 768 (Pic2Word), 768 to 3072 to 768 (SEARLE, LinCIR), on a CLIP of ViT-L/14's widths."""
    config = CLIPConfig.from_pretrained(clip_dir)
    config.projection_dim = config.text_config.hidden_size = 768
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 1
    shutil.copytree(clip_dir, tmp_path / "clip")
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    content = published(name, 768, 768)
    torch.save(content, tmp_path / "peer.pt")
    known = convert.FORMATS[name]
    model, processor = convert.convert(convert.read_mapper(tmp_path / "peer.pt", known), known, str(tmp_path / "clip"))
    pixels = processor(images=pictures[:2])["pixel_values"]
    with torch.no_grad():
        expected = independent_forward(name, content, model.get_image_features(pixels))
        torch.testing.assert_close(model.encode_reference(pixels)[1][:, 0], expected, atol=1e-5, rtol=1e-5)


def test_a_mapper_of_normalised_features(clip, clip_dir, pictures, tmp_path):
    content = published("lincir")
    torch.save(content, tmp_path / "peer.pt")
    known = convert.FORMATS["lincir"]
    model, processor = convert.convert(
        convert.read_mapper(tmp_path / "peer.pt", known), known, str(clip_dir), mapper_input="normalized"
    )
    pixels = processor(images=pictures[:2])["pixel_values"]
    with torch.no_grad():
        features = torch.nn.functional.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        torch.testing.assert_close(
            model.encode_reference(pixels)[1][:, 0], independent_forward("lincir", content, features)
        )


def test_what_is_no_such_checkpoint_is_refused(clip_dir, tmp_path, monkeypatch):
    path, searle = tmp_path / "peer.pt", convert.FORMATS["searle"]
    with pytest.raises(ValueError, match=r"peer\.pt is missing"):
        convert.read_mapper(path, searle)
    torch.save(published("pic2word"), path)
    with pytest.raises(ValueError, match=r"has no 'Phi', but \['epoch'.*is --format right"):
        convert.read_mapper(path, searle)
    content = published("searle")
    del content["Phi"]["layers.6.bias"]
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"missing \['layers\.6\.bias'\]"):
        convert.read_mapper(path, searle)
    torch.save({"Phi": Image.new("RGB", (2, 2))}, path)  # any object but a tensor: not unpickled
    for content in (path.read_bytes(), b"garbage"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no file of tensors alone") as told:
            convert.read_mapper(path, searle)
        assert "weights_only" not in str(told.value)  # torch's advice is to execute what a stranger wrote
    content = published("searle")
    content["Phi"]["layers.0.weight"] = content["Phi"]["layers.0.weight"][0]
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"'layers\.0\.weight' is of shape \(\d+,\), unlike a linear layer's"):
        convert.read_mapper(path, searle)
    content = published("searle")
    content["Phi"]["layers.3.bias"][0] = float("nan")
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"'layers\.3\.bias' is no tensor of finite numbers"):
        convert.read_mapper(path, searle)
    content = published("searle")
    content["Phi"]["layers.0.weight"] = torch.zeros(HIDDEN, 512)
    torch.save(content, path)
    flags = [
        "--format",
        "searle",
        "--checkpoint",
        path,
        "--model_name_or_path",
        clip_dir,
        "--output_dir",
        tmp_path / "o",
    ]
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, flags)])
    with pytest.raises(SystemExit, match="reads 512 .* it was trained on another CLIP"):
        convert.main()


def test_stage_one_features_are_not_raw(clip_dir):
    model = TSCIRModel.from_clip_pretrained(clip_dir, num_injection_blocks=0, mapper_input="raw")
    model.add_mapper()
    with pytest.raises(ValueError, match="give pixel_values"):
        model.get_pseudo_words(torch.randn(1, WIDTH))
    with pytest.raises(ValueError, match="mapper_input must be one of"):
        TSCIRModel.from_clip_pretrained(clip_dir, mapper_input="l2")
