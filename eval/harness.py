"""What every benchmark script shares: queries by each method, ranking, and the files that a run leaves."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from benchmark_arguments import METHODS, PADDING, add_common_arguments, require_outputs
from results import claim_folder, counts, describe_data, describe_model, table, write_rankings
from safetensors import SafetensorError
from splits import Ranked, Split, without_pictures
from transformers import AutoConfig
from transformers.utils import logging

from modeling_tscir import TSCIRModel, TSCIRProcessor
from modeling_tscir.backbone import why_not
from modeling_tscir.embedding import embed_images, embed_queries, embed_texts
from modeling_tscir.feature_cache import cached_in_parts, feature_key, file_fingerprints, is_cached, preprocessing_of
from modeling_tscir.images import BadImagesError, Selected, find_bad_images, handle_bad_images
from modeling_tscir.publishing import versions
from modeling_tscir.queries import slerp
from modeling_tscir.ranking import Ranking, rank_candidates, rank_gallery


logger = logging.get_logger(__name__)


TOP_K = 50
BATCHES_A_PART = 128  # of pictures, whose embeddings a run that is stopped leaves for the next


@dataclass(frozen=True)
class Benchmark:
    """One benchmark, as its script declares it.

    Args:
        name: prefix of its metrics.
        load: (arguments) to splits by category ("" where there is one), raising `ValueError` for what is missing.
        metrics: (splits, rankings by category) to flat metrics as fractions; called where truths are public.
        primary_metric: the name of one of them.
        protocol: (arguments) to the switches that decide the figures.
        splits: choices of `--split`.
        published_counts: (arguments) to the numbers of queries and gallery pictures of the published benchmark, by
            category; of one without a gallery, of pictures in each query's list.
        submissions: (split, rankings) to file names and contents, checked against the server's rules; for test splits.
        submission_files: these names.
        add_arguments: adds the switches to the parser.
    """

    name: str
    description: str
    load: Callable[[argparse.Namespace], dict[str, Split]]
    metrics: Callable[[dict[str, Split], dict[str, Ranked]], dict[str, float]]
    primary_metric: str
    protocol: Callable[[argparse.Namespace], dict]
    published_counts: Callable[[argparse.Namespace], dict[str, tuple[int | None, int | None]]]
    splits: tuple[str, ...] = ("val",)
    submissions: Callable[[Split, Ranked], dict[str, dict]] | None = None
    submission_files: tuple[str, ...] = ()
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None


def parse_arguments(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=benchmark.description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser)
    parser.add_argument("--split", default="val", choices=benchmark.splits)
    benchmark.add_arguments(parser)
    args = parser.parse_args(arguments)
    require_outputs(parser, args)
    return args


# ----- embeddings and queries


def load_model(args: argparse.Namespace) -> tuple[TSCIRModel, TSCIRProcessor]:
    """A trained folder, or a plain CLIP that answers training-free, with the prompt and preprocessing asked for."""
    name, dtype = args.model_name_or_path, getattr(torch, args.dtype)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}") from error
    try:
        plain = AutoConfig.from_pretrained(name).model_type == "clip"
    except (OSError, ValueError) as error:
        raise ValueError(f"--model_name_or_path {name} cannot be read: {why_not(name, error)}") from error
    if plain:
        model, processor = (
            TSCIRModel.from_clip_pretrained(name, dtype=dtype),
            TSCIRProcessor.from_clip_pretrained(name),
        )
    else:
        model, processor = TSCIRModel.from_pretrained(name, dtype=dtype), TSCIRProcessor.from_pretrained(name)
    if args.prompt_template is not None:
        processor.prompt_template = processor.checked_template(args.prompt_template)
    if args.preprocessing != "model":
        processor.padded_aspect_ratio = PADDING[args.preprocessing]
    model = model.to(args.device).eval()
    model.merge_adapter()
    return model, processor


def picture_key(model: TSCIRModel, processor: TSCIRProcessor, split: Split) -> str:
    return feature_key(model, processor, file_fingerprints(split.files))


def embed_pictures(model: TSCIRModel, processor: TSCIRProcessor, split: Split, args) -> torch.Tensor:
    """Every picture's embedding [N, D], L2-normalised, from the cache where it is there, and so is a part of them."""
    count, size = len(split.sources), args.batch_size * BATCHES_A_PART

    def compute(rows: range) -> torch.Tensor:
        told = "pictures" if len(rows) == count else f"pictures {rows.start + 1:,} to {rows.stop:,} of {count:,}"
        embeds = embed_images(model, processor, Selected(split.sources, rows), args.batch_size, progress=told)
        if not torch.isfinite(embeds).all():
            raise ValueError("picture embeddings hold NaN or infinite values, and are not kept; try another --dtype")
        return embeds

    return cached_in_parts(args.cache_dir, picture_key(model, processor, split), count, size, compute)


