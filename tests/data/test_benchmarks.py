"""The published sets as rows, from small files in their forms, and TOFU from its own."""

import json

import pytest

from jedit.data import (
    Choice,
    DataError,
    read_counterfact,
    read_muse_questions,
    read_muse_texts,
    read_rwku,
    read_rwku_texts,
    read_tofu,
    read_wmdp,
    read_zsre,
)
from tests.conftest import ROOT

TOFU = ROOT.parent / "shared" / "data" / "tofu"


def write(folder, name, records):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(records))


@pytest.mark.skipif(not TOFU.is_dir(), reason="needs ../shared/data/tofu")
def test_tofu_as_it_is_published():
    full = read_tofu(TOFU, "full")
    assert len(full) == 4000
    assert (full[0].fields["author"], full[19].fields["author"], full[20].fields["author"]) == (
        "author 0",
    ) * 2 + ("author 1",)
    for split, rows in (("forget01", 40), ("forget05", 200), ("forget10", 400)):
        forget = read_tofu(TOFU, split)
        assert len(forget) == rows
        assert forget[0].fields["author"] == f"author {200 - rows // 20}"
        assert [r.identity for r in forget] == [r.identity for r in full[-rows:]]
        assert [r.fields["author"] for r in forget] == [r.fields["author"] for r in full[-rows:]]
        retain = read_tofu(TOFU, f"retain{100 - rows // 40}")
        assert [(r.identity, r.fields["author"]) for r in retain] == [
            (r.identity, r.fields["author"]) for r in full[:-rows]
        ]
        perturbed = read_tofu(TOFU, f"{split}_perturbed")
        assert [(r.identity, r.fields["author"]) for r in perturbed] == [
            (r.identity, r.fields["author"]) for r in forget
        ]
        assert {len(r.perturbed_answer) for r in perturbed} == {5}
        assert all(r.paraphrased_answer and r.paraphrased_question for r in perturbed)
    assert all(not r.fields for r in read_tofu(TOFU, "retain_perturbed"))
    assert len(read_tofu(TOFU, "holdout10")) == 400
    for name, rows in (("real_authors", 100), ("world_facts", 117)):
        plain, perturbed = read_tofu(TOFU, name), read_tofu(TOFU, f"{name}_perturbed")
        assert len(plain) == rows
        assert all(len(r.perturbed_answer) == 3 for r in plain)
        assert all(r.answer not in r.perturbed_answer for r in plain)
        both = {r.question: sorted(r.perturbed_answer) for r in plain}
        shared = [r for r in perturbed if both.get(r.question) == sorted(r.perturbed_answer)]
        assert len(shared) > 0.9 * rows


def test_muse(tmp_path):
    write(tmp_path, "raw/forget.json", [{"text": "one"}, {"text": "two"}])
    write(tmp_path, "verbmem/forget.json", [{"prompt": "It was", "gt": "the best of times"}])
    write(tmp_path, "knowmem/forget_qa.json", [{"question": "who?", "answer": "he"}])
    assert read_muse_texts(tmp_path, "raw", "forget") == ["one", "two"]
    row = read_muse_questions(tmp_path, "verbmem", "forget")[0]
    assert (row.question, row.answer) == ("It was", "the best of times")
    assert read_muse_questions(tmp_path, "knowmem", "forget_qa")[0].answer == "he"
    with pytest.raises(DataError, match="subset must be one of raw"):
        read_muse_texts(tmp_path, "verbmem", "forget")
    with pytest.raises(DataError, match="verbmem or knowmem"):
        read_muse_questions(tmp_path, "raw", "forget")


def test_wmdp(tmp_path):
    good = {"question": "which?", "choices": ["a", "b", "c", "d"], "answer": 2}
    write(tmp_path, "wmdp-bio/test.json", [good])
    assert read_wmdp(tmp_path, "bio") == [Choice("which?", ("a", "b", "c", "d"), 2)]
    with pytest.raises(DataError, match="one of bio, cyber, chem"):
        read_wmdp(tmp_path, "law")
    for wrong, sentence in (
        ({"answer": 4}, "answer 4 of 4"),
        ({"choices": "abcd"}, "list of strings"),
        ({"answer": "c"}, 'and "answer", a number'),
    ):
        write(tmp_path, "wmdp-chem.json", [good | wrong])
        with pytest.raises(DataError, match=f"record 1: .*{sentence}"):
            read_wmdp(tmp_path, "chem")


@pytest.mark.parametrize("layout", ["Target/1_A_B/forget_level1.json", "forget_level1/test.json"])
def test_rwku(tmp_path, layout):
    record = {"query": "A B wrote ___.", "answer": "it", "subject": "A B", "level": "1"}
    write(tmp_path, layout, [record])
    rows = read_rwku(tmp_path, "forget_level1", "1_A_B" if "Target" in layout else None)
    assert [r[:2] for r in rows] == [("A B wrote ___.", "it")]
    assert rows[0].fields == {"subject": "A B"}


def test_rwku_texts_of_all(tmp_path):
    write(tmp_path, "All/passage.json", [{"text": "A B was born."}])
    assert read_rwku_texts(tmp_path, "passage") == ["A B was born."]
    with pytest.raises(DataError, match="no folder Target/2_C"):
        read_rwku(tmp_path, "forget_level1", "2_C")


def test_counterfact(tmp_path):
    record = {
        "case_id": 0,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "subject": "Danielle Darrieux",
            "target_new": {"str": "English", "id": "Q1860"},
            "target_true": {"str": "French", "id": "Q150"},
        },
        "paraphrase_prompts": ["Danielle Darrieux, a native"],
        "neighborhood_prompts": ["The mother tongue of Léon Blum is", "Michel Rocard is a native"],
    }
    write(tmp_path, "counterfact.json", [record])
    row = read_counterfact(tmp_path)[0]
    assert row.prompt == "The mother tongue of Danielle Darrieux is"
    assert (row.target_true, row.target_new) == ("French", "English")
    assert row.neighborhood_answers == ("French", "French")
    write(tmp_path, "counterfact.json", [{**record, "requested_rewrite": {"subject": "x"}}])
    with pytest.raises(DataError, match='record 1: needs "str"'):
        read_counterfact(tmp_path)


def test_zsre(tmp_path):
    record = {
        "subject": "Watts Humphrey",
        "src": "What university did Watts Humphrey attend?",
        "pred": "Trinity College",
        "rephrase": "What university did Watts Humphrey take part in?",
        "alt": "University of Michigan",
        "answers": ["Illinois Institute of Technology"],
        "loc": "nq question: who played desmond doss father in hacksaw ridge",
        "loc_ans": "Hugo Weaving",
    }
    write(tmp_path, "zsre_mend_eval.json", [record])
    row = read_zsre(tmp_path)[0]
    assert (row.target_true, row.target_new) == (record["answers"][0], record["alt"])
    assert row.neighborhood_prompts == ("who played desmond doss father in hacksaw ridge",)
    assert row.neighborhood_answers == ("Hugo Weaving",)
    write(tmp_path, "zsre_mend_eval.json", [record | {"answers": []}])
    with pytest.raises(DataError, match='needs "answers"'):
        read_zsre(tmp_path)
