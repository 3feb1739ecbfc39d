"""The script of Attention-Shifting and SAE-guided unlearning, on a toy."""

import jax
import numpy as np
import pytest

from tests.bench.claims import shifting


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_every_method_is_measured_beside_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["shifting", "--quick", "--seeds", "1", "--out", str(tmp_path)])
    shifting.main()
    shown = capsys.readouterr().out
    names = ["untouched", "retrained", *shifting.METHODS]
    assert all(f"| {name} |" in shown for name in names)
    assert {path.name for path in tmp_path.iterdir()} == {"shifting.json", "shifting-quick-0.json"}

    def unread(*_):
        raise AssertionError("a seed that was measured was measured again")

    monkeypatch.setattr(shifting, "measured", unread)
    shifting.main()


def test_fluency_is_the_perplexity_of_what_is_said_to_a_judge_that_knows_no_facts():
    scene = shifting.make_scene(0, shifting.QUICK)
    # What the judge itself says is as likely to it as can be; another model's is less so.
    other = jax.tree.map(
        lambda x: x + 0.3 * np.sign(np.sin(np.arange(x.size))).reshape(x.shape), scene.judge
    )
    assert shifting.fluency(scene, scene.judge) < shifting.fluency(scene, other)
