"""What a run writes to go on from, and what an interruption, a full disk or a moved folder leaves of it."""

import errno
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import stage1 as stage1_script
import stage2 as stage2_script
import torch
from accelerate import Accelerator
from checkpoints import find_checkpoint, list_checkpoints, save_checkpoint
from conftest import same

from modeling_tscir import TSCIRModel


def test_only_whole_checkpoints_are_found_the_newest_last(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint"):
        find_checkpoint(str(tmp_path), "latest")
    for name in ("checkpoint-20", "checkpoint-100", "unfinished-checkpoint-200", "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert [p.name for p in list_checkpoints(str(tmp_path))] == ["checkpoint-20", "checkpoint-100"]
    assert find_checkpoint(str(tmp_path), "latest").name == "checkpoint-100"
    with pytest.raises(ValueError, match=r"gone is no checkpoint$"):
        find_checkpoint(str(tmp_path), str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"is no checkpoint; the newest below it is .*checkpoint-100$"):
        find_checkpoint(str(tmp_path), str(tmp_path))


def test_checkpoints_hold_no_frozen_tensor_and_are_limited(launch, clip_dir, tmp_path):
    launch(stage1_script, clip_dir, tmp_path, "--max_steps", 5, "--save_steps", 1, "--save_total_limit", 2)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert not list(tmp_path.glob("*/model*.safetensors")) and not list(tmp_path.glob("unfinished-*"))
    assert TSCIRModel.from_pretrained(tmp_path / "checkpoint-4").config.stage == 1
    launch(stage1_script, clip_dir, tmp_path / "all", "--max_steps", 4, "--save_steps", 1, "--save_total_limit", 0)
    assert len(list((tmp_path / "all").glob("checkpoint-*"))) == 3


def test_a_run_killed_as_it_removes_checkpoints_leaves_no_half_of_one(tmp_path, monkeypatch):
    def save_state(folder: str) -> None:
        for name in ("weights", "state"):
            Path(folder).mkdir(exist_ok=True)
            Path(folder, name).write_text(folder, "utf-8")

    main = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None, save_state=save_state)
    rmtree, halves = shutil.rmtree, []

    def killed_halfway(folder, **options):
        if Path(folder).exists():
            Path(folder, "weights").unlink(missing_ok=True)
            halves.append(Path(folder).name)
            raise KeyboardInterrupt
        rmtree(folder, **options)

    for step in (2, 4, 6):
        save_checkpoint(main, str(tmp_path), step, 0)
    for step, limit in ((4, 3), (5, 1)):  # gone on from 2: written anew, and one before later ones
        monkeypatch.setattr(shutil, "rmtree", killed_halfway)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(main, str(tmp_path), step, limit)
        monkeypatch.undo()
        found = list_checkpoints(str(tmp_path))
        assert tmp_path / f"checkpoint-{step}" in found
        assert all({file.name for file in path.iterdir()} == {"weights", "state"} for path in found)
        save_checkpoint(main, str(tmp_path), 6, 0)
    assert len(halves) == 2
    (tmp_path / "replaced-checkpoint-1").mkdir()
    monkeypatch.setattr(os, "rmdir", lambda *given, **options: (_ for _ in ()).throw(OSError("still in use")))
    save_checkpoint(main, str(tmp_path), 7, 0)  # what cannot be removed, as on a network's disk, does not stop it
    monkeypatch.undo()
    save_checkpoint(main, str(tmp_path), 6, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6", "checkpoint-7"]


def test_a_full_disk_stops_a_run_and_keeps_the_last_good_checkpoint(launch, clip_dir, tmp_path, monkeypatch):
    whole = launch(stage1_script, clip_dir, tmp_path / "whole", "--max_steps", 6)
    save_state = Accelerator.save_state

    def full_at_the_third(self, folder):
        if folder.endswith("checkpoint-3"):
            Path(folder).mkdir(parents=True)
            (Path(folder) / "half").write_bytes(b"x")
            raise OSError(errno.ENOSPC, "No space left on device")
        return save_state(self, folder)

    monkeypatch.setattr(Accelerator, "save_state", full_at_the_third)
    flags = ["--max_steps", 6, "--save_steps", 1]
    with pytest.raises(SystemExit, match=r"(?s)step 3 .*No space left.*the last good one is .*checkpoint-2"):
        launch(stage1_script, clip_dir, tmp_path / "full", *flags)
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["checkpoint-1", "checkpoint-2"]
    monkeypatch.undo()
    flags += ["--resume_from_checkpoint", "latest"]
    assert same(whole, launch(stage1_script, clip_dir, tmp_path / "full", *flags))


def test_a_full_disk_at_the_end_is_told_as_one_before(launch, clip_dir, tmp_path, monkeypatch):
    flags = ["--max_steps", 3, "--save_steps", 2]
    save_pretrained = TSCIRModel.save_pretrained

    def full(self, folder, **kwargs):
        if Path(folder).name == "out":
            raise OSError(errno.ENOSPC, "No space left on device")
        return save_pretrained(self, folder, **kwargs)

    monkeypatch.setattr(TSCIRModel, "save_pretrained", full)
    with pytest.raises(SystemExit, match=r"(?s)the trained model could not .*No space left.*good one is .*point-2"):
        launch(stage1_script, clip_dir, tmp_path / "out", *flags)
    monkeypatch.undo()
    launch(stage1_script, clip_dir, tmp_path / "out", *flags, "--resume_from_checkpoint", "latest")


def test_the_checkpoint_just_written_stays_beside_later_ones(launch, clip_dir, tmp_path):
    """Which are there where a run goes on from an earlier one."""
    flags = ["--max_steps", 6, "--save_steps", 2, "--save_total_limit", 0]
    launch(stage1_script, clip_dir, tmp_path / "out", *flags)
    for limit, kept in ((1, [3]), (2, [3, 4])):
        shutil.copytree(tmp_path / "out", tmp_path / f"out-{limit}")
        accelerator = SimpleNamespace(
            is_main_process=True, wait_for_everyone=lambda: None, save_state=lambda folder: Path(folder).mkdir()
        )
        saved = save_checkpoint(accelerator, str(tmp_path / f"out-{limit}"), 3, limit)
        assert saved.is_dir()
        assert [int(p.name.split("-")[1]) for p in list_checkpoints(str(tmp_path / f"out-{limit}"))] == kept


def test_an_interrupt_behind_a_checkpoint_does_not_write_it_again(launch, clip_dir, tmp_path, monkeypatch):
    """As it would be deleted before, and the disk may be full by then."""
    save_state, saved = Accelerator.save_state, []

    def interrupted(self, folder):
        saved.append(folder)
        save_state(self, folder)
        if len(saved) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Accelerator, "save_state", interrupted)
    with pytest.raises(SystemExit) as ended:
        launch(stage1_script, clip_dir, tmp_path, "--max_steps", 6, "--save_steps", 2)
    assert ended.value.code == 130 and len(saved) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_checkpoint_that_is_written_again_stays_until_the_new_one_is_whole(launch, clip_dir, tmp_path, monkeypatch):
    flags = ["--max_steps", 6, "--save_steps", 2, "--save_total_limit", 0]
    launch(stage1_script, clip_dir, tmp_path, *flags)

    def full(self, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Accelerator, "save_state", full)
    with pytest.raises(SystemExit, match="the last good one is .*checkpoint-4"):
        launch(stage1_script, clip_dir, tmp_path, *flags, "--resume_from_checkpoint", tmp_path / "checkpoint-2")
    assert TSCIRModel.from_pretrained(tmp_path / "checkpoint-4").config.stage == 1


def test_where_the_best_weights_alone_are_left_there_is_nothing_to_go_on_from(launch, clip_dir, tmp_path):
    flags = ["--max_steps", 2, "--validation_rows", 4, "--eval_steps", 1]
    launch(stage1_script, clip_dir, tmp_path / "run", *flags)
    for path in (tmp_path / "run").iterdir():
        if path.name != "best":
            path.unlink()
    with pytest.raises(ValueError, match=r"holds best of an earlier run: choose another --output_dir, or remove it"):
        launch(stage1_script, clip_dir, tmp_path / "run", *flags)


class Code:
    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_nothing_in_a_checkpoint_is_executed(launch, clip_dir, tmp_path):
    """As of one that somebody else wrote; Accelerate reads such files by pickle."""
    flags = ["--max_steps", 3, "--save_steps", 2]
    launch(stage1_script, clip_dir, tmp_path / "run", *flags)
    torch.save(Code(tmp_path / "executed"), tmp_path / "run/checkpoint-2/custom_checkpoint_2.pkl")
    with pytest.raises(ValueError, match=r"custom_checkpoint_2\.pkl is damaged, or holds more than tensors"):
        launch(stage1_script, clip_dir, tmp_path / "run", *flags, "--resume_from_checkpoint", "latest")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("lost", ["unnamed", "elsewhere"])
def test_stage_two_from_a_whole_model_whose_backbone_cannot_be_found(
    launch, stage1, processor, tmp_path, lost, clip_dir
):
    """As a published one is, or a folder that was moved: what it trains must load."""
    stage1.config.backbone_name_or_path = None if lost == "unnamed" else str(tmp_path / "no/clip")
    stage1.save_pretrained(tmp_path / "whole", backbone="full")
    processor.save_pretrained(tmp_path / "whole")
    flags = ["--max_steps", 3, "--save_steps", 2, "--validation_rows", 4, "--eval_steps", 2]
    launch(stage2_script, tmp_path / "whole", tmp_path / "run", *flags)
    (tmp_path / "run").rename(tmp_path / "moved")
    for folder in ("moved", "moved/best", "moved/checkpoint-2"):
        model = TSCIRModel.from_pretrained(tmp_path / folder)
        clip = TSCIRModel.from_clip_pretrained(clip_dir).clip.state_dict()
        found = {k.replace(".base_layer", ""): v for k, v in model.clip.state_dict().items()}
        assert model.config.stage == 2 and all(torch.equal(found[k], v) for k, v in clip.items())


def test_stage_two_from_a_whole_model_whose_clip_is_no_longer_its_backbone(launch, stage1, processor, tmp_path):
    """As one that was tuned, or saved in half precision: what is trained on it must load with it."""
    with torch.no_grad():
        stage1.clip.text_projection.weight += 0.1
    stage1.save_pretrained(tmp_path / "whole", backbone="full")
    processor.save_pretrained(tmp_path / "whole")
    flags = ["--max_steps", 3, "--save_steps", 2]
    launch(stage2_script, tmp_path / "whole", tmp_path / "run", *flags)
    for folder in ("run", "run/checkpoint-2"):
        found = TSCIRModel.from_pretrained(tmp_path / folder).clip.text_projection.weight
        assert torch.equal(found, stage1.clip.text_projection.weight)
    launch(stage2_script, tmp_path / "whole", tmp_path / "run", *flags, "--resume_from_checkpoint", "latest")
