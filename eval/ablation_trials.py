"""Each method's trials on val: 432 of every baseline, 216 of TSCIR, whose defaults took some 200 before.

    python eval/ablation_trials.py --output_dir runs/ablation --results eval/ablation/trials.csv

On the further worlds of val, seed 0: sum and slerp with 432 shares of the text; a combiner with six learning rates,
asked after each of its epochs; mappers by the ways of Pic2Word, LinCIR and SEARLE with six to twelve trainings each,
in prompts with and without words, and TSCIR with six, with 36 pairs of residual and text's share. Writes every trial,
and prints each method's best.
"""

import argparse
import hashlib
import itertools
import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from ablation import Runner
from ablation_data import clip_folder, make_data, of_seed, plain_clip, settle_clip, triplets_of
from ablation_grid import slug
from ablation_measures import (
    RETRIEVAL,
    embed_worlds,
    fit_on_triplets,
    load_trained,
    pseudo_words,
    reference_patches,
    splits_of_worlds,
)
from harness import embed_pictures, mix, rank
from splits import Split

from miniature.compare import query_values
from modeling_tscir import TSCIRModel, TSCIRProcessor
from modeling_tscir.embedding import embed_texts, query_inputs
from modeling_tscir.queries import slerp


WORDS = {"image_template": "a photo of {image}", "prompt_template": "a photo of {image} that {text}"}
BARE = {"image_template": "{image}", "prompt_template": "{image} {text}"}
PIC2WORD = {"num_injection_blocks": 0, "soft_alignment_weight": 0}
LINCIR = {"script": "train/lincir_style.py"}
SEARLE = {"script": "train/searle_style.py", "max_steps": 300}
# Each training's arguments, TSCIR's by stage. Prompts of Pic2Word's way and TSCIR's are those of their training; the
# others are asked in either.
TRAININGS = {
    "TSCIR": {
        "by default": {},
        "12 epochs of stage II": {"stage2": {"num_train_epochs": 12}},
        "6 epochs of stage I": {"num_train_epochs": 6},
        "rate of stage I 3e-4": {"learning_rate": 3e-4},
        "1 pseudo-word": {"num_pseudo_words": 1},
        "2 pseudo-words": {"num_pseudo_words": 2},
    },
    "Pic2Word": {
        "1 pseudo-word": {"num_pseudo_words": 1} | PIC2WORD | WORDS,
        "2 pseudo-words": {"num_pseudo_words": 2} | PIC2WORD | WORDS,
        "2 pseudo-words, rate 3e-3": {"num_pseudo_words": 2, "learning_rate": 3e-3} | PIC2WORD | WORDS,
        "2 pseudo-words, rate 3e-4": {"num_pseudo_words": 2, "learning_rate": 3e-4} | PIC2WORD | WORDS,
        "2 pseudo-words, rate 1e-4": {"num_pseudo_words": 2, "learning_rate": 1e-4} | PIC2WORD | WORDS,
        "4 pseudo-words": {"num_pseudo_words": 4} | PIC2WORD | WORDS,
        "1 pseudo-word, rate 3e-4": {"num_pseudo_words": 1, "learning_rate": 3e-4} | PIC2WORD | WORDS,
        "4 pseudo-words, rate 3e-4": {"num_pseudo_words": 4, "learning_rate": 3e-4} | PIC2WORD | WORDS,
        "2 pseudo-words, rate 3e-4, bare prompts": {"num_pseudo_words": 2, "learning_rate": 3e-4} | PIC2WORD | BARE,
        "1 pseudo-word, bare prompts": {"num_pseudo_words": 1} | PIC2WORD | BARE,
        "2 pseudo-words, bare prompts": {"num_pseudo_words": 2} | PIC2WORD | BARE,
        "4 pseudo-words, bare prompts": {"num_pseudo_words": 4} | PIC2WORD | BARE,
    },
    "LinCIR": {
        "1 pseudo-word": {"num_pseudo_words": 1} | LINCIR,
        "1 pseudo-word, half the noise": {"num_pseudo_words": 1, "noise_scale": 0.5} | LINCIR,
        "4 pseudo-words": {"num_pseudo_words": 4} | LINCIR,
        "4 pseudo-words, half the noise": {"num_pseudo_words": 4, "noise_scale": 0.5} | LINCIR,
        "4 pseudo-words, rate 3e-3": {"num_pseudo_words": 4, "learning_rate": 3e-3} | LINCIR,
        "4 pseudo-words, rate 3e-4": {"num_pseudo_words": 4, "learning_rate": 3e-4} | LINCIR,
    },
    "SEARLE": {
        "1 pseudo-word": {"num_pseudo_words": 1} | SEARLE,
        "1 pseudo-word, captions alike": {"num_pseudo_words": 1, "caption_weight": 1.0} | SEARLE,
        "4 pseudo-words": {"num_pseudo_words": 4} | SEARLE,
        "4 pseudo-words, captions alike": {"num_pseudo_words": 4, "caption_weight": 1.0} | SEARLE,
        "4 pseudo-words, rate 3e-3": {"num_pseudo_words": 4, "learning_rate": 3e-3} | SEARLE,
        "4 pseudo-words, rate 3e-4": {"num_pseudo_words": 4, "learning_rate": 3e-4} | SEARLE,
    },
}
SHARES = [round(i / 431, 4) for i in range(432)]
RESIDUALS, WEIGHTS = (0, 0.25, 0.5, 0.75, 1, 1.25), (0, 0.1, 0.2, 0.3, 0.4, 0.5)
RATES, EPOCHS = (3e-4, 1e-3, 3e-3, 1e-2, 2e-2, 3e-2), 72


