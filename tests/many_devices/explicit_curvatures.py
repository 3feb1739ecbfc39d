"""Entrances to which a curvature or parameters on explicit axes come; prints differences.

Run by `test_many_devices` as `explicit_entrances` is, whose model this is: each entrance gives the
numbers of one device.
"""

import jax
import numpy as np
import optax

import jedit
from jedit.curvature.ggn import quadratic_kl
from jedit.curvature.likelihoods import Categorical
from tests.many_devices.explicit_entrances import apply, compare


def entrances(params, rows, facts):
    """What each entrance computes, by name, when it is called."""
    key = jax.random.key(0)
    methods, metrics = jedit.methods, jedit.metrics
    step = jax.tree.map(lambda x: x * 0.1, params)
    curvature = jedit.estimate(
        jedit.kfac(apply, Categorical(), fisher="exact"), params, rows, key=key
    )

    def trained(optimizer):
        method = jedit.TrainingMethod(jedit.objectives.GA(), optimizer, batch_size=8)
        return jedit.run_method(method, apply, params, facts, rows, steps=2, key=key)[0].blocks

    transforms = jedit.transforms
    return {
        "anchored": lambda: (
            methods.anchored(
                jedit.diagonal(apply, Categorical(), fisher="exact"), params, rows, key=key
            ).curvature
        ),
        "graded_rows": lambda: methods.graded_rows(apply, params, facts, key=key),
        "ggn_vector_product": lambda: jedit.ggn_vector_product(
            apply, params, rows, step, likelihood=Categorical()
        ),
        "quadratic_kl": lambda: quadratic_kl(apply, params, rows, step, likelihood=Categorical()),
        "membership_scores": lambda: metrics.membership_scores(apply, params, rows),
        "trace": lambda: jedit.trace(curvature),
        "natural_steps": lambda: trained(
            transforms.natural_steps(curvature, damping=0.1, predicted_kl=1e-3)
        ),
        "clip_by_curvature_norm": lambda: trained(
            optax.chain(
                optax.sgd(0.1), transforms.clip_by_curvature_norm(curvature, predicted_kl=1e-3)
            )
        ),
    }


def found(*given):
    """The numbers of each entrance, or what it says."""
    return {name: jax.tree.map(np.asarray, call()) for name, call in entrances(*given).items()}


if __name__ == "__main__":
    compare(found)
