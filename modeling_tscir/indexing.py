"""Filling a gallery: reading each file once, embedding pictures shard by shard, in any number of processes, with every
file that could not be used named and explained."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from .embedding import batches_ahead, prefetched
from .files import File, content_digest, read_file, time_of
from .gallery import DTYPES, Gallery, GalleryError
from .images import load_image
from .indexing_plan import Plan, Report, bytes_of, plan_dataset, plan_folder


SHARD_SIZE = 2048
# Of processes with one that is still at work, as one that lists files or builds an index is; torch's is ten minutes.
PATIENCE = timedelta(hours=24)


class Chunk:
    """The coming rows of one shard, read and decoded in threads, batch by batch.

    Args:
        items: files, or rows of a dataset as (id, {"bytes", "path"}).
        content_of: the digest of an id's picture that is there already; one that is the same is passed over.
        ahead: batches decoded beside the forward pass.
    """

    def __init__(
        self,
        items: Sequence,
        content_of: Callable[[str], str | None],
        processor,
        batch_size: int,
        pool: ThreadPoolExecutor,
        ahead: int = 0,
    ):
        self.items, self.content_of, self.processor = items, content_of, processor
        self.batch_size, self.pool, self.ahead = batch_size, pool, ahead
        self.rows: list[dict] = []
        self.embeds: list[torch.Tensor] = []
        self.same: list[str] = []
        self.unreadable: list[dict[str, str]] = []

    def pixel_values(self) -> Iterator[torch.Tensor]:
        """[<= batch_size, 3, H, W] of the pictures that can be used; `rows` has a row for each."""

        def prepare(start: int) -> list:
            return list(self.pool.map(self._one, self.items[start : start + self.batch_size]))

        for results in prefetched(prepare, range(0, len(self.items), self.batch_size), self.ahead):
            good = [result for result in results if isinstance(result, tuple)]
            self.unreadable += [result for result in results if isinstance(result, dict)]
            self.same += [result for result in results if isinstance(result, str)]
            if good:
                self.rows += [row for row, _ in good]
                yield torch.cat([pixels for _, pixels in good])

    def _one(self, item) -> tuple[dict, torch.Tensor] | dict[str, str] | str:
        """A row and its pixels; or the id and the reason why there are none; or the id of what is there already."""
        try:
            row, content = self._file(item) if isinstance(item, File) else self._dataset_row(item)
            if not content:
                raise ValueError("empty")
            if not isinstance(item, File) and self.content_of(row["id"]) == row["content"]:
                return row["id"]
            return row, self.processor.pixel_values([load_image(content)])
        except ValueError as error:
            return {"id": item[0], "reason": str(error)}

    @staticmethod
    def _file(file: File) -> tuple[dict, bytes]:
        content, status = read_file(file.path)
        row = {"id": file.id, "path": file.path, "size": len(content), "mtime_ns": time_of(status)}
        return row | {"content": content_digest(content), "picture": None}, content

    @staticmethod
    def _dataset_row(item: tuple) -> tuple[dict, bytes]:
        name, picture = item
        content = bytes_of(picture)
        row = {"id": name, "path": None, "size": len(content), "mtime_ns": 0}
        return row | {"content": content_digest(content), "picture": content}, content


@torch.no_grad()
def embed_chunk(chunk: Chunk, model, dtype: torch.dtype, bar: tqdm) -> None:
    """Embeddings of a chunk's rows, [<= batch_size, D] each, as they are stored."""
    for pixels in chunk.pixel_values():
        features = model.get_image_features(pixels.to(model.device, model.dtype))
        embeds = F.normalize(features.float(), dim=-1).to("cpu", dtype)
        if not torch.isfinite(embeds).all():  # such a row would stand before all others in every search
            names = ", ".join(row["id"] for row in chunk.rows[-len(pixels) :][:3])
            in_half = model.dtype == torch.float16
            remedy = "load it in float32 (tscir: --precision float32)" if in_half else "are its weights whole?"
            raise GalleryError(f"the model gives NaN or infinite values for pictures such as {names}; {remedy}")
        chunk.embeds.append(embeds)
        bar.update(len(pixels))


