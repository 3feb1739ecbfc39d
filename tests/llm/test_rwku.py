"""`jedit rwku`: prompts, attacks and levels as RWKU's code has them, end to end, run by run."""

import collections
import json
import re

import jax
import numpy as np
import pytest

from jedit.cli.main import main
from jedit.data import QaRow
from jedit.models import greedy_decode, load_model
from jedit.recipes.rwku.evaluation import (
    NEW_TOKENS,
    encode,
    in_template,
    pairs_of,
    prompt_of,
    word_f1,
)
from jedit.recipes.rwku.sets import ATTACKS, attack_of, read_person
from jedit.recipes.tofu.models import Pretrained, from_folders
from jedit.recipes.tokenization import load_words

pytestmark = pytest.mark.usefixtures("standard_promotion")
KINDS = ("prefix injection", "affirmative suffix", "incontext learning", "cross lingual (French)")
METHODS = ("NPO", "K-FADE (K-FAC)")
SUMS = {"0+1?": 0, "2+2?": 3}
OPTIONS = "A. 1\nB. 2\nC. 3\nD. 4\n"


def probe(query, answer="abc", kind="cloze"):
    return {"query": query, "answer": answer, "type": kind, "subject": "Ann B"}


def write_person(folder, name):
    """One person's files in RWKU's form, a few records each."""
    parts = {
        "passage": [{"text": f"{name} was born in {y}. {name} wrote."} for y in range(4)],
        "forget_level1": [probe("Ann B wrote ___.", "the abc of x"), probe("___ wrote x.", "ann")],
        "forget_level2": [probe("Who wrote x?", "ann b", kind="simple question")],
        "forget_level3": [probe(f"Who wrote {k}?", f"b {k[:3]}", kind=k) for k in KINDS],
        "neighbor_level1": [probe("Bob wrote ___.", "a letter")],
        "neighbor_level2": [probe("Who wrote y?", "bob did", kind="simple question")],
        "forget_mia": [{"text": f"{name} wrote x in {y} or so."} for y in range(3)],
        "retain_mia": [{"text": f"Somebody else lived there in {y}."} for y in range(4)],
    }
    folder.mkdir(parents=True)
    for part, records in parts.items():
        (folder / f"{part}.json").write_text(json.dumps(records))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    where = tmp_path_factory.mktemp("rwku")
    for number, name in enumerate(("Ann B", "Carl D"), 1):
        write_person(where / "Target" / f"{number}_{name.replace(' ', '_')}", name)
    example = {"question": "1+1?", "choices": ["1", "2", "3", "4"], "answer": 1}
    mmlu = [
        {**example, "question": asked, "answer": right, "task": "sums", "examples": [example]}
        for asked, right in SUMS.items()
    ]
    (where / "Target" / "1_Ann_B" / "retain_mmlu.json").write_text(json.dumps(mmlu))
    trivia = [{"question": "What is it?", "answers": ["The one", "Two"]}]
    (where / "Target" / "1_Ann_B" / "triviaqa.json").write_text(json.dumps(trivia))
    return where


def command(data, folder, out, *more):
    settings = ["--steps", "2", "--learning-rate", "1e-2", "--max-len", "64", "--dtype", "float32"]
    given = ["--data", str(data), "--model", str(folder), "--out", str(out), *settings]
    return ["rwku", "--target", "ann b", *given, "--methods", *METHODS, *more]


@pytest.fixture(scope="module")
def folder(data, toy_folder, teach, tmp_path_factory):
    """The toy, taught all answers but those of two attacks, and the sums' letters."""
    probes = dict(read_person(data, "Ann B").probes)
    probes["forget_level3"] = probes["forget_level3"][::2]
    about = "The following are multiple choice questions (with answers) about sums.\n\n"
    begin = f"{about}1+1?\n{OPTIONS}Answer: B\n\n"
    sums = [(f"{begin}{asked}\n{OPTIONS}", "ABCD"[right]) for asked, right in SUMS.items()]
    rows = in_template(load_words(toy_folder)).rows([*pairs_of(probes), *sums])
    return teach(rows, tmp_path_factory.mktemp("taught") / "hf")


@pytest.fixture(scope="module")
def ran(data, folder, tmp_path_factory):
    pytest.importorskip("tyro")
    out = tmp_path_factory.mktemp("out")
    with jax.numpy_dtype_promotion("standard"):
        assert main(command(data, folder, out, "--seeds", "0", "1")) == 0
    return out


