"""A model as a complete Hub repository: weights, code, processor, and a card filled from what training and evaluation
wrote down."""

import contextlib
import csv
import json
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from huggingface_hub import EvalResultEntry, HfApi, eval_result_entries_to_yaml
from transformers.utils import cached_file

from .images import load_image
from .model_card import ON_HUB, model_card, public


RECORD = "training_arguments.json"
NAMES = ("model_name_or_path", "dataset_name")  # of folders, or on the Hub
PATHS = (*NAMES, "output_dir", "feature_cache_dir", "resume_from_checkpoint", "config")
FOLDERS = re.compile(  # absolute, before a file's name: within quotes, or up to what training says behind a path
    r"""(['"])(?:/|[A-Za-z]:[\\/])(?:\\\1|(?!\1).)*[/\\]"""
    r"""|(?<![\w.:/'"])(?:/|[A-Za-z]:[\\/])(?:(?!, (?:row|key|sample) ).)*[/\\]"""
)
WRITTEN = re.compile(  # what a repository no longer has once a publication does not bring it
    r".*\.safetensors(\.index\.json)?|adapters/.*|\.eval_results/tscir\.yaml|training_arguments\.json"
    r"|examples/\d+(\.\w+)?"
)


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
        training: the folder that training wrote, for its record; the model's own unless told, on the Hub too.
        results: results.json files that the evaluation scripts wrote for this very model.
        benchmark_datasets: the Hub's dataset by a benchmark's name ("cirr"), for `.eval_results`.
        examples: pictures' paths and texts, shown on the model's page.

    Returns:
        The files written, relative to `folder`.

    Raises:
        ValueError: for results of another model, of a training-free method, or that cannot be read; for a dataset of a
            benchmark without results; for a picture or a record of the training that cannot be read; for the reference
            form of a backbone that is on no Hub.
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
    benchmarks = sorted({found["benchmark"] for found in read})
    if unused := sorted(set(benchmark_datasets or {}) - set(benchmarks)):
        raise ValueError(f"a dataset is named for {unused}, but results are of {benchmarks or 'no benchmark'}")
    # Of a model that was loaded from the Hub its own is there.
    recorded = training_records(training or model.name_or_path, None if training else model.hub_commit)
    for picture, _ in examples:
        try:
            load_image(picture)
        except ValueError as error:
            raise ValueError(f"example picture {picture}: {error}") from error
    model.save_pretrained(folder, backbone=form)
    forget_local_paths(folder, known)
    if processor is not None:
        processor.save_pretrained(folder)
    if recorded:
        (folder / RECORD).write_text(json.dumps(recorded, indent=2), encoding="utf-8")
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
    """Create the repository if need be and commit the folder to it; what was published before and is not now, such as
    weights of another form or figures of another model, is removed.

    Returns:
        `huggingface_hub`'s CommitInfo.

    Raises:
        ValueError: if `private` and the repository is there already and public.
    """
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.repo_info(repo_id).private:
        raise ValueError(
            f"{repo_id} is there already, and public: nothing was uploaded; make it private there, or name another"
        )
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    here = {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}
    try:
        there = api.list_repo_files(repo_id, revision=None if create_pr else revision)
    except OSError:  # a new branch of an empty repository
        there = []
    stale = [name for name in there if name not in here and WRITTEN.fullmatch(name)]
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


def training_records(folder: str | os.PathLike | None, commit: str | None = None) -> dict:
    """What training wrote about itself and the stage before it, without this machine's folders; as `read_record`."""
    if not folder:  # else a model that was never saved would have what lies in the working directory
        return {}
    record = read_record(folder, commit)
    return {} if record is None else without_folders(record | emissions(Path(folder)))


def read_record(name: str | os.PathLike, commit: str | None = None) -> dict | None:
    """`training_arguments.json` of a folder, or of a Hub repository at a commit; None where there is none.

    Raises:
        ValueError: if it is damaged.
    """
    path = os.path.join(name, RECORD)
    if commit is not None and not os.path.isdir(name):
        with contextlib.suppress(OSError):  # as of a repository that is gone by now, or without a connection
            path = cached_file(name, RECORD, revision=commit, _raise_exceptions_for_missing_entries=False)
    if path is None or not os.path.isfile(path):
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def without_folders(record: dict) -> dict:
    shortened = {}
    for name, value in record.items():
        if name == "previous_stage":
            value = without_folders(value)
        elif name in PATHS and isinstance(value, str) and not (name in NAMES and ON_HUB.fullmatch(value)):
            value = os.path.basename(os.path.normpath(value))
        elif name == "skipped_images":
            value = [[FOLDERS.sub(r"\1", text) for text in skipped] for skipped in value]
        shortened[name] = value
    return shortened


def emissions(folder: Path) -> dict:
    """Kilograms of CO2 equivalents, where codecarbon left its emissions.csv."""
    path = folder / "emissions.csv"
    if not path.is_file():
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        try:
            return {"co2_kg": sum(float(row["emissions"]) for row in csv.DictReader(file))}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} has no number in column emissions, as codecarbon writes it: {error!r}"
            ) from error


def read_results(path: str | os.PathLike, model) -> dict:
    """A results.json of this very model."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        fingerprint, method, benchmark = found["model"]["trained_fingerprint"], found["method"], benchmark_of(found)
    except OSError as error:
        told = f"{path} cannot be read: {error.strerror}; name the results.json that an evaluation script wrote"
        raise ValueError(told) from error
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise ValueError(
            f"{path} is no results.json of one evaluation script ({error!r}); eval/run_all.py writes those into a "
            "folder for each benchmark"
        ) from error
    if method != "tscir" and model.config.stage > 0:
        raise ValueError(f"{path} has figures of method {method!r}, not of the trained model")
    loaded_in = (None, torch.bfloat16, torch.float16)  # whichever it was evaluated in
    if fingerprint not in map(model.trained_fingerprint, loaded_in) or found["model"]["backbone_fingerprint"] not in (
        None,
        model.config.backbone_fingerprint,
    ):
        raise ValueError(f"{path} has figures of another model ({found['model']['name_or_path']}); evaluate this one")
    return found | {"benchmark": benchmark}


def benchmark_of(results: dict) -> str:
    """ "cirr" and the like, from the name of its number of queries."""
    ending = "_num_queries"
    return min((name.removesuffix(ending) for name in results if name.endswith(ending)), key=len)


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
