"""Steering by intervention against functions written out, and folded into weights against both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.paths import parameter_paths
from jedit.edits import apply_edit
from jedit.steering import Affine, Gate, Steering, fold, run_steered, steered, whole_outputs
from jedit.tracing import find_sites

STRENGTH = 0.7


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def network(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None]) @ params["v"]


def layers(params, x):
    """A scan over remat layers, each with a weight and a bias."""

    def step(h, layer):
        return h + jnp.tanh(h @ layer["w"] + layer["b"][None]), None

    return jax.lax.scan(jax.checkpoint(step), x, params)[0]


def experts(params, x):
    """Experts in a scan over layers: each gets all rows, and their outputs are summed."""

    def step(h, layer):
        hidden = jax.nn.relu(jnp.einsum("ni,eio->eno", h, layer["up"]))
        return h + jnp.sum(jnp.einsum("eni,eio->eno", hidden, layer["down"]), axis=0), None

    return jax.lax.scan(step, x, params)[0]


def joined(params, x):
    """Two weights side by side in one product, and two more in a loop over layers."""
    both = x @ jnp.concatenate([params["q"], params["k"]], axis=1)
    h = jnp.tanh(both[:, :3]) * both[:, 3:]
    stack = jnp.stack([params["first"], params["second"]])
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, stack)[0]


def grouped(params, x):
    """A convolution of two groups with a bias."""
    dims = ("NHWC", "HWIO", "NHWC")
    how = {"dimension_numbers": dims, "feature_group_count": 2}
    h = jax.lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", **how)
    return jnp.tanh(h + params["b"][None, None, None]).reshape(len(x), -1)


def looked_up(params, tokens):
    h = params["table"][tokens]
    return (h - h.mean(-1, keepdims=True)) * params["norm"][None, None] + params["b"][None, None]


def recurrent(params, x):
    step = lambda h, x: (jnp.tanh(h @ params["w"] + params["b"][None] + x), None)  # noqa: E731
    return jax.lax.scan(step, jnp.zeros_like(x[0]), x)[0]


TOKENS = jnp.asarray([[0, 2, 1], [3, 3, 0]])
# Per program: its parameters' shapes, its input, and (layers, units) of the sites to be moved.
PROGRAMS = {
    "dense": (network, {"w": (4, 6), "b": (6,), "v": (6, 3)}, normal(1, 5, 4), {"w": (6,)}),
    "layers": (layers, {"w": (3, 4, 4), "b": (3, 4)}, normal(2, 5, 4), {"w": (3, 4)}),
    "experts": (
        *(experts, {"up": (2, 3, 4, 5), "down": (2, 3, 5, 4)}, normal(3, 6, 4)),
        {"down": (2, 3, 4), "up": (2, 3, 5)},
    ),
    "joined": (
        *(joined, {"q": (4, 3), "k": (4, 3), "first": (3, 3), "second": (3, 3)}, normal(4, 5, 4)),
        {"k": (3,), "second": (3,)},
    ),
    "conv": (grouped, {"k": (3, 3, 1, 4), "b": (4,)}, normal(5, 2, 4, 4, 2), {"k": (2, 2)}),
    "tables": (
        *(looked_up, {"table": (4, 5), "norm": (5,), "b": (5,)}, TOKENS),
        {"table": (5,), "norm": (5,), "b": (5,)},
    ),
    "recurrent": (recurrent, {"w": (4, 4), "b": (4,)}, normal(6, 3, 5, 4), {"w": (4,)}),
}
UNBIASED = ("experts", "joined")  # whose sites have no bias to hold a shift


def scene(name, *, shifted):
    apply, shapes, inputs, units = PROGRAMS[name]
    params = {key: normal(i, *shape) for i, (key, shape) in enumerate(shapes.items())}
    maps = {}
    for i, (site, shape) in enumerate(units.items()):
        # A norm's gain has no bias of its own, and a bias by itself makes nothing to multiply.
        gain = None if site == "b" else normal(20 + i, *shape)
        shift = normal(30 + i, *shape) if shifted and site != "norm" else None
        maps[site] = Affine(gain, shift)
    return apply, params, inputs, Steering(maps)


@pytest.mark.parametrize("name", PROGRAMS)
def test_folded_and_steered_are_one_function(name, tolerance):
    apply, params, inputs, steering = scene(name, shifted=name not in UNBIASED)
    moved = jax.jit(steered(apply, steering, STRENGTH))(params, inputs)
    edit = fold(apply, params, inputs, steering)
    tolerance.check(apply(apply_edit(params, edit, STRENGTH), inputs), moved)
    assert float(jnp.max(jnp.abs(moved - apply(params, inputs)))) > 1e-2


def test_it_is_the_map_written_out(tolerance):
    apply, params, x, steering = scene("dense", shifted=True)
    one = steering.maps["w"]
    h = x @ params["w"] + params["b"][None]
    moved = h + STRENGTH * ((one.gain[None] - 1) * h + one.shift[None])
    tolerance.check(steered(apply, steering, STRENGTH)(params, x), jnp.tanh(moved) @ params["v"])


def test_every_layer_and_every_expert_has_its_own(tolerance):
    apply, params, x, steering = scene("experts", shifted=True)
    h = x
    for layer in range(2):
        total = 0
        for e in range(3):
            up, down = (params[key][layer, e] for key in ("up", "down"))
            a = h @ up
            one = steering.maps["up"]
            a = a + STRENGTH * ((one.gain[layer, e] - 1)[None] * a + one.shift[layer, e][None])
            b = jax.nn.relu(a) @ down
            one = steering.maps["down"]
            b = b + STRENGTH * ((one.gain[layer, e] - 1)[None] * b + one.shift[layer, e][None])
            total = total + b
        h = h + total
    tolerance.check(jax.jit(steered(apply, steering, STRENGTH))(params, x), h)


@pytest.mark.parametrize("name", ["dense", "layers", "joined", "experts"])
def test_a_gate_is_a_strength_of_the_output(name, tolerance):
    """A gate that is half open everywhere is half the strength; one that is shut, none."""
    apply, params, inputs, steering = scene(name, shifted=True)

    def gated(least, scale=0.0):
        gates = {
            site: Gate(scale * jnp.ones_like(one.gain), jnp.asarray(least), jnp.asarray(2.0))
            for site, one in steering.maps.items()
        }
        return Steering({n: Affine(m.gain, m.shift, gates[n]) for n, m in steering.maps.items()})

    half = steered(apply, gated(0.0), STRENGTH)(params, inputs)
    tolerance.check(half, steered(apply, steering, STRENGTH / 2)(params, inputs))
    shut = steered(apply, gated(400.0, 1.0), STRENGTH)(params, inputs)
    tolerance.check(shut, apply(params, inputs))


def test_the_gate_reads_its_own_units_of_every_row(tolerance):
    apply, params, x, steering = scene("dense", shifted=True)
    direction, one = normal(40, 6), steering.maps["w"]
    gate = Gate(direction, jnp.asarray(0.3), jnp.asarray(1.7))
    h = x @ params["w"] + params["b"][None]
    open_ = 1 / (1 + jnp.exp(-1.7 * (h @ direction - 0.3)))[:, None]
    moved = h + STRENGTH * open_ * ((one.gain[None] - 1) * h + one.shift[None])
    found = steered(apply, Steering({"w": Affine(one.gain, one.shift, gate)}), STRENGTH)
    tolerance.check(found(params, x), jnp.tanh(moved) @ params["v"])


def test_it_jits_vmaps_and_has_derivatives(tolerance):
    apply, params, x, steering = scene("layers", shifted=True)

    def loss(steering, strength):
        return jnp.sum(steered(apply, steering, strength)(params, x) ** 2)

    found, by_strength = jax.jit(jax.grad(loss, argnums=(0, 1)))(steering, STRENGTH)

    def folded(steering, strength):
        edit = fold(apply, params, x, steering)
        return jnp.sum(apply(apply_edit(params, edit, strength), x) ** 2)

    expected, expected_by_strength = jax.grad(folded, argnums=(0, 1))(steering, STRENGTH)
    tolerance.check(found, expected)
    tolerance.check(by_strength, expected_by_strength)
    strengths = jnp.asarray([0.0, 0.5, 1.0])
    tolerance.check(
        jax.vmap(lambda s: loss(steering, s))(strengths),
        jnp.stack([loss(steering, s) for s in strengths]),
    )


def test_what_is_kept_is_the_moved_output_with_its_bias(tolerance):
    apply, params, x, steering = scene("layers", shifted=True)
    run = run_steered(apply, params, x, steering, strength=STRENGTH)
    found = whole_outputs(run, dict(parameter_paths(params)))["w"]
    h, expected, one = x, [], steering.maps["w"]
    for i in range(3):
        y = h @ params["w"][i] + params["b"][i][None]
        expected.append(y + STRENGTH * ((one.gain[i] - 1)[None] * y + one.shift[i][None]))
        h = h + jnp.tanh(expected[-1])
    tolerance.check(found, jnp.stack(expected))
    tolerance.check(run.outputs, h)


def test_units_out_of_the_mask_stay():
    one = Affine(gain=jnp.asarray([2.0, 3.0]), shift=jnp.asarray([1.0, 1.0]))
    kept = one.only(jnp.asarray([True, False]))
    assert kept.gain.tolist() == [2.0, 1.0]
    assert kept.shift.tolist() == [1.0, 0.0]
    assert Affine(gain=one.gain).only(jnp.asarray([False, True])).shift is None
    assert str(Steering({"w": kept})).splitlines()[-1].split() == ["w", "2", "1", "yes", "yes"]


def test_bfloat16_stays_bfloat16():
    apply, params, x, steering = scene("dense", shifted=True)
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params, x))
    out = steered(apply, steering)(*small)
    assert out.dtype == jnp.bfloat16
    wide = steered(apply, steering)(params, x)
    assert float(jnp.max(jnp.abs(out.astype(wide.dtype) - wide))) < 0.1 * float(jnp.max(wide))


def test_a_weight_cut_into_layers_by_hand_folds(tolerance):
    """Two sites read slices of one leaf that do not overlap, so neither moves the other."""

    def apply(params, x):
        return jnp.tanh(x @ params["w"][0]) @ params["w"][1]

    params, x = {"w": normal(0, 2, 4, 4)}, normal(1, 5, 4)
    assert list(find_sites(apply, params, x)) == ["w", "w#1"]
    steering = Steering({"w#1": Affine(gain=normal(2, 4))})
    edited = apply_edit(params, fold(apply, params, x, steering))
    tolerance.check(apply(edited, x), steered(apply, steering)(params, x))
    tolerance.check(edited["w"][0], params["w"][0])


def test_what_does_not_fold_is_refused_by_name():
    apply, params, x, steering = scene("dense", shifted=True)
    one = steering.maps["w"]
    gate = Gate(jnp.ones(6), jnp.asarray(0.0), jnp.asarray(1.0))

    def refused(maps, match, apply=apply, params=params, x=x):
        with pytest.raises(ValueError, match=match):
            fold(apply, params, x, Steering(maps))

    refused({"w": Affine(gain=one.gain, gate=gate)}, "^w does not .* strength depends on the input")
    refused({"v": Affine(shift=jnp.ones(3))}, "^v does not .* no bias that could hold the shift")
    refused({"u": one}, "'u' is no site")
    refused({"w": Affine(gain=jnp.ones(5))}, r"w: the gain has shape \(5,\)")

    def tied(params, tokens):
        return params["table"][tokens] @ params["table"].T

    table = {"table": normal(0, 4, 5)}
    refused({"table": Affine(gain=jnp.ones(5))}, "table is used at several", tied, table, TOKENS)

    def stopped(params, x):
        return x @ params["w"] + jax.lax.stop_gradient(jnp.tanh(x @ params["w"]))

    square = {"w": normal(0, 4, 4)}
    refused({"w": Affine(gain=jnp.ones(4))}, "^w does not .* no gradient flows", stopped, square, x)

    def shifted(params, x):
        return jnp.tanh(x) + params["b"][None]

    refused({"b": Affine(gain=jnp.ones(4))}, "leave out the gain", shifted, {"b": jnp.ones(4)}, x)


@pytest.mark.usefixtures("unchecked_annotations")
def test_mistakes_get_a_sentence():
    apply, params, x, steering = scene("dense", shifted=True)
    with pytest.raises(TypeError, match="steering must be a Steering"):
        steered(apply, steering.maps)
    with pytest.raises(ValueError, match="strength must be a finite number"):
        steered(apply, steering, float("nan"))
    with pytest.raises(ValueError, match="'u' is no site of this function; nearest"):
        steered(apply, Steering({"u": Affine()}))(params, x)
