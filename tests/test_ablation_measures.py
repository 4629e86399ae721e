import io

import ablation_measures
import harness
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from ablation_data import settle_clip
from ablation_grid import MEASURES
from combiner import fit_combiner
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from splits import Split

from modeling_tscir.embedding import embed_images


def test_what_is_told_linearly_is_what_is_there():
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(600, 8, generator=rng)
    labels = np.where(features[:, 0] > 0, "yes", "no")
    told = ablation_measures.read_linearly(features[:400], labels[:400], {"rest": features[400:]})
    assert (told["rest"] == labels[400:]).mean() > 0.9
    shuffled = ablation_measures.read_linearly(features[:400], rng_permuted(labels[:400]), {"rest": features[400:]})
    assert (shuffled["rest"] == labels[400:]).mean() < 0.7


def rng_permuted(labels: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).permutation(labels)


def test_the_combiner_learns_what_a_sum_cannot():
    """A target that lies at the negative of the text."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(600, 12, generator=generator), dim=-1) for _ in range(2))
    targets = F.normalize(images - texts, dim=-1)
    *_, combiner = fit_combiner(images[:500], texts[:500], targets[:500], 20.0, seed=0, epochs=60, batch_size=100)
    with torch.no_grad():
        queries = combiner(images[500:], texts[500:])
    assert torch.allclose(queries.norm(dim=-1), torch.ones(100), atol=1e-5)

    def right(made: torch.Tensor) -> int:
        return int(((made @ targets[500:].T).argmax(1) == torch.arange(100)).sum())

    assert right(queries) > 2 * right(F.normalize(images[500:] + texts[500:], dim=-1))


def test_methods_on_the_plain_clip_make_queries(stage0, processor, pictures, tmp_path):
    files = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, "png")
        files.append({"bytes": buffer.getvalue(), "path": None})
    rows = {"reference": files[:5], "target": files[1:], "modification": ["red", "b", "that c", "a", "red that"]}
    features = Features({n: Value("string") if n == "modification" else ImageFeature() for n in rows})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    split = Split(image_ids=list("abcdef"), sources=pictures, files=[], query_ids=[0, 1], references=[0, 3],
                  texts=[("red",), ("a", "b")], annotation_files=(), truths=[[1], [2]])  # fmt: skip
    embeds = embed_images(stage0, processor, pictures)
    made = {}
    for run in ({"method": "sum", "weight": 0.5}, {"method": "slerp", "weight": 0.5},
                {"method": "combiner", "triplets": str(tmp_path), "seed": 0, "epochs": 2}):  # fmt: skip
        made[run["method"]] = ablation_measures.composer(run, (stage0, processor), tmp_path)(split, embeds)
        assert made[run["method"]].shape == (2, 24)
    expected = F.normalize(embeds[0] + harness.compose("text", stage0, processor, split, embeds)[0], dim=-1)
    assert torch.allclose(made["sum"][0], expected, atol=1e-5) and not torch.allclose(made["combiner"][0], expected)


def test_trained_models_compose_from_stored_patches(stage0, stage2, processor, pictures, tmp_path, monkeypatch):
    """As they compose from the pictures; the second run of a grid asks for no picture again."""
    stage2.save_pretrained(tmp_path / "stage2")
    processor.save_pretrained(tmp_path / "stage2")
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in range(len(pictures))]
    split = Split(image_ids=list("abcdef"), sources=paths, files=[(path,) for path in paths], query_ids=[0, 1, 2],
                  references=[3, 0, 3], texts=[("red",), ("a", "b"), ("c",)], annotation_files=(),
                  truths=[[1], [2], [0]])  # fmt: skip
    embeds = embed_images(stage0, processor, pictures)
    expected = harness.compose("tscir", stage2, processor, split, embeds)
    for _ in range(2):
        queries_of = ablation_measures.composer({"model": tmp_path / "stage2"}, (stage0, processor), tmp_path)
        torch.testing.assert_close(queries_of(split, embeds), expected, atol=1e-6, rtol=0)
        monkeypatch.setattr(ablation_measures, "embed_images_with_patches", None)


@pytest.mark.parametrize(("measure", "metrics"), [("readout", 6), ("forgetting", 3)])
def test_what_is_drawn_is_measured(clip_dir, stage2, processor, tmp_path, monkeypatch, measure, metrics):
    """From pictures to every scene's value of every metric."""
    stage2.save_pretrained(tmp_path / "stage2")
    processor.save_pretrained(tmp_path / "stage2")
    monkeypatch.setattr(ablation_measures, "SCENES", 40)
    settle_clip(tmp_path / "out", tmp_path, clip_dir)
    ablation_measures.readout_scenes.cache_clear()
    try:
        MEASURES[measure].prepare(tmp_path / "out", tmp_path)
        MEASURES[measure].evaluate({"model": str(tmp_path / "stage2")}, tmp_path / "values.parquet", tmp_path / "out")
        if "image" in MEASURES[measure].methods:
            MEASURES[measure].evaluate({"method": "image"}, tmp_path / "image.parquet", tmp_path / "out")
            assert len(pd.read_parquet(tmp_path / "image.parquet")) == 2 * 40 * metrics
    finally:
        ablation_measures.readout_scenes.cache_clear()
    values = pd.read_parquet(tmp_path / "values.parquet")
    counts = values.groupby(["split", "metric"]).size()
    assert len(counts) == 2 * metrics and set(counts) == {40} and set(values["value"]) <= {0.0, 1.0}
    assert set(values["metric"]) == set(MEASURES[measure].shown)
    assert len(pd.read_parquet(tmp_path / "queries.parquet")) == 80
