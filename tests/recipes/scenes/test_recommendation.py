"""The recommendation scene: its rows, its rankings against a count, and a whole run on a toy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.cli.main import main
from jedit.data import DataError, Interactions, generate_interactions
from jedit.methods import CATALOGUE, Need
from jedit.recipes.scenes import digits
from jedit.recipes.scenes import recommendation as scene
from jedit.recipes.scenes.ranking import ranking

LOG = generate_interactions(1, num_users=30, num_items=16, length=8)
TOY = scene.GRID._replace(
    methods=("U-CAN", "CURE"),
    rates=dict.fromkeys(scene.Pace, (3e-3,)),
    scales={scene.Reach.WHOLE: (0.3,)},
    looks=(4,),
    kl_budget=10.0,
)


@pytest.fixture(autouse=True, scope="module")
def _standard_promotion():
    """What optax's Adam mixes, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def asked(rows):
    """By row, the (history, next item) pairs that count."""
    found = []
    for items, targets, mask in zip(rows.inputs, rows.targets, rows.mask, strict=True):
        places = np.flatnonzero(np.asarray(mask))
        found.append([(tuple(np.asarray(items[: p + 1])), int(targets[p])) for p in places])
    return found


def users_of(rows):
    """Which users' histories the rows begin with."""
    starts = {tuple(items[:3] + 1): i for i, items in enumerate(LOG.sequences)}
    return [starts[tuple(np.asarray(items[:3]))] for items in rows.inputs]


@pytest.mark.parametrize("max_len", [50, 5])
def test_forgotten_users_are_in_no_retained_row_and_last_items_are_not_learnt(max_len):
    sets = scene.split(LOG, "users", seed=2, max_len=max_len)
    sizes = [len(rows.inputs) for rows in sets]
    assert sizes == [30, 27, 3, 19, 8, 3, 8]
    length = min(8, max_len + 2)
    assert {len(pairs) for pairs in asked(sets.data)} == {length - 2}
    assert {len(pairs) for pairs in asked(sets.forget_next)} == {1}
    rows = {name: {tuple(p) for p in asked(part)} for name, part in sets._asdict().items()}
    assert rows["data"] == rows["kept"] | rows["forget"]
    assert rows["kept"] == rows["seen"] | rows["heldout"]
    assert not rows["kept"] & rows["forget"]
    last = {tuple(items[-3:] + 1) for items in LOG.sequences}
    nexts = [(*h[-2:], item) for ((h, item),) in rows["forget_next"] | rows["retain_next"]]
    assert len(nexts) == len(sets.forget_next.inputs) + len(sets.retain_next.inputs)
    assert set(nexts) < last
    # Of the users to keep, only those that no edit sees are asked.
    ends = {h[-2:] for ((h, _),) in rows["retain_next"]}
    assert ends == {(pairs[-1][0][-1], pairs[-1][1]) for pairs in rows["heldout"]}
    for part, nexts in (("forget", "forget_next"), ("data", "retain_next")):
        learnt = {history for pairs in asked(getattr(sets, part)) for history, _ in pairs}
        assert not learnt & {pairs[0][0] for pairs in asked(getattr(sets, nexts))}


@pytest.mark.parametrize("forgotten", ["users", "choices"])
@pytest.mark.parametrize("max_len", [50, 5])
def test_what_is_asked_stands_where_every_model_learns(forgotten, max_len):
    """Also where the longest histories are those of users who are forgotten."""
    gone = scene.split(LOG, "users", seed=2, max_len=50).forget
    longer = [
        np.append(items, np.setdiff1d(np.arange(16), items)[:3]) if i in users_of(gone) else items
        for i, items in enumerate(LOG.sequences)
    ]
    log = LOG._replace(sequences=tuple(longer))
    sets = scene.split(log, forgotten, seed=2, max_len=max_len)
    assert max(len(items) for items in log.sequences) == 11
    learnt = np.any(np.asarray(sets.kept.mask) * np.asarray(sets.kept.valid), axis=0)
    assert sets.data.inputs.shape[1] == min(6, max_len)
    for rows in (sets.forget, sets.forget_next, sets.retain_next):
        is_asked = np.any(np.asarray(rows.mask), axis=0)
        assert np.any(is_asked)
        assert np.all(learnt[is_asked])
    assert {len(pairs) for pairs in asked(sets.retain_next)} == {1}


def test_withdrawn_choices_leave_the_history_but_not_the_user():
    sets = scene.split(LOG, "choices", seed=2, max_len=50)
    gone = users_of(sets.forget)
    assert len(sets.kept.inputs) == 30
    assert {len(pairs) for pairs in asked(sets.forget)} == {3}, "half of six"
    rows = zip(*map(np.asarray, (sets.kept.inputs, sets.kept.valid)), strict=True)
    kept = {tuple(row[is_valid > 0]) for row, is_valid in rows}
    for user, pairs in zip(gone, asked(sets.forget), strict=True):
        withdrawn = {item for _, item in pairs}
        left = [i for i in LOG.sequences[user][:-1] + 1 if i not in withdrawn]
        assert tuple(left[:-1]) in kept
        assert len(left) == 4
    # Users who withdraw choices are users to keep: edits see some of them, others are judged.
    rows = {name: {tuple(p) for p in asked(part)} for name, part in sets._asdict().items()}
    assert rows["kept"] == rows["seen"] | rows["heldout"]
    assert [len(part.inputs) for part in (sets.seen, sets.heldout)] == [21, 9]
    assert len(sets.retain_next.inputs) == 8


