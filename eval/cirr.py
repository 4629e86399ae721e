"""CIRR (Liu et al. 2021): rank a split's pictures for a reference and a relative caption.

    python eval/cirr.py --model_name_or_path runs/stage2 --data_dir CIRR --output_dir runs/cirr

Protocol: the gallery is every picture of the split; the reference is removed from its query's ranking; R@1, 5, 10, 50
against the target; subset R@1, 2, 3 within the query's set of six, reference removed. Equal scores count against the
method. `--split test` writes the server's two submission files (cirr.cecs.anu.edu.au).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from annotations import field, find_pictures, first_existing, index_of, list_of, lookup, read_mapping, read_records
from harness import Benchmark, main
from results import named
from splits import Ranked, Split
from submission import check_rows

from modeling_tscir.metrics import recall_at_k


RECALLS, SUBSET_RECALLS = (1, 5, 10, 50), (1, 2, 3)
FILE_SPLITS = {"val": "val", "test": "test1"}
SET_SIZE = 6
SUBMISSION_LENGTHS = {"recall": 50, "recall_subset": 3}
SUBMISSION_MAX_BYTES = 5 * 2**20


def load(args: argparse.Namespace) -> dict[str, Split]:
    """Read a split in the official layout, SEARLE's, or Pic2Word's (no `cirr/` level)."""
    data_dir, split = Path(args.data_dir), FILE_SPLITS[args.split]
    captions_name = f"captions/cap.rc2.{split}.json"
    roots = [data_dir / "cirr", data_dir, data_dir / "cirr_dataset", data_dir / "CIRR" / "cirr", data_dir / "CIRR"]
    captions_file = first_existing([root / captions_name for root in roots], f"CIRR's {split} captions")
    root = captions_file.parent.parent
    split_file = root / "image_splits" / f"split.rc2.{split}.json"
    files = read_mapping(split_file)
    for name in files:
        field(files, name, str, str(split_file))
    names = list(files)
    places = index_of(names, split_file)
    columns: dict[str, list] = {"query_ids": [], "references": [], "texts": [], "truths": [], "candidates": []}
    for number, record in enumerate(read_records(captions_file)):
        where = f"{captions_file}, record {number}"
        reference = lookup(places, field(record, "reference", str, where), where, split_file)
        members = list_of(field(record, "img_set", dict, where), "members", str, f"{where}, img_set")
        members = [lookup(places, name, where, split_file) for name in members]
        if len(set(members)) < len(members) or reference not in members or len(members) != SET_SIZE:
            raise ValueError(f"{where}: img_set should hold {SET_SIZE} different pictures, the reference among them")
        columns["query_ids"].append(field(record, "pairid", int, where))
        columns["references"].append(reference)
        columns["texts"].append((field(record, "caption", str, where),))
        columns["candidates"].append([m for m in members if m != reference])
        if args.split == "val":
            target = lookup(places, field(record, "target_hard", str, where), where, split_file)
            if target == reference or target not in members:
                raise ValueError(f"{where}: the target must be another picture of the query's set than its reference")
            columns["truths"].append([target])
    index_of(columns["query_ids"], captions_file, "queries")
    bases = (root.parent, root, root / "img_raw", root.parent / "img_raw", root.parent / "images", root / "images")
    paths = find_pictures(bases, list(files.values()))
    if args.split != "val":
        del columns["truths"]
    return {
        "": Split(
            image_ids=names,
            sources=[str(path) for path in paths],
            files=[(path,) for path in paths],
            annotation_files=(captions_file, split_file),
            exclude_reference=True,
            **columns,
        )
    }


def metrics(splits: dict[str, Split], ranked: dict[str, Ranked]) -> dict[str, float]:
    ranks, subset_ranks = ranked[""].gallery.truth_ranks[:, 0], ranked[""].candidates.truth_ranks[:, 0]
    values = {f"cirr_recall_at_{k}": recall_at_k(ranks, k) for k in RECALLS}
    return values | {f"cirr_subset_recall_at_{k}": recall_at_k(subset_ranks, k) for k in SUBSET_RECALLS}


def submissions(split: Split, ranked: Ranked) -> dict[str, dict]:
    """The server's two files, checked against its rules."""
    files = {}
    for metric, ranking in (("recall", ranked.gallery), ("recall_subset", ranked.candidates)):
        rows = {
            str(query): named(ranking, q, split.image_ids)[: SUBMISSION_LENGTHS[metric]]
            for q, query in enumerate(split.query_ids)
        }
        files[f"{metric}_submission.json"] = {"version": "rc2", "metric": metric} | rows
    for content in files.values():
        check_submission(content, split.query_ids, split.image_ids)
    return files


def check_submission(submission: dict, query_ids: Sequence[int], image_ids: Sequence[str]) -> None:
    """Raise a `ValueError` that says which of the server's rules a submission breaks.

    Rules: version "rc2"; metric "recall" with fifty or "recall_subset" with three different names for every query of
    the split and no other; names of the split's pictures; at most 5 MB.
    """
    if submission.get("version") != "rc2" or submission.get("metric") not in SUBMISSION_LENGTHS:
        raise ValueError('a CIRR submission says "version": "rc2" and "metric": "recall" or "recall_subset"')
    rows = {key: row for key, row in submission.items() if key not in ("version", "metric")}
    check_rows(rows, query_ids, image_ids, min(SUBMISSION_LENGTHS[submission["metric"]], len(image_ids) - 1))
    size = len(json.dumps(submission))
    if size > SUBMISSION_MAX_BYTES:
        raise ValueError(f"the submission has {size} bytes; the server takes {SUBMISSION_MAX_BYTES}")


CIRR = Benchmark(
    name="cirr",
    description=__doc__,
    load=load,
    metrics=metrics,
    primary_metric="cirr_recall_at_1",
    protocol=lambda args: {"gallery": "all pictures of the split", "reference_removed": True},
    published_counts=lambda args: {"": {"val": (4181, 2297), "test": (4148, 2315)}[args.split]},
    splits=("val", "test"),
    submissions=submissions,
    submission_files=tuple(f"{metric}_submission.json" for metric in SUBMISSION_LENGTHS),
)


if __name__ == "__main__":
    sys.exit(main(CIRR))
