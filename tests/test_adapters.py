"""Several composing adapters in one model, in PEFT's own format."""

import json
import threading

import pytest
import torch
from conftest import randomised
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, pipeline

from modeling_tscir import ComposedImageRetrievalPipeline, TSCIRModel


# peft asks transformers by a deprecated name when it wraps a model itself, which only these tests do.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")


@pytest.fixture
def fashion(stage1, tmp_path):
    """A folder with an adapter of another rank, trained on the same mapper: PEFT's on the bare text tower."""
    generator = torch.Generator().manual_seed(5)
    clip = CLIPModel.from_pretrained(stage1.config.backbone_name_or_path)
    tower = get_peft_model(clip.text_model, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "fc1"]))
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    tower.save_pretrained(tmp_path / "fashion")
    return tmp_path / "fashion"


@pytest.fixture
def query(processor, pictures):
    return processor(images=pictures[:3], text=["red", "that", "b"])


def composed(model, query, **options):
    with torch.no_grad():
        return model.get_composed_features(**query, **options)


def test_each_call_has_its_own_adapter(stage2, fashion, query):
    own = composed(stage2, query)
    plain = stage2.get_text_features(query["modification_ids"])
    trained = {k for k, v in stage2.named_parameters() if v.requires_grad}
    stage2.load_adapter(fashion, "fashion")
    assert stage2.adapter_names == ["default", "fashion"] and stage2.active_adapter == "default"
    assert torch.equal(composed(stage2, query), own)
    other = composed(stage2, query, adapter="fashion")
    assert (other - own).abs().max() > 1e-3
    stage2.set_adapter("fashion")
    assert torch.equal(composed(stage2, query), other) and torch.equal(composed(stage2, query, adapter="default"), own)
    assert torch.equal(stage2.get_text_features(query["modification_ids"]), plain)
    stage2.disable_adapters()
    words = stage2.encode_reference(query["pixel_values"])[1]
    bare = stage2.encode_with_pseudo_words(query["input_ids"], query["pseudo_mask"], words, adapters=False)
    assert stage2.active_adapter is None and torch.equal(composed(stage2, query, residual=0, weight=0), bare)
    stage2.enable_adapters()
    assert torch.equal(composed(stage2, query), own)
    assert {k for k, v in stage2.named_parameters() if v.requires_grad} == trained
    assert all(".default." in name for name in stage2.trainable_parameters())
    stage2.set_adapter("fashion")
    stage2.delete_adapter("fashion")
    assert stage2.adapter_names == ["default"] and torch.equal(composed(stage2, query), own)
    with pytest.raises(ValueError, match="model's own"):
        stage2.delete_adapter("default")


def test_it_is_what_peft_computes_on_the_text_tower(stage1, fashion, query):
    """PEFT's own model, with pseudo-words put in by a hook, as an oracle."""
    before = composed(stage1, query)
    stage1.load_adapter(fashion, "fashion")
    assert stage1.config.stage == 2 and torch.equal(composed(stage1, query), before)  # its own adapter does nothing
    clip = CLIPModel.from_pretrained(stage1.config.backbone_name_or_path).eval()
    words = stage1.encode_reference(query["pixel_values"])[1]
    hook = clip.text_model.embeddings.token_embedding.register_forward_hook(
        lambda module, args, out: out.masked_scatter(query["pseudo_mask"].unsqueeze(-1), words)
    )
    tower = PeftModel.from_pretrained(clip.text_model, fashion).eval()
    with torch.no_grad():
        pooled = tower(input_ids=query["input_ids"]).pooler_output
        expected = torch.nn.functional.normalize(clip.text_projection(pooled), dim=-1)
    hook.remove()
    found = composed(stage1, query, adapter="fashion", residual=0, weight=0)
    assert torch.allclose(found, expected, atol=1e-6)


