"""CIRR (Liu et al. 2021): rank a split's pictures for a reference and a relative caption.

    python eval/cirr.py --model_name_or_path runs/stage2 --data_dir CIRR --output_dir runs/cirr

Protocol: the gallery is every picture of the split; the reference is removed from its query's ranking; R@1, 5, 10, 50
against the target; subset R@1, 2, 3 within the query's set of six, reference removed. Equal scores count against the
method.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from modeling_tscir import TSCIRModel, TSCIRProcessor
from modeling_tscir.embedding import embed_images, embed_queries, embed_texts
from modeling_tscir.images import find_bad_images, handle_bad_images
from modeling_tscir.modeling_tscir import slerp
from modeling_tscir.ranking import target_ranks


METHODS = ("tscir", "image", "text", "sum", "slerp")
RECALLS, SUBSET_RECALLS = (1, 5, 10, 50), (1, 2, 3)
PRIMARY_METRIC = "cirr_recall_at_1"


class CIRR(NamedTuple):
    """One split. Pictures are named; `references`, `targets` and `members` index `names`."""

    names: list[str]
    paths: list[Path]
    pair_ids: list[int]
    captions: list[str]
    references: list[int]
    targets: list[int]
    members: list[list[int]]


def load_cirr(data_dir: Path, split: str = "val") -> CIRR:
    """Read annotations in the official layout (`cirr/captions`) or the one without the `cirr/` level.

    Raises:
        ValueError: naming the file and record that is missing, incomplete, or not in the gallery, or how many pictures
            of the split are not on disk and which first.
    """
    root = data_dir / "cirr" if (data_dir / "cirr" / "captions").is_dir() else data_dir
    captions_file = root / "captions" / f"cap.rc2.{split}.json"
    split_file = root / "image_splits" / f"split.rc2.{split}.json"
    records, files = read_json(captions_file), read_json(split_file)
    names = list(files)
    place = {name: i for i, name in enumerate(names)}
    columns: dict[str, list] = {k: [] for k in ("pair_ids", "captions", "references", "targets", "members")}
    for number, record in enumerate(records):
        where = f"{captions_file}, record {number}"
        try:
            columns["pair_ids"].append(record["pairid"])
            columns["captions"].append(record["caption"])
            columns["references"].append(place[record["reference"]])
            columns["targets"].append(place[record["target_hard"]])
            columns["members"].append([place[name] for name in record["img_set"]["members"]])
        except KeyError as error:
            known = error.args[0] in ("pairid", "caption", "reference", "target_hard", "img_set", "members")
            problem = f"lacks {error}" if known else f"names {error}, which is not in {split_file.name}"
            raise ValueError(f"{where} {problem}") from error
    return CIRR(names, find_pictures(data_dir, root, files), **columns)


def read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; CIRR's annotations come from github.com/Cuberick-Orion/CIRR") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def find_pictures(data_dir: Path, root: Path, files: dict[str, str]) -> list[Path]:
    candidates = (data_dir, root, root / "img_raw", data_dir / "img_raw", data_dir / "images")
    first = next(iter(files.values()))
    base = next((c for c in candidates if (c / first).is_file()), data_dir)
    paths = [base / file for file in files.values()]
    missing = [str(p) for p in paths if not p.is_file()]
    if missing:
        raise ValueError(f"{len(missing)} of {len(paths)} pictures of the split are missing, first {missing[:5]}")
    return paths


def without_bad_images(data: CIRR, on_bad_image: str) -> tuple[CIRR, list[str]]:
    """The split without unreadable pictures and queries that need them, and the names; an error unless "skip"."""
    bad = find_bad_images([str(p) for p in data.paths], data.names)
    handle_bad_images(bad, len(data.names), on_bad_image)
    lost = {name for name, _ in bad}
    if not lost:
        return data, []
    kept = [i for i, name in enumerate(data.names) if name not in lost]
    new = {old: i for i, old in enumerate(kept)}
    queries = [
        q for q, pair in enumerate(zip(data.references, data.targets, strict=True)) if all(i in new for i in pair)
    ]
    return CIRR(
        [data.names[i] for i in kept],
        [data.paths[i] for i in kept],
        [data.pair_ids[q] for q in queries],
        [data.captions[q] for q in queries],
        [new[data.references[q]] for q in queries],
        [new[data.targets[q]] for q in queries],
        [[new[m] for m in data.members[q] if m in new] for q in queries],
    ), sorted(lost)


def compose(
    method: str, model: TSCIRModel, processor: TSCIRProcessor, data: CIRR, gallery: torch.Tensor, weight: float
) -> torch.Tensor:
    """Query embeddings [Q, D] by one of METHODS; `weight` is the text's share in "sum" and "slerp"."""
    if method == "tscir":
        references = [str(data.paths[i]) for i in data.references]
        return embed_queries(model, processor, references, data.captions, progress="queries")
    images = gallery[data.references]
    if method == "image":
        return images
    return mix(method, images, embed_texts(model, processor, data.captions), weight)


