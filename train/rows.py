"""Training data of known size: rows of a `datasets` dataset, in batches that any step can start from."""

import glob
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator, skip_first_batches
from arguments import DataArguments, LoopArguments
from datasets import Dataset, IterableDataset, load_dataset_builder
from datasets import Image as ImageFeature
from shared import bad_images

from modeling_tscir.feature_cache import digest, state_of
from modeling_tscir.images import handle_bad_images


UNFINISHED = ".unfinished-data"  # beside data/: `datasets` reads no folder whose name begins with a dot
BUILDERS = {".tar": "webdataset", ".tar.gz": "webdataset", ".tgz": "webdataset", ".parquet": "parquet",
            ".jsonl": "json", ".json": "json", ".csv": "csv"}  # fmt: skip


def load_source(data: DataArguments, streaming: bool = False, **options) -> Dataset | IterableDataset:
    """The training split as `datasets` gives it: from the Hub, a local folder, or files named by a pattern.

    A stream has `files`, the addresses of what it is read from, beside what `datasets` gives it.

    Args:
        data: or what else has `dataset_name` and `dataset_train_split`.
        options: of `datasets.load_dataset`.

    Raises:
        ValueError: if it cannot be loaded, with what `datasets` says, or would be read in part twice.
    """
    what, name = data.dataset_name, getattr(data, "dataset_config", None)
    local = Path(what).is_dir()
    files = next((builder for suffix, builder in BUILDERS.items() if what.endswith(suffix)), None)
    if "data_files" not in options and files is not None and not local:
        if "://" not in what and not glob.glob(what, recursive=True):
            raise ValueError(
                f"--dataset_name {what}, split {data.dataset_train_split}, cannot be loaded, or is empty: there is no "
                "such file; several are named by * and **, not by braces"
            )
        what, name, options = files, None, options | {"data_files": what}
    try:
        builder = load_dataset_builder(what, name, **options)
        found = builder.config.data_files or {}
        refuse_files_twice(found, data.dataset_name)
        if local:
            # datasets 5.2 keeps a stale copy of a folder whose README names configurations, as `push_to_hub` writes
            # it, and takes that of another folder of the same name. So each state of the files has a place of its own.
            files = [str(file) for split in sorted(found) for file in found[split]]
            state = digest([state_of(file) for file in files])
            options["cache_dir"] = os.path.join(datasets.config.HF_DATASETS_CACHE, state)
            builder = load_dataset_builder(what, name, **options)
        if streaming:
            rows = builder.as_streaming_dataset(split=data.dataset_train_split)
            rows.files = [str(file) for split in found if split == rows.split for file in found[split]]
            return rows
        builder.download_and_prepare(verification_mode="no_checks" if local else None)
        return builder.as_dataset(split=data.dataset_train_split)
    except Exception as error:  # whatever the builder of that format raises
        causes = [str(e) or type(e).__name__ for e in (error, error.__cause__) if e is not None]
        raise ValueError(
            f"--dataset_name {data.dataset_name}, split {data.dataset_train_split}, cannot be loaded, or is empty: "
            + "; ".join(causes)
        ) from error


def refuse_files_twice(data_files: dict[str, list[str]], source: str) -> None:
    """Raise `ValueError` for a file that stands twice in a split.

    datasets 5.2 lists a file twice whose name holds the split's twice, as train-train.parquet does.
    """
    for split, files in data_files.items():
        twice = [str(file) for file, count in Counter(files).items() if count > 1]
        if twice:
            raise ValueError(
                f"{twice[0]} would be read twice, one of {len(twice)} such: datasets lists a file twice whose name "
                f"says {split!r} twice; rename it, or name the files: '{source}/*{Path(twice[0]).suffix}'"
            )


def check_columns(
    data: DataArguments, columns: dict[str, str], rows: Dataset | IterableDataset, images: list[str]
) -> None:
    """Raise `ValueError` for columns that are missing, or hold no texts where they should."""
    missing = [f"{name} ({what})" for name, what in columns.items() if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"{data.dataset_name} lacks columns {missing}; it has {rows.column_names}. Flags that end in _column "
            "name others"
        )
    for name in set(columns) - set(images):
        if getattr(rows.features[name], "dtype", None) not in ("string", "large_string", "null"):
            raise ValueError(f"column {name} of {data.dataset_name} holds no texts but {rows.features[name]}")
    for name in images:
        if not may_be_pictures(rows.features[name]):
            raise ValueError(f"column {name} of {data.dataset_name} holds no pictures but {rows.features[name]}")


