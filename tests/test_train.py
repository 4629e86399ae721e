"""Both stages as a user runs them, on a small random CLIP and a few pictures."""

import json
import re

import loop
import numpy as np
import pytest
import stage1 as stage1_script
import stage2 as stage2_script
import torch
import yaml
from arguments import DataArguments
from conftest import WORDS, same
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from safetensors.torch import load_file

from modeling_tscir import BadImagesError, TSCIRConfig, TSCIRModel, TSCIRProcessor


def test_choices_that_a_folder_keeps_are_told(launch, stage1, processor, tmp_path, capsys):
    """As defaults may have changed since stage I was trained."""
    stage1.config.mined_negative_weight, stage1.config.gce_q = 1.0, 0.0
    stage1.save_pretrained(tmp_path / "given", backbone="reference")
    processor.save_pretrained(tmp_path / "given")
    flags = ["--max_steps", 1, "--gce_q", 0.5]
    launch(stage2_script, tmp_path / "given", tmp_path / "a", *flags)
    told = re.search("given keeps {(.*)}, other than today's defaults; flags change them", capsys.readouterr().out)[1]
    assert "'mined_negative_weight': 1.0" in told and "gce_q" not in told
    launch(stage2_script, tmp_path / "given", tmp_path / "b", *flags, "--mined_negative_weight", 1)
    assert "mined_negative_weight" not in capsys.readouterr().out


def test_both_stages_train_their_part_alone_and_load(launch, clip_dir, tmp_path, clip):
    mapper = launch(stage1_script, clip_dir, tmp_path / "one", "--max_steps", 4, "--num_pseudo_words", 2)
    assert all(k.startswith("mapper.") for k in mapper)
    both = launch(stage2_script, tmp_path / "one", tmp_path / "two", "--max_steps", 4, "--hard_negative_refresh", 2)
    assert all(torch.equal(both[k], v) for k, v in mapper.items())
    assert any(v.any() for k, v in both.items() if "lora_B" in k)
    model = TSCIRModel.from_pretrained(tmp_path / "two")
    state = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items()}
    assert all(torch.equal(state[f"clip.{k}"], v) for k, v in clip.state_dict().items())
    assert (model.config.stage, model.config.num_pseudo_words) == (2, 2)


def test_stage_two_goes_on_from_stage_two(launch, stage1_folder, tmp_path, capsys):
    first = launch(stage2_script, stage1_folder, tmp_path / "a", "--max_steps", 2, "--lora_rank", 2)
    flags = ["--max_steps", 1, "--learning_rate", 0]
    assert same(first, launch(stage2_script, tmp_path / "a", tmp_path / "b", *flags))
    assert "goes on with them" in capsys.readouterr().out
    assert not same(first, launch(stage2_script, tmp_path / "a", tmp_path / "c", "--max_steps", 3))
    with pytest.raises(ValueError, match="lora_rank 2 already"):
        launch(stage2_script, tmp_path / "a", tmp_path / "d", "--lora_rank", 4)


def test_prompts_and_where_adapters_are_can_be_chosen(launch, clip_dir, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    prompts = ["--image_template", "that {image}", "--prompt_template", "{image} , {text}"]
    launch(stage1_script, clip_dir, one, "--max_steps", 2, *prompts)
    assert TSCIRProcessor.from_pretrained(one).prompt_template == "{image} , {text}"
    launch(stage2_script, one, two / "kept", "--max_steps", 2)
    assert TSCIRProcessor.from_pretrained(two / "kept").prompt_template == "{image} , {text}"
    changed = ["--lora_target_modules", "q_proj", "fc1", "--prompt_template", "{image} that {text}"]
    trained = launch(stage2_script, one, two, "--max_steps", 2, *changed)
    assert {k.split(".")[-4] for k in trained if "lora_A" in k} == {"q_proj", "fc1"}
    processor = TSCIRProcessor.from_pretrained(two)
    assert (processor.image_template, processor.prompt_template) == ("that {image}", "{image} that {text}")
    with pytest.raises(ValueError, match="prompt_template needs one"):
        launch(stage2_script, one, tmp_path / "three", "--max_steps", 2, "--prompt_template", "no picture: {text}")
    with pytest.raises(ValueError, match="fc3"):
        launch(stage2_script, one, tmp_path / "three", "--max_steps", 2, "--lora_target_modules", "q_proj", "fc3")


def test_a_part_of_an_epoch_can_be_trained(launch, clip_dir, tmp_path, capsys):
    launch(stage1_script, clip_dir, tmp_path / "a", "--num_train_epochs", "0.5")
    assert "trained 2 steps" in capsys.readouterr().out  # of three an epoch


def test_training_lowers_the_loss(launch, clip_dir, tmp_path, capfd):
    launch(
        stage1_script, clip_dir, tmp_path / "one", "--max_steps", 40, "--learning_rate", "0.003", "--mapper_dropout", 0
    )
    lines = [line.split() for line in capfd.readouterr().err.splitlines() if line.strip().startswith("step ")]
    losses = [float(line[line.index("image_loss") + 1]) for line in lines]
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:3])
    for name in ("loss", "soft_alignment_loss", "learning_rate", "rows_per_second"):
        assert name in lines[0]


