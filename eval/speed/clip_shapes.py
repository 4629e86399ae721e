"""CLIPs by shape alone: what the published checkpoints' configurations say, for models of random weights."""

from transformers import CLIPConfig


def shape(
    text: tuple, vision: tuple, patch_size: int, projection_dim: int, activation: str, image_size: int = 224, **ids
) -> CLIPConfig:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text_config = dict(zip(names, text, strict=True)) | {"hidden_act": activation, "vocab_size": 49408} | ids
    vision_config = dict(zip(names, vision, strict=True)) | {"hidden_act": activation, "patch_size": patch_size}
    return CLIPConfig(
        text_config=text_config,
        vision_config=vision_config | {"image_size": image_size},
        projection_dim=projection_dim,
    )


SHAPES = {
    "ViT-B/32": shape((512, 2048, 12, 8), (768, 3072, 12, 12), 32, 512, "quick_gelu"),
    "ViT-L/14": shape((768, 3072, 12, 12), (1024, 4096, 24, 16), 14, 768, "quick_gelu"),
    "ViT-G/14": shape((1280, 5120, 32, 20), (1664, 8192, 48, 16), 14, 1280, "gelu"),
}
BASE, LARGE = ((512, 2048, 12, 8), (768, 3072, 12, 12)), ((768, 3072, 12, 12), (1024, 4096, 24, 16))
OLD_IDS = {"bos_token_id": 0, "eos_token_id": 2}  # which mean the vocabulary's last two
# By their names on the Hub.
BACKBONES = {
    "openai/clip-vit-base-patch32": shape(*BASE, 32, 512, "quick_gelu", **OLD_IDS),
    "openai/clip-vit-base-patch16": shape(*BASE, 16, 512, "quick_gelu", **OLD_IDS),
    "openai/clip-vit-large-patch14": shape(*LARGE, 14, 768, "quick_gelu", **OLD_IDS),
    "openai/clip-vit-large-patch14-336": shape(*LARGE, 14, 768, "quick_gelu", 336, **OLD_IDS),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": shape(
        (1024, 4096, 24, 16), (1280, 5120, 32, 16), 14, 1024, "gelu", **OLD_IDS
    ),
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": shape(
        (1280, 5120, 32, 20), (1664, 8192, 48, 16), 14, 1280, "gelu", **OLD_IDS
    ),
    "facebook/metaclip-b32-400m": shape(*BASE, 32, 512, "quick_gelu"),
    "facebook/metaclip-l14-400m": shape(*LARGE, 14, 768, "quick_gelu"),
}
