from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import randomised
from gradients import backward, bf16_is_fast, compile_towers, gather_with_gradient, hold_frozen_in_bf16
from peft import LoraConfig, inject_adapter_in_model
from stage1 import Stage1Objective

from modeling_tscir.adapters import lora_layers


def test_gradients_flow_through_a_gather_of_one_process():
    x = torch.ones(2, 3, requires_grad=True)
    gather_with_gradient(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 3))


@pytest.fixture
def objective(stage1, processor) -> Stage1Objective:
    randomised(stage1.mapper.parameters(), 3)
    stage1.trainable_parameters()
    return Stage1Objective(stage1, processor)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, captions = (F.normalize(torch.randn(10, 24, generator=generator), dim=-1) for _ in range(2))
    patches = torch.randn(10, 16, 40, generator=generator).bfloat16()
    return {"image_embeds": images, "caption_embeds": captions, "patch_states": patches}


def gradients(objective) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    return found


@pytest.mark.parametrize("chunk", [1, 3, 5, 10, 64])
def test_cached_gradients_are_those_of_the_whole_batch(objective, batch, chunk):
    objective.eval()
    plain = objective.loss(objective(batch), batch)
    plain["loss"].backward()
    expected = gradients(objective)
    terms = backward(Accelerator(cpu=True), objective, batch, chunk)
    for name, value in plain.items():
        torch.testing.assert_close(terms[name], value, atol=1e-5, rtol=1e-5)
    found = gradients(objective)
    assert found.keys() == expected.keys() and len(found) > 10
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("asked", ["no", "bf16"])
def test_frozen_features_are_in_the_precision_that_was_asked_for(objective, batch, monkeypatch, asked):
    monkeypatch.setattr("gradients.bf16_is_fast", lambda device: True)
    found, frozen = [], objective.frozen

    def watched(part):
        found.append(torch.is_autocast_enabled("cpu"))
        return frozen(part)

    monkeypatch.setattr(objective, "frozen", watched)
    accelerator = SimpleNamespace(
        mixed_precision=asked, unwrap_model=lambda x: x, autocast=torch.enable_grad, backward=lambda loss: None
    )
    backward(accelerator, objective, batch, 0)
    assert found == [asked == "bf16"]


@pytest.mark.parametrize(
    "able, fast",
    [
        ({"amx_bf16": True, "avx512_bf16": True}, True),
        ({"amx_bf16": False, "avx512_bf16": True}, True),  # AMD EPYC since Zen 4
        ({"amx_bf16": False, "avx512_bf16": False}, False),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_cpus_that_multiply_in_bf16_are_fast_in_it(monkeypatch, able, fast):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: able)
    assert bf16_is_fast(torch.device("cpu")) == fast


@pytest.mark.parametrize("stage", [1, 2])
def test_frozen_matrices_in_bf16_change_no_bit_under_autocast(stage1, processor, batch, monkeypatch, stage):
    monkeypatch.setattr("gradients.bf16_is_fast", lambda device: True)
    if stage == 2:
        stage1.add_adapters()
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["fc1"]), stage1.clip.text_model, "other")
        randomised(stage1.trainable_parameters().values(), 2)
    trained = stage1.trainable_parameters()
    stage1.clip.text_model.set_attn_implementation("eager")  # as it will be
    prompt = processor.compose(["red", "that c", "b red", "", "a", "that", "red", "a", "b red", "c"])
    words = stage1.get_pseudo_words(batch["image_embeds"], batch["patch_states"].float()).detach()

    def run() -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
            seen, patches = stage1.encode_image(pixels)
            read = words if stage == 2 else stage1.get_pseudo_words(seen, patches)[[0, 1] * 5]
            queries = stage1.encode_with_pseudo_words(prompt["input_ids"], prompt["pseudo_mask"], read).float()
        gradients = torch.autograd.grad(queries.sin().sum(), list(trained.values()))
        return seen, patches, queries, *gradients

    before = run()
    hold_frozen_in_bf16(stage1, SimpleNamespace(mixed_precision="bf16", device=stage1.device))
    held = {n for n, p in stage1.named_parameters() if p.dtype == torch.bfloat16}
    assert "clip.vision_model.encoder.layers.0.mlp.fc1.weight" in held
    assert not held & set(trained) and not any(".lora_" in name for name in held)  # another adapter's, which is frozen
    after = run()
    assert len(before) > 20 and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_adapters_are_spared_a_cast_of_their_inputs_that_changes_no_bit(stage1, processor, batch):
    stage1.add_adapters()
    trained = stage1.trainable_parameters()
    randomised(trained.values(), 2)
    prompt = processor.compose(["red", "that c", "b red", "", "a", "that", "red", "a", "b red", "c"])
    words = stage1.get_pseudo_words(batch["image_embeds"], batch["patch_states"].float()).detach()
    layers, taken = lora_layers(stage1.clip.text_model), []
    for layer in layers:
        layer.lora_A["default"].register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0].dtype))

    def run() -> tuple[torch.Tensor, ...]:
        taken.clear()
        with torch.autocast("cpu", torch.bfloat16):
            queries = stage1.encode_with_pseudo_words(prompt["input_ids"], prompt["pseudo_mask"], words).float()
        return queries, *torch.autograd.grad(queries.sin().sum(), list(trained.values()))

    found = run()
    assert len(taken) == len(layers) and torch.bfloat16 in taken
    for layer in layers:
        layer.cast_input_dtype_enabled = True  # as PEFT has it
    expected = run()
    assert set(taken) == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_dropout_is_the_same_in_both_passes_of_cached_gradients(objective, batch):
    objective.train()
    queries = []
    for number, start in enumerate(range(0, 10, 4)):
        torch.manual_seed(7 + number * 1_000_000_007)
        queries.append(objective({k: v[start : start + 4] for k, v in batch.items()}))
    objective.loss(torch.cat(queries), batch)["loss"].backward()
    expected = gradients(objective)
    backward(Accelerator(cpu=True), objective, batch, chunk=4, seed=7)
    for name, gradient in gradients(objective).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


def test_a_chunk_bounds_what_is_held(objective, batch):
    """At no time are activations of more rows than a chunk's kept for the way back."""
    held = []
    forward = objective.forward

    def counted(features):
        held.append((len(features["image_embeds"]), torch.is_grad_enabled()))
        return forward(features)

    objective.forward = counted
    backward(Accelerator(cpu=True), objective, batch, chunk=4)
    assert held == [(4, False), (4, False), (2, False), (4, True), (4, True), (2, True)]


def test_compiled_towers_train_the_same(objective, batch):
    """Texts of several lengths, with and without gradients, and names of weights as before."""
    model, ids = objective.model, torch.tensor([[objective.model.config.text_eos_token_id]])
    pixels, names = torch.rand(2, 3, 16, 16), list(model.state_dict())
    size = model.config.clip_config.vision_config.image_size
    pixels = F.interpolate(pixels, (size, size))

    def computed() -> list[torch.Tensor]:
        texts = [model.get_text_features(ids.expand(3, length)) for length in (2, 5, 9)]
        backward(Accelerator(cpu=True), objective, batch)
        return [*texts, model.get_image_features(pixels), *gradients(objective).values()]

    objective.eval()
    expected = computed()
    compile_towers(model, "aot_eager")  # "inductor" would take most of a minute
    for found, wanted in zip(computed(), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert model.clip.text_model.encoder._compiled_call_impl is not None
    assert model.run_layers is not type(model).run_layers
    assert list(model.state_dict()) == names
    torch.compiler.reset()
