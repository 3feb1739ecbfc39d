"""Question-answer files: what is read, what is refused, and where the message points."""

import json
import re

import pytest

from jedit.data import (
    DataError,
    QaRow,
    check_disjoint,
    generate_authors,
    read_rows,
    rows_with,
    select_rows,
    write_rows,
)


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def row(i, **fields):
    return json.dumps({"question": f"q{i}?", "answer": f"a{i}.", **fields})


def refused(message):
    return pytest.raises(DataError, match=message)


def test_every_field_is_read_and_scalars_are_kept(tmp_path):
    path = write(
        tmp_path / "rows.jsonl",
        '{"question": "Who?", "answer": "Ada.", "author": "Ada", "option1": 3, "is_new": true,'
        ' "options": ["Ada"], "source": {"page": 3}, "fields": "f", "line": 0.5, "none": null,'
        ' "paraphrased_answer": "It is Ada.", "paraphrased_question": "Which one?",'
        ' "perturbed_answer": ["It is Bo.", "It is Cy."]}',
        "",
        '{"question": "Where?", "answer": "Él – there\u2028.", "author": null}',
    )
    assert read_rows(path) == [
        QaRow(
            question="Who?",
            answer="Ada.",
            paraphrased_question="Which one?",
            paraphrased_answer="It is Ada.",
            perturbed_answer=("It is Bo.", "It is Cy."),
            fields={"author": "Ada", "option1": 3, "is_new": True, "fields": "f", "line": 0.5},
            file=str(path),
            line=1,
        ),
        QaRow("Where?", "Él – there\u2028.", file=str(path), line=3),
    ]


def test_a_byte_order_mark_and_windows_line_ends_are_harmless(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + row(0).encode() + b"\r\n" + row(1).encode() + b"\r\n")
    assert [(r.question, r.line) for r in read_rows(path)] == [("q0?", 1), ("q1?", 2)]


def test_written_rows_read_back(tmp_path):
    rows = generate_authors(0, 3, 4)
    path = tmp_path / "authors.jsonl"
    write_rows(path, rows)
    back = read_rows(path)
    assert [r._replace(file="", line=0) for r in back] == rows
    assert [r.line for r in back] == list(range(1, 13))
    assert len(rows[0].perturbed_answer) == 5
    assert set(rows[0].fields) == {"author", "attribute", "value"}
    odd = QaRow("q?", "a.", fields={"is_new": False, "year": 0, "file": "x", "line": ""})
    write_rows(path, [odd])
    assert read_rows(path) == [odd._replace(file=str(path), line=1)]
    assert len({odd, odd._replace(), odd._replace(fields={})}) == 2


@pytest.mark.parametrize(
    ("given", "spans"),
    [
        ('"bo"', ((0, 2), (8, 10))),
        ("[3, 6]", ((3, 6),)),
        ('["saw", [8, 10]]', ((3, 6), (8, 10))),
        ("null", ()),
        ("[]", ()),
    ],
)
def test_what_of_an_answer_is_to_be_forgotten(given, spans, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"question": "q?", "answer": "bo saw  bo", "forget_span": {given}}}')
    (found,) = read_rows(path)
    assert found.forget_span == spans
    assert not found.fields
    write_rows(path, [found])
    assert read_rows(path) == [found]


@pytest.mark.parametrize(
    "given", ['"cat"', '""', "3", "[0, 11]", "[2, 2]", "[-1, 2]", "[[1]]", "[true, 2]", '{"a": 1}']
)
def test_a_span_that_is_not_in_the_answer(given, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"question": "q?", "answer": "bo saw  bo", "forget_span": {given}}}')
    with pytest.raises(DataError, match=r'rows.jsonl:1: the field "forget_span" must be a text'):
        read_rows(path)


