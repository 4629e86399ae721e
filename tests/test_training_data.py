"""What training holds of its data: frozen features, kept between runs, and what tells rows apart."""

import copy
import io
import json

import pytest
import stage1 as stage1_script
import stage2 as stage2_script
import torch
from arguments import DataArguments
from conftest import noise, same
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from rows import hold_out
from safetensors.torch import load_file
from tokenizers import Tokenizer

from modeling_tscir import TSCIRConfig, TSCIRModel, TSCIRProcessor


def test_frozen_features_are_shared_between_runs(launch, clip_dir, tmp_path, monkeypatch):
    embedded = []
    for name in ("embed_images", "embed_images_with_patches", "embed_texts"):
        function = getattr(stage1_script, name)
        monkeypatch.setattr(
            stage1_script,
            name,
            lambda *args, function=function, name=name, **kwargs: embedded.append(name) or function(*args, **kwargs),
        )
    plain = ["--num_injection_blocks", 0, "--soft_alignment_weight", 0, "--max_steps", 3]
    cache = ["--feature_cache_dir", tmp_path / "cache"]
    launch(stage1_script, clip_dir, tmp_path / "alone", *plain)
    assert embedded == ["embed_images", "embed_texts"]
    launch(stage1_script, clip_dir, tmp_path / "full", "--max_steps", 1, *cache)
    assert embedded[2:] == ["embed_images_with_patches", "embed_texts"]
    launch(stage1_script, clip_dir, tmp_path / "shared", *plain, *cache)
    assert len(embedded) == 4
    alone, shared = (load_file(tmp_path / name / "tscir_delta.safetensors") for name in ("alone", "shared"))
    assert all(torch.equal(alone[key], shared[key]) for key in alone)


def test_triplets_are_embedded_once_for_several_runs(launch, stage1_folder, tmp_path, monkeypatch):
    embedded = []
    for name in ("embed_images", "embed_references"):
        function = getattr(stage2_script, name)
        monkeypatch.setattr(
            stage2_script,
            name,
            lambda *args, function=function, name=name, **kwargs: embedded.append(name) or function(*args, **kwargs),
        )
    flags = ["--max_steps", 2, "--feature_cache_dir", tmp_path / "cache", "--residual", 0, "--composed_weight", 0.1]
    tensors = [launch(stage2_script, stage1_folder, tmp_path / name, *flags) for name in ("a", "b")]
    assert embedded == ["embed_references", "embed_images"] and same(*tensors)
    config = TSCIRConfig.from_pretrained(tmp_path / "a")
    assert (config.residual, config.composed_weight) == (0, 0.1)  # what its queries are to be made of
    launch(stage2_script, stage1_folder, tmp_path / "c", "--max_steps", 1)
    assert len(embedded) == 4
    # Another mapper on the same backbone has the same targets and pseudo-words of its own.
    other = TSCIRModel.from_pretrained(stage1_folder)
    torch.nn.init.normal_(next(other.mapper.parameters()))
    other.save_pretrained(tmp_path / "other", backbone="reference")
    TSCIRProcessor.from_pretrained(stage1_folder).save_pretrained(tmp_path / "other")
    of_other = launch(stage2_script, tmp_path / "other", tmp_path / "d", *flags)
    assert embedded[4:] == ["embed_references"] and not same(of_other, tensors[0])


@pytest.mark.parametrize("stage", [1, 2])
def test_features_of_another_precision_are_not_taken(launch, clip_dir, stage1_folder, tmp_path, monkeypatch, stage):
    monkeypatch.setattr("gradients.bf16_is_fast", lambda device: True)
    script, start = {1: (stage1_script, clip_dir), 2: (stage2_script, stage1_folder)}[stage]
    flags, cache = ["--max_steps", 1, "--feature_cache_dir", tmp_path / "cache"], tmp_path / "cache"
    launch(script, start, tmp_path / "fp32", *flags)
    first = set(cache.iterdir())
    launch(script, start, tmp_path / "bf16", *flags, "--mixed_precision", "bf16")
    assert len(set(cache.iterdir()) - first) == len(first) > 2
    launch(script, start, tmp_path / "again", *flags, "--mixed_precision", "bf16")
    assert len(set(cache.iterdir()) - first) == len(first)


