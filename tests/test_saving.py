"""What other processes, tools and users hand to saving and loading."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PreTrainedModel
from transformers import modeling_utils as safetensors_of_transformers

from modeling_tscir import MINIATURE_CHECKPOINT, TSCIRModel, TSCIRProcessor, adapters, backbone, checkpoint
from modeling_tscir.adapters import lora_layers
from modeling_tscir.embedding import embed_images, embed_images_with_patches
from modeling_tscir.feature_cache import feature_key


def test_a_token_is_used_and_not_kept(clip_dir, monkeypatch):
    """Publishing would upload a configuration that held it."""
    told, real = {}, TSCIRModel.from_clip_pretrained.__globals__["load_backbone"]
    monkeypatch.setitem(
        TSCIRModel.from_clip_pretrained.__globals__, "load_backbone", lambda *a, **hub: told.update(hub) or real(*a)
    )
    model = TSCIRModel.from_clip_pretrained(clip_dir, token="hf_SECRET", cache_dir="c", local_files_only=True)
    assert told == {"token": "hf_SECRET", "cache_dir": "c", "local_files_only": True}
    assert "SECRET" not in json.dumps(model.config.to_dict())
    with pytest.raises(TypeError, match=r"unknown arguments \['lora_rnk'\]"):
        TSCIRModel.from_clip_pretrained(clip_dir, lora_rnk=8)


@pytest.mark.parametrize("form", ["full", "reference"])
def test_other_processes_leave_what_the_first_wrote(stage2, tmp_path, form):
    stage2.save_pretrained(tmp_path / "m", backbone=form)
    before = sorted(path.name for path in (tmp_path / "m").iterdir())
    stage2.save_pretrained(tmp_path / "m", backbone=form, is_main_process=False)
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == before
    TSCIRModel.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("form", ["full", "reference"])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_given_weights_are_what_is_saved(stage, form, request, tmp_path):
    """As averages over steps are."""
    model = request.getfixturevalue(stage)
    given = {k: v + 1 if k.startswith("mapper.") or ".lora_" in k else v for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path / "m", backbone=form, state_dict=dict(given))
    again = TSCIRModel.from_pretrained(tmp_path / "m").state_dict()
    assert all(torch.equal(again[k], v) for k, v in given.items())
    with pytest.raises(ValueError, match=r"state_dict lacks \['mapper"):
        model.save_pretrained(
            tmp_path / "m", backbone=form, state_dict={k: v for k, v in given.items() if "mapper" not in k}
        )


def test_a_reference_is_one_file_and_is_uploaded_whole_or_not_at_all(stage2, tmp_path):
    stage2.save_pretrained(tmp_path / "m", backbone="reference", max_shard_size="10KB")
    assert [path.name for path in (tmp_path / "m").glob("*.safetensors*")] == ["tscir_delta.safetensors"]
    for form in ("reference", "full"):
        with pytest.raises(ValueError, match=r"upload by model.push_to_hub"):
            stage2.save_pretrained(tmp_path / "n", backbone=form, push_to_hub=True)


def test_a_download_that_is_forced_is_so_for_every_file(stage2, tmp_path, monkeypatch):
    stage2.save_adapter(tmp_path / "kept")
    stage2.load_adapter(tmp_path / "kept", "further")
    stage2.save_pretrained(tmp_path / "model", backbone="reference")
    asked = {}
    for module in (adapters, backbone, checkpoint):
        fetch = module.cached_file

        def fetched(path, name, fetch=fetch, **hub):
            asked[name] = hub.get("force_download")
            return fetch(path, name, **hub)

        monkeypatch.setattr(module, "cached_file", fetched)
    TSCIRModel.from_pretrained(tmp_path / "model", force_download=True)
    assert {"tscir_delta.safetensors", "adapter_model.safetensors", "adapter_config.json"} <= set(asked)
    assert all(asked.values())


@pytest.mark.parametrize("form", ["full", "reference"])
def test_a_save_that_fails_leaves_what_was_there(stage2, clip_dir, tmp_path, form, monkeypatch):
    def files() -> dict[str, bytes]:
        return {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    stage2.save_adapter(tmp_path / "kept")
    stage2.load_adapter(tmp_path / "kept", "further")
    stage2.save_pretrained(tmp_path, backbone=form)
    before = files()
    with torch.no_grad():
        next(iter(stage2.mapper.parameters())).add_(1)

    def write(self, folder, **kwargs):
        (tmp_path / "config.json").write_text("half", "utf-8")
        (tmp_path / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedModel, "save_pretrained", write)
        for other in ("full", "reference"):
            with pytest.raises(OSError, match="No space left"):
                stage2.save_pretrained(tmp_path, backbone=other)
            assert files() == before
    other = {"full": "reference", "reference": "full"}[form]
    (tmp_path / ".model.safetensors.old").write_bytes(b"of a process that was killed")
    stage2.save_pretrained(tmp_path, backbone=other)
    assert ("model.safetensors" in files()) == (other == "full") and not list(tmp_path.rglob("*.old"))
    assert torch.equal(*(next(iter(m.mapper.parameters())) for m in (stage2, TSCIRModel.from_pretrained(tmp_path))))


@pytest.mark.parametrize("size", ["20KB", "30KB"])
def test_shards_of_a_save_that_fails_are_not_mixed_with_those_that_were_there(stage2, tmp_path, size, monkeypatch):
    stage2.save_pretrained(tmp_path, max_shard_size="20KB")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("model*.safe*")}
    assert len(before) > 3
    with torch.no_grad():
        for parameter in stage2.parameters():
            parameter.add_(1)
    written, write = [], safetensors_of_transformers.safe_save_file

    def until_full(tensors, path, **kwargs):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        write(tensors, path, **kwargs)

    monkeypatch.setattr(safetensors_of_transformers, "safe_save_file", until_full)
    with pytest.raises(OSError, match="No space left"):
        stage2.save_pretrained(tmp_path, max_shard_size=size)
    assert len(written) == 2 and {path.name: path.read_bytes() for path in tmp_path.glob("*model*.safe*")} == before


def test_a_clip_that_lacks_tensors_is_refused(clip, clip_dir, tmp_path):
    clip.save_pretrained(tmp_path / "clip")
    tensors = load_file(tmp_path / "clip/model.safetensors")
    save_file({k: v for k, v in tensors.items() if "_projection" not in k}, tmp_path / "clip/model.safetensors")
    with pytest.raises(ValueError, match=r"lacks tensors of a CLIPModel: \['text_projection.weight', 'visual_proj"):
        TSCIRModel.from_clip_pretrained(tmp_path / "clip")


def test_a_text_without_an_end_is_refused(clip, clip_dir, pictures, tmp_path):
    """A CLIP whose vocabulary grew and whose configuration says 2, as OpenAI's does: every text would be the same."""
    table = clip.text_model.embeddings.token_embedding
    table.weight = torch.nn.Parameter(torch.cat([table.weight, table.weight[:1]]))
    clip.config.text_config.vocab_size += 1
    clip.config.text_config.eos_token_id = 2
    clip.save_pretrained(tmp_path / "clip")
    model = TSCIRModel.from_clip_pretrained(tmp_path / "clip")
    model.add_mapper()
    processor = TSCIRProcessor.from_clip_pretrained(clip_dir)
    with pytest.raises(ValueError, match="no end of text, .* write the tokenizer's own eos_token_id"):
        model.get_composed_features(**processor(images=pictures[0], text="red"))


