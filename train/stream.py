"""Training data that is read as it comes: shards of any size, in an order that any step can start from."""

import os
import tarfile
from collections.abc import Iterator
from itertools import islice

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from arguments import DataArguments, LoopArguments
from datasets import Image as ImageFeature
from datasets import IterableDataset
from pyarrow import ArrowException
from rows import check_columns, file_of, load_source, outlive_the_first_signal
from transformers.utils import logging

from modeling_tscir.images import BadImagesError, handle_bad_images


logger = logging.get_logger(__name__)
PROBLEM = "cannot be read"
# What readers raise over a shard's content; of a connection that is lost they may raise others, which end a run.
UNREADABLE = OSError, ValueError, TypeError, LookupError, ArrowException, tarfile.TarError


def load_stream(data: DataArguments, columns: dict[str, str], images: list[str]) -> IterableDataset:
    """The training split as a stream whose pictures are still encoded, with `shard_names`. Arguments are `load_rows`'.

    Raises:
        ValueError: for data that cannot be loaded, and for missing columns.
    """
    rows = load_source(data, streaming=True)
    if rows.features is None:
        raise ValueError(f"{data.dataset_name} does not say what columns it has; it can be read without --streaming")
    check_columns(data, columns, rows, images)
    names = rows.files if len(rows.files) == rows.num_shards else [f"shard {n}" for n in range(rows.num_shards)]
    for column in images:
        rows = rows.cast_column(column, ImageFeature(decode=False))
    rows = rows.select_columns([*columns, *({"__key__", "__url__"} & set(rows.column_names))])
    rows.shard_names = names
    return rows


def hold_out_shard(rows: IterableDataset, seed: int) -> int:
    """The shard that is kept from training for validation."""
    if rows.num_shards < 2:
        raise ValueError("--validation_rows of a stream takes a shard of its own, and this data has one shard alone")
    return int(torch.randint(rows.num_shards, (1,), generator=torch.Generator().manual_seed(seed)))


