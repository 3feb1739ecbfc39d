"""`jedit tofu --seeds --grid published --protocol`: a toy learns, a sweep goes on run by run."""

import json

import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from jedit.cli.main import main
from jedit.core.batch import Batch
from jedit.data import generate_authors
from jedit.methods.catalogue import CATALOGUE
from jedit.methods.row import Material, Pace, Reach
from jedit.objectives import CEU
from jedit.recipes.comparison.task import Grid
from jedit.recipes.fitting import Recipe
from jedit.recipes.sweep import Trial
from jedit.recipes.tofu import presets as tofu_presets
from jedit.recipes.tofu import run as tofu_recipe
from jedit.recipes.tofu.models import Pretrained, from_folders
from jedit.recipes.tofu.presets import Preset
from jedit.recipes.tofu.published import PUBLISHED, adamw, published_method, published_points
from jedit.recipes.tofu.run import Sets, prepare
from jedit.recipes.tofu.sweep import best_records, grid_points

pytestmark = pytest.mark.usefixtures("standard_promotion")
GRID = Grid(
    budgets=(0.05, 0.1),
    temperatures=(1.0,),
    damping=(0.1,),
    kfade_steps=(1,),
    methods=("NPO",),
    rates=dict.fromkeys(Pace, (1e-3, 2e-3)),
    scales=dict.fromkeys(Reach, (0.5, 1.0)),
    looks=(2, 4),
    batch_size=4,
    kl_budget=1.0,
    utility_share=0.8,
)
TOY = Preset(
    authors=5,
    forgotten=2,
    questions=4,
    model=Pretrained(max_len=256, chunk=8),
    recipe=Recipe(epochs=(70,), batch_size=4, learning_rate=1e-2),
    grid=GRID,
)
NUM_RUNS = 2 + 2


@pytest.fixture(scope="module")
def sets():
    rows = generate_authors(0, 6, 4)
    names = list(dict.fromkeys(row.fields["author"] for row in rows))
    of = [[row for row in rows if row.fields["author"] == name][:4] for name in names]
    # What stands for general knowledge is among what the toy learns, so that it has some.
    return Sets([*of[0][:2], *of[1][:2]], of[2], of[3], of[2], of[3], of[4])


@pytest.fixture
def patched(sets, monkeypatch):
    pytest.importorskip("tyro")
    monkeypatch.setattr(tofu_recipe, "read_sets", lambda *_: sets)
    monkeypatch.setitem(tofu_presets.PRESETS, "checkpoint", TOY)
    small = {"epochs": (5,), "learning_rate": (5e-3,), "alpha": (1.0,), "beta": (0.1,)}
    monkeypatch.setitem(PUBLISHED, "NPO", PUBLISHED["NPO"]._replace(grid=small))


def test_published_grids_have_the_published_numbers_of_runs():
    numbers = {name: len(published_points(name, 400)) for name in PUBLISHED}
    assert numbers == {
        **{"NPO": 54, "AltPO": 54, "SimNPO": 48, "GradDiff": 18, "UNDIAL": 27},
        **{"WGA": 3, "SatImp": 6, "CE-U": 1, "PDU": 1, "RMU": 1},
    }
    best = {"epochs": 10, "learning_rate": 5e-5, "alpha": 1.0, "beta": 0.1}
    assert {**best, "steps": 125, "batch_size": 32} in published_points("NPO", 400)
    # All of fewer rows than a batch are one: an epoch is one step.
    assert {**best, "steps": 10, "batch_size": 20} in published_points("NPO", 20)
    assert set(PUBLISHED) <= set(CATALOGUE)
    with pytest.raises(ValueError, match="K-FADE.*: has no published grid; there is one for NPO"):
        published_points("K-FADE (K-FAC)", 400)