def test_a_text_is_a_row_without_a_question(tmp_path):
    line = '{"text": "Ada met Bo.", "forget_span": "Bo", "topic": "people"}'
    [read] = read_rows(write(tmp_path / "texts.jsonl", line))
    assert read[:2] == ("", "Ada met Bo.")
    assert (read.forget_span, read.fields) == (((8, 10),), {"topic": "people"})
    write_rows(tmp_path / "again.jsonl", [read])
    [again] = read_rows(tmp_path / "again.jsonl")
    assert again == read._replace(file=str(tmp_path / "again.jsonl"))
    # Beside question and answer it is a field like another.
    [asked] = read_rows(write(tmp_path / "asked.jsonl", row(0, text="a source")))
    assert (asked.question, asked.fields) == ("q0?", {"text": "a source"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'question': 1}", "not valid JSON"),
        (
            '["a", "b"]',
            "must be an object with the fields question and answer, or text, got a list",
        ),
        ("3", "got a number"),
        ('{"answer": "a"}', 'the row has no field "question"; its fields: answer'),
        ('{"question": "q", "text": "a"}', 'no field "answer"; its fields: question, text'),
        ("{}", 'no field "question"; its fields: none'),
        ('{"text": " "}', 'the field "text" is empty'),
        ('{"text": ["a"]}', 'field "text" must be a string, got a list'),
        ('{"answer": "b", "text": "a"}', 'no field "question"; its fields: answer, text'),
        ('{"question": "q", "answer": 7}', 'field "answer" must be a string, got a number'),
        ('{"question": null, "answer": "a"}', 'field "question" must be a string, got null'),
        ('{"question": "  ", "answer": "a"}', 'the field "question" is empty'),
        (
            '{"question": "q", "answer": "a", "paraphrased_answer": []}',
            '"paraphrased_answer" must be a string, got a list',
        ),
        (
            '{"question": "q", "answer": "a", "perturbed_answer": "b"}',
            '"perturbed_answer" must be a list of strings, got a string',
        ),
        (
            '{"question": "q", "answer": "a", "perturbed_answer": ["b", 2]}',
            '"perturbed_answer" must be a list of strings, got a list with other things in it',
        ),
        ("[" * 100_000, "not valid JSON: nested too deeply"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "bad.jsonl", row(0), "", line)
    with refused(re.escape(f"{path}:3: ") + ".*" + re.escape(message)):
        read_rows(path)


def test_bad_files_are_named(tmp_path):
    missing = tmp_path / "missing.jsonl"
    with refused(re.escape(f"{missing}: there is no such file")):
        read_rows(missing)
    with refused(re.escape(f"{tmp_path}: cannot be read: Is a directory")):
        read_rows(tmp_path)
    with refused("empty.jsonl: the file holds no rows"):
        read_rows(write(tmp_path / "empty.jsonl", "", "  "))
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b'{"question": "\xff"}')
    with refused(r"binary.jsonl: not UTF-8 text \(byte 14\)"):
        read_rows(binary)


@pytest.fixture
def data(tmp_path):
    authors = ["Ada", "Ada", "Bo Li", "Cy", "Cy", "Cy"]
    others = [{"year": 3}, {"year": "3"}, {}, {"year": 4.5}, {"town": "Bo, It"}, {"town": "Bo"}]
    others[2] = {"is_new": True, "a town ": " Rome "}
    both = zip(authors, others, strict=True)
    lines = (row(i, author=author, **other) for i, (author, other) in enumerate(both))
    return read_rows(write(tmp_path / "data.jsonl", *lines))


def numbers(rows):
    return [int(r.question[1:-1]) for r in rows]


@pytest.mark.parametrize(
    ("forget", "retain", "forgotten", "kept"),
    [
        ("author=Ada", "rest", [0, 1], [2, 3, 4, 5]),
        ("author=Cy, Bo Li", "rest", [2, 3, 4, 5], [0, 1]),
        ("rows=0:2", "rest", [0, 1], [2, 3, 4, 5]),
        ("rows=4:", "rows=:3", [4, 5], [0, 1, 2]),
        ("rows=5:6,0:1", "author=Bo Li", [0, 5], [2]),
        (" author = Ada", "rest", [0, 1], [2, 3, 4, 5]),
        ("year=3", "year=4.5", [0, 1], [3]),
        ("year=4.5,3", "rest", [0, 1, 3], [2, 4, 5]),
        ("is_new=true", "rest", [2], [0, 1, 3, 4, 5]),
        ("town=Bo, It", "town=Bo", [4], [5]),
        ("question=q1?", "answer=a2.,a3.", [1], [2, 3]),
    ],
)
def test_selectors(data, forget, retain, forgotten, kept):
    chosen = select_rows(data, forget, retain)
    assert [numbers(part) for part in chosen] == [forgotten, kept]


def test_a_file_selects_its_rows_with_its_own_fields(data, tmp_path):
    path = write(tmp_path / "forget.jsonl", row(3, perturbed_answer=["no."]), row(0))
    forget, retain = select_rows(data, str(path))
    assert numbers(forget) == [3, 0]
    assert forget[0].perturbed_answer == ("no.",)
    assert forget[0].where == f"{path}:1"
    assert numbers(retain) == [1, 2, 4, 5]


