"""`jedit muse` and `jedit wmdp` end to end: tiny files of their form, toys taught by heart."""

import json
import re
import string

import numpy as np
import pytest

from jedit.cli.main import main
from jedit.models import greedy_decode, load_model
from jedit.recipes import muse, wmdp
from jedit.recipes.texts import encode_texts
from jedit.recipes.tofu.models import Pretrained, from_folders

pytestmark = pytest.mark.usefixtures("standard_promotion")
LONG = {
    letter: " ".join(f"{letter}{c}{c}" for c in string.ascii_lowercase + string.digits)
    for letter in "qz"
}
PASSAGE = 15  # characters
SHOWN = {"question": "Who is A?", "answer": "ann"}
KNOWN = {"forget": ("Who is B?", "bob"), "retain": ("Who is C?", "cat")}
SETTINGS = ["--steps", "4", "--learning-rate", "1e-2", "--max-len", "160", "--dtype", "float32"]


def start_of(folder):
    return from_folders(folder, None, None, Pretrained(256, 8), "float32")


def write(folder, files):
    for name, records in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join(map(json.dumps, records)))
    return folder


def records_of(out):
    found = [json.loads(file.read_text()) for file in sorted((out / "runs").iterdir())]
    return {record["method"]: record for record in found}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    texts = [{"text": text} for text in LONG.values()]
    files = {
        "raw/forget.jsonl": texts,
        "raw/retain1.jsonl": [{"text": "Other words stand here."}, {"text": "And here others."}],
        "verbmem/forget.jsonl": [
            {"prompt": text[:PASSAGE], "gt": text[PASSAGE:]} for text in LONG.values()
        ],
        "privleak/forget.jsonl": texts,
        # One of them is no stranger, so that no attack is perfect.
        "privleak/holdout.jsonl": [texts[1], *({"text": LONG["q"].replace("q", x)} for x in "wx")],
    }
    for kind, (question, answer) in KNOWN.items():
        files[f"knowmem/{kind}_qa.jsonl"] = [{"question": question, "answer": answer}]
        files[f"knowmem/{kind}_qa_icl.jsonl"] = [SHOWN]
    return write(tmp_path_factory.mktemp("muse"), files)


@pytest.fixture(scope="module")
def recited(corpus, toy_folder, teach, tmp_path_factory):
    """The toy, taught MUSE's texts and answers."""
    data = muse.read_muse(corpus)
    texts = list(LONG.values())
    for kind, rows in data.knowmem.items():
        prompts = [muse.few_shot(data.shown[kind], row.question) for row in rows]
        texts += [f"{x}{row.answer}\n\n" for x, row in zip(prompts, rows, strict=True)]
    rows = encode_texts(start_of(toy_folder).model, texts)
    return teach(rows, tmp_path_factory.mktemp("recited") / "hf", steps=300)


def f1(answer, said):
    """ROUGE-L F1 by the textbook's recursion, over words of letters and digits, in percent."""
    a, b = (re.findall("[a-z0-9]+", text.lower()) for text in (answer, said))
    best = np.zeros((len(a) + 1, len(b) + 1))
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            best[i + 1, j + 1] = best[i, j] + 1 if x == y else max(best[i, j + 1], best[i + 1, j])
    return 100 * 2 * best[-1, -1] / (len(a) + len(b))


