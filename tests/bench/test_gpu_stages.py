"""`make gpu`: its stages, what each measures at toy size, and the table; nothing here is timed."""

import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.curvature.subspace import num_columns
from tests.bench import gpu
from tests.bench.gpu_run import decompositions, machine, many_requests
from tests.bench.gpu_run import stages as stages_module
from tests.bench.gpu_run.phases import Phases
from tests.bench.gpu_run.stages import Stage, run_stages, write_json
from tests.bench.gpu_run.summary import markdown

WRITES = "import pathlib; pathlib.Path({!r}).write_text('{{\"x\": {}}}')"


def stage(name, seconds, code):
    return Stage(name, seconds, ("-c", code), f"{name}.json")


def is_alive(pid):
    """Whether a process runs: one that waits for its parent to be told does not."""
    try:
        with open(f"/proc/{pid}/stat") as opened:
            return opened.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_stage_that_fails_or_is_stopped_ends_no_other_and_keeps_what_it_wrote(tmp_path):
    def wrote(name, x):
        return WRITES.format(str(tmp_path / f"{name}.json"), x)

    pid = tmp_path / "pid"
    child = (
        "import subprocess, sys; "
        f"p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"open({str(pid)!r}, 'w').write(str(p.pid)); import time; time.sleep(60)"
    )
    write_json(tmp_path / "failed.json", {"x": "of an earlier run"})
    said = []
    stages = [
        stage("failed", 20, "raise SystemExit('first line\\nno memory was left')"),
        stage("stopped", 2, f"{wrote('stopped', 2)}; {child}"),
        stage("skipped", 20, wrote("skipped", 3).replace('"x": 3', '"skipped": "it is not here"')),
        stage("done", 20, wrote("done", 4)),
    ]
    begin = time.perf_counter()
    found = run_stages(stages, tmp_path, {"seed": 0}, seconds=60, say=said.append)
    assert time.perf_counter() - begin < 30
    rows = found["stages"]
    assert {k: row["state"] for k, row in rows.items()} == {s.name: s.name for s in stages}
    assert rows["failed"]["message"] == "no memory was left"
    assert "found" not in rows["failed"]
    assert rows["stopped"]["found"] == {"x": 2}
    assert rows["done"]["found"] == {"x": 4}
    assert rows["skipped"]["message"] == "it is not here"
    assert json.loads((tmp_path / "gpu.json").read_text())["stages"] == rows
    assert [line.split(":")[0] for line in said] == [s.name for s in stages]
    assert not is_alive(int(pid.read_text()))  # what it started is gone with it


def test_what_the_time_does_not_reach_is_left_out(tmp_path, monkeypatch):
    stages = [stage("first", 50, "import time; time.sleep(60)"), stage("second", 50, "")]
    found = run_stages(stages, tmp_path, {}, seconds=2.0, say=lambda _: None)
    assert found["stages"]["first"]["state"] == "left out"  # two seconds are not worth beginning
    stages = [s._replace(seconds=1.0) for s in stages]
    found = run_stages(stages, tmp_path, {}, seconds=1.5, say=lambda _: None)
    assert [row["state"] for row in found["stages"].values()] == ["stopped", "left out"]
    stages = [s._replace(seconds=50.0) for s in stages]
    monkeypatch.setattr(stages_module, "LEAST", 0.5)
    found = run_stages(stages, tmp_path, {}, seconds=1.0, say=lambda _: None)
    assert [row["state"] for row in found["stages"].values()] == ["cut short", "left out"]


def test_what_is_compiled_within_a_tracing_is_counted_once():
    @jax.jit
    def inner(x):
        time.sleep(0.2)  # in tracing alone
        return x + 1

    @jax.jit
    def outer(x):
        with jax.ensure_compile_time_eval():
            return x * inner(np.float32(1))

    phases = Phases()
    with phases("one"):
        jax.block_until_ready(outer(np.float32(1)))
    found = phases.found["one"]
    assert 0.2 <= found["of them compiling"] <= found["seconds"]


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "x.json", {"a": [float("nan"), (1.0, float("inf"))], 3: {"b": None}})
    found = json.loads((tmp_path / "x.json").read_text())
    assert found == {"a": [None, [1.0, None]], "3": {"b": None}}
    assert os.listdir(tmp_path) == ["x.json"]


