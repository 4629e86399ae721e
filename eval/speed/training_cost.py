"""What a training step of each recipe costs: operations and bytes counted, memory and hours estimated from them.

    python eval/speed/training_cost.py

Counts run on PyTorch's meta device, which knows shapes and computes nothing. Prints the tables of docs/training.md.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from clip_shapes import SHAPES
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modeling_tscir import TSCIRConfig, TSCIRModel


PEAK = 989e12  # dense bf16 operations a second of an H100 SXM, by its data sheet
SHARE_OF_PEAK = 0.4  # assumed
DECODED = 120  # photos of 400 x 711 a second that one worker decodes and resizes, measured on a Xeon core
# Of a prompt's own, four pseudo-words and what follows: what all begin with is computed once a step.
PROMPT_TOKENS = {1: 5, 2: 20}
CAPTION_TOKENS = 16
RECIPES = Path(__file__).parents[2] / "train" / "recipes"


def saved_bytes(module: nn.Module, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
    """What `run` returns, and the bytes that it keeps for the way back, parameters aside."""
    known = {p.untyped_storage()._cdata for p in module.parameters()}
    kept: dict[int, int] = {}
    held = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
            held.append(storage)  # or its address would be given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = run()
    return result, sum(kept.values())


def counted(run: Callable[[], object]) -> tuple[object, float]:
    with FlopCounterMode(display=False) as counter:
        result = run()
    return result, float(counter.get_total_flops())


def cost(name: str, stage: int, rows: int = 8) -> dict[str, float]:
    """Of one row of a training step: operations of the frozen and the trained part, and activations kept."""
    with torch.device("meta"):
        model = TSCIRModel(TSCIRConfig(clip_config=SHAPES[name], stage=stage)).to(torch.bfloat16)
        config = model.config.clip_config
        size, length = config.vision_config.image_size, PROMPT_TOKENS[stage]
        pixels = torch.empty(rows, 3, size, size, dtype=torch.bfloat16)
        captions = torch.zeros(rows, CAPTION_TOKENS, dtype=torch.long)
        ids, mask = torch.zeros(rows, length, dtype=torch.long), torch.zeros(rows, length, dtype=torch.bool)
        words = torch.empty(rows, model.config.num_pseudo_words, config.text_config.hidden_size, dtype=torch.bfloat16)
    trained = model.trainable_parameters()
    with torch.no_grad():
        (embeds, patches), image_flops = counted(lambda: model.encode_image(pixels))
        _, caption_flops = counted(lambda: model.get_text_features(captions))

    def forward() -> torch.Tensor:
        pseudo = words if stage == 2 else model.get_pseudo_words(embeds, patches)
        return model.encode_with_pseudo_words(ids, mask, pseudo)

    def step() -> int:
        queries, kept = saved_bytes(model, forward)
        queries.sum().backward()
        return kept

    kept, flops = counted(step)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in trained.values()),
        "image_flops": image_flops / rows,
        "caption_flops": caption_flops / rows,
        "step_flops": flops / rows,
        "kept_bytes": kept / rows,
    }


def recipe(name: str, stage: int) -> dict:
    stem = {"ViT-B/32": "vit_b32", "ViT-L/14": "vit_l14", "ViT-G/14": "vit_g14"}[name]
    return yaml.safe_load((RECIPES / f"{stem}_stage{stage}.yaml").read_text("utf-8"))


def memory_gib(name: str, c: dict[str, float], trained_rows: int, frozen_rows: int, patch_rows: int = 0) -> float:
    """Weights in fp32 and autocast's copies in bf16, AdamW's state and gradients of what is trained; activations of as
    many rows as are trained on at a time, the vision tower's widest layer of as many as it sees at a time, and patch
    states of as many as are kept."""
    vision = SHAPES[name].vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    frozen = frozen_rows * 3 * tokens * vision.intermediate_size * 2 + patch_rows * tokens * vision.hidden_size * 2
    return (6 * c["parameters"] + 12 * c["trained"] + trained_rows * c["kept_bytes"] + frozen) / 2**30


def stage1_line(name: str) -> str:
    c, given = cost(name, 1), recipe(name, 1)
    batch, steps = given["per_device_train_batch_size"], given["max_steps"]
    chunk = given.get("gradient_cache_chunk", 0) or batch
    # Features are frozen; where gradients are cached, the trained part is computed twice forward.
    row = c["image_flops"] + c["caption_flops"] + c["step_flops"] * (1.5 if chunk < batch else 1)
    computed, decoded = PEAK * SHARE_OF_PEAK / row, given["dataloader_num_workers"] * DECODED  # rows a second
    hours = batch * steps / min(computed, decoded) / 3600
    return (
        f"| {name} | {c['parameters'] / 1e6:,.0f} / {c['trained'] / 1e6:.1f} | {c['image_flops'] / 1e9:.1f} | "
        f"{c['step_flops'] / 1e9:.1f} | {batch}{f' by {chunk}' if chunk < batch else ''} | "
        f"{memory_gib(name, c, chunk, chunk, batch):.0f} | {steps:,} | "
        f"{computed:,.0f} / {decoded:,} | {hours:.1f} | {hours / 8:.1f} |"
    )


def stage2_line(name: str) -> str:
    c, given = cost(name, 2), recipe(name, 2)
    batch, epochs, triplets = given["per_device_train_batch_size"], given["num_train_epochs"], 100_000
    steps = triplets // batch * epochs
    # Features once: two pictures a triplet. Each row is trained on, and a forward pass of it mined with, every epoch.
    total = triplets * 2 * c["image_flops"] + steps * batch * c["step_flops"] * 1.5
    memory = memory_gib(name, c, batch, frozen_rows=128)
    return (
        f"| {name} | {c['trained'] / 1e6:.1f} | {c['step_flops'] / 1e9:.1f} | {batch} | {memory:.0f} | "
        f"{steps:,} | {total / (PEAK * SHARE_OF_PEAK) / 60:.1f} |"
    )


def main() -> None:
    print(
        "| stage I | parameters, all / trained (M) | GFLOP a picture, frozen | GFLOP a row, trained | batch | "
        "memory (GiB) | steps | pairs a second a GPU, computed / decoded | hours, one GPU | hours, eight |"
    )
    print("|" + "---|" * 10)
    for name in SHAPES:
        print(stage1_line(name))
    print(
        "\n| stage II, 100,000 triplets | trained (M) | GFLOP a row, trained | batch | memory (GiB) | steps | "
        "minutes, one GPU |"
    )
    print("|" + "---|" * 7)
    for name in SHAPES:
        print(stage2_line(name))


if __name__ == "__main__":
    main()