def test_a_line_of_the_log_is_the_mean_of_the_steps_since_the_last(launch, clip_dir, tmp_path, capfd):
    def losses(every: int) -> list[float]:
        launch(stage1_script, clip_dir, tmp_path / str(every), "--max_steps", 6, "--logging_steps", every)
        lines = [line.split() for line in capfd.readouterr().err.splitlines() if line.strip().startswith("step ")]
        return [float(line[line.index("image_loss") + 1]) for line in lines]

    each = losses(1)
    assert losses(3) == pytest.approx(np.reshape(each, (2, 3)).mean(1), rel=0.005)
    assert losses(4) == pytest.approx([np.mean(each[:4]), np.mean(each[4:])], rel=0.005)  # the last step has a line


def test_weights_decay_and_biases_do_not(launch, clip_dir, tmp_path):
    flags = ["--max_steps", 1, "--learning_rate", 0.01, "--warmup_steps", 0, "--weight_decay"]
    kept, decayed = (launch(stage1_script, clip_dir, tmp_path / str(share), *flags, share) for share in (0, 0.5))
    changed = {name for name in kept if not torch.equal(kept[name], decayed[name])}
    assert changed == {name for name in kept if kept[name].ndim > 1} - {"mapper.output_projection.weight"}  # zeros
    name = "mapper.mlp.0.weight"
    assert decayed[name].norm() == pytest.approx(kept[name].norm().item() * (1 - 0.01 * 0.5), rel=1e-3)


def test_gradients_are_clipped_where_they_are_longer_than_told(launch, clip_dir, tmp_path):
    flags = ["--max_steps", 3, "--max_grad_norm"]
    never, seldom, always = (launch(stage1_script, clip_dir, tmp_path / str(x), *flags, x) for x in (0, 1e9, 1e-6))
    assert same(never, seldom) and not same(never, always)


def test_dropout_is_another_in_every_batch_of_a_step(launch, clip_dir, tmp_path, monkeypatch):
    seeds, real = [], loop.backward
    monkeypatch.setattr(loop, "backward", lambda *given: seeds.append(given[-1]) or real(*given))
    flags = ["--max_steps", 3, "--gradient_accumulation_steps", 2]
    launch(stage1_script, clip_dir, tmp_path / "a", *flags)
    launch(stage1_script, clip_dir, tmp_path / "b", *flags, "--seed", 1)
    assert len(seeds) == len(set(seeds)) == 12


def test_a_loss_that_is_no_number_ends_a_run_and_keeps_what_was_good(launch, clip_dir, tmp_path):
    flags = ["--learning_rate", 1e9, "--max_steps", 9, "--warmup_steps", 3, "--save_steps", 1]
    flags += ["--lr_scheduler_type", "constant_with_warmup", "--max_grad_norm", 0]
    with pytest.raises(
        ValueError, match=r"(loss|gradient's norm) of step \d is (nan|inf): nothing is written.*--learning_rate"
    ):
        launch(stage1_script, clip_dir, tmp_path / "a", *flags)
    assert not (tmp_path / "a/tscir_delta.safetensors").exists()
    kept = sorted((tmp_path / "a").glob("checkpoint-*"))
    assert kept and all(t.isfinite().all() for t in load_file(kept[0] / "tscir_delta.safetensors").values())


def test_a_tracker_that_is_not_there_is_refused(launch, clip_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match="--report_to wandb is not installed"):
        launch(stage1_script, clip_dir, tmp_path / "a", "--max_steps", 1, "--report_to", "wandb")


def test_a_folder_that_cannot_be_written_is_refused_before_training(launch, clip_dir, tmp_path):
    (tmp_path / "taken").write_text("a file", "utf-8")
    for folder in (tmp_path / "taken", tmp_path / "taken/run"):
        with pytest.raises(ValueError, match=r"--output_dir .* cannot be used: .*taken is no folder; name another"):
            launch(stage1_script, clip_dir, folder, "--max_steps", 3)


