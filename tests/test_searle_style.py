import pytest
import searle_style
import torch
from lincir_style import masked
from searle_style import DistillationObjective, InvertedImages, SearleArguments, invert, read

from modeling_tscir import TSCIRModel, TSCIRProcessor
from modeling_tscir.embedding import embed_images, embed_texts


@pytest.fixture
def bare(clip_dir):
    return TSCIRProcessor.from_clip_pretrained(clip_dir, num_pseudo_words=2, prompt_template="{image} {text}")


def test_inversion_makes_sentences_read_as_pictures_and_captions(stage0, bare, pictures):
    captions = ["a red b", "that", "red that c", "b", "a", "of the red"]
    args = SearleArguments(num_pseudo_words=2, inversion_steps=60)
    targets = embed_images(stage0, bare, pictures), embed_texts(stage0, bare, captions)
    before = {name: p.clone() for name, p in stage0.named_parameters()}

    @torch.no_grad()
    def similarities(words: torch.Tensor) -> list[float]:
        prompts = [["a photo of", None] for _ in captions], [masked(caption, 9) for caption in captions]
        made = [read(stage0, bare.compose_contents(prompt), words) for prompt in prompts]
        return [float((m * t).sum(-1).mean()) for m, t in zip(made, targets, strict=True)]

    few = invert(stage0, bare, targets[0], captions, SearleArguments(num_pseudo_words=2, inversion_steps=1))
    words = invert(stage0, bare, targets[0], captions, args, batch_size=4)
    assert words.shape == (6, 2, 32)
    assert all(after > first + 0.05 for first, after in zip(similarities(few), similarities(words), strict=True))
    assert all(torch.equal(before[name], p) for name, p in stage0.named_parameters())
    # Each picture's words are its own, whatever batch it is in.
    assert torch.allclose(words[:4], invert(stage0, bare, targets[0], captions, args)[:4], atol=1e-3)


def test_distillation_is_least_where_the_words_are_met(stage1):
    words = torch.randn(5, 2, 32)
    objective = DistillationObjective(stage1, 4.0)
    batch = InvertedImages(torch.randn(5, 24), words).__getitems__(list(range(5)))
    met = objective.loss(words.flatten(1), batch)
    assert met["similarity"] == pytest.approx(1) and met["length_loss"] == pytest.approx(0, abs=1e-5)
    for other in (2 * words, words.flip(0)):
        assert objective.loss(other.flatten(1), batch)["loss"] > met["loss"]


def test_it_trains_a_mapper_that_answers(data, clip_dir, tmp_path, processor, pictures, monkeypatch):
    flags = {"model_name_or_path": clip_dir, "dataset_name": data / "captions",
             "output_dir": tmp_path / "out", "per_device_train_batch_size": 3, "max_steps": 3, "num_pseudo_words": 2,
             "inversion_steps": 2, "inverted_images": 6}  # fmt: skip
    command = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    monkeypatch.setattr("sys.argv", ["searle_style.py", *command])
    searle_style.main()
    model = TSCIRModel.from_pretrained(tmp_path / "out")
    assert model.config.stage == 1 and model.config.num_injection_blocks == 0
    query = TSCIRProcessor.from_pretrained(tmp_path / "out")(images=pictures[:2], text=["red", ""])
    assert model.get_composed_features(**query).isfinite().all()
    with pytest.raises(SystemExit):
        monkeypatch.setattr("sys.argv", ["searle_style.py", *command, "--inversion_steps", "0"])
        searle_style.main()