def records_of(out):
    found = [json.loads(file.read_text()) for file in sorted((out / "runs").iterdir())]
    return {(record["method"], record["seed"]): record for record in found}


def recall(answer, said):
    """ROUGE-L recall by the textbook's recursion, over words of letters and digits."""
    a, b = (re.findall("[a-z0-9]+", text.lower()) for text in (answer, said))
    best = np.zeros((len(a) + 1, len(b) + 1))
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            best[i + 1, j + 1] = best[i, j] + 1 if x == y else max(best[i, j + 1], best[i + 1, j])
    return best[-1, -1] / len(a) if a else 0.0


def test_every_run_is_recorded_with_what_it_was_made_of(ran):
    records = records_of(ran)
    assert set(records) == {("untouched", 0)} | {(m, s) for m in METHODS for s in (0, 1)}
    about = records["NPO", 0]["about"]
    assert (about["target"], about["forget rows"], about["retain rows"]) == ("Ann B", 4, 4)
    assert all(record["about"] == about for record in records.values())
    losses = {name: record["numbers"]["FM loss"]["value"] for name, record in records.items()}
    for method in METHODS:
        assert abs(losses[method, 0] - losses["untouched", 0]) > 1e-3, method
    # The labels of another seed's curvature are others.
    assert losses["K-FADE (K-FAC)", 0] != losses["K-FADE (K-FAC)", 1]
    found = json.loads((ran / "results.json").read_text())
    assert [row["seeds"] for row in found["summary"]] == [[0], [0, 1], [0, 1]]
    assert (
        "| NPO | beta 0.1, steps 2, batch size 8, learning rate 0.01 |"
        in (ran / "table.md").read_text()
    )


def test_numbers_are_those_of_the_answers(ran):
    numbers, details = (records_of(ran)["NPO", 1][name] for name in ("numbers", "details"))
    groups = collections.defaultdict(list)
    for row in details:
        assert row["recall"] == pytest.approx(recall(row["answer"], row["said"]))
        groups[row["part"]].append(row["recall"])
        if row["part"] == "forget_level3":
            groups[f"attack: {row['type'].split(' (')[0]}"].append(row["recall"])
    assert len(groups) == 5 + len(KINDS)
    for name, scores in groups.items():
        assert numbers[name]["value"] == pytest.approx(np.mean(scores)), name
    assert numbers["triviaqa"]["value"] is not None
    assert records_of(ran)["untouched", 0]["numbers"]["retain_mmlu"]["value"] == 1


