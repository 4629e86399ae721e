"""What the works are measured on: CLIPs of random weights, drawn photos, texts as long as CIRR's."""

import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from clip_shapes import SHAPES
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "train"), str(ROOT / "eval")]
from modeling_tscir import TSCIRModel, TSCIRProcessor  # noqa: E402  (found on the path just set)


# The field's own, as the peers have them: ours have no words by default, and are the shorter for it.
PROMPTS = {"image_template": "a photo of {image}", "prompt_template": "a photo of {image} that {text}"}
WORDS = [
    "a",
    "the",
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "star",
    "striped",
    "dotted",
    "large",
    "small",
    "left",
    "right",
    "top",
    "on",
    "with",
    "and",
]
GALLERY = 10_000  # pictures that a query is compared with


@dataclass(frozen=True)
class Setting:
    """Where the inputs are and how large the work is.

    Args:
        folder: what `write_inputs` wrote.
        shape: of the CLIP, one of `clip_shapes.SHAPES`.
        dtype: the precision of our inference, the faster on this machine.
        rows: queries, rows of a training step, or pictures.
        gallery: pictures that queries are compared with.
    """

    folder: Path
    shape: str
    dtype: str
    rows: int = 1
    gallery: int = GALLERY

    @property
    def clip(self) -> Path:
        return self.folder / self.shape.replace("/", "-")

    def clip_in(self, dtype: str) -> Path:
        """The same CLIP, its weights stored in a precision, so that they are mapped from their file as they are."""
        return self.clip if dtype == "float32" else self.clip.with_name(f"{self.clip.name}-{dtype}")

    @property
    def photos(self) -> list[str]:
        every = sorted(str(path) for path in (self.folder / "photos").iterdir())
        return [every[i % len(every)] for i in range(self.rows)]

    @property
    def texts(self) -> list[str]:
        """Sentences as long as CIRR's, whose 10th, 50th and 90th percentiles are 7, 11 and 18 tokens."""
        rng = random.Random(0)
        counts = [min(40, max(3, round(rng.lognormvariate(np.log(11), 0.37)))) for _ in range(self.rows)]
        return [" ".join(rng.choices(WORDS, k=count)) for count in counts]

    @property
    def pixels(self) -> torch.Tensor:
        return torch.randn(self.rows, 3, 224, 224, generator=torch.Generator().manual_seed(0))

    def model(self, stage: int, dtype: str | None = None) -> tuple[TSCIRModel, TSCIRProcessor]:
        """At a stage of training, all of it of random weights."""
        torch.manual_seed(0)
        dtype = dtype or self.dtype
        model = TSCIRModel.from_clip_pretrained(self.clip_in(dtype), dtype=getattr(torch, dtype))
        if stage:
            model.add_mapper()
        if stage == 2:
            model.add_adapters()
        return model.eval(), TSCIRProcessor.from_clip_pretrained(self.clip, **PROMPTS)

    def embeds(self, count: int, seed: int = 0) -> torch.Tensor:
        width = SHAPES[self.shape].projection_dim
        return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def write_inputs(folder: Path, shapes: list[str], photos: int) -> None:
    """CLIPs of random weights with the miniature's tokenizer, of which WORDS are a token each, and JPEG files."""
    miniature = ROOT / "modeling_tscir/miniature_clip"
    for shape in shapes:
        torch.manual_seed(0)
        model = CLIPModel(with_ids_of(miniature, SHAPES[shape]))
        for dtype in ("float32", "bfloat16"):
            clip = Setting(folder, shape, dtype).clip_in(dtype)
            model.to(getattr(torch, dtype)).save_pretrained(clip)
            CLIPImageProcessorPil().save_pretrained(clip)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(miniature / name, clip)
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir(parents=True)
    for number in range(photos):
        # Soft shapes and some grain: files of about 20 kB, as a shop's of this size are.
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((400, 533), Image.BICUBIC)
        grain = rng.normal(0, 4, (533, 400, 1))
        picture = Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8))
        picture.save(folder / "photos" / f"{number:05d}.jpg", quality=80)


def with_ids_of(clip: Path, config: CLIPConfig) -> CLIPConfig:
    """The configuration, for texts of another CLIP's tokenizer."""
    text = CLIPConfig.from_pretrained(clip).text_config
    ids = {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    content = config.to_dict()
    return CLIPConfig(**content | {"text_config": content["text_config"] | ids})
