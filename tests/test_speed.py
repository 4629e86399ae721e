"""The benchmark's ways: each runs, and what the peers' way computes is what ours does."""

import json
import sys
from argparse import Namespace

import benchmark
import gallery_building
import gpu
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import ways
from accelerate.state import AcceleratorState, GradientState, PartialState
from clip_shapes import SHAPES, shape
from conftest import ROOT
from peers import Levers, Peer, preprocess, ranked
from setting import Setting, write_inputs
from speed_report import entries, write_report
from works import CURVES, WORKS, with_levers

from modeling_tscir import TSCIRModel, TSCIRProcessor
from modeling_tscir.images import load_image


RESULTS = ROOT / "eval/speed/results.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Inputs of a CLIP of two narrow layers."""
    SHAPES["tiny"] = shape((32, 64, 2, 2), (32, 64, 2, 2), 56, 24, "gelu")
    folder = tmp_path_factory.mktemp("speed")
    write_inputs(folder, ["tiny"], photos=3)
    yield folder
    del SHAPES["tiny"]


EVERY = {**WORKS, **CURVES}


@pytest.mark.parametrize(
    ("work", "way"), [(work, way) for work in EVERY for way in EVERY[work].ways if "compile" not in way]
)
def test_every_way_runs(folder, work, way):
    threads = torch.get_num_threads()
    run = EVERY[work].ways[way](Setting(folder, "tiny", "float32", rows=4, gallery=60))
    run()
    run()
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_accelerator():
    """A process has one precision of training."""

    def forget() -> None:
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()

    forget()
    yield
    forget()


@pytest.mark.parametrize("work", [work for work in WORKS if "step" in work or "gallery" in work])
def test_our_ways_run_in_bf16(folder, work, fresh_accelerator, monkeypatch):
    monkeypatch.setattr("gradients.bf16_is_fast", lambda device: True)
    setting = Setting(folder, "tiny", "bfloat16", rows=4, gallery=60)
    run = WORKS[work].ways["ours"](setting)
    run()
    run()
    if "step" in work:
        clip = run.accelerator.unwrap_model(run.objective).model.clip
        assert clip.vision_model.encoder.layers[0].mlp.fc1.weight.dtype == torch.bfloat16
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in run.trained)
    assert setting.model(0)[0].dtype == torch.bfloat16


def test_texts_are_as_long_as_they_are_said_to_be(folder):
    setting = Setting(folder, "tiny", "float32", rows=4000)
    processor = TSCIRProcessor.from_clip_pretrained(setting.clip)
    lengths = [len(ids) for ids in processor._pieces(setting.texts)]
    assert np.percentile(lengths, [10, 50, 90]).tolist() == [7, 11, 18]


def test_the_peers_features_are_ours(folder):
    setting = Setting(folder, "tiny", "float32", rows=3)
    processor, model = TSCIRProcessor.from_clip_pretrained(setting.clip), TSCIRModel.from_clip_pretrained(setting.clip)
    pixels = torch.stack([preprocess(path) for path in setting.photos])
    assert torch.allclose(pixels, processor.pixel_values([load_image(p) for p in setting.photos]), atol=1e-5)
    ours = F.normalize(model.get_text_features(**processor.tokenize(setting.texts)), dim=-1)
    for levers in (Levers(), Levers(short_texts=True)):
        peer = Peer(setting.clip, levers)
        assert peer.tokens(setting.texts).shape[1] == (
            77 if not levers.short_texts else ours_length(processor, setting)
        )
        assert torch.allclose(peer.texts(setting.texts), ours, atol=1e-5)
        word = peer.clip.text_model.embeddings.token_embedding(peer.tokens(["*"])[:, 1])
        plain = peer.texts([f"a photo of * {text}" for text in setting.texts])
        assert torch.allclose(peer.composed(word.expand(3, -1), setting.texts), plain, atol=1e-5)


def ours_length(processor: TSCIRProcessor, setting: Setting) -> int:
    return processor.tokenize(setting.texts)["input_ids"].shape[1]


