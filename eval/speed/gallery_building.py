"""Indexing a folder: rate and peak memory by the number of pictures, an interruption, and coming back.

    python eval/speed/gallery_building.py --pictures 1000 10000 100000
    python eval/speed/gallery_building.py --folder PHOTOS

Synthetic JPEGs of 64 pixels, or a folder of one's own, with the miniature's model. For each number a fresh gallery;
the largest is then killed halfway (SIGKILL), resumed, indexed again unchanged, and again with one file changed and one
gone. Peak memory is sampled: what the process holds itself, without the pages of mapped files, which the system takes
back when it needs them.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "modeling_tscir" / "miniature_checkpoint"
INDEX = """
import json, sys, threading, time
from pathlib import Path
from modeling_tscir.cli import load_pipeline
from modeling_tscir import Gallery
cir = load_pipeline(sys.argv[1])
def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**10
peak = before = held()
def watch():
    global peak
    while True:
        peak = max(peak, held())
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
gallery = Gallery.open_or_create(sys.argv[3], cir.model, cir.processor)
report = gallery.add(sys.argv[2], cir.model, cir.processor, progress=False, shard_size=int(sys.argv[4]))
seconds = time.perf_counter() - start
start = time.perf_counter()
cir.index(gallery)(text="a red star", top_k=10)
print(json.dumps({"seconds": seconds, "before_mib": before, "peak_mib": peak, "pictures": len(gallery),
                  "added": report.added, "changed": report.changed, "unchanged": report.unchanged,
                  "removed": report.removed, "search_ms": 1000 * (time.perf_counter() - start),
                  "first": gallery.ids[:3]}))
"""


def make_pictures(folder: Path, count: int) -> None:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number // 1000:04d}" / f"{number:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((64, 64)).save(path, quality=80)


def command(folder: Path, gallery: Path, shard_size: int = 2048) -> list[str]:
    return [sys.executable, "-c", INDEX, str(MODEL), str(folder), str(gallery), str(shard_size)]


def index(folder: Path, gallery: Path) -> dict:
    done = subprocess.run(command(folder, gallery), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--folder", type=Path, help="instead of synthetic pictures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root, folders = Path(temporary), []
        for count in [None] if args.folder else sorted(args.pictures):
            folder = root / f"pictures-{count}"
            if count is None:
                shutil.copytree(args.folder, folder)
            else:
                subprocess.run([sys.executable, __file__, "--make", str(folder), str(count)], check=True)
            folders.append(folder)
        print("| pictures | seconds | a second | peak MiB | of it before the first picture | search, ms |")
        print("|---|---|---|---|---|---|")
        for folder in folders:
            run = index(folder, root / f"gallery of {folder.name}")
            cells = [f"{run['pictures']:,}", f"{run['seconds']:.1f}", f"{run['pictures'] / run['seconds']:.0f}"]
            cells += [f"{run['peak_mib']:.0f}", f"{run['before_mib']:.0f}", f"{run['search_ms']:.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
        # Killed when half of the shards are there, of which there are eight at least.
        total, gallery = run["pictures"], root / "interrupted"
        shard_size = min(2048, max(1, total // 8))
        process = subprocess.Popen(
            command(folder, gallery, shard_size), cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        while process.poll() is None and len(list(gallery.glob("shards/[0-9]*"))) < total // shard_size // 2:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        steps = {
            "killed halfway and resumed": index(folder, gallery),
            "again, nothing changed": index(folder, gallery),
        }
        files = [folder / name for name in steps["again, nothing changed"]["first"]]
        shutil.copy(files[1], files[0])
        os.utime(files[0])
        files[2].unlink()
        steps["one file changed, one gone"] = index(folder, gallery)
        print("\n| then | seconds | added | changed | unchanged | gone | pictures |\n|---|---|---|---|---|---|---|")
        for name, run in steps.items():
            counts = [f"{run[k]:,}" for k in ("added", "changed", "unchanged", "removed", "pictures")]
            print(f"| {name} | {run['seconds']:.1f} | {' | '.join(counts)} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:  # in a process of its own: a child's peak memory begins with its parent's
        make_pictures(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
