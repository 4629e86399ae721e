"""A trained folder becomes a Hub repository and comes back from it: the real client, against a Hub on loopback."""

import copy
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT
from fake_hub import FakeHub
from huggingface_hub import ModelCard
from test_remote_code import SCRIPT as WITHOUT_PACKAGE

from modeling_tscir import ComposedImageRetrievalPipeline, TSCIRModel
from modeling_tscir.model_card import licence_of
from modeling_tscir.publishing import default_form, read_results, training_records, write_repository


PREPARE = """
import sys, torch
from huggingface_hub import HfApi
from modeling_tscir import MINIATURE_CHECKPOINT, ComposedImageRetrievalPipeline, TSCIRModel, TSCIRProcessor
clip, = sys.argv[1:]
api = HfApi()
api.create_repo("alice/clip")
commit = api.upload_folder(repo_id="alice/clip", folder_path=clip).oid
model = TSCIRModel.from_clip_pretrained("alice/clip", num_pseudo_words=2, lora_rank=4)
assert model.config.backbone_revision == commit
torch.manual_seed(3)
for add in (model.add_mapper, model.add_adapters):
    add()
    for parameter in model.trainable_parameters().values():
        parameter.data += 0.1 * torch.randn(parameter.shape)
model.save_pretrained("trained", backbone="reference")
TSCIRProcessor.from_clip_pretrained("alice/clip", num_pseudo_words=2).save_pretrained("trained")
"""
PUSH = """
import sys, torch
from huggingface_hub import HfApi
from transformers import pipeline
import modeling_tscir
from modeling_tscir import MINIATURE_CHECKPOINT, ComposedImageRetrievalPipeline, TSCIRModel, TSCIRProcessor
model, processor = TSCIRModel.from_pretrained("trained"), TSCIRProcessor.from_pretrained("trained")
model.push_to_hub("alice/both", processor=processor, backbone="full")
model.push_to_hub("alice/both", processor=processor)  # the other form takes the first one's place
processor.push_to_hub("alice/parts")
pipeline("composed-image-retrieval", model="trained").push_to_hub("alice/pipe", revision="trial", backbone="full")
again = TSCIRModel.from_pretrained("alice/both")
for (name, mine), (_, theirs) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
    assert torch.equal(mine, theirs), name
model.save_adapter("adapter")
HfApi().create_repo("alice/adapter")
HfApi().upload_folder(repo_id="alice/adapter", folder_path="adapter")
again.load_adapter("alice/adapter", "fetched")
assert torch.equal(*(layer.weight for layer in again.clip.text_model.encoder.layers[0].mlp.fc1.lora_B.values()))
elsewhere = TSCIRModel.from_pretrained("alice/both", backbone=sys.argv[1])
assert torch.equal(elsewhere.clip.text_projection.weight, model.clip.text_projection.weight)
"""
PUBLISH = """
import sys
import torch
import publish
from huggingface_hub import HfApi
from modeling_tscir import TSCIRModel
for flags in (["--dry_run", "dry"], []):
    sys.argv = ["publish.py", "trained", "--repo_id", "alice/model", "--private", *flags]
    publish.main()
print("COMMIT", HfApi().model_info("alice/model").sha)
model = TSCIRModel.from_pretrained("trained")
for parameter in model.mapper.parameters():
    parameter.data += 0.3 * torch.randn(parameter.shape)
model.save_pretrained("trained", backbone="reference")
publish.main()
for token in (False, "hf_bob"):
    try:
        TSCIRModel.from_pretrained("alice/model", token=token, cache_dir="empty")
    except (OSError, ValueError) as error:
        print("REFUSED", str(error).splitlines()[0])
    else:
        raise SystemExit("a private repository was read")
"""
REMOTE = (
    WITHOUT_PACKAGE.split("from transformers import")[0]
    + """
from transformers import AutoModel, pipeline
pictures, revision = sys.argv[1:]
for chosen in ("main", revision):
    cir = pipeline("composed-image-retrieval", model="alice/model", revision=chosen, trust_remote_code=True)
    model = AutoModel.from_pretrained("alice/model", revision=chosen, trust_remote_code=True)
    assert model.trained_fingerprint() == cir.model.trained_fingerprint()
    cir.index(pictures)
    found = cir(image=str(Path(pictures) / "0.png"), text="that is red")
    print(json.dumps([[r["id"], r["score"]] for r in found]))
"""
)


