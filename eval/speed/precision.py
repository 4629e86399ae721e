"""What other precisions change: features beside CLIP's own, and the miniature's rankings beside fp32's."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPModel


ROOT = Path(__file__).resolve().parents[2]
PRECISIONS = ("float32", "bfloat16", "float16")
sys.path[:0] = [str(ROOT)]
from miniature.build import write_cirr  # noqa: E402  (found on the path just set)
from miniature.compare import read_benchmark  # noqa: E402
from modeling_tscir import MINIATURE_CHECKPOINT, TSCIRModel, TSCIRProcessor  # noqa: E402
from modeling_tscir.embedding import embed_images, embed_queries  # noqa: E402


@torch.no_grad()
def compare_with_clip(clip: Path, rows: int = 8) -> dict[str, float]:
    """How far features in fp32 are from CLIPModel's, and the least cosine of those in bf16, on random input."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(rows, 3, 224, 224, generator=generator)
    own = CLIPModel.from_pretrained(clip).eval()
    ids = torch.randint(1, 500, (rows, 12), generator=generator)
    ids[:, -1] = own.config.text_config.eos_token_id
    outputs = own.get_image_features(pixel_values=pixels), own.get_text_features(input_ids=ids)
    wanted = [output.pooler_output for output in outputs]
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = TSCIRModel.from_clip_pretrained(clip, dtype=dtype)
        features = [model.get_image_features(pixels.to(dtype)).float(), model.get_text_features(ids).float()]
        pairs = list(zip(features, wanted, strict=True))
        found[f"{name}_difference"] = max(float((a - b).abs().max()) for a, b in pairs)
        found[f"{name}_least_cosine"] = min(float(F.cosine_similarity(a, b).min()) for a, b in pairs)
    return found


def compare_rankings(folder: Path, queries: int = 1000, k: int = 10) -> dict[str, float]:
    """The miniature's checkpoint on its val world: the least cosine between bf16's embeddings and fp32's, and the
    share of queries with the same best ten, and with the same best one; and with the same best ten in fp16, and where
    nothing but weights and inputs of the layers' matrix products is rounded to bf16."""
    write_cirr(folder, "val")
    _, splits = read_benchmark("CIRR", folder / "val", folder, queries)
    split = splits[""]
    processor = TSCIRProcessor.from_pretrained(MINIATURE_CHECKPOINT)
    models = {dtype: TSCIRModel.from_pretrained(MINIATURE_CHECKPOINT, dtype=dtype) for dtype in PRECISIONS}
    models["products"] = with_rounded_products(TSCIRModel.from_pretrained(MINIATURE_CHECKPOINT))
    embeds = {}
    for name, model in models.items():
        gallery = embed_images(model, processor, split.sources)
        texts = [text for (text,) in split.texts]
        embeds[name] = gallery, embed_queries(model, processor, split.sources, split.references, texts)
    best = {name: (queries @ gallery.T).topk(k).indices for name, (gallery, queries) in embeds.items()}
    (gallery, composed), (low_gallery, low_composed) = (embeds[dtype] for dtype in ("float32", "bfloat16"))

    def same(name: str, count: int) -> float:
        """The share of queries whose first `count` pictures are those of fp32, in any order."""
        rows = [best[one][:, :count].sort().values for one in ("float32", name)]
        return float((rows[0] == rows[1]).all(-1).float().mean())

    return {
        "queries": len(composed),
        "pictures": len(gallery),
        "least_cosine_pictures": float(F.cosine_similarity(gallery, low_gallery).min()),
        "least_cosine_queries": float(F.cosine_similarity(composed, low_composed).min()),
        "same_ten": same("bfloat16", k),
        "same_one": same("bfloat16", 1),
        "same_ten_fp16": same("float16", k),
        "same_ten_products": same("products", k),
    }


def with_rounded_products(model: TSCIRModel) -> TSCIRModel:
    """The model, in fp32, with weights and inputs of both towers' linear layers rounded to bf16: what a product in
    bf16 with sums in fp32 takes, were all else exact."""
    for tower in (model.clip.vision_model, model.clip.text_model):
        for module in tower.encoder.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = module.weight.data.bfloat16().float()
                module.register_forward_pre_hook(lambda module, inputs: (inputs[0].bfloat16().float(),))
    return model
