"""Hard negatives: the nearest wrong targets of the queries, as the composing adapters then are."""

from collections.abc import Callable

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce

from modeling_tscir import TSCIRModel
from modeling_tscir.ranking import full_precision, top_k


class Miner:
    """Mines for the rows that come next, every `refresh` steps. The bank is every target once, searched in blocks.

    Args:
        dataset: `Stage2Data`, or what has its `target_embeds` and `target_ids` and gives its batches.
        rows_ahead: which rows this process takes in the `refresh` steps from a step on; None mines for all.
    """

    def __init__(
        self,
        dataset,
        model: TSCIRModel,
        refresh: int,
        rows_ahead: Callable[[int, int], list[int]] | None = None,
        batch_size: int = 256,
    ):
        self.dataset, self.model, self.refresh, self.batch_size = dataset, model, refresh, batch_size
        self.rows_ahead = rows_ahead or (lambda step, steps: list(range(len(dataset))))
        self.rows: torch.Tensor | None = None  # [R], sorted
        self.mined: torch.Tensor | None = None  # [R, H], rows of the dataset
        self.mask: torch.Tensor | None = None  # [R, H], False for likely right answers

    @property
    def wanted(self) -> bool:
        """Whether the loss has mined negatives."""
        config = self.model.config
        return config.mined_negative_weight > 0 and config.num_mined_negatives > 0

    def __call__(self, step: int) -> dict[str, float]:
        """Mine if it is time to. Gives how many of the nearest targets the ceiling dropped, in all processes."""
        config = self.model.config
        if self.wanted and step and step % self.refresh == 0:
            rows = self.rows_ahead(step, self.refresh)
            return self.mine(rows, config.num_mined_negatives, config.mined_negative_ceiling)
        return {}

    @torch.no_grad()
    def mine(self, rows: list[int], count: int, ceiling: float) -> dict[str, float]:
        data, model = self.dataset, self.model
        # A query's own target is excluded, however many rows hold it.
        bank_rows = torch.unique(data.target_ids)
        if len(bank_rows) == 1:  # of every query, which leaves no negative
            return {}
        was_training = model.training
        model.eval()
        bank = data.target_embeds[bank_rows].to(model.device)
        place = {row: i for i, row in enumerate(bank_rows.tolist())}
        mined, mask = [], []
        dropped = considered = 0
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            features = {k: v.to(model.device) for k, v in data.__getitems__(batch).items()}
            queries = model.encode_with_pseudo_words(
                features["input_ids"], features["pseudo_mask"], features["pseudo_words"]
            ).float()
            own = [[place[int(data.target_ids[i])]] for i in batch]
            # Twice as many as wanted, as the ceiling may drop some.
            _, found = top_k(queries, bank, min(2 * count, len(bank) - 1), exclude=own)
            with full_precision(bank):
                close = torch.einsum("bhd,bd->bh", bank[found], features["target_embeds"]) > ceiling
            dropped, considered = dropped + int(close.sum()), considered + close.numel()
            order = torch.argsort(close.int(), dim=1, stable=True)[:, :count]  # those below the ceiling first
            mined.append(bank_rows[found.gather(1, order).cpu()])
            mask.append(~close.gather(1, order).cpu())
        self.rows, self.mined, self.mask = torch.tensor(rows), torch.cat(mined).clone(), torch.cat(mask).clone()
        model.train(was_training)
        counts = torch.tensor([dropped, considered], device=model.device)
        dropped, considered = reduce(counts, "sum").tolist()  # over all processes
        return {"mined_dropped": float(dropped), "mined_dropped_share": dropped / max(1, considered)}

    def negatives(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """ "mined_embeds" [B, H, D] and "mined_mask" [B, H] of rows; nothing before the first mining."""
        if self.mined is None:
            return {}
        places = torch.searchsorted(self.rows, rows)
        return {"mined_embeds": self.dataset.target_embeds[self.mined[places]], "mined_mask": self.mask[places]}

    def state_dict(self) -> dict:
        return {"processes": gather_object([{"rows": self.rows, "mined": self.mined, "mask": self.mask}])}

    def load_state_dict(self, state: dict) -> None:
        mine = state["processes"][PartialState().process_index]
        self.rows, self.mined, self.mask = mine["rows"], mine["mined"], mine["mask"]