@pytest.fixture(scope="module")
def prepared(clip_dir, tmp_path_factory):
    """A Hub that holds alice's CLIP, and a folder with a model trained on it."""
    folder = tmp_path_factory.mktemp("prepared")
    with FakeHub() as hub:
        run_in(folder, hub, "-c", PREPARE, clip_dir)
        yield hub, folder


@pytest.fixture
def hub(prepared):
    """A Hub as prepared, whatever was done to it before."""
    hub, _ = prepared
    kept = copy.deepcopy(hub.repos)
    yield hub
    hub.repos = kept


@pytest.fixture
def run(hub, prepared, tmp_path):
    """A fresh process of its own home and working directory; with the package, from this checkout, unless told."""
    shutil.copytree(prepared[1] / "trained", tmp_path / "trained")
    return functools.partial(run_in, tmp_path, hub)


def run_in(folder, hub, *command, home="home", package=True, token="hf_alice"):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHONPATH"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "train")])} if package else {}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_nothing_private_goes_to_a_repository_that_is_public(run, hub):
    said = run("-c", """
import sys
import publish
from huggingface_hub import HfApi
HfApi().create_repo("alice/open")
sys.argv = ["publish.py", "trained", "--repo_id", "alice/open", "--private"]
try:
    publish.main()
except (SystemExit, ValueError) as error:
    print("REFUSED", error)
""")  # fmt: skip
    assert "REFUSED" in said and "alice/open is there already, and public: nothing was uploaded" in said
    assert list(hub.files("alice/open")) == [".gitattributes"]


def test_the_round_trip(run, hub, clip_dir, processor, picture_folder, tmp_path):
    trained = TSCIRModel.from_pretrained(tmp_path / "trained", backbone=clip_dir)
    cir = ComposedImageRetrievalPipeline(model=trained, processor=processor).index(picture_folder)
    expected = cir(image=picture_folder / "0.png", text="that is red")
    said = run("-c", PUBLISH)
    assert "in reference form (the backbone is on the Hub" in said and "Nothing was uploaded" in said
    first = next(line.split()[1] for line in said.splitlines() if line.startswith("COMMIT"))
    refused = [line for line in said.splitlines() if line.startswith("REFUSED")]
    assert len(refused) == 2 and all("alice/model" in line for line in refused)
    assert hub.repos["alice/model"].private and hub.repos["alice/model"].branches["main"] != first
    there = hub.files("alice/model", first)
    dry = {str(p.relative_to(tmp_path / "dry")): p.read_bytes() for p in (tmp_path / "dry").rglob("*") if p.is_file()}
    assert {k: v for k, v in there.items() if k != ".gitattributes"} == dry
    assert {"README.md", "config.json", "tscir_delta.safetensors", "processor_config.json", "tokenizer.json",
            "modeling_tscir.py", "pipeline_tscir.py", "publishing.py"} <= there.keys()  # fmt: skip
    assert not any(name.startswith("model.safetensors") for name in there)
    assert all(f"{len(content):,}  {name}" in said for name, content in dry.items())
    assert str(tmp_path).encode() not in there["config.json"] + there["README.md"]
    # Without the package, from an empty cache: the newest, and the first by its commit.
    answers = run("-c", REMOTE, picture_folder, first, home="empty", package=False).splitlines()
    newest, pinned = (json.loads(answer) for answer in answers[-2:])
    assert [name for name, _ in pinned] == [r["id"] for r in expected]
    assert [score for _, score in pinned] == pytest.approx([r["score"] for r in expected], abs=1e-5)
    assert newest != pinned


def test_pushing_from_python(run, hub, clip_dir):
    run("-c", PUSH, clip_dir)
    both = hub.files("alice/both")
    assert "tscir_delta.safetensors" in both and "model.safetensors" not in both and "tokenizer.json" in both
    before = hub.repos["alice/both"].commits
    assert any("model.safetensors" in files for files in before.values())  # history has it
    assert "processor_config.json" in hub.files("alice/parts")
    pipe = hub.repos["alice/pipe"]
    assert "model.safetensors" in hub.files("alice/pipe", "trial") and set(pipe.branches) == {"main", "trial"}
    assert "README.md" not in hub.files("alice/pipe")
    # The backbone's history is rewritten: the commit is gone, the weights are not.
    clip = hub.repos["alice/clip"]
    files = clip.commits.pop(clip.branches["main"])
    clip.commits, clip.branches = {}, {}
    clip.commit("main", files | {"note.txt": b"new history"})
    loading = "from modeling_tscir import TSCIRModel; TSCIRModel.from_pretrained('alice/both')"
    run("-c", loading, home="fresh")


