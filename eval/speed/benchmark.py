"""How fast: our way beside the public repositories' way of working and beside the limit, in one run on one machine.

    python eval/speed/benchmark.py --output_dir runs/speed

Every way of a work lives in a process of its own, on the same threads; the processes take turns, and figures are
medians of ratios within a turn, with their range. The limit is the module's own forward pass, or forward and backward,
in the same precision. CLIPs have random weights. Writes results.json, speed.md and a picture; about 40 minutes on
two cores.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from precision import compare_rankings, compare_with_clip
from setting import Setting, write_inputs
from speed_report import machine, one_line, shape_of, write_report
from works import CURVES, WORKS


CALLS = 10  # of a single query, which takes too little time to be timed by itself
IMPORTS = {
    "ours": "import modeling_tscir",
    "limit": "from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel",
}


class Worker:
    """A process that prepares one way of a work and then does it once for every line it is sent."""

    def __init__(self, request: dict):
        self.request = request
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  (closed with the process)
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(request)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
        )  # fmt: skip

    def measure(self) -> dict:
        """{"seconds", "peak_gib"} of one call. Raises `RuntimeError` with what the process printed."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"{self.request} failed:\n{self.errors.read()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def serve(request: dict) -> None:
    """The worker's side: results go to what was standard output, and all else is thrown away."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    setting = Setting(Path(request["folder"]), request["shape"], request["dtype"], **request["sizes"])
    run = {**WORKS, **CURVES}[request["work"]].ways[request["way"]](setting)
    peak = None
    for _ in sys.stdin:
        start = time.perf_counter()
        if peak is None:  # of the first call, which is not timed
            peak = peak_gib(run)
        else:
            for _ in range(request["calls"]):
                run()
        seconds = (time.perf_counter() - start) / request["calls"]
        answers.write(json.dumps({"seconds": seconds, "peak_gib": peak}) + "\n")
        answers.flush()


def peak_gib(run: Callable[[], object]) -> float:
    """The most memory of its own that this process holds during a call; files that it maps, as weights are, aside."""
    page, peak, done = os.sysconf("SC_PAGE_SIZE") / 2**30, 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while True:
            resident, shared = Path("/proc/self/statm").read_text("ascii").split()[1:3]
            peak = max(peak, (int(resident) - int(shared)) * page)
            if done.wait(0.002):  # a call that is over sooner is seen once before it
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return peak


@contextlib.contextmanager
def workers(requests: dict[str, dict]) -> Iterator[dict[str, Worker]]:
    started: dict[str, Worker] = {}
    try:
        for name, request in requests.items():
            started[name] = Worker(request)
        yield started
    finally:
        for worker in started.values():
            worker.close()


def in_turns(requests: dict[str, dict], rounds: int) -> dict[str, dict]:
    """{"seconds": one a round, "peak_gib"} of every way; a first round, which also prepares, does not count."""
    with workers(requests) as started:
        found = [{name: worker.measure() for name, worker in started.items()} for _ in range(rounds + 1)]
    return {
        name: {"seconds": [turn[name]["seconds"] for turn in found[1:]], "peak_gib": found[-1][name]["peak_gib"]}
        for name in requests
    }


def ratios(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Median of paired ratios, and the least and the greatest."""
    paired = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    return {"median": statistics.median(paired), "low": paired[0], "high": paired[-1]}


def import_times(rounds: int) -> dict[str, dict]:
    """Of `import modeling_tscir` and its limit, in fresh processes, in turns."""
    code = (
        "import time; start = time.perf_counter(); {}; seconds = time.perf_counter() - start; "
        "line = next(l for l in open('/proc/self/status') if l.startswith('VmHWM')); "
        "print(seconds, int(line.split()[1]) / 2**20)"
    )
    found = {name: {"seconds": [], "peak_gib": 0.0} for name in IMPORTS}
    for turn in range(rounds + 1):
        for name, line in IMPORTS.items():
            done = subprocess.run(
                [sys.executable, "-c", code.format(line)], check=True, capture_output=True, text=True
            )
            seconds, peak = map(float, done.stdout.split())
            if turn:  # the first one reads files from disk
                found[name]["seconds"].append(seconds)
                found[name]["peak_gib"] = peak
    return {
        "seconds": {name: statistics.median(one["seconds"]) for name, one in found.items()},
        "peak_gib": {name: one["peak_gib"] for name, one in found.items()},
        "ratio": ratios(found["ours"]["seconds"], found["limit"]["seconds"]),
    }


def faster_precision(folder: Path, shape: str) -> tuple[str, dict[str, float]]:
    """Of fp32 and bf16, by the vision tower's forward pass; and bf16's seconds over fp32's."""
    work, sizes = "stage I step, features not cached", {"rows": 8}
    requests = {
        dtype: {
            "work": work,
            "way": "limit",
            "folder": str(folder),
            "shape": shape,
            "dtype": dtype,
            "sizes": sizes,
            "calls": 1,
        }
        for dtype in ("float32", "bfloat16")
    }
    found = in_turns(requests, 3)
    ratio = ratios(found["bfloat16"]["seconds"], found["float32"]["seconds"])
    return ("bfloat16" if ratio["median"] < 1 else "float32"), ratio


def measure_work(name: str, shape: str, dtype: str, folder: Path, rounds: int, levers: bool) -> dict:
    """One line of the table: seconds, peaks and ratios of every way."""
    work = WORKS[name]
    ways = [way for way in work.ways if levers or "+" not in way]
    common = {"work": name, "folder": str(folder), "shape": shape, "dtype": dtype, "sizes": work.sizes[shape]}
    common["calls"] = 1 if work.sizes[shape]["rows"] > 1 else CALLS
    found = in_turns({way: common | {"way": way} for way in ways}, rounds)
    peers = found["peers"]["seconds"]
    limits = [found[way]["seconds"] for way in ways if way.startswith("limit")]
    limit = max(limits, key=statistics.median, default=None)
    return {
        "work": name,
        "shape": shape,
        **work.sizes[shape],
        "seconds": {way: statistics.median(one["seconds"]) for way, one in found.items()},
        "peak_gib": {way: one["peak_gib"] for way, one in found.items()},
        "vs_peers": ratios(peers, found["ours"]["seconds"]),
        "vs_limit": None if limit is None else ratios(found["ours"]["seconds"], limit),
        "others": {
            way: ratios(found["ours"]["seconds"] if way.startswith("ours") else peers, found[way]["seconds"])
            for way in ways
            if way not in ("ours", "peers") and not way.startswith("limit")
        },
    }


def measure_curve(name: str, shape: str, dtype: str, folder: Path, rounds: int) -> list[dict]:
    """Seconds and peaks of every way at every size."""
    curve, points = CURVES[name], []
    for value in curve.values:
        sizes = curve.fixed | {curve.size: value}
        common = {"work": name, "folder": str(folder), "shape": shape, "dtype": dtype, "sizes": sizes}
        common["calls"] = CALLS if sizes["rows"] == 1 else 1
        ways = [way for way in curve.ways if way == "ours" or value <= curve.peers_until]
        for way, one in in_turns({way: common | {"way": way} for way in ways}, rounds).items():
            points.append({"curve": name, "shape": shape, "way": way, "size": value, **one})
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, help="keeps figures.json: what it holds is not done again")
    parser.add_argument("--results_dir", type=Path, help="for the report; OUTPUT_DIR/results unless told")
    parser.add_argument("--shapes", nargs="+", choices=["ViT-B/32", "ViT-L/14"], default=["ViT-B/32", "ViT-L/14"])
    parser.add_argument("--works", nargs="*", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--curves", nargs="*", choices=list(CURVES), default=list(CURVES))
    parser.add_argument("--rounds", type=int, default=5, help="paired runs of every work; curves have three")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(json.loads(args.worker))
        return
    if args.output_dir is None:
        parser.error("--output_dir is needed")
    results = args.results_dir or args.output_dir / "results"
    for path in (args.output_dir, results):
        path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as inputs:
        figures = measure(args, Path(inputs), args.output_dir / "figures.json")
    write_report(figures, results)


def measure(args: argparse.Namespace, folder: Path, path: Path) -> dict:
    """Every figure; those that `path` holds of this machine and as many rounds are not measured again."""
    figures = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if (figures.get("machine"), figures.get("rounds")) != (machine(), args.rounds):
        figures = {"machine": machine(), "rounds": args.rounds, "works": [], "curves": []}

    def keep() -> None:
        path.write_text(json.dumps(figures, indent=1), encoding="utf-8")

    write_inputs(folder, args.shapes, photos=64)
    if "imports" not in figures:
        figures["dtype"], figures["bf16_over_fp32"] = faster_precision(folder, args.shapes[0])
        clip = Setting(folder, args.shapes[0], figures["dtype"]).clip
        figures["precision"] = compare_with_clip(clip) | compare_rankings(folder)
        figures["imports"] = import_times(args.rounds)
        keep()
    done = {(line["work"], line["shape"]) for line in figures["works"]}
    for shape in args.shapes:
        for name in args.works:
            if shape in WORKS[name].sizes and (name, shape) not in done:
                levers = shape == args.shapes[0] or len(WORKS[name].sizes) == 1
                line = measure_work(name, shape, figures["dtype"], folder, args.rounds, levers)
                figures["works"].append(line)
                keep()
                print(one_line(line), flush=True)
    if args.curves:  # of one shape all of them, as they share a table
        figures["curves"] = [point for point in figures["curves"] if shape_of(point) == args.shapes[0]]
    for name in args.curves:
        if name not in {point["curve"] for point in figures["curves"]}:
            figures["curves"] += measure_curve(name, args.shapes[0], figures["dtype"], folder, 3)
            keep()
            print(name, flush=True)
    return figures


if __name__ == "__main__":
    main()
