"""Put a trained miniature folder into the package, as the checkpoint that a pipeline without a model name loads.

    python -m miniature.pack --trained_dir runs/miniature/stage2

Mapper and adapters are rounded to fp16; the backbone is named relative to the checkpoint, as both are shipped.
"""

import argparse
from pathlib import Path

import torch

from modeling_tscir import MINIATURE_CHECKPOINT, TSCIRModel, TSCIRProcessor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained_dir", type=Path, required=True)
    args = parser.parse_args()
    model = TSCIRModel.from_pretrained(args.trained_dir, dtype=torch.float16)
    model.config.backbone_name_or_path = model.config.clip_config._name_or_path = "../miniature_clip"
    model.save_pretrained(MINIATURE_CHECKPOINT, backbone="reference")
    TSCIRProcessor.from_pretrained(args.trained_dir).save_pretrained(MINIATURE_CHECKPOINT)
    for code in MINIATURE_CHECKPOINT.glob("*.py"):  # the package itself is the code
        code.unlink()


if __name__ == "__main__":
    main()
