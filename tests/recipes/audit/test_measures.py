"""What an audit measures of one small model, against direct computation."""

import hashlib
import hmac

import jax
import numpy as np
import optax
import pytest

from jedit import metrics
from jedit.attacks.relearning_curve import relearned_values
from jedit.data import DataError, QaRow
from jedit.recipes.audit import comeback, cost, forgotten, membership, nearby
from jedit.recipes.audit.cost import Kept
from jedit.recipes.audit.estimates import Compared, auc_of
from jedit.recipes.audit.rows import RowSets, check_sets, encode, read_salt, row_hash
from jedit.recipes.scenes.question_answer import Model
from jedit.recipes.tofu.models import small_gpt
from jedit.report.audit_results import Outcome
from jedit.tracing import Entering

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax's Adam mixes dtypes
NAMES = ("Ana", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal", "Ida", "Jo", "Kim", "Lou")
ROWS = [
    QaRow(
        f"Who is {name}?",
        f"{name} is a baker from {name.lower()}ville.",
        f"Tell me of {name}.",
        f"From {name.lower()}ville comes {name}, a baker.",
        (f"{name} is a king.", f"{name} is a fox."),
        fields={"shelf": i % 3},
    )
    for i, name in enumerate(NAMES)
]
SALT = bytes(range(32))


@pytest.fixture(scope="module")
def start():
    size = Model(width=16, layers=1, heads=2, vocab=300, max_len=64)
    return small_gpt(ROWS, size, "float32", key=jax.random.key(0))


def encoded(start, rows=ROWS, name="forget", most=400):
    return encode(start.model, name, rows, most=most, salt=SALT)


def test_rows_are_named_by_salted_hashes_alone():
    row = QaRow("Who  is Ana?", " A\tbaker.")
    expected = hmac.new(SALT, b"Who is Ana?\nA baker.", hashlib.sha256).hexdigest()
    assert row_hash(row, SALT) == expected
    assert row_hash(row, bytes(32)) != expected


def test_of_many_rows_some_are_asked_spread_over_the_set(start):
    found = encoded(start, most=4)
    assert [row.question for row in found.rows] == [ROWS[i].question for i in (0, 4, 7, 11)]
    assert found.about.given == 12
    assert list(found.about.hashes) == [row_hash(row, SALT) for row in found.rows]


def test_spans_count_in_rows_to_forget_and_not_in_those_to_keep(start):
    marked = [row._replace(forget_span=((0, 3),)) for row in ROWS]
    count = lambda asked: np.asarray(asked.whole.mask).sum()  # noqa: E731
    assert count(encoded(start, marked)) < 0.5 * count(encoded(start))
    assert count(encoded(start, marked, "retain")) == count(encoded(start))


def test_a_question_that_fills_the_model_is_refused(start):
    with pytest.raises(ValueError, match=r"the rows of unseen: .* alone fills the model's 64"):
        encoded(start, [ROWS[0], ROWS[1]._replace(question="Who? " * 99)], "unseen")


def test_what_a_model_says_is_what_the_metrics_say(start, key):
    asked = encoded(start)
    said = forgotten.said_of(start.model, start.params, asked, key=key)
    assert set(said.values) == {*forgotten.TEXTS, "refused"}
    # Its answers are the rows' own, or nonsense: no refusals.
    assert said.values["refused"].tolist() == [0] * len(asked.rows)
    logits = np.asarray(start.model.apply(start.params, asked.whole.inputs), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p, np.asarray(asked.whole.targets)[..., None], -1)[..., 0]
    mask = np.asarray(asked.whole.mask)
    np.testing.assert_allclose(said.loss, -(picked * mask).sum(1) / mask.sum(1), rtol=1e-4)
    np.testing.assert_allclose(said.values["probability"], np.exp(-said.loss))
    assert np.all(said.values["rouge_sampled"] >= 0)
    greedy = forgotten.said_of(start.model, start.params, asked, key=key, draws=0)
    assert "rouge_sampled" not in greedy.values
    bare = encoded(start, [ROWS[0]._replace(paraphrased_answer=None), *ROWS[1:]])
    assert (
        "paraphrase"
        not in forgotten.said_of(start.model, start.params, bare, key=key, draws=0).values
    )


def test_refusals_are_of_what_the_model_says_and_in_the_rows_order(start, key, monkeypatch):
    """Of what it says, not of the truths; and a truth that is a refusal refuses nothing."""
    rows = [ROWS[0]._replace(answer="I do not know."), *ROWS[1:]]
    said = [row.answer for row in ROWS]
    said[3] = said[7] = "I'm sorry, but I do not know."
    monkeypatch.setattr(forgotten, "answers_of", lambda *_: said)
    given = (start.model, start.params, encoded(start, rows))
    found = forgotten.rouge_of(*given, key=key, draws=0)
    assert np.flatnonzero(found["refused"]).tolist() == [3, 7]


def test_findings_need_something_to_compare_with():
    base, edited = np.linspace(0.6, 0.9, 12), np.linspace(0.1, 0.2, 12)
    names = list(forgotten.TEXTS)
    alone = {name: Compared(base, edited) for name in names}
    assert {f.outcome for f in forgotten.findings_of(alone, ROWS)} == {Outcome.NOT_MEASURED}
    kept = {name: Compared(base, base, edited) for name in names if name != "paraphrase"}
    found = {f.rule: f.outcome for f in forgotten.findings_of(kept, ROWS)}
    assert found.pop("known") is Outcome.PASSED
    assert found.pop("paraphrase") is Outcome.NOT_MEASURED
    assert set(found.values()) == {Outcome.FAILED}
    gone = {name: Compared(base, edited, edited) for name in names}
    found = {f.rule: f.outcome for f in forgotten.findings_of(gone, ROWS)}
    assert set(found.values()) == {Outcome.PASSED, Outcome.UNDECIDED} or set(found.values()) == {
        Outcome.PASSED
    }
    never = {name: Compared(edited, edited, edited) for name in names}
    found = {f.rule: f.outcome for f in forgotten.findings_of(never, ROWS)}
    assert found["known"] is Outcome.FAILED
    assert found["extraction_strength"] is Outcome.NOT_MEASURED


def test_attacks_on_membership_see_which_rows_are_likelier(start):
    asked = encoded(start)
    loss = metrics.answer_nll_per_row(start.model.apply, start.params, asked.answers)
    scores = membership.scores_of(start.model, start.params, asked, loss, loss)
    assert set(scores) == set(membership.TEXTS)
    np.testing.assert_array_equal(scores["reference"], 0)
    ours = {name: x - 10 for name, x in scores.items()}
    said = {role: forgotten.Said(loss, {}) for role in ("base", "edited", "unseen")}
    seen = membership.Seen(ours, scores)
    findings = membership.findings_of({"base": seen, "edited": seen}, said, {"edited": None})
    assert [f.rule for f in findings] == ["membership", "losses"]
    assert findings[0].outcome is Outcome.FAILED
    assert findings[1].estimate.value == 1  # the same numbers are spread alike
    assert findings[1].outcome is Outcome.UNDECIDED  # of 12 rows, which is too few to say so
    by_name = {m.name: m for m in membership.measures_of({"edited": seen})}
    assert by_name["loss"].models["edited"].value == 1
    together = auc_of(ours["loss"], loss, level=1 - 0.05 / 6)
    assert by_name["loss"].models["edited"] == together
    assert together.low < auc_of(ours["loss"], loss).low
    assert findings[0].estimate == together
    three = {"edited": seen, "retrained": seen}
    said["retrained"] = forgotten.Said(loss + 10, {})
    findings = membership.findings_of(three, said, {"edited": loss, "retrained": loss})
    assert [f.rule for f in findings] == ["membership_retrained", "losses", "forget_quality"]
    assert [f.outcome.name for f in findings] == ["PASSED", "FAILED", "UNDECIDED"]
    assert membership.findings_of({}, said, {})[0].outcome is Outcome.NOT_MEASURED


def test_truth_ratios_are_of_the_wrong_answers(start):
    found = membership.truth_ratios_of(start.model, start.params, encoded(start))
    nll = lambda pairs: metrics.answer_nll_per_row(  # noqa: E731
        start.model.apply, start.params, start.model.encode(pairs)
    )
    right = nll([(row.question, row.paraphrased_answer) for row in ROWS])
    wrong = [nll([(row.question, row.perturbed_answer[i]) for row in ROWS]) for i in (0, 1)]
    np.testing.assert_allclose(found, np.exp(right - np.mean(wrong, axis=0)), rtol=1e-4)
    bare = encoded(start, [ROWS[0]._replace(perturbed_answer=()), *ROWS[1:]])
    assert membership.truth_ratios_of(start.model, start.params, bare) is None


def test_teaching_some_rows_is_measured_on_the_others(start, key):
    asked = encoded(start)
    spending = comeback.Spending(rates=(1e-3, 1e-9), looks=(6,), shares=(1 / 3,))
    found = comeback.relearned(start.model, start.params, asked, spending, key=key)
    assert (found.taught, found.steps) == ([4], [0, 6])
    before = np.exp(-metrics.answer_nll_per_row(start.model.apply, start.params, asked.answers))
    np.testing.assert_allclose(found.values[0, 0], before[found.asked], rtol=1e-4)
    # The rate that does nothing is not the one that counts.
    assert found.rates[0, 1] == 1e-3
    assert found.values[0, 1].mean() > 1.05 * found.values[0, 0].mean()
    few = encoded(start, ROWS[:1])
    assert comeback.relearned(start.model, start.params, few, spending, key=key) is None
    lessons = encoded(start, ROWS, "retain")
    sets = {"edited": asked, "unseen": encoded(start, ROWS[:5], "unseen")}
    benign = comeback.retrained_on_others(
        start.model, start.params, sets, lessons, spending, key=key
    )
    assert benign["edited"].taught == benign["unseen"].taught == [4]
    assert benign["edited"].values.shape == (1, 2, 12)
    np.testing.assert_allclose(benign["unseen"].values, benign["edited"].values[..., :5], rtol=1e-4)


def test_an_attack_that_diverges_is_a_failed_attack(start, key):
    asked = encoded(start)
    broken = jax.tree.map(lambda x: np.nan * x, start.params)
    spending = comeback.Spending(rates=(1e-3,), looks=(1, 2), shares=(1 / 3,))
    for params in (broken, start.params):
        found = comeback.relearned(start.model, params, asked, spending, key=key, counts=(2, 7))
        assert found.taught == [2]  # 7 of 12 would leave fewer to ask about
        assert np.isfinite(found.values).all() == (params is start.params)
    looks = iter([1.0])
    values = relearned_values(
        start.model.apply,
        broken,
        asked.whole,
        looks=(1, 2),
        measure=lambda _: next(looks),
        optimizer=optax.adam(1e-3),
        key=key,
    )
    np.testing.assert_array_equal(values, [1, np.nan, np.nan])


def test_marked_rows_are_not_judged_by_whole_answers(start):
    marked = [row._replace(forget_span=((0, 3),)) for row in ROWS]
    assert membership.truth_ratios_of(start.model, start.params, encoded(start, marked)) is None
    base, edited = np.full(12, 0.9), np.linspace(0.1, 0.2, 12)
    known = {name: Compared(base, base, edited) for name in forgotten.TEXTS}
    found = {f.rule: f for f in forgotten.findings_of(known, marked)}
    assert found["probability"].outcome is Outcome.FAILED
    for name in forgotten.WHOLE:
        assert found[name].outcome is Outcome.NOT_MEASURED
        assert "forget_span" in found[name].sentence


def test_attacks_without_training(start):
    asked = encoded(start)
    found = comeback.attacked(start.model, start.params, asked, ROWS[0])
    assert set(found.prefixes) == {*comeback.PREFIXES, "an example"}
    assert set(found.quantized) == {8, 4}
    pairs = [(row.paraphrased_question, row.answer) for row in ROWS]
    nll = metrics.answer_nll_per_row(start.model.apply, start.params, start.model.encode(pairs))
    np.testing.assert_allclose(found.other_words, np.exp(-nll), rtol=1e-4)
    long = ROWS[0]._replace(answer="long " * 200)
    assert set(comeback.attacked(start.model, start.params, asked, long).prefixes) == set(
        comeback.PREFIXES
    )


def curve(values, taught=4):
    places = np.arange(values.shape[-1])
    return comeback.Relearning([taught], [0, 2], places, values[None], np.array([[np.nan, 1e-5]]))


def test_what_comes_back_beyond_unseen_rows_is_judged():
    base, low = np.full(12, 0.9), np.linspace(0.1, 0.12, 12)
    known = Compared(base, low, None, low, low)
    nothing = comeback.Attacked({8: low, 4: base}, {"p": low}, None)
    back = comeback.Comebacks(
        {"edited": nothing},
        {"edited": curve(np.stack([low, base])), "unseen": curve(np.stack([low, low]))},
        {"edited": curve(np.stack([low, low]))},
    )
    found = {f.rule: f.outcome for f in comeback.findings_of(known, back)}
    assert found["relearning"] is found["quantized_4_bits"] is Outcome.FAILED
    assert found["benign"] is found["quantized_8_bits"] is found["prefix"] is Outcome.PASSED
    assert found["other_words"] is Outcome.NOT_MEASURED
    # Where unseen rows gain as much, nothing has come back.
    also = back._replace(relearned=dict.fromkeys(("edited", "unseen"), back.relearned["edited"]))
    found = {f.rule: f.outcome for f in comeback.findings_of(known, also)}
    assert found["relearning"] is Outcome.PASSED
    alone = {
        f.rule: f
        for f in comeback.findings_of(
            Compared(base, low), back._replace(relearned={"edited": back.relearned["edited"]})
        )
    }
    assert "--retrained or enough --unseen" in alone["relearning"].sentence
    assert alone["quantized_4_bits"].outcome is Outcome.FAILED
    # An edit that took little: that all of it comes back is little of what was known.
    little = Compared(base, base - 0.01, None, low, low)
    found = comeback.findings_of(little, back)
    assert {f.outcome for f in found} == {Outcome.NOT_MEASURED}
    assert "took next to nothing away" in found[0].sentence
    assert "what was taken away" in alone["quantized_4_bits"].sentence
    # A control that was taught another number of rows is none.
    less = {**back.relearned, "unseen": back.relearned["unseen"]._replace(taught=[2])}
    found = {f.rule: f.outcome for f in comeback.findings_of(known, back._replace(relearned=less))}
    assert found["relearning"] is Outcome.NOT_MEASURED
    untouched = comeback.findings_of(Compared(base, base), back)
    assert {f.outcome for f in untouched} == {Outcome.NOT_MEASURED}


def test_the_cost_is_told_by_group(start):
    asked = encoded(start, ROWS, "retain")
    loss, kl = np.linspace(1, 2, 12), np.arange(12) / 100
    rouge = {"rouge_greedy": np.linspace(0.5, 0.9, 12), "refused": np.zeros(12)}
    less = {"rouge_greedy": 0.5 * rouge["rouge_greedy"], "refused": (np.arange(12) % 6 == 2) * 1.0}
    said = {"base": forgotten.Said(loss, rouge), "edited": forgotten.Said(loss + 1, less)}
    kept = Kept(said, kl, None)
    groups, notes = cost.groups_of(kept, asked, "shelf")
    assert [m.name for m in groups] == ["2", "1", "0"]
    assert groups[0].models["kl"].value == pytest.approx(kl[2::3].mean())
    assert groups[0].models["edited"].value == pytest.approx(np.exp(1 + loss[2::3].mean()))
    refused = [[m.models[f"refused_{r}"].value for r in ("base", "edited")] for m in groups]
    assert refused == [[0, 0.5], [0, 0], [0, 0]]
    assert "Of 3 groups by shelf, 2 paid most" in notes[0]
    assert len(notes) == 1
    assert cost.neighbours_of(kept, asked, "shelf", ["0"]) == ()
    why, notes = cost.groups_of(kept._replace(near="ValueError: why"), asked, "shelf")
    assert why == groups
    assert notes[1].endswith("is not known: ValueError: why.")
    with pytest.raises(DataError, match='no row to keep has the field "author"; there are shelf'):
        cost.check_group(asked, "author")
    outcomes = [f.outcome for f in cost.findings_of(kept, 0.1)]
    assert outcomes == [Outcome.PASSED, Outcome.FAILED]
    assert [f.outcome for f in cost.findings_of(kept, 0.01)][0] is Outcome.FAILED
    by_name = {m.name: m for m in cost.measures_of(kept)}
    assert by_name["perplexity"].models["base"].value == pytest.approx(np.exp(1.5))


def test_what_became_of_groups_stands_beside_how_near_they_are(start):
    asked, towns = encoded(start, ROWS, "retain"), encoded(start, ROWS[:3])
    near = nearby.nearness_of(start.model, start.params, towns, asked, "shelf")
    hidden = Entering("head/kernel")
    states = np.asarray(hidden(start.model.apply, start.params, asked.whole.inputs), np.float64)
    ends = states[np.arange(12), np.asarray(asked.prompts.lengths) - 1]
    means = np.stack([ends[i::3].mean(axis=0) for i in range(3)])
    target = ends[:3].mean(axis=0) - means.mean(axis=0)
    apart = means - means.mean(axis=0)
    cosines = apart @ target / np.linalg.norm(apart, axis=1) / np.linalg.norm(target)
    assert near == pytest.approx(dict(zip("012", cosines, strict=True)), rel=1e-3)
    one = nearby.nearness_of(start.model, start.params, towns, asked, "author")
    assert one == "ValueError: nearness needs two groups to tell apart, got 1"
    refused = (np.arange(12) % 6 == 2) * 1.0
    before = {"probability": np.full(12, 0.5), "rouge_greedy": np.ones(12), "refused": 0 * refused}
    after = before | {"refused": refused}
    said = {"base": forgotten.Said(refused, before), "edited": forgotten.Said(refused, after)}
    kept = Kept(said, refused, None, near)
    groups, notes = cost.groups_of(kept, asked, "shelf")
    assert {m.name: m.models["near"].value for m in groups} == near
    assert "a cosine around the mean of all groups" in notes[1]
    found = cost.neighbours_of(kept, asked, "shelf", ["2", "0"])
    assert {d.name: d.refusal.change for d in found} == {"2": 0.5, "0": 0}
    assert [d.nearness for d in found] == sorted((near["0"], near["2"]), reverse=True)


def test_sets_that_share_rows_are_refused():
    with pytest.raises(DataError, match="this unseen row also stands among the rows to keep"):
        check_sets(RowSets(ROWS[:2], ROWS[2:], ROWS[3:4]))
    with pytest.raises(DataError, match="also stands in retain"):
        check_sets(RowSets(ROWS[:2], ROWS[1:], []))
    marked = [row._replace(forget_span=((0, 3),)) for row in ROWS[:2]]
    with pytest.raises(DataError, match="forget_span in both, or in none"):
        check_sets(RowSets(marked, ROWS[4:], ROWS[2:4]))
    check_sets(RowSets(marked, ROWS[4:], []))


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"0" * 63, b"g" * 64, None])
def test_a_file_that_is_no_salt_is_refused(tmp_path, content):
    path = tmp_path / "salt.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"salt.txt: is no salt: a file with 64 hexadecimal"):
        read_salt(path)
    path.write_text("ab" * 32 + "\n")
    assert read_salt(path) == b"\xab" * 32
