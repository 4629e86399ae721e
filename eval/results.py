"""The files that an evaluation leaves: metrics with all that decides them, rankings, and a table for people."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from splits import Ranked, Split

from modeling_tscir import TSCIRModel
from modeling_tscir.feature_cache import digest
from modeling_tscir.metrics import recall_at_k
from modeling_tscir.ranking import Ranking


LOSSES = ("skipped_queries", "skipped_truths_of_other_queries", "queries_with_shorter_lists")


def claim_folder(folder: Path, key: str, names: Sequence[str]) -> None:
    """Make an output folder, and remove the files that another run left there: they would be taken for this one's.

    Args:
        key: what results.json has where it is of the same evaluation.
        names: of these files.

    Raises:
        ValueError: if the folder cannot be written to, or holds another evaluation's results.
    """
    path = folder / "results.json"
    try:
        other = key not in json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last of half a file, which nobody misses
        other = False
    if other:
        raise ValueError(
            f"{folder} holds results of another evaluation, which this one would replace: name another --output_dir, "
            f"or remove {path}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be used: {error}; name another") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"--output_dir {folder} cannot be used: it may not be written to; name another")


def recalls_by_category(name: str, ranks: dict[str, torch.Tensor], depths: Sequence[int]) -> dict[str, float]:
    """Recall at each depth for every category, from its targets' ranks [Q], and the categories' unweighted mean."""
    values: dict[str, float] = {}
    for k in depths:
        recalls = {category: recall_at_k(own, k) for category, own in ranks.items()}
        values |= {f"{name}_{category}_recall_at_{k}": recall for category, recall in recalls.items()}
        values[f"{name}_recall_at_{k}"] = sum(recalls.values()) / len(recalls)
    return values


def counts(name: str, splits: dict[str, Split]) -> dict[str, int]:
    """Numbers of queries and gallery pictures of each category, and of all."""
    found: dict[str, int] = {}
    for category, split in splits.items():
        prefix = f"{name}_{category}" if category else name
        found[f"{prefix}_num_queries"] = len(split.query_ids)
        found[f"{prefix}_num_gallery_images"] = len(split.image_ids)
    if "" not in splits:
        for what in ("num_queries", "num_gallery_images"):
            found[f"{name}_{what}"] = sum(v for k, v in found.items() if k.endswith(what))
    return found


def describe_model(model: TSCIRModel, name: str) -> dict:
    """What tells this model from any other: backbone and trained tensors by digest."""
    config = model.config
    return {
        "name_or_path": name,
        "stage": config.stage,
        "backbone": config.backbone_name_or_path,
        "backbone_revision": config.backbone_revision,
        "backbone_fingerprint": config.backbone_fingerprint,
        "trained_fingerprint": model.trained_fingerprint(),
    }


def describe_data(splits: dict[str, Split]) -> dict:
    """Digests of the annotation files and of the list of pictures."""
    paths = sorted({path for split in splits.values() for path in split.annotation_files})
    return {
        "annotations": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:32] for path in paths},
        "pictures_fingerprint": digest([split.image_ids for split in splits.values()]),
    }


def write_rankings(path: Path, splits: dict[str, Split], ranked: dict[str, Ranked]) -> None:
    """One row a query: its best pictures with their scores, its truths and their ranks, its ranked candidates."""
    names = ("category", "query_id", "reference", "texts", "ranking", "scores", "truths", "truth_ranks")
    columns: dict[str, list] = {name: [] for name in (*names, "candidates_ranking", "target_rank_among_candidates")}
    for category, split in splits.items():
        gallery, candidates = ranked[category]
        ids = [str(name) for name in split.image_ids]
        for q, query_id in enumerate(split.query_ids):
            truths = [] if split.truths is None else split.truths[q]
            row = {"category": category, "query_id": str(query_id), "reference": ids[split.references[q]]}
            # Half a surrogate, which Parquet does not take, is "?".
            texts = [text.encode("utf-8", "replace").decode("utf-8") for text in split.texts[q]]
            row |= {"texts": texts, "truths": [ids[i] for i in truths]}
            row |= {"ranking": named(gallery, q, ids), "candidates_ranking": named(candidates, q, ids)}
            row["scores"] = [] if gallery is None else gallery.scores[q, : len(row["ranking"])].tolist()
            row["truth_ranks"] = (
                [] if gallery is None or not truths else gallery.truth_ranks[q, : len(truths)].tolist()
            )
            row["target_rank_among_candidates"] = (
                None if candidates is None or not truths else int(candidates.truth_ranks[q, 0])
            )
            for name, column in columns.items():
                column.append(row[name])
    pq.write_table(pa.table(columns), path)


def named(ranking: Ranking | None, query: int, ids: Sequence[str]) -> list[str]:
    """The ids of one query's ranking, best first; excluded pictures are not in it."""
    return [] if ranking is None else [ids[i] for i in ranking.indices[query].tolist() if i >= 0]


def table(results: dict[str, object]) -> str:
    """Metrics in percent, counts as they are."""
    left_out = ("weight", "residual", *LOSSES)
    lines = [
        f"{name:44}{100 * value:9.2f} %" if isinstance(value, float) else f"{name:44}{value:9}"
        for name, value in results.items()
        if isinstance(value, (int, float)) and name not in left_out
    ]
    if results["primary_metric"] is None:
        left = "what it left is for the benchmark's server" if results["submissions"] else "it left rankings alone"
        lines.append(f"The truths of this split are not public; {left}.")
    return "\n".join([*lines, *notes(results)])


def notes(results: dict[str, object]) -> list[str]:
    """A sentence for everything that makes these figures other than the published benchmark's."""
    lines = []
    if residual := results["residual"]:
        lines.append(f"Note: queries have {residual:g} of what pseudo-words leave out of their pictures (--residual).")
    if weight := results["weight"]:
        moved = f"queries are moved by {abs(weight):g} towards their {'texts' if weight > 0 else 'pictures'}"
        share = f"the text's share in {results['method']} is {weight:g}"
        lines.append(f"Note: {moved if results['method'] == 'tscir' else share} (--weight).")
    for name, published in results["published_counts"].items():
        if not published["same"]:
            numbers = (published["queries"], "queries"), (published["gallery_images"], "pictures")
            expected = ", ".join(f"{number} {what}" for number, what in numbers if number is not None)
            lines.append(f"Note: {name} has not the published numbers ({expected}); figures cannot be compared.")
    if results["skipped_images"]:
        queries, truths, easier = (results[name] for name in LOSSES)
        lines.append(
            f"Note: {len(results['skipped_images'])} pictures were skipped, and with them {queries} queries and "
            f"{truths} right answers of other queries."
        )
        if easier:
            lines.append(
                f"Note: {easier} queries have fewer wrong candidates for it, which makes them easier; figures cannot "
                "be compared."
            )
    return lines