def test_every_way_of_ranking_finds_the_same(folder):
    setting = Setting(folder, "tiny", "float32", rows=5, gallery=200)
    ours = ways.our_ranking(setting)()
    for way in with_levers(ways.peers_ranking, a=Levers(partial_sort=True), b=Levers(few_names=True)).values():
        assert way(setting)() == ours
    assert ranked(torch.eye(2), torch.eye(2), np.array(["a", "b"]), 1, Levers()).tolist() == [["a"], ["b"]]
    found = [WORKS["evaluation of CIRCO's size"].ways[way](setting)() for way in ("ours", "peers", "+ partial sort")]
    assert found[0] > 0.2 and found == pytest.approx([found[0]] * 3)


def test_a_way_that_fails_says_why(tmp_path):
    request = {"work": "composed query", "way": "ours", "folder": str(tmp_path), "shape": "ViT-B/32", "calls": 1}
    with pytest.raises(RuntimeError, match="ViT-B-32"):
        benchmark.in_turns({"ours": request | {"dtype": "float32", "sizes": {"rows": 1}}}, 1)


def test_curves_of_another_shape_are_measured_anew(tmp_path, monkeypatch):
    ratio = {"median": 0.5, "low": 0.5, "high": 0.5}
    monkeypatch.setattr(benchmark, "write_inputs", lambda *_, photos: None)
    monkeypatch.setattr(benchmark, "faster_precision", lambda *_: ("bfloat16", ratio))
    for name in ("compare_with_clip", "compare_rankings", "import_times"):
        monkeypatch.setattr(benchmark, name, lambda _: {})
    monkeypatch.setattr(benchmark, "in_turns", lambda requests, _: {
        way: {"seconds": [1.0] * 3, "peak_gib": 1.0} for way in requests})  # fmt: skip
    curves = list(CURVES)[:2]
    for clip, names in (("ViT-B/32", curves), ("ViT-L/14", curves[:1]), ("ViT-L/14", [])):
        args = Namespace(shapes=[clip], works=[], curves=names, rounds=1)
        figures = benchmark.measure(args, tmp_path, tmp_path / "figures.json")
        found = {(point["curve"], point["shape"]) for point in figures["curves"]}
        assert found == {(name, clip) for name in names or curves[:1]}


def test_the_report_holds_what_was_measured(tmp_path):
    ratio = {"median": 2.5, "low": 2.0, "high": 3.0}
    line = {"work": "stage II step", "shape": "ViT-B/32", "rows": 32, "seconds": {"ours": 0.5}, "vs_peers": ratio}
    line |= {"vs_limit": None, "peak_gib": {"ours": 1.0, "peers": 2.0}, "others": {"+ short texts": ratio}}
    figures = {"machine": benchmark.machine(), "dtype": "float32", "bf16_over_fp32": ratio, "rounds": 5}
    figures |= {"works": [line], "curves": [], "imports": {"seconds": {"ours": 1}, "ratio": ratio}}
    figures["imports"]["peak_gib"] = {"ours": 0.4, "limit": 0.3}
    names = ("fp32_difference", "bf16_least_cosine", "least_cosine_pictures", "least_cosine_queries", "same_ten",
             "same_ten_fp16", "same_ten_products", "same_one", "queries", "pictures")  # fmt: skip
    figures["precision"] = dict.fromkeys(names, 0.25)
    points = [
        {"curve": next(iter(CURVES)), "way": "ours", "size": s, "seconds": [1.0] * 3, "peak_gib": 1} for s in (1, 9)
    ]
    points = [point | {"shape": "ViT-L/14"} for point in points]
    write_report(figures | {"curves": points}, tmp_path)
    assert "\nViT-L/14; medians of three." in (tmp_path / "speed.md").read_text("utf-8")
    assert "| 500 ms | 2.50 (2.00 to 3.00) | 15, not reached |" in (tmp_path / "speed.md").read_text("utf-8")
    first, second = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert first["vs_peers"] == 2.5 and first["vs_limit"] is None and first["spread"]["vs_peers"] == [2.0, 3.0]
    assert second["work"] == "import modeling_tscir" and second["vs_limit"] == 2.5
    assert (tmp_path / "growth.png").is_file() and entries(figures)[0]["machine"].endswith("AMX")
    write_report(figures, tmp_path)  # of works alone
    assert "How cost grows" not in (tmp_path / "speed.md").read_text("utf-8")