def test_what_was_said_of_an_earlier_model_goes_with_its_weights(run, hub, tmp_path):
    ours = {".eval_results/tscir.yaml", "training_arguments.json", "examples/0.png", "examples/12.jpg"}
    others = {".eval_results/others.yaml", "examples/first.png", "examples/0/0.png", "notes/training_arguments.json"}
    for path in (tmp_path / "earlier" / name for name in ours | others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"seed": 1}', "utf-8")
    pushing = "import huggingface_hub as hub, modeling_tscir as m; hub.create_repo(n := 'alice/{}'); "
    pushing += "hub.upload_folder(repo_id=n, folder_path='earlier'); m.TSCIRModel.from_pretrained('trained')"
    run("-c", f"{pushing.format('none')}.push_to_hub(n)")
    assert (ours | others) & hub.files("alice/none").keys() == others
    run("-c", f"{pushing.format('record')}.push_to_hub(n, training='earlier/notes')")
    assert ours & hub.files("alice/record").keys() == {"training_arguments.json"}  # its own


def results(model) -> dict:
    described = {"name_or_path": "x", "trained_fingerprint": model.trained_fingerprint(), "backbone_fingerprint": None}
    return {
        "cirr_recall_at_1": 0.25, "cirr_recall_at_10": 0.5, "cirr_num_queries": 1200, "cirr_num_gallery_images": 9,
        "primary_metric": "cirr_recall_at_1", "method": "tscir", "weight": 0.0, "model": described,
        "protocol": {"split": "val", "dtype": "float32", "preprocessing": {}}, "skipped_images": ["a"],
        "published_counts": {"cirr": {"same": False, "queries": 4181, "gallery_images": 2297}},
        "versions": {"torch": "9.9"},
    }  # fmt: skip


