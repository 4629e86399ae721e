"""What training and queries cost on one GPU: rows a second, share of its peak and of the frozen forward, memory.

    python eval/speed/gpu.py --output_dir runs/gpu

CLIPs of random weights, the recipes' batches, pictures as pixels on the device: reading and decoding files is not in
these figures. Absolute figures, with other kernels of attention and torch.compile beside what the code does by itself,
and the hours of a recipe that follow. Writes gpu.json and gpu.md; about seven minutes on an H200.
"""

import argparse
import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from clip_shapes import SHAPES
from setting import PROMPTS, Setting, with_ids_of  # a neighbour, which puts train/ and eval/ on the path


# isort: split
from gradients import compile_towers
from stage1 import Stage1Objective
from stage2 import Stage2Objective
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from training_cost import PEAK, recipe
from ways import Step, stage2_batch

from modeling_tscir import MINIATURE_CHECKPOINT, TSCIRConfig, TSCIRModel, TSCIRProcessor
from modeling_tscir.publishing import versions


CLIP = MINIATURE_CHECKPOINT.parent / "miniature_clip"
TRIPLETS = 100_000  # of the recipe of stage II whose minutes are told
ROUNDS = 5


def build(shape: str, stage: int, device: str, dtype: torch.dtype) -> tuple[TSCIRModel, TSCIRProcessor]:
    torch.manual_seed(0)
    config = TSCIRConfig(clip_config=with_ids_of(CLIP, SHAPES[shape]), stage=stage)
    with torch.device(device):
        model = TSCIRModel(config).to(dtype)
    return model.eval(), TSCIRProcessor.from_clip_pretrained(CLIP, config.num_pseudo_words, **PROMPTS)


def stage1_step(setting: Setting, device: str, chunk: int, cached: bool = False) -> Step:
    model, processor = build(setting.shape, 1, device, torch.float32)
    objective, captions = Stage1Objective(model, processor), processor.tokenize(setting.texts)
    batch = {"pixel_values": setting.pixels, **{k: captions[k] for k in ("input_ids", "attention_mask")}}
    batch = {k: v.to(device) for k, v in batch.items()}
    if cached:
        batch = objective.frozen(batch)
    return Step(objective, model, batch, accelerator_of(device), chunk)


def stage2_step(setting: Setting, device: str, chunk: int) -> Step:
    """With mined negatives in the loss; mining itself is a forward pass of every row once an epoch."""
    model, processor = build(setting.shape, 2, device, torch.float32)
    batch = {k: v.to(device) for k, v in stage2_batch(setting, model, processor).items()}
    return Step(Stage2Objective(model), model, batch, accelerator_of(device), chunk)


def accelerator_of(device: str) -> Accelerator:
    return Accelerator(cpu=device == "cpu", mixed_precision="bf16")


def forward_of(step: Step, part: str) -> Callable:
    """Of a step, the frozen features or the trained part alone, without gradients."""
    objective = step.accelerator.unwrap_model(step.objective)
    rows = len(next(iter(step.batch.values())))
    size = step.chunk or rows
    parts = [{k: v[start : start + size] for k, v in step.batch.items()} for start in range(0, rows, size)]

    @torch.no_grad()
    def run() -> None:
        for batch in parts:
            with step.accelerator.autocast():
                getattr(objective, part)(batch)

    return run


def pictures(setting: Setting, device: str) -> tuple[Callable, TSCIRModel]:
    """Frozen features of pictures, as of a gallery, in bf16."""
    model, _ = build(setting.shape, 1, device, torch.bfloat16)
    pixels = setting.pixels.to(device, torch.bfloat16)
    return torch.no_grad()(lambda: model.get_image_features(pixels)), model


def queries(setting: Setting, device: str) -> tuple[Callable, TSCIRModel]:
    """Composed queries of pictures and texts, in bf16."""
    model, processor = build(setting.shape, 2, device, torch.bfloat16)
    prompt, alone = processor.compose(setting.texts), processor.tokenize(setting.texts)
    inputs = {"pixel_values": setting.pixels.bfloat16(), "modification_ids": alone["input_ids"]}
    inputs |= {"modification_mask": alone["attention_mask"]}
    inputs |= {k: prompt[k] for k in ("input_ids", "pseudo_mask", "attention_mask")}
    inputs = {k: v.to(device) for k, v in inputs.items()}
    return torch.no_grad()(lambda: model.get_composed_features(**inputs)), model


