"""Which implementation runs, and on which JAX."""

import sys

import jax
import jax.numpy as jnp
import pytest
from jedit_kernels import choice, moment


def test_an_old_jax_is_named(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with pytest.raises(
        ValueError, match=r"needs jax >= 0\.12, this is jax .*implementation=\"xla\""
    ):
        moment(jnp.zeros((1, 3, 3)), jnp.zeros((1, 2, 3), jnp.bfloat16), implementation="mosaic")


NARROW, WIDE = jnp.zeros(2, jnp.bfloat16), jnp.zeros(2, jnp.float32)


@pytest.mark.parametrize("version", [(0, 10, 2), (0, 12, 0)])
@pytest.mark.parametrize("capability", ["9.0", "10.0"])
@pytest.mark.parametrize("operands", [(NARROW, NARROW), (NARROW, WIDE), (WIDE,)])
def test_none_takes_the_kernel_only_where_it_was_faster(monkeypatch, version, capability, operands):
    class Device:
        compute_capability = capability

    monkeypatch.setattr(jax, "__version_info__", version)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    is_mosaic = version >= (0, 12) and capability == "9.0" and all(x is NARROW for x in operands)
    faster_on = frozenset({"9.0"})
    assert choice.choose(None, faster_on, *operands) == ("mosaic" if is_mosaic else "xla")
    assert choice.choose(None, frozenset(), *operands) == "xla"


@pytest.mark.parametrize(("columns", "is_wide"), [(2047, False), (2048, True)])
def test_narrow_moments_stay_xlas(monkeypatch, columns, is_wide):
    module = sys.modules["jedit_kernels.moment"]
    taken = []

    def kernel(name):
        return lambda total, *_: taken.append(name) or total

    monkeypatch.setattr(module, "FASTER_ON", frozenset({"9.0"}))
    monkeypatch.setattr(module, "choose", lambda _, on, *__: "mosaic" if "9.0" in on else "xla")
    monkeypatch.setattr(module, "moment_mosaic", kernel("mosaic"))
    monkeypatch.setattr(module, "moment_xla", kernel("xla"))
    total = jax.ShapeDtypeStruct((1, columns, columns), jnp.float32)
    jax.eval_shape(moment, total, jax.ShapeDtypeStruct((1, 8, columns), jnp.bfloat16))
    assert taken == ["mosaic" if is_wide else "xla"]


def test_none_takes_xla_off_a_gpu():
    assert choice.choose(None, frozenset({"9.0"}), NARROW) == "xla"