def add_images(
    gallery: Gallery,
    images,
    model,
    processor,
    *,
    prefix: str = "",
    metadata: str | os.PathLike | None = None,
    image_column: str = "image",
    id_column: str = "id",
    batch_size: int = 32,
    shard_size: int = SHARD_SIZE,
    progress: bool = True,
) -> Report:
    """Bring a gallery up to date with a folder, or add the rows of a dataset to it.

    Of a folder, files of a known size and time of change are left as they are; what is gone from it goes from the
    gallery; files below a folder that cannot be read just now stay. Under `accelerate launch` or `torchrun` the
    processes share the work. Memory holds one shard.

    Args:
        images: a folder, searched below as well, or a `datasets.Dataset`, whose pictures are kept in the gallery.
        prefix (`str`): put before each id, so that several folders go into one gallery.
        metadata: a CSV, JSON Lines or Parquet file with a column `file_name` (path within the folder, as
            `datasets` has it); metadata.csv, .jsonl or .parquet in the folder is found by itself.
        image_column, id_column (`str`): of a dataset; other columns become metadata. Without ids rows are numbered.
        batch_size (`int`): pictures a forward pass.
        shard_size (`int`): pictures a shard: what a kill may cost (Ctrl-C costs a batch), and what memory holds.

    Raises:
        GalleryError: if the folder holds no picture, metadata does not fit, or the disk is full.
    """
    if batch_size < 1 or shard_size < 1:
        raise GalleryError(f"batch_size {batch_size} and shard_size {shard_size}: both must be at least 1")
    processes = Processes()
    with gallery.locked() if processes.main else contextlib.nullcontext():
        if isinstance(images, (str, os.PathLike)):
            plan = processes.same(lambda: plan_folder(gallery, images, prefix, metadata))
        else:
            plan = plan_dataset(gallery, images, prefix, image_column, id_column)
        processes.wait()  # all have seen the gallery as it was
        same, unreadable = embed_todo(gallery, plan, model, processor, processes, batch_size, shard_size, progress)
        same, unreadable = processes.together(same), processes.together(unreadable)
        report = plan.report(gallery, same, unreadable)
        processes.wait()
        if processes.main:
            finish(gallery, plan, report, {bad["id"] for bad in unreadable})
        processes.wait()
        if not processes.main:
            gallery.reload()
        return report


class Processes:
    """The processes that share an indexing: one, or those of `accelerate launch` or `torchrun`."""

    def __init__(self):
        self.state = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            self.state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        self.rank = self.state.process_index if self.state else 0
        self.count = self.state.num_processes if self.state else 1
        self.main = self.rank == 0

    def wait(self) -> None:
        if self.state:
            self.state.wait_for_everyone()

    def end(self) -> None:
        """Leave the group: one that a process takes to its exit aborts it, now and then."""
        if self.state:
            self.state.destroy_process_group()

    def together(self, values: list) -> list:
        """The lists of all processes, one after the other."""
        if not self.state:
            return values
        from accelerate.utils import gather_object

        return gather_object(values)

    def same(self, make: Callable):
        """What the main process makes, or the `ValueError` it raises, in all of them."""
        if not self.state:
            return make()
        from accelerate.utils import broadcast_object_list

        made: list = [None]
        if self.main:
            try:
                made = [make()]
            except ValueError as error:
                made = [error]
        (result,) = broadcast_object_list(made)
        if isinstance(result, ValueError):
            raise result
        return result


def embed_todo(
    gallery: Gallery, plan: Plan, model, processor, processes: Processes, batch_size: int, shard_size: int,
    progress: bool,
) -> tuple[list[str], list[dict[str, str]]]:  # fmt: skip
    """Write this process's shards. Returns ids that were there already, and what could not be used."""
    starts = range(0, len(plan.todo), shard_size)[processes.rank :: processes.count]
    first = gallery.next_shard()
    dtype = DTYPES[gallery.info["dtype"]]
    same: list[str] = []
    unreadable: list[dict[str, str]] = []
    total = sum(min(shard_size, len(plan.todo) - start) for start in starts)
    shown = progress and processes.main and total > 0
    with (
        ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool,
        tqdm(total=total, disable=not shown, unit="picture", desc="index", smoothing=0) as bar,
    ):
        for start in starts:
            items = plan.todo[start : start + shard_size]
            chunk = Chunk(items, gallery.content, processor, batch_size, pool, batches_ahead(model))
            try:
                embed_chunk(chunk, model, dtype, bar)
            finally:  # what is done is kept where Ctrl-C comes between
                if chunk.embeds:
                    embeds = torch.cat(chunk.embeds)
                    gallery.write_rows(first + start // shard_size, chunk.rows[: len(embeds)], embeds)
            same += chunk.same
            unreadable += chunk.unreadable
            bar.update(len(chunk.unreadable) + len(chunk.same))
    return same, unreadable


def finish(gallery: Gallery, plan: Plan, report: Report, broken: set[str]) -> None:
    """Read the new shards, forget what is gone, changed or `broken` by now, and write the rest."""
    gallery.reload()
    old = plan.gone | broken
    old -= set(gallery.unknown(list(old)))
    gallery.forget(old)
    if plan.moved:
        gallery.set_paths(plan.moved)
    gallery.set_unreadable(report.unreadable)
    if plan.metadata is not None:
        report.metadata_without_picture = gallery.unknown(plan.metadata.index)
    if plan.metadata is not None or old:
        gallery.set_metadata(plan.metadata, plan.described)
    if len(plan.todo) or old or gallery.index_is_old():  # after a move, or an interruption of its rebuilding
        gallery.rebuild_index()
