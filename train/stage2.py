"""Stage II: train the composing adapters on triplets, with CLIP and mapper frozen.

    accelerate launch train/stage2.py --model_name_or_path runs/stage1 \\
        --dataset_name user/triplets --output_dir runs/stage2

Rows need a reference picture, a modification text and a target picture. Rows of one `reference_id` share a batch, so
that targets of other edits of the same reference are hard negatives; rows of one `target_id` are never negatives of
each other. Text triplets will do as well: where the data has captions in place of pictures, a reference's caption
stands in the prompt where its pseudo-words would, and the target is its caption's embedding. From a folder of stage
II, training goes on with its adapters: first on many texts, say, then on few pictures.
"""

import functools
from dataclasses import dataclass, field

import shared
import torch
from arguments import DataArguments, LoopArguments, parse_arguments, run_as_script
from checkpoints import keep_backbone
from datasets import ClassLabel, Dataset, Value
from gradients import Objective, bf16_where_fast, gather_with_gradient, precision
from loop import make_accelerator, steps_of, train
from mining import Miner
from rows import RowBatches, first_of_each, hold_out, in_batches, load_rows, load_source
from transformers.utils import logging
from validation import Validation

from modeling_tscir import TSCIRConfig, TSCIRModel, TSCIRProcessor
from modeling_tscir.backbone import fingerprint_of_tensors
from modeling_tscir.embedding import TEXTS_A_BATCH, embed_images, embed_references, embed_texts
from modeling_tscir.feature_cache import feature_key, picture_name, pictures_digest
from modeling_tscir.images import Selected
from modeling_tscir.losses import composing_loss


logger = logging.get_logger(__name__)


