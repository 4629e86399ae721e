"""Data read as it comes: every shard once an epoch, from any step on, in tar shards and in Parquet."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import stage1 as stage1_script
import torch
from arguments import DataArguments, LoopArguments
from conftest import ROOT
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from fake_hub import FakeHub, Repository
from PIL import Image
from safetensors.torch import load_file
from stage1 import CaptionedImages, Stage1Arguments
from stream import PROBLEM, ShardReader, StreamBatches, hold_out_shard, load_stream

from modeling_tscir import BadImagesError, TSCIRModel


SIZES = [9, 7, 12, 10, 11]  # rows of each shard


def encoded(number: int) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (36, 36, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for extension, content in files.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """The same 49 captioned pictures as tar shards and as Parquet files."""
    root = tmp_path_factory.mktemp("shards")
    (root / "tar").mkdir()
    number = 0
    for shard, size in enumerate(SIZES):
        numbers = range(number, number + size)
        write_tar(
            root / "tar" / f"{shard:05d}.tar",
            {f"{n:06d}": {"png": encoded(n), "txt": f"red {n}".encode()} for n in numbers},
        )
        rows = [{"image": {"bytes": encoded(n), "path": None}, "caption": f"red {n}"} for n in numbers]
        features = Features({"image": ImageFeature(), "caption": Value("string")})
        Dataset.from_list(rows, features=features).to_parquet(root / "parquet" / f"train-{shard}.parquet")
        number += size
    return root


def readers(shards: Path, processor, processes: int, workers: int, block_size: int = 5) -> list[ShardReader]:
    """Every worker's reader of every process."""
    rows = load_stream(DataArguments(dataset_name=str(shards / "parquet")), {"image": "", "caption": ""}, ["image"])
    args = Stage1Arguments()
    total = processes * workers
    return [
        ShardReader(rows, list(range(5)), CaptionedImages(processor, args), 3, block_size, 0, total, [(first, 0, 0)])
        for first in range(total)
    ]


