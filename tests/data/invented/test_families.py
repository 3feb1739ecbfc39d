"""The families: their facts by brute force over who is married to whom and whose child is whose."""

import inspect
import itertools

import numpy as np
import pytest

from jedit.data.invented.families import (
    COMPOSITIONS,
    INVERSES,
    PEOPLE,
    RELATIONS,
    Fact,
    backwards,
    entailed,
    fact_rows,
    make_families,
    rewrite,
)

SEX = dict(zip(PEOPLE, "mwmwmwmwmw", strict=True))
MARRIED = {("Christopher", "Penelope"), ("Andrew", "Christine"), ("James", "Victoria")}
PARENTS = {
    "Arthur": ("Christopher", "Penelope"),
    "Victoria": ("Christopher", "Penelope"),
    "James": ("Andrew", "Christine"),
    "Jennifer": ("Andrew", "Christine"),
    "Colin": ("James", "Victoria"),
    "Charlotte": ("James", "Victoria"),
}


def world(married, parents, sex):
    """All facts (who, relation, who), each from its own definition, over all pairs of people."""
    found = set()
    for a, b in itertools.permutations(sex, 2):
        if (b, a) in married:
            found.add((a, "husband", b))
        if (a, b) in married:
            found.add((a, "wife", b))
        if b in parents.get(a, ()):
            found.add((a, "father" if sex[b] == "m" else "mother", b))
        if a in parents.get(b, ()):
            found.add((a, "son" if sex[b] == "m" else "daughter", b))
        if a in parents and parents.get(a) == parents.get(b):
            found.add((a, "brother" if sex[b] == "m" else "sister", b))
    return found


FACTS = world(MARRIED, PARENTS, SEX)


def in_words(families, facts):
    return {tuple(families.words[token].split("-")[0] for token in fact) for fact in facts}


@pytest.fixture(scope="module")
def families():
    return make_families(3, 6)


def test_a_family_has_the_36_facts_of_its_marriages_and_births(families):
    assert len(FACTS) == 36
    for number in range(6):
        facts = families.of([number])
        assert len(facts) == 36
        assert in_words(families, facts) == FACTS
        people = np.unique(facts[:, [0, 2]])
        assert {families.words[token] for token in people} == {f"{p}-{number}" for p in PEOPLE}
    assert [families.is_male[families.token(p, 2)] for p in PEOPLE] == [
        s == "m" for s in SEX.values()
    ]
    assert not families.is_male[: 2 * len(RELATIONS)].any()


def test_half_of_the_families_lose_their_fathers_and_mothers(families):
    lost = [families.of([number], withheld=True) for number in range(6)]
    assert sorted(map(len, lost)) == [0, 0, 0, 12, 12, 12]
    for facts in lost:
        assert {RELATIONS[r] for r in facts[:, 1]} <= {"father", "mother"}
    kept = {number: families.of([number], withheld=False) for number in range(6)}
    assert all(len(kept[n]) + len(lost[n]) == 36 for n in range(6))
    # What is withheld could be said: its inverse is there.
    for number, facts in enumerate(lost):
        seen = {tuple(fact) for fact in kept[number].tolist()}
        for s, _, o in facts.tolist():
            assert any(a == o and b == s for a, _, b in seen)


def test_the_rules_are_those_that_hold_without_exception():
    """By brute force over the one family: every pair of relations, wherever it leads."""
    inverse, composed = {}, {}
    for s, r, o in FACTS:
        inverse.setdefault((r, SEX[s]), set()).update(q for a, q, b in FACTS if (a, b) == (o, s))
        for middle, r2, end in FACTS:
            if middle == o and end != s:
                relations = {q for a, q, b in FACTS if (a, b) == (s, end)}
                composed.setdefault((r, r2), []).append(relations)
    assert {
        (RELATIONS[r], "mw"[i]): {RELATIONS[q]}
        for r, pair in INVERSES.items()
        for i, q in enumerate(pair)
        if (RELATIONS[r], "mw"[i]) in inverse
    } == inverse
    without_exception = {
        pair: next(iter(found[0]))
        for pair, found in composed.items()
        if all(len(relations) == 1 for relations in found) and len(set.union(*found)) == 1
    }
    assert {
        tuple(RELATIONS[r] for r in pair): RELATIONS[r] for pair, r in COMPOSITIONS.items()
    } == without_exception


def test_all_of_a_family_follows_from_a_few_facts(families):
    at = {p: families.token(p, 1) for p in PEOPLE}
    r = {name: i for i, name in enumerate(RELATIONS)}
    few = [(at[man], r["wife"], at[woman]) for man, woman in MARRIED]
    few += [
        (at[fathers], r["son" if SEX[child] == "m" else "daughter"], at[child])
        for child, (fathers, _) in PARENTS.items()
    ]
    found = entailed([Fact(*fact) for fact in few], families.is_male)
    assert len(few) + len(found) == 36
    assert in_words(families, few) | in_words(families, found) == FACTS