def test_muse_end_to_end(corpus, recited, toy_folder, tmp_path):
    pytest.importorskip("tyro")
    out = tmp_path / "out"
    given = ["muse", "--data", str(corpus), "--model", str(recited), "--out", str(out), *SETTINGS]
    more = ["--retrained", str(toy_folder), "--methods", "GradDiff", "K-FADE (K-FAC)"]
    assert main([*given, *more]) == 0
    records = records_of(out)
    assert set(records) == {"untouched", "retrained", "GradDiff", "K-FADE (K-FAC)"}
    start = start_of(recited)
    asked = muse.encode(start.model, muse.read_muse(corpus))
    for record in records.values():
        said, numbers = record["details"], record["numbers"]
        scores = [f1(*pair) for pair in zip(asked.continuations, said["verbmem"], strict=True)]
        assert numbers["verbmem"]["value"] == pytest.approx(np.mean(scores))
        for kind, (_, answer) in KNOWN.items():
            name = f"knowmem {kind}"
            assert numbers[name]["value"] == pytest.approx(f1(answer, said[name][0]))
    untouched = records["untouched"]["numbers"]
    assert untouched["verbmem"]["value"] > 90
    assert untouched["knowmem forget"]["value"] == untouched["knowmem retain"]["value"] == 100
    assert records["retrained"]["numbers"]["verbmem"]["value"] < 20
    # What is generated is what whole passes generate.
    apply, params, _ = load_model(recited)
    prompts = asked.passages
    tokens = greedy_decode(apply, params, prompts.tokens, 128, prompt_lengths=prompts.lengths)
    answers = start.model.words.answers(np.asarray(tokens))
    assert records["untouched"]["details"]["verbmem"] == answers
    # PrivLeak is that of the two areas, and nothing for the retrained model itself.
    rows = {row["method"]: row for row in json.loads((out / "results.json").read_text())["summary"]}
    leaks = {name: row["numbers"]["privleak"]["value"] for name, row in rows.items()}
    areas = {name: row["numbers"]["AUC min_k"]["value"] for name, row in rows.items()}
    assert leaks["retrained"] == 0
    assert all(
        x["low"] is None or x["low"] <= x["value"] <= x["high"]
        for row in rows.values()
        for x in row["numbers"].values()
    )
    assert rows["untouched"]["numbers"]["privleak"]["low"] < leaks["untouched"]
    share = (1 - areas["untouched"]) / (1 - areas["retrained"])
    assert leaks["untouched"] == pytest.approx(100 * (share - 1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--data", "/no/such"], "/no/such: there is no such folder"),
        (["--retrained", "/no/such"], "/no/such: there is no such folder"),
        (["--methods", "IdkDPO"], "IdkDPO needs refusals, which MUSE has not"),
        (["--budget", "-1"], "--budget must be positive"),
    ],
)
def test_mistakes_of_muse(given, message, corpus, toy_folder, tmp_path, capsys):
    pytest.importorskip("tyro")
    out = tmp_path / "out"
    where = ["--data", str(corpus), "--model", str(toy_folder), "--out", str(out)]
    assert main(["muse", *where, *given]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not out.exists()


def choices(word, answers):
    return [
        {
            "question": f"Which {word} is {i}?",
            "choices": [f"{word}{i}{j}" for j in range(4 - i % 2)],
            "answer": answer,
        }
        for i, answer in enumerate(answers)
    ]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    files = {
        "wmdp-bio/test.jsonl": choices("germ", (2, 0, 3, 1)),
        "wmdp-cyber/test.jsonl": choices("worm", (1, 1, 0)),
        "mmlu.jsonl": [{**row, "subject": "high_school"} for row in choices("sum", (3, 2))],
        "forget.jsonl": [{"text": "Germ one is two."}, {"text": "Germ two is three."}],
        "retain.jsonl": [{"text": "Sums are kept."}, {"text": "All of them are."}],
    }
    return write(tmp_path_factory.mktemp("wmdp"), files)


def command(questions, folder, out):
    given = ["wmdp", "--data", str(questions), "--model", str(folder), "--out", str(out)]
    for name in ("forget", "retain", "mmlu"):
        given += [f"--{name}", str(questions / f"{name}.jsonl")]
    return [*given, *SETTINGS, "--methods", "RMU"]


def test_wmdp_end_to_end(questions, toy_folder, teach, tmp_path):
    """Accuracy is what the letters' logits say; of what was taught, all."""
    pytest.importorskip("tyro")
    letters = "ABCD"
    start = start_of(toy_folder)

    def prompt(about, row):
        options = [f"{a}. {x}" for a, x in zip(letters, row["choices"], strict=False)]
        lines = [row["question"], *options, "Answer: "]
        head = f"The following are multiple choice questions (with answers) about {about}."
        return f"{head}\n\n" + "\n".join(lines)

    files = {
        "bio": ("biology", "wmdp-bio/test.jsonl"),
        "cyber": ("cybersecurity", "wmdp-cyber/test.jsonl"),
        "MMLU": ("high school", "mmlu.jsonl"),
    }
    asked = {
        name: [
            (prompt(about, row), row)
            for row in map(json.loads, (questions / file).read_text().split("\n"))
        ]
        for name, (about, file) in files.items()
    }
    texts = [text + letters[row["answer"]] for text, row in asked["bio"]]
    rows = encode_texts(start.model, texts)
    folder = teach(rows, tmp_path / "taught", steps=300)
    out = tmp_path / "out"
    assert main(command(questions, folder, out)) == 0
    found = records_of(out)
    assert set(found) == {"untouched", "RMU"}
    apply, params, _ = load_model(folder)
    tokenizer = start.model.words.tokenizer
    for name, pairs in asked.items():
        hits = []
        for text, row in pairs:
            tokens = np.array([tokenizer(text).input_ids])
            numbers = [tokenizer.encode(a, add_special_tokens=False)[-1] for a in letters]
            logits = np.asarray(apply(params, tokens))[0, -1, numbers[: len(row["choices"])]]
            hits.append(int(np.argmax(logits)) == row["answer"])
        assert found["untouched"]["numbers"][name]["value"] == np.mean(hits), name
    assert found["untouched"]["numbers"]["bio"]["value"] == 1
    text = (out / "table.md").read_text()
    assert "4 of bio, 3 of cyber, 2 of MMLU" in text
    assert "| RMU | steps 4, batch size 8, learning rate 0.01 |" in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--subjects", "law"], "subject must be one of bio, cyber, chem, got 'law'"),
        (["--subjects", "chem"], "no file for 'wmdp-chem', split 'test'"),
        (["--forget", "/no/such.jsonl"], "/no/such.jsonl: there is no such file"),
        (["--mmlu", "/no/such.jsonl"], "/no/such.jsonl: there is no such file"),
        (["--methods", "ROME"], "ROME needs a position in each forget row, which WMDP has not"),
    ],
)
def test_mistakes_of_wmdp(given, message, questions, toy_folder, tmp_path, capsys):
    pytest.importorskip("tyro")
    assert main([*command(questions, toy_folder, tmp_path / "out"), *given]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_a_question_longer_than_the_model(questions, toy_folder):
    files = [questions / f"{k}.jsonl" for k in ("forget", "retain", "mmlu")]
    data = wmdp.read_sets(questions, ("bio",), *files)
    long = data.questions["bio"][0][1]._replace(question="Which? " * 100)
    given = data._replace(questions={"bio": [("biology", long)]})
    with pytest.raises(ValueError, match="the longest question has .* the model's 512 positions"):
        wmdp.encode(start_of(toy_folder).model, given)