def test_merged_adapters_follow_weights_that_are_loaded(stage2, composed):
    stage2.merge_adapter()
    other = {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in stage2.state_dict().items()}
    with torch.no_grad():
        before = stage2.get_composed_features(**composed)
        stage2.load_state_dict(other)
        after = stage2.get_composed_features(**composed)
        stage2.disable_adapters()
        assert not torch.allclose(before, after) and torch.allclose(after, stage2.get_composed_features(**composed))


def test_what_is_added_to_a_model_is_in_its_mode(clip_dir):
    model = TSCIRModel.from_clip_pretrained(clip_dir, mapper_dropout=0.5, lora_dropout=0.5)
    model.add_mapper()
    model.add_adapters()
    assert not any(module.training for module in model.modules())
    assert list(lora_layers(model.clip.text_model))
    model.train()
    assert model.mapper.training and all(layer.training for layer in lora_layers(model.clip.text_model))
    assert not model.supports_gradient_checkpointing


@torch.no_grad()
def test_a_clip_that_names_dropout_is_frozen_all_the_same(clip, processor, pictures, tmp_path):
    for part in (clip.config.text_config, clip.config.vision_config):
        part.attention_dropout = 0.5
    clip.save_pretrained(tmp_path)
    model = TSCIRModel.from_clip_pretrained(tmp_path).train()
    pixels, texts = processor.pixel_values(pictures), processor(text=["red", "a blue one"])
    for one, other in zip(model.encode_image(pixels), model.encode_image(pixels), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(model.get_text_features(**texts), model.get_text_features(**texts))


@torch.no_grad()
def test_what_is_computed_in_bf16_is_normalised_in_fp32(stage2, processor, composed, pictures):
    pixels = processor.pixel_values(pictures)
    with torch.autocast("cpu", torch.bfloat16):
        found = [stage2.encode_image(pixels)[0], stage2.encode_reference(pixels)[0]]
        found += [stage2.encode_query_parts(composed["input_ids"], composed["pseudo_mask"], torch.randn(2, 2, 32))[0]]
        alone, with_patches = (
            embed_images(stage2, processor, pictures),
            embed_images_with_patches(stage2, processor, pictures),
        )
    for embeds in found:
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(len(embeds)), atol=1e-6, rtol=0)
    assert torch.equal(alone, with_patches[0])


