"""The vision protocol: models of a seed, what is measured of them, what is chosen, and resuming."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_array_equal

from jedit.data import Images
from jedit.metrics import accuracy, average_gap, membership_attack, membership_scores
from jedit.recipes.progress import ignore
from jedit.recipes.sweep import RETRAINED, UNTOUCHED, Measured
from jedit.recipes.vision import run as vision_run
from jedit.recipes.vision.presets import PRESETS
from jedit.recipes.vision.protocol import compared, evaluate, judged_sets, nearest, scores_of
from jedit.recipes.vision.run import Model, Protocol, Runs, vision
from jedit.recipes.vision.training import Recipe, augment, kept_params, train_classifier

PROTOCOL = Protocol(
    Model(8, (1,), 2),
    Recipe(20, 16, 0.1, augmented=False),
    epochs=2.0,
    batch_size=16,
    fitted_rows=20,
    probe_rows=20,
    judged_rows=60,
    chunk=64,
)
METHODS = ("fine-tune", "gradient ascent", "random label", "ROSU", "engram")


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """What optax mixes, its counter and its rates, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def textures(count, seed):
    """Images of 8 x 8 in ten classes, each a pattern of 4 x 4 pixels repeated, with noise."""
    patterns = np.random.default_rng(100).integers(0, 2, (10, 4, 4))
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    images = 0.7 * np.tile(patterns[labels], (1, 2, 2)) + rng.uniform(0, 0.3, (count, 8, 8))
    return Images(images[..., None].astype(np.float32), labels.astype(np.int32))


@pytest.fixture(scope="module")
def images():
    return textures(120, 0), textures(60, 1)


@pytest.fixture(scope="module")
def done(images, tmp_path_factory):
    """One run of both tasks at published points, and what was said of it."""
    out = tmp_path_factory.mktemp("vision") / "out"
    said = []
    runs = Runs(METHODS, "published", (0, 1), ("class",))
    (outcome,) = vision(images, PROTOCOL, runs, out, say=said.append)
    return out, outcome.tables, said


def network(params, inputs):
    return inputs.reshape(len(inputs), -1) @ params["w"] + params["b"][None]


def linear(seed=0):
    rng = np.random.default_rng(seed)
    return {"w": jnp.asarray(rng.normal(size=(64, 10)), jnp.float32), "b": jnp.zeros(10)}


def test_scores_are_those_of_the_metrics(images):
    """Of a linear model, set by set, with each attack's own call of the library's metric."""
    rows, test = images
    params = linear()
    label = 3
    parts = (np.flatnonzero(rows.labels == label), np.flatnonzero(rows.labels != label)[::-1])
    sets = judged_sets(rows, parts, test, retained=50, chunk=32)
    found = {k: v.value for k, v in evaluate(network, params, sets).numbers.items()}
    kept = test.take(np.flatnonzero(test.labels != label)).as_batch()
    forget, retain = (rows.take(p).as_batch() for p in (parts[0], parts[1][:50]))
    hits = [float(accuracy(network, params, batch)) for batch in (forget, retain, kept)]
    assert found["unlearning_accuracy"] == pytest.approx(100 * (1 - hits[0]))
    assert found["retain_accuracy"] == pytest.approx(100 * hits[1])
    assert found["test_accuracy"] == pytest.approx(100 * hits[2])
    for kind, name, sign in (
        ("confidence", "membership_efficacy", 1),
        ("entropy", "mia_entropy", -1),
        ("modified_entropy", "mia_modified_entropy", -1),
        ("correctness", "mia_correctness", 1),
    ):
        seen = [
            sign * membership_scores(network, params, batch, kind=kind)
            for batch in (retain, kept, forget)
        ]
        attack = membership_attack(*seen)
        assert found[name] == pytest.approx(100 * attack.efficacy, abs=1e-3), kind
        right = found[f"right_{kind}"]
        assert right == pytest.approx(100 * attack.balanced_accuracy, abs=1e-3), kind
        assert right != found[name]


@pytest.mark.parametrize("forgotten", [None, 0])
def test_a_model_that_has_run_away_is_judged(images, forgotten):
    rows, test = images
    parts = (np.arange(10), np.arange(10, 120))
    if forgotten is not None:  # the class that the largest of no numbers would be
        parts = tuple(np.flatnonzero(x) for x in (rows.labels == 0, rows.labels != 0))
    sets = judged_sets(rows, parts, test, retained=50, chunk=32)
    broken = jax.tree.map(lambda p: p * jnp.nan, linear())
    found = evaluate(network, broken, sets).numbers
    assert all(np.isfinite(x.value) for x in found.values())
    assert found["unlearning_accuracy"].value == 100
    assert found["retain_accuracy"].value == 0


