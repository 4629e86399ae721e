"""A model's card on the Hub, written from the model, the record of its training and the results of its evaluations."""

import fnmatch
import os
import re
from collections.abc import Sequence

from huggingface_hub import EvalResult, ModelCardData

from .configuration_tscir import TASK


LICENCES = {  # of the weights, by the backbone's name on the Hub
    "openai/clip-*": "mit",
    "laion/CLIP-*": "mit",
    "facebook/metaclip-*": "cc-by-nc-4.0",
}
SHOWN = (
    "dataset_name", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "num_processes", "learning_rate", "lr_scheduler_type", "weight_decay", "gce_q", "mixed_precision", "seed",
)  # fmt: skip
# What training records of local files is absolute; patterns have a suffix.
ON_HUB = re.compile(r"[\w-]+/[\w-][\w.-]*(?<!\.tar)(?<!\.parquet)(?<!\.json)(?<!\.jsonl)(?<!\.csv)")


def public(name: str | None, commit: str | None) -> str | None:
    """A backbone's name if others can find it."""
    return name if name and commit and not os.path.isdir(name) else None


def metrics_of(results: dict) -> dict[str, float]:
    own = results["benchmark"] + "_"
    return {k.removeprefix(own): v for k, v in results.items() if k.startswith(own) and isinstance(v, float)}


def licence_of(model) -> str:
    name = model.config.backbone_name_or_path or ""
    return next((licence for pattern, licence in LICENCES.items() if fnmatch.fnmatch(name, pattern)), "other")


def model_card(
    model,
    repo_id: str,
    form: str,
    licence: str | None,
    recorded: dict,
    results: Sequence[dict],
    widget: Sequence[dict] = (),
) -> str:
    """README.md, metadata included; every figure and choice is read from the model or from what runs wrote."""
    config = model.config
    backbone = public(config.backbone_name_or_path, config.backbone_revision)
    named = [str(stage.get("dataset_name", "")) for stage in stages_of(recorded)]
    data = sorted({name for name in named if ON_HUB.fullmatch(name)})
    metadata = ModelCardData(
        license=licence or licence_of(model),
        library_name="transformers",
        pipeline_tag="image-feature-extraction",  # the Hub's list has no composed image retrieval
        tags=[TASK, "image-retrieval", "tscir", "clip", "lora"],
        base_model=backbone,
        datasets=data or None,
        model_name=repo_id.split("/")[-1],
        eval_results=[
            EvalResult(
                task_type=TASK,
                dataset_type=found["benchmark"],
                dataset_name=found["benchmark"].upper(),
                dataset_split=found["protocol"]["split"],
                metric_type=name,
                metric_value=value,
            )
            for found in results
            for name, value in metrics_of(found).items()
        ]
        or None,
        **({"widget": list(widget)} if widget else {}),
        **({"co2_eq_emissions": {"emissions": 1000 * recorded["co2_kg"]}} if "co2_kg" in recorded else {}),
    )
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n",
        introduction(model, repo_id, form, backbone),
        usage(repo_id),
        evaluation(results),
        training_section(config, recorded),
        limits(model, licence or licence_of(model), backbone),
    ]
    return "\n".join(parts)


def introduction(model, repo_id: str, form: str, backbone: str | None) -> str:
    config = model.config
    stages = {
        0: "It is a plain CLIP that answers training-free, by slerp between picture and text.",
        1: f"It has the pseudo-word mapper of stage I ({config.num_pseudo_words} pseudo-words a picture).",
        2: f"It has the pseudo-word mapper of stage I ({config.num_pseudo_words} pseudo-words a picture) and the "
        "composing adapters of stage II.",
    }
    trained = sum(tensor.numel() for tensor in model.delta_state_dict().values())
    frozen = sum(p.numel() for p in model.clip.parameters()) - sum(
        p.numel() for n, p in model.clip.named_parameters() if ".lora_" in n
    )
    held = (
        f"This repository holds the trained part alone; the frozen backbone is fetched from `{backbone}` at commit "
        f"`{config.backbone_revision}`. Should that go away, name the same weights elsewhere: "
        f'`TSCIRModel.from_pretrained("{repo_id}", backbone="folder or Hub name")`; their fingerprint '
        f"`{config.backbone_fingerprint}` is checked. `save_pretrained(folder)` of the loaded model writes the whole."
        if form == "reference"
        else "This repository holds the whole model, the frozen backbone included"
        + (f" (`{backbone}`). " if backbone else ".")
        + (
            'With `save_pretrained(folder, backbone="reference")` the trained part alone is written.'
            if backbone
            else ""
        )
    )
    adapters = (
        f"\n\nFurther composing adapters: {', '.join(f'`{name}`' for name in config.adapters)}; "
        '`cir(..., adapter="NAME")` uses one, and `adapters/NAME` is in PEFT\'s own format.'
        if config.adapters
        else ""
    )
    return f"""# {repo_id.split("/")[-1]}

Composed image retrieval: a reference picture and a modification text ("the same dress, in red") rank a gallery of
pictures. The method is the two-stage framework of "From Mapping to Composing" (arXiv 2504.17990), on a frozen CLIP.
{stages[config.stage]}
{trained:,} parameters are trained, {frozen:,} frozen.

{held}{adapters}
"""