def test_a_processors_mistakes_are_named(processor, pictures):
    with pytest.raises(ValueError, match="images is an empty list"):
        processor(images=[], text=[])
    with pytest.raises(ValueError, match="text is an empty list"):
        processor(text=[])
    with pytest.raises(TypeError, match=r"unknown arguments \['texts'\]"):
        processor(images=pictures[0], texts="red")
    assert processor(images=pictures[0], text="red", padding=True, truncation=True)["input_ids"].shape[0] == 1
    for asked in ({"padding": "max_length"}, {"truncation": False}):
        with pytest.raises(ValueError, match="padded to the longest of their batch and cut"):
            processor(text="red", **asked)
    with pytest.raises(ValueError, match="text 1 is a string, not None"):
        processor(text=["red", None])
    with pytest.raises(ValueError, match="num_pseudo_words must be at least 1"):
        TSCIRProcessor(processor.image_processor, processor.tokenizer, num_pseudo_words=0)


def test_a_relative_backbone_is_found_from_elsewhere(tmp_path, monkeypatch):
    """The packaged miniature names ../miniature_clip."""
    model = TSCIRModel.from_pretrained(MINIATURE_CHECKPOINT)
    model.save_pretrained(tmp_path / "one", backbone="reference")
    TSCIRModel.from_pretrained(tmp_path / "one")
    monkeypatch.chdir(MINIATURE_CHECKPOINT.parent)
    TSCIRModel.from_pretrained(MINIATURE_CHECKPOINT, backbone="miniature_clip").save_pretrained(
        tmp_path / "two", backbone="reference"
    )
    monkeypatch.chdir(tmp_path)
    TSCIRModel.from_pretrained("two")


def test_features_are_kept_by_the_tensors_there_are(stage2, processor, tmp_path):
    """Whatever backbone a whole checkpoint says it was trained with."""
    key = feature_key(stage2, processor, ["a"])
    stage2.save_pretrained(tmp_path / "same")
    assert feature_key(TSCIRModel.from_pretrained(tmp_path / "same"), processor, ["a"]) == key
    plain = TSCIRModel.from_clip_pretrained(stage2.config.backbone_name_or_path)
    assert feature_key(plain, processor, ["a"]) == key
    stage2.bfloat16().save_pretrained(tmp_path / "rounded")
    rounded = TSCIRModel.from_pretrained(tmp_path / "rounded", dtype=torch.float32)
    assert rounded.config.backbone_fingerprint == plain.config.backbone_fingerprint
    assert feature_key(rounded, processor, ["a"]) != key