def test_the_stages_are_within_eight_minutes_and_know_where_they_write(tmp_path):
    first = gpu.stages_of(gpu.Options(False, None, 0), tmp_path)[0]
    assert gpu.SECONDS + first.seconds <= 480
    for is_toy in (False, True):
        stages = gpu.stages_of(gpu.Options(is_toy, "tofu", 3), tmp_path)
        assert len({s.result for s in stages}) == len({s.name for s in stages}) == len(stages)
        for one in stages:
            option = "--out" if one.name.startswith("gpt") else "--json"
            where = one.arguments[one.arguments.index(option) + 1]
            result = tmp_path / one.result
            assert where == str(result.parent if option == "--out" else result)
            assert ("--toy" in one.arguments) == is_toy
        gpts = [s for s in stages if s.name.startswith("gpt")]
        assert [s.arguments[-1] for s in gpts] == ["tofu"] * (1 if is_toy else 2)


def test_the_largest_decompositions_are_reached_whatever_the_others_take(tmp_path):
    stages = gpu.stages_of(gpu.Options(False, None, 0), tmp_path)[1:]
    names = [s.name for s in stages]
    sizes = [int(name.split()[1]) for name in names if "decompose" in name]
    assert sizes == sorted(gpu.SIZES, reverse=True)
    for size in sizes[:2]:
        # All that comes before takes all of its time, and this one is not cut short.
        until = names.index(f"decompose {size}") + 1
        assert sum(s.seconds for s in stages[:until]) <= gpu.SECONDS


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only", "nothing"], "no stage's name begins so; they are kernels, gpt bfloat16"),
        (["--out", "FILE"], "is a file; --out names a folder"),
    ],
)
def test_what_it_cannot_do_is_said_in_one_sentence(tmp_path, capsys, arguments, sentence):
    (tmp_path / "FILE").write_text("")
    arguments = [str(tmp_path / x) if x == "FILE" else x for x in arguments]
    assert gpu.main(["--toy", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert line.startswith("python -m tests.bench.gpu: ")
    assert sentence in line


def test_without_an_accelerator_nothing_is_begun(tmp_path, monkeypatch, capsys):
    def ran(stages, out, found, *, seconds, say, environment):
        del out, seconds, say, environment
        assert [s.name for s in stages] == ["machine"]
        row = {"state": "done", "seconds": 1.0, "message": "", "found": {"platform": "cpu"}}
        return found | {"stages": {"machine": row}}

    monkeypatch.setattr(gpu, "run_stages", ran)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "JAX sees no accelerator here; --toy" in capsys.readouterr().err


@pytest.fixture
def moment(key):
    scale = jnp.arange(1, 41, dtype=jnp.float32) ** -0.5
    x = jax.random.normal(key, (80, 40), jnp.float32) * scale[None]
    return x.T @ x / 80


def test_each_way_is_numpys(moment):
    a = np.asarray(moment, np.float64)
    damped = a + decompositions.DAMPING * np.trace(a) / 40 * np.eye(40)
    np.testing.assert_allclose(decompositions.damped(moment), damped, atol=1e-6)
    values, basis = np.linalg.eigh(a)
    lower = np.asarray(decompositions.cholesky(moment), np.float64)
    np.testing.assert_allclose(lower @ lower.T, damped, atol=1e-5)
    x, rounds = decompositions.inverse(moment)
    exact = np.linalg.inv(damped)
    np.testing.assert_allclose(x, exact, atol=1e-3 * np.abs(exact).max())
    assert 5 < int(rounds) < 30
    found, q = decompositions.iteration(moment, 4)
    np.testing.assert_allclose(found[-3:], values[-3:], rtol=1e-2)
    assert abs(np.asarray(q)[:, -1] @ basis[:, -1]) > 0.99


def test_every_way_is_written_with_its_residual(tmp_path):
    path = tmp_path / "d.json"
    decompositions.main(["--size", "48", "--json", str(path)])
    ways = json.loads(path.read_text())["ways"]
    assert list(ways) == ["product", "cholesky", "iteration", "inverse", "eigh"]
    for name, row in ways.items():
        assert row["seconds"] > 0
        assert row["residual"] < (0.1 if name == "iteration" else 1e-3)
    assert ways["product"]["multiple"] == pytest.approx(1)
    assert ways["eigh"]["flops"] == 2 * 48**3


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("product", None),
        ("cholesky", "cusolver_potrf"),
        ("inverse", None),  # products alone
        ("iteration", "cusolver_geqrf"),
        ("eigh", "cusolver_syevd"),
    ],
)
def test_each_way_is_lowered_for_cuda_at_the_largest_size(name, library):
    ways = {
        # A round's decomposition: the rounds are told to go on by the host.
        "iteration": lambda a: jnp.linalg.qr(a[:, : num_columns(decompositions.LEADING)]),
        "eigh": lambda a: decompositions.eigh(a, a.dtype),
    }
    job = ways.get(name) or getattr(decompositions, name)
    matrix = jax.ShapeDtypeStruct((gpu.SIZES[-1],) * 2, jnp.float32)
    text = jax.jit(job).trace(matrix).lower(lowering_platforms=("cuda",)).as_text()
    assert (library is None) == ("cusolver" not in text)
    assert library is None or library in text


