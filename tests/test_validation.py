import json

import pytest
import stage1 as stage1_script
import stage2 as stage2_script
import torch
import torch.nn.functional as F
from arguments import DataArguments
from datasets import Dataset, Features, Image, Value
from safetensors.torch import load_file
from stage2 import Stage2Arguments
from validation import Validation

from modeling_tscir import TSCIRModel


class Given(torch.nn.Module):
    """An objective whose queries are in the batch."""

    target, reference, device = "targets", "references", torch.device("cpu")

    def frozen(self, batch):
        return batch

    def forward(self, features):
        return features["queries"]


def test_ranks_among_targets_and_references_of_others():
    """Three queries on a circle: the first finds its target, for the second another's reference is nearer."""
    angles = torch.deg2rad(torch.tensor([[0.0, 5, 0], [90, 100, 180], [200, 250, 210]]))  # query, target, reference
    points = torch.stack([angles.cos(), angles.sin()], dim=-1)
    points[1, 2] = points[2, 0]  # 200 degrees
    points[0, 2] = F.normalize(torch.tensor([[-0.1, 1.0]]))[0]  # near the second query
    batches = [{"queries": points[i : i + 2, 0], "targets": points[i : i + 2, 1], "references": points[i : i + 2, 2]}
               for i in (0, 2)]  # fmt: skip
    values = Validation(Given(), batches)()
    # Ranks 1, 2 (behind the first's reference) and 2 (behind the second's reference; its own is not ranked).
    assert values["validation_recall_at_1"] == pytest.approx(1 / 3)
    assert values["validation_recall_at_10"] == 1
    assert values["validation_mrr"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    assert values["validation_similarity"] == pytest.approx(float((points[:, 0] * points[:, 1]).sum(-1).mean()))


def test_a_picture_counts_once_however_its_embeddings_differ():
    """As those of a target and of the same picture as a reference do, in bf16 or in another batch."""
    images = F.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    row = torch.arange(6)
    told = {"queries": images, "targets": images, "references": images.roll(-1, 0) * (1 + 1e-6)}
    pictures = [*row.tolist(), *row.roll(-1).tolist()]
    values = Validation(Given(), [told], pictures)()
    assert values["validation_mrr"] == 1
    told["references"] = told["references"] * (1 + 1e-2)  # such a twin would stand before its picture
    assert Validation(Given(), [told], pictures)()["validation_mrr"] == 1
    assert Validation(Given(), [told])()["validation_mrr"] == 0.5


def test_captions_of_one_picture_are_held_out_together_and_ranked_as_one(launch, clip_dir, pictures, tmp_path):
    """Else what was trained on would choose the best weights, and a picture would stand before itself."""
    rows = {"image": [picture for picture in pictures for _ in range(4)], "caption": [f"red {i}" for i in range(24)]}
    rows = Dataset.from_dict(rows, features=Features({"image": Image(), "caption": Value("string")}))
    rows.to_parquet(tmp_path / "rows.parquet")
    seen, real = [], Validation.__init__

    def watched(self, objective, batches, pictures=None):
        real(self, objective, batches, pictures)
        seen.append((len(torch.cat([f["image_embeds"] for f in self.features])), pictures))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validation, "__init__", watched)
        launch(stage1_script, clip_dir, tmp_path / "a", "--max_steps", 1, "--validation_rows", 5,
               "--dataset_name", tmp_path / "rows.parquet")  # fmt: skip
    assert seen == [(8, [0, 0, 0, 0, 4, 4, 4, 4] * 2)]  # two pictures with all that is said of them


def test_held_out_pictures_are_told_apart(data):
    rows, _ = stage2_script.load_triplets(DataArguments(dataset_name=str(data / "triplets")), Stage2Arguments())
    pictures = stage2_script.pictures_of(rows, Stage2Arguments())
    assert [len(set(some)) for some in (pictures[:24], pictures[24:], pictures)] == [24, 6, 30]


def measured(err: str) -> dict[int, float]:
    lines = [line.split() for line in err.splitlines() if "validation_mrr" in line]
    return {int(w[w.index("step") + 1]): float(w[w.index("validation_mrr") + 1]) for w in lines}


@pytest.mark.parametrize("stage", [1, 2])
def test_the_best_weights_are_kept(launch, clip_dir, stage1, processor, tmp_path, capfd, stage):
    stage1.save_pretrained(tmp_path / "stage1", backbone="reference")
    processor.save_pretrained(tmp_path / "stage1")
    script, start = {1: (stage1_script, clip_dir), 2: (stage2_script, tmp_path / "stage1")}[stage]
    flags = ["--max_steps", 8, "--learning_rate", 0.05, "--per_device_train_batch_size", 4]
    flags += ["--validation_rows", 8, "--eval_steps", 2, "--save_steps", 2, "--save_total_limit", 20]
    last = launch(script, start, tmp_path / "out", *flags)
    values = measured(capfd.readouterr().err)
    assert list(values) == [2, 4, 6, 8]
    best = json.loads((tmp_path / "out/best/validation.json").read_text("utf-8"))
    assert best["validation_mrr"] == pytest.approx(max(values.values()), abs=0.005)
    folder = tmp_path / "out" if best["step"] == 8 else tmp_path / f"out/checkpoint-{best['step']}"
    kept, wanted = (load_file(f / "tscir_delta.safetensors") for f in (tmp_path / "out/best", folder))
    assert all(torch.equal(kept[k], wanted[k]) for k in wanted)
    assert TSCIRModel.from_pretrained(tmp_path / "out/best").config.stage == stage
    record = json.loads((tmp_path / "out/best/training_arguments.json").read_text("utf-8"))
    assert record["validation_rows"] == 8 and record["learning_rate"] == 0.05 and record["versions"]
    # How often it is looked at changes nothing; and a run that goes on knows what was best before.
    flags[flags.index("--eval_steps") + 1] = 3
    assert all(torch.equal(last[k], v) for k, v in launch(script, start, tmp_path / "b", *flags).items())
    flags[flags.index("--eval_steps") + 1] = 2
    (tmp_path / "out/best/validation.json").unlink()
    launch(script, start, tmp_path / "out", *flags, "--resume_from_checkpoint", tmp_path / "out/checkpoint-6")
    again = measured(capfd.readouterr().err)
    assert (tmp_path / "out/best/validation.json").exists() == (best["step"] == 8) and again[8] == values[8]