@pytest.mark.parametrize("form", ["full", "reference"])
def test_a_model_in_a_subfolder_is_loaded_from_there(stage2, processor, composed, tmp_path, form):
    stage2.save_adapter(tmp_path / "adapter")
    stage2.load_adapter(tmp_path / "adapter", "further")
    stage2.save_pretrained(tmp_path / "repository/b32", backbone=form)
    processor.save_pretrained(tmp_path / "repository/b32")
    for again in (
        TSCIRModel.from_pretrained(tmp_path / "repository", subfolder="b32"),
        AutoModel.from_pretrained(tmp_path / "repository", subfolder="b32"),
    ):
        assert torch.equal(again.get_composed_features(**composed), stage2.get_composed_features(**composed))
        assert again.adapter_names == ["default", "further"]
    again = TSCIRProcessor.from_pretrained(tmp_path / "repository", subfolder="b32")
    assert torch.equal(again.compose(["red"])["input_ids"], processor.compose(["red"])["input_ids"])
    with pytest.raises(ValueError, match="no config.json in .*l14"):
        TSCIRModel.from_pretrained(tmp_path / "repository", subfolder="l14")


@pytest.mark.parametrize("form", ["full", "reference"])
def test_damaged_and_hostile_checkpoints(stage2, processor, tmp_path, form):
    folder = tmp_path / "model"
    stage2.save_pretrained(folder, backbone=form)
    weights = folder / ("model.safetensors" if form == "full" else "tscir_delta.safetensors")
    whole, config = weights.read_bytes(), json.loads((folder / "config.json").read_text("utf-8"))
    size = int.from_bytes(whole[:8], "little")
    longer = (10**9).to_bytes(8, "little") + whole[8:]
    header = whole[8 : 8 + size].replace(b'"F32"', b'"F64"', 1)
    for damaged in (whole[: len(whole) // 2], b"", longer, whole[:8] + b"\xff" * size + whole[8 + size :],
                    whole[:8] + header + whole[8 + size :]):  # fmt: skip
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            TSCIRModel.from_pretrained(folder)
    weights.write_bytes(whole)
    with pytest.raises(ValueError, match="no processor that can be read"):
        TSCIRProcessor.from_pretrained(folder)
    processor.save_pretrained(folder)
    # Code that lies elsewhere is neither fetched nor run; nor is code beside the weights, where the package is.
    marker = tmp_path / "executed"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass TSCIRModel: pass\n", "utf-8")
    (folder / "modeling_tscir.py").write_text(f"open({str(marker)!r}, 'w').close()\n", "utf-8")
    for entry in ({"auto_map": {"AutoModel": "evil/repo--modeling_tscir.TSCIRModel"}},
                  {"auto_map": {"AutoModel": "evil.TSCIRModel"}},
                  {"custom_pipelines": {"composed-image-retrieval": {"impl": "evil.Pipe"}}}):  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config | entry), "utf-8")
        with pytest.raises(ValueError, match="wants code from 'evil"):
            TSCIRModel.from_pretrained(folder)
        with pytest.raises(ValueError, match="wants code from 'evil"):
            AutoModel.from_pretrained(folder)
    for entry in ({"attn_implementation": "evil/kernel"}, {"auto_map": "x"}, {"custom_pipelines": ["a"]},
                  {"adapters": "n1"}, {"adapters": ["../n1"]}):  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config | entry), "utf-8")
        with pytest.raises(ValueError):
            TSCIRModel.from_pretrained(folder)
    (folder / "config.json").write_text("[]", "utf-8")
    with pytest.raises(ValueError):
        TSCIRModel.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    TSCIRModel.from_pretrained(folder)
    # An index that names a pickle.
    torch.save(stage2.state_dict(), folder / "pytorch_model.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(stage2.state_dict(), "pytorch_model.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(ValueError, match="safetensors alone"):
        TSCIRModel.from_pretrained(folder)
    assert not marker.exists()


def test_where_an_adapter_lies_is_asked_for_as_told_and_its_files_may_be_read_alike(stage2, tmp_path, monkeypatch):
    stage2.save_adapter(tmp_path / "some/adapter")
    assert len({path.stat().st_mode for path in (tmp_path / "some/adapter").iterdir()}) == 1
    asked, real = [], adapters.cached_file
    monkeypatch.setattr(adapters, "cached_file", lambda *given, **told: asked.append(told) or real(*given, **told))
    told = {"subfolder": "adapter", "revision": "v2", "token": "t", "cache_dir": str(tmp_path / "cache")}
    told |= {"local_files_only": True, "force_download": False}
    stage2.load_adapter(tmp_path / "some", "further", **told)
    assert asked == [told, told]
