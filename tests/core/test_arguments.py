"""Arguments of the wrong type or structure: one sentence at every entrance, before any compute."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jedit
from jedit import metrics
from jedit.checkpoint import Ledger
from jedit.core.arguments import checked_batches, nearest
from jedit.core.batch import Batch
from jedit.core.paths import matcher
from jedit.curvature.likelihoods import Categorical
from jedit.data import batches as cut
from jedit.data import stack_requests
from jedit.methods import (
    Ascent,
    Associations,
    Corruption,
    Layers,
    Restoration,
    causal_trace,
    engram,
    kfade,
    memit,
    salun,
    target_values,
)
from jedit.models.lora import with_lora
from jedit.objectives import GA, RetainKL, RetainNLL, with_retain
from jedit.training import TrainingMethod, Watch

pytestmark = pytest.mark.usefixtures("unchecked_annotations")
KEY, L = jax.random.key(0), Categorical()
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)))
BATCH = Batch(X, jnp.arange(6) % 5)
PARAMS = {"a": {"w": jnp.ones((3, 4)), "b": jnp.zeros(4)}, "o": {"w": jnp.ones((4, 5))}}
OTHER = {"a": PARAMS["a"], "o": {"kernel": PARAMS["o"]["w"]}}
SGD = optax.sgd(0.1)


def apply(params, inputs):
    (out,) = params["o"].values()
    return jnp.tanh(inputs @ params["a"]["w"] + params["a"]["b"][None]) @ out


FIXED = Ascent(1, step_size=0.1)
ASCENT = TrainingMethod(GA(), SGD)


def unlearn(params=PARAMS, forget=BATCH, retain=None, method=ASCENT, key=KEY):
    return jedit.unlearn(method, apply, params, forget, retain, steps=1, key=key)


def fit(data=BATCH, watch=None):
    def loss(params, rows):
        return RetainNLL()(apply, params, None, rows)

    return jedit.fit(loss, SGD, PARAMS, data, epochs=1, key=KEY, watch=watch)


def kfac(**options):
    return jedit.kfac(apply, L, **options)


def estimate(batches=BATCH, params=PARAMS, estimator=None, key=KEY):
    return jedit.estimate(estimator or kfac(), params, batches, key=key)


@pytest.fixture(scope="module")
def curvatures():
    """Of this model, of one with another name, and of one with another width."""
    wide = {"a": {"w": jnp.ones((3, 7)), "b": jnp.zeros(7)}, "o": {"w": jnp.ones((7, 5))}}
    return [estimate(params=params) for params in (PARAMS, OTHER, wide)]


# Of no rows the other metrics have as many scores.
NEEDY = ("estimate", "ekfac", "diagonal", "kfade forget", "kfade retain", "scale", "salun", "nll")


def batch_entrances(curvature):
    """By name, each function that takes batches, as a function of them."""
    ekfac = jedit.ekfac(apply, L, curvature)
    several = {
        "estimate": estimate,
        "ekfac": lambda x: estimate(x, estimator=ekfac),
        "diagonal": lambda x: estimate(x, estimator=jedit.diagonal(apply, L)),
        "kfade forget": lambda x: kfade(apply, PARAMS, curvature, x, BATCH, ascent=FIXED),
        "kfade retain": lambda x: kfade(apply, PARAMS, curvature, BATCH, x, ascent=FIXED),
        "scale": lambda x: jedit.scale_to_kl_budget(
            apply, PARAMS, PARAMS, x, budget=0.1, likelihood=L
        ),
        "salun": lambda x: salun(apply, PARAMS, x, SGD),
        "nll": lambda x: metrics.nll(apply, PARAMS, x),
        "accuracy": lambda x: metrics.accuracy(apply, PARAMS, x),
        "output_kl": lambda x: metrics.output_kl(apply, PARAMS, PARAMS, x),
        "membership": lambda x: metrics.membership_scores(apply, PARAMS, x),
        "min_k": lambda x: metrics.min_k_scores(apply, PARAMS, x),
        "gradient_norm": lambda x: metrics.gradient_norm_scores(apply, PARAMS, x),
        "extraction": lambda x: metrics.extraction_strength(apply, PARAMS, x),
        "exact_memorization": lambda x: metrics.exact_memorization(apply, PARAMS, x),
    }
    options = {"corruption": Corruption("e", X), "restoration": Restoration("l")}
    single = {
        "batch_unlearn": lambda x: jedit.batch_unlearn(apply, PARAMS, curvature, x),
        "unlearn": lambda x: unlearn(forget=x, retain=BATCH),
        "continual": lambda x: jedit.continual(apply, kfac(), x, enough=1, predicted_kl=1, key=KEY),
        "causal_trace": lambda x: causal_trace(apply, PARAMS, x, key=KEY, **options),
        "ggn": lambda x: jedit.ggn_vector_product(apply, PARAMS, x, PARAMS, likelihood=L),
        "retain_kl": lambda x: RetainKL()(apply, PARAMS, None, x, PARAMS),
        "targets": lambda x: target_values(apply, PARAMS, Associations(x), layer="o/w"),
        "batches": lambda x: cut(x, 2),
        "stack_requests": lambda x: stack_requests([x]),
        "init": lambda x: kfac().init(PARAMS, x),
        "update": lambda x: kfac().update(kfac().init(PARAMS, BATCH), PARAMS, x, KEY),
    }
    return several, single


def test_a_tuple_is_no_batch_at_any_entrance(curvatures):
    several, single = batch_entrances(curvatures[0])
    for call in {**several, **single}.values():
        with pytest.raises(TypeError, match=r"must be a jedit\.Batch.* got a tuple"):
            call((X, BATCH.targets))
        with pytest.raises(TypeError, match=r"must be a jedit\.Batch.* got None"):
            call(None)
    for name, call in several.items():
        with pytest.raises(TypeError, match=r"\[0\] must be a jedit\.Batch, got a tuple"):
            call([(X, BATCH.targets)])
        if name in NEEDY:
            with pytest.raises(ValueError, match="no batch|no output counts"):
                call([])


def test_one_batch_needs_no_list(curvatures):
    several, _ = batch_entrances(curvatures[0])
    for name in ("estimate", "diagonal"):
        one, listed = several[name](BATCH), several[name]([BATCH])
        jax.tree.map(np.testing.assert_array_equal, one, listed)
    again = checked_batches([BATCH])
    assert len(list(again)) == len(list(again)) == 1
    once = checked_batches(iter([BATCH, BATCH]))
    assert (len(list(once)), len(list(once))) == (2, 0)


def test_targets_are_arrays_of_integers(curvatures):
    real = BATCH._replace(targets=BATCH.targets.astype(float))
    for call in (
        lambda: estimate(real, estimator=kfac(fisher="empirical")),
        lambda: kfade(apply, PARAMS, curvatures[0], real, BATCH, ascent=FIXED),
        lambda: metrics.nll(apply, PARAMS, real),
        lambda: unlearn(forget=real),
    ):
        with pytest.raises(TypeError, match=r"targets must be integers.* got float"):
            call()
    with pytest.raises(TypeError, match=r"batches\[0\]\.targets must be an array.* got a list"):
        estimate(BATCH._replace(targets=[0] * 6))
    with pytest.raises(TypeError, match=r"forget\[0\]\.mask must be an array.* got an int"):
        kfade(apply, PARAMS, curvatures[0], BATCH._replace(mask=1), BATCH, ascent=FIXED)


def test_a_likelihood_is_called():
    for call in (
        lambda likelihood: jedit.kfac(apply, likelihood),
        lambda likelihood: jedit.diagonal(apply, likelihood),
        lambda likelihood: jedit.ggn_vector_product(
            apply, PARAMS, BATCH, PARAMS, likelihood=likelihood
        ),
        lambda likelihood: jedit.scale_to_kl_budget(
            apply, PARAMS, PARAMS, BATCH, budget=1.0, likelihood=likelihood
        ),
    ):
        with pytest.raises(TypeError, match=r"the class Categorical itself; call it: Categ.*\(\)"):
            call(Categorical)
        with pytest.raises(TypeError, match="likelihood must be a Likelihood.* got a str"):
            call("categorical")


def test_arguments_that_were_swapped(curvatures):
    curvature = curvatures[0]
    for call, sentence in (
        (lambda: jedit.kfac(L, apply), "apply must be a function .* got a Categorical"),
        (lambda: estimate(PARAMS), "batches must be .* got a dict"),
        (lambda: jedit.estimate(PARAMS, kfac(), BATCH, key=KEY), "estimator must be an Estimator"),
        (lambda: jedit.estimate(jedit.kfac, PARAMS, BATCH, key=KEY), "got a function"),
        (lambda: estimate(params=BATCH), "params must be a pytree of arrays, got a Batch"),
        (lambda: estimate(key=0), "key must be a random key.* got an int"),
        (lambda: jedit.find_sites(PARAMS, apply, X), "apply must be a function"),
        (lambda: jedit.find_sites(apply, PARAMS, BATCH), r"give batch\.inputs"),
        (lambda: jedit.capture(apply, PARAMS, BATCH), r"give batch\.inputs"),
        (lambda: kfade(PARAMS, apply, curvature, BATCH, BATCH, budget=1), "apply must be a func"),
        (lambda: kfade(apply, curvature, PARAMS, BATCH, BATCH, budget=1), "curvature must be a C"),
        (lambda: kfade(apply, PARAMS, BATCH, curvature, BATCH, budget=1), "forget must be .* Cur"),
        (lambda: kfade(apply, PARAMS, curvature, BATCH, BATCH, ascent=4), "ascent must be an As"),
        (lambda: jedit.batch_unlearn(apply, PARAMS, BATCH, curvature), "requests must be"),
        (lambda: unlearn(method=GA()), "method must be a TrainingMethod"),
        (lambda: unlearn(method=TrainingMethod(SGD, GA())), "objective must be a function"),
        (lambda: unlearn(method=TrainingMethod(GA, SGD)), "objective must be a function"),
        (lambda: unlearn(method=TrainingMethod(GA(), PARAMS)), "optimizer must be an o"),
        (lambda: unlearn(BATCH, PARAMS), "params must be"),
        (lambda: unlearn(key=0), "key must be a random key"),
        (lambda: fit(watch=Watch(checkpoint="x")), "Checkpoint"),
        (lambda: fit(watch=print), "watch must be a Watch"),
        (lambda: jedit.ekfac(apply, L, PARAMS), "kfac_curvature must be a Curvature"),
        (lambda: jedit.solve(PARAMS, curvature, damping=1), "curvature must be a Curvature"),
        (lambda: jedit.trace(PARAMS), "curvature must be a Curvature"),
        (lambda: jedit.factors("o/w", curvature), "curvature must be a Curvature"),
        (lambda: jedit.null_space(PARAMS, threshold=0.1), "curvature must be a Curvature"),
        (lambda: jedit.project(PARAMS, curvature), "projector must be a Projector"),
        (lambda: jedit.apply_edit(jedit.edit_between(PARAMS, PARAMS), PARAMS), "edit must be an E"),
        (lambda: jedit.save_edit(curvature, "x"), "edit must be an Edit"),
        (lambda: jedit.save_curvature(PARAMS, "x"), "curvature must be a Curvature"),
        (lambda: engram(PARAMS, [PARAMS], curvature), "curvature must be a Curvature"),
        (
            lambda: memit(apply, PARAMS, PARAMS, Associations(BATCH), None, layers=Layers("o/w")),
            "curvature must be a Curvature",
        ),
        (
            lambda: memit(apply, PARAMS, curvature, BATCH, None, layers=Layers("o/w")),
            "associations must be an Associations",
        ),
        (
            lambda: memit(apply, PARAMS, curvature, Associations(BATCH), None, layers="o/w"),
            r'layers must be a Layers, such as Layers\("mlp/kernel"\)',
        ),
        (
            lambda: target_values(apply, PARAMS, Associations(BATCH), layer="o/w", search=24),
            "search must be a Search",
        ),
        (
            lambda: causal_trace(
                apply, PARAMS, BATCH, key=KEY, corruption=X, restoration=Restoration("l")
            ),
            "corruption must be a Corruption",
        ),
        (
            lambda: causal_trace(
                apply, PARAMS, BATCH, key=KEY, corruption=Corruption("e", X), restoration="l"
            ),
            "restoration must be a Restoration",
        ),
        (
            lambda: jedit.batch_unlearn(apply, PARAMS, curvature, BATCH, solver=8),
            "solver must be a Solver",
        ),
        (
            lambda: jedit.continual(
                apply, kfac(), BATCH, enough=1, predicted_kl=1, key=KEY, answering=3
            ),
            "answering must be an Answering",
        ),
        (
            lambda: jedit.continual(
                apply, kfac(), BATCH, enough=1, predicted_kl=1, key=KEY, refresh=10
            ),
            "refresh must be a Refresh",
        ),
        (lambda: metrics.nll(PARAMS, apply, BATCH), "apply must be a function"),
    ):
        with pytest.raises(TypeError, match=sentence):
            call()
    with pytest.raises(ValueError, match="no rows to train on"):
        fit(None)
    with pytest.raises(TypeError, match="the objective's batch must be .* got None"):
        unlearn(forget=None, retain=BATCH, method=TrainingMethod(with_retain(GA()), SGD))


def test_an_equinox_model_is_partitioned(curvatures, key):
    model = eqx.nn.MLP(3, 5, 4, 1, key=key)

    def run(model, inputs):
        return jax.vmap(model)(inputs)

    for call in (
        lambda: jedit.find_sites(run, model, X),
        lambda: estimate(params=model),
        lambda: kfade(run, model, curvatures[0], BATCH, BATCH, ascent=FIXED),
        lambda: jedit.batch_unlearn(run, model, curvatures[0], BATCH),
        lambda: unlearn(model),
        lambda: jedit.edit_between(model, model),
        lambda: metrics.nll(run, model, BATCH),
        lambda: jedit.solve(curvatures[0], model, damping=0.1),
    ):
        with pytest.raises(TypeError, match=r"at 'activation' it holds .* equinox\.partition\("):
            call()


def test_what_looks_at_numbers_is_not_traced(curvatures):
    curvature = curvatures[0]
    for call in (
        lambda p: estimate(params=p).num_outputs,
        lambda p: kfade(apply, p, curvature, BATCH, BATCH, ascent=FIXED)[0],
        lambda p: jedit.scale_to_kl_budget(apply, p, p, BATCH, budget=0.1, likelihood=L)[0],
        lambda p: engram(p, curvature, curvature)[0],
        lambda p: metrics.nll(apply, p, BATCH),
    ):
        with pytest.raises(ValueError, match="looks at numbers while it runs.*under jit"):
            jax.jit(call)(PARAMS)
    with pytest.raises(ValueError, match="looks at numbers"):
        jax.jit(lambda batch: estimate(batch).num_outputs)(BATCH)


def test_a_regular_expression_that_is_none():
    for call in (
        lambda x: jedit.find_sites(apply, PARAMS, X, x),
        lambda x: estimate(estimator=kfac(select=x)),
        lambda x: unlearn(method=ASCENT._replace(trainable=x)),
        lambda x: jedit.edit_between(PARAMS, PARAMS, x),
        lambda x: jedit.attacks.quantize(PARAMS, bits=8, select=x),
        lambda x: with_lora(apply, PARAMS, X, rank=1, key=KEY, select=x),
    ):
        with pytest.raises(ValueError, match=r"'\*w' is no regular expression \(nothing to repeat"):
            call("*w")
        with pytest.raises(TypeError, match="must be a regular expression.* got an int"):
            call(3)
    found = matcher(["^a/", "w$"], "select")
    assert [found(path) for path in ("a/b", "o/w", "o/b")] == [True, True, False]


def test_axes_of_no_length():
    with pytest.raises(ValueError, match="batch 1 has no rows: the curvature is of no outputs"):
        estimate(Batch(X[:0], BATCH.targets[:0]))
    narrow = {"a": {"w": jnp.ones((3, 0)), "b": jnp.zeros(0)}, "o": {"w": jnp.ones((0, 5))}}
    for estimator in (kfac(), jedit.diagonal(apply, L)):
        with pytest.raises(ValueError, match=r"parameter 'a/w' has shape \(3, 0\), an axis of no"):
            estimate(params=narrow, estimator=estimator)
    with pytest.raises(ValueError, match=r"shape \(6, 0\): no classes"):
        L.lead_shape(jnp.zeros((6, 0)))


def test_a_curvature_of_another_model(curvatures, tmp_path):
    _, other, wide = curvatures
    requests = jax.tree.map(lambda x: x[None], BATCH)
    ledger = Ledger.create(tmp_path / "ledger", PARAMS)
    edit = jedit.Edit({"o/kernel": PARAMS["o"]["w"]})
    for call in (
        lambda c: jedit.batch_unlearn(apply, PARAMS, c, requests),
        lambda c: kfade(apply, PARAMS, c, BATCH, BATCH, ascent=FIXED),
        lambda c: kfade(
            apply, PARAMS, curvatures[0], BATCH, BATCH, ascent=Ascent(2, 0.1, refit=lambda _: c)
        ),
        lambda c: estimate(estimator=jedit.ekfac(apply, L, c)),
        lambda c: engram(PARAMS, c, c),
        lambda c: jedit.solve(c, PARAMS, damping=0.1),
        lambda c: jedit.project(jedit.null_space(c, threshold=0.1), PARAMS),
    ):
        with pytest.raises(ValueError, match=r"no leaf 'o/kernel'.*\(nearest: 'o/w', "):
            call(other)
        with pytest.raises(ValueError, match=r"leaf 'a/w' has shape \(3, 4\), .* has \(3, 7\)"):
            call(wide)
    with pytest.raises(ValueError, match="lacks|lack; nearest: 'o/w'"):
        jedit.apply_edit(PARAMS, edit)
    with pytest.raises(ValueError, match="no such parameter; nearest: 'o/w'"):
        ledger.record(edit, request=["a"], method="m")


def test_flax_variables_in_one_of_two_places():
    graph, state = nnx.split(nnx.Linear(3, 5, rngs=nnx.Rngs(0), param_dtype=X.dtype))

    def run(params, inputs):
        return nnx.merge(graph, params)(inputs)

    curvature = jedit.estimate(jedit.kfac(run, L), state, BATCH, key=KEY)
    with pytest.raises(ValueError, match=r"'kernel/value'.*nearest: 'kernel', .*nnx\.as_pure"):
        jedit.solve(curvature, nnx.as_pure(state), damping=0.1)
    assert "as_pure" in nearest("kernel", ["kernel/value"])
    assert "as_pure" not in nearest("kernel", ["bias"])
    assert nearest("kernel", []) == "there is none"
