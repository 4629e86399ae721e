"""What a grid trains on: for each seed captions, triplets, and mixtures of triplets by number and quality."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch


ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from miniature.build import build_further, write_captions, write_triplets  # noqa: E402
from miniature.compare import CLIP  # noqa: E402
from miniature.scenes import KINDS_NOT_IN_TRIPLETS, allowed_in_stage1, allowed_in_triplets  # noqa: E402
from miniature.worlds import ALL_FURTHER, FURTHER, further_scene_worlds  # noqa: E402
from modeling_tscir import TSCIRModel, TSCIRProcessor  # noqa: E402
from modeling_tscir.backbone import backbone_fingerprint  # noqa: E402


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POOL = 30_000  # triplets of either quality, of which mixtures take the first
COLUMNS = ("reference", "modification", "target", "source", "quality", "reference_id", "target_id")
FILE = "train-00000-of-00001.parquet"


MET = "everything met in training"
NEW_KIND = "a kind of edit new to stage II"
NEW_TO_STAGE2 = "a shape or pair of attributes new to stage II"
NEW_TO_STAGE1 = "a shape or pair of attributes new to stage I"
NOVELTIES = (MET, NEW_KIND, NEW_TO_STAGE2, NEW_TO_STAGE1)


def novelties(world: str) -> list[str]:
    """For each query of a further world's CIRR benchmark, in order, one of NOVELTIES: the last of them that holds."""
    found = []
    for group in further_scene_worlds()[world].groups:
        for edit, target in zip(group.edits, group.targets, strict=True):
            scenes = group.reference, target
            if not all(map(allowed_in_stage1, scenes)):
                found.append(NEW_TO_STAGE1)
            elif not all(map(allowed_in_triplets, scenes)):
                found.append(NEW_TO_STAGE2)
            else:
                found.append(NEW_KIND if edit.kind in KINDS_NOT_IN_TRIPLETS else MET)
    return found


@dataclass(frozen=True)
class Mixture:
    """Triplets of a run, where they are not the recipe's 4,000 true edits.

    Args:
        number: how many.
        templated: the share made by template from captions, the rest being true edits.
        wrong: the share whose target is another row's.
    """

    number: int
    templated: float = 0.0
    wrong: float = 0.0

    def __post_init__(self):
        if not 1 <= self.number <= POOL or not 0 <= self.templated <= 1 or not 0 <= self.wrong <= 1:
            raise ValueError(f"a mixture has 1 to {POOL} triplets, and shares between 0 and 1: {self}")

    @property
    def parts(self) -> dict[str, int]:
        """How many of each pool."""
        templated = round(self.number * self.templated)
        return {"edits": self.number - templated, "templates": templated}

    @property
    def folder(self) -> str:
        return f"triplets-{self.number}-{self.templated:g}-{self.wrong:g}"


def clip_folder(output: Path) -> Path:
    """The stand-in CLIP of an output folder, which `settle_clip` put there."""
    return output / "clip"


def plain_clip(output: Path) -> tuple[TSCIRModel, TSCIRProcessor]:
    folder = clip_folder(output)
    return TSCIRModel.from_clip_pretrained(folder).to(DEVICE), TSCIRProcessor.from_clip_pretrained(folder)