@pytest.mark.parametrize(("processes", "workers"), [(1, 1), (2, 1), (2, 2)])
def test_every_row_is_read_once_an_epoch_by_one_worker(shards, processor, processes, workers):
    epochs: dict[int, list[str]] = {0: [], 1: []}
    for reader in readers(shards, processor, processes, workers):
        for number, _, example in reader.in_order(reader.places[0][0], 0):
            if number // 5 > 1:
                break
            epochs[number // 5].append(example["caption"])
    for captions in epochs.values():
        assert sorted(captions) == sorted(f"red {n}" for n in range(49))
    assert epochs[0] != epochs[1]  # the order of shards is each epoch's own


def test_blocks_are_shuffled_and_a_place_goes_on_exactly(shards, processor):
    (reader,) = readers(shards, processor, 1, 1, block_size=20)
    given = []
    for example, name, place in reader.shuffled(0, 0, 0):
        given.append((example["caption"], name, place))
        if len(given) == 120:
            break
    captions = [caption for caption, _, _ in given]
    assert sorted(captions[:40]) != captions[:40] and len(set(captions[:49])) < 49  # blocks go across epochs
    assert len(set(captions[:40])) == 40
    for stop in (1, 19, 20, 21, 60, 75):
        again = reader.shuffled(*given[stop - 1][2])
        assert [(e["caption"], name, place) for (e, name, place), _ in zip(again, range(40), strict=False)] == given[
            stop : stop + 40
        ]


def test_datasets_of_any_kind_give_the_same_rows(shards):
    found = []
    for name, columns in (
        (shards / "tar", ("png", "txt")),
        (shards / "tar" / "*.tar", ("png", "txt")),
        (shards / "parquet", ("image", "caption")),
        (shards / "parquet" / "*.parquet", ("image", "caption")),
    ):
        rows = load_stream(DataArguments(dataset_name=str(name)), dict.fromkeys(columns, ""), [columns[0]])
        assert rows.num_shards == 5
        found.append([(row[columns[0]]["bytes"], row[columns[1]]) for row in rows])
    assert all(rows == found[0] for rows in found) and len(found[0]) == 49


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_ends_with_the_same_tensors(launch, clip_dir, shards, tmp_path, workers):
    flags = ["--dataset_name", shards / "tar", "--image_column", "png", "--caption_column", "txt", "--streaming"]
    flags += ["--max_steps", 9, "--shuffle_buffer_size", 10, "--dataloader_num_workers", workers]
    flags += ["--validation_rows", 6, "--eval_steps", 4, "--save_total_limit", 20]
    whole = launch(stage1_script, clip_dir, tmp_path / "a", *flags, "--save_steps", 1)
    validation = (tmp_path / "a/best/validation.json").read_text("utf-8")
    for step in (1, 4, 7):
        resumed = launch(
            stage1_script, clip_dir, tmp_path / f"b{step}", *flags, "--save_steps", 0,
            "--resume_from_checkpoint", tmp_path / f"a/checkpoint-{step}",
        )  # fmt: skip
        assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert (
        json.loads(validation).keys() == json.loads((tmp_path / "b4/best/validation.json").read_text("utf-8")).keys()
    )
    assert TSCIRModel.from_pretrained(tmp_path / "a/best").config.stage == 1


@pytest.mark.parametrize(("kind", "columns"), [("tar", ("png", "txt")), ("parquet", ("image", "caption"))])
def test_a_stream_from_the_hub_trains_as_one_from_files(launch, clip_dir, shards, tmp_path, kind, columns):
    """Shards fetched over HTTP as they are needed, by worker processes, and a run that goes on; fresh processes, as a
    Hub's address is read once."""
    flags = ["--image_column", columns[0], "--caption_column", columns[1], "--streaming", "--max_steps", 5]
    flags += ["--shuffle_buffer_size", 10, "--dataloader_num_workers", 2, "--save_steps", 2]
    local = launch(stage1_script, clip_dir, tmp_path / "local", "--dataset_name", shards / kind, *flags)
    with FakeHub() as hub:
        hub.repos["alice/captions"] = Repository(private=True)
        # As `push_to_hub` names them. Of names that say "train" twice, datasets 5.2 reads each file twice.
        names = [f"data/train-{i:05d}-of-00005.{kind}" for i in range(5)]
        files = [file.read_bytes() for file in sorted((shards / kind).iterdir())]
        hub.repos["alice/captions"].commit("main", dict(zip(names, files, strict=True)))
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_alice"}
        command = [sys.executable, ROOT / "train/stage1.py", "--model_name_or_path", clip_dir, *flags]
        command += ["--per_device_train_batch_size", 8, "--logging_steps", 1]
        for more in ([], ["--resume_from_checkpoint", tmp_path / "hub/checkpoint-2"]):
            command += ["--dataset_name", "alice/captions", "--output_dir", tmp_path / "hub", *more]
            subprocess.run([str(part) for part in command], env=environment, check=True, capture_output=True)
            fetched = load_file(tmp_path / "hub/tscir_delta.safetensors")
            assert fetched.keys() == local.keys() and all(torch.equal(fetched[k], local[k]) for k in local)
        assert all(any(request.endswith(name) for request in hub.requests) for name in names)


def test_a_stream_trains_as_rows_do(launch, clip_dir, shards, tmp_path, processor, stage1):
    """The same pictures and captions give the same features, whether they were computed before or as they come."""
    examples = CaptionedImages(processor, Stage1Arguments())
    rows = [{"image": {"bytes": encoded(n), "path": None}, "caption": f"red {n}"} for n in range(6)]
    assert [examples.decode(row) for row in rows] == [None] * 6
    features = stage1_script.Stage1Objective(stage1, processor).frozen(examples.make_batch(rows))
    stored = Dataset.from_list(
        [{"image": {"bytes": encoded(n), "path": None}, "caption": f"red {n}"} for n in range(6)],
        features=Features({"image": ImageFeature(decode=False), "caption": Value("string")}),
    )
    known = stage1_script.Stage1Data(stored, stage1, processor, DataArguments(), Stage1Arguments())
    for name, tensor in known.__getitems__(list(range(6))).items():
        torch.testing.assert_close(features[name], tensor, atol=1e-2, rtol=1e-2, check_dtype=False)


def test_bad_rows_of_a_stream_are_named_or_skipped_and_recorded(launch, clip_dir, tmp_path):
    good = {"png": encoded(0), "txt": b"red"}
    for shard in range(2):
        samples = {f"{shard}-{n}": good for n in range(10)}
        samples[f"{shard}-4"] = {"png": b"nothing", "txt": b"red"}
        write_tar(tmp_path / f"{shard}.tar", samples)
    flags = ["--dataset_name", tmp_path / "*.tar", "--image_column", "png", "--caption_column", "txt", "--streaming"]
    flags += ["--max_steps", 3, "--shuffle_buffer_size", 4]
    with pytest.raises(BadImagesError, match=r"\d\.tar, row 4, key \d-4: not a picture"):
        launch(stage1_script, clip_dir, tmp_path / "out", *flags)
    launch(stage1_script, clip_dir, tmp_path / "out", *flags, "--on_bad_image", "skip")
    record = json.loads((tmp_path / "out/training_arguments.json").read_text("utf-8"))
    assert sorted(Path(name).name for name, _ in record["skipped_images"]) == [
        "0.tar, row 4, key 0-4",
        "1.tar, row 4, key 1-4",
    ]


def test_a_shard_that_ends_too_early_is_named_or_left(launch, clip_dir, shards, tmp_path):
    """What stands before the damage is read, and the next shard after it."""
    for n in range(3):
        content = (shards / f"tar/0000{n}.tar").read_bytes()
        (tmp_path / f"{n}.tar").write_bytes(content[: len(content) - 20_000] if n == 1 else content)
    flags = ["--dataset_name", tmp_path / "*.tar", "--image_column", "png", "--caption_column", "txt", "--streaming"]
    flags += ["--max_steps", 8, "--per_device_train_batch_size", 4, "--shuffle_buffer_size", 4]
    with pytest.raises(BadImagesError, match=r"1\.tar, row \d: the shard cannot be read any further: unexpected end"):
        launch(stage1_script, clip_dir, tmp_path / "out", *flags)
    launch(stage1_script, clip_dir, tmp_path / "out", *flags, "--on_bad_image", "skip")
    record = json.loads((tmp_path / "out/training_arguments.json").read_text("utf-8"))
    assert len(record["skipped_images"]) == 1


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_shard_without_a_readable_row_is_named_by_its_path(launch, clip_dir, shards, tmp_path, kind):
    for n in range(3):
        content = next((shards / kind).glob(f"*{n}.{kind}")).read_bytes()
        (tmp_path / f"train-{n}.{kind}").write_bytes(content[:100] if n == 2 else content)
    columns = {"tar": ("png", "txt"), "parquet": ("image", "caption")}[kind]
    flags = ["--dataset_name", tmp_path / f"*.{kind}", "--image_column", columns[0], "--caption_column", columns[1]]
    flags += ["--streaming", "--max_steps", 8, "--per_device_train_batch_size", 4, "--shuffle_buffer_size", 4]
    with pytest.raises(BadImagesError, match=rf"{tmp_path}/train-2\.{kind}, row 0: the shard cannot be read any"):
        launch(stage1_script, clip_dir, tmp_path / "out", *flags)


def test_a_shard_of_another_form_is_named_or_left(tmp_path):
    """Whatever `datasets` raises over it: a TypeError here."""
    for n, caption in enumerate(("red", ["red"])):
        lines = [json.dumps({"image": "a.png", "caption": caption})] * 3
        (tmp_path / f"{n}.jsonl").write_text("\n".join(lines), "utf-8")
    rows = load_stream(DataArguments(dataset_name=str(tmp_path / "*.jsonl")), {"image": "", "caption": ""}, ["image"])
    reader = ShardReader(rows, [0, 1], None, 3, 3, 0, 1, [(0, 0, 0)])
    problems = [example for _, (_, _, example) in zip(range(8), reader.in_order(0, 0), strict=False)]
    problems = [example for example in problems if PROBLEM in example]
    assert problems and all(example["__url__"] == str(tmp_path / "1.jsonl") for example in problems)
    assert "any further: Couldn't cast array of type list" in problems[0][PROBLEM]


def test_rows_of_a_stream_are_named_by_their_file(launch, clip_dir, tmp_path):
    """A Parquet stream says nothing of it by itself."""
    for n in range(2):
        rows = [{"image": {"bytes": encoded(row), "path": None}, "caption": "red"} for row in range(6)]
        rows[3]["caption"] = " " if n else "red"
        features = Features({"image": ImageFeature(), "caption": Value("string")})
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / f"{n}.parquet")
    flags = ["--dataset_name", tmp_path / "*.parquet", "--streaming", "--max_steps", 2, "--shuffle_buffer_size", 4]
    with pytest.raises(BadImagesError, match=rf"{tmp_path}/1\.parquet, row 3: no text in column caption"):
        launch(stage1_script, clip_dir, tmp_path / "out", *flags)


