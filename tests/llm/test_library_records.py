"""Records that other packages read: parquet files, and the datasets library."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the library is imported

import datasets
import pyarrow as pa
from pyarrow import parquet

from jedit.data import DataError, read_muse_texts, read_records


def test_parquet_shards_in_a_hubs_layout(tmp_path):
    (tmp_path / "raw").mkdir()
    for i, texts in enumerate([["one", "two"], ["three"]]):
        table = pa.table({"text": texts, "number": list(range(len(texts)))})
        parquet.write_table(table, tmp_path / "raw" / f"forget-0000{i}-of-00002.parquet")
    assert read_muse_texts(tmp_path, "raw", "forget") == ["one", "two", "three"]
    assert read_records(tmp_path, "raw", "forget")[1] == {"text": "two", "number": 1}


def test_the_library_is_asked_for_the_name(monkeypatch):
    asked = []

    def load_dataset(*given, **named):
        asked.append((given, named))
        return datasets.Dataset.from_list([{"text": "one"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_muse_texts("muse-bench/MUSE-News", "raw", "forget") == ["one"]
    assert asked == [(("muse-bench/MUSE-News", "raw"), {"split": "forget"})]


def test_what_the_library_cannot_load_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(DataError, match="nobody/nothing, 'c', split 'train': the datasets library"):
        read_records("nobody/nothing", "c")