def test_the_card_says_what_runs_wrote(stage2, processor, picture_folder, tmp_path, monkeypatch):
    record = {"dataset_name": "someone/triplets", "model_name_or_path": str(tmp_path), "learning_rate": 1e-3,
              "modification_column": "modification",
              "hours": 1.5, "hardware": "2 x Some GPU", "versions": {"torch": "9.9"}, "skipped_images": [],
              "previous_stage": {"dataset_name": str(tmp_path / "captions"), "seed": 7}}  # fmt: skip
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "training_arguments.json").write_text(json.dumps(record), "utf-8")
    (trained / "emissions.csv").write_text("duration,emissions\n1,0.25\n2,0.5\n", "utf-8")
    (tmp_path / "results.json").write_text(json.dumps(results(stage2)), "utf-8")
    out = tmp_path / "out"
    files = write_repository(
        out, stage2, processor, repo_id="me/model", training=trained, results=[tmp_path / "results.json"],
        benchmark_datasets={"cirr": "someone/cirr"}, examples=[(str(picture_folder / "0.png"), "in red")],
        licence="mit",
    )  # fmt: skip
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "mit" and card.data.datasets == ["someone/triplets"]
    assert card.data.to_dict()["widget"] == [{"src": "examples/0.png", "text": "in red"}]
    assert card.data.to_dict()["co2_eq_emissions"] == {"emissions": 750.0}
    found = {(r.dataset_type, r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found == {("cirr", "val", "recall_at_1"): 0.25, ("cirr", "val", "recall_at_10"): 0.5}
    for said in ("| cirr | val | 1,200 | recall_at_1 | 25.00 |", "Stage I: dataset_name captions, seed 7.", "0.75 kg",
                 "1.50 hours on 2 x Some GPU", "Stage II: dataset_name someone/triplets", "published numbers",
                 'model="me/model", trust_remote_code=True', "1 unreadable pictures were skipped"):  # fmt: skip
        assert said in card.text, said
    assert str(tmp_path) not in (out / "README.md").read_text("utf-8") + (out / "config.json").read_text("utf-8")
    entries = yaml.safe_load((out / ".eval_results/tscir.yaml").read_text("utf-8"))
    assert entries[0]["dataset"] == {"id": "someone/cirr", "task_id": "cirr_val"} and entries[0]["value"] == 25.0
    assert {str(f) for f in files} >= {"examples/0.png", ".eval_results/tscir.yaml", "training_arguments.json"}
    monkeypatch.chdir(trained)  # whose record is not that of a model without a folder
    bare = write_repository(tmp_path / "bare", stage2)
    card = (tmp_path / "bare/README.md").read_text("utf-8")
    assert "No figures were given" in card and "no record of its training" in card and "license: other" in card
    assert not any(str(f).startswith((".eval_results", "examples")) for f in bare)


def test_a_stage_that_was_trained_twice_is_not_a_third(stage2, tmp_path):
    first = {"dataset_name": "captions", "caption_column": "caption"}
    second = {"dataset_name": "few", "modification_column": "text", "previous_stage": first}
    record = {"dataset_name": "more", "modification_column": "text", "previous_stage": second}
    (tmp_path / "training_arguments.json").write_text(json.dumps(record), "utf-8")
    write_repository(tmp_path / "out", stage2, training=tmp_path)
    card = (tmp_path / "out/README.md").read_text("utf-8")
    places = [card.index(f"Stage {said}.") for said in
              ("I: dataset_name captions", "II: dataset_name few", "II: dataset_name more")]  # fmt: skip
    assert places == sorted(places) and "Stage III" not in card


def test_local_names_stay_here(stage2, processor, picture_folder, clip_dir, tmp_path):
    stage2.save_adapter(tmp_path / "adapter")
    stage2.load_adapter(tmp_path / "adapter", "again")
    record = {
        "dataset_name": "secret/project/shards/*.tar",
        "model_name_or_path": "runs/secret",
        "output_dir": "a/secret",
    }
    record["previous_stage"] = {"dataset_name": "secret/data.parquet", "model_name_or_path": "/home/secret"}
    (tmp_path / "training_arguments.json").write_text(json.dumps(record), "utf-8")
    with pytest.raises(ValueError, match="nobody else could fetch"):
        write_repository(tmp_path / "out", stage2, backbone="reference")
    assert not (tmp_path / "out").exists()
    examples = [(str(picture_folder / "0.png"), "a"), (str(picture_folder / "below/1.png"), "b")]
    shutil.copy(examples[1][0], picture_folder / "below/0.png")
    examples[1] = (str(picture_folder / "below/0.png"), "b")
    write_repository(tmp_path / "out", stage2, processor, training=tmp_path, examples=examples)
    for path in (tmp_path / "out").rglob("*.json"):
        text = path.read_text("utf-8")
        assert not any(str(folder) in text for folder in (tmp_path, clip_dir)), path
        assert "secret/" not in text.replace("runs/secret", ""), path
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.datasets is None and len({entry["src"] for entry in card.data.to_dict()["widget"]}) == 2
    again = TSCIRModel.from_pretrained(tmp_path / "out")
    assert again.adapter_names == ["default", "again"]
    with pytest.raises(ValueError, match="example picture .*: missing"):
        write_repository(tmp_path / "more", stage2, examples=[(str(tmp_path / "none.png"), "a")])


def test_figures_of_another_model_are_refused(stage2, tmp_path):
    path = tmp_path / "results.json"
    other = {"name_or_path": "x", "trained_fingerprint": "0", "backbone_fingerprint": None}
    for content, message in (
        (results(stage2) | {"method": "slerp"}, "method 'slerp'"),
        (results(stage2) | {"model": other}, "another model"),
        ({"cirr_recall_at_1": 1.0}, "no results.json"),
        ([], "no results.json"),
        ({"cirr": results(stage2)}, "eval/run_all.py writes those into a folder for each benchmark"),
    ):
        path.write_text(json.dumps(content), "utf-8")
        with pytest.raises(ValueError, match=message):
            read_results(path, stage2)
    stage2.save_pretrained(tmp_path / "model")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):  # which it may have been evaluated in
        found = results(TSCIRModel.from_pretrained(tmp_path / "model", dtype=dtype))
        path.write_text(json.dumps(found), "utf-8")
        assert read_results(path, stage2)["benchmark"] == "cirr"


def test_defaults(stage2):
    assert default_form(stage2) == "full"  # of a local folder
    stage2.config.backbone_name_or_path = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert default_form(stage2) == "full" and licence_of(stage2) == "mit"  # its commit is not known
    stage2.config.backbone_revision = "0" * 40
    assert default_form(stage2) == "reference"
    nameless = SimpleNamespace(config=SimpleNamespace(backbone_name_or_path=None))
    assert licence_of(nameless) == "other"


def test_the_script_refuses(model_dir, tmp_path, monkeypatch):
    import publish

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x", "utf-8")

    def damaged(name: str, content: str) -> Path:
        folder = shutil.copytree(model_dir, tmp_path / name)
        (folder / "training_arguments.json").write_text("{}", "utf-8")
        (folder / name).write_text(content, "utf-8")
        return folder

    for arguments, message in (
        ([tmp_path / "none", "--repo_id", "a/b"], "is not a folder"),
        ([model_dir, "--repo_id", "a"], "is user/name"),
        ([model_dir, "--repo_id", "a/b", "--dry_run", tmp_path / "full"], "file or not empty"),
        ([model_dir, "--repo_id", "a/b", "--dry_run", tmp_path / "full/x"], "file or not empty"),
        ([model_dir, "--repo_id", "a/b", "--results", "r.json"], "r.json cannot be read: No such file or directory; "),
        ([model_dir, "--repo_id", "a/b", "--results", tmp_path], "cannot be read: Is a directory; name the results"),
        ([model_dir, "--repo_id", "a/b", "--benchmark_dataset", "cirr"], "cirr=owner/name"),
        ([model_dir, "--repo_id", "a/b", "--benchmark_dataset", "cir=o/n"], r"named for \['cir'\], but .* no bench"),
        ([damaged("training_arguments.json", "{"), "--repo_id", "a/b"], "training_arguments.json is damaged"),
        ([damaged("emissions.csv", "co2\n3\n"), "--repo_id", "a/b"], "emissions.csv has no number in column emis"),
    ):
        monkeypatch.setattr(sys, "argv", ["publish.py", *map(str, arguments)])
        with pytest.raises(SystemExit, match=message):
            publish.main()


def test_without_a_connection_the_script_says_so(model_dir, monkeypatch):
    import publish

    def fail(*_, **__):
        raise publish.UNREACHABLE[-1]("Name or service not known")

    monkeypatch.setattr(publish, "upload_repository", fail)
    monkeypatch.setattr(sys, "argv", ["publish.py", str(model_dir), "--repo_id", "a/b"])
    with pytest.raises(SystemExit, match="the Hub cannot be reached: .*--dry_run FOLDER"):
        publish.main()


def test_what_training_records(launch, clip_dir, tmp_path):
    import stage1 as script
    import stage2 as second

    launch(script, clip_dir, tmp_path / "first", "--max_steps", 1)
    launch(second, tmp_path / "first", tmp_path / "second", "--max_steps", 1)
    record = json.loads((tmp_path / "second/training_arguments.json").read_text("utf-8"))
    assert 0 < record["hours"] < 1 and "CPU" in record["hardware"]
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["previous_stage"]["max_steps"] == 1 and "previous_stage" not in record["previous_stage"]


def test_what_was_skipped_names_no_folder(tmp_path):
    skipped = [["row 3, column image, /home/a/my photos/x.jpg", "[Errno 2] No such file: '/home/a/x.jpg'"],
               ["shard /data/3.tar, sample 1/2", "broken"],
               ["row 3, column image, /home/my, own/it's/x.jpg", "No such file: \"/home/it's,/x.jpg\""]]  # fmt: skip
    (tmp_path / "training_arguments.json").write_text(json.dumps({"skipped_images": skipped}), "utf-8")
    assert training_records(tmp_path)["skipped_images"] == [
        ["row 3, column image, x.jpg", "[Errno 2] No such file: 'x.jpg'"], ["shard 3.tar, sample 1/2", "broken"],
        ["row 3, column image, x.jpg", 'No such file: "x.jpg"'],
    ]  # fmt: skip
