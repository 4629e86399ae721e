"""What several processes compute is what one computes on the joined batch; and no kill changes what comes of a run."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import loop
import numpy as np
import pytest
import shared
import torch
import torch.nn.functional as F
from arguments import LoopArguments
from conftest import ROOT, noise, randomised
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from shared import parts_of

from modeling_tscir.indexing import Processes


def torchrun(processes: int, *command) -> dict:
    """How to start it: gloo on loopback; bits depend on the number of threads, so every process has one."""
    env = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "train")]),
    }
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return {"args": [*launcher, *map(str, command)], "cwd": ROOT, "env": env, "text": True}


def run_to_its_end(processes: int, *command) -> None:
    result = subprocess.run(**torchrun(processes, *command), capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


def test_loss_and_gradients_of_two_processes_are_those_of_one(stage1, processor, pictures, tmp_path):
    """A batch of eight split over two processes: every query sees all targets, and gradients reach every row."""
    randomised(stage1.mapper.parameters(), 3)
    stage1.save_pretrained(tmp_path / "stage1")
    processor.save_pretrained(tmp_path / "stage1")
    generator = torch.Generator().manual_seed(0)

    def embeds(*shape: int) -> torch.Tensor:
        return F.normalize(torch.randn(*shape, generator=generator), dim=-1)

    images, prompt = embeds(8, 24), processor.compose(["red", "that", "a", "b", "c", "red that", "", "x y"])
    patches = torch.randn(8, 16, 40, generator=generator).bfloat16()
    first = {"image_embeds": images, "caption_embeds": embeds(8, 24), "patch_states": patches}
    second = {
        "rows": torch.arange(8), "pseudo_words": torch.randn(8, 2, 32, generator=generator),
        "reference_embeds": images, "target_embeds": embeds(8, 24),
        "target_ids": torch.tensor([0, 1, 2, 3, 0, 5, 6, 7]),
        "input_ids": prompt["input_ids"], "pseudo_mask": prompt["pseudo_mask"],
    }  # fmt: skip
    mined = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(8)])
    mask = torch.rand(8, 3, generator=generator) > 0.3
    torch.save({"1": first, "2": second, "mined": mined, "mask": mask}, tmp_path / "batches.pt")
    stage1.add_adapters()
    randomised(stage1.trainable_parameters().values(), 4)
    stage1.save_pretrained(tmp_path / "stage2")
    processor.save_pretrained(tmp_path / "stage2")
    for processes in (1, 2):
        run_to_its_end(processes, ROOT / "tests/two_processes.py", tmp_path)
    one, two = (load_file(tmp_path / f"gradients-{n}.safetensors") for n in (1, 2))
    assert one.keys() == two.keys() and {"1 chunk 0 loss", "2 chunk 3 loss"} < one.keys() and len(one) > 60
    for name, gradient in one.items():
        # Cached gradients, of a batch in chunks, are the same too, in one process and in two.
        expected = one[name.replace("chunk 3", "chunk 0")]
        for found in (gradient, two[name]):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert all(any(g.abs().max() > 1e-3 for n, g in one.items() if n.startswith(stage)) for stage in ("1", "2"))
    assert 0 < one["mined_dropped"] < 8 * 4  # and so are these, of all processes


def test_frozen_features_are_computed_once_by_two_processes(stage1, processor, tmp_path):
    """To the bit those of one, as every picture is in the batch it would be in alone."""
    stage1.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    files = [str(tmp_path / f"{i}.png") for i in range(30)]
    for i, file in enumerate(files):
        noise(i).save(file)
    texts = [f"text {i}" for i in range(24)]
    captions = {"image": files[:24], "caption": texts}
    triplets = {"reference": [files[24 + i // 4] for i in range(24)], "modification": texts, "target": files[:24]}
    for name, columns in (("captions", captions), ("triplets", triplets)):
        features = {k: Value("string") if v is texts else ImageFeature() for k, v in columns.items()}
        paths = {k: v if v is texts else [{"bytes": None, "path": file} for file in v] for k, v in columns.items()}
        Dataset.from_dict(paths, features=Features(features)).to_parquet(tmp_path / name / "train.parquet")
    for number in (5, 17):
        Path(files[number]).write_bytes(b"nothing")
    found = {}
    for run, processes, cache in (("alone", 1, ""), ("both", 2, tmp_path / "cache"), ("again", 2, tmp_path / "cache")):
        given = tmp_path, tmp_path / "model", cache, tmp_path / run
        run_to_its_end(processes, ROOT / "tests/two_processes_data.py", *given)
        found[run] = [load_file(tmp_path / f"{run}-{n}.safetensors") for n in range(processes)]
    (alone,) = found["alone"]
    assert alone["bad"].tolist() == [5, 17, 5, 17] and len(alone["image_embeds"]) == 22
    for one in found["both"] + found["again"]:
        assert all(torch.equal(one[name], tensor) for name, tensor in alone.items() if name != "decoded")
    counts = {run: [int(one["decoded"]) for one in several] for run, several in found.items()}
    assert counts["alone"] == [22 + 6 + 22] and counts["again"] == [0, 0]
    assert sum(counts["both"]) == 22 + 6 and min(counts["both"]) > 8  # targets are stage I's pictures


def test_parts_are_whole_batches_in_order():
    for count, size, processes in ((22, 4, 2), (100, 8, 3), (5, 8, 4), (0, 4, 2), (64, 64, 2)):
        parts = parts_of(count, size, processes)
        assert len(parts) == processes and [row for part in parts for row in part] == list(range(count))
        assert all(part.start % size == 0 for part in parts if part)


def test_rows_of_unequal_parts_are_put_together_piece_by_piece(monkeypatch):
    monkeypatch.setattr(shared, "BYTES_AT_A_TIME", 24)
    whole = torch.arange(28).reshape(14, 2).to(torch.bfloat16)
    lengths = [6, 5, 3]
    own = list(whole.split(lengths))
    sent = []

    def all_gather(piece):  # as the first process sees it: the others send their rows from the same place on
        first = sum(map(len, sent))
        sent.append(piece)
        padded = [torch.cat([part, torch.zeros(14, 2).to(part)]) for part in own]
        return torch.cat([part[first : first + len(piece)] for part in padded])

    monkeypatch.setattr(shared, "gather", all_gather)
    assert torch.equal(shared.together(own[0], lengths, torch.device("cpu")), whole)
    assert len(sent) == 1 and len(sent[0]) == 6
    monkeypatch.setattr(shared, "BYTES_AT_A_TIME", 8)
    sent.clear()
    assert torch.equal(shared.together(own[0], lengths, torch.device("cpu")), whole) and len(sent) == 3


def descendants(pid: int) -> list[int]:
    children = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()]
    return [*children, *(below for child in children for below in descendants(child))]


def run_and_kill(processes: int, rng: random.Random, *command) -> int:
    """Start a run and SIGKILL all of it at a random moment after its first step; 0 if it ended before."""
    with subprocess.Popen(
        **torchrun(processes, *command), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    ) as process:
        steps = rng.randint(1, 5)
        for line in process.stderr:
            steps -= bool(re.search(r"step \d+ ", line))
            if steps <= 0:
                time.sleep(rng.uniform(0, 0.1))  # in the middle of a step, or of writing a checkpoint
                break
        for pid in [process.pid, *descendants(process.pid)]:  # torchrun's workers have groups of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.stderr.read()
    return process.returncode


SLOW = {"marks": pytest.mark.slow}


@pytest.mark.parametrize(
    ("data", "processes", "kills"),
    [
        ("rows", 1, 3),
        ("stream", 2, 2),
        pytest.param("rows", 2, 2, **SLOW),
        pytest.param("rows", 1, 10, **SLOW),
        pytest.param("stream", 1, 10, **SLOW),
    ],
)
def test_a_run_killed_at_random_moments_ends_with_the_same_tensors(
    data, processes, kills, clip_dir, captions, tmp_path
):
    """With worker processes that decode, in the middle of epochs, checkpoints written at every step."""

    def command(output: str, *flags) -> list:
        parts = ["train/stage1.py", "--model_name_or_path", clip_dir, "--dataset_name", captions]
        parts += ["--output_dir", tmp_path / output, "--per_device_train_batch_size", 4, "--logging_steps", 1]
        parts += ["--feature_cache_gb", 0, "--dataloader_num_workers", 1, "--max_steps", 12 * kills]
        if data == "stream":
            parts += ["--streaming", "--shuffle_buffer_size", 5, "--dataloader_num_workers", 2]
        return [*parts, "--num_pseudo_words", 2, *flags]

    run_to_its_end(processes, *command("whole", "--save_steps", 0))
    rng, flags = random.Random(processes), []
    for _ in range(kills):
        assert run_and_kill(processes, rng, *command("killed", "--save_steps", 1, *flags)) == -signal.SIGKILL
        if list((tmp_path / "killed").glob("checkpoint-*")):
            flags = ["--resume_from_checkpoint", "latest"]
    assert flags
    run_to_its_end(processes, *command("killed", "--save_steps", 1, *flags))
    whole, killed = (load_file(tmp_path / name / "tscir_delta.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)


def test_a_signal_to_one_process_ends_both_with_a_checkpoint(clip_dir, data, tmp_path):
    """As it may come to one a step before the other."""
    command = [ROOT / "train/stage1.py", "--model_name_or_path", clip_dir, "--dataset_name", data / "captions"]
    command += ["--output_dir", tmp_path / "cut", "--per_device_train_batch_size", 4, "--max_steps", 3000]
    command += ["--save_steps", 0, "--logging_steps", 1]
    with subprocess.Popen(**torchrun(2, *command), stderr=subprocess.PIPE, start_new_session=True) as process:
        for line in process.stderr:
            if "step 3 " in line:
                workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text("ascii").split()
                os.kill(int(workers[-1]), signal.SIGINT)
                break
        try:
            rest = process.communicate(timeout=120)[1]
        except subprocess.TimeoutExpired:
            for pid in [process.pid, *descendants(process.pid)]:
                os.kill(pid, signal.SIGKILL)
            raise
    (checkpoint,) = (tmp_path / "cut").glob("checkpoint-*")
    assert process.returncode != 0 and int(checkpoint.name.split("-")[1]) < 3000, rest[-2000:]


@pytest.mark.slow
def test_two_processes_resume_stage_two_with_what_each_has_mined(data, stage1, processor, tmp_path):
    stage1.save_pretrained(tmp_path / "stage1", backbone="reference")
    processor.save_pretrained(tmp_path / "stage1")
    command = ["train/stage2.py", "--model_name_or_path", tmp_path / "stage1", "--dataset_name", data / "triplets"]
    command += ["--per_device_train_batch_size", 4, "--max_steps", 9, "--hard_negative_refresh", 2, "--save_steps", 3]
    run_to_its_end(2, *command, "--output_dir", tmp_path / "whole")
    for step in (3, 6):
        resume = ["--resume_from_checkpoint", tmp_path / f"whole/checkpoint-{step}"]
        run_to_its_end(2, *command, "--output_dir", tmp_path / f"from-{step}", *resume)
        whole, resumed = (load_file(tmp_path / name / "tscir_delta.safetensors") for name in ("whole", f"from-{step}"))
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.fixture
def captions(tmp_path):
    rng = np.random.default_rng(0)
    files = []
    for i in range(24):
        files.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(rng.integers(0, 256, (36, 36, 3), dtype=np.uint8)).save(files[-1])
    columns = {"image": files, "caption": [f"red {i}" for i in range(24)]}
    features = Features({"image": ImageFeature(), "caption": Value("string")})
    rows = Dataset.from_dict(columns, features=features)
    for shard in range(6):
        rows.shard(6, shard).to_parquet(tmp_path / "captions" / f"train-{shard}.parquet")
    return tmp_path / "captions"


def test_processes_wait_longer_than_any_works_by_itself(monkeypatch, tmp_path):
    """As one lists a folder of millions, or builds an index; torch's own patience is ten minutes on GPUs."""
    given = []

    def recorded(*places, **options):
        given.append(options)
        raise InterruptedError

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.PartialState", recorded)
    with pytest.raises(InterruptedError):
        Processes()
    monkeypatch.setattr(loop, "Accelerator", recorded)
    with pytest.raises(InterruptedError):
        loop.make_accelerator(LoopArguments(output_dir=str(tmp_path)))
    patience = [given[0]["timeout"], given[1]["kwargs_handlers"][0].timeout]
    assert min(patience) >= timedelta(hours=12)