class Examples:
    """What a stage makes of a stream's rows, in the worker that reads them."""

    def decode(self, example: dict) -> str | None:
        """Decode the row's picture in place; why the row cannot be used, or None."""
        raise NotImplementedError

    def make_batch(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """Decoded rows to tensors."""
        raise NotImplementedError


class ShardReader(torch.utils.data.IterableDataset):
    """Batches of decoded rows, read by one or several workers of one process; each states where it stood after it.

    All epochs of all shards make one endless sequence, each epoch in an order of its own. Of it every worker of every
    process, S in all, takes each S-th shard, so that no shard is read twice in an epoch. A worker shuffles its rows
    in blocks, by a key that depends on the block's place alone. So a place is three numbers: the shard's number in
    the sequence and the row in it where the block starts, and how many rows of the shuffled block were used.

    Args:
        rows: pictures still encoded.
        shards: those to read.
        step_of_shards: S.
        places: for each worker, where it stands.
    """

    def __init__(
        self,
        rows: IterableDataset,
        shards: list[int],
        examples: Examples,
        batch_size: int,
        block_size: int,
        seed: int,
        step_of_shards: int,
        places: list[tuple[int, int, int]],
    ):
        self.rows, self.shards, self.examples = rows, shards, examples
        self.batch_size, self.block_size, self.seed = batch_size, block_size, seed
        self.step_of_shards, self.places = step_of_shards, places

    def __iter__(self) -> Iterator[tuple[dict | None, tuple[int, int, int], list]]:
        """Batch, place after it, and (where, why) of rows left out; no batch if a whole block has no usable row."""
        worker = torch.utils.data.get_worker_info()
        examples, skipped = [], []
        for example, name, place in self.shuffled(*self.places[worker.id if worker else 0]):
            reason = example.get(PROBLEM) or self.examples.decode(example)
            if reason is None:
                examples.append(example)
            else:
                skipped.append((name, reason))
            if len(skipped) >= max(self.block_size, self.batch_size) and not examples:
                yield None, place, skipped  # an error of a worker would reach the reader as another
                return
            if len(examples) == self.batch_size:
                yield self.examples.make_batch(examples), place, skipped
                examples, skipped = [], []

    def shuffled(self, shard: int, row: int, used: int) -> Iterator[tuple[dict, str, tuple[int, int, int]]]:
        """Examples from a place on, each with its name and the place after it."""
        source = self.in_order(shard, row)
        while True:
            block = list(islice(source, self.block_size))
            shard, row = block[0][:2]
            key = (self.seed * 1_000_003 + shard) * 1_000_003 + row
            order = torch.randperm(len(block), generator=torch.Generator().manual_seed(key % 2**63)).tolist()
            for number in range(used, len(block)):
                _, of_row, example = block[order[number]]
                block[order[number]] = None  # it is decoded in place, and many pictures would not fit
                yield example, self.name_of(of_row, example), (shard, row, number + 1)
            used = 0

    def in_order(self, shard: int, row: int) -> Iterator[tuple[int, int, dict]]:
        """Rows from a place on: number of the shard in the sequence, row in it, example."""
        empty = 0
        while empty < 2 * len(self.shards):  # in another order each epoch, so that one may come twice in a row
            number = self.shard_at(shard)
            source, name = self.rows.shard(self.rows.num_shards, number), self.rows.shard_names[number]
            start = row
            try:
                for values in (source.skip(row) if row else source).iter(1):
                    example = {column: value[0] for column, value in values.items()}
                    yield shard, row, example | {"__url__": example.get("__url__") or name}
                    row += 1
            except UNREADABLE as error:
                # Told as a row that cannot be used, so that it stops the run, or is recorded and the next shard read.
                yield shard, row, {PROBLEM: f"the shard cannot be read any further: {error}", "__url__": name}
            empty = empty + 1 if row == start == 0 else 0
            shard, row = shard + self.step_of_shards, 0
        raise ValueError(f"none of {len(self.shards)} shards holds a row")

    def shard_at(self, number: int) -> int:
        epoch, place = divmod(number, len(self.shards))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return self.shards[int(torch.randperm(len(self.shards), generator=generator)[place])]

    def name_of(self, row: int, example: dict) -> str:
        files = "".join(file_of(value) for value in example.values() if isinstance(value, dict))
        key = f", key {example['__key__']}" if example.get("__key__") else files
        return f"{example['__url__']}, row {row}{key}"


def shard_batches(
    rows: IterableDataset, shard: int, count: int, examples: Examples, batch_size: int, on_bad_image: str
) -> Iterator[dict[str, torch.Tensor]]:
    """The first `count` rows of a shard, in order, told where it has fewer; raises as `StreamBatches` does."""
    reader = ShardReader(rows, [shard], examples, batch_size, 1, 0, 1, [(0, 0, 0)])
    good, bad = [], []
    seen = 0
    for epoch, row, example in islice(reader.in_order(0, 0), count):
        if epoch > 0:
            break
        seen += 1
        reason = example.get(PROBLEM) or examples.decode(example)
        if reason is None:
            good.append(example)
        else:
            bad.append((reader.name_of(row, example), reason))
        if len(good) == batch_size:
            yield examples.make_batch(good)
            good = []
    if good:
        yield examples.make_batch(good)
    handle_bad_images(bad, seen, on_bad_image)
    if seen < count:
        logger.warning(
            f"--validation_rows {count}: {rows.shard_names[shard]}, the shard held out, has {seen} rows, and no other "
            "is held out; write larger shards for more"
        )


class StreamBatches:
    """Batches of a stream, the same whether a run starts at step 0 or goes on from a checkpoint.

    Raises:
        ValueError: for fewer shards than processes times workers, or on resuming with another number of either or with
            other files.
        BadImagesError: naming shard and row of pictures that cannot be read, unless they are to be skipped; then
            `skipped` holds them.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        rows: IterableDataset,
        shards: list[int],
        examples: Examples,
        args: LoopArguments,
        block_size: int,
        on_bad_image: str,
    ):
        self.accelerator, self.on_bad_image = accelerator, on_bad_image
        self.workers = max(1, args.dataloader_num_workers)
        self.num_workers = args.dataloader_num_workers
        readers = self.workers * accelerator.num_processes
        if len(shards) < readers:
            raise ValueError(
                f"{len(shards)} shards do not feed {accelerator.num_processes} processes with {self.workers} workers "
                f"each, as each reads shards of its own: write the data in {readers} files or more, or lower "
                "--dataloader_num_workers"
            )
        first = accelerator.process_index * self.workers
        self.places = [(first + worker, 0, 0) for worker in range(self.workers)]
        self.taken = 0  # batches, by this process
        self.skipped: dict[str, str] = {}
        self.files = [os.path.basename(rows.shard_names[shard]) for shard in shards]  # which may be moved together
        self.settings = {"processes": accelerator.num_processes, "workers": self.workers, "block_size": block_size,
                         "batch_size": args.per_device_train_batch_size, "shards": len(shards),
                         "seed": args.seed}  # fmt: skip
        self.reader = {"rows": rows, "shards": shards, "examples": examples,
                       "batch_size": args.per_device_train_batch_size, "block_size": block_size, "seed": args.seed,
                       "step_of_shards": readers}  # fmt: skip

    def from_step(self, step: int) -> Iterator[dict[str, torch.Tensor]]:
        """This process's batches without end, from where the loaded state stands (the beginning if none was)."""
        # A loader asks its workers in turn, beginning with the first; so the first is the one whose turn it is.
        turn = self.taken % self.workers
        reader = ShardReader(**self.reader, places=self.places[turn:] + self.places[:turn])
        loader = torch.utils.data.DataLoader(
            reader, batch_size=None, num_workers=self.num_workers, worker_init_fn=outlive_the_first_signal
        )
        for batch, place, skipped in loader:
            handle_bad_images(skipped, len(skipped) + self.settings["batch_size"], self.on_bad_image)
            if batch is None:
                raise BadImagesError(skipped, len(skipped))
            self.skipped |= dict(skipped)
            self.places[self.taken % self.workers] = tuple(place)
            self.taken += 1
            yield send_to_device(batch, self.accelerator.device)

    @property
    def size(self) -> dict[str, int]:
        """Nothing: how long a stream is, nobody knows."""
        return {}

    def skipped_images(self) -> list[tuple[str, str]]:
        """(where, why) of pictures left out so far, by all processes, which must all ask."""
        return gather_object(list(self.skipped.items()))

    def state_dict(self) -> dict:
        mine = {"places": list(self.places), "taken": self.taken, "skipped": dict(self.skipped)}
        return {"settings": self.settings, "files": self.files, "processes": gather_object([mine])}

    def load_state_dict(self, state: dict) -> None:
        changed = {k: (v, self.settings[k]) for k, v in state["settings"].items() if self.settings[k] != v}
        if changed:
            told = ", ".join(f"{k} {before} before and {now} now" for k, (before, now) in changed.items())
            raise ValueError(f"a stream goes on where it stood only with the settings it was read with: {told}")
        for before, now in zip(state.get("files", self.files), self.files, strict=True):
            if before != now:
                raise ValueError(
                    f"a stream goes on where it stood only with the files it was read from: {before} before, {now} "
                    "now; give --dataset_name as it was, or begin anew"
                )
        mine = state["processes"][self.accelerator.process_index]
        self.places = [tuple(place) for place in mine["places"]]
        self.taken, self.skipped = mine["taken"], dict(mine["skipped"])
