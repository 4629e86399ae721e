"""A saved folder, used by those who have no package: fresh process, other directory, offline."""

import json
import os
import subprocess
import sys

import pytest
from transformers import pipeline


SCRIPT = """
import json, sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_tscir":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
try:
    import modeling_tscir
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package is importable")
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

model_dir, pictures = sys.argv[1:]
remote = {"trust_remote_code": True}
model = AutoModel.from_pretrained(model_dir, **remote)
processor = AutoProcessor.from_pretrained(model_dir, **remote)
assert type(model).__name__ == "TSCIRModel" and type(processor).__name__ == "TSCIRProcessor"
rankings = []
query = str(Path(pictures) / "0.png")
for cir in (
    pipeline("composed-image-retrieval", model=model_dir, **remote),
    pipeline(model=model_dir, **remote),
):
    cir.index(pictures)
    rankings.append([[r["id"], r["score"]] for r in cir(image=query, text="that is red")])
features = model.get_composed_features(**processor(images=query, text="that is red"))
saved = Path("saved")
model.save_pretrained(saved)
processor.save_pretrained(saved)
cir = pipeline("composed-image-retrieval", model=str(saved), **remote).index(pictures)
rankings.append([[r["id"], r["score"]] for r in cir(image=query, text="that is red")])
print(json.dumps({"rankings": rankings, "norm": float(features.norm())}))
"""


@pytest.mark.parametrize("form", ["full", "reference"])
def test_a_saved_folder_works_without_the_package(form, stage2, processor, picture_folder, tmp_path):
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    stage2.save_pretrained(folder, backbone=form)
    processor.save_pretrained(folder)
    elsewhere.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(picture_folder)],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    answer = json.loads(run.stdout.splitlines()[-1])
    cir = pipeline("composed-image-retrieval", model=folder).index(picture_folder)  # no trust_remote_code
    expected = cir(image=str(picture_folder / "0.png"), text="that is red")
    for ranking in answer["rankings"]:
        assert [name for name, _ in ranking] == [r["id"] for r in expected]
        assert [score for _, score in ranking] == pytest.approx([r["score"] for r in expected], abs=1e-5)
    assert answer["norm"] == pytest.approx(1, abs=1e-4)
