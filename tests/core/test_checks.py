"""Numbers out of their range are refused by name, everywhere: one table, and nobody is left out."""

import importlib
import inspect
import types
import typing

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

import jedit
from jedit.core import checks

PACKAGES = (
    "attacks", "checkpoint", "curvature", "curvature.likelihoods", "data", "edits",
    "geometry", "methods", "metrics", "models", "objectives", "report", "requests",
    "steering", "tracing", "training", "transforms",
)  # fmt: skip
NAN, INF = float("nan"), float("inf")
FINITE = (NAN, INF, -INF)
POSITIVE = (-1.0, 0.0, NAN, INF)
NOT_NEGATIVE = (-0.01, NAN, INF)
SHARE = (-0.1, 1.5, NAN)
COUNT = (-1, 0, 1.5, NAN)
COUNT_OR_ZERO = (-1, 1.5, NAN)

# What an argument of this name must not be, whichever function takes it.
BAD = {
    "active": COUNT, "align_weight": NOT_NEGATIVE, "alpha": NOT_NEGATIVE, "auc": SHARE,
    "balance": SHARE, "batch_size": COUNT, "beta": NOT_NEGATIVE, "beta_importance": NOT_NEGATIVE,
    "beta_saturation": NOT_NEGATIVE, "bits": COUNT, "budget": POSITIVE, "chance": SHARE,
    "chosen": COUNT, "chunk": COUNT, "clip": POSITIVE, "confidence": (0.0, *SHARE), "count": COUNT,
    "damping": NOT_NEGATIVE, "decay": SHARE, "delay": COUNT_OR_ZERO, "delta": FINITE, "dpi": COUNT,
    "drift_weight": NOT_NEGATIVE, "dual": NOT_NEGATIVE, "dual_rate": NOT_NEGATIVE,
    "eigh_dim": COUNT, "enough": POSITIVE, "epoch": COUNT_OR_ZERO, "epochs": NOT_NEGATIVE,
    "eps": NOT_NEGATIVE,
    "every": COUNT, "exact_memorization": SHARE, "exponent": FINITE, "extraction_strength": SHARE,
    "facts_per_author": COUNT, "first": COUNT, "forget_nll": FINITE, "forget_weight": NOT_NEGATIVE,
    "fraction": SHARE, "gain": FINITE, "gamma": NOT_NEGATIVE, "group_bytes": COUNT,
    "held_weight": NOT_NEGATIVE, "hidden": COUNT, "inner_steps": COUNT, "interval": POSITIVE,
    "kept_bytes": COUNT_OR_ZERO, "kl_budget": NOT_NEGATIVE, "kl_weight": NOT_NEGATIVE,
    "latents": COUNT, "layers": COUNT, "learning_rate": NOT_NEGATIVE, "least": SHARE,
    "least_risk": SHARE, "length": COUNT, "mass": SHARE, "max_age": POSITIVE, "max_dim": COUNT,
    "max_len": COUNT, "max_norm": POSITIVE, "memorization": SHARE, "newest": FINITE,
    "noise": NOT_NEGATIVE, "num_authors": COUNT, "num_classes": COUNT, "num_forget": COUNT,
    "num_heads": COUNT, "num_items": COUNT, "num_layers": COUNT, "num_pixels": COUNT,
    "num_prompts": COUNT, "num_relations": COUNT, "num_retain": COUNT, "num_rows": COUNT,
    "num_steps": COUNT, "num_users": COUNT, "number": COUNT, "order": FINITE[:1],
    "original_utility": POSITIVE, "paraphrase_probability": SHARE, "penalty": NOT_NEGATIVE,
    "power": COUNT, "predicted_kl": NOT_NEGATIVE, "preservation": POSITIVE, "privacy": SHARE,
    "probe": COUNT, "pull": NOT_NEGATIVE, "push": NOT_NEGATIVE, "radius": POSITIVE, "rank": COUNT,
    "rate": NOT_NEGATIVE, "ratio": NOT_NEGATIVE, "refresh": COUNT, "reinforcement": NOT_NEGATIVE,
    "relaxation": NOT_NEGATIVE, "relearn": COUNT_OR_ZERO, "request_size": COUNT,
    "retain_rank": COUNT_OR_ZERO, "retrained_auc": SHARE, "revival": NOT_NEGATIVE,
    "ridge": NOT_NEGATIVE, "samples": COUNT, "scale": FINITE, "share": SHARE, "significance": SHARE,
    "similarity": (-1.5, 1.5, NAN), "size": COUNT, "spread": POSITIVE, "steering": FINITE,
    "stem_stride": COUNT, "step_size": POSITIVE, "steps": COUNT_OR_ZERO, "stop": FINITE,
    "strength": NOT_NEGATIVE, "suppression": (*SHARE, 1.0), "temperature": POSITIVE,
    "test_fraction": SHARE, "threshold": NOT_NEGATIVE, "tilt": FINITE, "tolerance": NOT_NEGATIVE,
    "tries": COUNT, "tuning_steps": COUNT_OR_ZERO, "units": COUNT, "updates": COUNT,
    "utility": NOT_NEGATIVE, "variance_weight": NOT_NEGATIVE, "views": COUNT, "vocab": COUNT,
    "vocab_size": COUNT, "weight": NOT_NEGATIVE, "weight_decay": NOT_NEGATIVE, "width": COUNT,
    "window": COUNT,
}  # fmt: skip
# Stricter than the name alone says.
STRICTER = {
    ("Ascent", "steps"): COUNT,
    ("alphaedit", "ridge"): POSITIVE,
    ("austeer", "alpha"): FINITE,
    ("cure", "threshold"): SHARE,
    ("lineas", "learning_rate"): POSITIVE,
    ("lineas", "steps"): COUNT,
    ("pooled_outputs", "strength"): FINITE,
    ("run_steered", "strength"): FINITE,
    ("steered", "strength"): FINITE,
    ("batch_unlearn", "predicted_kl"): POSITIVE,
    ("continual", "predicted_kl"): POSITIVE,
    ("curvature_engram", "scale"): POSITIVE,
    ("DPO", "beta"): POSITIVE,
    ("FIT", "beta"): POSITIVE,
    ("Forgetting", "steps"): COUNT,
    ("Natural", "predicted_kl"): POSITIVE,
    ("natural", "predicted_kl"): POSITIVE,
    ("Recovery", "predicted_kl"): POSITIVE,
    ("reglu", "retain_rank"): COUNT,
    ("Recovery", "steps"): COUNT,
    ("Rewind", "learning_rate"): POSITIVE,
    ("Rewind", "steps"): COUNT,
    ("natural_steps", "predicted_kl"): POSITIVE,
    ("overall_score", "utility"): SHARE,
    ("engram", "scale"): POSITIVE,
    ("finetune_modules", "tuning_steps"): COUNT,
    ("k_fpf", "tuning_steps"): COUNT,
    ("RftStages", "steps"): COUNT,
    ("RftStages", "threshold"): FINITE,
    ("UER", "scale"): POSITIVE,
    ("filter_rollouts", "threshold"): FINITE,
    ("l1_sparse", "steps"): COUNT,
    ("linear_probe", "strength"): POSITIVE,
    ("NPO", "beta"): POSITIVE,
    ("null_space", "threshold"): (*NOT_NEGATIVE, 1.5),
    ("refuse_by_sum", "threshold"): SHARE,
    ("relational_probe", "ridge"): POSITIVE,
    ("SimNPO", "beta"): POSITIVE,
}
# No quantities: any whole number will do.
NUMBERS_OF_THINGS = {"label", "pad", "seed"}
# Records of what was found, and a helper whose numbers were computed.
NOT_GIVEN_BY_USERS = {
    *("Attention", "Entry", "Material", "Site", "SparseAutoencoder", "Weight"),
    "largest_step_within",
}