def timed(run: Callable, device: str, calls: int = 1) -> dict:
    """Median seconds of a call with their range, and the most memory held; three calls before do not count."""
    on_gpu = device != "cpu"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    for _ in range(3):
        run()
    wait()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        wait()
        seconds.append((time.perf_counter() - start) / calls)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    return {"seconds": statistics.median(seconds), "spread": [min(seconds), max(seconds)], "peak_gib": peak}


def operations(run: Callable) -> float:
    """Floating-point operations of one call, as they are called: what gradient caching computes again counts again."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def clear() -> None:
    """Give back what a work held, so that the next one's memory is its own."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def attention(model: TSCIRModel, name: str) -> Iterator[None]:
    """One of torch's kernels for "sdpa", "eager", or what torch takes by itself."""
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "memory-efficient": SDPBackend.EFFICIENT_ATTENTION}
    if name == "eager":
        model.clip.set_attn_implementation("eager")
    try:
        with sdpa_kernel(backends[name]) if name in backends else contextlib.nullcontext():
            yield
    finally:
        model.clip.set_attn_implementation("sdpa")


class Measurement:
    """Collects lines; a variant that a device does not have becomes a line that says why."""

    def __init__(self, device: str):
        self.device, self.lines = device, []

    def add(self, work: str, shape: str, rows: int, variant: str, run: Callable, flops: float, **more) -> dict:
        line = {"work": work, "shape": shape, "rows": rows, "variant": variant}
        try:
            line |= timed(run, self.device, calls=20 if rows == 1 else 1) | more
            line |= {"rows_per_second": rows / line["seconds"], "flops_per_second": flops / line["seconds"]}
        except Exception as error:  # noqa: BLE001  (whatever a kernel or a compiler raises)
            line["failed"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        self.lines.append(line)
        print(json.dumps(line), flush=True)
        return line

    def steps(self, work: str, shape: str, rows: int, make: Callable, variants: bool, chunk: int = 0) -> None:
        """A training step by itself; then, if asked for, with other kernels and compiled."""
        clear()
        step = make(Setting(Path(), shape, "bfloat16", rows=rows), self.device, chunk)
        model = step.accelerator.unwrap_model(step.objective).model
        flops, more = operations(step), {}
        if "pixel_values" in step.batch:
            more["frozen_seconds"] = timed(forward_of(step, "frozen"), self.device)["seconds"]
        if work == "stage II step":
            more["forward_seconds"] = timed(forward_of(step, "forward"), self.device)["seconds"]
        self.add(work, shape, rows, "as it is", step, flops, **more)
        if not variants:
            return
        for name in ("eager", "flash", "memory-efficient"):
            with attention(model, name):
                self.add(work, shape, rows, name, step, flops)
        compile_towers(model)
        self.add(work, shape, rows, "torch.compile", step, flops)

    def inference(self, work: str, shape: str, rows: int, make: Callable) -> None:
        clear()
        run, model = make(Setting(Path(), shape, "bfloat16", rows=rows), self.device)
        flops = operations(run)
        self.add(work, shape, rows, "as it is", run, flops)
        compile_towers(model)
        self.add(work, shape, rows, "torch.compile", run, flops)


def matrix_product(device: str, size: int) -> float:
    """Operations a second of a large product in bf16."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / timed(lambda: left @ right, device, calls=5)["seconds"]


def measure(shapes: list[str], device: str, batches: dict[int, int], size: int = 8192) -> dict:
    """Every figure. `batches`: of stage I and II."""
    on_gpu = device != "cpu"
    figures = {"device": torch.cuda.get_device_name() if on_gpu else "CPU", "versions": versions()}
    figures["product"] = matrix_product(device, size)
    figures["peak"] = PEAK if any(name in figures["device"] for name in ("H100", "H200")) else figures["product"]
    measurement = Measurement(device)
    for shape in shapes:
        chunk, large = recipe_of(shape, 1).get("gradient_cache_chunk", 0), shape == "ViT-L/14"
        measurement.steps("stage I step", shape, batches[1], stage1_step, large, min(chunk, batches[1] // 2))
        measurement.steps("stage II step", shape, batches[2], stage2_step, large)
        if not chunk:
            cached = partial(stage1_step, cached=True)
            measurement.steps("stage I step, features cached", shape, batches[1], cached, False)
            measurement.inference("features of pictures", shape, 256, pictures)
            measurement.inference("composed query", shape, 1, queries)
            measurement.inference("composed queries", shape, 32, queries)
    return figures | {"lines": measurement.lines}


def recipe_of(shape: str, stage: int) -> dict:
    return recipe(shape, stage) if shape in ("ViT-B/32", "ViT-L/14", "ViT-G/14") else {}


def recipe_lines(figures: dict) -> list[str]:
    """What the recipes would take at these rates: computing alone, pictures decoded as fast as they are asked for."""
    found = {(line["work"], line["shape"]): line for line in figures["lines"] if line["variant"] == "as it is"}
    lines = []
    for (work, shape), one in found.items():
        told = recipe_of(shape, 2 if work == "stage II step" else 1)
        if "failed" in one or not told:
            continue
        if work == "stage I step":
            hours = told["max_steps"] * told["per_device_train_batch_size"] / one["rows_per_second"] / 3600
            lines.append(f"- Stage I of {shape}, {told['max_steps']:,} steps of {one['rows']}: {hours:.1f} hours.")
        if work == "stage II step":
            epochs = told["num_train_epochs"]
            rows = TRIPLETS * epochs / one["rows"] * (one["seconds"] + one["forward_seconds"])
            lines.append(
                f"- Stage II of {shape}, {TRIPLETS:,} triplets, {epochs} epochs with mining, their pictures' features "
                f"computed before: {rows / 60:.1f} minutes."
            )
    return lines


def report(figures: dict) -> str:
    """Markdown."""
    told = figures["versions"]
    peak, product = figures["peak"] / 1e12, figures["product"] / 1e12
    share = "that" if peak == product else f"the {peak:.0f} of its data sheet"
    lines = [
        "# On one GPU",
        "",
        f"{figures['device']}, torch {told['torch']}, transformers {told['transformers']}; bf16, CLIPs of random "
        f"weights, median of {ROUNDS} with their range. A product of two large matrices reaches {product:.0f} TFLOP/s "
        f"there; shares are of {share}. Pictures are pixels on the device: decoding is not in these figures. Made by "
        "`python eval/speed/gpu.py`.",
        "",
        "| work | shape | rows | | rows a second | a call (range) | share of peak | frozen forward's share | memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in figures["lines"]:
        head = f"| {line['work']} | {line['shape']} | {line['rows']:,} | {line['variant']} |"
        if "failed" in line:
            lines.append(f"{head} failed: {line['failed'].replace('|', ' ')} | | | | |")
            continue
        low, high = (1000 * second for second in line["spread"])
        frozen = f"{line['frozen_seconds'] / line['seconds']:.0%}" if "frozen_seconds" in line else ""
        memory = "" if line["peak_gib"] is None else f"{line['peak_gib']:.1f} GiB"
        lines.append(
            f"{head} {line['rows_per_second']:,.0f} | {1000 * line['seconds']:.1f} ms ({low:.1f} to {high:.1f}) | "
            f"{line['flops_per_second'] / figures['peak']:.0%} | {frozen} | {memory} |"
        )
    return "\n".join([*lines, "", "What the recipes would take, from these rates:", "", *recipe_lines(figures), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["ViT-B/32", "ViT-L/14", "ViT-G/14"])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU; eval/speed/benchmark.py measures on CPUs")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    figures = measure(args.shapes, "cuda", {1: 1024, 2: 512})
    (args.output_dir / "gpu.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    (args.output_dir / "gpu.md").write_text(report(figures), encoding="utf-8")
    print(report(figures))


if __name__ == "__main__":
    main()
