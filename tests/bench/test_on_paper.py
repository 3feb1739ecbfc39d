"""The formulas on paper, against what a model of Llama's shape really makes."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import jedit
from jedit.core.batch import Batch
from jedit.curvature.likelihoods import Categorical
from tests.bench import on_paper, plan_on_paper

WIDTH, KEY_VALUE, HIDDEN, LAYERS = 12, 4, 20, 3


def apply(params, x):
    def layer(x, w):
        q, k, v = x @ w["q"], x @ w["k"], x @ w["v"]
        x = x + (jnp.tanh(q) * jnp.sum(k * v, -1, keepdims=True)) @ w["o"]
        return x + (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"], None

    return jax.lax.scan(layer, x, params)[0]


def shapes():
    d_ins = {"o": WIDTH, "down": HIDDEN}
    d_outs = {"k": KEY_VALUE, "v": KEY_VALUE, "gate": HIDDEN, "up": HIDDEN}
    return {
        n: (LAYERS, d_ins.get(n, WIDTH), d_outs.get(n, WIDTH))
        for n in ("q", "k", "v", "o", "gate", "up", "down")
    }


def test_entries_are_those_of_the_estimator():
    model = on_paper.llama("toy", LAYERS, WIDTH, KEY_VALUE, HIDDEN)
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes().items()}
    batch = Batch(jax.ShapeDtypeStruct((2, 5, WIDTH), jnp.float32))
    state = jax.eval_shape(jedit.kfac(apply, Categorical()).init, params, batch)
    matrices = [x for x in jax.tree.leaves(state) if x.ndim == 3]
    found = on_paper.sums(model)
    assert found.factors == sum(x.size for x in matrices)
    assert found.weights == sum(x.size for x in params.values())
    assert found.cubes == sum(x.shape[0] * x.shape[1] ** 3 for x in matrices)


def test_the_numbers_are_those_by_hand():
    """Hand arithmetic for the 8B model: 719 million entries of factors a layer."""
    eight = on_paper.MODELS[0]
    a_layer = 3 * 4096**2 + 14336**2 + 3 * 4096**2 + 2 * 1024**2 + 2 * 14336**2
    assert on_paper.sums(eight).factors == 32 * a_layer
    assert on_paper.sums(eight).weights == 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    one, many = (on_paper.cost(eight, n, 1e6) for n in (8, 64))
    assert one.sums == pytest.approx(11.5, rel=0.01)
    assert one == pytest.approx([8 * x for x in many])
    twice = on_paper.cost(eight, 8, 1e6, on_paper.Constants(rate=395e12, eigh=5.0, cholesky=16.2))
    assert twice[2:5] == pytest.approx([2 * one.fit, one.decomposition / 2, 3 * one.factorisation])


def a_run(**changes):
    """What `make gpu` writes, as far as constants are made of it."""

    def way(seconds, flops):
        return {"seconds": seconds, "flops": flops}

    runs = [{"matmul_rates": {"peak": 7e14, "full": 5e13}, "steps": [{"name": "train"}]}]
    runs[0]["steps"].append({"name": "factors", "share": 0.5})
    small = {"size": 4096, "ways": {"eigh": way(9.0, 1e14), "cholesky": way(1.0, 1e14)}}
    large = {"size": 28672, "ways": {"eigh": {"error": "refused"}, "cholesky": way(4.0, 1e14)}}
    stages = {
        "gpt bfloat16": {"state": "stopped", "found": {"runs": runs}},
        "decompose 28672": {"state": "done", "found": large},
        "decompose 4096": {"state": "done", "found": small},
        "requests": {"state": "failed"},
    }
    machine = {"kind": "NVIDIA H200", "bytes": 140e9}
    known = {"schema": "jedit.gpu/1", "is_toy": False, "date": "2026-12-01T10:00:00+00:00"}
    return known | {"machine": machine, "stages": stages} | changes


def test_constants_are_those_of_a_run(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(a_run()))
    found = on_paper.constants(path)
    # By hand: 1 / .5; 9 s at 5e13 a second are 4.5 times 1e14; the larger Cholesky, 4 s, twice.
    assert found[:6] == pytest.approx((7e14, 5e13, 2.0, 4.5, 2.0, 140e9))
    assert found.source.startswith("measured on NVIDIA H200, 2026-12-01")
    assert "stated" not in found.source


def test_what_a_run_has_not_is_stated_and_named(tmp_path):
    path = tmp_path / "gpu.json"
    stages = {name: row for name, row in a_run()["stages"].items() if name != "decompose 4096"}
    path.write_text(json.dumps(a_run(stages=stages)))
    found = on_paper.constants(path)
    assert (found.eigh, found.cholesky) == (on_paper.STATED.eigh, 2.0)
    assert found.source.endswith("stated, since the run has no number of them: eigh")


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps(a_run(is_toy=True))])
def test_what_is_no_whole_run_is_refused_or_passed_over(tmp_path, monkeypatch, capsys, content):
    path = tmp_path / "gpu.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is no gpu.json of a whole run"):
        on_paper.constants(path)
    with pytest.raises(SystemExit):
        on_paper.main(["--constants", str(path)])
    assert "gpu.json" in capsys.readouterr().err
    monkeypatch.setattr(on_paper, "RUN", path)
    assert on_paper.constants() == on_paper.STATED
    on_paper.main([])
    assert "Constants stated: " in capsys.readouterr().out


def test_the_stated_constants_are_of_one_device():
    """An H200's, in memory too: what fits, and how long it takes, is told of the same device."""
    stated = on_paper.STATED
    assert (stated.rate, stated.float32_rate, stated.memory) == (790e12, 60e12, 141e9)
    assert "an H200's nominal rates and memory" in stated.source
    headings = " ".join(plan_on_paper.HEADINGS).format(memory=stated.memory / 1e9)
    assert " on 141 GB " in headings


def test_seconds_of_a_plan_by_the_constants():
    phases = [
        SimpleNamespace(name="fit", flops=6e14),
        SimpleNamespace(name="decompose", flops=2e15),
    ]
    plan = SimpleNamespace(phases=phases, num_devices=2)
    known = on_paper.Constants(rate=3e14, float32_rate=5e13, fit=1.5, eigh=4.0)
    # 2 s times 1.5; 2e15 are ten times 2 d³, four times that at 5e13: 16 s; on two devices.
    assert plan_on_paper.seconds_of(plan, known) == pytest.approx((3.0 + 16.0) / 2)