def _block():
    return types.SimpleNamespace(weight=types.SimpleNamespace(path="w"))


# Other arguments that the function needs before it comes to its numbers.
NEEDED = {
    "fit": {"epochs": 1},
    "train_adapters": {"optimizer": optax.sgd(1.0), "adapters": {}},
    "kfac": {"apply": len},
    "finetune_modules": {"optimizer": optax.sgd(1.0), "select": "w", "every": 1, "tuning_steps": 1},
    "k_fpf": {"optimizer": optax.sgd(1.0), "modules": "w", "every": 1, "tuning_steps": 1},
    "gere": {"hidden": len, "optimizer": optax.sgd(1.0)},
    "sensitive_modules": {"scores": {}},
    "with_retain": {"objective": len},
    "ViewBatch": {"objective": len},
    "kfade": {"budget": 1.0},
    "relearn": {"looks": (1,)},
    "ekfac": {"apply": len, "kfac_curvature": jedit.Curvature({}, {}, np.ones(()))},
    "encode_rows": {"rows": []},
    "run_steered": {"steering": jedit.steering.Steering({})},
    "steered": {"steering": jedit.steering.Steering({})},
    "kuda": {
        "objective": len,
        "select": "w",
        "curvature": jedit.Curvature({"w": _block()}, {}, np.ones(())),
    },
}