def test_a_trained_model_is_not_written_over(launch, clip_dir, stage1_folder, tmp_path, capsys):
    launch(stage1_script, clip_dir, tmp_path / "run", "--max_steps", 1)
    assert f"trained 1 steps; written to {tmp_path / 'run'}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds a model, which .* write over: choose another --output_dir"):
        launch(stage1_script, clip_dir, tmp_path / "run", "--max_steps", 1)
    with pytest.raises(ValueError, match="holds a model, which this run would write over"):
        launch(stage2_script, stage1_folder, stage1_folder, "--max_steps", 1)


def test_a_column_that_was_named_and_is_not_there_is_an_error(launch, stage1_folder, tmp_path):
    for flag in ("--reference_id_column", "--target_id_column"):
        with pytest.raises(ValueError, match=rf"{flag} picture: .* has no such column; it has \['modification'"):
            launch(stage2_script, stage1_folder, tmp_path, flag, "picture")
    launch(stage2_script, stage1_folder, tmp_path / "none", "--reference_id_column", "", "--max_steps", 1)


@pytest.mark.parametrize(("flag", "expected"), [([], "bf16"), (["--mixed_precision", "no"], "no")])
def test_the_launchers_precision_is_taken_unless_told(launch, clip_dir, tmp_path, monkeypatch, flag, expected):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as accelerate launch and accelerate config set it
    launch(stage1_script, clip_dir, tmp_path, "--max_steps", 1, *flag)
    record = json.loads((tmp_path / "training_arguments.json").read_text("utf-8"))
    assert record["mixed_precision"] == expected


def test_bf16_clipping_tensorboard_and_workers(launch, clip_dir, tmp_path):
    flags = [
        "--mixed_precision",
        "bf16",
        "--max_grad_norm",
        0.1,
        "--report_to",
        "tensorboard",
        "--feature_cache_gb",
        0,
    ]
    tensors = launch(stage1_script, clip_dir, tmp_path, "--max_steps", 3, "--dataloader_num_workers", 1, *flags)
    assert all(torch.isfinite(v).all() and v.dtype == torch.float32 for v in tensors.values())
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_a_tracker_is_told_the_choices_of_the_method_and_the_data(launch, stage1_folder, data, tmp_path):
    """By which runs are compared, defaults included."""
    flags = ["--max_steps", 1, "--report_to", "tensorboard", "--lora_target_modules", "q_proj", "fc1"]
    launch(stage2_script, stage1_folder, tmp_path / "out", *flags, "--reference_negative_weight", 0.25)
    (told,) = (tmp_path / "out").rglob("hparams.yml")
    told = yaml.safe_load(told.read_text("utf-8"))
    assert told["reference_negative_weight"] == 0.25 and told["gce_q"] == TSCIRConfig().gce_q
    assert told["lora_target_modules"] == "q_proj fc1" and told["dataset_name"] == str(data / "triplets")
    assert told["learning_rate"] == 1e-3 and told["num_processes"] == 1


@pytest.mark.parametrize("stage", [1, 2])
def test_runs_in_bf16_validate_mine_chunk_and_resume(launch, clip_dir, stage1_folder, tmp_path, monkeypatch, stage):
    monkeypatch.setattr("gradients.bf16_is_fast", lambda device: True)
    script, start = {1: (stage1_script, clip_dir), 2: (stage2_script, stage1_folder)}[stage]
    flags = [
        "--mixed_precision",
        "bf16",
        "--max_steps",
        6,
        "--per_device_train_batch_size",
        4,
        "--save_total_limit",
        9,
    ]
    flags += ["--validation_rows", 8, "--eval_steps", 2] + ["--hard_negative_refresh", 1] * (stage == 2)
    whole = launch(script, start, tmp_path / "a", *flags, "--save_steps", 2)
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in whole.values())
    again = ["--resume_from_checkpoint", tmp_path / "a/checkpoint-2"]
    assert same(whole, launch(script, start, tmp_path / "b", *flags, *again))
    flags += ["--mapper_dropout", 0] * (stage == 1)  # which falls otherwise with chunks
    plain, chunked = (
        launch(script, start, tmp_path / name, *flags, "--gradient_cache_chunk", chunk)
        for name, chunk in (("c", 0), ("d", 3))
    )
    assert all(torch.allclose(plain[k], chunked[k], atol=0.02) for k in plain)
    assert TSCIRModel.from_pretrained(tmp_path / "a/best").config.stage == stage


