"""The rules of an audit: intervals decide, and the worst that is found gives the headline."""

import math

import pytest

from jedit.recipes.audit.rules import (
    HEADLINES,
    REFERENCE,
    RULES,
    TABLE,
    UNSURE,
    judge,
    overall,
    worst_of,
)
from jedit.report.audit_results import Estimate, Outcome

SAID = {"attack": "the loss", "other": "unseen rows", "layer": "layer 1 of 2", "best": "8 rows"}
BUDGET = 0.05


def limit_of(rule):
    return BUDGET if math.isnan(rule.limit) else rule.limit


def judged(rule, value, reach, rows=40):
    x = limit_of(rule) + value
    given = {"limit": BUDGET} if math.isnan(rule.limit) else {}
    return judge(rule.name, Estimate(x, x - reach, x + reach, rows), **given, **SAID)


def sign_of(rule):
    """Which way is better: 1 upwards, -1 downwards."""
    return 1 if rule.kind in ("at least", "p-value") else -1


@pytest.mark.parametrize("rule", TABLE, ids=[rule.name for rule in TABLE])
def test_each_rule_says_yes_no_and_that_it_cannot_tell(rule):
    good, reach = 0.03 * sign_of(rule), 0.02
    if rule.kind == "p-value":
        assert judged(rule, 0.01, 0).outcome is Outcome.PASSED
        assert judged(rule, 0.0, 0).outcome is Outcome.FAILED
        # What finds nothing in a few rows says nothing; what finds something does.
        weak = judged(rule, 0.01, 0, rows=15)
        assert weak.outcome is Outcome.UNDECIDED
        assert "a test that finds no difference in so few" in weak.sentence
        assert judged(rule, 0.0, 0, rows=15).outcome is Outcome.FAILED
    elif rule.kind == "contains":
        assert judged(rule, 0.01, reach).outcome is Outcome.PASSED
        assert judged(rule, 0.03, reach).outcome is Outcome.FAILED
        low = judged(rule, -0.03, reach)
        assert low.outcome is Outcome.FAILED
        assert "less known than unseen rows" in low.sentence
        assert "less known" not in judged(rule, 0.03, reach).sentence
        assert judged(rule, 0.01, 0.3).outcome is Outcome.UNDECIDED
    else:
        assert judged(rule, good, reach).outcome is Outcome.PASSED
        assert judged(rule, -good, reach).outcome is Outcome.FAILED
        # The number in the middle is good, and the interval is not.
        unsure = judged(rule, good, 0.04)
        assert unsure.outcome is Outcome.UNDECIDED
        assert "Cannot tell with 40 rows" in unsure.sentence
    few = judged(rule, good, reach, rows=4)
    assert few.outcome is Outcome.UNDECIDED
    assert "prove nothing" in few.sentence
    if rule.kind != "p-value":
        nothing = Estimate(0.0, math.nan, math.nan, 40)
        assert judge(rule.name, nothing, limit=BUDGET, **SAID).outcome is Outcome.UNDECIDED
    missing = judge(rule.name, None, reason=REFERENCE, limit=BUDGET)
    assert missing.outcome is Outcome.NOT_MEASURED
    assert "--retrained or --unseen" in missing.sentence
    for found in (judged(rule, good, reach), judged(rule, -good, reach)):
        assert found.sentence[0].isupper()
        assert not {"{", "}"} & set(found.sentence + found.limit)
        assert found.source


def test_each_rule_has_a_name_of_its_own_and_a_section_with_a_headline():
    assert len(RULES) == len(TABLE)
    assert {rule.section for rule in TABLE} == set(HEADLINES)


def passing():
    return [judged(rule, 0.01 * (rule.kind != "contains") * sign_of(rule), 0.005) for rule in TABLE]


def failing(findings, *names):
    return [
        judged(RULES[f.rule], -0.03 * sign_of(RULES[f.rule]), 0.0) if f.rule in names else f
        for f in findings
    ]


