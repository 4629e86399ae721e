import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DATA_DIR, needs_data

from eval import cirr
from eval.significance import mean_and_standard_error


@pytest.fixture
def folder(tmp_path, pictures):
    """A split of six pictures and three queries in the official layout."""
    root = tmp_path / "CIRR"
    names = [f"dev-{i}" for i in range(6)]
    (root / "dev").mkdir(parents=True)
    for name, picture in zip(names, pictures, strict=True):
        picture.save(root / "dev" / f"{name}.png")
    queries = [
        {
            "pairid": 10 + i,
            "reference": names[i],
            "target_hard": names[i + 1],
            "target_soft": {},
            "caption": caption,
            "img_set": {"id": i, "members": names, "reference_rank": i, "target_rank": i + 1},
        }
        for i, caption in enumerate(["red", "that", ""])
    ]
    write(root / "cirr/captions/cap.rc2.val.json", queries)
    write(root / "cirr/image_splits/split.rc2.val.json", {n: f"./dev/{n}.png" for n in names})
    return root


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")


def test_layouts_are_found(folder):
    data = cirr.load_cirr(folder)
    assert data.names[data.references[1]] == "dev-1" and data.pair_ids == [10, 11, 12]
    (folder / "cirr").rename(folder / "x")
    (folder / "x" / "captions").rename(folder / "captions")
    (folder / "x" / "image_splits").rename(folder / "image_splits")
    assert cirr.load_cirr(folder) == data
    (folder / "img_raw").mkdir()
    (folder / "dev").rename(folder / "img_raw" / "dev")
    assert cirr.load_cirr(folder).paths[0] == folder / "img_raw/dev/dev-0.png"


def test_what_is_missing_is_named(folder):
    (folder / "dev/dev-3.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 6 pictures.*dev-3\.png"):
        cirr.load_cirr(folder)
    path = folder / "cirr/captions/cap.rc2.val.json"
    records = json.loads(path.read_text("utf-8"))
    for change, message in (
        ({"reference": "dev-99"}, r"cap\.rc2\.val\.json, record 1 names 'dev-99'"),
        ({"caption": None}, r"cap\.rc2\.val\.json, record 1 lacks 'caption'"),
    ):
        broken = [dict(r) for r in records]
        broken[1] = {k: v for k, v in (broken[1] | change).items() if v is not None}
        write(path, broken)
        with pytest.raises(ValueError, match=message):
            cirr.load_cirr(folder)
    path.write_text("{", "utf-8")
    with pytest.raises(ValueError, match="not valid JSON"):
        cirr.load_cirr(folder)
    path.unlink()
    with pytest.raises(ValueError, match="is missing"):
        cirr.load_cirr(folder)


def slow_metrics(queries, gallery, data):
    """One query at a time: walk down the sorted gallery; the target is placed after everything of its score."""
    hits: dict[str, list[bool]] = {}
    for q in range(len(queries)):
        scores = [float(s) for s in gallery @ queries[q]]
        target, reference = data.targets[q], data.references[q]
        for prefix, pool, ks in (
            ("cirr_recall", range(len(scores)), cirr.RECALLS),
            ("cirr_subset_recall", data.members[q], cirr.SUBSET_RECALLS),
        ):
            ranking = sorted((i for i in pool if i != reference), key=lambda i: (-scores[i], i == target))
            for k in ks:
                hits.setdefault(f"{prefix}_at_{k}", []).append(target in ranking[:k])
    return {name: float(np.mean(values)) for name, values in hits.items()}


