"""FIT's objective in NumPy float64, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jedit.objectives import FIT, GradedRows, Importance, relabel
from tests.objectives.references import (
    VOCAB,
    apply,
    make_problem,
    numpy_counted,
    numpy_kl,
    numpy_nll,
)


@pytest.mark.parametrize(("beta", "kl_weight"), [(0.1, 1.0), (0.7, 2.5)])
def test_each_row_gets_what_its_importance_says(tolerance, key, beta, kl_weight):
    params, reference, forget, retain = make_problem()
    taught = relabel(forget, VOCAB, key=key)
    importance = [Importance.HIGH, Importance.LOW, Importance.MIDDLE, Importance.HIGH, 2]
    graded = GradedRows(forget, taught.targets, jnp.asarray(importance, jnp.int32))
    found, aux = FIT(beta, kl_weight)(apply, params, graded, retain, reference)
    counted = numpy_counted(forget)
    now, before, wrong = (
        numpy_nll(*given) for given in ((params, forget), (reference, forget), (params, taught))
    )
    terms = []
    for i, is_token in enumerate(counted):
        if not is_token.any():
            continue
        if importance[i] == Importance.LOW:
            terms.append(wrong[i].sum() / is_token.sum())
            continue
        growth = now[i].sum() - before[i].sum()
        terms.append(-(2 / beta) * np.log(scipy.special.expit(beta * growth)))
    kl = numpy_kl(reference, params, retain)
    # The last row counts nothing: two of four are weighty.
    tolerance.check(found, np.mean(terms) + kl_weight * 0.5 * kl)
    tolerance.check(aux["retain_kl"], kl)
    tolerance.check(aux["relabelled_nll"], wrong[1].sum() / counted[1].sum())


def test_one_program_serves_all_gradings(key):
    params, reference, forget, retain = make_problem()
    taught, traces = relabel(forget, VOCAB, key=key), []

    @jax.jit
    def loss(importance):
        traces.append(1)
        graded = GradedRows(forget, taught.targets, importance)
        return FIT()(apply, params, graded, retain, reference)[0]

    values = {float(loss(jnp.full(5, kind, jnp.int32))) for kind in Importance}
    assert len(values) == 3
    assert len(traces) == 1


def test_a_row_is_forwarded_once_for_both_of_its_targets(key):
    params, reference, forget, retain = make_problem()
    labels, passes = relabel(forget, VOCAB, key=key).targets, []

    def counting(params, inputs):
        passes.append(1)
        return apply(params, inputs)

    graded = GradedRows(forget, labels, jnp.zeros(5, jnp.int32))
    FIT()(counting, params, graded, retain, reference)
    assert len(passes) == 4
    with pytest.raises(ValueError, match="labels have shape"):
        FIT()(apply, params, graded._replace(labels=labels[:, :1]), retain, reference)