def test_everything_is_there_and_compared(done):
    out, tables, said = done
    title, (heading, *lines) = tables[0]
    assert title.startswith("Percent")
    assert [line[0] for line in lines] == [RETRAINED, UNTOUCHED, *METHODS]
    assert {"UA", "RA", "TA", "MIA", "gap", "Tug-of-War", "RTE s"} <= set(heading)
    assert "edit s" not in heading  # which contains compiling, and RTE does not
    assert {"confidence", "confidence: right", "entropy: right"} <= set(tables[1][1][0])
    note = (out / "class" / "table.md").read_text()
    assert "group norms (of one channel each in its first stage)" in note
    assert {p.name for p in (out / "models").iterdir()} == {
        f"{name}-seed{seed}.npz" for name in ("original", "without-class") for seed in (0, 1)
    }
    assert len(list((out / "class" / "runs").iterdir())) == 2 * (2 + len(METHODS))
    gap = dict(zip(heading, lines[0], strict=True))["gap"]
    assert gap == "0"
    assert any("training on 108 images, seed 1: without-class" in text for text in said)


def test_the_original_knows_the_class_and_the_retrained_does_not(images, done):
    out, _, _ = done
    data = vision_run.Data(images, PROTOCOL, out / "models", ignore)
    pair = data.pair("class", 1)
    assert set(np.asarray(pair.task.forget.targets).tolist()) == {1}
    assert 1 not in np.asarray(pair.task.retain.targets)
    find = lambda params: float(accuracy(pair.task.apply, params, pair.task.forget))  # noqa: E731
    assert find(pair.task.original) > 0.5
    assert find(pair.task.retrained) == 0
    assert float(accuracy(pair.task.apply, pair.task.retrained, pair.task.retain)) > 0.5


def test_a_second_run_makes_nothing_and_a_third_makes_what_is_missing(images, done):
    out, tables, _ = done
    said = []
    runs = Runs(METHODS, "published", (0, 1), ("class",))
    (outcome,) = vision(images, PROTOCOL, runs, out, say=said.append)
    assert outcome.tables == tables
    assert not any("run 1 of" in text for text in said)
    file = next((out / "class" / "runs").glob("rosu-*-seed1.json"))
    file.unlink()
    said.clear()
    (outcome,) = vision(images, PROTOCOL, runs, out, say=said.append)
    assert sum("run 1 of 1" in text for text in said) == 1
    assert not any("training on" in text for text in said)
    both = (outcome.tables, tables)
    mine, before = (dict(zip(t[0][1][0], t[0][1][6], strict=True)) for t in both)
    assert (mine["model"], mine["UA"], mine["MIA"]) == ("ROSU", before["UA"], before["MIA"])


def test_other_settings_and_other_models_are_refused(images, done):
    out, _, _ = done
    runs = Runs(("fine-tune",), "published", (0,), ("class",))
    with pytest.raises(ValueError, match="made with another judged_rows"):
        vision(images, PROTOCOL._replace(judged_rows=30), runs, out, say=ignore)
    slower = PROTOCOL._replace(recipe=PROTOCOL.recipe._replace(epochs=11))
    data = vision_run.Data(images, slower, out / "models", ignore)
    with pytest.raises(ValueError, match=r"original-seed0.npz: was trained otherwise"):
        data.pair("class", 0)
    with pytest.raises(ValueError, match="needs refusals"):
        vision_run.check_runs(Runs(("IdkDPO",), "grid", (0,)), out)
    with pytest.raises(ValueError, match="the one that points are chosen on"):
        vision_run.check_runs(Runs(METHODS, "grid", (vision_run.TUNING_SEED,)), out)
    (out / "other").mkdir()
    with pytest.raises(ValueError, match="no such run has written .other."):
        vision_run.check_runs(Runs(METHODS, "grid", (0,)), out)
    (out / "other").rmdir()


def test_a_grid_is_chosen_on_a_seed_of_its_own(images, tmp_path, monkeypatch):
    """The point nearest to retrained there is what the other seed runs, and no other."""
    tried = []
    real = vision_run.Editor.__call__

    def spy(self, row, point, seed, make=None):
        tried.append((seed, point["scale"]))
        return real(self, row, point, seed, make)

    monkeypatch.setattr(vision_run.Editor, "__call__", spy)
    runs = Runs(("engram",), "grid", (3,), ("class",))
    vision(images, PROTOCOL, runs, tmp_path / "out", say=ignore)
    tuning = [scale for seed, scale in tried if seed == vision_run.TUNING_SEED]
    assert tuning == [0.3, 0.6, 1.0, 1.5, 2.2, 3.0]
    (reported,) = [scale for seed, scale in tried if seed == 3]
    # The gaps on the tuning seed, by hand, from what stands on the disk.
    found = [json.loads(f.read_text()) for f in (tmp_path / "out" / "class" / "runs").iterdir()]
    found = [r for r in found if r["seed"] == vision_run.TUNING_SEED]
    names = ("unlearning_accuracy", "retain_accuracy", "test_accuracy", "membership_efficacy")
    scores = {
        r["point"].get("scale", r["method"]): [r["numbers"][n]["value"] for n in names]
        for r in found
    }
    gaps = {
        scale: np.mean(np.abs(np.subtract(scores[scale], scores[RETRAINED]))) for scale in tuning
    }
    assert len({round(gap, 6) for gap in gaps.values()}) > 1
    assert gaps[reported] == min(gaps.values())
    assert list(gaps).index(reported) > 1  # not one of those that come first


