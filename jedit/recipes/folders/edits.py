"""The edit of a folder's model: by natural steps, by a method that trains, or in closed form."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jedit.core.batch import Apply, Batch
from jedit.core.paths import exactly, matcher, parameter_paths
from jedit.curvature.likelihoods import Categorical
from jedit.edits import Edit, apply_edit, dense
from jedit.geometry import RetainKl, largest_step_within
from jedit.methods._within_budget import WithinBudget
from jedit.methods.row import SHARE, ByBudget, ByDraws, ByScale, BySteps, Need, Reach, Row
from jedit.models import cast_params, load_model, mixed_precision
from jedit.recipes.by_itself import found_of
from jedit.recipes.fitting import rows_of
from jedit.recipes.folders.choice import RATES
from jedit.recipes.folders.material import Given, material_of
from jedit.recipes.folders.places import SELECT
from jedit.recipes.folders.placing import cut
from jedit.recipes.folders.settings import ATTACK_RATE, KFADE_BUDGET, Settings
from jedit.recipes.progress import tell
from jedit.requests import Forgetting, Natural, Recovery, Rewind, Unseen, Watching
from jedit.requests import forget as forget_rows
from jedit.requests.comeback import attacked
from jedit.requests.forget import held_out
from jedit.requests.unseen import p_value_of, row_losses
from jedit.requests.walk import Look
from jedit.training import TrainingMethod, run_method
from jedit.training.rate import with_learning_rate

Made = tuple[Edit, dict[str, Any]]
# An edit, its changes by path, and what both are still to be multiplied by.
Scaled = tuple[Edit, dict[str, Array], float]


def make_edit(row: Row | None, given: Given, settings: Settings) -> Made:
    """Make the edit by a row of the catalogue, or by natural steps; say what was found.

    Raises:
        ValueError: what the method refuses.
    """
    if row is None:
        return _by_natural_steps(given, settings)
    if isinstance(row, BySteps):
        return _by_training(row, given, settings)
    return _in_closed_form(row, given, settings)


def _by_natural_steps(given: Given, settings: Settings) -> Made:
    apply, params, rewind, before = given.apply, given.params, None, ""
    if settings.base is not None:
        given.say(f"loading {settings.base}")
        narrow = jax.tree.leaves(params)[0].dtype
        wide = jnp.promote_types(narrow, jnp.float32)
        start = load_model(settings.base, dtype=wide, mesh=settings.mesh)[1]
        if wide != narrow:  # small steps add up in float32 alone
            apply, params = mixed_precision(apply, narrow), cast_params(params, wide)
        rewind = Rewind(
            start,
            settings.rewind_rate,
            settings.rewind,
            batch_size=settings.batch_size,
        )
        before = f"{settings.rewind} steps from a part of the way back, "
    given.say(
        f"{before}fitting K-FAC on the retain rows, then at most {settings.steps} natural steps"
    )
    recovery = None
    if settings.recovery:
        recovery = Recovery(settings.recovery, batch_size=settings.batch_size)
    steps = Natural(
        select=given.select or SELECT,
        batch_size=settings.batch_size,
        recovery=recovery,
        rewind=rewind,
        curvature=settings.factorize,
    )
    total = settings.steps + settings.recovery + (0 if rewind is None else rewind.steps)
    return _forgotten(given, settings, steps, total, model=(apply, params))


def _by_training(row: BySteps, given: Given, settings: Settings) -> Made:
    seen, _ = held_out(given.sets["retain"])
    material = material_of(row, given, seen, settings)
    method = row.of(material)
    rate = RATES[row.pace] if settings.learning_rate is None else settings.learning_rate
    method = method._replace(
        optimizer=at_rate(method.optimizer, rate),
        trainable=_trained(method, row, given),
        batch_size=settings.batch_size,
    )
    given.say(f"forgetting by {row.name}: at most {settings.steps} steps at a rate of {rate:g}")
    rows = row.forget_rows(material)
    edit, found = _forgotten(given, settings, method, settings.steps, rows=rows)
    return edit, {**found, "learning_rate": rate}


def _trained(method: TrainingMethod, row: Row, given: Given) -> str | None:
    """Return the pattern of what the method trains, of what was asked for.

    Raises:
        ValueError: nothing is both.
    """
    if given.select is None:
        return method.trainable
    own, asked = matcher(method.trainable or "", "trainable"), matcher(given.select, "--select")
    paths = [path for path, _ in parameter_paths(given.params) if own(path) and asked(path)]
    if not paths:
        raise ValueError(
            f"{row.name} trains none of the parameters that --select or --layers names"
        )
    return "|".join(exactly(paths))


def at_rate(optimizer: Any, learning_rate: float) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer with the rate in its state set, as the catalogue's rows hold it there.

    Args:
        optimizer: an optax transform whose state has a "learning_rate".
        learning_rate: the new one.

    Raises:
        ValueError: at init, the state holds no rate, so that it would not be the one that is said.
    """

    def init(params: PyTree) -> Any:
        state = optimizer.init(params)
        if not optax.tree_utils.tree_get_all_with_path(state, "learning_rate"):
            raise ValueError(
                "the optimizer's state holds no learning_rate to be set; make it by "
                "optax.inject_hyperparams, as jedit.methods.row.ADAM is"
            )
        return with_learning_rate(state, learning_rate)

    return optax.GradientTransformationExtraArgs(init, optimizer.update)


