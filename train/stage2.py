"""Stage II: train the composing adapters on triplets, with CLIP and mapper frozen.

    accelerate launch train/stage2.py --model_name_or_path runs/stage1 \\
        --dataset_name user/triplets --output_dir runs/stage2

Rows need a reference picture, a modification text and a target picture. Rows of one `reference_id` share a batch, so
that targets of other edits of the same reference are hard negatives; rows of one `target_id` are never negatives of
each other.
"""

from dataclasses import dataclass, field

import torch
from datasets import Dataset
from loop import (
    DataArguments,
    LoopArguments,
    gather_with_gradient,
    load_rows,
    make_accelerator,
    parse_arguments,
    train,
)
from torch import nn

from modeling_tscir import TSCIRModel, TSCIRProcessor
from modeling_tscir.embedding import embed_images, embed_references
from modeling_tscir.losses import composing_loss
from modeling_tscir.ranking import top_k


@dataclass
class Stage2Arguments:
    """Columns, and choices of the method; None takes the stage I folder's or TSCIRConfig's."""

    reference_column: str = field(default="reference", metadata={"help": "Column of reference pictures."})
    modification_column: str = field(default="modification", metadata={"help": "Column of modification texts."})
    target_column: str = field(default="target", metadata={"help": "Column of target pictures."})
    reference_id_column: str = field(
        default="reference_id", metadata={"help": "Optional: equal for equal references."}
    )
    target_id_column: str = field(default="target_id", metadata={"help": "Optional: equal for equal targets."})
    lora_rank: int | None = field(default=None, metadata={"help": "Rank of the composing adapters."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Their scale, over the rank."})
    lora_dropout: float | None = field(default=None, metadata={"help": "Their dropout."})
    reference_negative_weight: float | None = field(
        default=None, metadata={"help": "Own reference as a negative; 0 is off."}
    )
    mined_negative_weight: float | None = field(default=None, metadata={"help": "Mined negatives; 0 is off."})
    num_mined_negatives: int | None = field(default=None, metadata={"help": "Mined negatives a query."})
    mined_negative_ceiling: float | None = field(
        default=None, metadata={"help": "Cosine to the target above which none is mined."}
    )
    hard_negative_refresh: int = field(default=100, metadata={"help": "Steps between two minings."})

    def choices(self) -> dict:
        given = {k: v for k, v in vars(self).items() if not k.endswith("_column") and k != "hard_negative_refresh"}
        return {k: v for k, v in given.items() if v is not None}


class Stage2Data(torch.utils.data.Dataset):
    """Triplets as frozen features, computed once.

    A batch of B rows is {"rows" [B], "pseudo_words" [B, M, d_t], "reference_embeds" [B, D], "target_embeds" [B, D],
    "target_ids" [B], "input_ids" and "pseudo_mask" [B, L]}.
    """

    def __init__(
        self, rows: Dataset, model: TSCIRModel, processor: TSCIRProcessor, data: DataArguments, args: Stage2Arguments
    ):
        self.processor, self.texts = processor, list(rows[args.modification_column])
        size = data.feature_batch_size
        references = list(rows[args.reference_column])
        names = rows[args.reference_id_column] if args.reference_id_column in rows.column_names else None
        self.groups = None if names is None else list(names)
        firsts = first_of_each(self.groups if names is not None else [r["bytes"] or r["path"] for r in references])
        unique = sorted(set(firsts))
        embeds, words = embed_references(
            model, processor, [references[i] for i in unique], size, progress="references"
        )
        position = {row: i for i, row in enumerate(unique)}
        index = torch.tensor([position[first] for first in firsts])
        self.reference_embeds, self.pseudo_words = embeds[index], words[index]
        self.target_embeds = embed_images(model, processor, rows[args.target_column], size, progress="targets")
        target_names = (
            list(rows[args.target_id_column])
            if args.target_id_column in rows.column_names
            else [t["bytes"] or t["path"] for t in rows[args.target_column]]
        )
        self.target_ids = torch.tensor(first_of_each(target_names))

    def __len__(self) -> int:
        return len(self.texts)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        index = torch.tensor(rows)
        prompt = self.processor.compose([self.texts[i] for i in rows])
        return {
            "rows": index,
            "pseudo_words": self.pseudo_words[index],
            "reference_embeds": self.reference_embeds[index],
            "target_embeds": self.target_embeds[index],
            "target_ids": self.target_ids[index],
            "input_ids": prompt["input_ids"],
            "pseudo_mask": prompt["pseudo_mask"],
        }


def first_of_each(names: list) -> list[int]:
    """For each row, the first row of the same name."""
    first: dict = {}
    return [first.setdefault(name, row) for row, name in enumerate(names)]


class Miner:
    """Finds each query's nearest wrong targets, every `refresh` steps, with the adapters as they then are."""

    def __init__(self, dataset: Stage2Data, model: TSCIRModel, refresh: int, batch_size: int = 256):
        self.dataset, self.model, self.refresh, self.batch_size = dataset, model, refresh, batch_size
        self.mined: torch.Tensor | None = None  # [len(dataset), H], rows of the dataset
        self.mask: torch.Tensor | None = None  # [len(dataset), H], False for likely right answers

    def __call__(self, step: int) -> None:
        config = self.model.config
        if config.mined_negative_weight > 0 and config.num_mined_negatives > 0 and step and step % self.refresh == 0:
            self.mine(config.num_mined_negatives, config.mined_negative_ceiling)

    @torch.no_grad()
    def mine(self, count: int, ceiling: float) -> None:
        data, model = self.dataset, self.model
        was_training = model.training
        model.eval()
        # Bank: each target once. A query's own target is excluded, however many rows hold it.
        bank_rows = torch.unique(data.target_ids)
        bank = data.target_embeds[bank_rows].to(model.device)
        place = {row: i for i, row in enumerate(bank_rows.tolist())}
        mined, mask = [], []
        for start in range(0, len(data), self.batch_size):
            rows = list(range(start, min(start + self.batch_size, len(data))))
            prompt = data.processor.compose([data.texts[i] for i in rows])
            queries = model.encode_with_pseudo_words(
                prompt["input_ids"].to(model.device),
                prompt["pseudo_mask"].to(model.device),
                data.pseudo_words[rows].to(model.device),
            ).float()
            own = [[place[int(data.target_ids[i])]] for i in rows]
            # Twice as many as wanted, as the ceiling may drop some.
            _, found = top_k(queries, bank, min(2 * count, len(bank) - 1), exclude=own)
            close = torch.einsum("bhd,bd->bh", bank[found], data.target_embeds[rows].to(model.device)) > ceiling
            order = torch.argsort(close.int(), dim=1, stable=True)[:, :count]  # those below the ceiling first
            mined.append(bank_rows[found.gather(1, order).cpu()])
            mask.append(~close.gather(1, order).cpu())
        self.mined, self.mask = torch.cat(mined).clone(), torch.cat(mask).clone()
        model.train(was_training)

    def negatives(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """ "mined_embeds" [B, H, D] and "mined_mask" [B, H] of rows; nothing before the first mining."""
        if self.mined is None:
            return {}
        return {"mined_embeds": self.dataset.target_embeds[self.mined[rows]], "mined_mask": self.mask[rows]}

    def state_dict(self) -> dict:
        return {"mined": self.mined, "mask": self.mask}

    def load_state_dict(self, state: dict) -> None:
        self.mined, self.mask = state["mined"], state["mask"]


class Stage2Objective(nn.Module):
    """InfoNCE of composed queries against targets, with reference and mined negatives, over all processes' batch."""

    def __init__(self, model: TSCIRModel, miner: Miner):
        super().__init__()
        self.model, self.miner, self.logit_scale = model, miner, model.logit_scale

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        config = self.model.config
        words = batch["pseudo_words"]
        query = self.model.encode_with_pseudo_words(batch["input_ids"], batch["pseudo_mask"], words)  # [B, D]
        mined = {
            k: gather_with_gradient(v.to(words.device)) for k, v in self.miner.negatives(batch["rows"].cpu()).items()
        }
        query, targets, references = (
            gather_with_gradient(x.float()) for x in (query, batch["target_embeds"], batch["reference_embeds"])
        )
        loss = composing_loss(
            query,
            targets,
            self.logit_scale,
            target_ids=gather_with_gradient(batch["target_ids"]),
            reference_embeds=references,
            reference_weight=config.reference_negative_weight,
            mined_weight=config.mined_negative_weight,
            **mined,
        )
        terms = {"loss": loss, "target_similarity": (query * targets).sum(-1).mean()}
        terms["reference_similarity"] = (query * references).sum(-1).mean()
        if mined:
            terms["mined_share"] = mined["mined_mask"].float().mean()
        return terms


def main() -> None:
    loop, data, args = parse_arguments(
        LoopArguments,
        DataArguments,
        Stage2Arguments,
        description=__doc__,
        required=("model_name_or_path", "dataset_name", "output_dir"),
    )
    accelerator = make_accelerator(loop)
    model = TSCIRModel.from_pretrained(data.model_name_or_path)
    processor = TSCIRProcessor.from_pretrained(data.model_name_or_path)
    for name, value in args.choices().items():
        setattr(model.config, name, value)
    model.config.validate_choices()
    model.add_adapters()
    model.to(accelerator.device).eval()
    columns = {
        args.reference_column: "the reference picture",
        args.modification_column: "the modification text",
        args.target_column: "the target picture",
    }
    rows, skipped = load_rows(data, columns, images=[args.reference_column, args.target_column])
    dataset = Stage2Data(rows, model, processor, data, args)
    miner = Miner(dataset, model, args.hard_negative_refresh)
    objective = Stage2Objective(model, miner)
    train(
        accelerator,
        objective,
        model,
        processor,
        dataset,
        loop,
        skipped,
        groups=dataset.groups,
        before_step=miner,
        checkpointed=(miner,),
    )


if __name__ == "__main__":
    main()
