"""The `evaluate` modules, loaded as a user loads them, in a fresh process without a network."""

import subprocess
import sys

import evaluate
import pytest
from conftest import ROOT


METRICS = ROOT / "eval" / "metrics"


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    return lambda name: evaluate.load(str(METRICS / name), cache_dir=str(tmp_path))


def test_recall(load):
    recall = load("recall_at_k")
    scores, targets = [[0.9, 0.2, 0.4], [0.1, 0.3, 0.3]], [0, 2]
    assert recall.compute(predictions=scores, references=targets, k=[1, 2]) == {"recall_at_1": 0.5, "recall_at_2": 1.0}
    assert recall.compute(predictions=scores, references=targets, k=[1], exclude=[[], [1]]) == {"recall_at_1": 1.0}
    assert recall.compute(predictions=scores, references=targets, k=2) == {"recall_at_2": 1.0}
    with pytest.raises(ValueError, match="query 1: excluded indices"):
        recall.compute(predictions=scores, references=targets, exclude=[[], [7]])
    with pytest.raises(ValueError, match="query 1: 1 scores are NaN"):
        recall.compute(predictions=[[0.1, 0.2], [0.1, float("nan")]], references=[0, 0])


def test_subset_recall(load):
    recall = load("subset_recall_at_k")
    found = recall.compute(predictions=[[0.9, 0.2, 0.4, 0.1, 0.3], [0.1, 0.3, 0.3]], references=[2, 1], k=[1, 2])
    assert found == {"subset_recall_at_1": 0.0, "subset_recall_at_2": 1.0}
    with pytest.raises(ValueError, match=r"query 0: truths \[2\] are not all indices of 2"):
        recall.compute(predictions=[[0.1, 0.2]], references=[2])


def test_mean_average_precision(load):
    precision = load("mean_average_precision_at_k")
    found = precision.compute(predictions=[[0.9, 0.2, 0.4, 0.1]], references=[[0, 1]], k=[2, 5])
    assert found == pytest.approx({"map_at_2": 0.5, "map_at_5": (1 + 2 / 3) / 2})
    with pytest.raises(ValueError, match="query 0: a query needs truths"):
        precision.compute(predictions=[[0.9, 0.2]], references=[[]])


def test_a_fresh_process_elsewhere_loads_them_offline(tmp_path):
    code = f"""
import evaluate
for name in ("recall_at_k", "subset_recall_at_k", "mean_average_precision_at_k"):
    module = evaluate.load({str(METRICS)!r} + "/" + name)
    assert "against" in module.description and "predictions" in module.inputs_description
"""
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, timeout=120)