class Asked(NamedTuple):
    """Queries of one category of one of val's further worlds. Wordings' rows are those of all queries in a row."""

    benchmark: object
    world: str
    category: str
    split: Split
    pictures: torch.Tensor

    @property
    def wordings(self) -> list[str]:
        return [text for wordings in self.split.texts for text in wordings]

    @property
    def owners(self) -> torch.Tensor:
        return torch.tensor([q for q, wordings in enumerate(self.split.texts) for _ in wordings])

    @property
    def references(self) -> torch.Tensor:
        """v(x) of each wording's reference."""
        return self.pictures[torch.tensor(self.split.references)[self.owners]]

    def averaged(self, rows: torch.Tensor) -> torch.Tensor:
        """Queries [Q, D] of their wordings [n, D]."""
        sums = torch.zeros(len(self.split.texts), rows.shape[1]).index_add_(0, self.owners, rows)
        return F.normalize(sums, dim=-1)


def asked_of_val(output: Path) -> list[Asked]:
    clip = plain_clip(output)
    return [
        Asked(benchmark, world, category, part, embed_pictures(*clip, part, args))
        for split, world, benchmark, args, splits in splits_of_worlds(output)
        if split == "val"
        for category, part in splits.items()
    ]


def figures(asked: list[Asked], queries: list[torch.Tensor]) -> dict[str, float]:
    """The primary metrics over all worlds, and their mean, of each one's queries [Q, D]."""
    values: dict[str, list[np.ndarray]] = {metric: [] for metric in RETRIEVAL.primary}
    for _, rows in itertools.groupby(
        zip(asked, queries, strict=True), lambda pair: (pair[0].benchmark, pair[0].world)
    ):
        own = list(rows)
        splits = {one.category: one.split for one, _ in own}
        ranked = {one.category: rank(one.split, query, one.pictures, k=1) for one, query in own}
        found = query_values(own[0][0].benchmark, splits, ranked)
        for metric in values.keys() & found.keys():
            values[metric].append(found[metric])
    means = {metric: float(np.concatenate(found).mean()) for metric, found in values.items()}
    return means | {"mean": float(np.mean(list(means.values())))}


def of_shares(output: Path, method: str) -> list[dict]:
    """Sum or slerp."""
    torch.set_num_threads(1)
    asked, clip = asked_of_val(output), plain_clip(output)
    texts = [embed_texts(*clip, one.wordings) for one in asked]
    rows = []
    for share in SHARES:
        queries = [
            one.averaged(mix(method, one.references, told, share)) for one, told in zip(asked, texts, strict=True)
        ]
        rows.append({"method": method, "weight": share} | figures(asked, queries))
    return rows


def of_combiner(output: Path, learning_rate: float) -> list[dict]:
    torch.set_num_threads(1)
    asked, clip = asked_of_val(output), plain_clip(output)
    texts = [one.averaged(embed_texts(*clip, one.wordings)) for one in asked]
    pictures = [one.pictures[torch.tensor(one.split.references)] for one in asked]
    fitted = fit_on_triplets(clip, triplets_of(output, 0, None), 0, epochs=EPOCHS, learning_rate=learning_rate)
    rows = []
    for epoch, combiner in enumerate(fitted, start=1):
        with torch.no_grad():
            queries = [combiner(image, text) for image, text in zip(pictures, texts, strict=True)]
        told = {"method": "combiner", "learning_rate": learning_rate, "epochs": EPOCHS, "stop_after": epoch}
        rows.append(told | figures(asked, queries))
    return rows