class Readable(NamedTuple):
    """A benchmark's splits less what cannot be read: as loaded, as used, and the names of the pictures lost."""

    whole: dict[str, Split]
    splits: dict[str, Split]
    skipped: list[str]


def prepare(
    benchmark: Benchmark, whole: dict[str, Split], model: TSCIRModel, processor: TSCIRProcessor, args
) -> Readable:
    """Remove what another run left in the output folder, and read every picture.

    Pictures whose embeddings are cached were read before and are not decoded again.

    Raises:
        ValueError: as `claim_folder`, and naming every picture that cannot be read, unless it is skipped.
    """
    names = "results.json", "rankings.parquet", *benchmark.submission_files
    claim_folder(args.output_dir, f"{benchmark.name}_num_queries", names)
    bad: dict[str, list] = {}
    total = 0
    for category, split in whole.items():
        if not is_cached(args.cache_dir, picture_key(model, processor, split)):
            bad[category] = find_bad_images(split.sources, split.image_ids)
            total += len(split.image_ids)
    refuse_or_skip([one for several in bad.values() for one in several], total, args.split, args.on_bad_image)
    lost = {category: {name for name, _ in several} for category, several in bad.items() if several}
    splits = {c: without_pictures(s, lost[c]) if c in lost else s for c, s in whole.items()}
    if empty := [category for category, split in splits.items() if not split.query_ids]:
        names = " ".join(filter(None, empty)) or "this split"
        raise ValueError(f"every query of {names} needs a picture that cannot be read")
    return Readable(whole, splits, sorted(name for names in lost.values() for name in names))


def refuse_or_skip(bad: list[tuple[str, str]], total: int, split: str, on_bad_image: str) -> None:
    if bad and split == "test":
        raise BadImagesError(bad, total, "A test split's submission needs every query and picture: repair them.")
    handle_bad_images(bad, total, on_bad_image)


def mix(method: str, images: torch.Tensor, texts: torch.Tensor, weight: float) -> torch.Tensor:
    """Training-free queries [Q, D] from image and text embeddings; `weight` is the text's share in sum and slerp."""
    if method == "image":
        return images
    if method == "text":
        return texts
    if not 0 <= weight <= 1:
        raise ValueError(f"the text's share in {method} must be between 0 and 1, not {weight}")
    if method == "sum":
        return F.normalize((1 - weight) * images + weight * texts, dim=-1)
    if method == "slerp":
        return slerp(images, texts, weight)
    raise ValueError(f"unknown method {method!r}; known are {METHODS}")


def compose(
    method: str,
    model: TSCIRModel,
    processor: TSCIRProcessor,
    split: Split,
    image_embeds: torch.Tensor,
    weight: float | None = None,
    batch_size: int = 64,
    encoded: tuple[torch.Tensor, torch.Tensor] | None = None,
    residual: float | None = None,
) -> torch.Tensor:
    """Query embeddings [Q, D], L2-normalised, by one of METHODS; several wordings of a query are averaged.

    `residual` and `encoded`, of the split's distinct references, where it is known already, are for `embed_queries`.
    """
    flat = [text for wordings in split.texts for text in wordings]
    owner = torch.tensor([q for q, wordings in enumerate(split.texts) for _ in wordings])
    references = torch.tensor(split.references)[owner]
    if method == "tscir":
        told = {"batch_size": batch_size, "progress": "queries", "encoded": encoded}
        told |= {"weight": weight, "residual": residual}
        queries = embed_queries(model, processor, split.sources, references.tolist(), flat, **told)
    else:
        texts = embed_texts(model, processor, flat, batch_size) if method != "image" else None
        queries = mix(method, image_embeds[references], texts, 0.5 if weight is None else weight)
    if len(flat) == len(split.texts):
        return queries
    return F.normalize(torch.zeros(len(split.texts), queries.shape[1]).index_add_(0, owner, queries), dim=-1)


