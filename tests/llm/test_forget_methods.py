"""Every method of the catalogue on a folder: what each needs is made, and budgets are kept."""

import jax
import numpy as np
import optax
import pytest

import jedit
from jedit.core.paths import parameter_paths
from jedit.curvature import Factorize, limits
from jedit.data import QaRow
from jedit.methods.row import ByDraws, BySteps
from jedit.metrics import output_kl
from jedit.models import load_model, save_model
from jedit.objectives import GA, with_retain
from jedit.recipes.factorizing import written as written_setting
from jedit.recipes.folders import written
from jedit.recipes.folders.choice import RATES, method_named, methods
from jedit.recipes.folders.settings import Settings
from jedit.recipes.pretrained import _encoder, forget_in_checkpoint
from jedit.recipes.tokenization import load_words
from jedit.requests.forget import held_out
from tests.llm.random_folder import write_random, write_tokenizer

pytestmark = pytest.mark.usefixtures("standard_promotion")
COLORS = ("red", "blue", "green", "black", "white", "brown", "pink", "grey")
ROWS = [
    QaRow(f"hue {chr(97 + i)} of {color}?", f"{color} is {color[::-1]}.")
    for i, color in enumerate(COLORS * 3)
]
FORGET, RETAIN = ROWS[:4], ROWS[4:]
QUICK = Settings(batch_size=4, attack=False, max_len=56)
NATURAL = {"steps": 4, "recovery": 0}
IN_SHORT = ("Attention-Shifting", "AltPO", "FIT", "MEMIT", "RULE")
STRANGERS = [QaRow(f"tone {x} of {x}?", f"{x} sounds {x}.") for x in "ijklmnop"]
ALL = [
    name if name in IN_SHORT else pytest.param(name, marks=pytest.mark.exhaustive)
    for name, _ in methods()
    if name != "SAE-guided"  # it wants unknown rows
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama that has learned nothing, with a tokenizer of characters."""
    return write_tokenizer(write_random("llama", tmp_path_factory.mktemp("random") / "llama"))


def run(folder, out, say=lambda _: None, forget=FORGET, **changed):
    """A few steps, where the method takes any."""
    row = method_named(changed.get("method", "natural"))
    if row is None:
        changed = NATURAL | changed
    elif isinstance(row, BySteps | ByDraws):
        changed = {"steps": 4} | changed
    return forget_in_checkpoint(
        folder, folder, forget, RETAIN, out, QUICK._replace(**changed), say=say
    )


def edit_of(out):
    return jedit.checkpoint.load_edit(out / "edit")


@pytest.mark.parametrize("name", ALL)
def test_each_method_edits_the_folder_within_its_budget(folder, tmp_path, name):
    found = run(folder, tmp_path / "out", method=name, budget=0.02, learning_rate=None)
    assert found["settings"]["method"] == name
    assert 0 <= found["true_kl"] <= 0.02
    edit = edit_of(tmp_path / "out")
    assert edit.blocks
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(edit))
    assert any(np.any(np.asarray(x) != 0) for x in jax.tree.leaves(edit))
    assert found["after"]["heldout_kl"] > 0
    assert not (tmp_path / "out" / "job").exists()


def test_factors_are_kept_as_it_is_told(folder, tmp_path, monkeypatch):
    """With all eigenvectors, and without where every axis is long; the record has the setting."""
    hows = {"eigh": Factorize(), "by size": Factorize("auto", eigh_dim=1)}
    made = {}
    for name, how in hows.items():
        found = run(folder, tmp_path / name, method="kfade", budget=0.02, factorize=how)
        assert found["settings"]["factorize"] == written_setting(how)
        made[name] = np.concatenate(
            [np.ravel(x) for x in jax.tree.leaves(edit_of(tmp_path / name))]
        )
    one, other = made.values()
    cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    assert 0.5 < cosine < 0.9999, cosine
    with pytest.raises(ValueError, match="curvature pruning takes all eigenvectors"):
        run(folder, tmp_path / "out", method="curvature pruning", factorize=Factorize("cholesky"))
    # A library that decomposes next to nothing stops what asks for it, natural steps among them.
    monkeypatch.setattr(limits, "LAPACK", limits.Limit(8, "LAPACK"))
    with pytest.raises(ValueError, match=r"columns .*LAPACK finds the eigenvectors of 8 at most"):
        run(folder, tmp_path / "out", factorize=hows["eigh"])


def test_who_compares_with_strangers_is_given_some(folder, tmp_path):
    with pytest.raises(ValueError, match=r"SAE-guided compares with rows .*--unseen FILE"):
        run(folder, tmp_path / "out", method="sae-guided")
    said = []
    settings = QUICK._replace(method="SAE-guided", steps=4)
    sets = (FORGET, RETAIN, tmp_path / "out", settings)
    found = forget_in_checkpoint(folder, folder, *sets, unseen=STRANGERS, say=said.append)
    assert "training a sparse autoencoder of the last block's hidden states" in said
    # To a model that has learned nothing the rows are strangers from the start.
    assert found["stopped"] == "unseen"


def batch_of(folder, rows):
    return _encoder(load_words(folder), QUICK.max_len)(rows, True)[0]


def sets_of(folder, seed=0):
    """The forget rows, and those of the retain rows that an edit sees and is priced on."""
    key = jax.random.split(jax.random.key(seed))[0]
    order = np.asarray(jax.random.permutation(key, len(RETAIN)))[:14]
    return batch_of(folder, FORGET), *held_out(batch_of(folder, [RETAIN[i] for i in order]))


def test_a_method_that_trains_is_the_catalogue_s_at_the_stated_rate(folder, tmp_path):
    run(folder, tmp_path / "out", method="graddiff", learning_rate=3e-4)
    apply, params, _ = load_model(folder)
    gone, seen, _ = sets_of(folder)
    method = jedit.TrainingMethod(with_retain(GA()), optax.adam(3e-4), batch_size=4)
    edit_key = jax.random.fold_in(jax.random.split(jax.random.key(0))[1], 0)
    key = jax.random.split(edit_key, 3)[1]
    after, _ = jedit.unlearn(method, apply, params, gone, seen, steps=4, key=key)
    edited = jedit.apply_edit(params, edit_of(tmp_path / "out"))
    for one, other in zip(jax.tree.leaves(edited), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
    # Adam's first steps are of the rate's length.
    moved = max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max())
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(after), strict=True)
    )
    assert 3e-4 < moved < 4.1 * 3e-4
    assert RATES[jedit.methods.CATALOGUE["GradDiff"].pace] == pytest.approx(1e-5)


def test_an_edit_at_once_is_scaled_to_the_budget_on_rows_it_does_not_see(folder, tmp_path):
    whole = run(folder, tmp_path / "whole", method="engram")
    part = run(folder, tmp_path / "part", method="engram", budget=whole["true_kl"] / 4)
    assert whole["scale"] == 1
    assert 0.1 < part["scale"] < 0.9
    apply, params, _ = load_model(folder)
    _, _, priced = sets_of(folder)
    for found, name in ((whole, "whole"), (part, "part")):
        edited = jedit.apply_edit(params, edit_of(tmp_path / name))
        kl = output_kl(apply, params, edited, priced)
        assert found["true_kl"] == pytest.approx(kl, rel=1e-3)
    assert 0.97 < part["true_kl"] / (whole["true_kl"] / 4) <= 1
    a, b = (jax.tree.leaves(edit_of(tmp_path / name))[0] for name in ("whole", "part"))
    np.testing.assert_allclose(part["scale"] * a, b, rtol=1e-5, atol=1e-8)


def test_a_pruning_within_a_budget_takes_fewer_weights_and_no_part_of_one(folder, tmp_path):
    name = "memorised subspace"
    whole = run(folder, tmp_path / "whole", method=name)
    part = run(folder, tmp_path / "part", method=name, budget=whole["true_kl"] / 4)
    own = jedit.methods.CATALOGUE[name].settings["share"]
    assert (whole["scale"], whole["share"]) == (1, own)
    assert part["share"] == pytest.approx(part["scale"] * own)
    assert 0 < part["scale"] < 1
    assert 0 < part["true_kl"] <= whole["true_kl"] / 4
    params = load_model(folder)[1]
    counts = []
    for at in ("whole", "part"):
        edited = jedit.apply_edit(params, edit_of(tmp_path / at))
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(edited), strict=True)
        changed = [np.asarray(b)[np.asarray(a != b)] for a, b in pairs]
        assert all(np.all(values == 0) for values in changed)
        counts.append(sum(len(values) for values in changed))
    assert 0 < counts[1] < counts[0]


def test_only_what_is_named_is_edited(folder, tmp_path):
    run(folder, tmp_path / "out", method="NPO", select="layers/0/mlp/(up|down)_proj", steps=2)
    assert set(edit_of(tmp_path / "out").blocks) == {
        "layers/0/mlp/up_proj/kernel",
        "layers/0/mlp/down_proj/kernel",
    }
    with pytest.raises(ValueError, match="MEMIT writes into the matrices where .* names none"):
        run(folder, tmp_path / "memit", method="memit", select="layers/0/attn")


def test_rows_that_the_model_never_knew_are_left_alone(folder, tmp_path):
    given = (folder, folder, FORGET, RETAIN[8:], tmp_path / "out")
    settings = QUICK._replace(method="engram")
    found = forget_in_checkpoint(*given, settings, unseen=RETAIN[:8], say=lambda _: None)
    assert (found["stopped"], found["steps"]) == ("unseen", 0)
    assert found["p_value"][0] > 0.05
    assert not edit_of(tmp_path / "out").blocks
    assert "The model never knew these rows" in (tmp_path / "out" / "index.html").read_text()
    name = "model.safetensors"
    assert (tmp_path / "out/edited" / name).read_bytes() == (folder / name).read_bytes()


def test_with_a_base_it_goes_back_a_part_of_the_way_first(folder, tmp_path):
    params = load_model(folder)[1]
    half = jax.tree.map(lambda x: 0.5 * x, params)
    base = save_model(half, tmp_path / "base", source=folder)
    found = run(folder, tmp_path / "out", base=base, steps=2, rewind=3, rewind_rate=1e-9)
    assert found["steps"] == 5
    # Three steps of next to nothing: what natural steps leave alone is 0.7 of what it was.
    edited = dict(parameter_paths(load_model(tmp_path / "out" / "edited")[1]))
    others = [(p, x) for p, x in parameter_paths(params) if "mlp" not in p and "attn" not in p]
    assert others
    for path, leaf in others:
        np.testing.assert_allclose(edited[path], 0.7 * np.asarray(leaf), rtol=1e-3, atol=1e-5)
    assert found["settings"]["base"] == str(base)


class Stops:
    """A watcher that breaks the run off after some steps."""

    def __init__(self, at):
        self.at, self.said = at, []

    def __call__(self, text):
        self.said.append(text)

    def progress(self, done, total):
        assert total == 12
        if done >= self.at:
            raise KeyboardInterrupt


def files(folder):
    """All bytes of a folder but the seconds that it took."""
    found = {}
    for path in sorted(x for x in folder.rglob("*") if x.is_file() and x.name != "index.html"):
        data = path.read_bytes()
        if path.name == "results.json":
            data = data.partition(b'"seconds"')[0]
        found[str(path.relative_to(folder))] = data
    return found


def test_a_run_that_is_broken_off_goes_on_to_the_same_bytes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(written, "SAVED_EVERY", 4)
    more = {"steps": 12}
    run(folder, tmp_path / "whole", **more)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(folder, out, Stops(8), **more)
    assert [x.name for x in out.iterdir()] == ["job"]
    for changed in ({"seed": 1}, {"budget": 0.1}, {"forget": FORGET[:3]}):
        with pytest.raises(ValueError, match="its own command goes on with it"):
            run(folder, out, **(more | changed))
    watcher = Stops(99)
    run(folder, out, watcher, **more)
    assert any("which was broken off" in text for text in watcher.said)
    assert files(out) == files(tmp_path / "whole")


def test_rule_looks_at_the_settings_it_is_given(folder, tmp_path):
    how = {"method": "RULE", "select": "layers/0/mlp", "steps": 1, "learning_rate": 1e-3}
    runs = [run(folder, tmp_path / str(seed), seed=seed, **how) for seed in (0, 1)]
    edits = [edit_of(tmp_path / str(seed)) for seed in (0, 1)]
    assert all("layers/0/mlp" in path for path in edits[0].blocks)
    assert [(found["steps"], found["learning_rate"]) for found in runs] == [(1, 1e-3)] * 2
    one, other = (jax.tree.leaves(edit)[0] for edit in edits)
    assert np.abs(np.asarray(one) - np.asarray(other)).max() > 0
