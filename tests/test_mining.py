"""Which negatives are mined, when, and for which batches."""

import pytest
import stage2 as stage2_script
import torch
from arguments import DataArguments
from datasets import Image as ImageFeature
from datasets import load_dataset
from mining import Miner

from modeling_tscir.adapters import lora_layers


def test_where_all_rows_have_one_target_nothing_is_mined(stage2):
    class Same(torch.utils.data.Dataset):
        target_ids, target_embeds = torch.zeros(4, dtype=torch.long), torch.randn(4, 24)

    miner = Miner(Same(), stage2, refresh=1)
    assert miner.mine([0, 1], 2, 0.9) == {} and miner.negatives(torch.tensor([0])) == {}


def test_every_step_is_of_as_many_batches(launch, stage1_folder, tmp_path, monkeypatch):
    """Also in the first step behind an epoch whose last batch ended one."""
    taken, real = [], stage2_script.Miner.negatives
    monkeypatch.setattr(Miner, "__call__", lambda self, step: taken.append(0) or {})
    monkeypatch.setattr(
        Miner, "negatives", lambda self, rows: taken.__setitem__(-1, taken[-1] + 1) or real(self, rows)
    )
    flags = ["--gradient_accumulation_steps", 2, "--per_device_train_batch_size", 6, "--max_steps", 7]
    launch(stage2_script, stage1_folder, tmp_path / "a", *flags)
    assert taken == [2] * 7


def test_that_nothing_will_be_mined_is_said(launch, stage1_folder, tmp_path, caplog):
    flags = ["--max_steps", 3, "--hard_negative_refresh"]
    launch(stage2_script, stage1_folder, tmp_path / "a", *flags, 3)
    assert "mines nothing: the first mining comes after 3 steps, and the run has 3" in caplog.text
    caplog.clear()
    launch(stage2_script, stage1_folder, tmp_path / "b", *flags, 2)
    launch(stage2_script, stage1_folder, tmp_path / "c", *flags, 3, "--mined_negative_weight", 0)
    assert "mines nothing" not in caplog.text


def test_no_steps_between_two_minings_are_refused_before_anything_is_read(launch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        launch(stage2_script, tmp_path / "nowhere", tmp_path / "out", "--hard_negative_refresh", 0)
    assert "--hard_negative_refresh must be at least 1, not 0" in capsys.readouterr().err


@pytest.fixture
def dataset(data, stage2, processor):
    rows = load_dataset(str(data / "triplets"), split="train")
    for column in ("reference", "target"):
        rows = rows.cast_column(column, ImageFeature(decode=False))
    return stage2_script.Stage2Data(rows, stage2, processor, DataArguments(), stage2_script.Stage2Arguments())


def test_adapters_drop_nothing_while_they_mine_and_go_on_dropping(dataset, stage2):
    for layer in lora_layers(stage2.clip.text_model):
        layer.lora_dropout["default"] = torch.nn.Dropout(0.5)
    miner, rows = Miner(dataset, stage2, refresh=1), list(range(24))
    miner.mine(rows, count=5, ceiling=2.0)
    assert not stage2.training
    expected = miner.mined
    stage2.train()
    miner.mine(rows, count=5, ceiling=2.0)
    assert torch.equal(miner.mined, expected) and stage2.training


def test_a_target_of_several_rows_is_no_negative_of_any_of_them(dataset, stage2):
    """Whatever the ceiling; and it stands among the others' once."""
    dataset.target_ids = torch.arange(24) // 3 * 3
    dataset.target_embeds = dataset.target_embeds[dataset.target_ids]
    miner = Miner(dataset, stage2, refresh=1)
    miner.mine(list(range(24)), count=5, ceiling=2.0)
    assert miner.mask.all()
    for own, mined in zip(dataset.target_ids.tolist(), dataset.target_ids[miner.mined].tolist(), strict=True):
        assert own not in mined and len(set(mined)) == 5


def test_mined_negatives_are_the_nearest_wrong_targets(dataset, stage2):
    miner = Miner(dataset, stage2, refresh=1, batch_size=5)
    assert miner.negatives(torch.tensor([0])) == {}
    targets = dataset.target_embeds
    ceiling = float((targets @ targets.T).fill_diagonal_(-1).median()) + 1e-5
    counted = miner.mine(list(range(24)), count=3, ceiling=ceiling)
    batch = dataset.__getitems__(list(range(24)))
    with torch.no_grad():
        queries = stage2.encode_with_pseudo_words(batch["input_ids"], batch["pseudo_mask"], batch["pseudo_words"])
    dropped = 0
    for row in range(24):
        nearest = [j for j in (queries[row] @ targets.T).argsort(descending=True).tolist() if j != row][:6]
        dropped += sum(bool(targets[j] @ targets[row] > ceiling) for j in nearest)
        allowed = [j for j in nearest if targets[j] @ targets[row] <= ceiling][:3]
        assert [
            j for j, used in zip(miner.mined[row].tolist(), miner.mask[row].tolist(), strict=True) if used
        ] == allowed
    assert not miner.mask.all()
    assert counted == {"mined_dropped": dropped, "mined_dropped_share": pytest.approx(dropped / (24 * 6))}