def test_edits_of_one_reference_share_batches_and_are_held_out_together(launch, stage1_folder, tmp_path, monkeypatch):
    parts, batches = [], []
    begin, negatives = stage2_script.Stage2Data.__init__, stage2_script.Miner.negatives

    def watched(self, *given):
        begin(self, *given)
        parts.append(self.groups)

    def batch(self, rows):
        batches.append({self.dataset.groups[row] for row in rows.tolist()})
        return negatives(self, rows)

    monkeypatch.setattr(stage2_script.Stage2Data, "__init__", watched)
    monkeypatch.setattr(stage2_script.Miner, "negatives", batch)
    launch(stage2_script, stage1_folder, tmp_path / "a", "--max_steps", 4, "--validation_rows", 5)
    trained, held_out = parts
    assert (len(trained), len(held_out)) == (16, 8) and not set(trained) & set(held_out)
    assert [len(references) for references in batches] == [2] * 4  # in batches of eight, of four edits each


@pytest.mark.parametrize(
    ("name", "value"), [("num_injection_heads", 2), ("mapper_activation", "relu"), ("mapper_input", "normalized")]
)
def test_pseudo_words_are_kept_by_how_the_mapper_computes(stage1, name, value):
    """Which its weights do not tell."""
    before = stage2_script.mapper_key(stage1)
    assert getattr(stage1.config, name) != value
    setattr(stage1.config, name, value)
    assert stage2_script.mapper_key(stage1) != before


def test_a_picture_that_changed_is_embedded_again(stage1, processor, tmp_path):
    """Triplets may name their pictures by path, and then nothing of the dataset changes with them."""
    files = [tmp_path / f"{number}.png" for number in range(4)]
    for number, file in enumerate(files):
        noise(number).save(file)
    features = Features({"reference": ImageFeature(), "modification": Value("string"), "target": ImageFeature()})
    pairs = {
        "reference": [str(f) for f in files[:2]],
        "target": [str(f) for f in files[2:]],
        "modification": ["a", "b"],
    }
    rows = Dataset.from_dict(pairs, features=features)
    rows = rows.cast_column("reference", ImageFeature(decode=False)).cast_column("target", ImageFeature(decode=False))
    cache = DataArguments(feature_cache_dir=str(tmp_path / "cache"))
    arguments = stage2_script.Stage2Arguments()
    before = stage2_script.Stage2Data(rows, stage1, processor, cache, arguments)
    noise(7).save(files[0])
    noise(8).save(files[3])
    after = stage2_script.Stage2Data(rows, stage1, processor, cache, arguments)
    true = stage2_script.Stage2Data(rows, stage1, processor, DataArguments(), arguments)
    for name in ("reference_embeds", "pseudo_words", "target_embeds"):
        assert torch.equal(getattr(after, name), getattr(true, name))
        assert not torch.equal(getattr(after, name), getattr(before, name))


def test_captions_are_embedded_again_by_another_tokenizer(stage1, processor, tmp_path):
    """As where a wrong one lay beside the weights and was put right; what was read last makes none another."""
    noise(0).save(tmp_path / "0.png")
    columns = {"image": [str(tmp_path / "0.png")] * 2, "caption": ["a red star", "a blue ring"]}
    rows = Dataset.from_dict(
        columns, features=Features({"image": ImageFeature(decode=False), "caption": Value("string")})
    )
    wrong = copy.deepcopy(processor)
    how = json.loads(wrong.tokenizer.backend_tokenizer.to_str())
    how["model"]["merges"] = []
    wrong.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(how))
    cache = DataArguments(feature_cache_dir=str(tmp_path / "cache"))

    def captions(processor: TSCIRProcessor, data: DataArguments) -> torch.Tensor:
        return stage1_script.Stage1Data(rows, stage1, processor, data, stage1_script.Stage1Arguments()).caption_embeds

    before, after = captions(wrong, cache), captions(processor, cache)
    assert torch.equal(after, captions(processor, DataArguments())) and not torch.equal(before, after)
    files = set((tmp_path / "cache").iterdir())
    processor.tokenizer(["a", "b c d"], padding=True, truncation=True)
    assert torch.equal(captions(processor, cache), after) and set((tmp_path / "cache").iterdir()) == files