def record(method, seed, point, values):
    names = ("unlearning_accuracy", "retain_accuracy", "test_accuracy", "membership_efficacy")
    measured = [Measured(value)._asdict() for value in values]
    numbers = dict(zip(names, measured, strict=True))
    return {"method": method, "seed": seed, "point": point, "numbers": numbers}


def test_gaps_are_to_the_retrained_model_of_the_same_seed():
    records = [
        record(RETRAINED, 0, {}, (10.0, 99.0, 90.0, 20.0)),
        record(RETRAINED, 1, {}, (30.0, 99.0, 90.0, 20.0)),
        record("a", 0, {"x": 1}, (12.0, 98.0, 90.0, 21.0)),
        record("a", 1, {"x": 1}, (12.0, 98.0, 90.0, 21.0)),
        record("a", 0, {"x": 2}, (10.0, 98.0, 90.0, 20.0)),
    ]
    found = compared(records)
    gaps = [r["numbers"]["average_gap"]["value"] for r in found]
    assert gaps == pytest.approx([0, 0, (2 + 1 + 0 + 1) / 4, (18 + 1 + 0 + 1) / 4, 0.25])
    assert gaps[2] == pytest.approx(average_gap(scores_of(found[2]), scores_of(found[0])))
    assert found[2]["numbers"]["tug_of_war"]["value"] == pytest.approx(0.98 * 0.99 * 1)
    assert nearest([r for r in found if r["seed"] == 0])["a"] == {"x": 2}
    with pytest.raises(ValueError, match="no retrained model of seed 1"):
        compared(records[:1] + records[3:4])