def test_rankings_are_counted(key):
    """Against places counted item by item, on logits with no ties."""
    tables = np.random.default_rng(3).normal(size=(16, 16))
    apply = lambda params, items: params[items]  # noqa: E731
    sets = scene.split(LOG, "users", seed=0, max_len=50)
    rows = jax.tree.map(lambda x: x[:9], sets.data)
    params = jnp.asarray(np.pad(tables, ((1, 0), (1, 0)), constant_values=99.0))
    hits, gains = [], []
    for pairs in asked(rows):
        for history, item in pairs:
            scores = tables[history[-1] - 1]
            others = [i for i in range(1, 17) if i not in history]
            rank = sum(scores[i - 1] > scores[item - 1] for i in others)
            hits.append(rank < 10)
            gains.append(1 / np.log2(2 + rank) if rank < 10 else 0)
    assert 0 < np.mean(hits) < 1
    found = ranking(apply, params, rows, chunk=4)
    assert found == pytest.approx({"recall": np.mean(hits), "ndcg": np.mean(gains)})
    lost = ranking(apply, jnp.full_like(params, jnp.nan), rows)
    assert lost == {"recall": 0.0, "ndcg": 0.0}
    # Whoever scores all items alike recommends none: of 16, those left stand before the right one.
    flat = ranking(apply, jnp.zeros_like(params), rows)
    places = [16 - len(history) for pairs in asked(rows) for history, _ in pairs]
    assert flat["recall"] == pytest.approx(np.mean(np.array(places) <= 10))
    assert flat["recall"] < 0.3
    del key


def test_too_few_to_recommend_to_are_refused():
    few = Interactions(LOG.users[:19], LOG.items, LOG.sequences[:19])
    with pytest.raises(DataError, match="20 users .* got 19 users and 16 items"):
        scene.split(few, "users", seed=0, max_len=8)
    with pytest.raises(DataError, match="more than 10 items, got 30 users and 10 items"):
        scene.check_size(LOG._replace(items=LOG.items[:10]))
    with pytest.raises(DataError, match="50000 of them at most, got 50001 items"):
        scene.check_size(LOG._replace(items=("item",) * 50_001))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_on_a_users_file(folder, monkeypatch):
    """Forgotten are two users of a few dozen; what the report says of them is there."""
    lines = ["user,item,time"]
    for user, items in zip(LOG.users, LOG.sequences, strict=True):
        lines += [f"{user},{LOG.items[i]},{t}" for t, i in enumerate(items)]
    (folder / "log.csv").write_text("\n".join(lines))
    original = scene.recommendation

    def toy(*, interactions, grid, **given):
        assert interactions is not None
        assert [items.tolist() for items in interactions.sequences] != []
        assert grid is scene.GRID
        small = {
            "model": scene.MODEL._replace(width=16, layers=1, heads=2),
            "recipe": scene.RECIPE._replace(epochs=(30,), batch_size=8, learning_rate=1e-2),
        }
        return original(interactions=interactions, grid=TOY, **given, **small)

    monkeypatch.setattr(scene, "recommendation", toy)
    command = ["demo", "--scene", "recommendation", "--interactions", "log.csv", "--out", "o"]
    assert main(command) == 0
    (found,) = json.loads((folder / "o" / "results.json").read_text())["comparisons"]
    assert found["num_rows"] == {
        "training": 30,
        "forget": 3,
        "retain, seen by edits": 19,
        "retain, held out from edits": 8,
    }
    assert found["original"]["forget_nll"] < found["retrained"]["forget_nll"] - 0.5
    board = found["leaderboard"]
    assert set(board) == {"untouched", "retrained", *TOY.methods}
    assert board["untouched"]["forget_recall"] > board["retrained"]["forget_recall"]
    ranked = ("forget", "forget_next", "retain_next")
    measures = {f"{rows}_{metric}" for rows in ranked for metric in ("recall", "ndcg")}
    assert all(set(row) == measures for row in board.values())
    (point,) = next(c["points"] for c in found["curves"] if c["method"] == "CURE")
    assert point["forget_nll"] > found["original"]["forget_nll"]
    page = (folder / "o" / "index.html").read_text()
    assert "NDCG@10 of the choices to forget" in page


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--interactions", "log.csv"], "--interactions is only looked at with --scene recomm"),
        (["--scene", "digits", "--forgotten", "choices"], "--forgotten is only looked at with"),
        (["--scene", "recommendation", "--interactions", "no.csv"], "no.csv: there is no such"),
        (["--scene", "recommendation", "--interactions", "few.csv"], "got 1 users and 3 items"),
    ],
)
def test_mistakes_are_said_before_any_work(folder, capsys, arguments, sentence):
    (folder / "few.csv").write_text("user,item,time\na,b,1\na,c,2\na,d,3\n")
    assert main(["demo", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert sentence in line
    assert [item.name for item in folder.iterdir()] == ["few.csv"]


def test_all_methods_of_a_scene_that_has_no_answers_can_be_given_what_they_need():
    asks = {Need.REFUSALS, Need.ALTERNATES, Need.DIALOGUE, Need.LATENTS}
    for grid in (digits.ALL, scene.ALL):
        assert [name for name in grid.methods if CATALOGUE[name].needs & asks] == []
