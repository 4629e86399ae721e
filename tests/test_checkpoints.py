import pytest
from checkpoints import find_checkpoint, list_checkpoints


def test_only_whole_checkpoints_are_found_the_newest_last(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint"):
        find_checkpoint(str(tmp_path), "latest")
    for name in ("checkpoint-20", "checkpoint-100", "unfinished-checkpoint-200", "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert [p.name for p in list_checkpoints(str(tmp_path))] == ["checkpoint-20", "checkpoint-100"]
    assert find_checkpoint(str(tmp_path), "latest").name == "checkpoint-100"
    with pytest.raises(ValueError, match=r"gone is no checkpoint$"):
        find_checkpoint(str(tmp_path), str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"is no checkpoint; the newest below it is .*checkpoint-100$"):
        find_checkpoint(str(tmp_path), str(tmp_path))
