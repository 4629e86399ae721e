"""Runs that were stopped and go on: to the same tensors, from what is theirs alone."""

import json
import os
import shutil
import signal
import subprocess
import sys

import loop
import pytest
import stage1 as stage1_script
import stage2 as stage2_script
import torch
from conftest import ROOT, same
from datasets import load_dataset
from loop import Progress
from safetensors.torch import load_file


# Three and four batches an epoch, of which one and none are left over.
@pytest.mark.parametrize(("accumulation", "batch_size", "steps"), [(1, 8, 12), (2, 8, 4), (2, 6, 8)])
def test_a_resumed_run_ends_with_the_same_tensors(launch, clip_dir, tmp_path, accumulation, batch_size, steps):
    flags = ["--num_train_epochs", 4, "--gradient_accumulation_steps", accumulation, "--save_total_limit", 20]
    flags += ["--per_device_train_batch_size", batch_size]
    whole = launch(stage1_script, clip_dir, tmp_path / "a", *flags, "--save_steps", 1)
    assert len(list((tmp_path / "a").glob("checkpoint-*"))) == steps - 1
    for step in (1, steps // 2 + 1):
        resumed = launch(
            stage1_script, clip_dir, tmp_path / f"b{step}", *flags, "--save_steps", 0,
            "--resume_from_checkpoint", tmp_path / f"a/checkpoint-{step}",
        )  # fmt: skip
        assert same(whole, resumed)


@pytest.mark.parametrize(("accumulation", "batch_size", "from_steps"), [(1, 8, (3, 6, 8)), (2, 6, (3, 6))])
def test_a_resumed_stage_two_ends_with_the_same_tensors_mined_negatives_included(
    launch, stage1_folder, tmp_path, accumulation, batch_size, from_steps
):
    flags = ["--num_train_epochs", 4, "--hard_negative_refresh", 4 // accumulation, "--save_total_limit", 20]
    flags += ["--gradient_accumulation_steps", accumulation, "--per_device_train_batch_size", batch_size]
    flags += ["--lora_dropout", 0.2]
    whole = launch(stage2_script, stage1_folder, tmp_path / "a", *flags, "--save_steps", 1)
    for step in from_steps:
        resumed = launch(
            stage2_script, stage1_folder, tmp_path / f"b{step}", *flags, "--save_steps", 0,
            "--resume_from_checkpoint", tmp_path / f"a/checkpoint-{step}",
        )  # fmt: skip
        assert same(whole, resumed)


def test_a_run_does_not_go_on_from_another_model(launch, clip_dir, stage1, processor, clip, tmp_path):
    flags = ["--max_steps", 3, "--save_steps", 2]
    launch(stage1_script, clip_dir, tmp_path / "one", *flags)
    with torch.no_grad():
        clip.visual_projection.weight += 0.01
    clip.save_pretrained(tmp_path / "other_clip")
    processor.save_pretrained(tmp_path / "other_clip")
    again = ["--resume_from_checkpoint", "latest"]
    with pytest.raises(ValueError, match="checkpoint-2 was trained from another CLIP than --model_name_or_path has"):
        launch(stage1_script, tmp_path / "other_clip", tmp_path / "one", *flags, *again)
    launch(stage2_script, tmp_path / "one", tmp_path / "two", *flags)
    launch(stage1_script, clip_dir, tmp_path / "other", *flags, "--seed", 1)
    with pytest.raises(ValueError, match="checkpoint-2 was trained from another mapper than --model_name_or_path"):
        launch(stage2_script, tmp_path / "other", tmp_path / "two", *flags, *again)
    launch(stage2_script, tmp_path / "one", tmp_path / "two", *flags, *again)


@pytest.mark.parametrize(
    ("stage", "column"), [(1, "caption"), (2, "modification"), (2, "reference_id"), (2, "target_id")]
)
def test_a_run_does_not_go_on_with_texts_that_changed(launch, clip_dir, stage1_folder, data, tmp_path, stage, column):
    """As many as before, under the same name; the same in another place are taken."""
    script, start = {1: (stage1_script, clip_dir), 2: (stage2_script, stage1_folder)}[stage]
    rows = load_dataset(str(data / {1: "captions", 2: "triplets"}[stage]), split="train")
    if stage == 2:
        for name in ("reference_id", "target_id"):
            rows = rows.add_column(name, [str(n // 4) if name == "reference_id" else str(n) for n in range(24)])
    rows.to_parquet(tmp_path / "rows.parquet")
    flags = ["--max_steps", 3, "--save_steps", 2]
    launch(script, start, tmp_path / "a", *flags, "--dataset_name", tmp_path / "rows.parquet")
    (tmp_path / "rows.parquet").rename(tmp_path / "moved.parquet")
    changed = rows[column][:-1] + [rows[column][0]]
    rows.remove_columns(column).add_column(column, changed).to_parquet(tmp_path / "rows.parquet")
    again = [*flags, "--resume_from_checkpoint", "latest", "--dataset_name"]
    with pytest.raises(ValueError, match=r"texts or ids .* of the 24 rows are others than the run was begun with"):
        launch(script, start, tmp_path / "a", *again, tmp_path / "rows.parquet")
    launch(script, start, tmp_path / "a", *again, tmp_path / "moved.parquet")


def test_an_interrupt_keeps_no_weights_that_are_no_numbers(launch, clip_dir, tmp_path, monkeypatch):
    """Who sees such a loss presses Ctrl-C, and the last good checkpoint would make room."""
    came = []

    def came_to_any(self, step):
        came.append(step)
        return step == 5

    monkeypatch.setattr(loop.Interrupt, "came_to_any", came_to_any)
    add = loop.Log.add

    def spoil(self, terms):
        if "loss" in terms and len(came) >= 3:
            terms["loss"] = torch.tensor(float("nan"))
        add(self, terms)

    monkeypatch.setattr(loop.Log, "add", spoil)
    flags = ["--max_steps", 9, "--save_steps", 3, "--save_total_limit", 1, "--logging_steps", 100]
    with pytest.raises(ValueError, match="loss of step 5 is nan: nothing is written"):
        launch(stage1_script, clip_dir, tmp_path / "a", *flags)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["checkpoint-3"]


def test_a_run_does_not_go_on_among_another_ones_files(launch, clip_dir, tmp_path):
    flags = ["--max_steps", 3, "--save_steps", 2]
    launch(stage1_script, clip_dir, tmp_path / "a", *flags)
    launch(stage1_script, clip_dir, tmp_path / "other", *flags, "--seed", 5)
    before = (tmp_path / "other/tscir_delta.safetensors").read_bytes()
    again = ["--resume_from_checkpoint", tmp_path / "a/checkpoint-2"]
    with pytest.raises(ValueError, match="other holds checkpoint-2 of an earlier run"):
        launch(stage1_script, clip_dir, tmp_path / "other", *flags, *again)
    assert (tmp_path / "other/tscir_delta.safetensors").read_bytes() == before
    launch(stage1_script, clip_dir, tmp_path / "a", *flags, *again)


def test_the_best_weights_stay_where_a_checkpoint_from_before_knows_nothing_of_them(launch, clip_dir, tmp_path):
    flags = ["--max_steps", 6, "--validation_rows", 4, "--save_steps", 2]
    launch(stage1_script, clip_dir, tmp_path / "a", *flags, "--eval_steps", 3)
    told = tmp_path / "a/best/validation.json"
    best = json.loads(told.read_text("utf-8"))
    told.write_text(json.dumps(best | {"validation_mrr": 1.0, "step": 3}), "utf-8")  # better than any to come
    again = ["--resume_from_checkpoint", tmp_path / "a/checkpoint-2", "--eval_steps", 5]
    launch(stage1_script, clip_dir, tmp_path / "a", *flags, *again)
    assert json.loads(told.read_text("utf-8"))["step"] == 3


def test_a_run_that_goes_on_in_a_new_folder_keeps_its_best_there(launch, clip_dir, tmp_path):
    flags = ["--max_steps", 5, "--validation_rows", 4, "--eval_steps", 1, "--save_steps", 4]
    launch(stage1_script, clip_dir, tmp_path / "a", *flags)
    launch(stage1_script, clip_dir, tmp_path / "b", *flags, "--resume_from_checkpoint", tmp_path / "a/checkpoint-4")
    assert (tmp_path / "b/best/tscir_delta.safetensors").is_file()


def test_a_new_run_does_not_begin_among_an_old_ones_checkpoints(launch, clip_dir, tmp_path):
    launch(stage1_script, clip_dir, tmp_path, "--max_steps", 5, "--save_steps", 4)
    with pytest.raises(ValueError, match=r"holds checkpoint-4 of an earlier run: go on with it by --resume"):
        launch(stage1_script, clip_dir, tmp_path, "--max_steps", 3)
    again = ["--resume_from_checkpoint", "latest"]
    with pytest.raises(ValueError, match=r"run with other arguments: max_steps was 5, not 3; give those"):
        launch(stage1_script, clip_dir, tmp_path, "--max_steps", 3, *again)
    with pytest.raises(ValueError, match=r"other arguments: learning_rate was 0.001, not 0.1"):
        launch(stage1_script, clip_dir, tmp_path, "--max_steps", 5, "--learning_rate", 0.1, *again)
    (kept,) = (f for f in tmp_path.glob("checkpoint-4/custom_checkpoint_*.pkl") if b"settings" in f.read_bytes())
    state = torch.load(kept, weights_only=False)
    torch.save({k: v for k, v in state.items() if k != "settings"}, kept)  # as earlier versions wrote it
    with pytest.raises(ValueError, match=r"checkpoint-4 is at step 4, beyond the 3 steps"):
        launch(stage1_script, clip_dir, tmp_path, "--max_steps", 3, *again)
    with pytest.raises(ValueError, match="holds other tensors than this run trains"):
        launch(stage1_script, clip_dir, tmp_path, "--resume_from_checkpoint", "latest", "--num_pseudo_words", 2)


@pytest.mark.parametrize("flag", [["--learning_rate", 0.1], ["--validation_rows", 4], ["--gce_q", 0.1]])
def test_other_arguments_are_refused_before_features_are_computed(launch, stage1_folder, tmp_path, monkeypatch, flag):
    """Which may take hours."""
    launch(stage2_script, stage1_folder, tmp_path / "a", "--max_steps", 3, "--save_steps", 2)
    monkeypatch.setattr(stage2_script, "load_triplets", lambda *given: pytest.fail("the data was read"))
    again = ["--max_steps", 3, "--resume_from_checkpoint", "latest", *flag]
    with pytest.raises(ValueError, match=f"other arguments: {flag[0][2:]} was .*, not {flag[1]}; give those"):
        launch(stage2_script, stage1_folder, tmp_path / "a", *again)


def test_what_may_change_when_a_run_goes_on():
    settings = {"seed": 0, "num_processes": 1, "lora_target_modules": None, "output_dir": "a", "on_bad_image": "error"}
    state = Progress(settings).state_dict() | {"step": 7}
    again = Progress(settings | {"output_dir": "b", "on_bad_image": "skip", "an_argument_added_since": 3})
    again.load_state_dict(state)
    assert again.step == 7
    for change in ({"num_processes": 2}, {"seed": 1}, {"lora_target_modules": ["fc1"]}):
        with pytest.raises(ValueError, match=f"other arguments: {next(iter(change))} was"):
            Progress(settings | change).load_state_dict(state)


def test_an_interrupted_run_writes_its_checkpoint_before_it_waits_for_workers(launch, clip_dir, tmp_path, monkeypatch):
    """Each may take five seconds to be ended, and a scheduler waits for thirty in all."""
    done, from_step, save = [], loop.RowBatches.from_step, loop.save_checkpoint

    def watched(self, step):
        try:
            yield from from_step(self, step)
        finally:
            done.append("workers ended")

    monkeypatch.setattr(loop.RowBatches, "from_step", watched)
    monkeypatch.setattr(loop, "save_checkpoint", lambda *given: done.append("saved") or save(*given))
    monkeypatch.setattr(loop.Interrupt, "came_to_any", lambda self, step: step == 2)
    with pytest.raises(SystemExit) as ended:
        launch(stage1_script, clip_dir, tmp_path, "--max_steps", 9, "--save_steps", 0)
    assert ended.value.code == 130 and done == ["saved", "workers ended"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_signal_to_a_run_and_its_workers_leaves_a_checkpoint(clip_dir, data, tmp_path, streaming):
    """As torchrun and schedulers send it."""
    for shard in range(2):
        shutil.copy(data / "captions/train.parquet", tmp_path / f"{shard}.parquet")
    parts = [sys.executable, "train/stage1.py", "--model_name_or_path", clip_dir, "--output_dir", tmp_path / "out"]
    parts += ["--dataset_name", tmp_path / "*.parquet", "--per_device_train_batch_size", 8, "--logging_steps", 1]
    parts += ["--max_steps", 100_000, "--save_steps", 0, "--dataloader_num_workers", 2]
    parts += ["--streaming", "--shuffle_buffer_size", 4] if streaming else ["--feature_cache_gb", 0]
    with subprocess.Popen(
        list(map(str, parts)), cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        for line in process.stderr:
            if "step 3 " in line:
                os.killpg(process.pid, signal.SIGTERM)
                break
        rest = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode == 130 and len(list((tmp_path / "out").glob("checkpoint-*"))) == 1, rest[-2000:]


def test_ctrl_c_leaves_a_checkpoint_that_resumes_to_the_same_tensors(clip_dir, data, tmp_path):
    """All three runs are launched alike: bits depend on the number of threads, which the launcher sets."""

    def command(output: str, *flags) -> list[str]:
        parts = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "train/stage1.py"]
        parts += ["--model_name_or_path", clip_dir, "--dataset_name", data / "captions"]
        parts += ["--output_dir", tmp_path / output, "--per_device_train_batch_size", 8, "--logging_steps", 1]
        return [str(part) for part in (*parts, "--max_steps", 400, "--save_steps", 0, *flags)]

    subprocess.run(command("whole"), cwd=ROOT, check=True, capture_output=True)
    with subprocess.Popen(
        command("cut"), cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        for line in process.stderr:
            if "step 3 " in line:
                os.killpg(process.pid, signal.SIGINT)  # what a terminal does
                break
        rest = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode != 0
    assert len(list((tmp_path / "cut").glob("checkpoint-*"))) == 1, rest[-2000:]
    assert not (tmp_path / "cut" / "tscir_delta.safetensors").exists()
    subprocess.run(command("cut", "--resume_from_checkpoint", "latest"), cwd=ROOT, check=True, capture_output=True)
    whole, resumed = (load_file(tmp_path / name / "tscir_delta.safetensors") for name in ("whole", "cut"))
    assert same(whole, resumed)