@pytest.mark.parametrize(
    ("old", "stranger"),
    [
        (("Christine", "husband", "Andrew"), "Colin"),
        (("Victoria", "husband", "James"), "Arthur"),
        (("James", "mother", "Christine"), "Jennifer"),
        (("Victoria", "daughter", "Charlotte"), "Charlotte"),
        (("Arthur", "sister", "Victoria"), "Jennifer"),
    ],
)
def test_what_follows_from_a_rewritten_fact_is_the_world_with_another_person(
    families, old, stranger
):
    """By brute force over the world in which the stranger has the old one's spouse or parents."""
    s, r, o = old
    is_child = r in ("daughter", "sister")
    married, parents = set(), {}
    for pair in MARRIED:
        # A new child is nobody's spouse or parent; a new parent is of no house of his own.
        if not (is_child and o in pair):
            married.add(tuple("NEW" if person == o else person for person in pair))
    for child, pair in PARENTS.items():
        if child == o:
            if is_child:
                parents["NEW"] = pair
        elif not (is_child and o in pair):
            parents[child] = tuple("NEW" if person == o else person for person in pair)
    sex = {p: x for p, x in SEX.items() if p != o} | {"NEW": SEX[o]}
    expected = {f for f in world(married, parents, sex) if "NEW" in f} - {(s, r, "NEW")}
    tokens = Fact(families.token(s, 0), RELATIONS.index(r), families.token(o, 0))
    found = rewrite(families, tokens, families.token(stranger, 4))
    name = f"{stranger}-4"

    def worded(facts):
        return {
            tuple(
                "NEW" if families.words[t] == name else families.words[t].split("-")[0] for t in f
            )
            for f in facts
        }

    assert worded(found.entailed) == expected
    assert len(found.entailed) == len(expected)
    assert worded([found.new]) == {(s, r, "NEW")}
    assert {f[2] for f in worded(found.reverse)} == {s}
    assert all(f[0] == "NEW" for f in worded(found.onto_new) | worded(found.reverse))
    assert all(f[2] == "NEW" for f in worded(found.of_others))
    assert in_words(families, found.unrelated) == {f for f in FACTS if o not in f}


def test_the_paper_s_edit_has_the_paper_s_consequences(families):
    """CustomFamilyDataset of the paper's code, target G1_HUSBAND_2: by name."""
    old = Fact(families.token("Christine", 0), 0, families.token("Andrew", 0))
    found = rewrite(families, old, families.token("Colin", 1))
    assert in_words(families, found.reverse) == {("Colin", "wife", "Christine")}
    assert in_words(families, found.onto_new) == {
        ("Colin", "son", "James"),
        ("Colin", "daughter", "Jennifer"),
    }
    assert in_words(families, found.of_others) == {
        ("James", "father", "Colin"),
        ("Jennifer", "father", "Colin"),
    }


def test_rows_ask_for_the_object_alone(families):
    facts = families.of([2])[:5]
    batch = fact_rows(facts)
    assert np.array_equal(np.asarray(batch.inputs), facts[:, :2])
    assert np.array_equal(np.asarray(batch.targets)[:, 1], facts[:, 2])
    assert np.asarray(batch.mask).tolist() == [[0, 1]] * 5
    turned = backwards(facts)
    assert np.array_equal(turned[:, [2, 0]], facts[:, [0, 2]])
    assert [families.words[r] for r in turned[:, 1]] == [
        f"{families.words[r]} backwards" for r in facts[:, 1]
    ]


def test_equal_seeds_give_equal_families():
    one, two = (make_families(5, 4) for _ in range(2))
    assert one.words == two.words
    assert np.array_equal(one.facts, two.facts)
    assert np.array_equal(one.is_withheld, two.is_withheld)
    assert make_families(6, 4).words != one.words


def test_the_defaults_are_those_of_the_paper_s_code():
    given = inspect.signature(make_families).parameters
    assert given["withheld"].default == ("father", "mother")
    assert given["share"].default == 0.5


def test_what_cannot_be_is_refused(families):
    with pytest.raises(ValueError, match="num_families must be at least 1, got 0"):
        make_families(0, 0)
    with pytest.raises(ValueError, match=r"share .*1.5"):
        make_families(0, 3, share=1.5)
    with pytest.raises(ValueError, match=r"withheld has \['uncle'\]; the relations are husband"):
        make_families(0, 3, withheld=("uncle",))
    old = Fact(families.token("Christine", 0), 0, families.token("Andrew", 0))
    with pytest.raises(ValueError, match=r"Jennifer-1 cannot take the place of Andrew-0"):
        rewrite(families, old, families.token("Jennifer", 1))
    with pytest.raises(ValueError, match="must be a person of another family"):
        rewrite(families, old, families.token("Arthur", 0))
    with pytest.raises(ValueError, match="must be a person of another family"):
        rewrite(families, old, 3)
    with pytest.raises(ValueError, match="James-1 is married and would be so again"):
        rewrite(families, old, families.token("James", 1))
    # A child whose mother is another has her for the father's wife too.
    child = Fact(families.token("James", 0), 3, families.token("Christine", 0))
    with pytest.raises(ValueError, match="Victoria-1 is married"):
        rewrite(families, child, families.token("Victoria", 1))
    with pytest.raises(ValueError, match="is no fact of these families"):
        rewrite(families, Fact(old.subject, 1, old.object), families.token("Colin", 1))