def test_a_held_out_shard_of_fewer_rows_is_told(launch, clip_dir, shards, tmp_path, caplog):
    flags = ["--dataset_name", shards / "parquet", "--streaming", "--max_steps", 1, "--shuffle_buffer_size", 4]
    launch(stage1_script, clip_dir, tmp_path / "a", *flags, "--validation_rows", 7)
    assert "--validation_rows" not in caplog.text
    launch(stage1_script, clip_dir, tmp_path / "b", *flags, "--validation_rows", 100)
    told = r"--validation_rows 100: .*parquet/train-\d\.parquet, the shard held out, has \d+ rows, and no other is"
    assert re.search(told, caplog.text)


def test_a_shard_that_is_damaged_may_come_twice_in_a_row(launch, clip_dir, shards, tmp_path):
    """As the order of shards is another each epoch."""
    for n, kept in ((0, None), (1, 100)):
        (tmp_path / f"{n}.tar").write_bytes((shards / f"tar/0000{n}.tar").read_bytes()[:kept])
    flags = ["--dataset_name", tmp_path / "*.tar", "--image_column", "png", "--caption_column", "txt", "--streaming"]
    flags += ["--max_steps", 12, "--per_device_train_batch_size", 4, "--shuffle_buffer_size", 4]
    flags += ["--on_bad_image", "skip"]
    for seed in range(3):
        launch(stage1_script, clip_dir, tmp_path / f"run{seed}", *flags, "--seed", seed)


