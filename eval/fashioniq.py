"""FashionIQ (Wu et al. 2021): a garment and two captions of how the wanted one differs, in three categories.

    python eval/fashioniq.py --model_name_or_path runs/stage2 --data_dir FashionIQ --output_dir runs/fashioniq

Protocol: a gallery for each category, from which the reference is not removed; R@10 and R@50 of each and their
unweighted means. `--gallery original` (the usual one) ranks the category's whole split, `--gallery val` the references
and targets of its queries alone, which gives higher figures. The two captions are stripped of ".?, " and joined by
"and" in both orders, whose query embeddings are averaged (`--caption_order`). Equal scores count against the method.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from annotations import field, find_pictures, first_existing, index_of, load_each, lookup, read_json, read_records
from harness import Benchmark, main
from results import recalls_by_category
from splits import Ranked, Split


CATEGORIES = ("dress", "shirt", "toptee")
DEPTHS = (10, 50)
CAPTION_ORDERS = {"both": (1, -1), "given": (1,), "reversed": (-1,)}
GALLERIES = ("original", "val")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gallery",
        default="original",
        choices=GALLERIES,
        help="original: the category's whole split, as SEARLE, LinCIR and most do; val: its references and targets",
    )
    parser.add_argument(
        "--caption_order",
        default="both",
        choices=CAPTION_ORDERS,
        help='both: "c1 and c2" and "c2 and c1" averaged, as SEARLE and LinCIR do; reversed: "c2 and c1", as Pic2Word',
    )


def load(args: argparse.Namespace) -> dict[str, Split]:
    """Read all three categories, in SEARLE's layout (captions/), Pic2Word's (json/), or with a folder a category."""
    if args.split != "val" and args.gallery != "original":
        raise ValueError("--gallery val is made of the targets, which the test split does not publish")
    return load_each(CATEGORIES, partial(load_category, args))


def load_category(args: argparse.Namespace, category: str) -> Split:
    data_dir, split = Path(args.data_dir), args.split
    roots = (data_dir, data_dir / "FashionIQ", data_dir / "fashion-iq", data_dir / "fashioniq")
    captions_file = first_existing(
        [root / folder / f"cap.{category}.{split}.json" for root in roots for folder in ("captions", "json")],
        f"FashionIQ's {split} captions of {category}",
    )
    root = captions_file.parent.parent
    split_file = root / "image_splits" / f"split.{category}.{split}.json"
    names = read_json(split_file)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{split_file} should hold a list of picture names")
    places = index_of(names, split_file)
    columns: dict[str, list] = {"query_ids": [], "references": [], "texts": [], "truths": []}
    for number, record in enumerate(read_records(captions_file)):
        where = f"{captions_file}, record {number}"
        columns["query_ids"].append(number)
        columns["references"].append(lookup(places, field(record, "candidate", str, where), where, split_file))
        columns["texts"].append(joined(field(record, "captions", list, where), args.caption_order, where))
        if split == "val":
            columns["truths"].append([lookup(places, field(record, "target", str, where), where, split_file)])
    if split != "val":
        del columns["truths"]
    elif args.gallery == "val":
        used = sorted({i for row in (columns["references"], *columns["truths"]) for i in row})
        names = [names[i] for i in used]
        new = {old: i for i, old in enumerate(used)}
        columns["references"] = [new[i] for i in columns["references"]]
        columns["truths"] = [[new[i] for i in row] for row in columns["truths"]]
    folders = [root / "images", root / "images" / category, root / category, root / "resized_image", root]
    paths = find_pictures(folders, names, [".jpg", ".png", ".jpeg"])
    return Split(
        image_ids=names,
        sources=[str(path) for path in paths],
        files=[(path,) for path in paths],
        annotation_files=(captions_file, split_file),
        **columns,
    )


def joined(captions: list, order: str, where: str) -> tuple[str, ...]:
    """The query's texts: both captions joined, in the orders asked for. An empty caption leaves the other alone."""
    if len(captions) != 2 or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{where} should have two captions, but has {captions!r}")
    stripped = [caption.strip(".?, ") for caption in captions]
    return tuple(" and ".join(filter(None, stripped[::step])) for step in CAPTION_ORDERS[order])


def metrics(splits: dict[str, Split], ranked: dict[str, Ranked]) -> dict[str, float]:
    return recalls_by_category("fashioniq", {c: ranked[c].gallery.truth_ranks[:, 0] for c in splits}, DEPTHS)


def published_counts(args: argparse.Namespace) -> dict[str, tuple[int, int]]:
    if args.split == "test":
        return {"dress": (2024, 3818), "shirt": (2038, 6346), "toptee": (2056, 5374)}
    pictures = {"original": (3817, 6346, 5373), "val": (2628, 3089, 2902)}[args.gallery]
    return dict(zip(CATEGORIES, zip((2017, 2038, 1961), pictures, strict=True), strict=True))


FASHIONIQ = Benchmark(
    name="fashioniq",
    description=__doc__,
    load=load,
    metrics=metrics,
    primary_metric="fashioniq_recall_at_10",
    protocol=lambda args: {
        "gallery": args.gallery,
        "reference_removed": False,
        "caption_order": args.caption_order,
        "captions_stripped_of": ".?, ",
    },
    published_counts=published_counts,
    splits=("val", "test"),
    add_arguments=add_arguments,
)


if __name__ == "__main__":
    sys.exit(main(FASHIONIQ))
