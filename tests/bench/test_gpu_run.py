"""`python -m tests.bench.gpu_run` on a toy: what it counts, what it refuses, what it writes."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jedit
from jedit.curvature import Estimator
from jedit.models import gpt
from jedit.recipes.scenes.question_answer import SELECT
from jedit.recipes.tofu.presets import PRESETS
from jedit.recipes.tofu.run import Sets, prepare
from tests.bench.cases import TOYS
from tests.bench.gpu_run import bench_steps, gpu_bench, rates
from tests.bench.gpu_run.__main__ import main


def test_flops_of_two_matrices_by_hand():
    # 2 x 3: through and back 2*6 + 2*6, moments or rotations 2*4 + 2*9, gradient 2*6.
    # 5 x 2: 2*10 + 2*10, 2*25 + 2*4, 2*10.
    factors = rates.factor_flops([(2, 3), (5, 2)])
    assert factors == (24 + 40, 26 + 58)
    assert factors.all == 148
    assert rates.factor_flops([(2, 3), (5, 2)], is_narrow=True) == (148, 0)
    assert rates.eigenvalue_flops(iter([(2, 3), (5, 2)])) == (24 + 40, 26 + 58 + 12 + 20)


def products(jaxpr):
    """Flops of all products of a program without loops."""
    total = 0
    for eqn in jaxpr.eqns:
        assert eqn.primitive.name not in ("scan", "while")
        if eqn.primitive.name == "dot_general":
            ((contracted, _), _), left = eqn.params["dimension_numbers"], eqn.invars[0].aval
            inner = np.prod([left.shape[i] for i in contracted])
            total += int(2 * inner * np.prod(eqn.outvars[0].aval.shape))
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            total += products(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("d_in", [3, 8])
def test_flops_are_those_of_the_program(d_in):
    shapes, n = [(d_in, 5), (5, 4)], 7
    params = {str(i): jnp.ones(shape, jnp.float32) for i, shape in enumerate(shapes)}

    def apply(params, x):
        return x @ params["0"] @ params["1"]

    batch = jedit.Batch(jnp.ones((n, d_in), jnp.float32))
    estimator = jedit.kfac(apply, jedit.likelihoods.Categorical())
    state = estimator.init(params, batch)
    program = jax.make_jaxpr(estimator.update)(state, params, batch, jax.random.key(0))
    assert rates.matrices_of(apply, params, batch.inputs, ".*") == shapes
    # Nobody wants the gradient of what enters the first matrix; the floor counts it all the same.
    assert products(program.jaxpr) == n * (rates.factor_flops(shapes).all - 2 * d_in * 5)


def test_the_floor_is_that_of_the_other_benchmarks():
    case = TOYS["gpt"]
    vocab, width, layers, heads = case.sizes
    sizes = {"vocab": vocab, "width": width, "num_layers": layers, "num_heads": heads}
    apply, params = gpt(key=jax.random.key(0), max_len=4, **sizes)
    found = rates.matrices_of(apply, params, jnp.zeros((1, 4), jnp.int32), SELECT)
    assert sorted(found) == sorted(case.matrices)
    positions = case.batch * case.positions
    assert positions * rates.factor_flops(found).all == case.floor("factors")
    assert positions * rates.eigenvalue_flops(found).all == case.floor("eigenvalues")


def test_rates_are_averaged_as_times_are():
    # A flop at 1 a second and another at 3 take 4/3 of a second.
    found = rates.Rates(1.0, 2.0).between(rates.Rates(3.0, 2.0))
    assert found == pytest.approx((1.5, 2.0))


def test_both_moments_are_the_same_number():
    rows = jax.random.normal(jax.random.key(1), (50, 6), jnp.float32).astype(jnp.bfloat16)
    exact = np.asarray(rows, np.float64)
    exact = exact.T @ exact
    for moment in (rates._cast_moment(rows), rates._moment(rows)):
        assert moment.dtype == jnp.float32
        np.testing.assert_allclose(moment, exact, atol=1e-5 * np.abs(exact).max())


def test_shares_of_a_pass(monkeypatch):
    """12 positions of 60 + 40 flops in 2 seconds, at 1500 and 160 flops a second."""
    monkeypatch.setattr(bench_steps, "timed", lambda job: (2.0, job()))
    monkeypatch.setattr(bench_steps, "peak_gib", lambda: 0.5)
    update = jax.tree_util.Partial(lambda state, _, batch, __: state + jnp.sum(batch.inputs))
    estimator = Estimator(lambda *_: jnp.float32(0), update, lambda state: state)
    ones, valid = jnp.ones((2, 3), jnp.float32), jnp.float32([[1, 1, 0], [0, 0, 0]])
    chunks = [jedit.Batch(ones, valid=ones), jedit.Batch(ones, valid=valid)]
    around = iter([rates.Rates(1000.0, 160.0), rates.Rates(3000.0, 160.0)])
    state, step, rate = bench_steps._accumulate(
        estimator, {}, chunks, rates.Flops(60, 40), lambda: next(around), key=jax.random.key(0)
    )
    assert state == 12  # each batch once
    assert rate == pytest.approx((1500, 160))
    assert step[1:6] == (2.0, 2.0, 3.0, 8.0, 0.5)
    assert step.share == pytest.approx(12 * 100 / 1500 / 2)
    assert step.share_of_both == pytest.approx(12 * (60 / 1500 + 40 / 160) / 2)


@pytest.mark.parametrize(("said", "gib"), [(None, None), ({"peak_bytes_in_use": 3 * 2**29}, 1.5)])
def test_peak_memory_where_the_device_tells_it(monkeypatch, said, gib):
    device = SimpleNamespace(memory_stats=lambda: said)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert rates.peak_gib() == gib


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "bench needs --gpu, the whole run, or --toy"),
        (("--gpu",), "--gpu needs an accelerator, and JAX sees none here"),
        (("--toy", "--data", "nowhere"), "nowhere"),
    ],
)
def test_what_it_cannot_do_is_said_in_one_sentence(
    tmp_path, monkeypatch, capsys, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert line.startswith("python -m tests.bench.gpu_run: ")
    assert sentence in line
    assert not list(tmp_path.iterdir())


def test_an_accelerator_gets_the_whole_run(monkeypatch):
    made = []

    def invented(preset, *, seed, facts_per_author):
        made.append((preset, seed))
        assert preset.authors * facts_per_author == 4000
        return Sets([], [], [], [], [], [])

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(gpu_bench, "invented_sets", invented)
    gpu_bench.sets_of(gpu_bench.BenchOptions(gpu=True, seed=5))
    assert made == [(PRESETS["gpu"], 5)]
    assert (made[0][0].model.width, made[0][0].model.layers) == (768, 12)


def test_what_is_done_is_kept_when_a_later_run_fails(tmp_path, monkeypatch):
    def run(sets, size, dtype, *, seed, say, keep):
        del sets, seed, say
        assert size is gpu_bench.TOY
        keep({"dtype": dtype, "steps": []})
        if dtype == "float32":
            raise MemoryError
        return {"dtype": dtype, "loss": float("nan")}

    monkeypatch.setattr(gpu_bench, "_run", run)
    options = gpu_bench.BenchOptions(toy=True, out=tmp_path / "out")
    with pytest.raises(MemoryError):
        gpu_bench.run_bench(options, gpu_bench.sets_of(options), command="", say=print)
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    begun = {"dtype": "float32", "steps": []}
    assert found["runs"] == [{"dtype": "bfloat16", "loss": None}, begun]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """What a toy in bfloat16 prints and writes."""
    out = tmp_path_factory.mktemp("bench") / "out"
    arguments = ["--toy", "--dtype", "bfloat16", "--out", str(out), "--seed", "3"]

    def prepared(*given, **more):
        # Generating answers is most of what there is to compile, and tested with the benchmark.
        scene = prepare(*given, **more)
        return scene._replace(task=scene.task._replace(utility=None))

    with jax.numpy_dtype_promotion("standard"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_bench, "prepare", prepared)
        assert main(arguments) == 0
    assert [item.name for item in out.iterdir()] == ["bench.json"]
    return json.loads((out / "bench.json").read_text())


def test_a_toy_says_what_it_was(toy):
    assert toy["command"].startswith("python -m tests.bench.gpu_run --toy --dtype bfloat16")
    assert (toy["seed"], toy["is_toy"]) == (3, True)
    assert toy["versions"]["jedit"] == jedit.__version__
    assert {"jax", "jaxlib"} <= set(toy["versions"])
    assert toy["date"].startswith("20")
    assert toy["device"]["platform"] == jax.devices()[0].platform
    assert "invented authors" in toy["data"]
    assert toy["num_rows"]["forget"] == 2


def test_a_toy_measures_every_step(toy):
    (run,) = toy["runs"]
    assert run["dtype"] == "bfloat16"
    steps = {step.pop("name"): step for step in run["steps"]}
    names = ["train", "retrain", "factors", "eigendecomposition", "eigenvalues (EK-FAC)"]
    assert list(steps) == [*names, "edit (K-FADE)", "evaluate"]
    for step in steps.values():
        assert step["seconds"] > 0
        assert step["first_seconds"] > 0
        assert step["peak_gib"] is None
    for name in ("factors", "eigenvalues (EK-FAC)"):
        assert steps[name]["first_seconds"] > steps[name]["seconds"]  # which compiles
        assert 0 < steps[name]["share"] < 1.5
        assert 0 < steps[name]["share_of_both"] < 1.5
        assert steps[name]["rows"] == toy["num_rows"]["seen"]
    # Of sequences that fill no batch there may be as many as make half of an epoch here.
    assert 29 <= steps["train"]["rows"] <= 60
    assert 28 <= steps["retrain"]["rows"] <= 58
    assert set(run["matmul_rates"]) == {"peak", "full"}
    assert set(run["moment_rates"]) == {"cast to float32", "as they are"}
    assert run["num_matrices"] == 6
    # In bfloat16 the moments are products in the model's dtype, EK-FAC's rotations are not.
    by_hand = 4 * 4 * 16**2 + 2 * 4 * 16 * 64
    moments = 4 * 2 * (16**2 + 16**2) + 2 * 2 * (16**2 + 64**2)
    flops = run["flops_per_position"]
    assert flops["factors"] == {"model": by_hand + moments, "statistics": 0}
    gradients = 4 * 2 * 16**2 + 2 * 2 * 16 * 64
    assert flops["eigenvalues"] == {"model": by_hand, "statistics": moments + gradients}


def test_a_toy_judges_three_models(toy):
    points = toy["runs"][0]["points"]
    assert list(points) == ["untouched", "retrained", "edited"]
    assert points["untouched"]["heldout_kl"] == pytest.approx(0, abs=1e-6)
    assert points["retrained"]["forget_kl"] == pytest.approx(0, abs=1e-6)
    assert points["retrained"]["forget_quality"] == 1
    assert points["edited"]["forget_nll"] > points["untouched"]["forget_nll"]
    assert 0 < points["edited"]["true_kl"] <= bench_steps.BUDGET * 1.001
