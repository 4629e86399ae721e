"""Every call in README, model card, docs and docstrings is executed, in a folder where what they name lies."""

import doctest
import importlib
import pkgutil
import re
import runpy
import shlex
import shutil

import benchmark_arguments
import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import ROOT
from PIL import Image
from test_cirr import folder as cirr_folder  # noqa: F401  (a fixture)

import modeling_tscir
from modeling_tscir import ComposedImageRetrievalPipeline, TSCIRModel, TSCIRProcessor, cli
from modeling_tscir.model_card import usage


PAGES = (
    "README.md",
    "model_card.md",
    "docs/benchmarks.md",
    "docs/galleries.md",
    "docs/publishing.md",
    "docs/training.md",
)
BLOCKS = [
    (page, number, block)
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL))
]
DOCSTRINGS = [
    test
    for module in pkgutil.iter_modules(modeling_tscir.__path__)
    for test in doctest.DocTestFinder().find(importlib.import_module(f"modeling_tscir.{module.name}"))
    if test.examples
]


@pytest.fixture
def place(tmp_path, monkeypatch, model_dir, clip_dir, stage2):
    """A working directory with every file and folder that the documents name."""
    place = tmp_path / "place"
    for name in ("path/to/folder", "path/to/this/folder", "runs/stage2"):
        shutil.copytree(model_dir, place / name)
    for name in ("openai/clip-vit-large-patch14", "openai/clip-vit-base-patch32"):
        shutil.copytree(clip_dir, place / name)
    stage2.save_adapter(place / "user/fashion-adapter")
    rng = np.random.default_rng(0)
    pictures = [f"runs/miniature/world/test/CIRR/dev/dev-0-{i}-img0.png" for i in range(6)]
    pictures += [f"{folder}/{i}.jpg" for folder in ("path/to/pictures", "photos", "PHOTOS") for i in range(6)]
    for name in (*pictures, "query.png", "red_dress.jpg", "dress.jpg"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(place / name)
    rows = {
        "file_name": [f"{i}.jpg" for i in range(6)],
        "category": ["dress"] * 6,
        "price": [10 * i for i in range(6)],
    }
    for folder in ("photos", "PHOTOS"):
        pd.DataFrame(rows).to_csv(place / folder / "metadata.csv", index=False)
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def names(place) -> dict:
    """What a block may use that another before it has made."""
    model, processor = TSCIRModel.from_pretrained("runs/stage2"), TSCIRProcessor.from_pretrained("runs/stage2")
    cir = ComposedImageRetrievalPipeline(model=model, processor=processor).index("photos")
    query_embeds = torch.nn.functional.normalize(torch.randn(1, model.config.clip_config.projection_dim), dim=-1)
    return {"model": model, "processor": processor, "cir": cir, "query_embeds": query_embeds}


@pytest.mark.parametrize(("page", "number", "block"), BLOCKS, ids=[f"{page}-{number}" for page, number, _ in BLOCKS])
def test_a_block(page, number, block, names, capsys):
    exec(compile(block, page, "exec"), names)
    if page == "README.md" and number == 0:
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 5 and lines[0].endswith("(64, 64)")
    assert names["cir"]([{"text": "red"}], top_k=1) if names["cir"].gallery_ids else True


def test_docstrings_are_found():
    assert {test.name.rsplit(".", 1)[-1] for test in DOCSTRINGS} >= {"Gallery", "ComposedImageRetrievalPipeline"}


@pytest.mark.parametrize("test", DOCSTRINGS, ids=[test.name for test in DOCSTRINGS])
def test_a_docstring(test, names):
    """Skipped by doctest itself, which would compare what random weights find."""
    for example in test.examples:
        exec(compile(example.source, test.name, "single"), names)


def test_the_readmes_command_lines(place, capsys):
    """`tscir serve` of the same gallery is tested in a browser, training's lines with the recipes."""
    text = (ROOT / "README.md").read_text("utf-8")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    tscir ")]
    assert len(lines) == 3
    for line in lines:
        arguments = shlex.split(line)[1:]
        if arguments[0] != "serve":
            assert cli.main(arguments) == 0, capsys.readouterr().err
    assert (place / "results.png").is_file()


def command_lines(page: str, start: str) -> list[list[str]]:
    text = (ROOT / page).read_text("utf-8").replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith(f"    {start}")]


def test_the_readmes_way_from_training_to_publishing(place, data, cirr_folder, monkeypatch):  # noqa: F811
    """Its commands one after the other, on little data and for one step; run_all.py has tests of its own."""
    shutil.copytree(data / "captions", "CAPTIONS")
    shutil.copytree(data / "triplets", "TRIPLETS")
    shutil.copytree(cirr_folder, "CIRR")
    shutil.rmtree("runs/stage2")
    few = ["--max_steps", "1", "--per_device_train_batch_size", "8"]
    trained = command_lines("README.md", "accelerate launch train/")
    evaluated = command_lines("README.md", "python eval/cirr.py")
    published = command_lines("docs/publishing.md", "python train/publish.py")
    assert [len(trained), len(evaluated), len(published)] == [2, 1, 2]
    assert command_lines("README.md", "python train/publish.py") == published[1:]
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    monkeypatch.setattr(benchmark_arguments, "DEFAULT_CACHE", place / "cache")
    for command, more in (
        (trained[0][2:], few),
        (trained[1][2:], few),
        (evaluated[0][1:], []),
        (published[0][1:], []),
    ):
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        monkeypatch.setattr("sys.argv", command + more)
        try:
            runpy.run_path(str(ROOT / command[0]), run_name="__main__")
        except SystemExit as stop:
            assert not stop.code
    card = (place / "published/README.md").read_text("utf-8")
    assert "| cirr | val | 3 | recall_at_1 |" in card and "Stage I: dataset_name CAPTIONS" in card
    assert (place / "published/tscir_delta.safetensors").is_file() or (place / "published/model.safetensors").is_file()


def test_the_calls_of_a_published_card(place, names, capsys):
    """With the package, and from the command line; those without it come back from a Hub in another test."""
    text = usage("runs/stage2")
    first, second = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(first, "card", "exec"), names)
    assert len(names["results"]) == 5 and "trust_remote_code=True" in second
    for line in re.search(r"```sh\n(.*?)```", text, re.DOTALL).group(1).splitlines():
        assert cli.main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
