"""`jedit forget --ledger`: a later request does not teach again what earlier ones forgot."""

import jax.numpy as jnp
import pytest

import jedit
from jedit.models import load_model, save_model
from jedit.recipes.folders.settings import Settings
from jedit.recipes.folders.written import as_request
from jedit.recipes.pretrained import forget_in_checkpoint
from tests.llm.test_forget_methods import ROWS, folder  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("standard_promotion")
NORM = "final_norm/w"


class Meanwhile:
    """A watcher that does something as the judging begins."""

    def __init__(self, what):
        self.what = what

    def __call__(self, text):
        if text == "judging":
            self.what()


def test_a_later_request_leaves_out_what_an_earlier_one_forgot(folder, tmp_path):  # noqa: F811
    """Its rows are among those to keep; an edit of an older state of the ledger is no record."""
    params = load_model(folder)[1]
    ledger = jedit.Ledger.create(tmp_path / "ledger", params)
    edit = jedit.edits.Edit({NORM: jnp.full_like(params["final_norm"]["w"], 0.1)})
    ledger.record(edit, request=[as_request(row) for row in ROWS[:2]], method="by hand")
    settings = Settings(method="graddiff", steps=1, attack=False, max_len=56, batch_size=4)
    settings = settings._replace(ledger=tmp_path / "ledger")

    def asked(out, say):
        return forget_in_checkpoint(folder, folder, ROWS[2:4], kept, out, settings, say=say)

    kept = [*ROWS[:2], *ROWS[4:10]]
    late, out = tmp_path / "late", tmp_path / "out"
    with pytest.raises(ValueError, match="changed meanwhile; the edit is not recorded"):
        asked(late, Meanwhile(lambda: ledger.record(edit, request=[], method="by hand")))
    assert len(ledger.entries) == 2
    names = ["edit", "edited", "index.html", "results.json"]
    assert sorted(path.name for path in late.iterdir()) == names
    found = asked(out, lambda _: None)
    assert found["ledger"] == {"edits_before": 2, "rows_left_out": 2}
    assert found["ledger_entry"] == 3
    assert found["num_rows"] == {"forget": 2, "retain": 4, "heldout": 2}
    assert "what earlier edits of the ledger forgot" in (out / "index.html").read_text()
    # What is reverted may be taught again; what is left to keep has to be enough.
    ledger.revert(1)
    requests = [as_request(row) for row in ROWS[:5]]
    assert ledger.asked(requests) == [False, False, True, True, False]
    kept = ROWS[2:6]
    with pytest.raises(ValueError, match="2 rows to keep; at least 3"):
        asked(out, lambda _: None)


def test_a_folder_in_bfloat16_is_attacked(folder, tmp_path):  # noqa: F811
    params = load_model(folder, dtype=jnp.bfloat16)[1]
    half = save_model(params, tmp_path / "half", source=folder)
    settings = Settings(steps=2, recovery=0, max_len=56, batch_size=4)
    out = tmp_path / "out"
    found = forget_in_checkpoint(
        half, folder, ROWS[:2], ROWS[4:10], out, settings, say=lambda _: None
    )
    assert load_model(out / "edited")[1]["final_norm"]["w"].dtype == jnp.bfloat16
    assert found["after"]["forget_nll"] > found["before"]["forget_nll"]
    mean, low, high = found["comeback"]["after"]
    assert 0 < low <= mean <= high < 1
