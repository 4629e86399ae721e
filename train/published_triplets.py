"""Published triplet sets, as their authors' files have them, to a dataset for stage II.

    python train/published_triplets.py lasco --annotations lasco_train.json --image_dir COCO2014 --output_dir OUT
    python train/published_triplets.py megapairs --annotations megapairs.jsonl --image_dir IMAGES --output_dir OUT
    python train/published_triplets.py cc-coir --annotations cc-coir_train.csv --image_dir train --output_dir OUT
    python train/published_triplets.py rtd --annotations LLM_triplets.json --output_dir OUT
    python train/published_triplets.py instructpix2pix --annotations gpt-generated-prompts.jsonl --output_dir OUT
    python train/published_triplets.py webdataset --annotations 'SynthTriplets18M/*.tar' \\
        --keys reference.jpg target.jpg json.edit --output_dir OUT

The output has the columns reference, modification, target, source and quality; sets of texts alone (rtd,
instructpix2pix) have reference_caption and target_caption instead of pictures, and stage II trains on them too.
Pictures on disk stay there and are named by path, with reference_id and target_id; those in tar shards are copied.
"""

import argparse
import csv
import glob
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
from datasets import Dataset, Features, Value, load_dataset
from datasets import Image as ImageFeature
from rows import UNFINISHED


PICTURE = {"bytes", "path"}  # as `datasets` gives one that is encoded
EXTENSIONS = (".jpg", ".png", ".jpeg")
NAMED_AT_MOST = 10  # of thousands of missing pictures


def lasco(record: dict, args: argparse.Namespace) -> Iterator[dict]:
    """LaSCo (Levy et al. 2024): a JSON list of {"query-image": [COCO id, path], "query-text", "target-image"}."""
    pictures = [record[name] for name in ("query-image", "target-image")]
    if any(not isinstance(picture, list) or len(picture) != 2 for picture in pictures):
        raise TypeError(f"query-image and target-image are [COCO id, path], not {pictures}")
    (reference, path), (target, target_path) = pictures
    yield {
        "reference": args.image_dir / path,
        "modification": record["query-text"],
        "target": args.image_dir / target_path,
        "reference_id": reference,
        "target_id": target,
    }


def megapairs(record: dict, args: argparse.Namespace) -> Iterator[dict]:
    """MegaPairs (Zhou et al. 2024): JSON lines of "q_img", "q_texts" (its card says "q_text"), "t_img".

    Each text is a triplet. The mined "hns" are left: stage II mines with its own model.
    """
    texts = record["q_texts"] if "q_texts" in record else record["q_text"]
    for text in [texts] if isinstance(texts, str) else texts or [None]:
        yield {
            "reference": args.image_dir / record["q_img"],
            "modification": text,
            "target": args.image_dir / record["t_img"],
            "reference_id": record["q_img"],
            "target_id": record["t_img"],
        }


def cc_coir(record: dict, args: argparse.Namespace) -> Iterator[dict]:
    """CC-CoIR (Ventura et al. 2024): CSV of "pth1", "pth2" (FOLDER/NAME without extension), "edit" and captions."""
    row = {"modification": record["edit"], "reference_id": record["pth1"], "target_id": record["pth2"]}
    for name, column in (("reference", "pth1"), ("target", "pth2")):
        stem = args.image_dir / record[column]
        found = (stem.with_name(stem.name + extension) for extension in EXTENSIONS)
        row[name] = next((path for path in found if path.is_file()), stem)
    yield row


def rtd(record: dict, args: argparse.Namespace) -> Iterator[dict]:
    """RTD's text triplets (Byun et al. 2024): "reference_caption", "conditioning_caption", "target_caption"."""
    yield {
        "reference_caption": record["reference_caption"],
        "modification": record["conditioning_caption"],
        "target_caption": record["target_caption"],
    }


def instructpix2pix(record: dict, args: argparse.Namespace) -> Iterator[dict]:
    """InstructPix2Pix's prompts (Brooks et al. 2023): JSON lines of "input" or "caption", "edit", "output"."""
    yield {
        "reference_caption": record["input"] if "input" in record else record["caption"],
        "modification": record["edit"],
        "target_caption": record["output"],
    }


def webdataset(record: dict, args: argparse.Namespace) -> Iterator[dict]:
    """Tar shards such as SynthTriplets18M's (Gu et al. 2024), whose members' names are not published: `--keys` says
    where reference, target and modification are; json.edit is "edit" in the member json."""
    reference, target, modification = (_at(record, key) for key in args.keys)
    for key, value in zip(args.keys, (reference, target), strict=False):
        if not (value is None or isinstance(value, bytes) or (isinstance(value, dict) and set(value) == PICTURE)):
            raise TypeError(f"{key} holds no picture but {value!r:.60}; --keys names pictures first")
    # Without ids: keys may begin anew in each shard, and stage II tells pictures by their content.
    yield {"reference": reference, "modification": modification, "target": target}


