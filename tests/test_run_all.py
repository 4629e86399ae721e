import json
import shutil

import harness
import pytest
import run_all
from test_circo import folder as circo_folder  # noqa: F401
from test_cirr import folder as cirr_folder  # noqa: F401
from test_fashioniq import folder as fashioniq_folder  # noqa: F401
from test_genecis import folder as genecis_folder  # noqa: F401


@pytest.fixture
def data(tmp_path, cirr_folder, circo_folder, fashioniq_folder, genecis_folder):  # noqa: F811
    return tmp_path


def run(data, model_dir, *flags):
    common = ["--model_name_or_path", model_dir, "--data_dir", data, "--cache_dir", data / "cache"]
    run_all.main(list(map(str, [*common, "--output_dir", data / "out", *flags])))


def test_one_command_gives_one_table(data, model_dir, capsys):
    run(data, model_dir)
    summary = json.loads((data / "out/results.json").read_text("utf-8"))
    text = (data / "out/table.md").read_text("utf-8")
    assert text in capsys.readouterr().out + "\n"
    for name, benchmark in run_all.BENCHMARKS.items():
        own = json.loads((data / f"out/{name}/results.json").read_text("utf-8"))
        assert summary["results"][name] == own
        assert f"{100 * own[benchmark.primary_metric]:.2f}" in text.splitlines()[2]
    assert "| LinCIR, public checkpoint | 25.40 | 12.75 | 26.10 |" in text
    assert all(row["source"] for row in summary["published"]["rows"])


def test_notes_tell_all_that_is_other_and_of_which_benchmark(data, model_dir):
    (data / "CIRR/dev/val-2.png").write_bytes(b"")
    run(data, model_dir, "--on_bad_image", "skip", "--residual", 0.5, "--weight", -0.1)
    notes = [line for line in (data / "out/table.md").read_text("utf-8").splitlines() if line.startswith("Note")]
    assert notes[:2] == [
        "Note: queries have 0.5 of what pseudo-words leave out of their pictures (--residual).",
        "Note: queries are moved by 0.1 towards their pictures (--weight).",
    ]
    assert len(notes) == len(set(notes)) and any(note.startswith("Note, cirr: 1 pictures were") for note in notes)
    run(data, model_dir, "--on_bad_image", "skip", "--method", "sum", "--weight", 0.6)
    assert "Note: the text's share in sum is 0.6 (--weight)." in (data / "out/table.md").read_text("utf-8")


def test_a_test_run_writes_the_submissions(data, model_dir):
    run(data, model_dir, "--split", "test", "--benchmarks", "cirr", "circo", "fashioniq")
    written = {str(path.relative_to(data / "out")) for path in (data / "out").rglob("*submission*")}
    assert written == {
        "cirr/recall_submission.json",
        "cirr/recall_subset_submission.json",
        "circo/submission.json",
    }


def test_all_that_is_missing_is_named_at_once(data, model_dir):
    shutil.rmtree(data / "CIRCO")
    (data / "GeneCIS/genecis/focus_object.json").unlink()
    message = r"(?s)circo: .* not found.*genecis: .*focus_object not found.*--benchmarks cirr"
    with pytest.raises(SystemExit, match=message):
        run(data, model_dir)
    assert not (data / "out").exists()
    run(data, model_dir, "--benchmarks", "fashioniq")
    assert "FashionIQ R@10" in (data / "out/table.md").read_text("utf-8")


def test_data_is_checked_without_a_model(data, capsys):
    run_all.main(["--data_dir", str(data), "--check_data"])
    printed = capsys.readouterr().out
    assert "genecis focus_object val: 2 queries, but published: 1960" in printed and "cirr val: 3 queries" in printed
    (data / "CIRR/dev/val-2.png").write_bytes(b"")
    (data / "FashionIQ/images/dress2.png").write_bytes(b"")
    (data / "FashionIQ/images/shirt2.png").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"(?s)cirr: .*val-2.*fashioniq: .*dress dress2.*shirt shirt2"):
        run_all.main(["--data_dir", str(data), "--check_data"])


def test_a_run_that_fails_leaves_no_table_of_another(data, model_dir):
    run(data, model_dir, "--benchmarks", "cirr")
    (data / "CIRR/dev/val-2.png").write_bytes(b"")
    with pytest.raises(SystemExit, match="cannot be read"):
        run(data, model_dir, "--benchmarks", "cirr", "--method", "text")
    assert not (data / "out/table.md").exists() and not (data / "out/results.json").exists()


def test_pictures_of_all_are_read_before_any_is_evaluated(data, model_dir):
    """And no benchmark's folder has another run's submission any more, where the run ends before it."""
    run(data, model_dir, "--split", "test", "--benchmarks", "cirr", "circo")
    (data / "CIRR/dev/test1-2.png").write_bytes(b"")
    (data / "GeneCIS/val2017/000000000003.jpg").write_bytes(b"")
    message = r"(?s)cirr: 1 of .*test1-2: empty.*genecis: 2 of .*3: empty.*--benchmarks circo fashioniq"
    with pytest.raises(SystemExit, match=message):
        run(data, model_dir, "--split", "test", "--method", "text")
    assert not [path for path in (data / "out").rglob("*") if path.is_file()]


def test_results_of_another_benchmark_are_not_replaced(data, model_dir, monkeypatch):
    run(data, model_dir, "--benchmarks", "cirr", "--split", "test")
    flags = ["--model_name_or_path", model_dir, "--data_dir", data / "CIRCO", "--cache_dir", data / "cache"]
    for folder in ("out/cirr", "out"):
        before = {path: path.read_bytes() for path in (data / folder).rglob("*") if path.is_file()}
        monkeypatch.setattr("sys.argv", ["circo.py", *map(str, [*flags, "--output_dir", data / folder])])
        with pytest.raises(SystemExit, match=rf"{folder} holds results of another .*: name another --output_dir"):
            harness.main(run_all.BENCHMARKS["circo"])
        assert before == {path: path.read_bytes() for path in (data / folder).rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match="out/cirr holds results of another"):
        run_all.main([*map(str, flags), "--output_dir", str(data / "out/cirr"), "--benchmarks", "circo"])
    (data / "out/cirr/results.json").write_text("{", "utf-8")  # half a file of a run that was killed
    run(data, model_dir, "--benchmarks", "cirr")


def test_a_folder_that_cannot_be_written_to_is_refused_before_pictures_are_read(data, model_dir, monkeypatch):
    (data / "taken").touch()
    for folder in ("taken", "taken/below"):
        with pytest.raises(SystemExit, match=r"--output_dir .*taken.* cannot be used: .*; name another"):
            run(data, model_dir, "--output_dir", data / folder)
    monkeypatch.setattr(harness, "find_bad_images", lambda sources, ids: pytest.fail("pictures are read"))
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != str(data / "out/circo"))
    with pytest.raises(SystemExit, match=r"--output_dir .*out/circo cannot be used: it may not be written to"):
        run(data, model_dir, "--benchmarks", "circo")