def may_be_pictures(feature) -> bool:
    """Whether `datasets` reads pictures from such a column: encoded, by path, or as arrays of numbers."""
    if isinstance(feature, dict):
        return {"bytes", "path"} <= set(feature)
    if hasattr(feature, "feature"):  # a list, of lists of numbers
        while hasattr(feature, "feature"):
            feature = feature.feature
        return str(getattr(feature, "dtype", "")).startswith(("int", "uint", "float"))
    kind = str(getattr(feature, "dtype", ""))
    return not kind.startswith(("int", "uint", "float", "double", "bool", "date", "time", "duration", "decimal"))


def text_problem(text: str | None, column: str) -> str | None:
    """Why a row's text cannot be trained on, or None."""
    return f"no text in column {column}" if text is None or not text.strip() else None


def file_of(picture: dict | None) -> str:
    """ ", " and the file that an encoded picture of `datasets` came from, where it says so."""
    return f", {picture['path']}" if picture is not None and picture.get("path") else ""


def load_rows(
    data: DataArguments, columns: dict[str, str], images: list[str], rows: Dataset | None = None
) -> tuple[Dataset, list[tuple[str, str]]]:
    """The training split with its pictures still encoded, all of it checked, and (where, why) of rows left out.

    Args:
        columns: needed column and what it holds, for the error that names what is missing.
        images: those of them that are pictures; the others are texts.
        rows: what `load_source` gave, if it was asked before.

    Raises:
        ValueError: for missing columns or an empty split. BadImagesError: naming every unreadable picture, and every
            text that is missing.
    """
    rows = load_source(data) if rows is None else rows
    check_columns(data, columns, rows, images)
    if len(rows) == 0:
        raise ValueError(f"{data.dataset_name}, split {data.dataset_train_split}, has no rows")
    bad: list[tuple[str, str]] = []
    for column in columns:
        if column in images:
            rows = rows.cast_column(column, ImageFeature(decode=False))
            names = [f"row {i}, column {column}{file_of(picture)}" for i, picture in enumerate(rows[column])]
            bad += bad_images(rows[column], names)
        else:
            names = [f"row {i}, column {column}" for i in range(len(rows))]
            problems = (text_problem(text, column) for text in rows[column])
            bad += [(name, why) for name, why in zip(names, problems, strict=True) if why is not None]
    skipped = {int(name.split()[1].rstrip(",")) for name, _ in bad}
    handle_bad_images(bad, len(rows) * max(1, len(images)), data.on_bad_image, len(skipped) == len(rows))
    return (rows.select([i for i in range(len(rows)) if i not in skipped]) if skipped else rows), bad


def hold_out(rows: Dataset, count: int, seed: int, groups: list | None = None) -> tuple[Dataset, Dataset | None]:
    """Rows to train on, and `count` others or a few more: rows of one group are held out together.

    Raises:
        ValueError: if nothing would be left to train on.
    """
    if count <= 0:
        return rows, None
    if count >= len(rows):
        raise ValueError(f"--validation_rows {count} leaves none of {len(rows)} rows to train on")
    names = list(groups) if groups is not None else list(range(len(rows)))
    order = list(dict.fromkeys(names))
    random.Random(seed).shuffle(order)
    members: dict = {}
    for row, name in enumerate(names):
        members.setdefault(name, []).append(row)
    held: list[int] = []
    for name in order:
        if len(held) >= count:
            break
        held += members[name]
    if len(held) == len(rows):
        raise ValueError(
            f"--validation_rows {count} leaves no group of rows to train on; all share too few pictures or references"
        )
    kept = sorted(set(range(len(rows))) - set(held))
    return rows.select(kept), rows.select(sorted(held))


def first_of_each(names: list) -> list[int]:
    """For each row, the first row of the same name."""
    first: dict = {}
    return [first.setdefault(name, row) for row, name in enumerate(names)]


class GroupedBatches:
    """Batches of row numbers, shuffled by (seed, epoch) alone; rows of a group share one. None is incomplete.

    The user sets `epoch`. There is no `set_epoch`, as Accelerate would call it with a count that restarts on resuming.

    Args:
        groups: a group's name for every row, or None where every row stands alone.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int, groups: list | None = None):
        if num_rows < batch_size:
            raise ValueError(
                f"{num_rows} rows, less those held out, do not fill a batch of {batch_size}; lower "
                "--per_device_train_batch_size or --validation_rows"
            )
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        self.members: list[list[int]] | None = None
        if groups is not None:
            members: dict = {}
            for row, group in enumerate(groups):
                members.setdefault(group, []).append(row)
            self.members = list(members.values())
        self.num_rows = num_rows
        self.drop_last = True

    def __len__(self) -> int:
        return self.num_rows // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        count = self.num_rows if self.members is None else len(self.members)
        order = torch.randperm(count, generator=generator).tolist()
        rows = order
        if self.members is not None:
            rows = [row for i in order for row in self._in_order(self.members[i], generator)]
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield rows[start : start + self.batch_size]

    def _in_order(self, members: list[int], generator: torch.Generator) -> list[int]:
        """A group's rows: as they come, as one batch has them all, or where it has not, shuffled."""
        if len(members) <= self.batch_size:
            return members
        return [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]


