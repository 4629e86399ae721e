"""What training wrote about itself stays with a model that comes from the Hub: when it is pushed, and trained on."""

import json

import stage1 as stage1_script
from conftest import ROOT
from fake_hub import FakeHub
from test_publish import run_in


PUSH = """
from huggingface_hub import HfApi
from modeling_tscir import TSCIRModel, TSCIRProcessor
processor = TSCIRProcessor.from_pretrained("one")
TSCIRModel.from_pretrained("one").push_to_hub("alice/one", processor=processor)
model = TSCIRModel.from_pretrained("alice/one")
HfApi().delete_file("training_arguments.json", "alice/one")  # as where another model takes its place
model.push_to_hub("alice/two", processor=processor)
again = TSCIRModel.from_pretrained("alice/two")
again.push_to_hub("alice/three", training="nowhere")
TSCIRModel.from_pretrained("alice/three").push_to_hub("alice/four")
"""


def test_a_model_from_the_hub_has_its_record(launch, clip_dir, data, tmp_path):
    launch(stage1_script, clip_dir, tmp_path / "one", "--max_steps", 1, "--seed", 7)
    with FakeHub() as hub:
        run_in(tmp_path, hub, "-c", PUSH)
        records = [json.loads(hub.files(f"alice/{name}").get("training_arguments.json", "{}"))
                   for name in ("two", "three", "four")]  # fmt: skip
        assert [record.get("seed") for record in records] == [7, None, None]
        assert b"Stage I: " in hub.files("alice/two")["README.md"] and records[0]["dataset_name"] == "captions"
        command = [ROOT / "train/stage2.py", "--model_name_or_path", "alice/two", "--output_dir", "stage2"]
        command += ["--dataset_name", data / "triplets", "--max_steps", 1, "--per_device_train_batch_size", 8]
        run_in(tmp_path, hub, *command)
    record = json.loads((tmp_path / "stage2/training_arguments.json").read_text("utf-8"))
    assert record["previous_stage"]["seed"] == 7 and record["model_name_or_path"] == "alice/two"
