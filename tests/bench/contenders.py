"""Who is measured: jedit, plain JAX by hand, and kfac-jax, each at its best usage that we know."""

import jax
import jax.numpy as jnp

import jedit
from jedit.tracing.versions import rebind
from tests.bench.measure import Work
from tests.bench.models import Problem, forward

KEY = 1


def jedit_work(problem: Problem, job: str) -> Work:
    """The library, through the three functions of its estimators."""
    case, params = problem.case, problem.params
    batches = [jedit.Batch(x) for x in problem.batches]
    likelihood = jedit.likelihoods.Categorical()
    estimator = jedit.kfac(problem.apply, likelihood, select=case.select)
    if job == "factors":
        return _estimation(estimator, params, batches)
    state = estimator.init(params, batches[0])
    step = _estimation(estimator, params, batches).step
    # As many batches as make the largest factor of full rank.
    needed = -(-4 * max(max(m) for m in case.matrices) // (case.batch * case.positions))
    for batch in batches[:needed]:
        state = step(state, batch)
    if job == "eigendecomposition":
        return Work(lambda: None, lambda _, batch: estimator.finalize(batch), [state], 1)
    curvature = estimator.finalize(state)
    del state
    if job == "eigenvalues":
        return _estimation(jedit.ekfac(problem.apply, likelihood, curvature), params, batches)
    solve = jax.jit(lambda c, tree: jedit.solve(c, tree, damping=0.1))
    return Work(lambda: None, lambda _, tree: solve(curvature, tree), [params] * 8)


def _estimation(estimator, params, batches) -> Work:
    update = estimator.update
    if not isinstance(update, jax.tree_util.Partial):
        update = jax.tree_util.Partial(update)

    @jax.jit(donate_argnums=1)
    def step(update, state, params, batch, key):
        return update(state, params, batch, key)

    key = jax.random.key(KEY)
    return Work(
        lambda: estimator.init(params, batches[0]),
        lambda state, batch: step(update, state, params, batch, key),
        batches,
    )


def by_hand_work(problem: Problem, job: str) -> Work:
    """Plain JAX: probes at each matrix, one vjp, full products, labels by inverse CDF.

    A row of ones is appended for the bias; a loop goes over the examples' gradients; whatever is
    computed twice (the moments of query, key and value are one product) XLA finds by itself.
    """
    case = problem.case

    def capture(matrices, params, inputs, key):
        def tapped(probes):
            rows = {}

            def dense(name, x, kernel, bias):
                rows[name] = x
                return x @ kernel + bias[None] + probes[name]

            return forward(case, matrices, params, inputs, dense), rows

        n = inputs.shape[0] * case.positions
        probes = {k: jnp.zeros((n, bias.shape[0])) for k, (_, bias) in matrices.items()}
        logits, pullback, rows = jax.vjp(tapped, probes, has_aux=True)
        p = jax.nn.softmax(logits)
        u = jax.random.uniform(key, (n, 1))
        labels = jnp.minimum(jnp.sum(jnp.cumsum(p, axis=-1) < u, axis=-1), p.shape[-1] - 1)
        (gradients,) = pullback(p - jax.nn.one_hot(labels, p.shape[-1]))
        ones = jnp.ones((n, 1))
        return {k: (jnp.concatenate([x, ones], 1), gradients[k]) for k, x in rows.items()}

    def add_factors(state, matrices, params, inputs, key):
        pairs = capture(matrices, params, inputs, key)
        return {k: (state[k][0] + a.T @ a, state[k][1] + g.T @ g) for k, (a, g) in pairs.items()}

    def add_squares(state, bases, matrices, params, inputs, key):
        out = {}
        for name, (a, g) in capture(matrices, params, inputs, key).items():
            a, g = a @ bases[name][0], g @ bases[name][1]
            if case.positions == 1:
                out[name] = state[name] + (a**2).T @ g**2
                continue

            def example(total, pair):
                return total + (pair[0].T @ pair[1]) ** 2, None

            by_example = tuple(x.reshape(-1, case.positions, x.shape[1]) for x in (a, g))
            out[name] = jax.lax.scan(example, state[name], by_example)[0]
        return out

    shapes = {k: kernel.shape for k, (kernel, _) in problem.matrices.items()}
    sides = {k: ((i + 1, i + 1), (o, o)) for k, (i, o) in shapes.items()}
    if job == "factors":
        step = jax.jit(add_factors, donate_argnums=0)
        extra = ()
        start = lambda: {k: (jnp.zeros(a), jnp.zeros(g)) for k, (a, g) in sides.items()}  # noqa: E731
    else:
        step = jax.jit(add_squares, donate_argnums=0)
        sums = jax.jit(add_factors)(
            {k: (jnp.zeros(a), jnp.zeros(g)) for k, (a, g) in sides.items()},
            problem.matrices,
            problem.params,
            problem.batches[0],
            jax.random.key(KEY),
        )
        extra = ({k: tuple(jnp.linalg.eigh(x)[1] for x in pair) for k, pair in sums.items()},)
        start = lambda: {k: jnp.zeros((i + 1, o)) for k, (i, o) in shapes.items()}  # noqa: E731
    fixed = (*extra, problem.matrices, problem.params)
    numbered = [(jax.random.key(i), x) for i, x in enumerate(problem.batches)]
    return Work(start, lambda state, batch: step(state, *fixed, batch[1], batch[0]), numbered)


def kfac_jax_work(problem: Problem, job: str) -> Work:
    """kfac-jax: its sampled Fisher ("fisher_gradients") with hand-tagged dense layers.

    The matrices are the parameters; what has no block is passed as data, so that it costs nothing.
    The library has no eigenvalue correction, so "factors" is its only job here.
    """
    del job
    import kfac_jax

    # Its release 0.0.8 evaluates an equation as JAX did before 0.10: mended from outside.
    kfac_jax.tag_graph_matcher.eval_jaxpr_eqn = lambda eqn, values: rebind(eqn, list(values))

    case = problem.case

    def loss(matrices, data):
        params, inputs = data

        def dense(name, x, kernel, bias):
            del name
            return kfac_jax.register_dense(x @ kernel + bias[None], x, kernel, bias)

        logits = forward(case, matrices, params, inputs, dense)
        kfac_jax.register_softmax_cross_entropy_loss(logits)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

    estimator = kfac_jax.BlockDiagonalCurvature(
        loss, default_estimation_mode="fisher_gradients", auto_register_tags=False
    )
    example = (problem.matrices, (problem.params, problem.batches[0]))

    def update(state, matrices, params, inputs, key):
        return estimator.update_curvature_matrix_estimate(
            state,
            ema_old=1.0,
            ema_new=1.0,
            identity_weight=0.0,
            batch_size=case.batch * case.positions,
            rng=key,
            func_args=(matrices, (params, inputs)),
        )

    step = jax.jit(update, donate_argnums=0)
    numbered = [(jax.random.key(i), x) for i, x in enumerate(problem.batches)]
    return Work(
        lambda: estimator.init(jax.random.key(KEY), example, None, None),
        lambda state, batch: step(state, problem.matrices, problem.params, batch[1], batch[0]),
        numbered,
    )


CONTENDERS = {
    "jedit": (jedit_work, ("factors", "eigenvalues", "eigendecomposition", "solve")),
    "by hand": (by_hand_work, ("factors", "eigenvalues")),
    "kfac-jax": (kfac_jax_work, ("factors",)),
}
