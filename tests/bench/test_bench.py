"""The benchmarks count right and run from end to end; nothing here is timed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jedit
from tests.bench import __main__ as bench
from tests.bench.cases import CASES, TOYS, Case, eigenvalue_flops, factor_flops
from tests.bench.gpu_run import peers
from tests.bench.models import forward, make
from tests.bench.table import claims, table


def test_floor_of_one_matrix_by_hand():
    # 2 x 3: forward 2*6, backward 2*6, moments 2*4 + 2*9; rotations the same, gradient 2*6.
    assert factor_flops(2, 3) == 12 + 12 + 8 + 18
    assert eigenvalue_flops(2, 3) == 12 + 12 + 8 + 18 + 12
    case = Case("mlp", (2, 3, 5), 1, num_examples=14, batch=7)
    assert case.floor("factors") == 7 * (50 + (30 + 30 + 18 + 50))
    assert case.floor("eigenvalues") == 7 * (62 + (30 + 30 + 18 + 50 + 30))
    assert case.floor("eigendecomposition") == 2 * (8 + 27) + 2 * (27 + 125)
    assert case.floor("solve") == 4 * (4 * 3 + 2 * 9) + 4 * (9 * 5 + 3 * 25)
    assert case.num_batches == 2


def test_floors_of_the_two_cases():
    assert CASES["mlp"].floor("factors") == 256 * (
        4 * (784 * 1024 + 1024 * 1024 + 1024 * 10)
        + 2 * (784**2 + 1024**2 + 1024**2 + 1024**2 + 1024**2 + 10**2)
    )
    layer = 4 * 8 * 256**2 + 2 * (4 * 256 * 1024 + 2 * 256**2 + 2 * 1024**2)
    assert CASES["gpt"].floor("factors") == 8 * 128 * 4 * layer


@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_select_takes_the_matrices_of_the_floor(name):
    problem = make(TOYS[name])
    sites = jedit.find_sites(
        problem.apply, problem.params, problem.batches[0], select=problem.case.select
    )
    found = [(s.weight.d_in, s.weight.d_out) for s in sites.values()]
    assert sorted(found) == sorted(problem.case.matrices)
    assert not sites.uncovered
    assert all(site.weight.bias_path for site in sites.values())
    shapes = [kernel.shape for kernel, _ in problem.matrices.values()]
    assert sorted(shapes) == sorted(problem.case.matrices)


@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_contenders_compute_the_model_that_jedit_does(name):
    problem = make(TOYS[name])
    inputs = problem.batches[0]

    def dense(_, x, kernel, bias):
        return x @ kernel + bias[None]

    # The models by hand are written as one writes them, with rank promotion.
    with jax.numpy_rank_promotion("allow"):
        mine = forward(problem.case, problem.matrices, problem.params, inputs, dense)
    theirs = problem.apply(problem.params, inputs)
    np.testing.assert_allclose(mine, theirs.reshape(mine.shape), atol=1e-5)  # both in float32
    assert jnp.std(mine) > 0


def test_claims_and_table():
    row = {"quartiles": (0.9, 1.2), "seconds": 2.0, "rate_gflops": [100.0, 110.0]}
    mine = {"case": "mlp", "job": "factors", "contender": "jedit", "multiple": 0.8, "peak_gib": 0.7}
    peer = {"case": "mlp", "job": "factors", "contender": "by hand", "multiple": 0.7}
    absent = {"case": "mlp", "job": "factors", "contender": "kfac-jax", "skipped": "not here"}
    results = [{**row, **mine}, {**row, "peak_gib": 0.4, **peer}, absent]
    held = claims(results)
    assert [c["holds"] for c in held] == [True, False, False]
    assert "by hand" in held[2]["claim"]
    text = table(results, held)
    assert "skipped: mlp factors, kfac-jax: not here" in text
    assert text.count("FAILS") == 2


def test_a_toy_run_from_end_to_end(tmp_path, capsys):
    output = tmp_path / "bench.json"
    arguments = ["--toy", "--case", "mlp", "--job", "eigenvalues", "--contender", "jedit"]
    options = ["--repeats", "2", "--rounds", "1", "--output", str(output)]
    assert bench.main([*arguments, *options]) == 0
    (result,) = json.loads(output.read_text())["results"]
    assert len(result["measured"]["seconds"]) == 2
    assert np.isfinite(result["multiple"])
    assert result["multiple"] > 0
    assert 0.05 < result["peak_gib"] < 16
    assert "jedit" in capsys.readouterr().out


def test_rounds_are_put_together():
    one = {"seconds": [1.0], "multiples": [2.0], "rates": [1e9, 2e9], "peak_gib": 0.5}
    two = {"seconds": [3.0], "multiples": [4.0], "rates": [3e9, 4e9], "peak_gib": 0.4}
    rows = {}
    bench.merge(rows, ("mlp", "factors", "jedit"), one)
    bench.merge(rows, ("mlp", "factors", "jedit"), two)
    result = bench.summary("mlp", "factors", "jedit", rows["mlp", "factors", "jedit"])
    assert (result["multiple"], result["seconds"], result["peak_gib"]) == (3.0, 2.0, 0.5)
    assert result["rate_gflops"] == [2.0, 3.0]


def test_a_contender_that_is_not_there_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setenv("JEDIT_BENCH_TORCH", "/bin/false")
    result = bench.measured({"contender": "kronfluence"})
    assert "JEDIT_BENCH_TORCH" in result["skipped"]


def test_the_factors_beside_a_run_on_an_accelerator(tmp_path, monkeypatch, capsys):
    def in_a_child(asked):
        if asked["contender"] != "jedit":
            return {"skipped": "not here"}
        return json.loads(peers.child(asked))

    monkeypatch.setattr(peers, "in_a_child", in_a_child)
    path = tmp_path / "peers.json"
    assert peers.main(["--toy", "--dtype", "bfloat16", "--json", str(path)]) == 0
    mine, other = json.loads(path.read_text())["peers"]
    assert 0 < mine["share"] < 1.5
    assert mine["first_seconds"] > mine["seconds"] > 0
    assert (other["contender"], other["skipped"]) == ("kfac-jax", "not here")
    assert "bfloat16, kfac-jax: skipped: not here" in capsys.readouterr().out
    with pytest.raises(ValueError, match="there is no accelerator"):
        peers.child({"dtype": "bfloat16", "contender": "jedit", "is_toy": False})
