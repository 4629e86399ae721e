"""Which CLIPs TSCIR takes, and what each needs: a contract kept by models of random weights of their configurations.

    python eval/speed/backbones.py                 # the table, from configurations alone
    python eval/speed/backbones.py --run bfloat16  # and each in a process: written, loaded, composed with, saved

Nothing is downloaded: what the published weights alone decide is not shown.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from clip_shapes import BACKBONES
from transformers import CLIPConfig, CLIPModel

from modeling_tscir import TSCIRConfig, TSCIRModel


def empty_model(config: CLIPConfig, **choices) -> TSCIRModel:
    """A model at stage II without memory for its weights."""
    with torch.device("meta"):
        return TSCIRModel(TSCIRConfig(clip_config=config.to_dict(), stage=2, **choices))


def inputs(config: TSCIRConfig, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Two queries: random pictures, and prompts of random words with the pseudo-words in their middle."""
    size, end, words = config.clip_config.vision_config.image_size, config.text_eos_token_id, config.num_pseudo_words
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 1000, (2, 12 + words), generator=generator)
    ids[:, 0], ids[:, -1] = end - 1, end
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 4 : 4 + words] = True
    made = {"pixel_values": torch.randn(2, 3, size, size, generator=generator).to(dtype), "input_ids": ids}
    made["modification_ids"] = ids[:, 4 + words :]
    return {name: tensor.to(device) for name, tensor in (made | {"pseudo_mask": mask}).items()}


def check_shapes(model: TSCIRModel) -> dict[str, float]:
    """Compose on a model without weights; give its sizes. Raises `AssertionError` for outputs of other shapes."""
    given = inputs(model.config, "meta", torch.float32)
    clip, count = model.config.clip_config, model.config.num_pseudo_words
    with torch.no_grad():
        embeds, words = model.encode_reference(given["pixel_values"])
        query = model.get_composed_features(**given)
    assert query.shape == embeds.shape == (2, clip.projection_dim)
    assert words.shape == (2, count, clip.text_config.hidden_size)
    trained = sum(tensor.numel() for tensor in model.delta_state_dict().values())
    frozen = sum(p.numel() for p in model.parameters()) - trained
    return {"frozen": frozen, "trained": trained, "fp32_gib": (frozen + trained) * 4 / 2**30}


@torch.no_grad()
def check_contract(config: CLIPConfig, folder: Path, dtype: torch.dtype) -> None:
    """Write random weights, load them as a backbone, and hold the model to what its users rely on.

    Raises `AssertionError` if features are not CLIPModel's own to the bit, if fresh adapters change anything, or if
    what is saved and loaded composes otherwise.
    """
    CLIPModel(config).to(dtype).save_pretrained(folder / "clip")
    model = TSCIRModel.from_clip_pretrained(folder / "clip", dtype=dtype)
    clip = CLIPModel.from_pretrained(folder / "clip", dtype=dtype).eval()
    given = inputs(model.config, "cpu", dtype)
    pixels, texts = given["pixel_values"], given["input_ids"]
    assert torch.equal(model.get_image_features(pixels), clip.get_image_features(pixel_values=pixels).pooler_output)
    assert torch.equal(model.get_text_features(texts), clip.get_text_features(input_ids=texts).pooler_output)
    plain = F.normalize(clip.get_text_features(input_ids=texts).pooler_output, dim=-1)
    del clip
    model.add_mapper()
    model.mapper.eval()
    composed = model.get_composed_features(**given)
    assert composed.shape == plain.shape and torch.isfinite(composed).all()
    assert torch.allclose(composed.float().norm(dim=-1), torch.ones(2), atol=1e-2)
    model.add_adapters()
    assert torch.equal(model.eval().get_composed_features(**given), composed)
    for parameter in model.trainable_parameters().values():
        parameter += 0.02 * torch.randn_like(parameter)
    trained = model.get_composed_features(**given)
    assert not torch.equal(trained, composed)
    assert torch.equal(F.normalize(model.get_text_features(texts), dim=-1), plain)
    model.save_pretrained(folder / "model", backbone="reference")
    del model
    again = TSCIRModel.from_pretrained(folder / "model", dtype=dtype)
    assert torch.equal(again.get_composed_features(**given), trained)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", choices=list(BACKBONES), default=list(BACKBONES))
    parser.add_argument("--run", choices=["float32", "bfloat16"], help="with real tensors, in this precision")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            check_contract(BACKBONES[args.one], Path(folder), getattr(torch, args.run))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"peak": peak, "seconds": time.perf_counter() - start}))
        return
    more = f" peak GiB of the contract in {args.run} | seconds |" if args.run else ""
    print(f"| backbone | pixels | frozen (M) | trained (M) | weights, fp32 / bf16 (GiB) |{more}")
    print("|---|---|---|---|---|" + ("---|---|" if args.run else ""))
    for name in args.backbones:
        sizes = check_shapes(empty_model(BACKBONES[name]))
        cells = [name, str(BACKBONES[name].vision_config.image_size)]
        cells += [f"{sizes[part] / 1e6:,.1f}" for part in ("frozen", "trained")]
        cells.append(f"{sizes['fp32_gib']:.2f} / {sizes['fp32_gib'] / 2:.2f}")
        if args.run:
            command = [sys.executable, __file__, "--one", name, "--run", args.run]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                told = done.stderr.strip().splitlines()  # of a process that was killed, as for memory, nothing
                cells += [f"fails: {told[-1] if told else f'exit status {done.returncode}'}", ""]
            else:
                ran = json.loads(done.stdout.splitlines()[-1])
                cells += [f"{ran['peak']:.1f}", f"{ran['seconds']:.0f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