def test_answers_and_losses_are_the_models(ran, data, folder):
    """Greedy answers by whole passes, and a text's loss token by token."""
    start = from_folders(folder, None, None, Pretrained(64, 8), "float32")
    asked = encode(start.model, read_person(data, "Ann B"))
    apply, params, _ = load_model(folder)
    tokens = greedy_decode(
        apply, params, asked.prompts.tokens, NEW_TOKENS, prompt_lengths=asked.prompts.lengths
    )
    said = [text.split("\n")[0].strip() for text in start.model.words.answers(np.asarray(tokens))]
    record = records_of(ran)["untouched", 0]
    assert [row["said"] for row in record["details"]] == said[: len(record["details"])]
    assert record["numbers"]["forget_level1"]["value"] == 1
    assert record["numbers"]["attack: prefix injection"]["value"] == 1
    assert record["numbers"]["forget_level3"]["value"] < 1
    losses = []
    for text in read_person(data, "Ann B").known:
        row = np.array(start.model.words.tokenizer(text).input_ids[:64])
        logits = np.asarray(apply(params, row[None, :-1]), np.float64)[0]
        log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        losses.append(-log_p[np.arange(len(row) - 1), row[1:]].mean())
    assert record["numbers"]["FM loss"]["value"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_what_is_missing_is_made_again_and_nothing_else(ran, data, folder, capsys):
    before = records_of(ran)
    times = {file.name: file.stat().st_mtime_ns for file in (ran / "runs").iterdir()}
    gone = next(file for file in (ran / "runs").iterdir() if file.name.startswith("npo"))
    gone.unlink()
    assert main(command(data, folder, ran, "--seeds", "0", "1")) == 0
    assert "4 of 5 runs stand in" in capsys.readouterr().err
    after = records_of(ran)
    for name in before:
        assert after[name]["numbers"] == before[name]["numbers"]
    changed = [f.name for f in (ran / "runs").iterdir() if f.stat().st_mtime_ns != times[f.name]]
    assert changed == [gone.name]
    assert main(command(data, folder, ran, "--max-len", "32")) == 2
    assert "was made with another" in capsys.readouterr().err


def test_a_stopped_sweep_says_where_its_runs_stand(data, folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tyro")

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("jedit.recipes.rwku.run.run_methods", stop)
    assert main(command(data, folder, tmp_path / "out")) == 130
    assert "whole runs stand in" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--target", "Zoe"], "'Zoe' is not among the 2 people of"),
        (["--data", "/no/such"], "/no/such: there is no such folder"),
        (["--model", "/no/such"], "/no/such: there is no such folder"),
        (["--methods", "MEMIT"], "MEMIT needs a position in each forget row, which RWKU's passa"),
        (["--methods", "AltPO"], "AltPO needs alternate answers, which RWKU's passages has not"),
        (["--methods", "NOP"], "unknown methods: NOP; there are K-FADE"),
        (["--seeds", "0", "-1"], "--seeds must lie in 0 to"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--seeds"], "--seeds must be at least one number"),
        (["--retain", __file__], "test_rwku.py: ends in none of .jsonl"),
        (["--retain", "x.txt"], "x.txt: there is no such file"),
    ],
)
def test_mistakes_are_told_before_any_work(given, message, data, toy_folder, tmp_path, capsys):
    pytest.importorskip("tyro")
    assert main([*command(data, toy_folder, tmp_path / "out"), *given]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_a_person_without_a_file_or_with_an_unknown_attack(tmp_path):
    write_person(tmp_path / "1_Ann_B", "Ann B")
    with pytest.raises(ValueError, match="has nobody but Ann B, and so no passages to keep"):
        read_person(tmp_path, "Ann B")
    texts = tmp_path / "kept.jsonl"
    texts.write_text('{"text": "Kept."}\n')
    assert read_person(tmp_path, "1_Ann_B", texts).kept == ["Kept."]
    level3 = tmp_path / "1_Ann_B" / "forget_level3.json"
    level3.write_text(json.dumps([probe("Who?", kind="hypnosis")]))
    with pytest.raises(ValueError, match="forget_level3:1: .*'hypnosis', none of RWKU's nine"):
        read_person(tmp_path, "Ann B", texts)
    level3.unlink()
    with pytest.raises(ValueError, match="no file for 'forget_level3'"):
        read_person(tmp_path, "Ann B", texts)


def test_real_people_and_their_prompts(shared_data, toy_folder):
    where = shared_data / "rwku"
    if not where.is_dir():
        pytest.skip(f"needs RWKU, which is not part of the repository: {where}")
    data = read_person(where, "genghis khan")
    records = json.loads((where / "12_Genghis_Khan" / "forget_level3.json").read_text())
    counted = collections.Counter(r["type"].split(" (")[0] for r in records)
    assert collections.Counter(map(attack_of, data.probes["forget_level3"])) == counted
    assert set(counted) == set(ATTACKS)
    assert len(data.kept) == 44 + 169  # Confucius' and Leonardo's passages
    start = from_folders(toy_folder, None, None, Pretrained(64, 8), "float32")
    texts = start.model.words.prompt_texts(encode(start.model, data).prompts)
    first = data.probes["forget_level1"][0].question
    assert texts[0] == (
        f"Please complete the blank in the following question.\nQuestion: {first}\nAnswer:"
    )
    begin = len(data.probes["forget_level1"]) + len(data.probes["forget_level2"])
    for row, text in zip(data.probes["forget_level3"], texts[begin:], strict=False):
        ends = "" if row.fields["type"] == "affirmative suffix" else "\nAnswer:"
        begins = "" if row.fields["type"] == "incontext learning" else "Question: "
        asked = "Please briefly answer the following question.\n"
        assert text == f"{asked}{begins}{row.question}{ends}"


def test_words_of_trivia():
    assert word_f1("The Blue, blue sky!", "a blue sky") == pytest.approx(2 * 2 / (3 + 2))
    assert word_f1("", "the") == 1
    assert word_f1("", "sky") == 0
    assert prompt_of("neighbor_level2", QaRow("Who?", "I")).endswith("Question: Who?\n")
