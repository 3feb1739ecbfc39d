"""The script of the steering claims, on a toy."""

import jax
import pytest

from tests.bench.claims import steering


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_every_method_is_measured_at_one_price(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["steering", "--quick", "--seeds", "1", "--out", str(tmp_path)])
    steering.main()
    shown = capsys.readouterr().out
    for name in ("mean difference", "LinEAS", "AUSteer, 10 units", "K-FADE, damping 0.1"):
        assert f"| {name} |" in shown
    record = steering.kept(
        tmp_path / "steering-quick-0.json", SETTINGS, lambda: pytest.fail("anew")
    )
    assert all(one["kl"] <= steering.PRICE for one in record["methods"].values())
    assert max(record["folded"].values()) < 1e-4


SETTINGS = {
    "price": steering.PRICE,
    "rows": steering.ROWS,
    "draws": steering.DRAWS,
    "tries": steering.TRIES,
    "quick": True,
}
