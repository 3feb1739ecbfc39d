"""Synthetic families as facts "subject relation object", and what follows from what (2509.21993).

Every family has the ten people and the 36 facts of Hinton's family trees, as the paper's code has
them: two couples, a son and a daughter of each, of whom the daughter of the one marries the son of
the other, and their son and daughter. Eight relations: husband, wife, father, mother, sister,
brother, son, daughter. Full size is 1,000 families [code].

In some of the families two relations are withheld, father and mother of half of them [code]: a
model that is trained on the rest has seen "father son child", but no "child father" of these
families, so that asking for it measures the reversal curse. Their inverses are all there.

A fact is three tokens: who, relation, who. Nothing else is said of a person, and no two families
share a token.

    inverse         s r o        =>  o r' s       r' by the sex of s: father -> son or daughter
    composition     s r1 m, m r2 o  =>  s r3 o    o is not s: mother's husband -> father

Differences. In the paper a person has a name of several tokens, of which the family shares all but
the first, and a text holds all facts of a family in random order; here a person is one token and a
text is one fact (ours: it makes small models enough). The rules of composition are ours, all that
hold in such families without exception [derived: a test finds them by brute force]; the paper
names four. The reversed facts are those of reverse training (arXiv 2403.13799), with relations of
their own, which the paper does not use.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from jedit.core.batch import Batch
from jedit.core.checks import COUNT, SHARE, check_numbers

RELATIONS = ("husband", "wife", "father", "mother", "sister", "brother", "son", "daughter")
HUSBAND, WIFE, FATHER, MOTHER, SISTER, BROTHER, SON, DAUGHTER = range(len(RELATIONS))
PEOPLE = (
    *("Christopher", "Penelope", "Andrew", "Christine", "Arthur"),
    *("Victoria", "James", "Jennifer", "Colin", "Charlotte"),
)
MEN = ("Christopher", "Andrew", "Arthur", "James", "Colin")
# Husband, wife, their son and their daughter.
HOUSEHOLDS = (
    ("Christopher", "Penelope", "Arthur", "Victoria"),
    ("Andrew", "Christine", "James", "Jennifer"),
    ("James", "Victoria", "Colin", "Charlotte"),
)
# The relation of the object to the subject, where the subject is a man, and where a woman.
INVERSES = {
    HUSBAND: (WIFE, WIFE),
    WIFE: (HUSBAND, HUSBAND),
    FATHER: (SON, DAUGHTER),
    MOTHER: (SON, DAUGHTER),
    SISTER: (BROTHER, SISTER),
    BROTHER: (BROTHER, SISTER),
    SON: (FATHER, MOTHER),
    DAUGHTER: (FATHER, MOTHER),
}
# "the mother's husband is the father": (MOTHER, HUSBAND) -> FATHER, and so on.
COMPOSITIONS = {
    **{(MOTHER, HUSBAND): FATHER, (FATHER, WIFE): MOTHER},
    **{(SON, SISTER): DAUGHTER, (DAUGHTER, BROTHER): SON},
    **{(HUSBAND, SON): SON, (HUSBAND, DAUGHTER): DAUGHTER},
    **{(WIFE, SON): SON, (WIFE, DAUGHTER): DAUGHTER},
    **{(BROTHER, FATHER): FATHER, (BROTHER, MOTHER): MOTHER},
    **{(SISTER, FATHER): FATHER, (SISTER, MOTHER): MOTHER},
    **{(FATHER, SON): BROTHER, (FATHER, DAUGHTER): SISTER},
    **{(MOTHER, SON): BROTHER, (MOTHER, DAUGHTER): SISTER},
    **{(SON, FATHER): HUSBAND, (SON, MOTHER): WIFE},
    **{(DAUGHTER, FATHER): HUSBAND, (DAUGHTER, MOTHER): WIFE},
}
WITHHELD = ("father", "mother")

Facts = Int[np.ndarray, "n 3"]


class Fact(NamedTuple):
    """One fact, in tokens: the `object` is the subject's husband, wife, father and so on."""

    subject: int
    relation: int
    object: int


