"""A model as a complete Hub repository: weights, code, processor, and a card filled from what training and evaluation
wrote down."""

import csv
import fnmatch
import json
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import EvalResult, EvalResultEntry, HfApi, ModelCardData, eval_result_entries_to_yaml

from .configuration_tscir import TASK
from .images import load_image


LICENCES = {  # of the weights, by the backbone's name on the Hub
    "openai/clip-*": "mit",
    "laion/CLIP-*": "mit",
    "facebook/metaclip-*": "cc-by-nc-4.0",
}
NAMES = ("model_name_or_path", "dataset_name")  # of folders, or on the Hub
PATHS = (*NAMES, "output_dir", "feature_cache_dir", "resume_from_checkpoint", "config")
SHOWN = (
    "dataset_name", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "num_processes", "learning_rate", "lr_scheduler_type", "weight_decay", "mixed_precision", "seed",
)  # fmt: skip
# What training records of local files is absolute; patterns have a suffix.
ON_HUB = re.compile(r"[\w-]+/[\w-][\w.-]*(?<!\.tar)(?<!\.parquet)(?<!\.json)(?<!\.jsonl)(?<!\.csv)")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "adapters/*")


def default_form(model) -> str:
    """ "reference", a few megabytes, where the backbone is on the Hub at a known commit; "full" elsewhere."""
    name, commit = model.config.backbone_name_or_path, model.config.backbone_revision
    return "reference" if name and commit and not os.path.isdir(name) else "full"


def versions() -> dict[str, str]:
    """Of Python and of the libraries that decide a figure."""
    names = ("tscir", "torch", "transformers", "peft", "datasets", "numpy", "pillow", "safetensors")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # code from the Hub runs without the package
            continue
    return found


def write_repository(
    folder: str | os.PathLike,
    model,
    processor=None,
    *,
    repo_id: str | None = None,
    backbone: str | None = None,
    licence: str | None = None,
    training: str | os.PathLike | None = None,
    results: Sequence[str | os.PathLike] = (),
    benchmark_datasets: Mapping[str, str] | None = None,
    examples: Sequence[tuple[str, str]] = (),
) -> list[Path]:
    """Write everything that a repository of this model holds.

    Args:
        folder: new or empty.
        model, processor: a [`TSCIRModel`] and its [`TSCIRProcessor`].
        repo_id (`str`): its name on the Hub, for the card's calls.
        backbone (`str`): "reference" or "full"; `default_form` unless told.
        licence (`str`): the Hub's name of one; that of known backbones unless told, else "other".
        training: the folder that training wrote, for its record; the model's own unless told.
        results: results.json files that the evaluation scripts wrote for this very model.
        benchmark_datasets: the Hub's dataset by a benchmark's name ("cirr"), for `.eval_results`.
        examples: pictures' paths and texts, shown on the model's page.

    Returns:
        The files written, relative to `folder`.

    Raises:
        ValueError: for results of another model, of a training-free method, or that cannot be read; for a picture
            that cannot be read; for the reference form of a backbone that is on no Hub.
    """
    folder = Path(folder)
    form = backbone or default_form(model)
    config = model.config
    known = public(config.backbone_name_or_path, config.backbone_revision)
    if form == "reference" and known is None:
        raise ValueError(
            f"nobody else could fetch the backbone {config.backbone_name_or_path!r} (commit "
            f"{config.backbone_revision}); publish in full form, or train on one that is on the Hub"
        )
    read = [read_results(path, model) for path in results]
    for picture, _ in examples:
        load_image(picture)
    model.save_pretrained(folder, backbone=form)
    forget_local_paths(folder, known)
    if processor is not None:
        processor.save_pretrained(folder)
    recorded = training_records(training or model.name_or_path)
    if recorded:
        (folder / "training_arguments.json").write_text(json.dumps(recorded, indent=2), encoding="utf-8")
    widget = []
    for number, (picture, text) in enumerate(examples):
        (folder / "examples").mkdir(exist_ok=True)
        name = f"{number}{Path(picture).suffix}"
        shutil.copy(picture, folder / "examples" / name)
        widget.append({"src": f"examples/{name}", "text": text})
    entries = eval_entries(read, benchmark_datasets or {})
    if entries:
        import yaml

        (folder / ".eval_results").mkdir(exist_ok=True)
        text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
        (folder / ".eval_results" / "tscir.yaml").write_text(text, encoding="utf-8")
    card = model_card(model, repo_id or folder.name, form, licence, recorded, read, widget)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def upload_repository(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
):
    """Create the repository if need be and commit the folder to it, with weights of another form removed.

    Returns:
        `huggingface_hub`'s CommitInfo.
    """
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    here = {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}
    try:
        there = api.list_repo_files(repo_id, revision=None if create_pr else revision)
    except OSError:  # a new branch of an empty repository
        there = []
    stale = [name for name in there if name not in here and any(fnmatch.fnmatch(name, kind) for kind in WEIGHTS)]
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=commit_message or "Upload TSCIR model",
        create_pr=create_pr,
        delete_patterns=stale or None,
    )


