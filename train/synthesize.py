"""Triplets from captioned images, for stage II.

    python train/synthesize.py --dataset_name user/captions --output_dir runs/triplets --num_triplets 100000
    accelerate launch train/stage2.py --model_name_or_path runs/stage1 --dataset_name runs/triplets ...

With a CLIP (--model_name_or_path) similar pictures are paired that the target's caption tells apart, and that caption
is the modification. Without, captions that say nearly the same are paired, at thousands a second, and the modification
says in which words they differ, by template. High quality: the same pairs, their modifications written by a language
model,

    --quality high --language_model NAME --endpoint http://localhost:8000/v1     (any OpenAI-compatible server)
    --quality high --language_model FOLDER_OR_HUB_NAME                           (a chat model of transformers)

Columns: reference, modification, target, source, quality, reference_id, target_id, kind and both captions. Without an
image column in the data there are no pictures, reference and target, but stage II trains on the captions.
"""

import argparse
import json
import os
import random
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from caption_pairs import Change, changes_between, diversity, near_captions, words_of
from checkpoints import refuse_unwritable_folder
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from language_model import ChatModel, Endpoint, Writer
from picture_pairs import told_apart
from rows import UNFINISHED, check_columns, file_of, first_of_each, load_source, text_problem
from tqdm.auto import tqdm

from modeling_tscir import TSCIRModel, TSCIRProcessor
from modeling_tscir.embedding import embed_images, embed_texts
from modeling_tscir.feature_cache import picture_name
from modeling_tscir.images import find_bad_images, handle_bad_images


# Words that by themselves change nothing that can be seen.
ARTICLES = frozenset({"a", "an", "the", "some"})
FUNCTION_WORDS = ARTICLES | {
    "and", "are", "at", "be", "by", "her", "his", "in", "is", "it", "its", "of", "on", "that", "their", "there",
    "these", "this", "those", "to", "with",
}  # fmt: skip
ID_COLUMN = "image_id"
MADE_BY = "made by TSCIR's `train/synthesize.py`"
ROWS_PER_FILE = 1000
# What limits pairs: the default, what it is, and whether it is of pairs of pictures rather than of captions.
LIMITS = {
    "min_similarity": (0.3, "cosine of two captions, by their words", False),
    "max_similarity": (0.95, "the same, above which they say the same", False),
    "min_caption_fit": (0.15, "cosine of a picture and its caption", True),
    "min_caption_gain": (
        0.02,
        "by how much a caption must fit the target better than the reference, in cosines",
        True,
    ),
    "max_image_similarity": (0.97, "cosine of two pictures, above which they are the same", True),
}
TEMPLATES = {
    "replace": ("{added} instead of {removed}", "replace {removed} with {added}", "not {removed} but {added}",
                "change {removed} to {added}"),
    "add": ("add {added}", "with {added}", "there is also {added}", "put in {added}"),
    "remove": ("without {removed}", "remove {removed}", "no {removed}", "take away {removed}"),
    "caption": ("{caption}", "it shows {caption}", "show {caption}"),
}  # fmt: skip


def template_modification(
    reference: Sequence[str], target: Sequence[str], rng: random.Random, max_changes: int = 2
) -> tuple[str, str]:
    """A modification from two captions' words, and its kind.

    Up to `max_changes` phrases that differ are told as edits, "{added} instead of {removed}"; pictures that differ in
    more are told by the target's caption.
    """
    changes = [change for change in map(trimmed, changes_between(reference, target)) if any(change)]
    if not changes or len(changes) > max_changes:
        return rng.choice(TEMPLATES["caption"]).format(caption=" ".join(target)), "caption"
    parts = [rng.choice(TEMPLATES[c.kind]).format(removed=c[0], added=c[1]) for c in changes]
    return " and ".join(parts), "+".join(sorted(c.kind for c in changes))


def trimmed(change: Change) -> Change:
    """A change without the function words at the ends of its phrases."""
    phrases = []
    for phrase in change:
        words = phrase.split()
        while words and words[0] in FUNCTION_WORDS and (len(words) == 1 or words[0] not in ARTICLES):
            words.pop(0)
        while words and words[-1] in FUNCTION_WORDS:
            words.pop()
        phrases.append(" ".join(words))
    return Change(phrases)


