"""Bilinear probes of relations, and whether they compute with one another (Kim et al., 2509.21993).

    f_r(s, o) = sᵀ M_r o,     M_r = argmin ‖X_r - A M Aᵀ‖² + λ ‖M‖²
              = V [ s_i s_j / (s_i² s_j² + λ) ∘ Uᵀ X_r U ] Vᵀ,     A = U diag(s) Vᵀ

    A     states, a row for each person or thing                     `states`
    X_r   1 where row s has row o in relation r, else 0              `facts`
    M_r   the relation's operator                                    `Operators.matrices`
    λ     ridge                                                      `ridge`

Of all candidates o the probe answers with the one of the largest f_r(s, o). Structure is what
operators that were fitted apart from one another have in common:

    direct        M_r answers its own relation, on states that it was not fitted to
    transposed    M_rᵀ answers the inverse relation: of whom is o the husband?
    composed      M_r1 M_r2 answers what r1 and r2 make together: mother's husband, the father

Each is a share of right first answers, 1 over the number of candidates by chance.

A is fixed and the same for all relations, so its SVD is taken once; a relation is then two products
of the rows that its facts name, 2 n d² flops. The solution is that of the ridge's normal equations
in vec M, (AᵀA ⊗ AᵀA + λ) vec M = vec AᵀXA, without a matrix of d² by d².

Differences. The formula, the answers by the largest value and both tests are the paper's [code]. λ
is in units of the mean of the s_i² s_j², unless `absolute`; the code's is absolute, 1e-3 to 0.1,
and is chosen, with the layer, on the very facts that it is then judged by [code]: choose both on
others. The code asks the transposed operators of husband, wife, brother and sister alone, which
have one answer; here all are asked, and whoever has o for a son is a right answer (ours). The
products leave out the AᵀA that stands between them in X_r1 X_r2 ≈ A M_r1 (AᵀA) M_r2 Aᵀ, as the
code's do [code]: the two are alike only as far as AᵀA is a multiple of one where the operators act
[derived].
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jedit.core.checks import COUNT, POSITIVE, check_finite, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.display import short_repr
from jedit.core.precision import HIGHEST, wide

Facts = Int[np.ndarray, "n columns"] | Int[Array, "n columns"]


class Operators(NamedTuple):
    """The operators of relations, fitted to the states of one set of people or things.

    Attributes:
        matrices: M_r of each relation; f_r(s, o) = sᵀ M_r o.
        num_facts: how many facts each was fitted to; of a relation without any M_r is zero.
    """

    matrices: Float[Array, "relations d d"]
    num_facts: Int[Array, " relations"]

    __repr__ = short_repr


class RelationalStructure(NamedTuple):
    """How often operators answer right, by themselves and made of one another.

    Shares from 0 to 1; NaN where there is nothing to ask.

    Attributes:
        direct: of each relation's facts, those that its own operator answers.
        transposed: of each relation's facts, those whose subject the transposed operator finds from
            the object.
        composed: by pair of relations, of the facts of what they make together, those that the
            product of their operators answers.
    """

    direct: Float[np.ndarray, " relations"]
    transposed: Float[np.ndarray, " relations"]
    composed: dict[tuple[int, int], float]

    __repr__ = short_repr


@on_auto_axes
def relational_probe(
    states: Float[Array, "entities d"],
    facts: Facts,
    *,
    num_relations: int,
    ridge: float,
    absolute: bool = False,
) -> Operators:
    """Fit the operator of every relation in closed form.

    Args:
        states: A, a row for each person or thing, such as the hidden state of its last token.
        facts: rows (subject, relation, object): rows of A, and the relation's number.
        num_relations: how many relations there are.
        ridge: λ, in units of the mean of the s_i² s_j².
        absolute: whether λ is in units of a fourth power of the states, as in the paper's code.

    Returns:
        The operators, in float32 or wider. An SVD of A, and 2 n d² flops.

    Raises:
        ValueError: λ not positive, no facts, or a fact that names what there is not.
        FloatingPointError: states that are not finite.
    """
    check_numbers(COUNT, num_relations=num_relations)
    check_numbers(POSITIVE, ridge=ridge)
    # A fact that is given twice is still one entry of X.
    rows = np.unique(_checked(states, facts, num_relations), axis=0)
    check_finite("the states", states, lambda: "they are of a model that has diverged")
    return _fit(num_relations, absolute, wide(states), jnp.asarray(rows), jnp.asarray(ridge))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fit(num_relations: int, absolute: bool, A: Array, facts: Array, ridge: Array) -> Operators:
    dot = functools.partial(jnp.matmul, precision=HIGHEST)
    U, s, Vt = jnp.linalg.svd(A, full_matrices=False)
    subjects, relations, objects = facts.T
    is_of = (relations[None] == jnp.arange(num_relations)[:, None]).astype(A.dtype)
    # UᵀXU without X: a fact is one entry of X, so it adds the outer product of two rows of U.
    C = jax.lax.map(lambda row: dot((U[subjects] * row[:, None]).T, U[objects]), is_of)
    gain = s[:, None] * s[None]
    unit = jnp.ones((), A.dtype) if absolute else jnp.mean(gain**2)
    shrunk = gain / (gain**2 + (ridge.astype(A.dtype) * unit))
    M = jax.lax.map(lambda c: dot(Vt.T, dot(shrunk * c, Vt)), C)
    return Operators(M, jnp.sum(is_of, axis=1).astype(jnp.int32))


@on_auto_axes
def relational_structure(
    operators: Operators,
    states: Float[Array, "entities d"],
    facts: Facts,
    *,
    compositions: Mapping[tuple[int, int], int],
) -> RelationalStructure:
    """Judge operators on the facts of others than those whom they were fitted to.

    Args:
        operators: what `relational_probe` returned.
        states: states of the people or things asked about, which are the candidates too.
        facts: rows (subject, relation, object) of these.
        compositions: of two relations, the first of them taken first, what they make together.

    Returns:
        The shares of right answers.

    Raises:
        ValueError: states of another width, no facts, or a fact that names what there is not.
        FloatingPointError: states or operators that are not finite.
    """
    number = len(operators.matrices)
    rows = np.unique(_checked(states, facts, number), axis=0)
    if states.shape[1] != operators.matrices.shape[1]:
        raise ValueError(
            f"states have width {states.shape[1]}, the operators {operators.matrices.shape[1]}"
        )
    check_finite("the states", states, lambda: "they are of a model that has diverged")
    check_finite("the operators", operators.matrices, lambda: "fit them with a larger ridge")
    objects: dict[tuple[int, int], set[int]] = {}
    subjects: dict[tuple[int, int], set[int]] = {}
    for s, r, o in rows.tolist():
        objects.setdefault((s, r), set()).add(o)
        subjects.setdefault((o, r), set()).add(s)
    A, M = wide(states), operators.matrices

    def share(matrix: Array, asked: Int[np.ndarray, "k 2"], right: dict) -> float:
        if not len(asked):
            return float("nan")
        answers = np.asarray(_answers(matrix, A, jnp.asarray(asked[:, 0])))
        pairs = zip(answers.tolist(), asked.tolist(), strict=True)
        return float(np.mean([answer in right[s, r] for answer, (s, r) in pairs]))

    by_relation = [rows[rows[:, 1] == r] for r in range(number)]
    direct = [share(M[r], f[:, [0, 1]], objects) for r, f in enumerate(by_relation)]
    transposed = [share(M[r].T, f[:, [2, 1]], subjects) for r, f in enumerate(by_relation)]
    composed = {}
    for (r1, r2), made in compositions.items():
        # Asked where there is somebody in between: not everybody has a sister.
        asked = [
            (s, made)
            for s, _, o in by_relation[made].tolist()
            if any(o in objects.get((m, r2), ()) for m in objects.get((s, r1), ()))
        ]
        product = jnp.matmul(M[r1], M[r2], precision=HIGHEST)
        composed[r1, r2] = share(product, np.reshape(asked, (-1, 2)).astype(int), objects)
    return RelationalStructure(np.array(direct), np.array(transposed), composed)


@jax.jit
def _answers(M: Array, A: Array, subjects: Array) -> Array:
    values = jnp.matmul(jnp.matmul(A[subjects], M, precision=HIGHEST), A.T, precision=HIGHEST)
    return jnp.argmax(values, axis=1)


def _checked(states: Array, facts: Facts, num_relations: int) -> np.ndarray:
    rows = np.asarray(facts)
    if rows.ndim != 2 or rows.shape[1] != 3 or not len(rows):
        raise ValueError(f"facts must be rows (subject, relation, object), got shape {rows.shape}")
    limits = np.array([len(states), num_relations, len(states)])
    if wrong := np.flatnonzero(((rows < 0) | (rows >= limits)).any(axis=1)).tolist():
        raise ValueError(
            f"facts {wrong[:8]} name what there is not: there are {limits[0]} states and "
            f"{num_relations} relations, counted from 0; got {rows[wrong[0]].tolist()}"
        )
    return rows
