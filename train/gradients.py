"""Losses over the batch of all processes, and their gradients within a bound of memory."""

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import nn

from modeling_tscir import TSCIRModel


class Objective(nn.Module):
    """What a stage trains, in three parts, so that a batch can be larger than what memory holds at once.

    `target` and `reference` name those of its features that are the wanted pictures and the queries' own.
    """

    target: str
    reference: str

    def __init__(self, model: TSCIRModel):
        super().__init__()
        self.model, self.logit_scale = model, model.logit_scale

    @property
    def device(self) -> torch.device:
        return self.model.device

    def frozen(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Features of a batch that no gradient reaches, each [B, ...], where they were not computed before."""
        raise NotImplementedError

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """The trained part: sentence embeddings [B, D], each row by itself."""
        raise NotImplementedError

    def loss(self, queries: torch.Tensor, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Scalars by name, "loss" among them, of this process's rows beside those of all others."""
        raise NotImplementedError


class Gather(torch.autograd.Function):
    """Rows of all processes, in the order of ranks; each process gets the sum of all gradients by its own rows."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient)
        return gradient.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def gather_with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """Rows of all processes, in the order of ranks; gradients flow back to the process they came from."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    return Gather.apply(tensor.contiguous())


def backward(
    accelerator: Accelerator, objective: nn.Module, batch: dict[str, torch.Tensor], chunk: int = 0, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Add the gradient of an `Objective`'s loss to its parameters, and give the loss's terms.

    With `chunk` > 0 the activations of that many rows are held at a time: queries are computed without gradients, the
    loss's gradient by them is kept, and each chunk is computed again to pass it on (Gao et al. 2021, GradCache). Loss
    and gradient are those of the whole batch; dropout, keyed by `seed`, falls otherwise than without chunks.

    Args:
        objective: an `Objective`, as prepared by `accelerator`.
        batch: tensors of B rows each.
    """
    inner = accelerator.unwrap_model(objective)
    size = len(next(iter(batch.values())))
    starts = range(0, size, chunk or size)
    with bf16_where_fast(inner.device, asked=accelerator.mixed_precision != "no"):
        parts = [inner.frozen({k: v[start : start + (chunk or size)] for k, v in batch.items()}) for start in starts]
    features = parts[0] if len(parts) == 1 else {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    if len(parts) == 1:
        torch.manual_seed(seed)
        terms = inner.loss(objective(features), features)
        accelerator.backward(terms["loss"])
        return terms
    with torch.no_grad():
        queries = torch.cat([inner(part) for part in _seeded(parts, seed)])
    queries.requires_grad_()
    terms = inner.loss(queries, features)
    gradients = torch.autograd.grad(terms["loss"], queries)[0].split(chunk)
    last = len(parts) - 1
    for number, part in enumerate(_seeded(parts, seed)):
        with contextlib.nullcontext() if number == last else accelerator.no_sync(objective):
            accelerator.backward((objective(part) * gradients[number]).sum())
    return terms


def _seeded(parts: list[dict], seed: int) -> Iterator[dict]:
    """The parts in order, the random state before each depending on `seed` and its place alone."""
    for number, part in enumerate(parts):
        torch.manual_seed(seed + number * 1_000_000_007)
        yield part


def bf16_is_fast(device: torch.device) -> bool:
    """Whether `device` computes faster in bf16 than in fp32, as GPUs since Ampere do, and CPUs that multiply in it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return device.type != "cpu" or any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def bf16_where_fast(device: torch.device, asked: bool = True) -> contextlib.AbstractContextManager:
    """Autocast to bf16, if asked for, where it is faster than fp32."""
    faster = asked and bf16_is_fast(device)
    return torch.autocast(device.type, torch.bfloat16) if faster else contextlib.nullcontext()


def hold_frozen_in_bf16(model: TSCIRModel, accelerator: Accelerator) -> None:
    """For training in bf16: round the towers' frozen matrices for good, as autocast would for every forward pass.

    Values under autocast stay the same to the bit; norms, embeddings and all that is trained stay as they are. From
    then on the model computes under autocast alone. On a CPU the text tower's attention becomes "eager", as the
    backward pass of "sdpa" takes a third of a step there in bf16. Nothing is done in another precision, and on CPUs
    that are slower in bf16.
    """
    if accelerator.mixed_precision != "bf16" or not bf16_is_fast(accelerator.device):
        return
    for name, module in model.clip.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and ".lora_" not in name:  # trained, or another adapter's
            module.to(torch.bfloat16)
    if model.device.type == "cpu":
        model.clip.text_model.set_attn_implementation("eager")


def compile_towers(model: TSCIRModel, backend: str = "inductor") -> None:
    """torch.compile both towers' layers in place: names, weights and checkpoints stay as they are."""
    for tower in (model.clip.vision_model, model.clip.text_model):
        tower.encoder.compile(backend=backend)
    model.run_layers = torch.compile(model.run_layers, backend=backend)


def precision(model: TSCIRModel) -> str:
    """What frozen features are computed in, as things stand: autocast's type, or the model's own."""
    device = model.device.type
    found = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    return str(found) if found == torch.float32 else f"{found}, normalised in fp32"  # which was not so before