def forget_local_paths(folder: Path, backbone: str | None) -> None:
    """Take out of the configurations what names folders of this machine."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["backbone_name_or_path"] = backbone
    for part in (config, config["clip_config"]):
        if "_name_or_path" in part:
            part["_name_or_path"] = backbone or ""
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in folder.glob("adapters/*/adapter_config.json"):
        config = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": backbone}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def public(name: str | None, commit: str | None) -> str | None:
    """A backbone's name if others can find it."""
    return name if name and commit and not os.path.isdir(name) else None


def training_records(folder: str | os.PathLike | None) -> dict:
    """What training wrote about itself and the stage before it, without this machine's folders."""
    path = Path(folder or "") / "training_arguments.json"
    if not path.is_file():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    record |= emissions(path.parent)
    return without_folders(record)


def without_folders(record: dict) -> dict:
    shortened = {}
    for name, value in record.items():
        if name == "previous_stage":
            value = without_folders(value)
        elif name in PATHS and isinstance(value, str) and not (name in NAMES and ON_HUB.fullmatch(value)):
            value = os.path.basename(os.path.normpath(value))
        shortened[name] = value
    return shortened


def emissions(folder: Path) -> dict:
    """Kilograms of CO2 equivalents, where codecarbon left its emissions.csv."""
    path = folder / "emissions.csv"
    if not path.is_file():
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        return {"co2_kg": sum(float(row["emissions"]) for row in csv.DictReader(file))}


def read_results(path: str | os.PathLike, model) -> dict:
    """A results.json of this very model."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        fingerprint, method, benchmark = found["model"]["trained_fingerprint"], found["method"], benchmark_of(found)
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise ValueError(f"{path} is no results.json of an evaluation script: {error!r}") from error
    if method != "tscir" and model.config.stage > 0:
        raise ValueError(f"{path} has figures of method {method!r}, not of the trained model")
    if fingerprint != model.trained_fingerprint() or found["model"]["backbone_fingerprint"] not in (
        None,
        model.config.backbone_fingerprint,
    ):
        raise ValueError(f"{path} has figures of another model ({found['model']['name_or_path']}); evaluate this one")
    return found | {"benchmark": benchmark}


def benchmark_of(results: dict) -> str:
    """ "cirr" and the like, from the name of its number of queries."""
    ending = "_num_queries"
    return min((name.removesuffix(ending) for name in results if name.endswith(ending)), key=len)


def metrics_of(results: dict) -> dict[str, float]:
    own = results["benchmark"] + "_"
    return {k.removeprefix(own): v for k, v in results.items() if k.startswith(own) and isinstance(v, float)}


def eval_entries(results: Sequence[dict], datasets: Mapping[str, str]) -> list[EvalResultEntry]:
    """For `.eval_results`, of benchmarks whose dataset on the Hub is known: the primary metric, in percent."""
    return [
        EvalResultEntry(
            dataset_id=datasets[found["benchmark"]],
            task_id=f"{found['benchmark']}_{found['protocol']['split']}",
            value=round(100 * found[found["primary_metric"]], 2),
            notes=found["primary_metric"],
        )
        for found in results
        if found["benchmark"] in datasets and found["primary_metric"]
    ]


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
        notes.append(f"- {found['benchmark']}: {protocol}; weight {found['weight']}.")
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
    offset = config.stage - len(stages)
    for number, stage in enumerate(stages, start=1 + max(0, offset)):
        shown = [f"{name} {stage[name]}" for name in SHOWN if stage.get(name) not in (None, -1)]
        lines.append(f"Stage {'I' * number}: {', '.join(shown)}.")
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