def near_in_words(args: argparse.Namespace, captions: list[list[str]], ids: list) -> list[tuple[int, int]]:
    """(reference row, target row) of near captions: of references drawn from all rows, each one's nearest first."""
    wanted = 2 * args.num_triplets  # as filters drop some
    order = random.Random(f"references {args.seed}").sample(range(len(captions)), len(captions))
    per_reference = max(1, -(-wanted // len(captions)))
    near = near_captions(captions, ids, per_reference, args.min_similarity, args.max_similarity, order=order)
    lists, count = [], 0
    for found in tqdm(near, total=len(captions), desc="nearest captions", unit="caption", mininterval=2):
        lists.append(found)
        count += len(found)
        if count >= wanted:
            break
    longest = max(map(len, lists), default=0)
    drawn = list(zip(order, lists, strict=False))
    return [(row, found[depth]) for depth in range(longest) for row, found in drawn if len(found) > depth]


def embeddings_of(rows: Dataset, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every row's picture and caption, [n, D] each."""
    if args.image_column is None:
        raise ValueError(f"{args.dataset_name} has no pictures ('image') for {args.model_name_or_path}")
    model = TSCIRModel.from_clip_pretrained(args.model_name_or_path).to(args.device)
    processor = TSCIRProcessor.from_clip_pretrained(args.model_name_or_path)
    images = embed_images(model, processor, rows[args.image_column], progress="images")
    texts = embed_texts(model, processor, list(rows[args.caption_column]), progress="captions")
    return images, texts


def read_rows(args: argparse.Namespace) -> tuple[Dataset, list, dict[str, str]]:
    """The captioned rows, each one's picture id, and why rows were left out.

    Rows without an id are of one picture where their pictures are equal.
    """
    options = {"field": args.json_field} if args.json_field else {}
    rows = load_source(args, **options, **({"data_files": args.data_files} if args.data_files else {}))
    if args.image_column is None and "image" in rows.column_names:
        args.image_column = "image"
    pictures = {} if args.image_column is None else {args.image_column: "the picture"}
    check_columns(args, {args.caption_column: "the caption", **pictures}, rows, images=list(pictures))
    if args.id_column is not None and args.id_column not in rows.column_names:
        raise ValueError(
            f"--id_column {args.id_column}: {args.dataset_name} has no such column; it has {rows.column_names}"
        )
    names = [f"row {i}" for i in range(len(rows))]
    problems = (text_problem(text, args.caption_column) for text in rows[args.caption_column])
    bad = {name: why for name, why in zip(names, problems, strict=True) if why is not None}
    if pictures:
        rows = rows.cast_column(args.image_column, ImageFeature(decode=False))
        pictures = rows[args.image_column]
        reasons = dict(find_bad_images(pictures, range(len(rows))))
        bad |= {names[i]: f"{why}{file_of(pictures[i])}" for i, why in reasons.items()}
    handle_bad_images(list(bad.items()), len(rows), args.on_bad_image)
    kept = [i for i, name in enumerate(names) if name not in bad]
    rows = rows.select(kept) if bad else rows
    id_column = args.id_column or ID_COLUMN
    if id_column not in rows.column_names and args.image_column is None:
        raise ValueError(f"{args.dataset_name} has neither pictures ('image') nor {id_column!r}")
    ids = list(rows[id_column]) if id_column in rows.column_names else [None] * len(rows)
    unnamed = [i for i, name in enumerate(ids) if name is None or not str(name).strip()]
    if unnamed and args.image_column is not None:
        first = first_of_each([picture_name(picture) for picture in rows[args.image_column]])
    else:
        first = range(len(rows))
    row = "row " if len(unnamed) < len(ids) else ""  # as ids may be numbers themselves
    for i in unnamed:
        ids[i] = f"{row}{kept[first[i]]}"
    return rows, ids, bad


def language_model(args: argparse.Namespace) -> Writer:
    if args.endpoint:
        key = os.environ.get("OPENAI_API_KEY")
        ask = Endpoint(args.endpoint, args.language_model, key, args.timeout, max_tokens=args.max_tokens)
    else:
        ask = ChatModel(args.language_model, max_tokens=args.max_tokens, device=args.device)
    return Writer(ask, args.output_dir / "answers.jsonl", args.attempts)


def what_it_took(writer: Writer, args: argparse.Namespace) -> dict:
    report = dict(writer.report)
    tokens = [report.get(f"{kind}_tokens", 0) for kind in ("prompt", "completion")]
    return report | {"cost": (tokens[0] * args.prompt_price + tokens[1] * args.completion_price) / 1e6}


def modifications_of(
    pairs: list[tuple[int, int]],
    captions: list[list[str]],
    texts: list[str],
    args: argparse.Namespace,
    rng: random.Random,
    writer: Writer | None,
) -> Iterable[tuple[str | None, str]]:
    """(modification, kind) of every pair, by template or by `writer`; None where it wrote nothing usable."""
    if writer is not None:
        written = writer.write([(texts[i], texts[j]) for i, j in pairs], args.workers if args.endpoint else 1)
        return [(text, "written") for text in tqdm(written, args.language_model, len(pairs), unit="text")]
    if args.model_name_or_path is None:
        return [template_modification(captions[i], captions[j], rng) for i, j in pairs]
    return [(rng.choice(TEMPLATES["caption"]).format(caption=texts[j]), "caption") for _, j in pairs]


def synthesize(args: argparse.Namespace) -> dict:
    """Write the triplets and their card; gives the report that is in it.

    Raises:
        ValueError: for what cannot be read or written, and rather than replace triplets that are there.
    """
    refuse_unwritable_folder(str(args.output_dir))
    if (args.output_dir / "data").is_dir() and any((args.output_dir / "data").iterdir()):
        raise ValueError(f"{args.output_dir} holds triplets already: choose another --output_dir, or remove its data/")
    card = args.output_dir / "README.md"
    if card.is_file() and MADE_BY not in card.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"{card} is not of triplets, and would be replaced: choose another --output_dir")
    rows, ids, left_out = read_rows(args)
    texts = list(rows[args.caption_column])
    captions = [words_of(text) for text in texts]
    dropped: dict[str, int] = {}
    if args.model_name_or_path is None:
        pairs = near_in_words(args, captions, ids)
    else:
        images, embeds = embeddings_of(rows, args)
        every, dropped = told_apart(
            images, embeds, ids, 2 * args.num_triplets, args.max_image_similarity, args.min_caption_gain
        )
        fits = (images * embeds).sum(-1)
        pairs = [(i, j) for i, j in every if min(fits[i], fits[j]) >= args.min_caption_fit]
        dropped["caption does not fit its picture"] = len(every) - len(pairs)
    writer = language_model(args) if args.quality == "high" else None
    rng, read = random.Random(args.seed), 0
    kept, seen = [], set()
    while read < len(pairs) and len(kept) < args.num_triplets:  # no more than are missing, as answers may cost
        some = pairs[read : read + args.num_triplets - len(kept)]
        read += len(some)
        for (i, j), (text, kind) in zip(some, modifications_of(some, captions, texts, args, rng, writer), strict=True):
            if text is None:
                dropped["no usable text"] = dropped.get("no usable text", 0) + 1
            elif (ids[i], text) in seen:
                dropped["the same reference and text"] = dropped.get("the same reference and text", 0) + 1
            else:
                seen.add((ids[i], text))
                kept.append((i, j, text, kind))
    writing = {} if writer is None else what_it_took(writer, args)
    if dropped.get("no usable text") == read > 0:
        raise ValueError(
            f"{args.language_model} wrote nothing usable for {read} pairs: {writing}; the last time: {writer.last}"
        )
    remedy = "lower --min_similarity or raise --max_similarity"
    if args.model_name_or_path is not None:
        remedy = "lower --min_caption_gain or --min_caption_fit"
    if not kept:
        raise ValueError(f"no triplet was left of {len(pairs)} pairs; dropped: {dropped}; {remedy}")
    if len(kept) < args.num_triplets:
        sys.stderr.write(f"{len(kept)} triplets are fewer than {args.num_triplets}; {remedy} for more\n")
    report = {"quality": args.quality, "left_out": left_out, "pairs": len(pairs), "dropped": dropped}
    report["writing"] = writing
    report |= diversity([text for *_, text, _ in kept], [kind for *_, kind in kept])
    write_triplets(rows, ids, texts, kept, args)
    write_card(args, report)
    return report


def write_triplets(rows: Dataset, ids: list, texts: list[str], kept: list[tuple], args: argparse.Namespace) -> None:
    """Written aside and moved into place whole; memory holds ROWS_PER_FILE."""
    aside, final = args.output_dir / UNFINISHED, args.output_dir / "data"
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
    aside.mkdir(parents=True)
    starts = range(0, len(kept), ROWS_PER_FILE)
    for number, start in enumerate(starts):
        table = table_of(rows, ids, texts, kept[start : start + ROWS_PER_FILE], args)
        table.to_parquet(aside / f"train-{number:05d}-of-{len(starts):05d}.parquet")
    if final.is_dir():
        final.rmdir()  # it was empty
    os.replace(aside, final)


def table_of(rows: Dataset, ids: list, texts: list[str], kept: list[tuple], args: argparse.Namespace) -> Dataset:
    """Some of the triplets, (reference row, target row, modification, kind), as they are written."""
    columns, features = {}, {}
    if args.image_column is not None:
        pictures = rows[args.image_column]
        columns = {"reference": [pictures[i] for i, *_ in kept], "target": [pictures[j] for _, j, *_ in kept]}
        features = {name: ImageFeature() for name in columns}
    columns |= {
        "modification": [text for *_, text, _ in kept],
        "source": [args.dataset_name] * len(kept),
        "quality": [args.quality] * len(kept),
        "reference_id": [str(ids[i]) for i, *_ in kept],
        "target_id": [str(ids[j]) for _, j, *_ in kept],
        "kind": [kind for *_, kind in kept],
        "reference_caption": [texts[i] for i, *_ in kept],
        "target_caption": [texts[j] for _, j, *_ in kept],
    }
    features |= {name: Value("string") for name in columns if name not in features}
    return Dataset.from_dict(columns, features=Features(features))


def write_card(args: argparse.Namespace, report: dict) -> None:
    header = "---\ntask_categories:\n- image-feature-extraction\ntags:\n- composed-image-retrieval\n- synthetic\n---\n"
    if args.model_name_or_path is None:
        pairing = f"Pictures with near captions (cosine {args.min_similarity} to {args.max_similarity}) are paired"
        way = "by template from the words in which the captions differ"
    else:
        pairing = f"Similar pictures that the target's caption tells apart are paired, by {args.model_name_or_path}"
        way = "by template from the target's caption"
    if args.quality == "high":
        way = f"by the language model {args.language_model}"
    text = f"""{header}
# Triplets from {args.dataset_name}

{report["triplets"]} triplets of a reference, a modification text and a target, {MADE_BY}.
{pairing}; modifications are
written {way}. Pictures and captions keep the licence of their source.

```json
{json.dumps(report, indent=2)}
```
"""
    (args.output_dir / "README.md").write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="captioned images: anything that `datasets` loads")
    parser.add_argument("--data_files", help="for a format's name, such as --dataset_name json --data_files x.json")
    parser.add_argument("--json_field", help="where the records are in a JSON file")
    parser.add_argument("--dataset_train_split", default="train")
    parser.add_argument("--image_column", help="the pictures; image, where the data has it")
    parser.add_argument("--caption_column", default="caption", help="their captions (caption)")
    parser.add_argument("--id_column", help=f"equal for captions of one picture; {ID_COLUMN}, where the data has it")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_triplets", type=int, default=100_000, help="at most (100,000)")
    parser.add_argument(
        "--quality", default="low", choices=["low", "high"], help="by template (low), or by a language model"
    )
    parser.add_argument("--model_name_or_path", help="a CLIP: pairs pictures, rather than captions")
    for name, (default, what, _) in LIMITS.items():
        parser.add_argument(f"--{name}", type=float, help=f"{what} ({default})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--language_model", help="of high quality: a name at the endpoint, or a transformers model")
    parser.add_argument("--endpoint", help="http://host:port/v1; the key is read from OPENAI_API_KEY")
    parser.add_argument(
        "--attempts", type=int, default=4, help="requests a pair at most, unusable answers of runs before included"
    )
    parser.add_argument("--max_tokens", type=int, default=120, help="of an answer; more for a model that thinks first")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for an answer")
    parser.add_argument("--workers", type=int, default=8, help="requests at a time")
    parser.add_argument("--prompt_price", type=float, default=0.0, help="of a million tokens, for the cost report")
    parser.add_argument("--completion_price", type=float, default=0.0)
    parser.add_argument(
        "--on_bad_image", default="error", choices=["error", "skip"], help="of rows without a caption as well"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.num_triplets < 1:
        parser.error(f"--num_triplets is at least 1, not {args.num_triplets}")
    for name in ("attempts", "max_tokens", "workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is at least 1, not {getattr(args, name)}")
    if (args.quality == "high") != bool(args.language_model):
        parser.error("--quality high and --language_model need one another")
    if args.endpoint and not args.language_model:
        parser.error("--endpoint is for --quality high")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device} is not to be had: {str(error).splitlines()[0]}")
    for name, (default, _, of_pictures) in LIMITS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif of_pictures != (args.model_name_or_path is not None):
            parser.error(f"--{name} is for pairs made {'with' if of_pictures else 'without'} --model_name_or_path")
    try:
        report = synthesize(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(json.dumps(report, indent=2) + f"\nwritten to {args.output_dir}\n")


if __name__ == "__main__":
    main()
