"""Run by torchrun in a test: frozen features of both stages, and how many pictures each process decoded for them."""

import sys

import torch
from accelerate import Accelerator
from arguments import DataArguments
from rows import load_rows
from safetensors.torch import save_file
from stage1 import Stage1Arguments, Stage1Data
from stage2 import Stage2Arguments, Stage2Data, load_triplets

from modeling_tscir import TSCIRModel, TSCIRProcessor


def main(data: str, model: str, cache: str, output: str) -> None:
    accelerator = Accelerator(cpu=True)
    model, processor = TSCIRModel.from_pretrained(model).eval(), TSCIRProcessor.from_pretrained(model)
    decoded, pixels = [], TSCIRProcessor._pixels
    TSCIRProcessor._pixels = lambda self, image: decoded.append(1) or pixels(self, image)
    given = {"feature_batch_size": 4, "feature_cache_dir": cache or None, "on_bad_image": "skip"}
    captions = DataArguments(dataset_name=f"{data}/captions", **given)
    rows, bad = load_rows(captions, {"image": "the picture", "caption": "its caption"}, images=["image"])
    first = Stage1Data(rows, model, processor, captions, Stage1Arguments())
    triplets = DataArguments(dataset_name=f"{data}/triplets", **given)
    rows, more = load_triplets(triplets, Stage2Arguments())
    second = Stage2Data(rows, model, processor, triplets, Stage2Arguments())
    names = ("image_embeds", "patch_states", "caption_embeds"), ("reference_embeds", "pseudo_words", "target_embeds")
    found = {n: getattr(holder, n) for holder, own in zip((first, second), names, strict=True) for n in own}
    found |= {"bad": torch.tensor([int(where.split()[1].rstrip(",")) for where, _ in bad + more])}
    found |= {"decoded": torch.tensor(len(decoded))}
    save_file({k: v.contiguous() for k, v in found.items()}, f"{output}-{accelerator.process_index}.safetensors")
    accelerator.end_training()  # or the group's threads may end the process by a signal


if __name__ == "__main__":
    main(*sys.argv[1:])