def rank(split: Split, queries: torch.Tensor, image_embeds: torch.Tensor, device: str = "cpu", k=TOP_K) -> Ranked:
    """Rank the split's gallery and candidates for every query; results are on the CPU."""
    queries, image_embeds = queries.to(device), image_embeds.to(device)
    gallery = candidates = None
    if split.ranks_gallery:
        exclude = [[r] for r in split.references] if split.exclude_reference else None
        gallery = rank_gallery(queries, image_embeds, k, split.truths, exclude)
    if split.candidates is not None:
        targets = None if split.truths is None else [row[:1] for row in split.truths]
        candidates = rank_candidates(queries, image_embeds, split.candidates, targets)
    return Ranked(*(None if r is None else _on_cpu(r) for r in (gallery, candidates)))


def _on_cpu(ranking: Ranking) -> Ranking:
    return Ranking(*(None if tensor is None else tensor.cpu() for tensor in ranking))


# ----- a whole run


def main(benchmark: Benchmark) -> None:
    """Run a benchmark's script: what a user did wrong ends it with one sentence."""
    args = parse_arguments(benchmark)
    try:
        if args.check_data:
            check_data(benchmark, args)
            return
        splits = benchmark.load(args)
        model = load_model(args)
        told = effective_method(model[0], args)
        results = run(benchmark, prepare(benchmark, splits, *model, args), told, *model, args)
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(table(results) + f"\n\nwritten to {args.output_dir}\n")


def run(
    benchmark: Benchmark,
    readable: Readable,
    told: tuple[str, float | None, float],
    model: TSCIRModel,
    processor: TSCIRProcessor,
    args,
) -> dict[str, object]:
    """Evaluate splits by `effective_method`'s choice, write results.json, rankings.parquet and submissions, and return
    the results."""
    method, weight, residual = told
    splits, ranked = readable.splits, {}
    for category, split in splits.items():
        image_embeds = embed_pictures(model, processor, split, args)
        queries = compose(
            method, model, processor, split, image_embeds, weight, batch_size=args.batch_size, residual=residual
        )
        ranked[category] = rank(split, queries, image_embeds, args.device)
    public = all(split.truths is not None for split in splits.values())
    results: dict[str, object] = dict(benchmark.metrics(splits, ranked)) if public else {}
    results |= counts(benchmark.name, splits)
    results["primary_metric"] = benchmark.primary_metric if public else None
    results |= {"method": method, "weight": weight, "residual": residual}
    results |= describe_run(benchmark, args, method, model, processor, splits)
    results |= describe_losses(readable)
    submissions = {}
    if not public and benchmark.submissions is not None:
        submissions = benchmark.submissions(splits[""], ranked[""])
    results["submissions"] = sorted(submissions)
    files = {"results.json": results} | submissions
    write_rankings(args.output_dir / "rankings.parquet", splits, ranked)
    for name, content in files.items():
        indent = 2 if name == "results.json" else None
        (args.output_dir / name).write_text(json.dumps(content, indent=indent), encoding="utf-8")
    return results


def describe_run(
    benchmark: Benchmark, args, method: str, model: TSCIRModel, processor: TSCIRProcessor, splits: dict[str, Split]
) -> dict:
    """Everything but the metrics that somebody needs to get the same figures, or to know why they do not."""
    protocol = {"split": args.split} | benchmark.protocol(args)
    protocol |= {
        "prompt_template": processor.prompt_template if method == "tscir" else None,
        "preprocessing": preprocessing_of(processor),
        "dtype": args.dtype,
    }
    return {
        "protocol": protocol,
        "model": describe_model(model, args.model_name_or_path),
        "data": describe_data(splits),
        "published_counts": published_counts(benchmark, args, splits),
        "versions": versions(),
        "command": shlex.join(sys.argv),
    }


