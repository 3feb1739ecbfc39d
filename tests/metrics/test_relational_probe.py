"""Probes of relations: against the normal equations in vec M, and in worlds that are known."""

import jax.numpy as jnp
import numpy as np
import pytest

from jedit.data.invented.families import COMPOSITIONS, PEOPLE, make_families
from jedit.metrics import relational_probe, relational_structure

FACTS = np.array(
    [[0, 0, 3], [1, 0, 2], [4, 0, 4], [6, 0, 1], [3, 1, 0], [2, 1, 5], [6, 1, 6], [0, 3, 1]]
)


def by_normal_equations(A, facts, num_relations, ridge):
    """(AᵀA ⊗ AᵀA + λ) vec M = vec AᵀXA, whole, for each relation."""
    d = A.shape[1]
    gram = np.kron(A.T @ A, A.T @ A) + ridge * np.eye(d * d)
    found = []
    for r in range(num_relations):
        X = np.zeros((len(A), len(A)))
        for s, relation, o in facts:
            if relation == r:
                X[s, o] = 1
        found.append(np.linalg.solve(gram, (A.T @ X @ A).reshape(-1)).reshape(d, d))
    return np.stack(found)


@pytest.mark.parametrize("shape", [(7, 4), (7, 9)], ids=["tall", "wide"])
@pytest.mark.parametrize("ridge", [0.03, 2.0])
def test_it_solves_the_normal_equations(shape, ridge, tolerance):
    A = np.random.default_rng(0).normal(size=shape)
    found = relational_probe(jnp.asarray(A), FACTS, num_relations=4, ridge=ridge, absolute=True)
    expected = by_normal_equations(A, FACTS, 4, ridge)
    np.testing.assert_allclose(found.matrices, expected, atol=10 * tolerance.factorization)
    assert found.num_facts.tolist() == [4, 3, 0, 1]
    assert not np.asarray(found.matrices)[2].any()


def test_the_ridge_is_in_units_of_the_states(tolerance):
    A = np.random.default_rng(1).normal(size=(7, 4))
    s = np.linalg.svd(A, compute_uv=False)
    unit = np.mean(np.outer(s, s) ** 2)
    relative = relational_probe(jnp.asarray(A), FACTS, num_relations=4, ridge=0.2)
    expected = by_normal_equations(A, FACTS, 4, 0.2 * unit)
    np.testing.assert_allclose(relative.matrices, expected, atol=10 * tolerance.factorization)
    # So states in another unit give the same operator, in that unit.
    scaled = relational_probe(jnp.asarray(10 * A), FACTS, num_relations=4, ridge=0.2)
    np.testing.assert_allclose(
        100 * scaled.matrices, relative.matrices, atol=10 * tolerance.factorization
    )


def test_a_fact_given_twice_is_one():
    A = jnp.asarray(np.random.default_rng(2).normal(size=(7, 4)))
    once, twice = (
        relational_probe(A, facts, num_relations=4, ridge=0.1)
        for facts in (FACTS, np.concatenate([FACTS, FACTS[:3]]))
    )
    assert np.array_equal(once.matrices, twice.matrices)


def people(families, numbers):
    """Facts of some families with their people counted from 0."""
    facts = families.of(numbers)
    tokens = np.unique(facts[:, [0, 2]])
    return tokens, np.stack(
        [
            np.searchsorted(tokens, facts[:, 0]),
            facts[:, 1],
            np.searchsorted(tokens, facts[:, 2]),
        ],
        axis=1,
    )


@pytest.fixture(scope="module")
def bilinear():
    """Families whose states are a family's vector and a role's, in the form s ⊗ role."""
    families = make_families(0, 12)
    rng = np.random.default_rng(3)
    roles = np.linalg.qr(rng.normal(size=(10, 10)))[0]
    # Those fitted to are at right angles, so that no direction counts for more than another.
    of_family = np.concatenate([np.linalg.qr(rng.normal(size=(6, 6)))[0], rng.normal(size=(6, 6))])
    of_family /= np.linalg.norm(of_family, axis=1)[:, None]
    states = np.zeros((len(families.words), 60))
    for token, word in enumerate(families.words):
        if "-" in word:
            name, number = word.split("-")
            states[token] = np.outer(of_family[int(number)], roles[PEOPLE.index(name)]).reshape(-1)
    return families, states