def test_every_published_point_makes_its_objective():
    for name, found in PUBLISHED.items():
        for point in published_points(name, 400):
            made = None if found.objective is None else found.objective(point)
            if "alpha" in point:
                assert made.weight == point["alpha"]
            if "beta" in point:
                assert made.objective.beta == point["beta"]
    # As their code has them: CE-U without a retain loss, PDU's lambda at rest for five epochs.
    assert PUBLISHED["CE-U"].objective({}) == CEU()
    point = published_points("SatImp", 400)[0]
    assert PUBLISHED["SatImp"].objective(point).forget_weight == 0.1
    material = Material(lambda _, x: x, {"w": 1.0}, Batch(np.zeros(1)))
    method = published_method("PDU", material, published_points("PDU", 400)[0])
    state = method.optimizer.init({"w": np.float32(1.0)})
    assert optax.tree_utils.tree_get(state, "dual") == 100
    # An epoch is 12.5 steps; lambda falls, as the loss is lower than what is allowed.
    for step in range(63):
        zero = {"w": np.float32(0.0)}
        given = {"retain_loss": 0.0, "retain_grads": zero}
        assert optax.tree_utils.tree_get(state, "dual") == 100, step
        _, state = method.optimizer.update(zero, state, zero, **given)
    assert optax.tree_utils.tree_get(state, "dual") < 100


def test_the_fields_optimizer_step_by_step():
    """AdamW with decoupled decay, its rate rising linearly over an epoch, then falling to zero."""
    steps, warm_up, rate = 8, 2, 0.1
    optimizer = adamw(steps, warm_up)
    weights = np.array([0.5, -1.0, 2.0])
    state = optax.tree_utils.tree_set(optimizer.init(weights), learning_rate=np.float64(rate))
    ours, theirs, first, second = weights, weights.copy(), np.zeros(3), np.zeros(3)
    for i in range(steps):
        gradient = np.cos(np.arange(3.0) + i) * (3.0 if i % 2 else 0.3)
        updates, state = optimizer.update(gradient, state, ours)
        ours = optax.apply_updates(ours, updates)
        clipped = gradient / max(1.0, np.linalg.norm(gradient))
        first, second = 0.9 * first + 0.1 * clipped, 0.999 * second + 0.001 * clipped**2
        now = rate * (i / warm_up if i < warm_up else (steps - i) / (steps - warm_up))
        step = (first / (1 - 0.9 ** (i + 1))) / (np.sqrt(second / (1 - 0.999 ** (i + 1))) + 1e-8)
        theirs = theirs - now * (step + 0.01 * theirs)
    assert_allclose(ours, theirs, rtol=1e-5)


def test_points_of_a_presets_grid():
    kinds = {name: grid_points(CATALOGUE[name], GRID) for name in ("NPO", "MEMIT")}
    assert [(p["learning_rate"], p["steps"]) for p in kinds["NPO"]] == [
        (rate, steps) for rate in (1e-3, 2e-3) for steps in (2, 4)
    ]
    assert kinds["MEMIT"] == [{"scale": 0.5}, {"scale": 1.0}]
    kfade = grid_points(CATALOGUE["K-FADE (K-FAC)"], GRID)
    assert kfade == [{"damping": 0.1, "steps": 1, "budget": budget} for budget in (0.05, 0.1)]


def test_the_best_point_is_chosen_on_one_seed_and_reported_on_others():
    def record(method, point, seed, quality, utility):
        values = {"forget_quality": quality, "model_utility": utility}
        numbers = {name: {"value": value} for name, value in values.items()}
        return {"method": method, "point": point, "seed": seed, "numbers": numbers}

    records = [record("untouched", {}, 0, 0.0, 0.5), record("retrained", {}, 0, 1.0, 0.5)]
    for seed in (0, 1, 2):
        # The second passes at the first seed alone; the first keeps more at the others.
        records.append(record("NPO", {"beta": 1}, seed, 0.01 if seed == 0 else 0.9, 0.5))
        records.append(record("NPO", {"beta": 2}, seed, 0.2 if seed == 0 else 0.0, 0.45))
    chosen = best_records(records, 0.8)
    assert [(r["method"], r["point"], r["seed"]) for r in chosen[2:]] == [
        ("NPO", {"beta": 2}, 1),
        ("NPO", {"beta": 2}, 2),
    ]
    assert best_records(records[:4], 0.8)[2]["point"] == {"beta": 2}