def effective_method(model: TSCIRModel, args: argparse.Namespace) -> tuple[str, float | None, float]:
    """The method, weight and residual that a run uses, where the model or nothing said which."""
    if args.method == "tscir" and model.config.stage == 0:
        if any(value is not None for value in (args.weight, args.residual, args.prompt_template)):
            raise ValueError("this is a plain CLIP without a mapper; name a training-free method, as --method slerp")
        logger.warning("A plain CLIP without a mapper: answering training-free, by --method slerp.")
        return "slerp", model.config.training_free_weight, 0.0
    if args.method in ("image", "text"):
        return args.method, None, 0.0
    default, residual = 0.5, 0.0
    if args.method == "tscir":
        default, residual = model.config.composed_weight, model.config.residual
    weight = default if args.weight is None else args.weight
    return args.method, weight, residual if args.residual is None else args.residual


def describe_losses(readable: Readable) -> dict:
    """What skipped pictures cost: queries, and of those that are left right answers, and wrong ones of short lists."""
    whole, splits, skipped = readable
    lost_truths = easier = 0
    for category, split in splits.items():
        if split.candidates is not None:
            before = dict(zip(whole[category].query_ids, whole[category].candidates, strict=True))
            own = zip(split.query_ids, split.candidates, strict=True)
            easier += sum(len(candidates) < len(before[query]) for query, candidates in own)
        if split.truths is not None:
            before = dict(zip(whole[category].query_ids, whole[category].truths, strict=True))
            own = zip(split.query_ids, split.truths, strict=True)
            lost_truths += sum(len(before[query]) - len(truths) for query, truths in own)
    return {
        "skipped_images": skipped,
        "skipped_queries": sum(len(whole[c].query_ids) - len(split.query_ids) for c, split in splits.items()),
        "skipped_truths_of_other_queries": lost_truths,
        "queries_with_shorter_lists": easier,
    }


def published_counts(benchmark: Benchmark, args, splits: dict[str, Split]) -> dict[str, dict]:
    """Queries and pictures of the published benchmark, and whether these are they, by category."""
    published = benchmark.published_counts(args)
    found = {}
    for category, split in splits.items():
        expected = published.get(category, (None, None))
        own = len(split.query_ids), gallery_count(split)[0]
        same = all(e is None or e == o for e, o in zip(expected, own, strict=True))
        found[category or benchmark.name] = {"queries": expected[0], "gallery_images": expected[1], "same": same}
    return found


def gallery_count(split: Split) -> tuple[int | str, str]:
    """How many pictures a query ranks, and what these are."""
    if split.ranks_gallery:
        return len(split.image_ids), "pictures"
    lengths = sorted({len(candidates) for candidates in split.candidates})
    return lengths[0] if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}", "pictures a query"


def check_data(benchmark: Benchmark, args: argparse.Namespace) -> None:
    """Say how many queries and pictures there are, beside the published numbers, and decode every picture.

    Raises:
        ValueError: for what is missing. BadImagesError: naming every unreadable picture of every category.
    """
    bad, total = [], 0
    for category, split in benchmark.load(args).items():
        published = benchmark.published_counts(args).get(category, (None, None))
        pictures, what_pictures = gallery_count(split)
        found = len(split.query_ids), pictures
        label = " ".join(filter(None, (benchmark.name, category, args.split)))
        for what, number, expected in zip(("queries", what_pictures), found, published, strict=True):
            note = f", as published: {expected}" if expected == number else f", but published: {expected}"
            sys.stdout.write(f"{label}: {number} {what}{'' if expected is None else note}\n")
        own = find_bad_images(split.sources, split.image_ids)
        total += len(split.image_ids)
        sys.stdout.write(f"{label}: {len(own) or 'no'} pictures cannot be read\n")
        bad += [(" ".join(filter(None, (category, name))), reason) for name, reason in own]
    refuse_or_skip(bad, total, args.split, "error")
