"""Memorised-subspace pruning against Wanda's scores in NumPy, from the activations themselves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.curvature import Factorize, estimate, kfac
from jedit.curvature.likelihoods import Gaussian
from jedit.edits import apply_edit
from jedit.methods import memorised_subspace

SHARE = 0.3


def network(params, x):
    """The second weight lies as PyTorch's do: its rows are outputs."""
    return jnp.tanh(x @ params["w"] + params["b"][None]) @ params["v"].T


@pytest.fixture
def scene():
    """Two sets of memorised rows and one of others, each with strong inputs of its own."""
    rng = np.random.default_rng(5)
    shapes = {"w": (6, 7), "b": (7,), "v": (3, 7)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    sets = [rng.normal(size=(n, 6)) * rng.uniform(0.2, 2, 6) for n in (9, 17, 24)]
    return params, sets


def moments(params, rows, **options):
    estimator = kfac(network, Gaussian(), **options)
    return estimate(estimator, params, [Batch(jnp.asarray(rows))], key=jax.random.key(0))


def by_numpy(params, memorised, rest, share=SHARE):
    """The mask of one memorised set, from the activations and a sort of Python's."""
    w, b, v = (np.asarray(params[n], np.float64) for n in ("w", "b", "v"))
    hidden = lambda x: np.tanh(x @ w + b)  # noqa: E731
    masks = {}
    for name, weight, enters in (("w", w, lambda x: x), ("v", v.T, hidden)):
        size = lambda x, f=enters: np.sqrt(np.mean(f(x) ** 2, axis=0))  # noqa: E731
        score, other = (np.abs(weight) * size(x)[:, None] for x in (memorised, rest))
        ranked = sorted(np.ndindex(*weight.shape), key=lambda place: -score[place])
        mask = np.zeros(weight.shape, bool)
        for place in ranked[: round(share * weight.size)]:
            mask[place] = score[place] > other[place]
        masks[name] = mask if name == "w" else mask.T
    return masks


def pruned(params, edit):
    """Which weights the edit makes zero; it leaves all others as they are, to the bit."""
    edited = apply_edit(params, edit)
    assert np.array_equal(edited["b"], params["b"])
    for name in ("w", "v"):
        is_same = np.asarray(edited[name] == params[name])
        assert np.all(is_same | np.asarray(edited[name] == 0))
    return {name: np.asarray(edited[name] == 0) for name in ("w", "v")}


def test_one_set_prunes_what_wandas_scores_say(scene):
    params, (first, _, rest) = scene
    expected = by_numpy(params, first, rest)
    edit, info = memorised_subspace(
        params, moments(params, first), moments(params, rest), share=SHARE
    )
    found = pruned(params, edit)
    for name in ("w", "v"):
        # A share alone would prune a fixed number: the comparison with the rest has spared some.
        assert 0 < expected[name].sum() < round(SHARE * expected[name].size), name
        np.testing.assert_array_equal(found[name], expected[name])
        np.testing.assert_allclose(info.pruned_share[name], [expected[name].mean()], rtol=1e-6)
        np.testing.assert_array_equal(info.overlap[name], [1])


@pytest.mark.parametrize(("agreement", "joined"), [("any", np.logical_or), ("all", np.logical_and)])
def test_small_sets_are_united_or_intersected(scene, agreement, joined):
    params, (first, second, rest) = scene
    masks = [by_numpy(params, x, rest) for x in (first, second)]
    edit, info = memorised_subspace(
        params,
        [moments(params, x) for x in (first, second)],
        moments(params, rest),
        share=SHARE,
        agreement=agreement,
    )
    found = pruned(params, edit)
    for name in ("w", "v"):
        np.testing.assert_array_equal(found[name], joined(masks[0][name], masks[1][name]))
        one, other = (mask[name] for mask in masks)
        overlap = (one & other).sum() / (one | other).sum()
        np.testing.assert_allclose(info.overlap[name], [overlap], rtol=1e-6)


def test_a_diagonal_of_the_moment_is_enough_and_other_sets_are_averaged(scene):
    """`max_dim=1` holds diagonals alone; the rest in two parts is the rest in one."""
    params, (first, _, rest) = scene
    whole, _ = memorised_subspace(
        params, moments(params, first), moments(params, rest), share=SHARE
    )
    thin, _ = memorised_subspace(
        params,
        moments(params, first, factorize=Factorize(max_dim=1)),
        [moments(params, part, factorize=Factorize(max_dim=1)) for part in (rest[:5], rest[5:])],
        share=SHARE,
    )
    found, expected = pruned(params, thin), pruned(params, whole)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_nothing_is_pruned_where_both_are_served_alike(scene):
    params, (first, _, _) = scene
    same = moments(params, first)
    edit, info = memorised_subspace(params, same, same, share=1.0)
    assert not any(np.any(x) for x in edit.blocks.values())
    assert all(float(x[0]) == 0 for x in info.pruned_share.values())


def test_curvatures_of_other_sites_are_refused(scene):
    params, (first, _, rest) = scene
    with pytest.raises(ValueError, match="curvatures of the same sites"):
        memorised_subspace(params, moments(params, first, select="w"), moments(params, rest))
    with pytest.raises(ValueError, match="one is empty"):
        memorised_subspace(params, [], moments(params, rest))


@pytest.mark.usefixtures("unchecked_annotations")
def test_another_word_is_refused(scene):
    params, (first, _, _) = scene
    same = moments(params, first)
    with pytest.raises(ValueError, match="agreement"):
        memorised_subspace(params, same, same, agreement="some")


def test_what_is_not_finite_is_refused_and_not_spared(scene):
    params, (first, _, rest) = scene
    sets = moments(params, first), moments(params, rest)
    broken = params | {"v": params["v"].at[1, 2].set(jnp.nan)}
    with pytest.raises(FloatingPointError, match="a parameter is not finite at 'v'"):
        memorised_subspace(broken, *sets, share=SHARE)
    for i in range(2):
        spoilt = [*sets]
        factors = {
            name: dataclasses.replace(factor, matrix=factor.matrix.at[0, 0, 0].set(jnp.nan))
            for name, factor in sets[i].factors.items()
        }
        spoilt[i] = dataclasses.replace(sets[i], factors=factors)
        with pytest.raises(FloatingPointError, match="a moment of the inputs is not finite"):
            memorised_subspace(params, *spoilt, share=SHARE)


def test_bfloat16_weights_become_exactly_zero_by_a_wide_edit(scene):
    params, (first, _, rest) = scene
    narrow = {name: p.astype(jnp.bfloat16) for name, p in params.items()}
    sets = (moments(narrow, x.astype(jnp.bfloat16)) for x in (first, rest))
    edit, info = memorised_subspace(narrow, *sets, share=SHARE)
    assert {block.dtype for block in edit.blocks.values()} == {jnp.dtype(jnp.float32)}
    found = pruned(narrow, edit)
    for name in ("w", "v"):
        assert found[name].mean() == pytest.approx(float(info.pruned_share[name][0]), rel=1e-5)
        assert found[name].any()