def settle_clip(output: Path, results: Path, clip: Path | None) -> str:
    """Give a new output folder its CLIP, the package's unless told; its fingerprint, also in RESULTS/clip.json.

    A copy, as what is trained there names its backbone by path, and the package may be elsewhere another time.

    Raises:
        `ValueError` if what either folder holds is of another CLIP.
    """
    own = clip_folder(output)
    given = own if own.is_dir() else clip or CLIP
    named = results / "clip.json"
    known = json.loads(named.read_text(encoding="utf-8"))["fingerprint"] if named.is_file() else None
    mine, others = (
        backbone_fingerprint(TSCIRModel.from_clip_pretrained(folder).clip) for folder in (given, clip or given)
    )
    if mine != others or known not in (mine, None):
        held = mine if given == own else None
        raise ValueError(f"{output} is of the CLIP {held}, {results} of {known}, and {others} is asked for")
    if given != own:
        part = own.with_name(f"{own.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(given, part)
        part.rename(own)
    results.mkdir(parents=True, exist_ok=True)
    named.write_text(json.dumps({"fingerprint": mine}) + "\n", encoding="utf-8")
    return mine


def of_seed(output: Path, seed: int) -> Path:
    return output / f"training-{seed}"


def triplets_of(output: Path, seed: int, mixture: Mixture | None) -> Path:
    return of_seed(output, seed) / ("triplets" if mixture is None else mixture.folder)


def make_data(
    output: Path, seeds: list[int], mixtures: set[Mixture] = frozenset(), splits: Sequence[str] = tuple(FURTHER)
) -> None:
    """The benchmarks of these splits' worlds and, for each seed, captions and triplets of its own, unless they are
    there. Training data show no scene of val, of test, of these splits, or of others whose worlds lie there.

    Raises:
        `ValueError` if the folder was made for other splits, whose training data may show what these ask for.
    """
    worlds = output / "worlds"
    if worlds.is_dir() and (missing := [split for split in splits if not (worlds / ALL_FURTHER[split][0]).is_dir()]):
        raise ValueError(
            f"{output} was made for other worlds, and its training data may show scenes of {', '.join(missing)}; name "
            "another --output_dir"
        )
    there = [split for split in ALL_FURTHER if (worlds / ALL_FURTHER[split][0]).is_dir()]
    further = tuple(split for split in ALL_FURTHER if split in FURTHER or split in (*splits, *there))
    writers: dict[Path, Callable[[Path], None]] = {worlds: partial(build_further, splits=splits)}
    for seed in seeds:
        writers[of_seed(output, seed)] = partial(write_training_data, seed=seed, further=further)
        pools = output / f"pools-{seed}"
        pool_writers = {
            "edits": partial(write_triplets, seed=seed, further=further, number=POOL),
            "templates": partial(write_templates, captions=of_seed(output, seed), clip=clip_folder(output), seed=seed),
        }
        for mixture in sorted(mixtures, key=lambda m: m.folder):
            writers |= {pools / pool: pool_writers[pool] for pool, number in mixture.parts.items() if number}
            writers[triplets_of(output, seed, mixture)] = partial(
                write_mixture, pools=pools, mixture=mixture, seed=seed
            )
    for folder, write in writers.items():
        if not folder.is_dir():
            part = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            write(part)
            part.rename(folder)


def write_training_data(folder: Path, seed: int, further: tuple[str, ...]) -> None:
    write_captions(folder, seed, further)
    write_triplets(folder, seed, further)


def write_templates(folder: Path, captions: Path, clip: Path, seed: int) -> None:
    """By train/synthesize.py from stage I's captions, paired and filtered by CLIP."""
    command = [sys.executable, "train/synthesize.py", "--dataset_name", captions / "captions", "--seed", seed]
    command += ["--model_name_or_path", clip, "--num_triplets", POOL, "--output_dir", folder]
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"train/synthesize.py failed:\n{done.stderr[-2000:]}")


def write_mixture(folder: Path, pools: Path, mixture: Mixture, seed: int) -> None:
    """Raises `ValueError` if a pool has too few."""
    parts = []
    for pool, wanted in mixture.parts.items():
        if not wanted:
            continue
        table = pa.concat_tables(pq.read_table(path) for path in sorted((pools / pool).rglob("*.parquet")))
        if len(table) < wanted:
            raise ValueError(f"{pools / pool} has {len(table)} triplets, and {mixture} wants {wanted}")
        parts.append(table.select(COLUMNS).slice(0, wanted))
    table = pa.concat_tables([part.cast(parts[0].schema) for part in parts])
    rng = random.Random(f"wrong {seed}")
    rows = sorted(rng.sample(range(len(table)), round(len(table) * mixture.wrong)))
    source = list(range(len(table)))
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):  # each wrong row has the next one's target
        source[row] = other
    for name in ("target", "target_id"):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), table[name].combine_chunks().take(pa.array(source)))
    folder.mkdir(parents=True)
    pq.write_table(table, folder / FILE)
