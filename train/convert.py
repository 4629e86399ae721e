"""Turn a published mapper of Pic2Word, SEARLE or LinCIR into a TSCIR folder.

    python train/convert.py --format searle --checkpoint SEARLE_ViT-L14.pt \\
        --model_name_or_path openai/clip-vit-large-patch14 --output_dir runs/searle

    python eval/cirr.py --model_name_or_path runs/searle --data_dir CIRR --output_dir runs/searle/cirr

The three are multi-layer perceptrons with two hidden layers that read CLIP's image features without normalisation and
give one pseudo-word, so each is a stage I model without injection; stage II can start from it too. The CLIP must be
the one that the mapper was trained on: OpenAI's ViT-L/14 (SEARLE: ViT-B/32 too; LinCIR: ViT-H/14 and ViT-G/14 too).
Checkpoints are read with `weights_only=True`: nothing in them is executed.

| format | in the file | activation | prompt | preprocessing |
|---|---|---|---|---|
| pic2word | "state_dict_img2text" | ReLU | a photo of {image} , {text} | CLIP's |
| searle | "Phi" | GELU | a photo of {image} that {text} | padded to 1.25 |
| lincir | "Phi" | GELU | a photo of {image} that {text} | CLIP's |
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from checkpoints import refuse_unwritable_folder, refuse_used_folder

from modeling_tscir import TSCIRModel, TSCIRProcessor


@dataclass(frozen=True)
class Format:
    """How a peer stores its mapper.

    Args:
        entry: where its state dict is in the file.
        layers: names of its three linear layers, in order.
        activation: between them.
        prompt_template, padded_aspect_ratio: what its authors evaluate it with.
    """

    entry: str
    layers: tuple[str, str, str]
    activation: str
    prompt_template: str = "a photo of {image} that {text}"
    padded_aspect_ratio: float | None = None


PHI_LAYERS = ("layers.0", "layers.3", "layers.6")
FORMATS = {
    "pic2word": Format(
        "state_dict_img2text", ("layers.0.0", "layers.1.0", "fc_out"), "relu", "a photo of {image} , {text}"
    ),
    "searle": Format("Phi", PHI_LAYERS, "gelu", padded_aspect_ratio=1.25),
    "lincir": Format("Phi", PHI_LAYERS, "gelu"),
}
OUR_LAYERS = ("mlp.0", "mlp.3", "mlp.6")


def read_mapper(path: Path, known: Format) -> dict[str, torch.Tensor]:
    """The checkpoint's mapper with our names for its tensors.

    Raises:
        ValueError: naming the file and what is missing, left over, or not safe to read.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except Exception as error:  # whatever torch makes of bytes that are no checkpoint
        raise ValueError(
            f"{path} is no file of tensors alone ({type(error).__name__}), and no other is read"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get(known.entry), dict):
        found = sorted(map(str, content))[:8] if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} has no {known.entry!r}, but {found}; is --format right?")
    state = {name.removeprefix("module."): tensor for name, tensor in content[known.entry].items()}
    names = {
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for theirs, ours in zip(known.layers, OUR_LAYERS, strict=True)
        for kind in ("weight", "bias")
    }
    if state.keys() != names.keys():
        raise ValueError(
            f"{path}: {known.entry!r} should hold {sorted(names)}; missing {sorted(names.keys() - state.keys())}, "
            f"left over {sorted(state.keys() - names.keys())}"
        )
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name!r} is no tensor of finite numbers")
        if tensor.dim() != (2 if name.endswith("weight") else 1):
            raise ValueError(f"{path}: {name!r} is of shape {tuple(tensor.shape)}, unlike a linear layer's")
    return {ours: state[theirs].float() for theirs, ours in names.items()}


def convert(
    mapper: dict[str, torch.Tensor], known: Format, clip: str, mapper_input: str = "raw", revision: str | None = None
) -> tuple[TSCIRModel, TSCIRProcessor]:
    """A stage I model with these tensors as its mapper, and its processor.

    Args:
        mapper: what `read_mapper` gives.
        clip: Hub name or folder of the CLIP that the mapper was trained on.
        mapper_input: "raw", or "normalized" for a LinCIR trained with `--l2_normalize`.

    Raises:
        ValueError: if the CLIP's widths are not the mapper's.
    """
    model = TSCIRModel.from_clip_pretrained(
        clip,
        revision=revision,
        num_pseudo_words=1,
        num_injection_blocks=0,
        soft_alignment_weight=0.0,
        mapper_hidden_size=mapper["mlp.0.weight"].shape[0],
        mapper_activation=known.activation,
        mapper_input=mapper_input,
        residual=0.0,
        composed_weight=0.0,
    )
    theirs = mapper["mlp.0.weight"].shape[1], mapper["mlp.6.weight"].shape[0]
    ours = model.config.clip_config.projection_dim, model.config.clip_config.text_config.hidden_size
    if theirs != ours:
        raise ValueError(
            f"the mapper reads {theirs[0]} and writes {theirs[1]} numbers, but {clip} has image features of {ours[0]} "
            f"and words of {ours[1]}: it was trained on another CLIP"
        )
    model.add_mapper()
    try:
        model.mapper.load_state_dict(mapper)
    except RuntimeError as error:
        raise ValueError(f"the mapper's layers do not fit each other: {error}") from error
    processor = TSCIRProcessor.from_clip_pretrained(
        clip,
        num_pseudo_words=1,
        prompt_template=known.prompt_template,
        image_template="a photo of {image}",
        padded_aspect_ratio=known.padded_aspect_ratio,
        **({"revision": revision} if revision else {}),
    )
    return model.eval(), processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the published .pt file")
    parser.add_argument("--model_name_or_path", required=True, help="the CLIP that the mapper was trained on")
    parser.add_argument("--revision", help="of the CLIP on the Hub")
    parser.add_argument(
        "--mapper_input",
        default="raw",
        choices=["raw", "normalized"],
        help='"normalized" for a LinCIR trained with --l2_normalize',
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    known = FORMATS[args.format]
    try:
        refuse_unwritable_folder(args.output_dir)
        refuse_used_folder(args.output_dir)
        mapper = read_mapper(args.checkpoint, known)
        model, processor = convert(mapper, known, args.model_name_or_path, args.mapper_input, args.revision)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(args.output_dir, backbone="reference")
        processor.save_pretrained(args.output_dir)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"{args.format} on {args.model_name_or_path} written to {args.output_dir}\n")


if __name__ == "__main__":
    main()