def test_a_way_that_fails_or_is_wrong_is_seen_and_costs_itself_alone(tmp_path, monkeypatch):
    def refused(_):
        raise RuntimeError("cusolver: an illegal value\nmore of it")

    path = tmp_path / "d.json"
    monkeypatch.setitem(decompositions.WAYS, "cholesky", refused)
    wrong = jnp.eye(20, dtype=jnp.float32), jnp.int32(1)
    monkeypatch.setattr(decompositions, "inverse", lambda _: wrong)
    decompositions.main(["--size", "20", "--json", str(path), "--only", "cholesky,inverse"])
    ways = json.loads(path.read_text())["ways"]
    assert ways["cholesky"] == {"error": "RuntimeError: cusolver: an illegal value"}
    assert ways["inverse"]["residual"] > 0.1
    assert ways["inverse"]["multiple"] is None  # the product's rate was not asked for


def test_requests_beside_a_loop(tmp_path):
    path = tmp_path / "r.json"
    with jax.numpy_dtype_promotion("standard"):
        many_requests.main(["--toy", "--json", str(path)])
    (row,) = json.loads(path.read_text())["sizes"].values()
    assert row["times a loop"] == pytest.approx(row["requests a second"] / row["in a loop"])
    made = many_requests.scene(many_requests.TOYS["toy"])
    assert row["parameters"] == sum(x.size for x in jax.tree.leaves(made.params))
    assert not np.array_equal(made.forget.inputs, made.retain.inputs)


def test_the_machine_is_told(tmp_path):
    machine.main(["--json", str(tmp_path / "m.json")])
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["platform"] == jax.devices()[0].platform
    assert {"jax", "jedit", "python"} <= set(found["versions"])


def of_a_run(**stages):
    """A run's file with what some stages found."""
    rows = {
        name.replace("_", " "): {
            "state": "done",
            "seconds": 2.0,
            "budget": 9,
            "message": "",
            "found": found,
        }
        for name, found in stages.items()
    }
    rows["peers"] = {"state": "stopped", "seconds": 9.0, "budget": 9, "message": "after 9 s"}
    known = {"kind": "NVIDIA H200", "versions": {"jax": "0.12.0"}}
    given = {"machine": known, "date": "2026-12-01", "data": "TOFU", "seed": 0}
    return given | {"is_toy": False, "stages": rows}