def test_the_readme_shows_the_stored_figures():
    text = (ROOT / "README.md").read_text("utf-8")
    stored = json.loads(RESULTS.read_text("utf-8"))
    assert {"work", "vs_peers", "vs_limit", "spread", "machine"} <= set(stored[0])
    for entry in stored:
        shown = [
            "" if entry[name] is None else f"{entry[name]:.2f} ({low:.2f} to {high:.2f})"
            for name in ("vs_peers", "vs_limit")
            for low, high in [entry["spread"][name] or (0, 0)]
        ]
        assert f"| {entry['work']} | {' | '.join(shown)} |" in text, entry
        assert entry["machine"] in text


def test_the_gpus_works_run_on_a_cpu_too(folder, fresh_accelerator, monkeypatch):
    """And lines tell of every variant; one that cannot be had says why."""
    monkeypatch.setattr("gpu.ROUNDS", 1)
    monkeypatch.setattr("gpu.compile_towers", lambda model: None)  # which takes its time
    measurement = gpu.Measurement("cpu")
    measurement.steps("stage I step", "tiny", 8, gpu.stage1_step, variants=True, chunk=4)
    measurement.steps("stage II step", "tiny", 4, gpu.stage2_step, variants=False)
    measurement.inference("composed queries", "tiny", 3, gpu.queries)
    measurement.inference("features of pictures", "tiny", 3, gpu.pictures)
    told = {(line["work"], line["variant"]): line for line in measurement.lines}
    first = told["stage I step", "as it is"]
    assert first["rows_per_second"] == 8 / first["seconds"] and first["flops_per_second"] > 0
    assert first["frozen_seconds"] > 0 and {"eager", "torch.compile"} < {variant for _, variant in told}
    assert told["stage II step", "as it is"]["forward_seconds"] > 0
    broken = measurement.add("a work", "tiny", 1, "none such", lambda: 1 / 0, 0.0)
    assert broken["failed"] == "ZeroDivisionError: division by zero"
    silent = measurement.add("a work", "tiny", 1, "silent", lambda: next(iter(())), 0.0)
    assert silent["failed"] == "StopIteration: "
    figures = {"device": "one", "versions": {"torch": "1", "transformers": "2"}, "product": 1e12, "peak": 1e12}
    text = gpu.report(figures | {"lines": measurement.lines})
    assert "| a work | tiny | 1 | none such | failed: ZeroDivisionError: division by zero |" in text


def test_photos_of_any_format_are_indexed_and_changed(tmp_path, monkeypatch, capsys):
    names = ["a.PNG", "b.PNG", "c.PNG"]
    (tmp_path / "photos").mkdir()
    for name in names:
        (tmp_path / "photos" / name).write_text(name, "utf-8")
    told, seen = {"pictures": 3, "first": names}, []
    told |= dict.fromkeys(("seconds", "peak_mib", "before_mib", "search_ms"), 1.0)
    told |= dict.fromkeys(("added", "changed", "unchanged", "removed"), 1)

    def index(folder, gallery):
        seen.append({path.name: path.read_text("utf-8") for path in folder.iterdir()})
        return told

    monkeypatch.setattr(gallery_building, "index", index)
    monkeypatch.setattr(gallery_building, "command", lambda *_: [sys.executable, "-c", ""])
    monkeypatch.setattr("sys.argv", ["gallery_building.py", "--folder", str(tmp_path / "photos")])
    gallery_building.main()
    assert seen[-1] == {"a.PNG": "b.PNG", "b.PNG": "b.PNG"} and len(seen) == 4
    assert "| one file changed, one gone | 1.0 |" in capsys.readouterr().out


def test_what_is_told_of_a_gpu_is_what_was_measured():
    figures = json.loads((ROOT / "eval/speed/gpu.json").read_text("utf-8"))
    assert (ROOT / "eval/speed/gpu.md").read_text("utf-8") == gpu.report(figures)
