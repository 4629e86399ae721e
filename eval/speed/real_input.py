"""Real photos, real texts and CLIP's real vocabulary through everything, on a CLIP of random weights.

    python eval/speed/real_input.py --photos FOLDER --bpe bpe_simple_vocab_16e6.txt.gz \\
        --captions captions_val2017.json --modifications cap.rc2.val.json --output_dir runs/real_input
    ... --shape ViT-L/14 --mixed_precision bf16 --per_device_train_batch_size 16

Indexes and searches the photos through the pipeline, then runs both stages for some steps on photos paired at random
with COCO captions and CIRR modifications. Prints token ids, shapes, seconds and peak memory. What the weights alone
decide, retrieval quality, is not tested by this.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import random
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from clip_shapes import SHAPES
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, pipeline

import modeling_tscir
from modeling_tscir.images import list_images


def real_tokenizer(bpe_file: Path) -> CLIPTokenizer:
    """CLIP's tokenizer from OpenAI's published merges: 49,408 ids."""
    lines = gzip.decompress(bpe_file.read_bytes()).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    pieces = [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=merges, model_max_length=77)


def write_random_clip(folder: Path, shape: str, bpe_file: Path) -> None:
    torch.manual_seed(0)
    CLIPModel(SHAPES[shape]).save_pretrained(folder)
    real_tokenizer(bpe_file).save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)


def peak_gb(usage: resource.struct_rusage) -> float:
    return usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("photos", "bpe", "captions", "modifications", "output_dir"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="ViT-B/32")
    parser.add_argument("--max_photos", type=int, help="fewer than the folder holds")
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--mixed_precision", default="no")
    parser.add_argument("--per_device_train_batch_size", type=int, default=64)
    args = parser.parse_args()
    names = list_images(args.photos)[: args.max_photos]
    print("| work | figure |\n|---|---|", flush=True)
    # In a process of its own: what this one ever held, the memory of its children would seem to begin with.
    searching = multiprocessing.get_context("spawn").Process(target=search, args=(args, names))
    searching.start()
    searching.join()
    if searching.exitcode:
        sys.exit(searching.exitcode)
    train(args, args.output_dir / "clip", names)


def search(args: argparse.Namespace, names: list[str]) -> None:
    clip_dir = args.output_dir / "clip"
    write_random_clip(clip_dir, args.shape, args.bpe)
    model = modeling_tscir.TSCIRModel.from_clip_pretrained(clip_dir)
    processor = modeling_tscir.TSCIRProcessor.from_clip_pretrained(clip_dir)
    inputs = processor(images=[str(args.photos / list_images(args.photos)[0])], text=["is red with long sleeves"])
    shapes = {name: tuple(value.shape) for name, value in inputs.items()}
    print(f"| token ids of a composed query | {inputs['input_ids'][0].tolist()} |")
    print(f"| place of the pseudo-word | {inputs['pseudo_mask'][0].nonzero().flatten().tolist()} |")
    print(f"| shapes | {', '.join(f'{k} {v}' for k, v in shapes.items())} |")

    cir = pipeline("composed-image-retrieval", model=model, processor=processor)
    start = time.perf_counter()
    cir.index([str(args.photos / name) for name in names])
    seconds = time.perf_counter() - start
    print(f"| photos indexed | {len(cir.gallery_ids)} in {seconds:.1f} s |")
    photo = str(args.photos / names[0])
    start = time.perf_counter()
    for _ in range(10):
        found = cir(image=photo, text="is red with long sleeves", top_k=5)
    print(f"| one search through the pipeline | {(time.perf_counter() - start) / 10 * 1000:.0f} ms |")
    itself = cir(image=photo, text="", top_k=1, weight=-1.0)[0]
    print(f"| the photo finds itself | {itself['id'] == photo}, cosine {itself['score']:.4f} |")
    print(f"| peak memory of that | {peak_gb(resource.getrusage(resource.RUSAGE_SELF)):.2f} GB |")
    assert len(found) == 5


def train(args: argparse.Namespace, clip_dir: Path, names: list[str]) -> None:
    rng = random.Random(0)
    captions = [a["caption"] for a in json.loads(args.captions.read_text("utf-8"))["annotations"]]
    modifications = [r["caption"] for r in json.loads(args.modifications.read_text("utf-8"))]
    photos = [str(args.photos / name) for name in names]
    tables = {
        "captions": {"image": photos, "caption": rng.sample(captions, len(photos))},
        "triplets": {
            "reference": photos,
            "modification": rng.sample(modifications, len(photos)),
            "target": rng.sample(photos, len(photos)),
        },
    }
    for name, columns in tables.items():
        text = {"caption", "modification"}
        features = Features({k: Value("string") if k in text else ImageFeature() for k in columns})
        Dataset.from_dict(columns, features=features).to_parquet(args.output_dir / name / "train.parquet")
    model = clip_dir
    for stage, name in ((1, "captions"), (2, "triplets")):
        output = args.output_dir / f"stage{stage}"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
        command += [f"train/stage{stage}.py", "--model_name_or_path", model, "--dataset_name", args.output_dir / name]
        command += ["--output_dir", output, "--max_steps", args.max_steps, "--logging_steps", args.max_steps]
        command += ["--per_device_train_batch_size", args.per_device_train_batch_size]
        command += ["--mixed_precision", args.mixed_precision, "--feature_batch_size", 32]
        start = time.perf_counter()
        with open(args.output_dir / f"stage{stage}.log", "w+", encoding="utf-8") as log:
            process = subprocess.Popen([str(part) for part in command], stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
            log.seek(0)
            told = log.read()
        if status:
            sys.exit(told)
        rate = float(re.findall(r"rows_per_second (\S+)", told)[-1])
        memory = peak_gb(usage)
        work = f"stage {stage}, {args.max_steps} steps of {args.per_device_train_batch_size}, {args.mixed_precision}"
        print(f"| {work}, start and frozen features included | {seconds:.0f} s, peak {memory:.2f} GB |")
        print(f"| of it a step, of which features were computed before | {rate:.1f} rows/s |")
        model = output


if __name__ == "__main__":
    main()