def mix(method: str, images: torch.Tensor, texts: torch.Tensor, weight: float) -> torch.Tensor:
    """Training-free queries [Q, D] from image and text embeddings: "text", "sum" or "slerp"."""
    if method == "text":
        return texts
    if method == "sum":
        return F.normalize((1 - weight) * images + weight * texts, dim=-1)
    if method == "slerp":
        return slerp(images, texts, weight)
    raise ValueError(f"unknown method {method!r}; known are {METHODS}")


def query_ranks(queries: torch.Tensor, gallery: torch.Tensor, data: CIRR) -> tuple[np.ndarray, np.ndarray]:
    """Each target's rank in the whole gallery and within its set of six, [Q] each, reference removed, 1 the best."""
    targets = torch.tensor(data.targets)
    ranks = target_ranks(queries, gallery, targets, exclude=[[r] for r in data.references])
    own = (queries * gallery[targets]).sum(-1)
    subset_ranks = []
    for i, members in enumerate(data.members):
        others = [m for m in members if m not in (data.references[i], data.targets[i])]
        subset_ranks.append(1 + int((gallery[others] @ queries[i] >= own[i]).sum()))
    return ranks.numpy(), np.array(subset_ranks)


def metrics(ranks: np.ndarray, subset_ranks: np.ndarray, data: CIRR) -> dict[str, float | int]:
    """Flat metrics, as fractions."""
    values: dict[str, float | int] = {f"cirr_recall_at_{k}": float((ranks <= k).mean()) for k in RECALLS}
    values |= {f"cirr_subset_recall_at_{k}": float((subset_ranks <= k).mean()) for k in SUBSET_RECALLS}
    return values | {"cirr_num_queries": len(ranks), "cirr_num_gallery_images": len(data.names)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="a trained folder, or a plain CLIP")
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--split", default="val", choices=["val"])
    parser.add_argument("--method", default="tscir", choices=METHODS)
    parser.add_argument("--weight", type=float, default=0.5, help="the text's share in sum and slerp")
    parser.add_argument("--on_bad_image", default="error", choices=["error", "skip"])
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    try:
        data, skipped = without_bad_images(load_cirr(args.data_dir, args.split), args.on_bad_image)
        model, processor = load(args.model_name_or_path)
    except ValueError as error:
        sys.exit(f"error: {error}")
    gallery = embed_images(model, processor, [str(p) for p in data.paths], progress="gallery")
    queries = compose(args.method, model, processor, data, gallery, args.weight)
    results = metrics(*query_ranks(queries, gallery, data), data)
    for name, value in results.items():
        print(f"{name:32}{100 * value:8.2f} %" if isinstance(value, float) else f"{name:32}{value:8}")
    settings = {k: str(v) for k, v in vars(args).items()}
    results |= {"primary_metric": PRIMARY_METRIC, "skipped_images": skipped, "arguments": settings}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")


def load(name: str) -> tuple[TSCIRModel, TSCIRProcessor]:
    """A trained folder, or a plain CLIP that answers training-free."""
    from transformers import AutoConfig

    if AutoConfig.from_pretrained(name).model_type == "clip":
        return TSCIRModel.from_clip_pretrained(name), TSCIRProcessor.from_clip_pretrained(name)
    return TSCIRModel.from_pretrained(name), TSCIRProcessor.from_pretrained(name)


if __name__ == "__main__":
    main()
