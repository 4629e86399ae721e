"""What cached gradients save and cost: peak memory and time of stage I's steps, whole batches beside chunks.

    python eval/speed/gradient_cache.py --batch 512

ViT-B/32 of random weights, random features, one process a measurement. Prints a table.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from clip_shapes import SHAPES


sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "train")]
from accelerate import Accelerator  # noqa: E402
from gradients import backward  # noqa: E402  (found on the path just set)
from stage1 import Stage1Objective  # noqa: E402

from modeling_tscir import TSCIRConfig, TSCIRModel  # noqa: E402


class Prompt:
    """The ids of "a photo of" and four pseudo-words, as a processor gives them."""

    @staticmethod
    def compose(texts: list[str]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[49406, 320, 1125, 539, 0, 0, 0, 0, 49407]])
        return {"input_ids": ids, "pseudo_mask": ids == 0}


def measure(batch: int, chunk: int, steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    config = TSCIRConfig(clip_config=SHAPES["ViT-B/32"], num_injection_blocks=0)
    model = TSCIRModel(config)
    model.add_mapper()
    model.trainable_parameters()
    objective, accelerator = Stage1Objective(model, Prompt), Accelerator(cpu=True)
    features = {name: torch.randn(batch, 512) for name in ("image_embeds", "caption_embeds")}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        backward(accelerator, objective, features, chunk)
        seconds.append(time.perf_counter() - start)
        objective.zero_grad()
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": statistics.median(seconds), "gib": more / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--chunks", type=int, nargs="+", default=[0, 128, 32])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)  # one chunk size, in a process of its own
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure(args.batch, args.measure, args.steps)))
        return
    print("| rows held at a time | seconds a step | memory beyond the model (GiB) |\n|---|---|---|")
    for chunk in args.chunks:
        command = [sys.executable, __file__, "--batch", args.batch, "--steps", args.steps, "--measure", chunk]
        output = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        print(f"| {chunk or args.batch} of {args.batch} | {found['seconds']:.1f} | {found['gib']:.2f} |")


if __name__ == "__main__":
    main()
