"""A small random CLIP, models of every stage on it, and drawn pictures. No test may leave this machine."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import ipaddress
import json
import socket
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from modeling_tscir import Gallery, TSCIRModel, TSCIRProcessor


ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "train"), str(ROOT / "eval"), str(ROOT / "eval/speed")]
import harness  # noqa: E402  (found on the path just set)


DATA_DIR = Path(os.environ.get("TSCIR_DATA_DIR", "no such folder"))
WORDS = ["red", "that", "red that", "a", "b red", "that c"]
TEXTS = ["red", "that is * red"]
PICTURES = ["0.png", "2.png", "4.png", "below/1.png", "below/3.png", "below/5.png"]  # of the folder, in order
needs_data = pytest.mark.skipif(not DATA_DIR.is_dir(), reason="TSCIR_DATA_DIR does not name the folder of real data")


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch):
    """The suite proves that it needs no Hub: a connection to any other machine fails the test."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not ipaddress.ip_address(address[0]).is_loopback:
            raise AssertionError(f"connection to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def threads_as_before():
    """Trials take one thread, and the next test's tensors would differ in their last bits from a fresh process's."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def clip_dir(tmp_path_factory) -> Path:
    """A random CLIP of 32-pixel pictures, whose tokenizer knows single bytes and two words."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(33, 127)] + ["Ã", "©"]
    pieces = [*letters, *(c + "</w>" for c in letters), "re", "red</w>", "th", "tha", "that</w>"]
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    merges = [("r", "e"), ("re", "d</w>"), ("t", "h"), ("th", "a"), ("tha", "t</w>")]
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    end = len(vocab) - 1
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"hidden_size": 40, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": len(vocab), "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    config = CLIPConfig(
        text_config=text | ids, vision_config=vision | {"image_size": 32, "patch_size": 8}, projection_dim=24
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    with torch.no_grad():  # make position and content matter more than at initialisation
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def clip(clip_dir) -> CLIPModel:
    return CLIPModel.from_pretrained(clip_dir).eval()


@pytest.fixture
def processor(clip_dir) -> TSCIRProcessor:
    return TSCIRProcessor.from_clip_pretrained(clip_dir, num_pseudo_words=2)


def randomised(parameters, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def stage0(clip_dir) -> TSCIRModel:
    torch.manual_seed(0)  # what is added to it begins alike, whichever tests ran before
    return TSCIRModel.from_clip_pretrained(clip_dir, num_pseudo_words=2, lora_rank=4, lora_alpha=4)


@pytest.fixture
def stage1(stage0) -> TSCIRModel:
    """Stage I with a mapper as if trained."""
    stage0.add_mapper()
    randomised(stage0.mapper.parameters(), 1)
    return stage0.eval()


@pytest.fixture
def stage2(stage1) -> TSCIRModel:
    """Stage II with adapters as if trained."""
    stage1.add_adapters()
    randomised(stage1.trainable_parameters().values(), 2)
    return stage1.eval()


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(6)]


@pytest.fixture
def composed(processor, pictures):
    """Two queries, ready for `get_composed_features`."""
    return processor(images=pictures[:2], text=TEXTS)


@pytest.fixture
def picture_folder(pictures, tmp_path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for i, picture in enumerate(pictures):
        picture.save(folder / ("below" if i % 2 else "") / f"{i}.png")
    return folder


@pytest.fixture
def make_gallery(stage2, processor, picture_folder, tmp_path):
    """A gallery of the picture folder, or of another."""

    def make(images=picture_folder, folder=tmp_path / "gallery", **options):
        return Gallery.from_folder(images, folder, stage2, processor, progress=False, **options)

    return make


@pytest.fixture
def model_dir(stage2, processor, tmp_path) -> Path:
    """A stage II folder."""
    stage2.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8))


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")


@pytest.fixture
def run_script(monkeypatch, tmp_path):
    """Run an evaluation script's main with flags; gives what it left in results.json, and its rankings."""

    def run(benchmark, *flags, output="out"):
        folder = tmp_path / output
        common = ["--output_dir", folder, "--cache_dir", tmp_path / "cache"]
        monkeypatch.setattr(sys, "argv", [f"{benchmark.name}.py", *map(str, [*flags, *common])])
        harness.main(benchmark)
        return json.loads((folder / "results.json").read_text("utf-8")), pd.read_parquet(folder / "rankings.parquet")

    return run


def slow_rank(scores, truth, others):
    """A truth's rank, by counting: it stands behind everything that scores the same."""
    return 1 + sum(scores[i] >= scores[truth] for i in others if i != truth)


@pytest.fixture
def tensors_of():
    """A copy of every tensor of a model."""
    return lambda model: {k: v.clone() for k, v in model.state_dict().items()}


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Training data: captions and triplets, 24 rows each; every four triplets share a reference."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    (root / "files").mkdir()
    files = []
    for i in range(30):
        files.append(str(root / "files" / f"{i}.png"))
        Image.fromarray(rng.integers(0, 256, (36, 36, 3), dtype=np.uint8)).save(files[-1])
    texts = [WORDS[i % 6] for i in range(24)]
    captions = {"image": files[:24], "caption": texts}
    triplets = {"reference": [files[24 + i // 4] for i in range(24)], "modification": texts, "target": files[:24]}
    for name, columns in (("captions", captions), ("triplets", triplets)):
        features = {k: Value("string") if k in ("caption", "modification") else ImageFeature() for k in columns}
        rows = Dataset.from_dict(columns, features=Features(features))
        rows.to_parquet(root / name / "train.parquet")
    return root


@pytest.fixture
def launch(monkeypatch, data):
    """Run a stage's script in this process."""

    def run(script, model, output, *flags):
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        name = {"stage1": "captions", "stage2": "triplets"}[script.__name__]
        command = ["--model_name_or_path", model, "--dataset_name", data / name, "--output_dir", output]
        command += ["--per_device_train_batch_size", 8, "--logging_steps", 1, *flags]
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, command)])
        script.main()
        return load_file(Path(output) / "tscir_delta.safetensors")

    return run


@pytest.fixture
def stage1_folder(stage1, processor, tmp_path):
    stage1.save_pretrained(tmp_path / "given", backbone="reference")
    processor.save_pretrained(tmp_path / "given")
    return tmp_path / "given"


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
