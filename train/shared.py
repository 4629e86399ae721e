"""What every process needs and none computes alone: each computes its part, and all have the whole."""

from collections.abc import Callable, Sequence

import torch
from accelerate.utils import gather

from modeling_tscir import TSCIRModel, TSCIRProcessor
from modeling_tscir.feature_cache import keep, kept
from modeling_tscir.images import ImageSource, Selected, find_bad_images
from modeling_tscir.indexing import Processes


BYTES_AT_A_TIME = 2**26  # sent by each process


def parts_of(count: int, batch_size: int, processes: int) -> list[range]:
    """Each process's rows of `count`, contiguous and in order: whole batches, as they are when there is one process,
    so that every row is computed in the batch it would be in then. Some are empty where there are few batches."""
    batches = -(-count // batch_size)
    ends = [min(count, batches * n // processes * batch_size) for n in range(processes + 1)]
    return [range(start, end) for start, end in zip(ends, ends[1:], strict=False)]


def bad_images(sources: Sequence[ImageSource], names: Sequence[str]) -> list[tuple[str, str]]:
    """`find_bad_images`."""
    processes = Processes()
    own = parts_of(len(sources), 1, processes.count)[processes.rank]
    if processes.count == 1:
        return find_bad_images(sources, names)
    return processes.together(find_bad_images(Selected(sources, own), [names[row] for row in own]))


def features(
    function: Callable, model: TSCIRModel, processor: TSCIRProcessor, sources: Sequence, batch_size: int, what: str
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """What one of `modeling_tscir.embedding`'s functions gives of all sources, a row each, on the CPU.

    Texts of a part share batches by their length, so that last bits depend on the number of processes.
    """
    processes = Processes()
    parts = parts_of(len(sources), batch_size, processes.count)
    if min(map(len, parts)) == 0 or processes.count == 1:  # little work, or nobody to share it with
        return function(model, processor, sources, batch_size, progress=what)
    progress = what if processes.main else False
    found = function(model, processor, Selected(sources, parts[processes.rank]), batch_size, progress=progress)
    lengths = [len(part) for part in parts]
    if torch.is_tensor(found):
        return together(found, lengths, model.device)
    return tuple(together(tensor, lengths, model.device) for tensor in found)


def together(own: torch.Tensor, lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """The rows of all processes, which have `lengths` of them, one behind the other, on the CPU."""
    whole = torch.empty(sum(lengths), *own.shape[1:], dtype=own.dtype)
    rows_at_a_time = max(1, BYTES_AT_A_TIME // max(1, own[0].numel() * own.element_size()))
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    for first in range(0, max(lengths), rows_at_a_time):
        count = min(rows_at_a_time, max(lengths) - first)
        sent = torch.zeros(count, *own.shape[1:], dtype=own.dtype)
        some = own[first : first + count]
        sent[: len(some)] = some
        received = gather(sent.to(device)).cpu().split(count)
        for start, length, rows in zip(starts, lengths, received, strict=True):
            end = min(length, first + count)
            whole[start + first : start + max(first, end)] = rows[: max(0, end - first)]
    return whole


def cached(folder: str | None, key: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """`feature_cache.cached`, where all processes have it or all compute it, as they do so together."""
    processes = Processes()
    found = kept(folder, key)
    if not all(processes.together([found is not None])):
        found = compute()
        if processes.state is None or processes.state.is_local_main_process:
            keep(folder, key, found)
    return found