def test_it_is_written_as_peft_reads_it(stage2, stage1, query, clip, tmp_path):
    own = composed(stage2, query)
    stage2.save_adapter(tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    tower = PeftModel.from_pretrained(clip.text_model, tmp_path / "adapter")
    wanted = {k.replace(".default", ""): v for k, v in stage2.delta_state_dict().items() if ".lora_" in k}
    mine = {k.replace(".default", ""): v for k, v in tower.state_dict().items() if ".lora_" in k}
    assert len(mine) == len(wanted) > 0
    for name, tensor in wanted.items():
        assert torch.equal(mine[name.replace("clip.text_model.", "base_model.model.")], tensor), name
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == stage2.config.backbone_name_or_path
    fresh = TSCIRModel.from_clip_pretrained(stage2.config.backbone_name_or_path, num_pseudo_words=2)
    fresh.add_mapper()
    fresh.mapper.load_state_dict(stage2.mapper.state_dict())
    fresh.load_adapter(tmp_path / "adapter", "again")
    assert torch.equal(composed(fresh.eval(), query, adapter="again"), own)


@pytest.mark.parametrize("form", ["full", "reference"])
def test_further_adapters_are_saved_and_loaded_with_the_model(stage2, processor, fashion, query, tmp_path, form):
    stage2.load_adapter(fashion, "fashion")
    expected = {name: composed(stage2, query, adapter=name) for name in ("default", "fashion")}
    stage2.save_pretrained(tmp_path / "model", backbone=form)
    processor.save_pretrained(tmp_path / "model")
    again = TSCIRModel.from_pretrained(tmp_path / "model")
    assert again.adapter_names == ["default", "fashion"]
    for name, features in expected.items():
        assert torch.equal(composed(again, query, adapter=name), features)
    cir = pipeline("composed-image-retrieval", model=tmp_path / "model")
    assert cir.model.adapter_names == ["default", "fashion"]
    again.delete_adapter("fashion")
    again.save_pretrained(tmp_path / "model", backbone=form)
    assert not (tmp_path / "model/adapters").exists()
    assert TSCIRModel.from_pretrained(tmp_path / "model").adapter_names == ["default"]


def test_merging_gives_the_same_and_touches_no_weight(stage2, fashion, query, tensors_of, tmp_path):
    stage2.load_adapter(fashion, "fashion")
    before, own = tensors_of(stage2), composed(stage2, query)
    other = composed(stage2, query, adapter="fashion")
    stage2.merge_adapter("fashion")
    assert torch.allclose(composed(stage2, query, adapter="fashion"), other, atol=1e-6)
    assert not torch.equal(composed(stage2, query, adapter="fashion"), other)  # the copy answers
    assert torch.equal(composed(stage2, query), own)
    after = tensors_of(stage2)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    stage2.save_pretrained(tmp_path / "model")
    assert TSCIRModel.from_pretrained(tmp_path / "model").adapter_names == ["default", "fashion"]
    stage2.to(torch.bfloat16)
    assert (
        composed(stage2, {**query, "pixel_values": query["pixel_values"].bfloat16()}, adapter="fashion")
        .isfinite()
        .all()
    )


def test_the_adapter_that_acts_is_saved_unless_another_is_told(stage2, fashion, query, tmp_path):
    stage2.load_adapter(fashion, "fashion")
    stage2.set_adapter("fashion")
    stage2.save_adapter(tmp_path / "acting")
    stage2.save_adapter(tmp_path / "told", "default")
    stage2.load_adapter(tmp_path / "acting", "acting")
    stage2.load_adapter(tmp_path / "told", "told")
    assert torch.equal(composed(stage2, query, adapter="acting"), composed(stage2, query, adapter="fashion"))
    assert torch.equal(composed(stage2, query, adapter="told"), composed(stage2, query, adapter="default"))


def test_a_name_that_is_given_again_answers_as_its_new_adapter(stage2, fashion, query, tmp_path):
    """And not by the copy of the text tower that the one before was merged into."""
    stage2.load_adapter(fashion, "fashion")
    stage2.merge_adapter("fashion")
    stage2.delete_adapter("fashion")
    stage2.save_adapter(tmp_path / "own")
    stage2.load_adapter(tmp_path / "own", "fashion")
    assert torch.equal(composed(stage2, query, adapter="fashion"), composed(stage2, query))


def test_concurrent_calls_with_different_adapters(stage2, fashion, processor, picture_folder):
    stage2.load_adapter(fashion, "fashion")
    cir = ComposedImageRetrievalPipeline(model=stage2, processor=processor).index(picture_folder)
    picture = picture_folder / "0.png"

    def scores(adapter):
        return [r["score"] for r in cir(image=picture, text="red", adapter=adapter)]

    expected = {name: scores(name) for name in ("default", "fashion")}
    assert expected["default"] != expected["fashion"]
    wrong = []

    def ask(name):
        wrong.extend(name for _ in range(15) if scores(name) != pytest.approx(expected[name], abs=1e-6))

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("default", "fashion") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    with pytest.raises(ValueError, match=r"no composing adapter 'nope'; this model has \['default', 'fashion'\]"):
        scores("nope")


def test_refusals(stage0, stage2, fashion, clip, tmp_path):
    for name in ("a/b", "..", "a.b", "", "x" * 65):
        with pytest.raises(ValueError, match="adapter's name"):
            stage2.load_adapter(fashion, name)
    with pytest.raises(ValueError, match="already"):
        stage2.load_adapter(fashion, "default")
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        stage2.load_adapter(tmp_path, "a")
    with pytest.raises(ValueError, match="plain CLIP"):
        TSCIRModel.from_clip_pretrained(stage2.config.backbone_name_or_path).load_adapter(fashion, "a")
    # Only safetensors are read.
    weights = (fashion / "adapter_model.safetensors").read_bytes()
    tensors = load_file(fashion / "adapter_model.safetensors")
    (fashion / "adapter_model.safetensors").unlink()
    torch.save(tensors, fashion / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        stage2.load_adapter(fashion, "a")
    for damaged in (weights[:-100], b"\xff" * 8 + weights[8:], b""):
        (fashion / "adapter_model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            stage2.load_adapter(fashion, "a")
    some = dict(list(tensors.items())[1:])
    for wrong in (some, tensors | {"base_model.model.more": torch.zeros(1)}):
        save_file(wrong, fashion / "adapter_model.safetensors")
        with pytest.raises(ValueError, match="no adapter of this text tower"):
            stage2.load_adapter(fashion, "a")
    (fashion / "adapter_config.json").write_text("{nonsense", "utf-8")
    with pytest.raises(ValueError, match="no adapter's configuration"):
        stage2.load_adapter(fashion, "a")
    get_peft_model(clip.text_model, LoHaConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "loha")
    with pytest.raises(ValueError, match=r"'half' cannot be an adapter's name"):
        stage2.load_adapter(fashion, "half")
    with pytest.raises(ValueError, match="are LoRA"):
        stage2.load_adapter(tmp_path / "loha", "a")
    assert stage2.adapter_names == ["default"]


def test_one_of_another_mapper_or_backbone_is_refused(stage2, tmp_path):
    stage2.save_adapter(tmp_path / "adapter")
    own, stage2.config.backbone_fingerprint = stage2.config.backbone_fingerprint, "0" * 32
    with pytest.raises(ValueError, match="another backbone"):
        stage2.load_adapter(tmp_path / "adapter", "a")
    stage2.config.backbone_fingerprint = own
    randomised(stage2.mapper.parameters(), 9)
    with pytest.raises(ValueError, match="another mapper"):
        stage2.load_adapter(tmp_path / "adapter", "a")


def write_peft(clip, folder, trained=True, **config):
    """An adapter that PEFT alone wrote."""
    tower = get_peft_model(clip.text_model, LoraConfig(**{"r": 3, "target_modules": ["q_proj"], **config}))
    torch.manual_seed(6)
    for name, parameter in tower.named_parameters():
        if "lora_" in name and trained:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    tower.save_pretrained(folder)
    return folder


def test_dropout_sleeps_where_the_model_does(stage2, clip, query, tmp_path):
    stage2.load_adapter(write_peft(clip, tmp_path / "a", lora_dropout=0.5), "a")
    assert torch.equal(composed(stage2, query, adapter="a"), composed(stage2, query, adapter="a"))
    stage2.save_pretrained(tmp_path / "model")
    again = TSCIRModel.from_pretrained(tmp_path / "model")
    assert torch.equal(composed(again, query, adapter="a"), composed(stage2, query, adapter="a"))


@pytest.mark.parametrize("kind", ["pissa", "olora", "lora_ga", "gaussian"])
def test_the_frozen_tower_stays_however_an_adapter_was_begun(stage2, clip, tensors_of, tmp_path, kind):
    before = tensors_of(stage2)
    folder = write_peft(clip, tmp_path / "a", init_lora_weights="gaussian" if kind == "lora_ga" else kind)
    if kind == "lora_ga":  # which wants gradients to begin
        told = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        (folder / "adapter_config.json").write_text(json.dumps(told | {"init_lora_weights": kind}), "utf-8")
    if kind == "gaussian":
        stage2.load_adapter(folder, "a")
    else:
        with pytest.raises(ValueError, match="weights that PEFT changed"):
            stage2.load_adapter(folder, "a")
    after = tensors_of(stage2)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["final_layer_norm"]},
        {"target_modules": ["token_embedding"]},
        {"target_modules": ["q_proj", "position_embedding"]},
        {"trainable_token_indices": [1, 2]},
        {"bias": "all"},
        {"bias": "lora_only"},
        *([{"kasa_config": lora.KasaConfig()}] if hasattr(lora, "KasaConfig") else []),  # PEFT 0.20 has none
        {"alora_invocation_tokens": [3]},
    ],
)
def test_what_is_more_than_lora_is_refused_and_leaves_no_trace(stage1, clip, query, tensors_of, tmp_path, config):
    before, own = tensors_of(stage1), composed(stage1, query)
    marked = {k: v for k, v in config.items() if k == "alora_invocation_tokens"}  # which PEFT makes for chat models
    folder = write_peft(clip, tmp_path / "a", **({} if marked else config))
    if marked:
        told = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        (folder / "adapter_config.json").write_text(json.dumps(told | marked), "utf-8")
    with pytest.raises(ValueError, match=r"more|does not fit"):
        stage1.load_adapter(folder, "a")
    assert stage1.config.stage == 1 and stage1.adapter_names == [] and torch.equal(composed(stage1, query), own)
    after = tensors_of(stage1)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("form", ["full", "reference"])
