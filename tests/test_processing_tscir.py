import json
import logging

import pytest
import torch
from conftest import DATA_DIR, needs_data
from PIL import Image
from real_input import real_tokenizer
from transformers import CLIPImageProcessorPil
from transformers.utils import logging as transformers_logging

from modeling_tscir import TSCIRProcessor, processing_tscir


def test_a_picture_that_is_given_twice_is_decoded_once(processor, pictures, tmp_path, monkeypatch):
    """As two threads must not load one file."""
    pictures[0].resize((900, 900)).save(tmp_path / "a.png")
    loaded, load = [], processing_tscir.load_named
    monkeypatch.setattr(processing_tscir, "load_named", lambda image: loaded.append(image) or load(image))
    with Image.open(tmp_path / "a.png") as lazy:
        pixels = processor.pixel_values([lazy, pictures[1], lazy, lazy])
    assert len(loaded) == 2 and torch.equal(pixels[0], pixels[2]) and torch.equal(pixels[2], pixels[3])
    assert torch.equal(pixels[1:2], processor.pixel_values(pictures[1:2])) and not torch.equal(pixels[0], pixels[1])


def test_shapes_and_padding_to_the_longest(processor, pictures):
    inputs = processor(images=pictures[:2], text=["red", "that that red"])
    assert inputs["pixel_values"].shape == (2, 3, 32, 32)
    prompts = [len(processor.tokenizer(t).input_ids) for t in ("red", "that that red")]
    assert inputs["input_ids"].shape == (2, max(prompts) + 2)  # two pseudo-words
    assert inputs["attention_mask"].sum(1).tolist() == [n + 2 for n in prompts]
    assert inputs["pseudo_mask"].dtype == torch.bool
    assert inputs["pseudo_mask"].sum(1).tolist() == [2, 2]


def words_of(processor: TSCIRProcessor, text: str) -> tuple[list[int], list[int]]:
    """Ids of a prompt but for its pseudo-words, and the places of these."""
    batch = processor.compose([text])
    mask = batch["pseudo_mask"][0]
    return batch["input_ids"][0][~mask].tolist(), mask.nonzero().flatten().tolist()


def test_a_prompt_is_what_the_tokenizer_makes_of_its_parts(processor, clip_dir):
    tokens = processor.tokenizer
    assert words_of(processor, "red") == (tokens("red").input_ids, [1, 2])
    assert words_of(processor, "") == (tokens("").input_ids, [1, 2])
    words = {"image_template": "a photo of {image}", "prompt_template": "a photo of {image} that {text}"}
    processor = TSCIRProcessor.from_clip_pretrained(clip_dir, 2, **words)
    first = len(tokens("a photo of").input_ids) - 1
    assert words_of(processor, "red") == (tokens("a photo of that red").input_ids, [first, first + 1])
    assert words_of(processor, "") == (tokens("a photo of").input_ids, [first, first + 1])


def test_plain_texts_are_tokenized_as_clip_does(processor):
    texts = ["red", "a photo of that", "  Red,  é!"]
    assert torch.equal(
        processor(text=texts)["input_ids"], processor.tokenizer(texts, padding=True, return_tensors="pt").input_ids
    )


@pytest.mark.parametrize("text", ["*", "$", "{image}", "{text}", "S*", "<|startoftext|>", "<|endoftext|>", "[$]"])
def test_no_text_can_forge_a_placeholder_or_an_end(processor, stage2, pictures, text):
    forged, honest = processor.compose([f"{text} red"]), processor.compose(["red"])
    assert torch.equal(forged["pseudo_mask"][0].nonzero(), honest["pseudo_mask"][0].nonzero())
    ids = forged["input_ids"][0][~forged["pseudo_mask"][0]]
    assert (ids == processor.tokenizer.eos_token_id).nonzero().flatten().tolist() == [len(ids) - 1]
    assert (ids == processor.tokenizer.bos_token_id).nonzero().flatten().tolist() == [0]
    assert len(processor(text=text)["input_ids"][0]) > 2
    with torch.no_grad():
        features = stage2.get_composed_features(**processor(images=pictures[:2], text=[f"{text} red", "red"]))
    assert not torch.allclose(features[0], features[1])


def test_an_empty_text_is_the_image_alone(processor):
    batch = processor.compose(["", "   "])
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])


