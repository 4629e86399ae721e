"""Which columns stage II trains on: pictures, or captions where the data has no pictures."""

import pytest
import stage2 as stage2_script
from datasets import Dataset, load_dataset


TEXTS = {"reference_caption": [f"a red star {i // 4}" for i in range(24)], "modification": ["in blue"] * 24,
         "target_caption": [f"a blue star {i}" for i in range(24)]}  # fmt: skip


def test_captions_are_trained_on_where_a_target_has_no_picture(launch, stage1_folder, data, tmp_path):
    """And are never mixed with the pictures of the references alone."""
    rows = load_dataset(str(data / "triplets"), split="train").select_columns(["reference"])
    for name, values in TEXTS.items():
        rows = rows.add_column(name, values)
    rows.to_parquet(tmp_path / "some.parquet")
    Dataset.from_dict(TEXTS).to_parquet(tmp_path / "texts.parquet")
    flags = ["--max_steps", 2, "--validation_rows", 4, "--dataset_name"]
    of_texts, of_some = (
        launch(stage2_script, stage1_folder, tmp_path / name, *flags, tmp_path / f"{name}.parquet")
        for name in ("texts", "some")
    )
    assert all((of_some[name] == tensor).all() for name, tensor in of_texts.items())


@pytest.mark.parametrize("flag", ["--reference_column", "--target_column", "--reference_caption_column"])
def test_a_mistyped_column_does_not_train_on_others(launch, stage1_folder, data, tmp_path, flag):
    rows = load_dataset(str(data / "triplets"), split="train").remove_columns("modification")
    for name, values in TEXTS.items():
        rows = rows.add_column(name, values)
    rows.to_parquet(tmp_path / "both.parquet")
    flags = ["--max_steps", 1, "--dataset_name", tmp_path / "both.parquet"]
    with pytest.raises(ValueError, match=rf"{flag} photo: .*both\.parquet has no such column; it has \["):
        launch(stage2_script, stage1_folder, tmp_path / "out", *flags, flag, "photo")
    launch(stage2_script, stage1_folder, tmp_path / "captions", *flags, "--reference_column", "")