def test_one_id_of_several_pictures_is_told(stage1, processor, tmp_path, caplog):
    def png(number: int) -> dict:
        content = io.BytesIO()
        Image.new("RGB", (36, 36), (number, 0, 0)).save(content, "PNG")
        return {"bytes": content.getvalue(), "path": None}

    columns = {"reference": [png(n) for n in (1, 1, 2, 3)], "target": [png(n) for n in (4, 5, 6, 7)]}
    columns |= {"modification": ["red"] * 4, "reference_id": ["a", "a", "a", "b"]}
    features = Features({n: ImageFeature(decode=False) if n in ("reference", "target") else Value("string")
                         for n in columns})  # fmt: skip
    rows = Dataset.from_dict(columns, features=features)
    arguments = stage2_script.Stage2Arguments()
    stage2_script.warn_of_pictures_of_one_id(rows, [0, 0, 0, 3], arguments)
    assert "1 rows have the reference_id of another row and another picture, as row 2 has row 0's" in caplog.text
    caplog.clear()
    stage2_script.warn_of_pictures_of_one_id(rows.select([0, 1, 3]), [0, 0, 2], arguments)
    assert not caplog.text


def test_ids_of_captions_targets_are_heeded_and_lists_are_no_ids(stage1, processor):
    columns = {"reference_caption": ["a", "b", "c"], "modification": ["red"] * 3, "target_caption": ["x", "y", "z"]}
    rows = Dataset.from_dict(columns | {"target_id": ["same", "same", "other"]})
    triplets = stage2_script.Stage2Data(rows, stage1, processor, DataArguments(), stage2_script.Stage2Arguments())
    assert triplets.target_ids.tolist() == [0, 0, 2]
    with pytest.raises(ValueError, match="column target_id holds no ids but List"):
        stage2_script.names_of(Dataset.from_dict({"target_id": [["a"], ["b"]], "x": ["a", "b"]}), "target_id", "x")


def test_rows_without_an_id_are_told_by_their_picture(pictures):
    def png(number: int) -> dict:
        return {"bytes": bytes([number]) * 9, "path": f"{number}.png"}

    columns = {"reference": [png(n) for n in (1, 2, 1, 3, 2, 1)], "reference_id": ["a", None, "a", None, None, None]}
    features = Features({"reference": ImageFeature(decode=False), "reference_id": Value("string")})
    rows = Dataset.from_dict(columns, features=features)
    arguments = stage2_script.Stage2Arguments()
    assert stage2_script.first_of_each(stage2_script.group_names(rows, arguments)) == [0, 1, 0, 3, 1, 5]
    blank = rows.map(lambda row: {"reference_id": row["reference_id"] or " "})
    assert stage2_script.first_of_each(stage2_script.group_names(blank, arguments)) == [0, 1, 0, 3, 1, 5]
    rows = rows.remove_columns("reference_id")
    names = stage2_script.group_names(rows, arguments)
    assert stage2_script.first_of_each(names) == [0, 1, 0, 3, 1, 0]
    kept, held = hold_out(rows, 2, seed=0, groups=names)
    assert not {p["path"] for p in kept["reference"]} & {p["path"] for p in held["reference"]}
    texts = Dataset.from_dict({"reference_caption": ["x", "y", "x"]})
    assert stage2_script.first_of_each(stage2_script.group_names(texts, arguments)) == [0, 1, 0]