@dataclass
class Stage2Arguments:
    """Columns, and choices of the method; None takes the stage I folder's or TSCIRConfig's."""

    reference_column: str = field(default="reference", metadata={"help": "Column of reference pictures."})
    modification_column: str = field(default="modification", metadata={"help": "Column of modification texts."})
    target_column: str = field(default="target", metadata={"help": "Column of target pictures."})
    reference_caption_column: str = field(
        default="reference_caption", metadata={"help": "Of text triplets: column of the references' captions."}
    )
    target_caption_column: str = field(
        default="target_caption", metadata={"help": "Of text triplets: column of the targets' captions."}
    )
    reference_id_column: str = field(
        default="reference_id", metadata={"help": "Optional: equal for equal references."}
    )
    target_id_column: str = field(default="target_id", metadata={"help": "Optional: equal for equal targets."})
    lora_rank: int | None = field(default=None, metadata={"help": "Rank of the composing adapters."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Their scale, over the rank."})
    lora_dropout: float | None = field(default=None, metadata={"help": "Their dropout."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Which projections have them: q_proj k_proj v_proj out_proj fc1 fc2."}
    )
    prompt_template: str | None = field(default=None, metadata={"help": "Of composed queries; stage I's unless told."})
    reference_negative_weight: float | None = field(
        default=None, metadata={"help": "Own reference as a negative; 0 is off."}
    )
    mined_negative_weight: float | None = field(default=None, metadata={"help": "Mined negatives; 0 is off."})
    num_mined_negatives: int | None = field(default=None, metadata={"help": "Mined negatives a query."})
    mined_negative_ceiling: float | None = field(
        default=None, metadata={"help": "Cosine to the target above which none is mined."}
    )
    gce_q: float | None = field(
        default=None,
        metadata={"help": "q of generalized cross-entropy, 0.7 unless told: bears wrong targets. 0 is InfoNCE."},
    )
    residual: float | None = field(
        default=None, metadata={"help": "How much of v(x) - q(x) the trained model's queries have."}
    )
    composed_weight: float | None = field(
        default=None, metadata={"help": "How far the trained model's queries stand towards the text."}
    )
    hard_negative_refresh: int = field(default=100, metadata={"help": "Steps between two minings."})

    def __post_init__(self):
        if self.hard_negative_refresh < 1:
            raise ValueError(f"--hard_negative_refresh must be at least 1, not {self.hard_negative_refresh}")

    def choices(self) -> dict:
        others = ("hard_negative_refresh", "prompt_template")
        given = {k: v for k, v in vars(self).items() if not k.endswith("_column") and k not in others}
        return {k: v for k, v in given.items() if v is not None}


class Stage2Data(torch.utils.data.Dataset):
    """Triplets as frozen features, computed once.

    A batch of B rows is {"rows" [B], "pseudo_words" [B, M, d_t], "reference_embeds" [B, D], "target_embeds" [B, D],
    "target_ids" [B], "input_ids" and "pseudo_mask" [B, L]}. Of text triplets M is 0. Pseudo-words and embedding of a
    reference are held once, however many rows are edits of it.
    """

    def __init__(
        self, rows: Dataset, model: TSCIRModel, processor: TSCIRProcessor, data: DataArguments, args: Stage2Arguments
    ):
        self.processor, self.texts = processor, list(rows[args.modification_column])
        self.groups = group_names(rows, args)
        if args.reference_column in rows.column_names:
            self.captions = self.target_captions = None
            self._embed_pictures(rows, model, data.feature_batch_size, data.feature_cache_dir, args)
        else:
            self.captions, self.target_captions = (
                list(rows[column]) for column in (args.reference_caption_column, args.target_caption_column)
            )
            self._embed_captions(rows, model, args)

    def _embed_pictures(
        self, rows: Dataset, model: TSCIRModel, size: int, folder: str | None, args: Stage2Arguments
    ) -> None:
        firsts = first_of_each(self.groups)
        warn_of_pictures_of_one_id(rows, firsts, args)
        unique = sorted(set(firsts))
        position = {row: i for i, row in enumerate(unique)}
        self.references = torch.tensor([position[first] for first in firsts])  # [rows], each row's among them
        references, targets = Selected(rows[args.reference_column], unique), rows[args.target_column]
        keys = ["", ""]
        if folder is not None:
            # 2, as references were normalised in half precision before.
            contents = [[pictures_digest(references), mapper_key(model), 2], [pictures_digest(targets)]]
            keys = [feature_key(model, self.processor, [*content, precision(model)]) for content in contents]
        both = functools.cache(
            lambda: shared.features(embed_references, model, self.processor, references, size, "references")
        )
        self.reference_embeds = shared.cached(folder, keys[0], lambda: both()[0])
        self.pseudo_words = shared.cached(folder, f"{keys[0]}-pseudo-words", lambda: both()[1])
        self.target_embeds = shared.cached(
            folder,
            keys[1],
            lambda: shared.features(embed_images, model, self.processor, targets, size, "targets"),
        )
        self.target_ids = torch.tensor(first_of_each(names_of(rows, args.target_id_column, args.target_column)))

    def _embed_captions(self, rows: Dataset, model: TSCIRModel, args: Stage2Arguments) -> None:
        given = embed_texts, model, self.processor
        self.reference_embeds = shared.features(*given, self.captions, TEXTS_A_BATCH, "reference captions")
        self.target_embeds = shared.features(*given, self.target_captions, TEXTS_A_BATCH, "target captions")
        self.references = torch.arange(len(rows))
        self.pseudo_words = torch.empty(len(rows), 0, model.config.clip_config.text_config.hidden_size)
        self.target_ids = torch.tensor(
            first_of_each(names_of(rows, args.target_id_column, args.target_caption_column))
        )

    @property
    def content(self) -> list:
        """Everything but pictures that decides batches and loss: texts, and whose references and targets are equal."""
        equal = first_of_each(self.groups), self.target_ids.tolist()
        return [self.texts, self.captions, self.target_captions, *equal]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        index = torch.tensor(rows)
        references = self.references[index]
        captions = None if self.captions is None else [self.captions[i] for i in rows]
        prompt = self.processor.compose([self.texts[i] for i in rows], captions)
        return {
            "rows": index,
            "pseudo_words": self.pseudo_words[references],
            "reference_embeds": self.reference_embeds[references],
            "target_embeds": self.target_embeds[index],
            "target_ids": self.target_ids[index],
            "input_ids": prompt["input_ids"],
            "pseudo_mask": prompt["pseudo_mask"],
        }


def mapper_key(model: TSCIRModel) -> list:
    """What decides pseudo-words, beside frozen features."""
    config = model.config
    choices = [config.num_injection_heads, config.mapper_activation, config.mapper_input]
    return [fingerprint_of_tensors(model.mapper.state_dict()), *choices]


def group_names(rows: Dataset, args: Stage2Arguments) -> list:
    """What tells each row's reference."""
    pictures = args.reference_column in rows.column_names
    column = args.reference_column if pictures else args.reference_caption_column
    return names_of(rows, args.reference_id_column, column)


def pictures_of(rows: Dataset, args: Stage2Arguments) -> list[int]:
    """Of each row's target and then of each row's reference, the first place with the same picture, or caption."""
    if args.reference_column not in rows.column_names:
        return first_of_each([*rows[args.target_caption_column], *rows[args.reference_caption_column]])
    return first_of_each([picture_name(one) for c in (args.target_column, args.reference_column) for one in rows[c]])


def warn_of_pictures_of_one_id(rows: Dataset, firsts: list[int], args: Stage2Arguments) -> None:
    """Say where rows of one reference's id show another picture than the first of them, which stands for all."""
    later = [row for row, first in enumerate(firsts) if row != first]
    if not later or args.reference_id_column not in rows.column_names:
        return
    asked = sorted({*later, *(firsts[row] for row in later)})
    shown = dict(zip(asked, map(picture_name, rows.select(asked)[args.reference_column]), strict=True))
    other = [row for row in later if shown[row] != shown[firsts[row]]]
    if other:
        logger.warning(
            f"{len(other)} rows have the {args.reference_id_column} of another row and another picture, as row "
            f"{other[0]} has row {firsts[other[0]]}'s: the first one's is taken for all of an id. If these are no "
            "copies of one picture, name another --reference_id_column, or none ('')"
        )


def names_of(rows: Dataset, id_column: str, column: str) -> list:
    """Each row's id; where the data has none, what equal pictures, still encoded, or equal texts of `column` share.

    Raises:
        ValueError: if the ids are neither texts nor numbers.
    """
    if id_column in rows.column_names and not isinstance(rows.features[id_column], (Value, ClassLabel)):
        raise ValueError(f"column {id_column} holds no ids but {rows.features[id_column]}; its flag names another")
    names = list(rows[id_column]) if id_column in rows.column_names else [None] * len(rows)
    nameless = [row for row, name in enumerate(names) if name is None or not str(name).strip()]
    for row, found in zip(nameless, rows.select(nameless)[column], strict=True):
        names[row] = (column, picture_name(found) if isinstance(found, dict) else found)
    return names


class Stage2Objective(Objective):
    """Composed queries against targets, reference and mined negatives, over all processes' batch."""

    target, reference = "target_embeds", "reference_embeds"

    def __init__(self, model: TSCIRModel, miner: Miner | None = None):
        super().__init__(model)
        self.miner = miner

    def frozen(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch, which holds frozen features already, and the mined negatives of its rows."""
        if self.miner is None:
            return batch
        mined = self.miner.negatives(batch["rows"].cpu())
        return batch | {k: v.to(self.device) for k, v in mined.items()}

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        words = features["pseudo_words"]
        return self.model.encode_with_pseudo_words(features["input_ids"], features["pseudo_mask"], words).float()

    def loss(self, queries: torch.Tensor, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        config = self.model.config
        query, targets, references = (
            gather_with_gradient(x.float()) for x in (queries, features["target_embeds"], features["reference_embeds"])
        )
        mined = {k: gather_with_gradient(v) for k, v in features.items() if k in ("mined_embeds", "mined_mask")}
        loss = composing_loss(
            query,
            targets,
            self.logit_scale,
            target_ids=gather_with_gradient(features["target_ids"]),
            reference_embeds=references,
            reference_weight=config.reference_negative_weight,
            mined_weight=config.mined_negative_weight,
            gce_q=config.gce_q,
            **mined,
        )
        terms = {"loss": loss, "target_similarity": (query * targets).sum(-1).mean()}
        terms["reference_similarity"] = (query * references).sum(-1).mean()
        if mined:
            terms["mined_share"] = mined["mined_mask"].float().mean()
            mined_similarity = torch.einsum("bd,bhd->bh", query, mined["mined_embeds"])
            terms["mined_similarity"] = mined_similarity.mean()
        return terms


def main() -> None:
    loop, data, args = parse_arguments(
        LoopArguments,
        DataArguments,
        Stage2Arguments,
        description=__doc__,
        required=("model_name_or_path", "dataset_name", "output_dir"),
    )
    accelerator = make_accelerator(loop, data, args)
    model = TSCIRModel.from_pretrained(data.model_name_or_path)
    processor = TSCIRProcessor.from_pretrained(data.model_name_or_path)
    if args.prompt_template is not None:
        processor.prompt_template = processor.checked_template(args.prompt_template)
    for name, value in args.choices().items():
        if name.startswith("lora_") and model.config.stage == 2 and value != getattr(model.config, name):
            raise ValueError(f"{data.model_name_or_path} has adapters of {name} {getattr(model.config, name)} already")
        setattr(model.config, name, value)
    model.config.validate_choices()
    defaults, told = TSCIRConfig(), args.choices()
    choices = [name for name in vars(args) if name not in told and hasattr(defaults, name)]
    kept = {name: v for name in choices if (v := getattr(model.config, name)) != getattr(defaults, name)}
    if kept:
        accelerator.print(f"{data.model_name_or_path} keeps {kept}, other than today's defaults; flags change them")
    if model.config.stage == 2:
        accelerator.print(f"{data.model_name_or_path} has composing adapters already; training goes on with them")
    else:
        model.add_adapters()
    keep_backbone(accelerator, model, loop.output_dir)
    model.to(accelerator.device).eval()
    rows, skipped = load_triplets(data, args)
    rows, held_out = hold_out(rows, data.validation_rows, loop.seed, group_names(rows, args))
    with bf16_where_fast(model.device, asked=loop.mixed_precision == "bf16"):
        dataset = Stage2Data(rows, model, processor, data, args)
        pictures = pictures_of(held_out, args) if held_out is not None else None
        held_out = Stage2Data(held_out, model, processor, data, args) if held_out is not None else None
    batches = RowBatches(accelerator, dataset, loop, dataset.groups, skipped, dataset.content)
    miner = Miner(dataset, model, args.hard_negative_refresh, batches.rows_ahead)
    steps = steps_of(loop, batches)
    if miner.wanted and args.hard_negative_refresh >= steps:
        logger.warning(
            f"mined_negative_weight {model.config.mined_negative_weight} mines nothing: the first mining comes after "
            f"{args.hard_negative_refresh} steps, and the run has {steps}; lower --hard_negative_refresh"
        )
    validation = None
    if held_out is not None and accelerator.is_main_process:
        validation = Validation(Stage2Objective(model), in_batches(held_out, data.feature_batch_size), pictures)
    train(
        accelerator,
        Stage2Objective(model, miner),
        model,
        processor,
        batches,
        loop,
        vars(data) | vars(args),
        validation,
        before_step=miner,
        checkpointed=(miner,),
    )


def load_triplets(data: DataArguments, args: Stage2Arguments) -> tuple[Dataset, list[tuple[str, str]]]:
    """Triplets of pictures, or of captions where not both have pictures; those of one are dropped then.

    Raises:
        ValueError: for a column that was named and is not there. And as `load_rows`.
    """
    pictures = {args.reference_column: "the reference picture", args.target_column: "the target picture"}
    captions = {args.reference_caption_column: "the reference's caption", args.target_caption_column: "the target's"}
    text = {args.modification_column: "the modification text"}
    rows = load_source(data)
    found = set(rows.column_names)
    for name, column in vars(args).items():  # some are optional, but not where they were named
        told = name.endswith("_column") and column not in ("", getattr(Stage2Arguments, name))
        if told and column not in found:
            raise ValueError(f"--{name} {column}: {data.dataset_name} has no such column; it has {sorted(found)}")
    if set(captions) <= found and not set(pictures) <= found:
        rows = rows.remove_columns(list(set(pictures) & found))
        return load_rows(data, captions | text, images=[], rows=rows)
    return load_rows(data, pictures | text, images=list(pictures), rows=rows)


if __name__ == "__main__":
    run_as_script(main)