class RowBatches:
    """Batches of a dataset, epoch after epoch, the same whether a run starts at step 0 or goes on from another.

    Args:
        dataset: gives a whole batch for a list of row numbers, by `__getitems__`.
        groups: a name for every row; rows of one name share a batch.
        skipped: (where, why) of pictures that were left out, for the record.
        content: the rows' texts and what tells them apart, JSON-like; a checkpoint of other content is refused.

    Raises:
        ValueError: if an epoch does not fill one step of all processes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        dataset: torch.utils.data.Dataset,
        args: LoopArguments,
        groups: list | None = None,
        skipped: list[tuple[str, str]] = (),
        content: list = (),
    ):
        self.accelerator, self.accumulation = accelerator, args.gradient_accumulation_steps
        self.skipped, self.content = list(skipped), digest(content)
        self.sampler = GroupedBatches(len(dataset), args.per_device_train_batch_size, args.seed, groups)
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=self.sampler,
            collate_fn=whole_batch,
            num_workers=args.dataloader_num_workers,
            worker_init_fn=outlive_the_first_signal,
        )
        self.loader = accelerator.prepare(loader)
        self.steps_an_epoch = len(self.loader) // self.accumulation
        if self.steps_an_epoch == 0:
            raise ValueError(
                f"{len(dataset)} rows do not fill one step of {accelerator.num_processes} processes times "
                f"{self.accumulation} accumulated batches of {args.per_device_train_batch_size}; lower one of them"
            )

    def from_step(self, step: int) -> Iterator[dict[str, torch.Tensor]]:
        """This process's batches from an optimizer step on, without end."""
        while True:
            self.sampler.epoch, done = divmod(step, self.steps_an_epoch)
            first = done * self.accumulation
            batches = skip_first_batches(self.loader, first) if first else self.loader
            # Batches that do not fill a last accumulated step are left for the next epoch's shuffle.
            yield from islice(batches, self.steps_an_epoch * self.accumulation - first)
            step += self.steps_an_epoch - done

    def rows_ahead(self, step: int, steps: int) -> list[int]:
        """Row numbers, each once, that this process will take in `steps` optimizer steps from `step` on."""
        mine, world = self.accelerator.process_index, self.accelerator.num_processes
        now, found = self.sampler.epoch, []
        while steps > 0:
            self.sampler.epoch, done = divmod(step, self.steps_an_epoch)
            taken = min(steps, self.steps_an_epoch - done)
            batches = islice(iter(self.sampler), mine, None, world)  # as Accelerate deals them out
            found += islice(batches, done * self.accumulation, (done + taken) * self.accumulation)
            step, steps = step + taken, steps - taken
        self.sampler.epoch = now
        return sorted({row for batch in found for row in batch})

    @property
    def size(self) -> dict[str, int]:
        """What tells this data from other data of the same name."""
        return {"num_rows": self.sampler.num_rows}

    def skipped_images(self) -> list[tuple[str, str]]:
        return self.skipped

    def state_dict(self) -> dict:
        return {"content": self.content}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to load: the step says it all. Raises `ValueError` for a checkpoint of rows of other content."""
        if state.get("content", self.content) != self.content:
            raise ValueError(
                f"texts or ids (or their order) of the {self.sampler.num_rows} rows are others than the run was begun "
                "with: give --dataset_name as it was, or begin anew"
            )


def whole_batch(batch: dict) -> dict:
    return batch  # the dataset makes whole batches


def outlive_the_first_signal(worker: int) -> None:
    """Of a loader's worker: whoever stops a run, a terminal, torchrun or a scheduler, signals its workers too, and
    without them it could not end its step and write a checkpoint. A second SIGTERM, as the loader itself sends to a
    worker that does not end, ends it: the run, whose handlers a worker is forked with, would only note it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def in_batches(dataset: torch.utils.data.Dataset, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """All rows once, in order."""
    for start in range(0, len(dataset), size):
        yield dataset.__getitems__(list(range(start, min(start + size, len(dataset)))))