def _forgotten(
    given: Given,
    settings: Settings,
    method: Natural | TrainingMethod,
    total: int,
    *,
    model: tuple[Apply, PyTree] | None = None,
    rows: Batch | tuple[Any, ...] | None = None,
) -> Made:
    """Let `jedit.forget` take the steps, which looks, keeps the budget, stops and saves."""
    apply, params = (given.apply, given.params) if model is None else model
    unseen, temperature = given.sets.get("unseen"), settings.temperature
    how = Forgetting(
        method,
        likelihood=None if temperature is None else Categorical(temperature),
        steps=settings.steps,
        attack=optax.adam(ATTACK_RATE) if _is_attacked(given, settings) else None,
        watch=Watching(functools.partial(_tell, given, total), given.job),
    )
    edit, info = forget_rows(
        apply,
        params,
        given.sets["forget"] if rows is None else rows,
        given.sets["retain"],
        unseen=None if unseen is None else Unseen(unseen),
        budget=settings.budget,
        key=given.key_of("edit"),
        how=how,
    )
    return edit, found_of(info)


def _tell(given: Given, total: int, look: Look) -> None:
    tell(given.say, look.step, total)


def _is_attacked(given: Given, settings: Settings) -> bool:
    # Some rows are taught, others asked about.
    return settings.attack and rows_of(given.sets["forget"]) > 1


def _in_closed_form(row: Row, given: Given, settings: Settings) -> Made:
    """Edit at once, at a price that is measured on retain rows that no curvature sees."""
    apply, params, forget = given.apply, given.params, given.sets["forget"]
    found: dict[str, Any] = {}
    level = None
    if (unseen := given.sets.get("unseen")) is not None:
        level = np.sort(row_losses(apply, params, unseen))
        found["p_value"] = [p_value_of(row_losses(apply, params, forget), level)]
        if found["p_value"][0] > Forgetting.significance:
            return Edit({}), found | _price(0.0, 0.0) | {"stopped": "unseen", "steps": 0}
    seen, priced = held_out(given.sets["retain"])
    material = material_of(row, given, seen, settings)
    given.say(f"forgetting by {row.name}")
    if isinstance(row, ByBudget):
        budget = KFADE_BUDGET if settings.budget is None else settings.budget
        sets = [cut(rows, settings) for rows in (forget, priced)]
        method = row.of(material)
        edit, info = run_method(functools.partial(method, budget=budget), apply, params, *sets)
        found |= _price(float(info.predicted_kl[-1]), float(info.true_kl[-1]))
        if isinstance(info, WithinBudget):
            found["strength"] = float(info.strength)
    else:

        @functools.lru_cache(1)
        def at(scale: float) -> Scaled:
            if isinstance(row, ByDraws):
                how = {"trainable": given.select, "batch_size": settings.batch_size}
                key, left = given.key_of("edit"), scale
                edit, _ = row.of(material)(apply, params, steps=settings.steps, key=key, **how)
            else:
                assert isinstance(row, ByScale)
                method, left = row.scaled(material, scale)
                edit = run_method(method, apply, params, forget, seen)[0]
            changes = {path: dense(block) for path, block in edit.blocks.items()}
            if not any(bool(jnp.any(change)) for change in changes.values()):
                given.say(f"{row.name} moves nothing: its edit is zero")
            return edit, changes, left

        is_share = isinstance(row, ByScale) and row.reach is Reach.SHARE

        def scaled(scale: float) -> Scaled:
            # What a share edits is another at each scale.
            return at(scale) if is_share else (*at(1.0)[:2], scale)

        edit, price = _within(scaled, given, priced, settings)
        if is_share:
            found["share"] = price["scale"] * row.settings[SHARE]
        if isinstance(row, ByDraws):
            found |= {"steps": settings.steps, "learning_rate": material.take(Need.DIALOGUE).rate}
        found |= price
    edited = apply_edit(params, edit)
    if level is not None:
        found["p_value"].append(p_value_of(row_losses(apply, edited, forget), level))
    if _is_attacked(given, settings):
        given.say("attacking")
        key = given.key_of("attack")
        how = {"optimizer": optax.adam(ATTACK_RATE), "key": key}
        found["comeback"] = attacked(apply, edited, forget, unseen, **how)._asdict()
    return edit, found


def _within(
    scaled: Callable[[float], Scaled], given: Given, priced: Batch, settings: Settings
) -> Made:
    """Return the edit at the largest scale, up to 1, that the budget pays for."""
    batched = cut(priced, settings)
    price = RetainKl(given.apply, given.params, batched, likelihood=Categorical())

    def price_at(scale: float) -> float:
        if scale == 0:
            return 0.0
        _, move, left = scaled(scale)
        return price(move, left)

    scale = 1.0
    if settings.budget is not None:
        scale = largest_step_within(price_at, 1.0, settings.budget, limit=1.0)
    edit, move, left = scaled(scale)
    kept = {path: left * change for path, change in move.items()}
    return edit * left, {"scale": scale, **_price(price.predicted(kept), price(kept))}


def _price(predicted: float, true: float) -> dict[str, float]:
    return {"predicted_kl": predicted, "true_kl": true}