def test_training_is_sgd_with_momentum_decay_and_a_falling_rate():
    """Against a loop of NumPy on all rows at once, so that their order is no matter."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 2, 2, 1)), rng.integers(0, 3, 8).astype(np.int32)
    rows = Images(x.astype(np.float32), y).as_batch()
    params = {"w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), "b": jnp.ones(3)}
    recipe = Recipe(4, 256, 0.3, augmented=False)
    key = jax.random.key(0)
    found = train_classifier(network, params, rows, recipe, key=key, say=ignore)
    theta = {name: np.asarray(p, np.float64) for name, p in params.items()}
    velocity = {name: np.zeros_like(p) for name, p in theta.items()}
    flat = x.reshape(8, 4)
    for rate in (0.3, 0.3, 0.03, 0.003):  # a tenth at half, a hundredth at three quarters
        logits = flat @ theta["w"] + theta["b"]
        p = np.exp(logits - logits.max(1, keepdims=True))
        g = (p / p.sum(1, keepdims=True) - np.eye(3)[y]) / 8
        gradient = {"w": flat.T @ g, "b": g.sum(0)}
        for name in theta:
            velocity[name] = 0.9 * velocity[name] + gradient[name] + 5e-4 * theta[name]
            theta[name] = theta[name] - rate * velocity[name]
    for name, value in theta.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=2e-5)


def test_crops_move_images_and_mirror_half_of_them():
    """Of one bright pixel and its right neighbour, in another channel: where they went."""
    image = np.zeros((7, 9, 2), np.float32)
    image[3, 2, 0] = image[3, 3, 1] = 1
    found = np.asarray(augment(jnp.asarray(np.stack([image] * 400)), key=jax.random.key(0)))
    assert set(np.unique(found)) == {0, 1}
    both = found[(found.sum((1, 2)) == 1).all(-1)]
    assert 250 < len(both) < 400  # others have lost a pixel over an edge
    places = np.array([[np.argwhere(x[..., c])[0] for c in (0, 1)] for x in both])
    assert_array_equal(places[:, 0, 0], places[:, 1, 0])
    assert set(places[:, 0, 0]) == set(range(7))  # 3, by up to 4 either way, in the image
    steps = places[:, 1, 1] - places[:, 0, 1]
    assert set(steps) == {-1, 1}
    assert 0.4 < np.mean(steps < 0) < 0.6
    columns = np.where(steps < 0, 8 - places[:, 0, 1], places[:, 0, 1])
    assert set(columns) == set(range(7))  # 2, by up to 4 either way


def test_kept_params_come_back_to_the_bit_and_a_bad_file_is_refused(tmp_path):
    params = {"a": {"b": jnp.asarray([1.5, -0.1], jnp.float32)}, "c": jnp.asarray([[3]], jnp.int32)}
    file, about = tmp_path / "models" / "m.npz", {"seed": 1, "sizes": (1, 2)}
    made = []

    def make():
        made.append(1)
        return params

    first, seconds = kept_params(file, params, about, make)
    again, kept_seconds = kept_params(file, params, about, make)
    assert len(made) == 1
    assert kept_seconds == seconds
    assert jax.tree.structure(again) == jax.tree.structure(first)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype
        assert_array_equal(a, b)
    assert [p.name for p in file.parent.iterdir()] == ["m.npz"]
    with pytest.raises(ValueError, match="was trained otherwise"):
        kept_params(file, params, about | {"seed": 2}, make)
    with pytest.raises(ValueError, match="no parameters of this model"):
        kept_params(file, {"a": params["a"]}, about, make)
    whole = file.read_bytes()
    for bad in (b"", whole[:-30], b"\x80\x02cos\nsystem\n."):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match="no model that a run has written"):
            kept_params(file, params, about, make)
    assert len(made) == 1


def test_published_points_are_those_of_the_papers():
    from jedit.methods.catalogue import CATALOGUE
    from jedit.recipes.vision.points import METHODS as ALL
    from jedit.recipes.vision.points import PUBLISHED, SGD, points_of, with_steps

    assert PUBLISHED["SalUn"] == {"learning_rate": 0.1, "epochs": 10}
    assert PUBLISHED["gradient ascent"] == {"learning_rate": 1e-4, "forget_epochs": 5}
    for name in ("fine-tune", "l1-sparse"):
        assert PUBLISHED[name] == {"learning_rate": 0.01, "epochs": 10}
    for name in ("UAM", "ROSU"):
        assert PUBLISHED[name] == {"learning_rate": 0.01, "epochs": 5}
    assert Recipe() == Recipe(182, 256, 0.1, augmented=True)
    assert Model() == Model(64, (2, 2, 2, 2), 1)
    whole = Protocol(Model(), Recipe(), 5.0, 128, 0.1, 2000, 500, 5000, 500)
    assert Protocol() == whole == PRESETS["cifar10"]
    row, ascent = CATALOGUE["ROSU"], CATALOGUE["gradient ascent"]
    (point,) = points_of(row, "published", epochs=1.0, batch_size=128)
    assert point == {"learning_rate": 0.01, "radius": 0.1, "batch_size": 128, "epochs": 5}
    assert with_steps(point, 100, 1000)["steps"] == -(-5000 // 128)
    (point,) = points_of(ascent, "published", epochs=1.0, batch_size=128)
    assert with_steps(point, 100, 1000)["steps"] == 5  # batches of 100, all of them
    for name in ALL:
        grid = points_of(CATALOGUE[name], "grid", epochs=1.0, batch_size=128)
        assert 4 <= len(grid) <= 6, name
        assert len({tuple(sorted(p.items())) for p in grid}) == len(grid), name
        assert len(points_of(CATALOGUE[name], "published", epochs=1.0, batch_size=128)) == 1
    with pytest.raises(ValueError, match="RULE has no points for images"):
        points_of(CATALOGUE["RULE"], "grid", epochs=1.0, batch_size=128)
    params = {"w": jnp.ones(2)}
    updates, state = SGD.update({"w": jnp.zeros(2)}, SGD.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.01 * 5e-4, rtol=1e-6)
    assert float(optax.tree_utils.tree_get(state, "learning_rate")) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"rows": range(0, 120, 10)}, "the 12 images are all of class 0: without it none is left"),
        ({"labels": 12}, "labels must be from 0 to 9"),
        ({"fraction": 1.0}, "leaves a set without any"),
        ({"seeds": (0, 0)}, "seeds must differ"),
        ({"size": 6}, "images to train on have the shape .8, 8, 1. and those to test on .6, 6, 1."),
    ],
)
def test_what_cannot_be_forgotten_is_refused_before_any_work(images, tmp_path, changed, sentence):
    rows, test = images
    if "rows" in changed:
        rows = rows.take(np.array(list(changed["rows"])))
    if "labels" in changed:
        rows = rows._replace(labels=rows.labels + np.int32(changed["labels"]))
    if "size" in changed:
        side = changed["size"]
        test = test._replace(images=test.images[:, :side, :side])
    protocol = PROTOCOL._replace(fraction=changed.get("fraction", 0.1))
    runs = Runs(METHODS, "published", changed.get("seeds", (0,)))
    with pytest.raises(ValueError, match=sentence):
        vision((rows, test), protocol, runs, tmp_path / "out", say=ignore)
    assert not (tmp_path / "out").exists()
