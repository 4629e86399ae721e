"""CLIPs by shape alone: what the published checkpoints' configurations say, for models of random weights."""

from transformers import CLIPConfig


def shape(text: tuple, vision: tuple, patch_size: int, projection_dim: int, activation: str) -> CLIPConfig:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return CLIPConfig(
        text_config=dict(zip(names, text, strict=True)) | {"hidden_act": activation, "vocab_size": 49408},
        vision_config=dict(zip(names, vision, strict=True)) | {"hidden_act": activation, "patch_size": patch_size},
        projection_dim=projection_dim,
    )


SHAPES = {
    "ViT-B/32": shape((512, 2048, 12, 8), (768, 3072, 12, 12), 32, 512, "quick_gelu"),
    "ViT-L/14": shape((768, 3072, 12, 12), (1024, 4096, 24, 16), 14, 768, "quick_gelu"),
    "ViT-G/14": shape((1280, 5120, 32, 20), (1664, 8192, 48, 16), 14, 1280, "gelu"),
}