class Families(NamedTuple):
    """Families, their facts and their tokens.

    The first tokens are those of the relations, then follow as many of the relations read
    backwards (see `backwards`), then the people.

    Attributes:
        words: the word of every token, such as "mother" and "Colin-17", Colin of family 17.
        is_male: whether a token is a man's; False of relations.
        facts: all facts as tokens, subject, relation and object, the 36 of a family together.
        family: number of the family that a fact is of.
        is_withheld: whether the fact is kept from training.
    """

    words: tuple[str, ...]
    is_male: Bool[np.ndarray, " vocab"]
    facts: Facts
    family: Int[np.ndarray, " n"]
    is_withheld: Bool[np.ndarray, " n"]

    def token(self, name: str, family: int) -> int:
        """Return the token of one of `PEOPLE` in a family."""
        return self.words.index(f"{name}-{family}")

    def of(self, families: Collection[int], *, withheld: bool | None = None) -> Facts:
        """Return the facts of some families; those withheld, those not, or (None) all of them."""
        chosen = np.isin(self.family, list(families))
        if withheld is not None:
            chosen &= self.is_withheld == withheld
        return self.facts[chosen]


class RewrittenFact(NamedTuple):
    """One fact rewritten, and the facts by which the rest of the world is judged after it.

    Attributes:
        old: the fact that held.
        new: the fact with the new object in the place of the old one.
        reverse: what the new fact says read the other way, (1, 3).
        onto_new: what else follows with the new person for its subject, such as his children.
        of_others: what follows with the new person for its object, such as a child's new father.
        unrelated: facts of the same family that name neither the old person nor the new.
    """

    old: Fact
    new: Fact
    reverse: Facts
    onto_new: Facts
    of_others: Facts
    unrelated: Facts

    @property
    def entailed(self) -> Facts:
        """Return all that follows from the new fact."""
        return np.concatenate([self.reverse, self.onto_new, self.of_others])


def make_families(
    seed: int,
    num_families: int,
    *,
    withheld: Sequence[str] = WITHHELD,
    share: float = 0.5,
) -> Families:
    """Make families, of some of which some relations are withheld from training.

    Equal arguments give equal families. The seed decides which families lose the relations, and
    which person has which token.

    Args:
        seed: seed of the generator.
        num_families: number of families of ten people; paper: 1,000.
        withheld: the relations that are kept from training, father and mother [code].
        share: share of the families in which they are; 0.5 [code].

    Returns:
        The families.

    Raises:
        ValueError: a number is out of its range, or a relation is none of the eight.
    """
    check_numbers(COUNT, num_families=num_families)
    check_numbers(SHARE, share=share)
    if unknown := [name for name in withheld if name not in RELATIONS]:
        raise ValueError(f"withheld has {unknown}; the relations are {', '.join(RELATIONS)}")
    rng = np.random.default_rng(seed)
    first, number = 2 * len(RELATIONS), len(PEOPLE) * num_families
    tokens = first + rng.permutation(number).reshape(num_families, len(PEOPLE))
    one_way = rng.permutation(num_families)[: round(share * num_families)]
    words = [*RELATIONS, *(f"{name} backwards" for name in RELATIONS), *[""] * number]
    is_male = np.zeros(first + number, bool)
    for family, row in enumerate(tokens):
        for name, token in zip(PEOPLE, row, strict=True):
            words[token] = f"{name}-{family}"
            is_male[token] = name in MEN
    pattern = np.array(_facts_of_one())
    facts = np.stack(
        [
            tokens[:, pattern[:, 0]],
            np.broadcast_to(pattern[:, 1], (num_families, len(pattern))),
            tokens[:, pattern[:, 2]],
        ],
        axis=-1,
    ).reshape(-1, 3)
    family = np.repeat(np.arange(num_families), len(pattern))
    lost = np.isin(facts[:, 1], [RELATIONS.index(name) for name in withheld])
    is_withheld = lost & np.isin(family, one_way)
    return Families(tuple(words), is_male, facts.astype(np.int32), family, is_withheld)


def entailed(facts: Collection[Fact], is_male: Bool[np.ndarray, " vocab"]) -> set[Fact]:
    """Return what follows from facts by inverses and compositions, and is not among them.

    Args:
        facts: the facts that hold.
        is_male: whether a token is a man's, as `Families` has it.

    Returns:
        All that follows, in one step or in many.
    """
    known = {Fact(*map(int, fact)) for fact in facts}
    given = set(known)
    while True:
        found = {Fact(o, INVERSES[r][0 if is_male[s] else 1], s) for s, r, o in known}
        said_of: dict[int, list[Fact]] = {}
        for fact in known:
            said_of.setdefault(fact.subject, []).append(fact)
        for s, r1, middle in known:
            for _, r2, o in said_of.get(middle, []):
                # A son's father is the woman's husband, but the man himself.
                if (r1, r2) in COMPOSITIONS and o != s:
                    found.add(Fact(s, COMPOSITIONS[r1, r2], o))
        if found <= known:
            return known - given
        known |= found