@torch.no_grad()
def parts_of(
    one: Asked,
    model: TSCIRModel,
    processor: TSCIRProcessor,
    patches: Callable[[], torch.Tensor] | None = None,
    batch_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each wording its prompt, its q(x) and its text, [n, D] each, as a composed query is made of them; `patches`
    are the distinct references', for a mapper that reads them."""
    rows = sorted(set(one.split.references))
    words = pseudo_words(model, one.pictures[torch.tensor(rows)], patches)
    place = {row: i for i, row in enumerate(rows)}
    own = words[torch.tensor([place[row] for row in one.split.references])[one.owners]]
    found = []
    for start in range(0, len(own), batch_size):
        part = slice(start, start + batch_size)
        inputs = query_inputs(processor, one.wordings[part])
        ids, mask, plain = (inputs[name] for name in ("input_ids", "pseudo_mask", "modification_ids"))
        found.append(model.encode_query_parts(ids, mask, own[part], plain))
    return tuple(map(torch.cat, zip(*found, strict=True)))


def composed(one: Asked, parts: tuple[torch.Tensor, ...], residual: float, weight: float) -> torch.Tensor:
    """Queries [Q, D] of `parts_of`."""
    prompt, alone, text = parts
    query = F.normalize(prompt + residual * (one.references - alone), dim=-1)
    return one.averaged(slerp(query, text, weight))


def of_mapper(output: Path, method: str, training: str, prompts: dict) -> list[dict]:
    """A trained mapper's, with these prompts."""
    torch.set_num_threads(1)
    asked, clip = asked_of_val(output), plain_clip(output)
    model, processor = load_trained(str(folder_of(output, method, training)))
    processor.image_template, processor.prompt_template = prompts["image_template"], prompts["prompt_template"]
    parts = [parts_of(one, model, processor, partial(reference_patches, output, clip, one.split)) for one in asked]
    rows = []
    for residual, weight in itertools.product(RESIDUALS, WEIGHTS):
        queries = [composed(*pair, residual, weight) for pair in zip(asked, parts, strict=True)]
        told = {"method": method, "training": training, "prompt": prompts["prompt_template"]}
        rows.append(told | {"residual": residual, "weight": weight} | figures(asked, queries))
    return rows


def prompts_of(method: str, training: str) -> list[dict]:
    """The prompts that a training is asked in."""
    choices = TRAININGS[method][training]
    if method == "TSCIR":
        return [BARE]
    return [{name: choices[name] for name in WORDS}] if "prompt_template" in choices else [WORDS, BARE]


def folder_of(output: Path, method: str, training: str) -> Path:
    return output / "trials" / slug(f"{method} {training}")


def trials(output: Path, jobs: int) -> pd.DataFrame:
    """Every trial, a row each; trains what is not there."""
    runner = Runner(output, output / "trials", jobs, [])
    every = [(method, training) for method, trainings in TRAININGS.items() for training in trainings]
    clip, data = clip_folder(output), of_seed(output, 0) / "captions"

    def train(one: tuple[str, str]) -> None:
        choices, folder = dict(TRAININGS[one[0]][one[1]]), folder_of(output, *one)
        if one[0] != "TSCIR":
            runner.train(1, clip, data, folder, 0, choices, {})
            return
        composing, first = choices.pop("stage2", {}), folder.with_name(f"{folder.name}-stage1")
        runner.train(1, clip, data, first, 0, choices, {})
        runner.train(2, first, triplets_of(output, 0, None), folder, 0, composing, choices)

    list(runner.pool.map(train, every))
    work: list[tuple[Callable, tuple]] = [(of_shares, ("sum",)), (of_shares, ("slerp",))]
    work += [(of_combiner, (rate,)) for rate in RATES]
    work += [(of_mapper, (*one, prompts)) for one in every for prompts in prompts_of(*one)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        done = [pool.submit(kept, output, function, *arguments) for function, arguments in work]
        return pd.DataFrame([row for one in done for row in one.result()])


def kept(output: Path, function: Callable, *arguments) -> list[dict]:
    """Trials' rows, from the output folder where the same were tried already."""
    asked = repr((arguments, SHARES, RESIDUALS, WEIGHTS, EPOCHS))
    name = slug(f"{function.__name__} {arguments[:2]} {hashlib.sha256(asked.encode()).hexdigest()[:8]}")
    path = output / "trials" / "rows" / f"{name}.json"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(function(output, *arguments)), encoding="utf-8")
        part.rename(path)
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="of ablation.py, whose data it takes")
    parser.add_argument("--results", type=Path, required=True, help="CSV of every trial")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1), help="trials at a time")
    args = parser.parse_args()
    output = args.output_dir.resolve()
    settle_clip(output, output / "trials", None)
    make_data(output, [0])
    embed_worlds(output, output / "trials")
    table = trials(output, args.jobs)
    table.round(5).to_csv(args.results, index=False)
    best = table.loc[table.groupby("method", sort=False)["mean"].idxmax()].set_index("method")
    best.insert(0, "trials", table.groupby("method").size())
    print(best.T.to_string())


if __name__ == "__main__":
    main()
