"""Records from the layouts in which data sets are published."""

import json

import pytest

from jedit.data import DataError, read_rwku
from jedit.data.records import read_records

ROWS = [{"a": 1}, {"a": 2}, {"a": 3}]


def lines(rows):
    return "".join(f"{json.dumps(row)}\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c/test.json", lines(ROWS)),
        ("c/test.jsonl", lines(ROWS)),
        ("c_test.json", json.dumps(ROWS)),
        ("c-test.json", json.dumps(ROWS, indent=2)),
        ("c.json", "\ufeff" + lines(ROWS)),
        ("test.jsonl", lines(ROWS)),
    ],
)
def test_a_file_is_found_whatever_its_form(tmp_path, name, text):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8")
    assert read_records(tmp_path, "c", "test") == ROWS


@pytest.mark.parametrize("name", ["test-0000{}-of-00002.json", "test/000{}.json"])
def test_shards_are_joined_in_order(tmp_path, name):
    for i, rows in enumerate([ROWS[:1], ROWS[1:]]):
        file = tmp_path / "c" / name.format(i)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(lines(rows))
    (tmp_path / "c" / "test2-00000-of-00001.json").write_text(lines([{"a": 9}]))
    assert read_records(tmp_path, "c", "test") == ROWS


def test_the_more_exact_name_wins(tmp_path):
    (tmp_path / "c.json").write_text(lines([{"a": 9}]))
    (tmp_path / "c_test.json").write_text(lines(ROWS))
    assert read_records(tmp_path, "c", "test") == ROWS


def test_one_object_is_one_record(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"a": 1}, indent=1))
    assert read_records(tmp_path, "c") == [{"a": 1}]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": 1}\n{"a": \n', "c.json:2: not valid JSON"),
        ("[1, 2]", "holds no records"),
        ("", "holds no records"),
        ("7", "holds no records"),
    ],
)
def test_what_holds_no_records_is_refused(tmp_path, text, sentence):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(DataError, match=sentence):
        read_records(tmp_path, "c")


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="no file for 'c', split 'test'; looked for c/test, c_test"):
        read_records(tmp_path, "c", "test")
    with pytest.raises(DataError, match="no such folder, and it is no data set's owner/name"):
        read_records(tmp_path / "not" / "there", "c")


@pytest.mark.parametrize("names", [("../secret", "train"), ("c", "../../secret"), ("/secret", "t")])
def test_no_name_leaves_the_folder(tmp_path, names):
    (tmp_path / "inside" / "c").mkdir(parents=True)
    for name in ("secret.json", "secret/train-00000-of-00001.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(lines(ROWS))
    with pytest.raises(DataError, match="names a part outside the data set's folder"):
        read_records(tmp_path / "inside", *names)
    with pytest.raises(DataError, match="outside the data set's folder"):
        read_rwku(tmp_path / "inside", "train", "../../secret")


def test_links_of_a_hubs_cache_are_followed(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "x").write_text(lines(ROWS))
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "c.json").symlink_to("../blobs/x")
    assert read_records(tmp_path / "snapshot", "c") == ROWS