def test_all_passed_is_forgotten_as_far_as_can_be_told():
    found = overall(passing())
    assert found.outcome is Outcome.PASSED
    assert "as far as these tests can tell" in found.headline


@pytest.mark.parametrize("rule", [r for r in TABLE if r.name != "known"], ids=lambda r: r.name)
def test_any_failure_gives_its_sections_headline(rule):
    found = overall(failing(passing(), rule.name))
    assert found.outcome is Outcome.FAILED
    assert found.headline == HEADLINES[rule.section]
    assert "1 no" in found.sentence


def test_what_is_still_said_outweighs_what_comes_back_and_what_it_cost():
    found = overall(failing(passing(), "retain_kl", "relearning", "rouge_greedy"))
    assert found.headline == HEADLINES["forgotten"]
    found = overall(failing(passing(), "retain_kl", "relearning", "membership"))
    assert found.headline == HEADLINES["comeback"]


def test_of_one_section_the_one_furthest_off_is_named():
    findings = [f for f in passing() if f.rule not in ("probability", "rouge_greedy")]
    findings += [judged(RULES["probability"], 0.1, 0.01), judged(RULES["rouge_greedy"], 0.5, 0.01)]
    assert "(ROUGE-L)" in overall(findings).sentence


def test_nothing_to_forget_comes_first():
    found = overall(failing(passing(), "known", "probability"))
    assert "next to nothing to forget" in found.headline
    assert found.outcome is Outcome.UNDECIDED


def test_without_a_reference_it_says_what_it_cannot_say():
    findings = [judge(r.name, None, reason=REFERENCE, limit=BUDGET) for r in TABLE]
    found = overall(findings, ["Both are one."])
    assert found.outcome is Outcome.UNDECIDED
    assert found.sentence.startswith("Both are one. What was forgotten cannot be judged")
    assert f"{len(TABLE) - 1} were not measured" in found.sentence


@pytest.mark.parametrize("section", sorted(UNSURE))
def test_a_headline_says_forgotten_of_what_was_measured_alone(section):
    rule = next(r for r in TABLE if r.section == section)
    findings = failing(passing(), rule.name)
    gone = [f.section == "forgotten" and f.rule != "known" for f in findings]
    lost = [
        judge(f.rule, None, reason=REFERENCE) if is_gone and f.rule != "probability" else f
        for f, is_gone in zip(findings, gone, strict=True)
    ]
    assert overall(lost).headline == HEADLINES[section]
    none = [
        judge(f.rule, None, reason=REFERENCE) if is_gone else f
        for f, is_gone in zip(findings, gone, strict=True)
    ]
    assert overall(none).headline == UNSURE[section]
    few = [
        judge(f.rule, Estimate(0, 0, 0, 4)) if is_gone else f
        for f, is_gone in zip(findings, gone, strict=True)
    ]
    assert overall(few).headline == UNSURE[section]


def test_what_has_no_bound_is_a_no_and_the_surest_share_is_the_worst():
    for value in (math.inf, math.nan):
        found = judge("retain_kl", Estimate(value, math.nan, math.nan, 40), limit=BUDGET)
        assert found.outcome is (Outcome.FAILED if value == math.inf else Outcome.UNDECIDED)
    limit = RULES["prefix"].limit
    sure = Estimate(limit + 0.05, limit + 0.01, limit + 0.1, 40)
    vague = Estimate(limit + 0.1, limit - 0.2, limit + 0.5, 40)
    fine = Estimate(limit - 0.1, limit - 0.2, limit - 0.01, 40)
    assert worst_of("prefix", {"a": vague, "b": sure, "c": fine}) == "b"
    assert worst_of("prefix", {"a": vague, "c": fine}) == "a"


def test_one_unsure_answer_is_not_a_pass():
    findings = passing()
    findings[2] = judged(RULES["paraphrase"], -0.01, 0.03)
    found = overall(findings)
    assert found.outcome is Outcome.UNDECIDED
    assert "Cannot tell with 40 rows" in found.sentence