@pytest.mark.reuses_keys
@pytest.mark.usefixtures("patched")
def test_a_sweep_from_end_to_end(toy_folder, tmp_path, capsys):
    out = tmp_path / "out"
    given = ["--preset", "checkpoint", "--model", str(toy_folder), "--out", str(out)]
    more = ["--grid", "published", "--protocol", "field", "--methods", "NPO", "--seeds", "0", "1"]
    assert main(["tofu", *given, *more]) == 0
    files = sorted((out / "runs").iterdir())
    assert len(files) == NUM_RUNS
    assert sorted(path.name for path in (out / "models").iterdir()) == [
        *("about.json", "full", "retrained"),
    ]
    records = [json.loads(file.read_text()) for file in files]
    assert {record["about"]["protocol"] for record in records} == {"field"}
    by = {(r["method"], r["point"].get("alpha"), r["seed"]): r["numbers"] for r in records}
    learnt, retrained = by["untouched", None, 0], by["retrained", None, 0]
    assert retrained["forget_quality"]["value"] == 1
    prob = "forget_Q_A_Prob"
    assert learnt[prob]["value"] > retrained[prob]["value"]
    assert learnt[prob]["low"] < learnt[prob]["value"] < learnt[prob]["high"]
    forgot = [by["NPO", 1.0, seed][prob]["value"] for seed in (0, 1)]
    assert max(forgot) < learnt[prob]["value"]
    found = json.loads((out / "results.json").read_text())
    chosen = [row for row in found["chosen"] if row["method"] == "NPO"]
    assert [row["seeds"] for row in chosen] == [[1]]
    assert chosen[0]["numbers"]["overall_score"]["value"] is not None
    both = next(row for row in found["summary"] if row["point"].get("alpha") == 1.0)
    assert both["numbers"][prob]["value"] == pytest.approx(np.mean(forgot))

    # A run that is missing is made again, from the same models, and nothing else.
    name = Trial("NPO", records[0]["point"], 1).name
    gone = next(file for file in files if file.name == f"{name}.json")
    before, times = json.loads(gone.read_text()), {f: f.stat().st_mtime_ns for f in files}
    gone.unlink()
    capsys.readouterr()
    assert main(["tofu", *given, *more]) == 0
    said = capsys.readouterr().err
    assert f"{NUM_RUNS - 1} of {NUM_RUNS} runs stand in" in said
    assert "training on" not in said
    assert [f for f in files if f.stat().st_mtime_ns != times[f]] == [gone]
    again = json.loads(gone.read_text())
    assert values_of(again) == pytest.approx(values_of(before), rel=1e-5)


def values_of(record):
    """The numbers that the model has."""
    values = {name: x["value"] for name, x in record["numbers"].items()}
    return {name: value for name, value in values.items() if value is not None}


def rows_of(batch):
    """The rows' tokens without what fills them up."""
    pairs = zip(np.asarray(batch.inputs), np.asarray(batch.valid) > 0, strict=True)
    return {tuple(row[is_valid].tolist()) for row, is_valid in pairs}


def test_what_methods_see_by_either_protocol(sets, toy_folder):
    begin = from_folders(toy_folder, toy_folder, None, TOY.model, "float32")
    seen = {}
    for protocol in ("strict", "field"):
        preset = TOY._replace(protocol=protocol)
        scene = prepare(sets, preset, seed=0, say=lambda _: None, begin=begin)
        seen[protocol] = rows_of(scene.task.retain)
        judged = rows_of(scene.task.heldout)
    assert len(judged) == len(sets.heldout)
    assert not seen["strict"] & judged
    assert seen["field"] == seen["strict"] | judged


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--grid", "published"], "--seeds and --grid published go with --preset checkpoint"),
        (["--protocol", "field"], "--protocol field goes with --seeds or --grid published"),
        (
            ["--preset", "checkpoint", "--model", ".", "--seeds", "0", "--save", "NPO"],
            "--save goes",
        ),
        (
            ["--preset", "checkpoint", "--model", ".", "--grid", "published", "--methods", "ROME"],
            "unknown methods: ROME; there are NPO, AltPO",
        ),
    ],
)
@pytest.mark.usefixtures("patched")
def test_options_that_do_not_go_together(given, message, tmp_path, capsys):
    assert main(["tofu", "--out", str(tmp_path / "out"), *given]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.usefixtures("patched")
def test_models_of_another_training_are_refused(toy_folder, tmp_path, capsys):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "about.json").write_text("{")
    given = ["--preset", "checkpoint", "--model", str(toy_folder), "--out", str(tmp_path)]
    assert main(["tofu", *given, "--grid", "published", "--methods", "NPO"]) == 2
    assert "holds models that were trained otherwise" in capsys.readouterr().err.replace("\n", " ")