def test_a_long_text_is_cut_at_its_own_end_with_one_warning(processor, caplog):
    logger = transformers_logging.get_logger("modeling_tscir.processing_tscir")
    logger.warning_once.cache_clear()
    logger.propagate = True
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            batch = processor.compose(["red " * 300, "red"])
            plain = processor(text="red " * 300)
    assert [r for r in caplog.records if "cut" in r.message and r.name.endswith("processing_tscir")][1:] == []
    assert "cut to 77 tokens" in caplog.text
    assert batch["input_ids"].shape == (2, 77)
    assert batch["pseudo_mask"][0].sum() == 2
    assert batch["input_ids"][0, -1] == processor.tokenizer.eos_token_id
    assert plain["input_ids"].shape == (1, 77)
    assert plain["input_ids"][0, -1] == processor.tokenizer.eos_token_id


def test_text_after_the_modification_is_never_cut(clip_dir):
    processor = TSCIRProcessor.from_clip_pretrained(clip_dir, prompt_template="{image} {text} , that")
    ids = processor.compose(["red " * 300])["input_ids"][0].tolist()
    assert ids[-3:-1] == processor.tokenizer(", that", add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    "template", ["a photo", "{text}", "{image} {image} {text}", "{text} of {image}", "{image} {text} {text}"]
)
def test_templates_without_their_places_are_refused(clip_dir, template):
    with pytest.raises(ValueError, match="template|before"):
        TSCIRProcessor.from_clip_pretrained(clip_dir, prompt_template=template)


def test_numbers_that_differ_are_named(processor, pictures):
    with pytest.raises(ValueError, match="2 images and 1 texts"):
        processor(images=pictures[:2], text=["red"])
    with pytest.raises(ValueError, match="give images"):
        processor()


def test_round_trip(processor, tmp_path, clip_dir):
    processor.prompt_template = "{image} , {text}"
    processor.save_pretrained(tmp_path)
    loaded = TSCIRProcessor.from_pretrained(tmp_path)
    assert (loaded.num_pseudo_words, loaded.prompt_template) == (2, "{image} , {text}")
    assert torch.equal(loaded.compose(["red"])["input_ids"], processor.compose(["red"])["input_ids"])


@pytest.fixture(scope="module")
def real_processor():
    """CLIP's own vocabulary and merges, built from the published file."""
    return TSCIRProcessor(
        CLIPImageProcessorPil(), real_tokenizer(DATA_DIR / "clip_bpe/bpe_simple_vocab_16e6.txt.gz"), 1
    )


@needs_data
def test_real_vocabulary_gives_openai_ids(real_processor):
    tokenizer = real_processor.tokenizer
    assert len(tokenizer) == 49408
    # Ids that OpenAI's own tokenizer gives "a photo of a cat".
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert words_of(real_processor, "is red * $") == (tokenizer("is red * $").input_ids, [1])


@needs_data
def test_every_real_caption_fits_or_is_cut(real_processor):
    captions = [r["caption"] for r in json.loads((DATA_DIR / "cirr/captions/cap.rc2.test1.json").read_text("utf-8"))]
    captions += [r["caption"] for r in json.loads((DATA_DIR / "cirr/captions/cap.rc2.val.json").read_text("utf-8"))]
    end = real_processor.tokenizer.eos_token_id
    for start in range(0, len(captions), 256):
        batch = real_processor.compose(captions[start : start + 256])
        assert batch["input_ids"].shape[1] <= 77
        assert (batch["pseudo_mask"].sum(1) == 1).all()
        assert ((batch["input_ids"] == end) & (batch["attention_mask"] == 1)).sum(1).eq(1).all()


def test_half_a_surrogate_is_a_question_mark(processor):
    """As JSON has it where a text was cut within an emoji."""
    cut, plain = processor.compose(["red \ud83d", "red"]), processor.compose(["red ?", "red"])
    assert torch.equal(cut["input_ids"], plain["input_ids"])


def test_a_prompt_that_leaves_no_room_is_refused(clip_dir):
    long = "a " * 90 + "{image} {text}"
    processor = TSCIRProcessor.from_clip_pretrained(clip_dir, prompt_template=long)
    with pytest.raises(ValueError, match="with its pseudo-words is 9. tokens long, and the text encoder reads 77"):
        processor.compose(["red"])


def test_a_line_of_a_picture_is_one_square(processor):
    line = Image.new("RGB", (30_000, 1), (255, 0, 0))
    assert processor.pixel_values([line]).shape == processor.pixel_values([Image.new("RGB", (9, 9))]).shape


def test_a_clip_without_its_tokenizer_is_refused(clip_dir, tmp_path):
    """transformers makes one without a word, by which all texts are the same."""
    for path in clip_dir.iterdir():
        if "tokenizer" not in path.name:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(ValueError, match=r"holds no tokenizer: its texts would have no words.*tokenizer\.json"):
        TSCIRProcessor.from_clip_pretrained(tmp_path)