def test_texts_and_pictures_that_are_not_there_are_bad_rows(processor):
    examples = CaptionedImages(processor, Stage1Arguments())
    picture = {"bytes": encoded(0), "path": None}
    for text in (None, "", " \n"):
        assert examples.decode({"image": picture, "caption": text}) == "no text in column caption"
    assert "another name" in examples.decode({"image": None, "caption": "red"})


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_without_a_usable_row_ends(launch, clip_dir, tmp_path, workers):
    write_tar(tmp_path / "0.tar", {str(n): {"png": b"nothing", "txt": b"red"} for n in range(10)})
    flags = ["--dataset_name", tmp_path / "0.tar", "--image_column", "png", "--caption_column", "txt", "--streaming"]
    flags += ["--max_steps", 2, "--shuffle_buffer_size", 8, "--dataloader_num_workers", workers]
    with pytest.raises(BadImagesError, match="0.tar, row 7"):
        launch(stage1_script, clip_dir, tmp_path / "out", *flags, "--on_bad_image", "skip")


def test_mistakes_are_named(launch, clip_dir, shards, tmp_path):
    flags = ["--dataset_name", shards / "parquet", "--streaming"]
    with pytest.raises(ValueError, match="--max_steps"):
        launch(stage1_script, clip_dir, tmp_path, *flags)
    flags += ["--max_steps", 2]
    with pytest.raises(ValueError, match=r"nowhere/\*\.tar, split train, cannot be loaded, or is empty"):
        launch(stage1_script, clip_dir, tmp_path, *flags, "--dataset_name", "nowhere/*.tar")
    with pytest.raises(ValueError, match=r"lacks columns \['text \(its caption\)'\]; it has \['image', 'caption'\]"):
        launch(stage1_script, clip_dir, tmp_path, *flags, "--caption_column", "text")
    with pytest.raises(ValueError, match=r"5 shards do not feed 1 processes with 6 workers"):
        launch(stage1_script, clip_dir, tmp_path, *flags, "--dataloader_num_workers", 6)
    launch(stage1_script, clip_dir, tmp_path, *flags, "--save_steps", 1)
    with pytest.raises(ValueError, match="workers 1 before and 2 now"):
        launch(
            stage1_script, clip_dir, tmp_path, *flags, "--dataloader_num_workers", 2,
            "--resume_from_checkpoint", "latest",
        )  # fmt: skip
    with pytest.raises(ValueError, match="other arguments: seed was 0, not 1"):
        launch(stage1_script, clip_dir, tmp_path, *flags, "--seed", 1, "--resume_from_checkpoint", "latest")
    rows = load_stream(DataArguments(dataset_name=str(shards / "tar" / "00000.tar")), {"png": ""}, ["png"])
    with pytest.raises(ValueError, match="one shard alone"):
        hold_out_shard(rows, 0)


