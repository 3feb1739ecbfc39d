"""What values print in a notebook: a few lines, nothing computed from what is traced."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jedit
from jedit.checkpoint import Checkpoint, Ledger
from jedit.core.batch import Batch, PackedTokens
from jedit.core.display import html_table, short, short_repr
from jedit.curvature.likelihoods import Categorical
from jedit.methods import Ascent, KfadeInfo, kfade


def apply(params, inputs):
    return jnp.tanh(inputs @ params["<b>in</b>"]["kernel"]) @ params["out"]["kernel"]


@pytest.fixture(scope="module")
def case():
    """(params, batch, curvature) of a small network, one of whose names is markup."""
    rng = np.random.default_rng(0)
    params = {
        "<b>in</b>": {"kernel": jnp.asarray(rng.normal(size=(3, 40)), jnp.float32)},
        "out": {"kernel": jnp.asarray(rng.normal(size=(40, 5)), jnp.float32)},
    }
    batch = Batch(jnp.asarray(rng.normal(size=(6, 3)), jnp.float32), jnp.arange(6) % 5)
    estimator = jedit.kfac(apply, Categorical())
    return params, batch, jedit.estimate(estimator, params, batch, key=jax.random.key(0))


def test_an_edit_prints_its_parameters_norms_and_size(case):
    params, _, curvature = case
    weight = curvature.blocks["out/kernel"].weight
    rng = np.random.default_rng(1)
    left, right = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 40, 2), (1, 2, 5)))
    thin = jedit.LowRank(left, right, weight)
    half = params["<b>in</b>"]["kernel"].astype(jnp.bfloat16)
    edit = jedit.Edit({"<b>in</b>/kernel": half, "out/kernel": thin})
    heading, names, dense_row, thin_row = repr(edit).split("\n")
    assert heading == "Edit of 2 parameters, 0.0006 MB"
    assert names.split() == ["parameter", "shape", "kind", "norm", "MB"]
    norm = np.linalg.norm(np.asarray(half, np.float64))
    assert dense_row.split() == [
        *("<b>in</b>/kernel", "3", "x", "40", "dense", "bfloat16", f"{norm:.3g}", "0.00024")
    ]
    norm = np.linalg.norm(np.asarray(thin.dense()))
    assert thin_row.split()[1:] == [
        *("40", "x", "5", "rank", "2", "float32"),
        f"{norm:.3g}",
        "0.00036",
    ]
    assert "<td>&lt;b&gt;in&lt;/b&gt;/kernel</td>" in edit._repr_html_()
    many = jedit.Edit({f"w{i}": jnp.zeros(2) for i in range(100)})
    assert len(repr(many).split("\n")) == 27
    assert repr(many).endswith("and 76 more")


def test_what_is_traced_prints_no_numbers(case):
    params, batch, curvature = case
    projector = jedit.null_space(curvature, threshold=0.1)
    outside = jedit.edit_between(params, jax.tree.map(jnp.ones_like, params))
    printed = []

    @jax.jit
    def run(params, curvature, projector):
        edit = jedit.edit_between(params, jax.tree.map(jnp.zeros_like, params))
        values = (edit, outside, curvature, projector, Batch(params["out"]["kernel"]))
        printed.extend(map(repr, values))
        printed.extend((str(projector), edit._repr_html_(), curvature._repr_html_()))
        return params

    jaxpr = jax.make_jaxpr(run)(params, curvature, projector)
    assert not any(name in str(jaxpr) for name in ("sqrt", "reduce_sum", "dot_general"))
    assert printed[0].split("\n")[2].split()[-2:] == ["-", "0.00048"]
    assert printed[1] == repr(outside)
    assert printed[2] == repr(curvature)
    jax.vmap(lambda edit: printed.append(repr(edit)))(jedit.Edit({"w": jnp.zeros((2, 3))}))
    assert printed[-1].split("\n")[2].split()[:2] == ["w", "3"]
    # JAX puts axes, shapes and marks of its own in the place of arrays.
    for mark in (0, None, object(), jax.ShapeDtypeStruct((3,), jnp.float32)):
        for value in (outside, curvature, projector, batch):
            assert repr(jax.tree.map(lambda _, mark=mark: mark, value))


def test_curvatures_and_sites_have_tables_that_are_escaped(case):
    params, batch, curvature = case
    sites = jedit.find_sites(apply, params, batch.inputs)
    for value in (curvature, sites):
        text = value._repr_html_()
        assert text.startswith("<table>")
        assert "<td>&lt;b&gt;in&lt;/b&gt;/kernel</td>" in text
        assert "<b>" not in text
        assert text.count("<tr>") == 3
    uncovered = jedit.Sites((), {"<i>": "no & site"})
    assert "uncovered: &lt;i&gt;: no &amp; site" in uncovered._repr_html_()
    assert html_table([("a",)]) == "<table>\n<tr><th>a</th></tr>\n</table>"


def test_everything_else_is_short(case, tmp_path):
    params, batch, curvature = case
    large = jax.tree.map(lambda x: jnp.tile(x, (50, 50)), params)
    _, info = kfade(apply, params, curvature, batch, batch, ascent=Ascent(2, step_size=0.1))
    ledger = Ledger.create(tmp_path / "ledger", params)
    edit = jedit.edit_between(params, params)
    entry = ledger.record(edit, request=[f"row {i}" for i in range(1000)], method="none")
    state = jedit.LoopState(3, large, optax.adam(0.1).init(large), large)
    estimator = jedit.kfac(apply, Categorical())
    values = [
        *(info, entry, ledger, estimator, state, batch, curvature.factors, curvature.blocks),
        estimator.init(params, batch),
        jedit.diagonal(apply, Categorical()),
        jedit.null_space(curvature, threshold=0.1),
        Checkpoint(tmp_path / "job", every=10),
        Batch(PackedTokens(*[jnp.zeros((200, 100), int)] * 3)),
        jedit.methods.gu(lambda *_: None, learning_rate=0.1),
    ]
    for value in values:
        text = repr(value)
        assert len(text) < 1500, type(value)
        assert " at 0x" not in text, text
    assert "step_size=[0.1, 0.1]" in repr(info)
    assert repr(ledger) == f"Ledger('{tmp_path}/ledger', base {ledger.base[:16]})"
    assert "number=1, action='edit'" in repr(entry)
    assert "request=(1000 entries)" in repr(entry)
    assert "init=kfac.init" in repr(estimator)
    assert repr(batch) == (
        "Batch(inputs=float32[6,3], targets=[0, 1, 2, 3, 4, 0], mask=None, valid=None)"
    )
    assert repr(KfadeInfo(*[np.zeros(100)] * 8)).count("float64[100]") == 8


def test_values_in_few_characters():
    deleted = jnp.arange(3.0)
    deleted.delete()
    assert short(deleted).startswith("float")
    assert short(jnp.asarray([1.5, 2], jnp.bfloat16)) == "[1.5, 2. ]"
    assert short(jax.random.key(0)) == "key<fry>[]"
    assert short("x" * 1000) == repr("x" * 60) + "..."
    assert short({str(i): np.zeros(250_000, np.float32) for i in range(4)}) == "{4 entries, 4 MB}"
    assert short([1, None, "a"]) == "(1, None, 'a')"
    assert short(short_repr) == "short_repr"
