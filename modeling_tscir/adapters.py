"""Stage II: composing adapters, PEFT's LoRA in the text tower, which acts only while a composed query is encoded."""

import contextlib
import threading
from collections.abc import Iterator

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn


ADAPTER_NAME = "default"
# Whether the adapters act is state of shared modules, so encoding is serialised among threads.
_SWITCH = threading.RLock()


def add_composing_adapters(text_model: nn.Module, rank: int, alpha: int, dropout: float, targets: list[str]) -> None:
    """Put zero-initialised LoRA layers into `text_model`, switched off until `composing` switches them on."""
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets))
    required = {name: p.requires_grad for name, p in text_model.named_parameters()}
    inject_adapter_in_model(config, text_model, adapter_name=ADAPTER_NAME)
    for name, parameter in text_model.named_parameters():  # injection freezes everything but the adapters
        if "lora_" not in name:
            parameter.requires_grad_(required[name.replace(".base_layer.", ".")])
    for layer in lora_layers(text_model):
        layer._disable_adapters = True


def lora_layers(module: nn.Module) -> list[LoraLayer]:
    return [m for m in module.modules() if isinstance(m, LoraLayer)]


@contextlib.contextmanager
def composing(text_model: nn.Module, active: bool = True) -> Iterator[None]:
    """Within this context the composing adapters of `text_model` act if `active`, else they do not.

    PEFT's own switch also rewrites `requires_grad`, so the flag behind it is set here.
    """
    with _SWITCH:
        layers = lora_layers(text_model)
        before = [layer._disable_adapters for layer in layers]
        for layer in layers:
            layer._disable_adapters = not active
        try:
            yield
        finally:
            for layer, flag in zip(layers, before, strict=True):
                layer._disable_adapters = flag


def uninitialised_lora_layers(module: nn.Module) -> list[LoraLayer]:
    """Adapter layers that no checkpoint has filled."""
    return [
        layer
        for layer in lora_layers(module)
        if not all(
            getattr(part[ADAPTER_NAME].weight, "_is_hf_initialized", False) for part in (layer.lora_A, layer.lora_B)
        )
    ]


def reset_to_identity(layers: list[LoraLayer]) -> None:
    """Make adapters act as nothing: A random, B zero."""
    for layer in layers:
        layer.reset_lora_parameters(ADAPTER_NAME, init_lora_weights=True)