def test_nothing_of_a_stream_is_read_ahead_of_its_record(shards, processor):
    """What workers read ahead of the step that a checkpoint is of is read again."""

    class Alone:
        num_processes, process_index, device = 1, 0, torch.device("cpu")

    rows = load_stream(DataArguments(dataset_name=str(shards / "parquet")), {"image": "", "caption": ""}, ["image"])
    args = LoopArguments(per_device_train_batch_size=3, dataloader_num_workers=2)

    def stream() -> StreamBatches:
        return StreamBatches(
            Alone, rows, list(range(5)), CaptionedImages(processor, Stage1Arguments()), args, 7, "error"
        )

    whole = stream()
    batches = whole.from_step(0)
    first = [next(batches)["pixel_values"] for _ in range(5)]
    state = whole.state_dict()
    rest = [next(batches)["pixel_values"] for _ in range(6)]
    other = stream()
    other.load_state_dict(state)
    batches = other.from_step(5)
    assert all(torch.equal(next(batches)["pixel_values"], expected) for expected in rest)
    assert len({tuple(x.flatten().tolist()) for x in (*first, *rest)}) == 11


def test_a_stream_goes_on_from_the_files_it_was_read_from_wherever_they_lie(launch, clip_dir, shards, tmp_path):
    flags = ["--streaming", "--max_steps", 2, "--save_steps", 1]
    launch(stage1_script, clip_dir, tmp_path / "run", *flags, "--dataset_name", shards / "parquet")
    flags += ["--resume_from_checkpoint", "latest"]
    moved = shutil.copytree(shards / "parquet", tmp_path / "moved")
    launch(stage1_script, clip_dir, tmp_path / "run", *flags, "--dataset_name", moved)
    (moved / "train-3.parquet").rename(moved / "train-7.parquet")
    with pytest.raises(ValueError, match=r"the files it was read from: train-3\.parquet before, train-4\.parquet now"):
        launch(stage1_script, clip_dir, tmp_path / "run", *flags, "--dataset_name", moved)


def test_a_buffer_of_nothing_is_refused(launch, clip_dir, tmp_path):
    with pytest.raises(ValueError, match="--shuffle_buffer_size must be at least 1, not 0"):
        launch(stage1_script, clip_dir, tmp_path, "--streaming", "--max_steps", 2, "--shuffle_buffer_size", 0)
