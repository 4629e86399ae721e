import copy
import threading

import pytest
import torch
from conftest import TEXTS
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, CLIPModel

from modeling_tscir import TSCIRConfig, TSCIRModel, TSCIROutput, TSCIRProcessor
from modeling_tscir.losses import composing_loss


@pytest.mark.parametrize("stage", ["stage0", "stage1", "stage2"])
@torch.no_grad()
def test_plain_features_are_clips_own_to_the_bit(stage, request, clip, processor, pictures):
    model = request.getfixturevalue(stage)
    texts, images = processor(text=TEXTS), processor(images=pictures)
    assert torch.equal(model.get_text_features(**texts), clip.get_text_features(**texts).pooler_output)
    assert torch.equal(model.get_image_features(**images), clip.get_image_features(**images).pooler_output)


@torch.no_grad()
def test_many_pictures_go_through_the_vision_tower_a_thousand_patches_at_a_time(stage1, clip):
    pixels, sizes = torch.randn(150, 3, 32, 32, generator=torch.Generator().manual_seed(0)), []  # of 16 patches each
    stage1.clip.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    features, (embeds, patches) = stage1.get_image_features(pixels), stage1.encode_image(pixels)
    assert sizes == [50, 50, 50] * 2
    whole = clip.vision_model(pixel_values=pixels)
    expected = clip.visual_projection(whole.pooler_output)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(embeds, torch.nn.functional.normalize(expected, dim=-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(patches, whole.last_hidden_state[:, 1:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_goes_through_the_vision_tower_at_once_is_not_copied(stage1, pictures, processor):
    given, seen = processor(images=pictures)["pixel_values"], []
    stage1.clip.vision_model.register_forward_hook(lambda *call: seen.append(call[-1].last_hidden_state))
    _, patches = stage1.encode_image(given)
    assert patches.untyped_storage().data_ptr() == seen[0].untyped_storage().data_ptr()


@torch.no_grad()
def test_larger_pictures_count_as_the_patches_they_are(stage1, clip):
    pixels, sizes = torch.randn(50, 3, 64, 64, generator=torch.Generator().manual_seed(0)), []  # of 64 patches each
    stage1.clip.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    features = stage1.get_image_features(pixels, interpolate_pos_encoding=True)
    assert sizes == [13, 13, 12, 12]
    expected = clip.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_pseudo_words_that_are_word_embeddings_give_clips_own_text_features(stage1, clip, processor):
    """The functional text forward against CLIP's own: put real words where pseudo-words go."""
    batch = processor.compose(["red", ""])
    words = processor.tokenizer("that red", add_special_tokens=False).input_ids
    ids = batch["input_ids"].clone()
    ids[batch["pseudo_mask"]] = torch.tensor(words * 2)
    vectors = clip.text_model.embeddings.token_embedding(torch.tensor([words, words]))
    ours = stage1.encode_with_pseudo_words(batch["input_ids"], batch["pseudo_mask"], vectors)
    theirs = clip.get_text_features(input_ids=ids, attention_mask=batch["attention_mask"]).pooler_output
    torch.testing.assert_close(ours, torch.nn.functional.normalize(theirs, dim=-1), atol=1e-6, rtol=0)


@torch.no_grad()
def test_stage_two_starts_at_stage_one_to_the_bit(stage1, composed):
    before = stage1.get_composed_features(**composed)
    stage1.add_adapters()
    stage1.eval()
    assert torch.equal(stage1.get_composed_features(**composed), before)


@torch.no_grad()
def test_adapters_act_on_composed_queries_alone(stage2, composed):
    words = stage2.get_pseudo_words(*stage2.encode_image(composed["pixel_values"]))
    without = stage2.encode_with_pseudo_words(composed["input_ids"], composed["pseudo_mask"], words, adapters=False)
    stage2.config.residual = stage2.config.composed_weight = 0.0
    assert not torch.allclose(stage2.get_composed_features(**composed), without)
    for name, parameter in stage2.named_parameters():  # a stage I model with the same mapper
        if "lora_B" in name:
            parameter.zero_()
    assert torch.equal(stage2.get_composed_features(**composed), without)


@torch.no_grad()
def test_threads_that_encode_plain_and_composed_texts_do_not_disturb_each_other(stage2, processor, composed):
    texts = processor(text=TEXTS)
    plain, query = stage2.get_text_features(**texts), stage2.get_composed_features(**composed)
    wrong = []

    def work(function, inputs, expected):
        with torch.no_grad():
            for _ in range(40):
                if not torch.allclose(function(**inputs), expected, atol=1e-6):
                    wrong.append(function)

    jobs = [(stage2.get_text_features, texts, plain), (stage2.get_composed_features, composed, query)] * 2
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_a_batch_gives_what_each_row_gives_alone(stage2, processor, pictures):
    texts = ["red", "that is a longer one than the others", ""]
    together = stage2.get_composed_features(**processor(images=pictures[:3], text=texts))
    for i, text in enumerate(texts):
        alone = stage2.get_composed_features(**processor(images=pictures[i], text=text))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


def test_each_stage_trains_its_own_part_alone(stage0, processor, pictures, tensors_of):
    inputs = processor(images=pictures[:4], text=["red", "that", "red that", ""])
    targets = processor(images=pictures[2:6])["pixel_values"]
    for begin, marker in ((stage0.add_mapper, "mapper."), (stage0.add_adapters, ".lora_")):
        begin()
        before = tensors_of(stage0)
        trained = stage0.trainable_parameters()
        optimizer = torch.optim.AdamW(trained.values(), lr=0.01, weight_decay=0.1)
        for _ in range(3):
            stage0(**inputs, target_pixel_values=targets).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        changed = {k for k, v in stage0.state_dict().items() if not torch.equal(v, before[k])}
        assert changed == set(trained) == {k for k in before if marker in k}


@torch.no_grad()
def test_forward_returns_named_outputs(stage2, composed, processor, pictures):
    output = stage2(**composed, target_pixel_values=processor(images=pictures[2:4])["pixel_values"])
    assert isinstance(output, TSCIROutput)
    assert output.query_embeds.shape == output.target_embeds.shape == output.image_embeds.shape == (2, 24)
    assert output.pseudo_words.shape == (2, 2, 32)
    assert output.logits_per_query.shape == (2, 2)
    settings = stage2.config
    told = {"reference_weight": settings.reference_negative_weight, "gce_q": settings.gce_q}
    assert all(told.values())  # each of which counts
    parts = output.query_embeds, output.target_embeds, stage2.logit_scale
    for left_out in (None, *told):
        given = {name: value for name, value in told.items() if name != left_out}
        loss = composing_loss(*parts, reference_embeds=output.image_embeds, **given)
        assert torch.allclose(loss, output.loss) == (left_out is None), left_out
    assert torch.equal(output.query_embeds, stage2.get_composed_features(**composed))
    assert stage2(**composed).loss is None


def test_a_processor_of_another_number_of_pseudo_words_is_refused(stage1, clip_dir, pictures):
    other = TSCIRProcessor.from_clip_pretrained(clip_dir, num_pseudo_words=1)
    with pytest.raises(ValueError, match="num_pseudo_words=2"):
        stage1.get_composed_features(**other(images=pictures[:2], text=TEXTS))


def test_stages_come_in_order(clip_dir, stage1):
    with pytest.raises(ValueError, match=r"train/stage1\.py"):
        TSCIRModel.from_clip_pretrained(clip_dir).add_adapters()
    with pytest.raises(ValueError, match="already has a mapper"):
        stage1.add_mapper()
    stage1.add_adapters()
    with pytest.raises(ValueError, match="already has composing adapters"):
        stage1.add_adapters()


# ----- saving and loading


@pytest.mark.parametrize("form", ["full", "reference"])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_save_load_save_gives_the_same_tensors(stage, form, request, tmp_path, composed):
    model = request.getfixturevalue(stage)
    model.save_pretrained(tmp_path / "a", backbone=form)
    loaded = TSCIRModel.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b", backbone=form)
    # Who may read the configuration may read the weights.
    assert len({path.stat().st_mode for path in (tmp_path / "b").iterdir() if path.is_file()}) == 1
    again = TSCIRModel.from_pretrained(tmp_path / "b")
    for other in (loaded, again, AutoModel.from_pretrained(tmp_path / "b")):
        state = other.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert not other.training
    name = "model.safetensors" if form == "full" else "tscir_delta.safetensors"
    first, second = load_file(tmp_path / "a" / name), load_file(tmp_path / "b" / name)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    with torch.no_grad():
        expected = model.get_composed_features(**composed)
        torch.testing.assert_close(loaded.get_composed_features(**composed), expected, atol=1e-6, rtol=0)


def test_a_reference_holds_what_was_trained_alone(stage2, tmp_path):
    stage2.save_pretrained(tmp_path, backbone="reference")
    tensors = load_file(tmp_path / "tscir_delta.safetensors")
    assert tensors and all(k.startswith("mapper.") or ".lora_" in k for k in tensors)
    assert not (tmp_path / "model.safetensors").exists()
    stage2.save_pretrained(tmp_path, backbone="full")  # one form replaces the other
    assert not (tmp_path / "tscir_delta.safetensors").exists()
    with pytest.raises(ValueError, match="full"):
        stage2.save_pretrained(tmp_path, backbone="half")


def test_another_backbone_is_refused(stage2, clip_dir, tmp_path):
    other = tmp_path / "other"
    clip = CLIPModel.from_pretrained(clip_dir)
    with torch.no_grad():
        clip.text_projection.weight.mul_(1.01)
    clip.save_pretrained(other)
    stage2.config.backbone_name_or_path = str(other)
    stage2.save_pretrained(tmp_path / "a", backbone="reference")
    with pytest.raises(ValueError, match="another backbone"):
        TSCIRModel.from_pretrained(tmp_path / "a")
    stage2.save_pretrained(tmp_path / "whole", backbone="full")
    TSCIRModel.from_pretrained(tmp_path / "whole", backbone=clip_dir)
    with pytest.raises(ValueError, match="another backbone"):
        TSCIRModel.from_pretrained(tmp_path / "whole", backbone=other)
    stage2.config.backbone_name_or_path = str(tmp_path / "gone")
    stage2.save_pretrained(tmp_path / "a", backbone="reference")
    with pytest.raises(ValueError, match="cannot be found"):
        TSCIRModel.from_pretrained(tmp_path / "a")


def test_a_backbone_beside_the_checkpoint_is_found_from_any_directory(stage2, clip_dir, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "clip").symlink_to(clip_dir)
    stage2.config.backbone_name_or_path = "../clip"
    stage2.save_pretrained(tmp_path / "home" / "trained", backbone="reference")
    monkeypatch.chdir("/")
    assert TSCIRModel.from_pretrained(tmp_path / "home" / "trained").config.stage == 2


@pytest.mark.parametrize("form", ["full", "reference"])
def test_tensors_that_do_not_fit_the_config_are_named(form, stage1, tmp_path):
    stage1.save_pretrained(tmp_path, backbone=form)
    name = tmp_path / ("model.safetensors" if form == "full" else "tscir_delta.safetensors")
    tensors = load_file(name)
    del tensors["mapper.mlp.0.weight"]
    save_file(tensors, name, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"mapper\.mlp\.0\.weight"):
        TSCIRModel.from_pretrained(tmp_path)


def test_other_checkpoints_are_refused_with_the_way_out(clip_dir, stage1, tmp_path):
    with pytest.raises(ValueError, match=r"from_clip_pretrained.*train/stage1\.py"):
        TSCIRModel.from_pretrained(clip_dir)
    stage1.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"TSCIRModel\.from_pretrained"):
        TSCIRModel.from_clip_pretrained(tmp_path)


def test_pickles_are_not_read(clip, clip_dir, stage1, tmp_path):
    clip.config.save_pretrained(tmp_path / "clip")
    torch.save(clip.state_dict(), tmp_path / "clip" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no weights in safetensors"):
        TSCIRModel.from_clip_pretrained(tmp_path / "clip")
    stage1.save_pretrained(tmp_path / "full")
    (tmp_path / "full" / "model.safetensors").unlink()
    torch.save(stage1.state_dict(), tmp_path / "full" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        TSCIRModel.from_pretrained(tmp_path / "full")


@pytest.mark.parametrize("form", ["full", "reference"])
@torch.no_grad()
def test_half_precisions_and_attention_implementations(form, stage2, composed, tmp_path):
    expected = stage2.get_composed_features(**composed)
    stage2.save_pretrained(tmp_path, backbone=form)
    for dtype, least in ((torch.bfloat16, 0.99), (torch.float16, 0.999)):
        half = TSCIRModel.from_pretrained(tmp_path, dtype=dtype)
        assert {p.dtype for p in half.parameters()} == {dtype}
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in composed.items()}
        assert (half.get_composed_features(**inputs).float() * expected).sum(-1).min() > least
    for implementation in ("eager", "sdpa"):
        model = TSCIRModel.from_pretrained(tmp_path, attn_implementation=implementation)
        assert model.clip.text_model.config._attn_implementation == implementation
        torch.testing.assert_close(model.get_composed_features(**composed), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["full", "reference"])
@pytest.mark.parametrize("load", [TSCIRModel.from_pretrained, AutoModel.from_pretrained])
def test_both_forms_obey_or_refuse_the_same_arguments(form, load, stage2, tmp_path):
    stage2.save_pretrained(tmp_path, backbone=form)
    for told in ({"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}, {"torch_dtype": "bfloat16"}):
        assert {p.dtype for p in load(tmp_path, **told).parameters()} == {torch.bfloat16}
    other = load(tmp_path, residual=0.0, gce_q=0.5)
    assert (other.config.residual, other.config.gce_q) == (0.0, 0.5)
    assert load(tmp_path).config.residual == stage2.config.residual != 0
    for device in ("meta", torch.device("meta"), {"": "meta"}):
        assert load(tmp_path, device_map=device).device.type == "meta"
    assert load(tmp_path, device_map="auto").device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    model, info = load(tmp_path, output_loading_info=True)
    assert isinstance(model, TSCIRModel) and not info["missing_keys"] and not info["unexpected_keys"]
    with pytest.raises(ValueError, match="composed_weight must be between"):
        load(tmp_path, composed_weight=3.0)
    with pytest.raises(TypeError, match="residul"):
        load(tmp_path, residul=0.0)
    nothing = ("state_dict", "key_mapping", "generation_config", "gguf_file", "quantization_config", "device_map")
    assert isinstance(load(tmp_path, **dict.fromkeys(nothing), use_kernels=False), TSCIRModel)


@pytest.mark.parametrize("form", ["full", "reference"])
def test_a_configuration_may_be_named_by_its_folder(form, stage2, tmp_path):
    stage2.save_pretrained(tmp_path / "model", backbone=form)
    config = TSCIRConfig.from_pretrained(tmp_path / "model")
    config.residual = 0.25
    config.save_pretrained(tmp_path / "other")
    for given in (tmp_path / "other", str(tmp_path / "other"), config):
        assert TSCIRModel.from_pretrained(tmp_path / "model", config=given).config.residual == 0.25
    with pytest.raises(ValueError, match="dtype"):
        TSCIRModel.from_pretrained(tmp_path / "model", dtype="foo")


def test_a_folder_that_is_not_there_is_said_to_be_none(tmp_path):
    for path in (tmp_path / "nope", "./nope", "runs/no/pe"):
        with pytest.raises(OSError, match="there is no folder .*nope|there is no folder runs/no/pe"):
            TSCIRModel.from_pretrained(path)


def test_a_reference_is_put_onto_one_device_as_it_is(stage2, tmp_path):
    stage2.save_pretrained(tmp_path, backbone="reference")
    for told in ({"quantization_config": {"load_in_4bit": True}}, {"device_map": {"clip": 0, "mapper": "cpu"}}):
        with pytest.raises(ValueError, match=r'reference form.*save_pretrained\(FOLDER, backbone="full"\)'):
            TSCIRModel.from_pretrained(tmp_path, **told)


@pytest.mark.gpu
@torch.no_grad()
def test_fp16_on_gpu(stage2, composed, tmp_path):
    expected = stage2.get_composed_features(**composed)
    stage2.save_pretrained(tmp_path)
    half = TSCIRModel.from_pretrained(tmp_path, dtype=torch.float16).to("cuda")
    inputs = {k: (v.half() if v.is_floating_point() else v).to("cuda") for k, v in composed.items()}
    assert (half.get_composed_features(**inputs).float().cpu() * expected).sum(-1).min() > 0.999


def test_initialising_weights_leaves_adapters_an_identity(stage1, tmp_path, composed):
    """transformers' own initialisation would fill the adapters' zero matrices with noise."""
    config = copy.deepcopy(stage1.config)
    config.stage = 2
    fresh = TSCIRModel(config)
    assert all(not p.any() for n, p in fresh.named_parameters() if "lora_B" in n)
    assert all(p.any() for n, p in fresh.named_parameters() if "lora_A" in n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_of_its_configuration_alone_begins_as_trainings_do(stage1, pictures, processor, dtype):
    config = copy.deepcopy(stage1.config)
    config.clip_config.dtype = dtype
    for fresh in (TSCIRModel(config), AutoModel.from_config(config)):
        mapper = fresh.mapper
        assert not mapper.output_projection.weight.any() and 0.018 < mapper.mlp[-1].weight.std() < 0.022
        assert fresh.clip.dtype == mapper.mlp[0].weight.dtype
        with torch.no_grad():
            fresh.encode_reference(processor.pixel_values(pictures[:2]).to(fresh.dtype))


def test_beginning_a_mapper_leaves_what_a_seed_gives_next(stage1):
    """Such as the adapters of stage II, which are drawn behind a stage I that is loaded."""
    fresh = TSCIRModel(stage1.config)
    before, mapper = torch.get_rng_state(), fresh.mapper.mlp[0].weight
    with torch.no_grad():
        mapper.zero_()
    fresh.initialize_weights()
    assert mapper.any() and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("form", ["full", "reference"])
def test_weights_of_another_shape_than_the_config_says_are_named(form, stage2, tmp_path):
    stage2.save_pretrained(tmp_path, backbone=form)
    with pytest.raises(ValueError, match=r"config\.json.*lora_A"):
        TSCIRModel.from_pretrained(tmp_path, lora_rank=stage2.config.lora_rank + 1)
    with pytest.raises(ValueError, match="lora_rank must be a whole number, not 'a'"):
        TSCIRModel.from_pretrained(tmp_path, lora_rank="a")


def test_a_reference_without_its_weights_says_what_is_missing(stage2, tmp_path):
    stage2.save_pretrained(tmp_path, backbone="reference")
    (tmp_path / "tscir_delta.safetensors").unlink()
    with pytest.raises(OSError, match=r"neither model\.safetensors nor tscir_delta\.safetensors"):
        TSCIRModel.from_pretrained(tmp_path)


def test_processor_and_model_load_through_auto_classes(stage2, processor, tmp_path):
    stage2.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is TSCIRModel
    assert type(AutoProcessor.from_pretrained(tmp_path)) is TSCIRProcessor


@torch.no_grad()
def test_a_deep_copy_is_independent(stage2, composed):
    other = copy.deepcopy(stage2)
    other.mapper.mlp[0].weight.zero_()
    assert not torch.equal(other.get_composed_features(**composed), stage2.get_composed_features(**composed))
