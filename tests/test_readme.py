import re

import numpy as np
from conftest import ROOT
from PIL import Image


def test_the_readmes_ten_lines_run(tmp_path, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text("utf-8")
    code = re.search(r"## In ten lines\n\n```python\n(.*?)```", text, re.DOTALL).group(1)
    folder = tmp_path / "runs/miniature/world/test/CIRR/dev"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"dev-0-{i}-img0.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[0].endswith("(64, 64)")