def shard_samples(args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Samples of tar shards, each with its name."""
    if not args.keys:
        raise ValueError("tar shards need --keys REFERENCE TARGET MODIFICATION")
    remote = "://" in args.annotations
    shards = [args.annotations] if remote else sorted(glob.glob(args.annotations, recursive=True))
    if not shards:
        raise ValueError(f"no file matches {args.annotations}")
    for shard in shards:
        for sample in rows_of_shard(shard):
            yield f"{shard}, sample {sample.get('__key__')}", sample


def rows_of_shard(shard: str) -> Iterator[dict]:
    """A tar shard's samples, pictures still encoded.

    Raises:
        ValueError: naming a shard that is damaged or empty, and the sample before one of another form.
    """
    where = ""
    try:
        files = shard if "://" in shard else glob.escape(shard)
        rows = load_dataset("webdataset", data_files=files, split="train", streaming=True)
        for name, feature in (rows.features or {}).items():
            if isinstance(feature, ImageFeature):
                rows = rows.cast_column(name, ImageFeature(decode=False))
        for sample in rows:
            yield sample
            where = f", beyond sample {sample['__key__']},"
    except (tarfile.TarError, ValueError, IndexError, EOFError, AttributeError) as error:
        or_else = "of another form" if where else "holds no sample"
        raise ValueError(f"{shard}{where} is damaged or {or_else}: {error}") from error


def _at(row: dict, key: str):
    if key in row:
        return row[key]
    outer, _, inner = key.partition(".")
    if outer in row and row[outer] is None:  # a sample without a member that others have
        return None
    if not isinstance(row.get(outer), dict) or inner not in row[outer]:
        seen = [f"{k}.{i}" for k, v in row.items() if isinstance(v, dict) for i in v if set(v) != PICTURE]
        raise ValueError(f"the shards lack {key}; they have {', '.join(sorted([*row, *seen]))}")
    return row[outer][inner]


SOURCES = {
    "lasco": lasco, "megapairs": megapairs, "cc-coir": cc_coir, "rtd": rtd, "instructpix2pix": instructpix2pix,
    "webdataset": webdataset,
}  # fmt: skip
WITH_IMAGE_DIR = {"lasco", "megapairs", "cc-coir"}
TEXTS_ALONE = {"rtd", "instructpix2pix"}


def rows_of(args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """The triplets of every record, each with the record's name. Raises `ValueError` naming one of another form."""
    read, where = {"cc-coir": csv_records, "webdataset": shard_samples}.get(args.source, json_records), ""
    try:
        for name, record in read(args):
            where = name
            yield from ((name, row) for row in SOURCES[args.source](record, args))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{args.annotations} is not of the form of {args.source}: {where} is of another form ({error!r})"
        ) from error
    except (csv.Error, UnicodeDecodeError) as error:
        beyond = f" beyond {where}" if where else ""
        raise ValueError(f"{args.annotations} cannot be read{beyond}: {error}") from error


