"""The kernels' benchmark runs from end to end, and finds a wrong kernel; nothing here is timed."""

import json

import jax.numpy as jnp
import pytest
from jedit_kernels.shapes import TOY_MOMENTS

from tests.bench import kernels as bench


def test_toys_from_end_to_end(tmp_path, capsys):
    path = tmp_path / "kernels.json"
    assert bench.main(["--toy", "--repeats", "1", "--json", str(path)]) == 0
    kept = json.loads(path.read_text())
    assert len(kept["times"]) == sum(len(r.contenders) for r in bench.races("TOY", jnp.float32))
    assert kept["unchecked"].startswith("the kernels need a GPU")
    head, *table = capsys.readouterr().out.splitlines()
    assert "CPU" in head
    assert len(table) == 3 + sum(len(r.contenders) for r in bench.races("TOY", jnp.float32))
    assert any("masked | XLA, whole product | " in line for line in table)


def test_off_a_gpu_there_is_nothing_to_check(capsys):
    assert bench.main(["--check"]) == 0
    assert "need a GPU" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [2.0, jnp.nan, 1.0])
def test_a_wrong_kernel_is_found(monkeypatch, capsys, wrong):
    races = [r for r in bench.races("TOY", jnp.bfloat16) if "moment" in r.name]
    assert len(races) == 2 * len(TOY_MOMENTS)
    ours = races[0].contenders["XLA, jedit_kernels"]
    planted = {"kernel": lambda *x: wrong * ours(*x)}
    monkeypatch.setattr(
        bench, "races", lambda *_: [r._replace(contenders=r.contenders | planted) for r in races]
    )
    assert bench.check(("TOY",)) == (wrong == 1.0)
    assert ("WRONG  moment" in capsys.readouterr().out) == (wrong != 1.0)
    bench.report("TOY", jnp.bfloat16, 1, wrong=() if wrong == 1.0 else {"moment"})
    assert ("| kernel |" in capsys.readouterr().out) == (wrong == 1.0)


def test_a_kernel_that_does_not_compile_is_wrong(monkeypatch, capsys):
    def kernel(*_):
        raise NotImplementedError("no such layout\nat line 3")

    race = next(bench.races("TOY", jnp.bfloat16))
    race = race._replace(contenders=race.contenders | {"kernel": kernel})
    monkeypatch.setattr(bench, "races", lambda *_: [race])
    kept = []
    assert not bench.check(("TOY",), kept.append)
    assert kept[0]["why"] == "no such layout"
    assert "no such layout" in capsys.readouterr().out