def takes_a_number(annotation):
    parts = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    return any(part in (int, float) for part in parts)


def _is_union(annotation):
    return isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union


def public_numbers():
    """Yields (function, argument) of all public functions and classes that take a number."""
    seen = set()
    packages = [jedit, *(importlib.import_module(f"jedit.{name}") for name in PACKAGES)]
    for package in packages:
        for name in getattr(package, "__all__", ("Categorical", "Gaussian", "Bernoulli")):
            thing = getattr(package, name)
            if not isinstance(thing, (types.FunctionType, type)) or thing in seen:
                continue
            seen.add(thing)
            if name in NOT_GIVEN_BY_USERS or (
                isinstance(thing, type) and issubclass(thing, tuple | Exception)
            ):
                continue
            for argument, parameter in inspect.signature(thing).parameters.items():
                if takes_a_number(parameter.annotation) and argument not in NUMBERS_OF_THINGS:
                    yield thing, argument


ROWS = list(public_numbers())


def test_every_public_number_is_in_the_table():
    missing = {(f.__name__, argument) for f, argument in ROWS if argument not in BAD}
    assert not missing
    assert len(ROWS) > 100


@pytest.fixture
def _untyped():
    """Without the run-time check of types, so that None may stand for what is not looked at."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("_untyped")
@pytest.mark.parametrize(
    ("function", "argument"), ROWS, ids=[f"{f.__name__}-{argument}" for f, argument in ROWS]
)
def test_a_number_out_of_its_range_is_refused_by_name(function, argument):
    name = function.__name__
    parameters = inspect.signature(function).parameters
    given = {
        other: None
        for other, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind != parameter.VAR_KEYWORD
    }
    given |= NEEDED.get(name, {}) | NEEDED.get((name, argument), {})
    for value in STRICTER.get((name, argument), BAD[argument]):
        with pytest.raises(ValueError, match=rf"{argument}\b.*{value}|{argument}\b.*got"):
            function(**{**given, argument: value})


def test_what_is_traced_or_not_given_passes():
    def damped(damping):
        checks.check_numbers(checks.POSITIVE, damping=damping, budget=None)
        return damping

    assert jax.jit(damped)(-1.0) == -1
    assert jax.eval_shape(damped, jax.ShapeDtypeStruct((), jnp.float32)).shape == ()


def test_arrays_are_looked_at_one_by_one():
    checks.check_numbers(checks.POSITIVE, budget=jnp.array([0.1, 2.0]), step_size=np.float32(1))
    with pytest.raises(ValueError, match=r"budget must be positive, got -1.0 at \[1\]"):
        checks.check_numbers(checks.POSITIVE, budget=jnp.array([0.1, -1.0]))
    with pytest.raises(TypeError, match="damping must be a number, got '0.1'"):
        checks.check_numbers(checks.POSITIVE, damping="0.1")
