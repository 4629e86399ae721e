import io
import os
import signal
import tarfile
import time

import pytest
import torch
from accelerate import Accelerator
from arguments import DataArguments, LoopArguments
from datasets import Dataset, Features, Value
from rows import GroupedBatches, RowBatches, hold_out, load_rows, load_source, outlive_the_first_signal

from modeling_tscir import BadImagesError


def test_batches_cover_an_epoch_once_and_differ_between_epochs():
    batches = GroupedBatches(10, 3, seed=0)
    first, again = list(batches), list(batches)
    assert first == again and [len(b) for b in first] == [3, 3, 3] and len(batches) == 3
    assert len({row for batch in first for row in batch}) == 9
    batches.epoch = 1
    assert list(batches) != first
    assert list(GroupedBatches(10, 3, seed=1)) != first


def test_rows_of_a_group_share_a_batch():
    groups = [i % 6 for i in range(24)]
    for batch in GroupedBatches(24, 8, seed=3, groups=groups):
        assert sorted(groups[row] for row in batch) == sorted([groups[r] for r in batch[::4]] * 4)


def test_rows_of_a_group_beyond_a_batch_are_shuffled_too():
    """Else its batches are the same in every epoch, and what is left over of the last group is never read."""
    batches, read = GroupedBatches(10, 3, seed=0, groups=["one"] * 10), []
    for epoch in range(30):
        batches.epoch = epoch
        read.append(list(batches))
    assert {row for epoch in read for batch in epoch for row in batch} == set(range(10))
    assert len({tuple(map(tuple, epoch)) for epoch in read}) == 30
    batches.epoch = 4
    assert list(batches) == read[4]
    small = [row // 3 for row in range(12)]
    order = torch.randperm(4, generator=torch.Generator().manual_seed(0)).tolist()
    assert list(GroupedBatches(12, 3, seed=0, groups=small)) == [list(range(3 * i, 3 * i + 3)) for i in order]


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="per_device_train_batch_size"):
        GroupedBatches(7, 8, seed=0)
    with pytest.raises(ValueError, match="9 rows do not fill one step of 1 processes times 4 accumulated batches"):
        batches(9, gradient_accumulation_steps=4)


