import json

import datasets
import numpy as np
import pandas as pd
import pytest
from conftest import noise

from modeling_tscir import Gallery
from modeling_tscir.metadata import MetadataError, conditions_of, kinds_of, matching, read_metadata


LONG = 9007199254740993  # which a float does not hold


def test_a_column_of_a_long_file_is_of_one_kind(tmp_path):
    """pandas tells kinds piece by piece, and the pieces of wide files are few rows."""
    rows = 20_000
    sizes = ["M" if row > rows - 100 else "" if row % 7 == 0 else "38" for row in range(rows)]
    columns = {"file_name": range(rows), "eu_size": sizes, "sku": [f"{row:06d}" for row in range(rows - 1)] + ["A1"]}
    columns |= {f"more{i}": range(rows) for i in range(80)}
    pd.DataFrame(columns).to_csv(tmp_path / "metadata.csv", index=False)
    frame = read_metadata(tmp_path, None, "")
    assert frame["eu_size"].value_counts().to_dict() == {"38": sizes.count("38"), "M": sizes.count("M")}
    assert frame["sku"].tolist() == columns["sku"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_long_numbers_are_kept_to_the_digit(tmp_path, kind, stage2, processor, picture_folder):
    path = picture_folder / f"metadata.{kind}"
    rows = [{"file_name": "0.png", "pid": LONG}, {"file_name": "2.png", "pid": LONG - 1}, {"file_name": "4.png"}]
    if kind == "csv":
        path.write_text(f"file_name,pid\n0.png,{LONG}\n2.png,{LONG - 1}\n4.png,\n", "utf-8")
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    else:
        frame = pd.DataFrame(rows, dtype=object)
        frame["pid"] = pd.array([LONG, LONG - 1, None], "Int64")
        frame.to_parquet(path)
    gallery = Gallery.from_folder(picture_folder, tmp_path / "g", stage2, processor, progress=False)
    gallery.to_parquet(tmp_path / "g.parquet")
    for one in (gallery, Gallery(tmp_path / "g"), Gallery.from_parquet(tmp_path / "g.parquet", tmp_path / "again")):
        assert one.metadata["pid"].dropna().to_dict() == {"0.png": LONG, "2.png": LONG - 1}
        for asked in (LONG, str(LONG)):
            wanted = conditions_of({"pid": asked}, kinds_of(one.metadata), "")
            assert matching(one.metadata, wanted) == ["0.png"]


def test_numbers_too_long_for_any_column_are_texts(tmp_path):
    rows = [{"file_name": "a", "n": 2**70}, {"file_name": "b", "n": 1}, {"file_name": "c", "n": None}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    assert read_metadata(tmp_path, None, "")["n"].dropna().tolist() == [str(2**70), "1"]


def test_texts_are_not_compared_with_numbers(tmp_path):
    """As "100" stands before "50": one cell that is no number would give wrong answers without a word."""
    (tmp_path / "metadata.csv").write_text("file_name,price,day\na,100,2020-05-01\nb,7,2021-01-01\nc,n/a,\n", "utf-8")
    frame = read_metadata(tmp_path, None, "")
    for value in (50, "50", 1.5):
        with pytest.raises(ValueError, match=f"column 'price' holds texts and cannot be compared with {value!r}"):
            conditions_of({"price": ("<", value)}, kinds_of(frame), "")
    for where, found in (({"price": 100}, ["a"]), ({"price": ["7", "n/a"]}, ["b", "c"]),
                         ({"day": (">", "2020-12")}, ["b"])):  # fmt: skip
        assert matching(frame, conditions_of(where, kinds_of(frame), "")) == found


def test_unsigned_numbers_and_whole_ones_beside_fractions_are_numbers(tmp_path):
    rows = [{"file_name": "a", "hash": 2**63 + 5, "x": 2**53 + 1}, {"file_name": "b", "hash": 17, "x": 2.5}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"file_name": "c"}])), "utf-8")
    frame = read_metadata(tmp_path, None, "")
    assert kinds_of(frame) == {"hash": "number", "x": "number"}
    assert frame["hash"].dropna().tolist() == [2**63 + 5, 17] and frame["x"].dropna().tolist() == [2.0**53, 2.5]


def test_metadata_of_no_picture_at_all_are_refused_and_the_old_stay(make_gallery, picture_folder, stage2, processor):
    pd.DataFrame({"file_name": ["below/1.png"], "price": [3]}).to_csv(picture_folder / "metadata.csv", index=False)
    gallery, given = make_gallery(), picture_folder.parent / "named.csv"
    pd.DataFrame({"file_name": ["1.png", "9.png"], "price": [5, 6]}).to_csv(given, index=False)
    with pytest.raises(MetadataError, match=r"named.csv names no picture of .*: '1.png', '9.png'; .* such as '.*png'"):
        gallery.add(picture_folder, stage2, processor, metadata=given, progress=False)
    assert Gallery(gallery.folder).metadata.to_dict("index") == {"below/1.png": {"price": 3}}
    report = gallery.add(picture_folder / "below", stage2, processor, prefix="b/", metadata=given, progress=False)
    assert report.metadata_without_picture == ["b/9.png"]