def test_in_bf16_it_is_still_its_own_mapper(stage2, fashion, query, tmp_path, form):
    stage2.save_adapter(tmp_path / "adapter")
    stage2.load_adapter(tmp_path / "adapter", "again")
    stage2.save_pretrained(tmp_path / "model", backbone=form)
    for dtype in (torch.bfloat16, torch.float16):
        half = TSCIRModel.from_pretrained(tmp_path / "model", dtype=dtype)
        half.load_adapter(tmp_path / "adapter", "once-more")
        given = {**query, "pixel_values": query["pixel_values"].to(dtype)}
        assert torch.equal(composed(half, given, adapter="again"), composed(half, given))


def test_what_went_through_fp16_is_still_its_own_mapper(stage2, tmp_path):
    randomised(stage2.mapper.parameters(), 4)
    stage2.save_adapter(tmp_path / "adapter")
    stage2.half().save_pretrained(tmp_path / "model")
    for dtype in (torch.float32, torch.bfloat16):
        again = TSCIRModel.from_pretrained(tmp_path / "model", dtype=dtype)
        again.load_adapter(tmp_path / "adapter", "again")
    again = TSCIRModel.from_pretrained(tmp_path / "model", dtype=torch.float16).float()
    again.load_adapter(tmp_path / "adapter", "again")
    randomised(again.half().mapper.parameters(), 9)
    with pytest.raises(ValueError, match="another mapper"):
        again.load_adapter(tmp_path / "adapter", "other")