def test_patches_beyond_the_budget_are_computed_again_to_the_same(data, stage0, processor):
    from datasets import load_dataset

    stage0.add_mapper()
    torch.nn.init.normal_(stage0.mapper.output_projection.weight)
    stage0.eval()
    rows = load_dataset(str(data / "captions"), split="train").cast_column("image", ImageFeature(decode=False))
    objective = stage1_script.Stage1Objective(stage0, processor)
    losses = []
    for budget in (1.0, 0.0):
        arguments = DataArguments(feature_cache_gb=budget, feature_batch_size=7)
        dataset = stage1_script.Stage1Data(rows, stage0, processor, arguments, stage1_script.Stage1Arguments())
        batch = dataset.__getitems__([3, 1, 20])
        assert ("patch_states" in batch, "pixel_values" in batch) == (budget > 0, budget == 0)
        features = objective.frozen(batch)
        losses.append(objective.loss(objective(features), features)["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # bf16 once, bf16 twice


def test_a_stage_two_batch_is_literally_this(data, stage1, processor):
    from datasets import load_dataset

    rows = load_dataset(str(data / "triplets"), split="train")
    for column in ("reference", "target"):
        rows = rows.cast_column(column, ImageFeature(decode=False))
    dataset = stage2_script.Stage2Data(rows, stage1, processor, DataArguments(), stage2_script.Stage2Arguments())
    batch = dataset.__getitems__([0, 3, 4])
    pictures = [[rows[i][c] for i in (0, 3, 4)] for c in ("reference", "target")]
    with torch.no_grad():
        v, patches = stage1.encode_image(processor(images=pictures[0])["pixel_values"])
        words = stage1.get_pseudo_words(v, patches)
        targets = stage1.encode_image(processor(images=pictures[1])["pixel_values"])[0]
    torch.testing.assert_close(batch["reference_embeds"], v, atol=1e-5, rtol=0)
    torch.testing.assert_close(batch["pseudo_words"], words, atol=1e-5, rtol=0)
    torch.testing.assert_close(batch["target_embeds"], targets, atol=1e-5, rtol=0)
    prompt = processor.compose([WORDS[0], WORDS[3], WORDS[4]])
    assert torch.equal(batch["input_ids"], prompt["input_ids"])
    assert torch.equal(batch["pseudo_mask"], prompt["pseudo_mask"])
    assert batch["rows"].tolist() == [0, 3, 4] and len(set(batch["target_ids"].tolist())) == 3


def test_bad_pictures_stop_a_run_before_it_starts_or_are_skipped(launch, clip_dir, data, tmp_path, monkeypatch):
    from datasets import load_dataset

    rows = (
        load_dataset(str(data / "captions"), split="train").cast_column("image", ImageFeature(decode=False)).to_list()
    )
    rows[5]["image"], rows[9]["image"] = {"bytes": b"nothing", "path": "5.jpg"}, {"bytes": b"", "path": None}
    features = Features({"image": ImageFeature(), "caption": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "captions" / "train.parquet")
    flags = ["--dataset_name", tmp_path / "captions", "--max_steps", 1]
    with pytest.raises(BadImagesError, match=r"(?s)2 of 24.*row 5, column image, 5\.jpg: .*row 9, column image: "):
        launch(stage1_script, clip_dir, tmp_path / "out", *flags)
    launch(stage1_script, clip_dir, tmp_path / "out", *flags, "--on_bad_image", "skip")
    report = json.loads((tmp_path / "out" / "training_arguments.json").read_text("utf-8"))
    assert [name for name, _ in report["skipped_images"]] == ["row 5, column image, 5.jpg", "row 9, column image"]
    assert report["soft_alignment_weight"] == TSCIRConfig().soft_alignment_weight  # what was not told, too


def test_wrong_starts_say_which_command_is_missing(launch, clip_dir, stage1_folder, stage2, processor, tmp_path):
    with pytest.raises(ValueError, match=r"train/stage1\.py"):
        launch(stage2_script, clip_dir, tmp_path / "out")
    with pytest.raises(ValueError, match=r"TSCIRModel\.from_pretrained"):
        launch(stage1_script, stage1_folder, tmp_path / "out")
    with pytest.raises(ValueError, match=r"lacks columns \['text \(its caption\)'\]"):
        launch(stage1_script, clip_dir, tmp_path / "out", "--caption_column", "text")
    with pytest.raises(ValueError, match="do not fill a batch"):
        launch(stage1_script, clip_dir, tmp_path / "out", "--per_device_train_batch_size", 25)


def test_a_warm_up_beyond_the_run_is_told(launch, clip_dir, tmp_path, capsys):
    launch(stage1_script, clip_dir, tmp_path, "--max_steps", 2, "--warmup_steps", 3)
    assert "--warmup_steps 3: the run has 2 steps, and never comes to --learning_rate" in capsys.readouterr().out
    launch(stage1_script, clip_dir, tmp_path / "whole", "--max_steps", 2, "--warmup_steps", 2)
    assert "--warmup_steps" not in capsys.readouterr().out