def test_pictures_of_a_dataset_are_no_metadata(stage2, processor, tmp_path):
    rows = datasets.Dataset.from_dict(
        {"image": [noise(i) for i in range(3)], "mask": [noise(9)] * 3, "masks": [[noise(9)]] * 3,
         "price": [LONG, 1, None], "raw": [b"x"] * 3, "tags": [["red", "dress"]] * 3},
        features=datasets.Features({"image": datasets.Image(), "mask": datasets.Image(),
                                    "masks": datasets.List(datasets.Image()), "price": datasets.Value("int64"),
                                    "raw": datasets.Value("binary"), "tags": datasets.List(datasets.Value("string"))}),
    )  # fmt: skip
    gallery = Gallery.create(tmp_path / "g", stage2, processor)
    report = gallery.add(rows, stage2, processor, progress=False)
    assert report.columns_left_out == ["mask", "masks", "raw"]
    assert "Not metadata, as they hold pictures, sound or bytes: mask, masks, raw." in report.sentences()
    assert gallery.metadata.loc["0"].to_dict() == {"price": LONG, "tags": "red, dress"}


def test_leading_zeros_are_kept(tmp_path):
    """Article numbers and postcodes are no numbers."""
    (tmp_path / "metadata.csv").write_text("file_name,gtin,price,share\na,04006381333931,10,0.5\nb,7,,0\n", "utf-8")
    frame = read_metadata(tmp_path, None, "")
    assert frame["gtin"].tolist() == ["04006381333931", "7"]
    assert kinds_of(frame) == {"gtin": "text", "price": "number", "share": "number"}
    assert frame.loc["a"].tolist()[1:] == [10, 0.5]


def test_codes_that_look_like_numbers_are_kept(tmp_path):
    (tmp_path / "metadata.csv").write_text(
        "file_name,article,phone,loss\na,12E3,+4915,5e-05\nb,12000,7,1.5E3\n", "utf-8"
    )
    frame = read_metadata(tmp_path, None, "")
    assert frame["article"].tolist() == ["12E3", "12000"] and frame["phone"].tolist() == ["+4915", "7"]
    assert frame["loss"].tolist() == [5e-05, 1500]


def test_blanks_behind_the_commas_of_a_csv_file_are_no_part_of_names_and_values(tmp_path):
    (tmp_path / "metadata.csv").write_text('file_name, price, colour\na, 10, "red, dark"\nb, 20, blue\n', "utf-8")
    frame = read_metadata(tmp_path, None, "")
    assert list(frame.columns) == ["price", "colour"] and frame["colour"].tolist() == ["red, dark", "blue"]
    assert matching(frame, [("price", "<", 15)]) == ["a"]


def test_half_an_emoji_is_a_question_mark(tmp_path):
    row = json.dumps({"file_name": "a", "title": "nice \ud83d", "whole": "\U0001f600"})
    (tmp_path / "metadata.jsonl").write_text(row + "\n", "utf-8")
    frame = read_metadata(tmp_path, None, "")
    assert frame["title"].tolist() == ["nice ?"] and frame["whole"].tolist() == ["\U0001f600"]


def test_among_several_is_equal_to_one_of_them(tmp_path):
    """Also for fractions of fp32, as Parquet files hold them, and for long whole numbers beside fractions."""
    columns = {"file_name": ["a", "b"], "price": np.array([0.1, 0.2], np.float32), "number": [2**53 + 1, 5]}
    pd.DataFrame(columns).to_parquet(tmp_path / "metadata.parquet")
    frame = read_metadata(tmp_path, tmp_path / "metadata.parquet", "")
    for column, one in (("price", 0.1), ("number", 2**53 + 1)):
        assert matching(frame, [(column, "=", one)]) == matching(frame, [(column, "in", [one, 0.5])]) == ["a"]
        assert matching(frame, [(column, "not in", [one, 0.5])]) == ["b"]
        assert matching(frame, [(column, "in", [])]) == []


def test_rows_of_a_csv_file_may_end_with_a_comma(tmp_path):
    path = tmp_path / "metadata.csv"
    path.write_text("file_name,price\n0.png,10,\n1.png,11,\n", "utf-8")
    assert read_metadata(tmp_path, None, "")["price"].to_dict() == {"0.png": 10, "1.png": 11}
    path.write_text("file_name,price\n0.png,10,red\n", "utf-8")
    with pytest.raises(ValueError, match="more cells than there are columns, file_name, price"):
        read_metadata(tmp_path, None, "")


