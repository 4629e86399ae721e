"""Exact search in a gallery, beside FAISS's flat indexes, in one process.

    python eval/speed/exact_search.py --pictures 1000000

Random vectors of 768 numbers, stored in fp16; ten best of one query and of 100. FAISS holds its vectors in memory, in
fp32 ("Flat") or fp16 ("SQfp16"); the gallery maps its own from disk, which the first search reads. Prints a table:
milliseconds, and how many times as long as ours, medians of paired runs with their range. All must find the same.
"""

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import torch
import torch.nn.functional as F

from modeling_tscir.gallery import FORMAT, Gallery
from modeling_tscir.indexing import SHARD_SIZE
from modeling_tscir.shards import SCHEMA, write_json, write_shard


WIDTH = 768


def make_gallery(folder: Path, count: int) -> Gallery:
    import pyarrow as pa

    info = {"format": FORMAT, "fingerprint": {}, "dimensions": WIDTH, "dtype": "float16", "backbone": "random"}
    folder.mkdir(exist_ok=True)
    write_json(folder / "gallery.json", info)
    generator = torch.Generator().manual_seed(0)
    for start in range(0, count, SHARD_SIZE):
        rows = range(start, min(start + SHARD_SIZE, count))
        embeds = F.normalize(torch.randn(len(rows), WIDTH, generator=generator), dim=-1).half()
        columns = {"id": [f"{i:09d}.jpg" for i in rows], "path": [b"%d.jpg" % i for i in rows]}
        columns |= {"size": [1] * len(rows), "mtime_ns": [1] * len(rows), "picture": [None] * len(rows)}
        columns["content"] = [f"{i:032x}" for i in rows]
        write_shard(folder / "shards" / f"{start // SHARD_SIZE:06d}", pa.table(columns, schema=SCHEMA), embeds)
    return Gallery(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1_000_000)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        gallery = make_gallery(Path(folder), args.pictures)
        start = time.perf_counter()
        gallery = Gallery(folder)
        opening = time.perf_counter() - start
        queries = F.normalize(torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(1)), dim=-1)
        indexes = {
            "FAISS Flat": faiss.IndexFlatIP(WIDTH),
            "FAISS SQfp16": faiss.IndexScalarQuantizer(
                WIDTH, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
            ),
        }
        for embeds in gallery.embeds:
            for index in indexes.values():
                index.add(embeds.float().numpy())
        ways = {"gallery": lambda q: np.array([[int(r["id"][:-4]) for r in row] for row in gallery.search(q)])}
        ways |= {name: lambda q, index=index: index.search(q.numpy(), 10)[1] for name, index in indexes.items()}
        seconds: dict[tuple[str, int], list[float]] = {}
        for repetition in range(args.repetitions + 1):  # the first warms up
            for count in (1, 100):
                found = {}
                for name, search in ways.items():
                    start = time.perf_counter()
                    found[name] = search(queries[:count])
                    if repetition:
                        seconds.setdefault((name, count), []).append(time.perf_counter() - start)
                for name in indexes:
                    same = np.mean([len(set(a) & set(b)) for a, b in zip(found["gallery"], found[name], strict=True)])
                    assert same > 9.9, f"{name} finds {same} of the gallery's ten"  # but for equal scores
    print(f"{args.pictures:,} vectors of {WIDTH} numbers; the gallery opens in {opening:.1f} s")
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print("\n| way | 1 query, ms | ratio to ours | 100 queries, ms | ratio to ours |\n|---|---|---|---|---|")
    for name in ways:
        cells = [name]
        for count in (1, 100):
            ratios = sorted(a / b for a, b in zip(seconds[name, count], seconds["gallery", count], strict=True))
            cells.append(f"{1000 * statistics.median(seconds[name, count]):.0f}")
            cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