def rewrite(families: Families, old: Fact, new_object: int) -> RewrittenFact:
    """Put another person in the place of a fact's object, and say what follows.

    The old person is gone from the family; what follows is derived from the new fact and from what
    holds among the others, withheld facts too. The new person's own family stays as it was and is
    in none of the sets, though a new child has other parents there.

    Args:
        families: the families.
        old: a fact of them.
        new_object: token of the new person, of the old one's sex and of another family.

    Returns:
        The rewritten fact, and what it entails and does not touch.

    Raises:
        ValueError: no such fact, or the new person is of the same family or of the other sex, or is
            married and would be so again.
    """
    at = np.flatnonzero((families.facts == np.array(old)).all(axis=1))
    if not len(at):
        raise ValueError(f"{_said(families, old)} is no fact of these families")
    family = families.of([int(families.family[at[0]])])
    first = 2 * len(RELATIONS)
    if not first <= new_object < len(families.words) or new_object in family[:, [0, 2]]:
        raise ValueError(f"new_object must be a person of another family, got token {new_object}")
    if families.is_male[new_object] != families.is_male[old.object]:
        words = families.words[new_object], families.words[old.object]
        raise ValueError(f"{words[0]} cannot take the place of {words[1]}: their sexes differ")
    new = Fact(old.subject, old.relation, new_object)
    unrelated = family[(family[:, [0, 2]] != old.object).all(axis=1)]
    rest = [Fact(*map(int, fact)) for fact in unrelated]
    found = sorted(entailed([*rest, new], families.is_male) - entailed(rest, families.is_male))
    inverse = INVERSES[old.relation][0 if families.is_male[old.subject] else 1]
    reverse = Fact(new_object, inverse, old.subject)
    onto_new = [fact for fact in found if fact.subject == new_object and fact != reverse]
    spouse = (HUSBAND, WIFE)
    if any(fact.relation in spouse for fact in (reverse, *onto_new)):
        own = families.facts[families.facts[:, 0] == new_object]
        if np.isin(own[:, 1], spouse).any():
            raise ValueError(
                f"{families.words[new_object]} is married and would be so again: what follows "
                "would deny what holds; take somebody who is not"
            )
    of_others = [fact for fact in found if fact.object == new_object]
    return RewrittenFact(
        old, new, _array([reverse]), _array(onto_new), _array(of_others), unrelated
    )


def backwards(facts: Facts) -> Facts:
    """Return facts read from their end: object, relation, subject, the rows of reverse training.

    Each relation read backwards is a token of its own.
    """
    return np.stack([facts[:, 2], facts[:, 1] + len(RELATIONS), facts[:, 0]], axis=1)


def fact_rows(facts: Facts | Sequence[Fact]) -> Batch:
    """Return facts as rows of a language model: who and relation go in, the other is to come out.

    Of the two outputs of a row, (n, 2), the second alone counts.
    """
    rows = np.asarray(facts, np.int32).reshape(-1, 3)
    mask = np.broadcast_to(np.array([0, 1], np.int32), (len(rows), 2))
    return Batch(jnp.asarray(rows[:, :2]), jnp.asarray(rows[:, 1:]), jnp.asarray(mask))


def _facts_of_one() -> list[Fact]:
    """Return the 36 facts of a family, with people by their place in `PEOPLE`."""
    found = []
    for household in HOUSEHOLDS:
        man, woman, son, daughter = map(PEOPLE.index, household)
        found += [Fact(woman, HUSBAND, man), Fact(man, WIFE, woman)]
        found += [Fact(son, SISTER, daughter), Fact(daughter, BROTHER, son)]
        for child, relation in ((son, SON), (daughter, DAUGHTER)):
            found += [Fact(child, FATHER, man), Fact(child, MOTHER, woman)]
            found += [Fact(man, relation, child), Fact(woman, relation, child)]
    return found


def _array(facts: Sequence[Fact]) -> Facts:
    return np.asarray(facts, np.int32).reshape(-1, 3)


def _said(families: Families, fact: Fact) -> str:
    words = (families.words[i] if 0 <= i < len(families.words) else str(i) for i in fact)
    return f'"{" ".join(words)}"'