def test_rows_without_a_file_name_are_named(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,price\n0.png,10\n,11\n,12\n", "utf-8")
    with pytest.raises(ValueError, match=r"metadata\.csv: row 1 has no file_name"):
        read_metadata(tmp_path, None, "")


def test_json_lines_as_windows_writes_them(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a", "price": 1}\n', "utf-8-sig")
    assert read_metadata(tmp_path, None, "").loc["a", "price"] == 1


@pytest.mark.parametrize("prefix", ["b/", ""])
def test_a_folder_within_another_has_metadata_of_its_own(tmp_path, stage2, processor, picture_folder, prefix):
    """Though both have the same files, in one gallery: each describes its own ids alone."""
    (picture_folder / "metadata.csv").write_text("file_name,price\n0.png,1\nbelow/1.png,2\nbelow/3.png,3\n", "utf-8")
    below = picture_folder / "below"
    (below / "metadata.csv").write_text("file_name,price\n1.png,9\n", "utf-8")
    gallery = Gallery.from_folder(picture_folder, tmp_path / "g", stage2, processor, progress=False)
    expected = {"0.png": 1, "below/1.png": 2, "below/3.png": 3, f"{prefix}1.png": 9}
    (tmp_path / "link").symlink_to(below)
    for folder, said in ((below, prefix), (picture_folder, ""), (tmp_path / "link", prefix)):
        gallery.add(folder, stage2, processor, prefix=said, progress=False)
        assert gallery.metadata["price"].dropna().to_dict() == expected
    # What is not there just now is described by the newest file, too.
    below.rename(tmp_path / "away")
    below.symlink_to(tmp_path / "nowhere")
    (picture_folder / "metadata.csv").write_text("file_name,price\n0.png,5\n", "utf-8")
    gallery.add(picture_folder, stage2, processor, progress=False)
    assert gallery.metadata["price"].dropna().to_dict() == {"0.png": 5, f"{prefix}1.png": 9} and len(gallery) == 9


def test_long_numbers_beside_missing_ones(tmp_path):
    rows = f"a,{2**64 - 1},{2**64}\nb,5,5\nc,,\n"
    (tmp_path / "metadata.csv").write_text(f"file_name,phash,more\n{rows}", "utf-8")
    frame = read_metadata(tmp_path, None, "")
    assert kinds_of(frame) == {"phash": "number", "more": "text"}
    assert frame["phash"].dropna().to_dict() == {"a": 2**64 - 1, "b": 5} and frame["more"].isna().sum() == 1
    for where, found in (({"phash": ("!=", 5)}, ["a"]), ({"phash": (">", 4)}, ["a", "b"]),
                         ({"phash": str(2**64 - 1)}, ["a"]), ({"more": ("!=", 5)}, ["a"])):  # fmt: skip
        assert matching(frame, conditions_of(where, kinds_of(frame), "")) == found


def test_an_empty_cell_among_long_numbers_is_missing(tmp_path):
    """Where pandas makes texts of them, it makes one of the cell, too."""
    (tmp_path / "metadata.csv").write_text(f"file_name,a,b\nx,{2**63},{2**64}\ny,-1,1.5\nz,,\n", "utf-8")
    frame = read_metadata(tmp_path, None, "")
    assert frame["a"].tolist()[:2] == [str(2**63), "-1"] and frame.loc["z"].isna().all()


def test_infinite_numbers_are_missing_and_not_compared_with(tmp_path, stage2, processor, picture_folder):
    values = {"0.png": float("inf"), "2.png": 0.5, "4.png": float("nan"), "below/1.png": float("-inf")}
    rows = [{"file_name": name, "r": value} for name, value in values.items()]
    (picture_folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    gallery = Gallery.from_folder(picture_folder, tmp_path / "g", stage2, processor, progress=False)
    frame = gallery.metadata
    assert kinds_of(frame) == {"r": "number"} and frame["r"].dropna().to_dict() == {"2.png": 0.5}
    json.dumps(gallery.search(gallery.vectors(np.array([0])).float()), allow_nan=False)
    for value in (float("inf"), "-inf", "nan", np.float32("inf"), "1e999"):
        with pytest.raises(ValueError, match="column 'r' holds numbers and cannot be compared with"):
            conditions_of({"r": ("<", value)}, kinds_of(frame), "")


def test_columns_of_pictures_that_were_forgotten_before_an_interruption_go(
    tmp_path, stage2, processor, picture_folder, monkeypatch
):
    (picture_folder / "metadata.csv").write_text("file_name,old\n0.png,1\n", "utf-8")
    gallery = Gallery.from_folder(picture_folder, tmp_path / "g", stage2, processor, progress=False)
    (picture_folder / "0.png").unlink()
    (picture_folder / "metadata.csv").write_text("file_name,new\n2.png,2\n", "utf-8")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Gallery, "set_metadata", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gallery.add(picture_folder, stage2, processor, progress=False)
    gallery = Gallery.from_folder(picture_folder, tmp_path / "g", stage2, processor, progress=False)
    assert "0.png" not in gallery and gallery.metadata.to_dict() == {"new": {"2.png": 2}}


def test_a_file_without_columns_takes_back_what_was_known(tmp_path, stage2, processor, picture_folder):
    (picture_folder / "metadata.csv").write_text("file_name,price\n0.png,99\n", "utf-8")
    gallery = Gallery.from_folder(picture_folder, tmp_path / "g", stage2, processor, progress=False)
    assert gallery.metadata.loc["0.png", "price"] == 99
    (picture_folder / "metadata.csv").write_text("file_name\n0.png\n", "utf-8")
    gallery.add(picture_folder, stage2, processor, progress=False)
    assert list(gallery.metadata) == list(Gallery(tmp_path / "g").metadata) == []
