"""What other precisions change: features beside CLIP's own, and the miniature's rankings beside fp32's."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPModel


ROOT = Path(__file__).resolve().parents[2]
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
    share of queries with the same best ten, and with the same best one; and with the same best ten where weights alone
    are rounded to bf16 and all is computed in fp32."""
    write_cirr(folder, "val")
    _, splits = read_benchmark("CIRR", folder / "val", folder, queries)
    split = splits[""]
    processor = TSCIRProcessor.from_pretrained(MINIATURE_CHECKPOINT)
    embeds = []
    for stored, computed in ((torch.float32, torch.float32), (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)):
        model = TSCIRModel.from_pretrained(MINIATURE_CHECKPOINT, dtype=stored).to(computed)
        texts = [text for (text,) in split.texts]
        embeds.append(
            (
                embed_images(model, processor, split.sources),
                embed_queries(model, processor, split.sources, split.references, texts),
            )
        )
    best = [(queries @ gallery.T).topk(k).indices for gallery, queries in embeds]
    exact, low, rounded = ([set(row) for row in rows.tolist()] for rows in best)
    (gallery, composed), (low_gallery, low_composed), _ = embeds
    return {
        "queries": len(exact),
        "pictures": len(gallery),
        "least_cosine_pictures": float(F.cosine_similarity(gallery, low_gallery).min()),
        "least_cosine_queries": float(F.cosine_similarity(composed, low_composed).min()),
        "same_ten": sum(a == b for a, b in zip(exact, low, strict=True)) / len(exact),
        "same_ten_rounded": sum(a == b for a, b in zip(exact, rounded, strict=True)) / len(exact),
        "same_one": float((best[0][:, 0] == best[1][:, 0]).float().mean()),
    }