class Numbers:
    """A dataset whose batches are their own row numbers."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, rows: list[int]) -> dict:
        return {"rows": rows}


def batches(count: int, **arguments) -> RowBatches:
    args = LoopArguments(per_device_train_batch_size=3, **arguments)
    return RowBatches(Accelerator(cpu=True), Numbers(count), args)


@pytest.mark.parametrize(("accumulation", "workers"), [(1, 0), (2, 0), (2, 1)])
def test_batches_go_on_from_any_step_and_are_known_ahead(accumulation, workers):
    source = batches(17, gradient_accumulation_steps=accumulation, dataloader_num_workers=workers)
    stream = source.from_step(0)
    whole = [next(stream)["rows"] for _ in range(24)]
    assert sorted(sum(whole[: len(whole) // 6], [])) != sum(whole[: len(whole) // 6], [])
    for step in (1, 4, 7):
        other = batches(17, gradient_accumulation_steps=accumulation, dataloader_num_workers=workers)
        stream = other.from_step(step)
        first = step * accumulation
        assert [next(stream)["rows"] for _ in range(5)] == whole[first : first + 5]
        ahead = other.rows_ahead(step, 3)
        assert ahead == sorted({row for batch in whole[first : first + 3 * accumulation] for row in batch})
        assert next(stream)["rows"] == whole[first + 5]  # looking ahead changed nothing


def test_groups_are_held_out_together():
    groups = [i // 4 for i in range(40)]
    kept, held = hold_out(Dataset.from_dict({"group": groups}), 10, seed=0, groups=groups)
    assert len(held) == 12 and len(kept) == 28 and not set(kept["group"]) & set(held["group"])
    assert hold_out(Dataset.from_dict({"x": groups}), 10, seed=0)[1]["x"] != held["group"]
    assert len(hold_out(Dataset.from_dict({"x": groups}), 10, seed=0)[1]) == 10
    assert hold_out(kept, 0, seed=0) == (kept, None)
    for count, given in ((40, None), (5, ["one"] * 40)):
        with pytest.raises(ValueError, match="to train on"):
            hold_out(Dataset.from_dict({"x": groups}), count, seed=0, groups=given)


def test_missing_texts_are_named(tmp_path):
    Dataset.from_dict({"caption": ["a", None, "b", " "]}).to_parquet(tmp_path / "train.parquet")
    arguments = DataArguments(dataset_name=str(tmp_path / "train.parquet"))
    with pytest.raises(BadImagesError, match="(?s)row 1, column caption: no text.*row 3, column caption: no text"):
        load_rows(arguments, {"caption": "a text"}, images=[])
    arguments.on_bad_image = "skip"
    rows, skipped = load_rows(arguments, {"caption": "a text"}, images=[])
    assert rows["caption"][:] == ["a", "b"] and [name for name, _ in skipped] == [
        "row 1, column caption", "row 3, column caption",
    ]  # fmt: skip


@pytest.mark.parametrize("values", [[["a", "b"]], [{"text": "a"}], [3]])
def test_columns_that_hold_no_texts_are_refused(tmp_path, values):
    Dataset.from_dict({"caption": values}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="column caption of .* holds no texts but"):
        load_rows(DataArguments(dataset_name=str(tmp_path / "train.parquet")), {"caption": "a text"}, images=[])


@pytest.mark.parametrize("values", [[1, 2], [0.5, 1.0], [[{"a": 1}], [{"a": 2}]], [{"a": "b"}, {"a": "c"}]])
def test_columns_that_hold_no_pictures_are_refused(tmp_path, values):
    Dataset.from_dict({"image": values, "caption": ["a", "b"]}).to_parquet(tmp_path / "d.parquet")
    data = DataArguments(dataset_name=str(tmp_path / "d.parquet"))
    with pytest.raises(ValueError, match=r"column image of .*d.parquet holds no pictures but"):
        load_rows(data, {"image": "a picture", "caption": "a text"}, images=["image"])


def test_rows_are_left_out_as_long_as_one_is_left(tmp_path, pictures):
    pictures[0].save(tmp_path / "0.png")
    bad = {"bytes": b"nothing", "path": None}
    features = Features({"image": {"bytes": Value("binary"), "path": Value("string")}, "caption": Value("string")})
    good = {"bytes": (tmp_path / "0.png").read_bytes(), "path": None}
    data = DataArguments(dataset_name=str(tmp_path / "d.parquet"), on_bad_image="skip")
    columns = {"image": "a picture", "caption": "a text"}
    rows = Dataset.from_dict({"image": [bad, good], "caption": ["", "b"]}, features=features)
    rows.to_parquet(tmp_path / "d.parquet")
    rows, left_out = load_rows(data, columns, images=["image"])
    assert rows["caption"][:] == ["b"] and len(left_out) == 2
    rows = Dataset.from_dict({"image": [bad, good], "caption": ["a", " "]}, features=features)
    rows.to_parquet(tmp_path / "e.parquet")
    data = DataArguments(dataset_name=str(tmp_path / "e.parquet"), on_bad_image="skip")
    with pytest.raises(BadImagesError, match="row 0, column image"):
        load_rows(data, columns, images=["image"])


def test_data_that_cannot_be_loaded_is_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("", "utf-8")
    (tmp_path / "broken.jsonl").write_text('{"caption": "a"}\n{"capt', "utf-8")
    for name in ("empty.jsonl", "broken.jsonl", "none.parquet", "nothing"):
        with pytest.raises(ValueError, match=f"{name}, split train, cannot be loaded, or is empty: "):
            load_rows(DataArguments(dataset_name=str(tmp_path / name)), {"caption": "a text"}, images=[])


@pytest.mark.parametrize("name", ["nothing/*.tar", "shards/{0..3}.tar", "gone.parquet"])
def test_a_pattern_that_no_file_has_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=r"there is no such file; several are named by \* and \*\*, not by braces"):
        load_rows(DataArguments(dataset_name=str(tmp_path / name)), {"caption": "a text"}, images=[])


def test_a_folder_is_a_folder_whatever_its_name_ends_with(tmp_path):
    Dataset.from_dict({"caption": ["x"] * 3}).to_parquet(tmp_path / "all.parquet" / "part-0.parquet")
    rows, _ = load_rows(DataArguments(dataset_name=str(tmp_path / "all.parquet")), {"caption": "a text"}, images=[])
    assert rows["caption"] == ["x"] * 3


def test_compressed_shards_are_tar_shards(tmp_path):
    with tarfile.open(tmp_path / "0.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo("a.txt")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"red"))
    rows, _ = load_rows(DataArguments(dataset_name=str(tmp_path / "*.tar.gz")), {"txt": "a text"}, images=[])
    assert rows["txt"] == ["red"]


class Slow(torch.utils.data.Dataset):
    """A row takes a while."""

    def __len__(self):
        return 8

    def __getitem__(self, row):
        time.sleep(0.2)
        return os.getpid()


def test_a_worker_outlives_a_runs_first_signals_and_no_second_sigterm():
    loader = torch.utils.data.DataLoader(Slow(), num_workers=1, worker_init_fn=outlive_the_first_signal)
    batches = iter(loader)
    worker = int(next(batches))
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker, number)
        assert int(next(batches)) == worker
    os.kill(worker, signal.SIGTERM)
    with pytest.raises(RuntimeError, match=r"killed by signal|exited unexpectedly"):
        list(batches)


def test_a_worker_ends_at_the_second_sigterm_though_its_run_only_notes_them():
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # as a run does, from which its workers are forked
    try:
        test_a_worker_outlives_a_runs_first_signals_and_no_second_sigterm()
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_that_datasets_would_read_twice_is_named(tmp_path, streaming):
    Dataset.from_dict({"caption": ["x"] * 3}).to_parquet(tmp_path / "train-train.parquet")
    with pytest.raises(ValueError, match=r"train-train\.parquet would be read twice.* rename it, or name the files"):
        load_source(DataArguments(dataset_name=str(tmp_path)), streaming)
    rows = load_source(DataArguments(dataset_name=str(tmp_path / "*.parquet")), streaming)
    assert len(list(rows)) == 3


@pytest.mark.parametrize(("configuration", "named"), [("c", "c"), ("c", None), ("default", None)])
def test_a_local_folder_is_read_as_it_is_now(tmp_path, configuration, named):
    """Where a README names configurations, datasets alone would go on with what it read before, or with what another
    folder of the same name holds."""
    for place, texts in (("a", ["x"] * 3), ("a", ["x"] * 5), ("b", ["y"] * 5)):
        folder = tmp_path / place / f"set-{configuration}-{named}"
        (folder / "c").mkdir(parents=True, exist_ok=True)
        configs = f"---\nconfigs:\n- config_name: {configuration}\n  data_files: c/*.parquet\n---\n"
        (folder / "README.md").write_text(configs, "utf-8")
        Dataset.from_dict({"caption": texts}).to_parquet(folder / "c" / "train.parquet")
        arguments = DataArguments(dataset_name=str(folder), dataset_config=named)
        assert list(load_rows(arguments, {"caption": "a text"}, images=[])[0]["caption"]) == texts
        assert [row["caption"] for row in load_source(arguments, streaming=True)] == texts
