import lincir_style
import pytest
import searle_style
import torch
from lincir_style import Captions, LincirObjective, masked, most_runs

from modeling_tscir import TSCIRModel, TSCIRProcessor


@pytest.mark.parametrize(
    ("caption", "content"),
    [
        ("a small red star and a blue ring", ["a", None, " and a", None]),
        ("red star", [None]),
        ("The dog, in the park.", ["The", None, ", in the", None, "."]),
        ("stripes, dots", [None, ", ", None]),
        ("of the", [None, "of the"]),
        ("", [None]),
    ],
)
def test_content_words_become_places(caption, content):
    assert masked(caption, 99) == content


def test_a_caption_of_more_places_than_the_tower_reads_keeps_its_later_words(bare):
    assert (
        most_runs(bare) == 37 and masked("red and " * 9, 2) == [None, " and", None, " and" + " red and" * 7, " "][:4]
    )
    batch = bare.compose_contents([masked("red and " * 50, most_runs(bare))])
    assert batch["pseudo_mask"].sum() == 74 and batch["input_ids"].shape[1] <= 77


@pytest.fixture
def bare(clip_dir):
    return TSCIRProcessor.from_clip_pretrained(clip_dir, num_pseudo_words=2, prompt_template="{image} {text}")


@torch.no_grad()
def test_every_place_of_a_caption_holds_its_own_pseudo_words(stage1, clip_dir, bare):
    model = TSCIRModel.from_clip_pretrained(clip_dir, num_pseudo_words=2, num_injection_blocks=0)
    model.add_mapper()
    model.eval()
    captions = ["a red b and c", "d", "the that of e in f g"]
    data = Captions(captions, model, bare)
    objective = LincirObjective(model, noise_scale=0.0)
    batch = data.__getitems__([0, 1, 2])
    together = objective(objective.frozen(batch))
    for row in range(3):
        alone = data.__getitems__([row])
        assert torch.allclose(objective(alone)[0], together[row], atol=1e-6)
        words = model.get_pseudo_words(alone["caption_embeds"])[0]
        table = model.clip.text_model.embeddings.token_embedding(alone["input_ids"])
        places = alone["pseudo_mask"][0].nonzero().flatten().tolist()
        assert len(places) == 2 * data.contents[row].count(None)
        for place, word in zip(places, [*words] * (len(places) // 2), strict=True):
            table[0, place] = word
        hidden = model.clip.text_model.embeddings(inputs_embeds=table)
        causal = torch.full((hidden.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        hidden = model.clip.text_model.encoder(inputs_embeds=hidden, attention_mask=causal).last_hidden_state
        pooled = model.clip.text_model.final_layer_norm(hidden)[0, -1]
        expected = torch.nn.functional.normalize(model.clip.text_projection(pooled), dim=-1)
        assert torch.allclose(together[row], expected, atol=1e-5)
    terms = objective.loss(together, batch)
    assert terms["loss"] == pytest.approx(((together - batch["caption_embeds"]) ** 2).sum(-1).mean().item(), abs=1e-5)


def test_noise_moves_what_is_mapped(stage1, clip_dir, bare):
    model = TSCIRModel.from_clip_pretrained(clip_dir, num_pseudo_words=2, num_injection_blocks=0)
    model.add_mapper()
    model.eval()
    batch = Captions(["a red b"], model, bare).__getitems__([0])
    noisy = LincirObjective(model, noise_scale=3.0)
    assert not torch.equal(noisy(batch), noisy(batch))


def test_it_trains_a_mapper_that_answers(launch_lincir, tmp_path, processor, pictures):
    folder = launch_lincir("--max_steps", 3, "--num_pseudo_words", 2)
    model = TSCIRModel.from_pretrained(folder)
    assert model.config.stage == 1 and model.config.num_injection_blocks == 0
    assert model.config.residual == model.config.composed_weight == 0  # queries as published
    query = TSCIRProcessor.from_pretrained(folder)(images=pictures[:2], text=["red", ""])
    assert model.get_composed_features(**query).isfinite().all()


@pytest.fixture
def launch_lincir(monkeypatch, data, clip_dir, tmp_path):
    def run(*flags):
        command = [
            "--model_name_or_path",
            clip_dir,
            "--dataset_name",
            data / "captions",
            "--output_dir",
            tmp_path / "out",
        ]
        command += ["--per_device_train_batch_size", 8, *flags]
        monkeypatch.setattr("sys.argv", ["lincir_style.py", *map(str, command)])
        lincir_style.main()
        return tmp_path / "out"

    return run


@pytest.mark.parametrize("script", [lincir_style, searle_style])
def test_rows_for_a_validation_that_there_is_not_are_refused(script, clip_dir, tmp_path, monkeypatch):
    flags = ["--model_name_or_path", clip_dir, "--dataset_name", tmp_path, "--output_dir", tmp_path / "out"]
    monkeypatch.setattr("sys.argv", ["script", *map(str, flags), "--validation_rows", "5"])
    with pytest.raises(ValueError, match="--validation_rows"):
        script.main()