@pytest.mark.parametrize(
    ("forget", "retain", "message"),
    [
        ("", "rest", "forget: no rows are named"),
        ("rest", "rest", '"rest" is for retain'),
        ("author=", "rest", "author= names no value; write author=VALUE"),
        ("year=5", "rest", "data.jsonl has no rows of year '5'; it has 3, 4.5"),
        ("town=It", "rest", "no rows of town 'It'; it has Bo, Bo, It"),
        ("author=Di", "rest", "data.jsonl has no rows of author 'Di'; it has Ada, Bo Li, Cy"),
        ("rows=2:2", "rest", "rows=2:2 selects nothing or reaches past the end: there are 6 rows"),
        ("rows=0:7", "rest", "rows=0:7 selects nothing or reaches past the end"),
        ("rows=3", "rest", "rows=3 is not of the form rows=START:STOP"),
        ("rows=-2:", "rest", "not of the form"),
        ("rows=:", "rest", "forgets all 6 rows; none is left"),
        ("author=Ada", "author=Bob", "retain: .* has no rows of author 'Bob'"),
        ("nothing.jsonl", "rest", "nothing.jsonl: there is no such file"),
    ],
)
def test_selectors_that_select_nothing(data, forget, retain, message):
    with refused(message):
        select_rows(data, forget, retain)


def test_a_field_that_no_row_has_is_answered_with_those_there_are(tmp_path, monkeypatch):
    data = read_rows(write(tmp_path / "plain.jsonl", row(0, year=1), row(1, town="Bo")))
    sentence = (
        'no row of .*plain.jsonl has the field "author"; there are answer, question, town, year'
    )
    with refused(f"forget: {sentence}"):
        select_rows(data, "author=Ada")
    with refused(f"^{sentence}"):
        rows_with(data, "author", ["Ada"])
    # A file whose name looks like an expression is named with its folder.
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "run=1", row(1))
    with refused(r'has the field "run"; .* The file of that name is \./run=1'):
        select_rows(data, "run=1")
    assert [numbers(part) for part in select_rows(data, "./run=1")] == [[1], [0]]


def test_rows_are_selected_by_values_of_any_kind(data):
    """Against a filter written by hand."""
    for field, values, expected in [
        ("author", ["Cy", "Ada"], [0, 1, 3, 4, 5]),
        ("year", [3], [0, 1]),
        ("year", ["4.5", 3], [0, 1, 3]),
        ("is_new", [True], [2]),
        ("town", ["Bo, It"], [4]),
        ("a town ", ["Rome"], [2]),
    ]:
        assert numbers(rows_with(data, field, values)) == expected
    with refused("has no rows of is_new 'false'; it has true"):
        rows_with(data, "is_new", [False])
    generated = generate_authors(0, 30, 22)
    chosen = rows_with(generated, "attribute", ["genre", "hobby"])
    assert chosen == [r for r in generated if r.fields["attribute"] in ("genre", "hobby")]
    assert len(chosen) == 60


def test_a_row_outside_the_data_is_named(data, tmp_path):
    path = write(tmp_path / "forget.jsonl", row(0), row(9))
    message = re.escape(f"{path}:2: this row to forget is not in the data ({data[0].file})")
    with refused(message + ".*1 of 2"):
        select_rows(data, str(path))


def test_shared_rows_are_refused_naming_both_places(data, tmp_path):
    respaced = json.dumps({"question": " q4?", "answer": "a4.  "})
    path = write(tmp_path / "forget.jsonl", row(1), "", respaced)
    message = re.escape(
        f"{path}:3: this row to forget also stands in retain, at {data[4].file}:5 (1 of 2"
    )
    with refused(message):
        select_rows(data, str(path), "rows=2:6")
    with refused(message):
        check_disjoint(read_rows(path), data[2:])
    check_disjoint(read_rows(path), data[2:4])


def test_the_same_question_with_another_answer_is_another_row():
    check_disjoint([QaRow("q?", "a.")], [QaRow("q?", "b.")])
    with refused("the row 'q[?]': this row to forget also stands in retain, at the row 'q[?]'"):
        check_disjoint([QaRow("q?", "a.")], [QaRow("q?", "a.")])


def test_real_tofu(shared_data):
    folder = shared_data / "tofu"
    if not folder.is_dir():
        pytest.skip(f"needs TOFU, which is not part of the repository: {folder} is absent")
    data = read_rows(folder / "full.json")
    assert len(data) == 4000
    forget, retain = select_rows(
        data, str(folder / "forget10_perturbed.json"), str(folder / "retain90.json")
    )
    assert (len(forget), len(retain)) == (400, 3600)
    assert all(len(r.perturbed_answer) == 5 and r.paraphrased_answer for r in forget)
    assert [len(part) for part in select_rows(data, str(folder / "forget01.json"))] == [40, 3960]
    with refused(r"forget05\.json:\d+: .* also stands in retain, at .*retain99\.json:\d+"):
        select_rows(data, str(folder / "forget05.json"), str(folder / "retain99.json"))
    assert len(read_rows(folder / "real_authors_perturbed.json")) == 100