def csv_records(args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Records of a CSV file with a header, each with its line."""
    csv.field_size_limit(2**24)  # the reader's own is 128 KiB, after which it stops
    with open(args.annotations, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for record in reader:
            yield f"line {reader.line_num}", record


def json_records(args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Records of a JSON list, each with its number from 0 on, or of a file with one JSON object a line, with its line.

    Raises:
        ValueError: naming file and line.
    """
    path = args.annotations
    with open(path, encoding="utf-8-sig") as file:
        start = next((line for line in file if line.strip()), "").lstrip()
        file.seek(0)
        if start.startswith("["):
            try:
                records = json.load(file)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: {error}") from error
            yield from ((f"record {number}", record) for number, record in enumerate(records))
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
                yield f"line {number}", record


def checked(rows: Iterable[tuple[str, dict]], args: argparse.Namespace, bad: list[str]) -> Iterator[dict]:
    """Rows with a text and pictures that are there; `bad` takes a sentence for each of the others."""
    for number, (where, row) in enumerate(rows):
        reason = None
        empty = [
            name for name, value in row.items() if value is None or (isinstance(value, str) and not value.strip())
        ]
        texts = ("modification", "reference_caption", "target_caption")
        odd = [name for name in texts if name in row and not isinstance(row[name], str)]
        absent = [str(value) for value in row.values() if isinstance(value, Path) and not value.is_file()]
        if empty:
            reason = f"no {empty[0]}"
        elif odd:
            reason = f"{odd[0]} is no text: {row[odd[0]]!r}"
        elif absent:
            reason = f"no picture {absent[0]}"
        if reason is not None:
            bad.append(f"{where}, triplet {number}: {reason}")
            continue
        pictures = {name: {"path": str(v.absolute()), "bytes": None} for name, v in row.items() if isinstance(v, Path)}
        ids = {name: str(row[name]) for name in ("reference_id", "target_id") if name in row}
        yield {**row, **pictures, **ids, "source": args.source, "quality": "published"}


def write_files(args: argparse.Namespace, folder: Path, bad: list[str]) -> int:
    """Write the triplets to `folder` and give their number; `bad` takes a sentence for each that is left out."""
    names = ["modification", "source", "quality"]
    pictures = [] if args.source in TEXTS_ALONE else ["reference", "target"]
    names += [] if pictures else ["reference_caption", "target_caption"]
    names += ["reference_id", "target_id"] if args.source in WITH_IMAGE_DIR else []
    features = Features({**dict.fromkeys(pictures, ImageFeature()), **dict.fromkeys(names, Value("string"))})
    rows = islice(checked(rows_of(args), args, bad), args.max_rows)
    count = 0
    while chunk := list(islice(rows, args.rows_per_file)):
        file = folder / f"train-{count // args.rows_per_file:05d}.parquet"
        Dataset.from_list(chunk, features=features).to_parquet(file)
        count += len(chunk)
    return count


def sources_of(file: Path) -> set[str]:
    """What a file in the output folder says that its triplets are of."""
    try:
        return set(pq.read_table(file, columns=["source"])["source"].unique().to_pylist())
    except (OSError, ValueError, KeyError):  # pyarrow's are ValueErrors
        return {file.name}


def convert(args: argparse.Namespace) -> tuple[int, list[str]]:
    """Put the triplets into `args.output_dir`/data; gives their number, and a sentence for each that was left out.

    Raises:
        ValueError: for files of another form, and unless `args.on_bad_image` is "skip" for triplets without a text or
            with pictures that are missing. What the folder held before stays.
    """
    bad: list[str] = []
    aside, final, old = (args.output_dir / name for name in (UNFINISHED, "data", ".replaced-data"))
    if old.is_dir() and not final.is_dir():
        os.replace(old, final)  # a run was killed as it put the new in its place
    held = {name for file in sorted(final.glob("[!.]*")) for name in sources_of(file)}
    if held - {args.source} or (held and not (args.output_dir / "left_out.txt").is_file()):
        raise ValueError(
            f"{args.output_dir} holds other data, of {', '.join(sorted(held))}, which this would replace; choose "
            "another folder"
        )
    for folder in (aside, old):
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    aside.mkdir(parents=True)
    try:
        count = write_files(args, aside, bad)
        if bad and (args.on_bad_image == "error" or not count):
            shown = "\n".join(f"  {line}" for line in bad[:NAMED_AT_MOST])
            more = "" if len(bad) <= NAMED_AT_MOST else f"\n  and {len(bad) - NAMED_AT_MOST} more"
            flag = "--image_dir" if args.source in WITH_IMAGE_DIR else "--keys" if args.keys else None
            remedy = f"Check {flag}, or go on" if flag else "Go on"
            raise ValueError(
                f"{len(bad)} of {len(bad) + count} triplets cannot be used:\n{shown}{more}\n"
                f"{remedy} without them by --on_bad_image skip"
            )
        if not count:
            raise ValueError(f"{args.annotations} holds no triplet")
        if final.is_dir():
            os.replace(final, old)
        os.replace(aside, final)
    finally:
        if old.is_dir() and not final.is_dir():
            os.replace(old, final)
        for folder in (aside, old):
            shutil.rmtree(folder, ignore_errors=True)
    (args.output_dir / "left_out.txt").write_text("".join(f"{line}\n" for line in bad), encoding="utf-8")
    return count, bad


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=sorted(SOURCES))
    parser.add_argument("--annotations", required=True, help="the authors' file, or a pattern of tar shards")
    parser.add_argument("--image_dir", type=Path, help="where the pictures lie that the file names")
    parser.add_argument("--keys", nargs=3, metavar=("REFERENCE", "TARGET", "MODIFICATION"), help="of tar shards")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_rows", type=int, help="stop after so many triplets")
    parser.add_argument("--on_bad_image", default="error", choices=["error", "skip"])
    parser.add_argument("--rows_per_file", type=int, help="of the output; 100,000, or 1,000 where pictures are copied")
    args = parser.parse_args(arguments)
    if args.max_rows is not None and args.max_rows < 1:
        parser.error(f"--max_rows must be at least 1, not {args.max_rows}")
    if args.rows_per_file is not None and args.rows_per_file < 1:
        parser.error(f"--rows_per_file must be at least 1, not {args.rows_per_file}")
    if args.source in WITH_IMAGE_DIR and args.image_dir is None:
        parser.error(f"{args.source} needs --image_dir")
    if args.source not in WITH_IMAGE_DIR and args.image_dir is not None:
        parser.error(f"--image_dir is for {', '.join(sorted(WITH_IMAGE_DIR))}")
    if args.source != "webdataset" and args.keys is not None:
        parser.error("--keys is for webdataset")
    args.rows_per_file = args.rows_per_file or (1_000 if args.source == "webdataset" else 100_000)
    try:
        count, bad = convert(args)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    note = f", {len(bad)} left out: {os.path.join(args.output_dir, 'left_out.txt')}" if bad else ""
    sys.stdout.write(f"{count} triplets written to {args.output_dir}{note}\n")


if __name__ == "__main__":
    main()