def test_an_adapter_from_before_fp16_was_told_fits_its_mapper(stage2, tmp_path):
    stage2.save_adapter(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    with safe_open(file, framework="pt") as opened:
        told = {k: v for k, v in opened.metadata().items() if k != "mapper_fingerprint_by_fp16"}
    save_file(load_file(file), file, metadata=told)
    stage2.half().load_adapter(tmp_path / "adapter", "again")
    randomised(stage2.float().mapper.parameters(), 9)
    with pytest.raises(ValueError, match="another mapper"):
        stage2.load_adapter(tmp_path / "adapter", "other")


def test_layers_that_only_a_further_adapter_has_are_saved(clip_dir, clip, query, tmp_path):
    stage0 = TSCIRModel.from_clip_pretrained(clip_dir, num_pseudo_words=2, lora_target_modules=["q_proj"])
    stage0.add_mapper()
    stage0.add_adapters()
    stage0.eval()
    stage0.load_adapter(write_peft(clip, tmp_path / "wide", target_modules=["q_proj", "fc1", "out_proj"]), "wide")
    stage0.save_pretrained(tmp_path / "model", backbone="full")
    again = TSCIRModel.from_pretrained(tmp_path / "model")
    for name in ("default", "wide"):
        assert torch.equal(composed(again, query, adapter=name), composed(stage0, query, adapter=name))
    again.delete_adapter("wide")
    again.save_pretrained(tmp_path / "less", backbone="full")
    less = TSCIRModel.from_pretrained(tmp_path / "less")
    assert torch.equal(composed(less, query), composed(stage0, query))


def test_an_adapter_is_not_written_into_a_models_folder(stage2, tmp_path):
    stage2.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="a folder of its own"):
        stage2.save_adapter(tmp_path / "model")
    (tmp_path / "model/adapter_config.json").write_text("{}", "utf-8")
    with pytest.raises(ValueError, match=r"load it with model.load_adapter\(FOLDER, NAME\)"):
        TSCIRModel.from_pretrained(tmp_path / "model")


