"""The built wheel, in an environment that has nothing else of the project."""

import os
import shutil
import subprocess
import sys
import zipfile

from conftest import ROOT


SCRIPT = """
import sys
import modeling_tscir
assert modeling_tscir.__file__.startswith(sys.argv[1]), modeling_tscir.__file__
from PIL import Image
from transformers import pipeline

cir = pipeline("composed-image-retrieval")
cir.index([Image.new("RGB", (64, 64), c) for c in ("red", "blue", "green")])
assert len(cir(image=Image.new("RGB", (64, 64), "red"), text="make it blue", top_k=3)) == 3
for name in ("train", "eval", "miniature", "tests"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit(f"the wheel installs a package called {name}")
"""


def test_an_installed_wheel_answers_a_first_query(tmp_path):
    # From a copy, as setuptools would also pack what an earlier build left in build/.
    shutil.copytree(ROOT / "modeling_tscir", tmp_path / "source" / "modeling_tscir")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist")]
    subprocess.run([*build, str(tmp_path / "source")], check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"modeling_tscir"}
    assert not [
        name for name in names if name.startswith("modeling_tscir/miniature_checkpoint") and name.endswith(".py")
    ]
    # Another environment: the wheel alone, with the libraries of this one on the path behind it.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    libraries = [p for p in sys.path if p.endswith("site-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries), "utf-8")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    run = subprocess.run(
        [str(tmp_path / "venv/bin/python"), "-c", SCRIPT, str(site)],
        cwd=tmp_path,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "drawn pictures only" in run.stderr
