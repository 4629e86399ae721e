"""A trained folder becomes a complete repository on the Hugging Face Hub.

    python train/publish.py runs/stage2 --repo_id user/name --results runs/cirr/results.json --dry_run published

Writes weights, config, code, processor, custom pipeline, a model card filled from the training's record and from
results.json files, and the results in the Hub's own forms; then uploads them. With --dry_run they are left in a folder
and listed. The token is that of `hf auth login`, or HF_TOKEN.
"""

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError

from modeling_tscir import TSCIRModel, TSCIRProcessor
from modeling_tscir.publishing import default_form, upload_repository, write_repository


# What the HTTP library raises without a connection, whichever huggingface_hub has.
UNREACHABLE = tuple(
    importlib.import_module(name).TransportError for name in ("httpx", "httpx2") if importlib.util.find_spec(name)
)
REASONS = {
    "full": "the backbone is in no repository that others could fetch it from",
    "reference": "the backbone is on the Hub, at a known commit",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what train/stage1.py or train/stage2.py wrote")
    parser.add_argument("--repo_id", required=True, help="user/name on the Hub")
    parser.add_argument("--dry_run", type=Path, metavar="DIR", help="write the repository here and upload nothing")
    parser.add_argument("--backbone", choices=["reference", "full"], help="reference where others can fetch it")
    parser.add_argument("--results", type=Path, nargs="+", default=[], help="results.json files of this model")
    parser.add_argument("--license", help="the Hub's name of one; known backbones' is theirs")
    parser.add_argument(
        "--private", action="store_true", default=None, help="make it so; one that is there and public is refused"
    )
    parser.add_argument("--revision", help="a branch, made if need be")
    parser.add_argument("--example", nargs=2, action="append", default=[], metavar=("PICTURE", "TEXT"))
    parser.add_argument(
        "--benchmark_dataset",
        action="append",
        default=[],
        metavar="cirr=OWNER/NAME",
        help="the benchmark's dataset on the Hub, which .eval_results needs",
    )
    args = parser.parse_args()
    try:
        publish(args)
    except (ValueError, OSError, HfHubHTTPError) as error:
        sys.exit(f"error: {error}")
    except UNREACHABLE as error:
        sys.exit(f"error: the Hub cannot be reached: {error}; --dry_run FOLDER writes the repository alone")


def publish(args: argparse.Namespace) -> None:
    if not args.folder.is_dir():
        raise ValueError(f"{args.folder} is not a folder; train one with train/stage1.py and train/stage2.py")
    if args.repo_id.count("/") != 1:
        raise ValueError(f"--repo_id is user/name, not {args.repo_id!r}")
    place = args.dry_run
    if place is not None and place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"--dry_run {place} is a file or not empty; name a new folder")
    datasets = dict(pair.split("=", 1) for pair in args.benchmark_dataset if "=" in pair)
    if len(datasets) != len(args.benchmark_dataset):
        raise ValueError("--benchmark_dataset is given as cirr=owner/name")
    model, processor = TSCIRModel.from_pretrained(args.folder), TSCIRProcessor.from_pretrained(args.folder)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.dry_run or Path(temporary)
        form = args.backbone or default_form(model)
        files = write_repository(
            folder,
            model,
            processor,
            repo_id=args.repo_id,
            backbone=form,
            licence=args.license,
            training=args.folder,
            results=args.results,
            benchmark_datasets=datasets,
            examples=args.example,
        )
        why = "as told" if args.backbone else REASONS[form]
        print(f"{args.repo_id}, backbone in {form} form ({why}):")
        for file in files:
            print(f"{(folder / file).stat().st_size:14,}  {file}")
        print(f"{sum((folder / file).stat().st_size for file in files):14,}  bytes in {len(files)} files")
        if args.dry_run is not None:
            print(f"Nothing was uploaded; look at {args.dry_run}")
            return
        done = upload_repository(folder, args.repo_id, private=args.private, revision=args.revision)
        print(f"{done.commit_url}")


if __name__ == "__main__":
    main()