def usage(repo_id: str) -> str:
    return f"""## Use

With the package `tscir`:

```python
import modeling_tscir
from transformers import pipeline

cir = pipeline("composed-image-retrieval", model="{repo_id}")
cir.index("path/to/pictures")
results = cir(image="query.png", text="the same, in red", top_k=5)
```

Without it, with the code of this repository; name a `revision` that you have read:

```python
from transformers import pipeline

cir = pipeline("composed-image-retrieval", model="{repo_id}", trust_remote_code=True)
cir.index("path/to/pictures")
results = cir(image="query.png", text="the same, in red", top_k=5)
```

From the command line:

```sh
tscir index path/to/pictures --output pictures.gallery --model {repo_id}
tscir search pictures.gallery --image query.png --text "the same, in red"
```

Each result has a score (cosine similarity), an id and the picture.
"""


def evaluation(results: Sequence[dict]) -> str:
    if not results:
        return "## Evaluation\n\nNo figures were given when this was published.\n"
    lines = ["## Evaluation\n", "| benchmark | split | queries | metric | % |", "|---|---|---|---|---|"]
    notes = []
    for found in results:
        queries = found[f"{found['benchmark']}_num_queries"]
        for name, value in metrics_of(found).items():
            split = found["protocol"]["split"]
            lines.append(f"| {found['benchmark']} | {split} | {queries:,} | {name} | {100 * value:.2f} |")
        protocol = ", ".join(f"{k} {v}" for k, v in found["protocol"].items() if not isinstance(v, dict))
        notes.append(
            f"- {found['benchmark']}: {protocol}; weight {found['weight']}, residual {found.get('residual', 0.0)}."
        )
        if found.get("skipped_images"):
            notes.append(f"- {found['benchmark']}: {len(found['skipped_images'])} unreadable pictures were skipped.")
        for name, counts in found.get("published_counts", {}).items():
            if not counts["same"]:
                notes.append(f"- {name} has not the benchmark's published numbers of queries and pictures.")
    used = results[0]["versions"]
    notes.append("- Versions: " + ", ".join(f"{k} {v}" for k, v in used.items()) + ".")
    return "\n".join([*lines, "", "Protocol:", "", *notes, ""])


def stages_of(recorded: dict) -> list[dict]:
    """The records of training, first stage first."""
    stages = []
    while recorded:
        stages.insert(0, recorded)
        recorded = recorded.get("previous_stage") or {}
    return stages


def training_section(config, recorded: dict) -> str:
    stages = stages_of(recorded)
    if not stages:
        return "## Training\n\nThe folder that was published holds no record of its training.\n"
    lines = ["## Training\n"]
    for stage in stages:
        acted = [name for name in SHOWN if name != "num_train_epochs" or stage.get("max_steps", -1) <= 0]
        shown = [f"{name} {stage[name]}" for name in acted if stage.get(name) not in (None, -1)]
        lines.append(f"Stage {'II' if 'modification_column' in stage else 'I'}: {', '.join(shown)}.")
        if "hours" in stage:
            lines.append(f"{stage['hours']:.2f} hours on {stage['hardware']}.")
        if stage.get("skipped_images"):
            lines.append(f"{len(stage['skipped_images'])} unreadable pictures were skipped.")
        if "versions" in stage:
            lines.append("Versions: " + ", ".join(f"{k} {v}" for k, v in stage["versions"].items()) + ".")
        lines.append("")
    known = recorded.get("co2_kg")
    lines.append(f"Carbon: {known:.3g} kg of CO2 equivalents (codecarbon).\n" if known else "Carbon: not measured.\n")
    return "\n".join(lines)


def limits(model, licence: str, backbone: str | None) -> str:
    size = model.config.clip_config.vision_config.image_size
    web = ", and it was trained on captions from the web" if licence_of(model) != "other" else ""
    stated = "not stated" if licence == "other" else licence
    see = f"Backbone: see `{backbone}`. " if backbone else ""
    return f"""## Limits and bias

- A picture is seen at {size} x {size} pixels, a text up to 77 tokens; what is longer is cut, with a warning.
- What the frozen CLIP does not tell apart, no query can: often counting, reading, left and right, and what is rare in
  its data. What its data says of people, rankings of pictures of people repeat{web}. Do not use it to identify or to
  judge people.
- Scores order one gallery; they are no probabilities and cannot be compared between models.

## Licences

This model: {stated}. {see}The data it was trained on keep the licences of their sources.
"""
