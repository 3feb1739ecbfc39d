"""Interactions: files as they are and as they should not be, and seeded ones."""

import numpy as np
import pytest

from jedit.data import DataError, generate_interactions, read_interactions


def written(folder, text):
    path = folder / "log.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "header", ["user,item,time,note", "userId,movieId,timestamp,rating", " User , ITEM,Time,x"]
)
def test_a_file_is_sequences_by_time(tmp_path, header):
    lines = [
        "ann,b,3,", 'ann,"a, or so",1,', "bob,b,1,", "ann,c,2.5,", "bob,a,2,",
        "ann,b,0.5,", "cleo,d,1,", "cleo,d,2,", "", "cleo,b,3e9,", "cleo,c,-4,",
    ]  # fmt: skip
    log = read_interactions(written(tmp_path, "\ufeff" + "\r\n".join([header, *lines])))
    assert log.users == ("ann", "cleo"), "bob has two items"
    named = [[log.items[i] for i in sequence] for sequence in log.sequences]
    # Her first "b" counts, his twice chosen "d" is once in it.
    assert named == [["b", "a, or so", "c"], ["c", "d", "b"]]
    assert log.items == ("b", "a, or so", "c", "d")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "must name the columns user, item and time once each, got nothing"),
        (
            "user,item\na,b\n",
            "must name the columns user, item and time once each, got 'user, item'",
        ),
        ("user,userId,item,time\n", "once each, got 'user, userid, item, time'"),
        ("\x1b[31m,item,time\n", "once each, got '\\x1b[31m, item, time'"),
        ("user,item,time\na,b\n", ":2: the line has 2 fields, fewer than the header names"),
        ("user,item,time\na,b,soon\n", ":2: the time must be a number, got 'soon'"),
        ("user,item,time\na,b,nan\n", ":2: the time must be a number, got 'nan'"),
        ("user,item,time\n,b,1\n", ":2: the user is empty"),
        ("user,item,time\na, ,1\n", ":2: the item is empty"),
        ('user,item,time\n"a"b,c,1\n', ":2: not CSV: "),
        ("user,item,time\n" + "a" * 200_000 + ",b,1\n", "not CSV: field larger than"),
        ("user,item,time\na,b,1\na,b,2\na,c,3\n", "no user has 3 different items"),
        (b"user,item,time\n\xff,b,1\n", "not UTF-8 text (byte 15)"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path, text, sentence):
    path = written(tmp_path, text)
    with pytest.raises(DataError) as caught:
        read_interactions(path)
    assert str(caught.value).startswith(str(path))
    assert sentence in str(caught.value)


def test_stamps_in_nanoseconds_stay_apart(tmp_path):
    stamps = [1_700_000_000_000_000_002, 1_700_000_000_000_000_001, 1_700_000_000_000_000_000]
    lines = [f"ann,{item},{stamp}" for item, stamp in zip("abc", stamps, strict=True)]
    log = read_interactions(written(tmp_path, "\n".join(["user,item,time", *lines])))
    assert log.items == ("c", "b", "a")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no\.csv: there is no such file"):
        read_interactions(tmp_path / "no.csv")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_interactions(tmp_path)


def test_seeded_choices_follow_taste_popularity_and_the_item_before():
    given = {"num_users": 200, "num_items": 40, "length": 12}
    log, again, other = (generate_interactions(seed, **given) for seed in (3, 3, 4))
    assert all(map(np.array_equal, log.sequences, again.sequences))
    assert not all(map(np.array_equal, log.sequences, other.sequences))
    assert {len(set(items.tolist())) for items in log.sequences} == {12}
    chosen = np.stack([np.bincount(items, minlength=40) for items in log.sequences])
    popular = np.sort(chosen.sum(axis=0))[::-1]
    assert popular[:10].sum() > 0.3 * popular.sum(), "a quarter of the items"
    # Whose first halves agree agree in their second ones: what a recommender can learn.
    halves = [
        np.stack([np.bincount(items[part], minlength=40) for items in log.sequences])
        for part in (slice(0, 6), slice(6, 12))
    ]
    first, second = (x - x.mean(axis=0) for x in halves)
    alike = [(x @ x.T)[np.triu_indices(200, 1)] for x in (first, second)]
    assert np.corrcoef(*alike)[0, 1] > 0.15
    with pytest.raises(ValueError, match="length must be from 3 to 40, got 41"):
        generate_interactions(0, num_items=40, length=41)