def test_saving_leaves_folders_that_are_no_adapter_of_the_models(stage2, tmp_path):
    """Until now whatever lay in adapters/ was deleted without a word."""
    stage2.save_pretrained(tmp_path)
    stage2.save_adapter(tmp_path / "adapters/by-hand")
    stage2.save_pretrained(tmp_path)
    assert (tmp_path / "adapters/by-hand/adapter_config.json").is_file()


def test_where_no_adapter_acts_nothing_is_merged(stage1, query):
    before = composed(stage1, query)
    stage1.merge_adapter()
    assert not stage1._merged and torch.equal(composed(stage1, query), before)
    with pytest.raises(ValueError, match="no composing adapter 'default'"):
        stage1.merge_adapter("default")


def test_training_drops_merged_copies_and_names_do_not_clash_with_layers(stage2, fashion, query, processor):
    stage2.merge_adapter()
    stage2.train()
    stage2.trainable_parameters()
    assert stage2.get_composed_features(**query).requires_grad
    stage2.eval()
    stage2.load_adapter(fashion, "layers")
    trained = [name for name, p in stage2.named_parameters() if p.requires_grad]
    assert trained and all(".default." in name for name in trained)
    cir = ComposedImageRetrievalPipeline(model=stage2, processor=processor)
    with pytest.raises(ValueError, match="no composing adapter"):
        cir.run_single([["red"]], {}, {"adapter": "nope"}, {"embeds_only": True})
