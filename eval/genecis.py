"""GeneCIS (Vaze et al. 2023): focus on or change an attribute or an object, in short galleries of a query's own.

    python eval/genecis.py --model_name_or_path runs/stage2 --data_dir GeneCIS --output_dir runs/genecis

Protocol: four tasks; each query ranks its own short gallery with the target in it; R@1, 2, 3 of each task and their
means. Object tasks show whole COCO pictures; attribute tasks cut an object with its surroundings out of a picture of
Visual Genome, as its pixels are stored, and pad it to a square. Equal scores count against the method, wherever the
target stands in the list; where a gallery holds its target once more, as two that were published do, it comes second
at best.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from annotations import field, find_pictures, first_existing, list_of, load_each, read_records
from harness import Benchmark, main
from PIL import Image
from results import recalls_by_category
from splits import Ranked, Split

from modeling_tscir.images import load_image, pad_to_aspect_ratio


TASKS = ("focus_attribute", "change_attribute", "focus_object", "change_object")
DEPTHS = (1, 2, 3)
DILATION = 0.7


class CutOut(Sequence):
    """Pictures with a box each, cut out as they are asked for."""

    def __init__(self, paths: Sequence[Path], boxes: Sequence[tuple]):
        self.paths, self.boxes = paths, boxes

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Image.Image | str:
        return cut_out(load_image(self.paths[i], turned=False), self.boxes[i])


def cut_out(image: Image.Image, box: Sequence[float]) -> Image.Image:
    """The box (x, y, width, height) and what surrounds it, padded to a square with black.

    The published protocol begins the cut 0.7 of the box's size before it and makes it 1.7 times its size, within the
    picture.
    """
    x, y, width, height = box
    left, top = max(0, x - DILATION * width), max(0, y - DILATION * height)
    right, bottom = (
        min(image.width, left + (1 + DILATION) * width),
        min(image.height, top + (1 + DILATION) * height),
    )
    if left >= right or top >= bottom:
        raise ValueError(f"its box {list(box)} lies outside the picture of {image.width} x {image.height}")
    left, top, right, bottom = map(round, (left, top, right, bottom))
    left, top = min(left, image.width - 1), min(top, image.height - 1)  # a box of less than a pixel is one
    return pad_to_aspect_ratio(image.crop((left, top, max(right, left + 1), max(bottom, top + 1))), 1)


def load(args: argparse.Namespace) -> dict[str, Split]:
    """Read all four tasks."""
    return load_each(TASKS, partial(load_task, args))


def load_task(args: argparse.Namespace, task: str) -> Split:
    data_dir = Path(args.data_dir)
    below = [data_dir, data_dir / "genecis", data_dir / "GeneCIS", data_dir / "annotations"]
    file = first_existing([folder / f"{task}.json" for folder in below], f"GeneCIS's {task}")
    of_objects = task.endswith("object")
    places: dict[tuple, int] = {}
    columns: dict[str, list] = {"query_ids": [], "references": [], "texts": [], "truths": [], "candidates": []}
    for number, record in enumerate(read_records(file)):
        where = f"{file}, record {number}"

        def place(picture: dict, where: str = where) -> int:
            name = "val_image_id" if of_objects else "image_id"
            digits = isinstance(picture.get(name), str) and picture[name].isdecimal()
            number = int(picture[name]) if digits else field(picture, name, int, where)
            if of_objects:
                key = (number, ())
            else:
                box = field(picture, "instance_bbox", list, where)
                numbers = [n for n in box if isinstance(n, (int, float)) and math.isfinite(n)]
                if len(box) != 4 or len(numbers) != 4 or min(box[2:]) <= 0:
                    raise ValueError(f"{where} has the box {box}, which is no [x, y, width, height]")
                key = (number, tuple(box))
            return places.setdefault(key, len(places))

        target = place(field(record, "target", dict, where))
        columns["query_ids"].append(number)
        columns["references"].append(place(field(record, "reference", dict, where)))
        columns["texts"].append((field(record, "condition", str, where),))
        columns["truths"].append([target])
        others = [place(picture) for picture in list_of(record, "gallery", dict, where)]
        if not others:
            raise ValueError(f"{where} has an empty gallery, in which its target would always come first")
        columns["candidates"].append([target, *others])
    paths = find_task_pictures(data_dir, [number for number, _ in places], of_objects)
    boxes = [box for _, box in places]
    return Split(
        image_ids=[" ".join(map(str, (number, *box))) for number, box in places],
        sources=[str(path) for path in paths] if of_objects else CutOut(paths, boxes),
        files=[(path, *box) for path, box in zip(paths, boxes, strict=True)],
        annotation_files=(file,),
        ranks_gallery=False,
        **columns,
    )


def find_task_pictures(data_dir: Path, numbers: Sequence[int], of_objects: bool) -> list[Path]:
    if of_objects:
        folders = ("val2017", "coco2017/val2017", "COCO_val2017", "coco/val2017", "coco2017")
        return find_pictures([data_dir / folder for folder in folders], [f"{n:012d}" for n in numbers], [".jpg"])
    folders = ("VG_100K_all", "VG_100K", "VG_100K_2", "visual_genome/VG_100K_all", "Visual_Genome/VG_100K_all")
    return find_pictures([data_dir / folder for folder in folders], [str(n) for n in numbers], [".jpg"])


def metrics(splits: dict[str, Split], ranked: dict[str, Ranked]) -> dict[str, float]:
    return recalls_by_category("genecis", {t: ranked[t].candidates.truth_ranks[:, 0] for t in splits}, DEPTHS)


GENECIS = Benchmark(
    name="genecis",
    description=__doc__,
    load=load,
    metrics=metrics,
    primary_metric="genecis_recall_at_1",
    protocol=lambda args: {"gallery": "each query's own, the target in it", "dilation": DILATION},
    published_counts=lambda args: {"focus_object": (1960, 15), "change_object": (1960, 15)},
)


if __name__ == "__main__":
    sys.exit(main(GENECIS))