def test_metrics_equal_a_slow_reference_on_rankings_with_ties():
    rng = np.random.default_rng(0)
    for trial in range(8):
        n, num_queries = 60, 150
        # Small integers: exact scores, and many of them equal.
        gallery = torch.from_numpy(rng.integers(-1, 2, (n, 4))).float()
        queries = torch.from_numpy(rng.integers(-1, 2, (num_queries, 4))).float()
        picks = [rng.permutation(n)[:6].tolist() for _ in range(num_queries)]
        data = cirr.CIRR(
            [str(i) for i in range(n)], [], list(range(num_queries)), [""] * num_queries,
            [p[0] for p in picks], [p[1] for p in picks], [sorted(p) for p in picks],
        )  # fmt: skip
        found = cirr.metrics(*cirr.query_ranks(queries, gallery, data), data)
        assert {k: found[k] for k in slow_metrics(queries, gallery, data)} == slow_metrics(queries, gallery, data), (
            trial
        )
        assert (found["cirr_num_queries"], found["cirr_num_gallery_images"]) == (num_queries, n)


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["cirr.py", *map(str, flags)])
    cirr.main()


@pytest.fixture
def model_dir(stage2, processor, tmp_path):
    stage2.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("method", cirr.METHODS)
def test_every_method_runs(method, monkeypatch, folder, model_dir, tmp_path, capsys):
    flags = ["--model_name_or_path", model_dir, "--data_dir", folder, "--output_dir", tmp_path / "out"]
    run(monkeypatch, *flags, "--method", method)
    results = json.loads((tmp_path / "out/results.json").read_text("utf-8"))
    assert results["cirr_num_queries"] == 3 and results["primary_metric"] in results
    assert 0 <= results["cirr_recall_at_1"] <= results["cirr_recall_at_5"] <= 1
    assert "cirr_subset_recall_at_1" in capsys.readouterr().out


def test_plain_clip_runs_training_free(monkeypatch, folder, clip_dir, tmp_path):
    run(monkeypatch, "--model_name_or_path", clip_dir, "--data_dir", folder, "--output_dir", tmp_path / "out")
    assert (tmp_path / "out/results.json").is_file()


def test_bad_pictures_are_refused_or_skipped_and_reported(monkeypatch, folder, model_dir, tmp_path):
    (folder / "dev/dev-1.png").write_bytes(b"")
    flags = ["--model_name_or_path", model_dir, "--data_dir", folder, "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit, match=r"(?s)1 of 6 pictures.*dev-1: empty"):
        run(monkeypatch, *flags)
    run(monkeypatch, *flags, "--on_bad_image", "skip")
    results = json.loads((tmp_path / "out/results.json").read_text("utf-8"))
    assert results["skipped_images"] == ["dev-1"]
    assert (results["cirr_num_queries"], results["cirr_num_gallery_images"]) == (1, 5)


def test_composed_queries_equal_the_models_own(folder, stage2, processor, pictures):
    data = cirr.load_cirr(folder)
    gallery = F.normalize(torch.randn(6, 24), dim=-1)
    queries = cirr.compose("tscir", stage2, processor, data, gallery, 0.0)
    with torch.no_grad():
        expected = stage2.get_composed_features(**processor(images=pictures[:3], text=data.captions))
    torch.testing.assert_close(queries, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="unknown method"):
        cirr.compose("product", stage2, processor, data, gallery, 0.5)


def test_clustered_standard_errors():
    values = np.array([1.0, 0, 1, 1, 0, 0, 1, 0])
    alone = mean_and_standard_error(values, np.arange(8))
    assert alone == pytest.approx((0.5, np.std(values, ddof=1) / np.sqrt(8)))
    doubled = mean_and_standard_error(np.repeat(values, 2), np.repeat(np.arange(8), 2))
    assert doubled == pytest.approx(alone)  # copies of a query are no new evidence


@needs_data
def test_real_annotations_have_the_published_counts(monkeypatch):
    monkeypatch.setattr(cirr, "find_pictures", lambda data_dir, root, files: list(files.values()))
    data = cirr.load_cirr(DATA_DIR)
    assert (len(data.captions), len(data.names)) == (4181, 2297)
    assert all(len(m) == 6 and r in m for m, r in zip(data.members, data.references, strict=True))