def test_operators_of_a_bilinear_world_carry_over_to_other_families(bilinear):
    families, states = bilinear
    seen, facts = people(families, range(6))
    operators = relational_probe(jnp.asarray(states[seen]), facts, num_relations=8, ridge=1e-6)
    asked, others = people(families, range(6, 12))
    found = relational_structure(
        operators, jnp.asarray(states[asked]), others, compositions=COMPOSITIONS
    )
    assert np.all(found.direct == 1)
    assert np.all(found.transposed == 1)
    assert len(found.composed) == len(COMPOSITIONS) == 20
    assert set(found.composed.values()) == {1.0}


def test_states_without_structure_are_at_chance(bilinear):
    families, states = bilinear
    random = np.random.default_rng(4).normal(size=states.shape)
    seen, facts = people(families, range(6))
    operators = relational_probe(jnp.asarray(random[seen]), facts, num_relations=8, ridge=1e-3)
    asked, others = people(families, range(6, 12))
    found = relational_structure(
        operators, jnp.asarray(random[asked]), others, compositions=COMPOSITIONS
    )
    assert found.direct.mean() < 0.15  # 1/60 by chance
    # On the facts that it was fitted to it is right all the same: that is not structure.
    own = relational_structure(operators, jnp.asarray(random[seen]), facts, compositions={})
    assert own.direct.mean() > 0.5


def test_answers_are_those_of_a_loop_over_everybody():
    rng = np.random.default_rng(5)
    A, facts = rng.normal(size=(9, 3)), np.stack([rng.integers(0, n, 40) for n in (9, 2, 9)], 1)
    operators = relational_probe(jnp.asarray(A), facts, num_relations=2, ridge=0.1)
    M = np.asarray(operators.matrices)
    held = {tuple(fact) for fact in facts.tolist()}
    found = relational_structure(operators, jnp.asarray(A), facts, compositions={(0, 1): 0})

    def share(matrix, asked):
        right = []
        for s, r, _ in asked:
            values = [A[s] @ matrix @ A[o] for o in range(9)]
            right.append((s, r, int(np.argmax(values))) in held)
        return np.mean(right)

    for r in range(2):
        own = sorted(f for f in held if f[1] == r)
        assert found.direct[r] == pytest.approx(share(M[r], own))
        back = [int(np.argmax([A[s] @ M[r] @ A[o] for s in range(9)])) for _, _, o in own]
        right = [(s, r, o) in held for s, (_, _, o) in zip(back, own, strict=True)]
        assert found.transposed[r] == pytest.approx(np.mean(right))
    between = [
        f
        for f in sorted(held)
        if f[1] == 0 and any((f[0], 0, m) in held and (m, 1, f[2]) in held for m in range(9))
    ]
    assert found.composed[0, 1] == pytest.approx(share(M[0] @ M[1], between))


def test_what_cannot_be_is_refused():
    A = jnp.ones((7, 4))
    with pytest.raises(ValueError, match=r"facts \[3\] name what there is not: there are 5 states"):
        relational_probe(A[:5], FACTS[[0, 1, 2, 3]], num_relations=2, ridge=1.0)
    with pytest.raises(ValueError, match=r"facts must be rows .* shape \(8, 2\)"):
        relational_probe(A, FACTS[:, :2], num_relations=4, ridge=1.0)
    with pytest.raises(FloatingPointError, match="the states is not finite"):
        relational_probe(A.at[0, 0].set(jnp.nan), FACTS, num_relations=4, ridge=1.0)
    operators = relational_probe(A, FACTS, num_relations=4, ridge=1.0)
    with pytest.raises(ValueError, match="states have width 3, the operators 4"):
        relational_structure(operators, A[:, :3], FACTS, compositions={})
    # An argmax over NaN is the first one, and would count as an answer.
    with pytest.raises(FloatingPointError, match="the states is not finite"):
        relational_structure(operators, A.at[2, 0].set(jnp.nan), FACTS, compositions={})
    broken = operators._replace(matrices=operators.matrices.at[1, 0, 0].set(jnp.inf))
    with pytest.raises(FloatingPointError, match="the operators is not finite"):
        relational_structure(broken, A, FACTS, compositions={})