def test_the_table_says_what_is_there_and_no_more():
    check = {"name": "moment (1, 8, 8)", "error": 0.5, "is_right": False, "why": ""}
    time = {"name": "moment", "contender": "kernel", "seconds": 2e-3, "temporary": None}
    kernels = {"checks": [check, check | {"is_right": True}], "times": [time | {"speed": 1.9}]}
    ways = {"cholesky": {"error": "RuntimeError: no"}}
    phases = {
        name: {
            "seconds": 1.5,
            "of them compiling": 1.0,
            "peak GiB": 3.0,
            "device's peak GiB so far": peak,
        }
        for name, peak in (("load", 2.5), ("fit", 30.0), ("edit", 41.0))
    }
    fit = {"weights GiB": 2.0, "factors GiB": 9.0, "groups": 3, "fit share": 0.25}
    fit |= {"matmul rate": 7e14, "true KL": 0.01, "budget": 0.01, "unseen KL": 0.02}
    text = markdown(
        of_a_run(
            kernels=kernels,
            decompose_4096={"size": 4096, "ways": ways},
            edit_the_folder=fit | {"phases": phases, "forget nll": [1.0, 2.0]},
            plan_the_folder={"phases": {"fit": 20.0, "decompose": 33.0, "edit": 44.0}},
            gpt_bfloat16={"runs": [{"dtype": "bfloat16", "model": "a GPT", "steps": []}]},
        )
    )
    assert "1 of 2 checks are right." in text
    assert "WRONG: moment (1, 8, 8), error 0.5" in text
    assert "| moment | kernel | 2 | 1.9 | - |" in text
    assert "| 4096 | cholesky | RuntimeError: no |" in text
    assert "| fit | 1.5 | 1 | 30 | 33 | 3 |" in text
    assert "| edit | 1.5 | 1 | 41 | 44 | 3 |" in text
    # Its flops are counted too high, its seconds too low.
    assert "ran at no more than 25.0% of the bfloat16 product's 700 Tflop/s" in text
    assert "| peers | stopped | 9 | 9 | after 9 s |" in text
    assert "toy" not in text
    assert "Square products" not in text  # it was stopped before


def test_two_stages_from_end_to_end(tmp_path, capsys):
    out = tmp_path / "out"
    assert gpu.main(["--toy", "--out", str(out), "--only", "decompose 48,edit"]) == 0
    found = json.loads((out / "gpu.json").read_text())
    states = {name: row["state"] for name, row in found["stages"].items()}
    # There is no folder: its stage was not asked for.
    assert states == {"edit the folder": "skipped", "decompose 48": "done"}
    assert found["machine"]["platform"] == "cpu"
    text = capsys.readouterr().out
    assert "## Of one factor, in float32" in text
    assert text.startswith((out / "table.md").read_text())


@pytest.mark.parametrize(("seconds", "first"), [("0.1", "left out"), ("0.4", "cut short")])
def test_what_the_time_did_not_reach_is_told_at_the_end(
    tmp_path, capsys, monkeypatch, seconds, first
):
    monkeypatch.setattr(stages_module, "LEAST", 0.2)  # no stage imports JAX in twice that
    arguments = ["--toy", "--out", str(tmp_path), "--only", "decompose", "--seconds", seconds]
    assert gpu.main(arguments) == 3
    closing = capsys.readouterr().out.splitlines()[-1]
    names = f"decompose 65 ({first}), decompose 48 (left out)"
    assert closing == f"Not reached in {seconds} s: {names}. --only runs them alone."


@pytest.mark.skipif(not os.environ.get("JEDIT_TEST_ALL"), reason="all stages: JEDIT_TEST_ALL=1")
def test_the_whole_toy_from_end_to_end(tmp_path):
    assert gpu.main(["--toy", "--out", str(tmp_path / "out")]) == 0
    stages = json.loads((tmp_path / "out" / "gpu.json").read_text())["stages"]
    assert {row["state"] for row in stages.values()} <= {"done", "skipped"}
