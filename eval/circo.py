"""CIRCO (Baldrati et al. 2023): composed queries with several right answers among 123,403 COCO pictures.

    python eval/circo.py --model_name_or_path runs/stage2 --data_dir CIRCO --output_dir runs/circo

Protocol: the gallery is COCO 2017 "unlabeled", from which the reference is not removed; mAP@5, 10, 25, 50 over all
right answers; Recall@k of the target alone; mAP@10 of each semantic aspect. Equal scores count against the method.
`--split test` writes the server's submission file (circo.micc.unifi.it).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from annotations import field, find_pictures, first_existing, index_of, list_of, lookup, read_mapping, read_records
from harness import Benchmark, main
from results import named
from splits import Ranked, Split
from submission import check_rows

from modeling_tscir.metrics import mean_average_precision_at_k, recall_at_k


DEPTHS = (5, 10, 25, 50)
SUBMISSION_LENGTH = 50
SHARED_CONCEPT = "find {shared_concept} but {relative_caption}"  # MagicLens's wording (Zhang et al. 2024)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shared_concept",
        action="store_true",
        help=f'use the extra annotation too: "{SHARED_CONCEPT}", as MagicLens does; the usual protocol does not',
    )


def load(args: argparse.Namespace) -> dict[str, Split]:
    data_dir = Path(args.data_dir)
    roots = (data_dir, data_dir / "CIRCO", data_dir / "circo")
    file = first_existing(
        [root / "annotations" / f"{args.split}.json" for root in roots], f"CIRCO's {args.split} file"
    )
    root = file.parent.parent
    coco = [root / "COCO2017_unlabeled", root.parent / "COCO2017_unlabeled", root / "coco2017_unlabeled", root]
    info_name = "image_info_unlabeled2017.json"
    info_file = first_existing(
        [folder / below / info_name for folder in coco for below in ("annotations", ".")],
        "COCO's list of unlabeled pictures",
    )
    images = list_of(read_mapping(info_file), "images", dict, str(info_file))
    ids = [field(image, "id", int, f"{info_file}, image {i}") for i, image in enumerate(images)]
    places = index_of(ids, info_file)
    columns: dict[str, list] = {"query_ids": [], "references": [], "texts": [], "truths": []}
    for number, record in enumerate(read_records(file)):
        where = f"{file}, record {number}"
        columns["query_ids"].append(field(record, "id", int, where))
        columns["references"].append(lookup(places, field(record, "reference_img_id", int, where), where, info_file))
        text = field(record, "relative_caption", str, where)
        if args.shared_concept:
            concept = field(record, "shared_concept", str, where)
            text = SHARED_CONCEPT.format(shared_concept=concept, relative_caption=text)
        columns["texts"].append((text,))
        if args.split == "val":
            target, truths = field(record, "target_img_id", int, where), list_of(record, "gt_img_ids", int, where)
            if "semantic_aspects" in record:
                list_of(record, "semantic_aspects", str, where)
            if target not in truths or len(set(truths)) < len(truths):
                raise ValueError(f"{where}: gt_img_ids must hold each answer once, target_img_id {target} among them")
            truths = [target, *(t for t in truths if t != target)]
            columns["truths"].append([lookup(places, t, where, info_file) for t in truths])
    index_of(columns["query_ids"], file, "queries")
    if args.split != "val":
        del columns["truths"]
    folders = [folder / below for folder in coco for below in ("unlabeled2017", ".")]
    paths = find_pictures(folders, [f"{i:012d}" for i in ids], [".jpg"])
    return {
        "": Split(
            image_ids=[str(i) for i in ids],
            sources=[str(path) for path in paths],
            files=[(path,) for path in paths],
            annotation_files=(file, info_file),
            **columns,
        )
    }


def metrics(splits: dict[str, Split], ranked: dict[str, Ranked]) -> dict[str, float]:
    split, ranks = splits[""], ranked[""].gallery.truth_ranks.numpy()
    values = {f"circo_map_at_{k}": mean_average_precision_at_k(ranks, k) for k in DEPTHS}
    # A target's own rank: other right answers before it count as pictures before it.
    values |= {f"circo_recall_at_{k}": recall_at_k(ranks[:, 0], k) for k in DEPTHS}
    records = {record["id"]: record for record in read_records(split.annotation_files[0])}
    aspects = [records[query].get("semantic_aspects", []) for query in split.query_ids]
    for aspect in sorted({aspect for several in aspects for aspect in several}):
        rows = np.array([aspect in several for several in aspects])
        values[f"circo_{aspect}_map_at_10"] = mean_average_precision_at_k(ranks[rows], 10)
    return values


def submissions(split: Split, ranked: Ranked) -> dict[str, dict]:
    """The server's file, checked against its rules."""
    rows = {
        str(query): [int(name) for name in named(ranked.gallery, q, split.image_ids)[:SUBMISSION_LENGTH]]
        for q, query in enumerate(split.query_ids)
    }
    check_submission(rows, split.query_ids, [int(name) for name in split.image_ids])
    return {"submission.json": rows}


def check_submission(submission: dict, query_ids: Sequence[int], image_ids: Sequence[int] | None = None) -> None:
    """Raise a `ValueError` that says which of the server's rules a submission breaks.

    Rules: every query of the split and no other, by its number as a string; for each fifty different numbers of
    pictures, best first. Without `image_ids` it is not checked that these pictures exist.
    """
    size = SUBMISSION_LENGTH if image_ids is None else min(SUBMISSION_LENGTH, len(image_ids))
    check_rows(submission, query_ids, image_ids, size)
    for query, row in submission.items():
        if not all(type(number) is int for number in row):
            raise ValueError(f"query {query} has pictures that are not whole numbers")


CIRCO = Benchmark(
    name="circo",
    description=__doc__,
    load=load,
    metrics=metrics,
    primary_metric="circo_map_at_5",
    protocol=lambda args: {
        "gallery": "COCO 2017 unlabeled",
        "reference_removed": False,
        "shared_concept": SHARED_CONCEPT if args.shared_concept else None,
    },
    published_counts=lambda args: {"": ({"val": 220, "test": 800}[args.split], 123_403)},
    splits=("val", "test"),
    submissions=submissions,
    submission_files=("submission.json",),
    add_arguments=add_arguments,
)


if __name__ == "__main__":
    sys.exit(main(CIRCO))
