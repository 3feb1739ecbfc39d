"""Published defaults: what a signature says, the docstring says too, and this table says whose.

A row for every figure, word and switch that a public method, objective or transform defaults to. A
figure that nobody has published is "ours", and its docstring calls it arbitrary or says from where.
"""

import dataclasses
import importlib
import inspect
import re
from typing import NamedTuple

import pytest

ROOMS = ("methods", "objectives", "requests", "steering", "transforms")


class Default(NamedTuple):
    """One default.

    Attributes:
        function: "room.name".
        argument: of it.
        value: its default.
        said: how the function's docstring or its file's puts it.
        source: whose figure it is.
    """

    function: str
    argument: str
    value: float | str | bool
    said: str
    source: str


MEMIT, FRAMEWORK, OURS = "MEMIT's code, GPT-J", "open-unlearning", "ours"
INTACT, REFRESH = "InTAct's code", "refresh learning's code"
DEFAULTS = [
    Default("methods.alphaedit", "ridge", 10.0, "Code: 10.", "AlphaEdit's code"),
    Default("methods.alphaedit", "absolute", True, "absolute: True, as in", "AlphaEdit's code"),
    Default("methods.activation_intervals", "share", 0.05, "above; 0.05 is the code's", INTACT),
    Default("methods.InTAct", "variance_weight", 0.01, "of V; 0.01 is the code's", INTACT),
    Default("methods.InTAct", "held_weight", 1.0, "of H; 1 is the code's", INTACT),
    Default("methods.InTAct", "drift_weight", 1.0, "of D; 1 is the code's", INTACT),
    Default("methods.InTAct", "align_weight", 1.0, "of C; 1 is the code's", INTACT),
    Default("methods.refresh_learning", "inner_steps", 1, "J, 1 as in the released", REFRESH),
    Default("methods.refresh_learning", "damping", 0.1, "0.1 is arbitrary", OURS),
    Default("methods.refresh_learning", "seed", 0, "0 is arbitrary", OURS),
    Default("transforms.project_out_stored", "scope", "global", '"global", the whole', "OGD"),
    Default("transforms.unlearn_first", "inner_steps", 1, "1 is the released code's", REFRESH),
    Default("transforms.unlearn_first", "damping", 0.1, "0.1 is arbitrary", OURS),
    Default("transforms.unlearn_first", "seed", 0, "0 is arbitrary", OURS),
    Default("requests.batch_unlearn", "damping", 0.1, "0.1 is arbitrary", OURS),
    Default("requests.Natural", "damping", 0.01, "eigenvalue; 0.01 is `natural`'s", OURS),
    Default("requests.Natural", "predicted_kl", 1e-4, "nats per output, 1e-4 as there", OURS),
    Default("requests.Natural", "batch_size", 16, "one step; 16, as there", OURS),
    Default("requests.Recovery", "steps", 48, "of `Forgetting.steps`; 48", OURS),
    Default("requests.Recovery", "predicted_kl", 1e-4, "first step, 1e-4", OURS),
    Default("requests.Recovery", "forget_weight", 0.2, "retain term; 0.2", OURS),
    Default("requests.Recovery", "batch_size", 16, "of one step; 16", OURS),
    Default("requests.Rewind", "share", 0.6, "`start`, 0.6 (ours)", OURS),
    Default("requests.Rewind", "forget_weight", 0.3, "retain term; 0.3", OURS),
    Default("requests.Rewind", "batch_size", 8, "of one step; 8", OURS),
    Default("requests.Forgetting", "steps", 48, "recovery; 48 was", OURS),
    Default("requests.Forgetting", "every", 4, "price; 4 is arbitrary", OURS),
    Default("requests.Forgetting", "significance", 0.05, "above it; 0.05 is", "TOFU"),
    Default("methods.memorised_subspace", "share", 0.01, "0.01 (ours:", OURS),
    Default("methods.memorised_subspace", "agreement", "any", '"any" of the memorised', OURS),
    Default("steering.austeer", "units", 10, "are moved; 10, the code's", "AUSteer's code"),
    Default("steering.austeer", "alpha", 5.0, "score; 5.0, the code's", "AUSteer's code"),
    Default("steering.identity", "is_foldable", False, "added; False leaves none", OURS),
    Default("steering.lineas", "steps", 100, "how many steps; 100 (ours", OURS),
    Default("steering.lineas", "learning_rate", 0.1, "plain steps; 0.1, with which", "LinEAS, 3.3"),
    Default("steering.mean_difference", "pool", "mean", '"mean" of a row', OURS),
    Default("steering.pooled_outputs", "pool", "mean", '"mean" over a row', OURS),
    Default("steering.pooled_outputs", "strength", 1.0, "steering, 1.0 for", OURS),
    Default("steering.run_steered", "strength", 1.0, "all maps, 1.0 for", OURS),
    Default("steering.steered", "strength", 1.0, "1.0, is the whole", OURS),
    Default("steering.transport_cost", "power", 2, "p; 2 (derived", OURS),
    Default("methods.natural", "damping", 0.01, "eigenvalue; 0.01 (ours;", OURS),
    Default("methods.natural", "predicted_kl", 1e-4, "nats per output, 1e-4 (ours)", OURS),
    Default("methods.natural", "batch_size", 16, "a step; 16 is what", OURS),
    Default("transforms.natural_steps", "damping", 0.01, "λ, 0.01 (ours)", OURS),
    Default("transforms.natural_steps", "predicted_kl", 1e-4, "ε, 1e-4 (ours)", OURS),
    Default("requests.Solver", "exact", False, "which False does", OURS),
    Default("requests.Solver", "chunk", 16, "16 is arbitrary", OURS),
    Default("requests.interactions", "damping", 0.0, "0.0, none", OURS),
    Default("requests.interactions", "exact", False, "False there too", OURS),
    Default("requests.balanced", "ridge", 1e-6, "1e-6 (arbitrary)", OURS),
    Default("requests.Answering", "tries", 3, "most; 3 is arbitrary", OURS),
    Default("requests.Answering", "damping", 0.1, "eigenvalue; 0.1 is arbitrary", OURS),
    Default("requests.Answering", "relearn", 32, "none. 32 is arbitrary", OURS),
    Default("requests.Answering", "request_size", 1, "1 is one row", OURS),
    Default("requests.Refresh", "every", 10, "10 is arbitrary", OURS),
    Default("requests.Refresh", "max_age", 0.5, "0.5 is arbitrary", OURS),
    Default("requests.Refresh", "probe", 32, "on, 32 (arbitrary)", OURS),
    Default("requests.Refresh", "chunk", 32, "estimation, 32 (arbitrary)", OURS),
    Default("methods.Restoration", "window", 10, "together (ROME: 10)", "ROME's code"),
    Default("methods.Corruption", "noise", 3.0, "ν (ROME: 3)", "ROME's code"),
    Default("methods.Corruption", "samples", 10, "noise (ROME: 10)", "ROME's code"),
    Default("methods.causal_trace", "chunk", 8, "8 is arbitrary", OURS),
    Default("methods.attention_shifting", "forget_weight", 0.5, "0.5 is arbitrary", OURS),
    Default("methods.attention_shifting", "suppression", 0.9, "λ; 0.9 is arbitrary", OURS),
    Default("methods.attention_shifting", "reinforcement", 0.9, "μ; 0.9 is arbitrary", OURS),
    Default("methods.attention_shifting", "share", 0.25, "most; 0.25 is arbitrary", OURS),
    Default("methods.attention_shifting", "chunk", 32, "once, in `token_importance`; 32", OURS),
    Default("methods.important_tokens", "share", 0.25, "up; 0.25 is arbitrary", OURS),
    Default("methods.token_importance", "chunk", 32, "once; 32 is arbitrary", OURS),
    Default("methods.fit_autoencoder", "epochs", 30, "seen; 30 is arbitrary", OURS),
    Default("methods.fit_autoencoder", "learning_rate", 3e-3, "3e-3 is arbitrary", OURS),
    Default("methods.fit_autoencoder", "batch_size", 256, "256 is arbitrary", OURS),
    Default("methods.fit_autoencoder", "revival", 0.1, "loss; 0.1 is arbitrary", OURS),
    Default("methods.fit_latents", "active", 16, "once; 16 is arbitrary", OURS),
    Default("methods.fit_latents", "tokens", "first", '"first" or "counted"', OURS),
    Default("methods.sae_guided", "push", 1.0, "known entities; 1 is arbitrary", OURS),
    Default("methods.sae_guided", "tokens", "first", '"first" unless', OURS),
    Default("methods.curvature_engram", "damping", 1.0, "λ; 1, the best of a grid", OURS),
    Default("methods.curvature_engram", "strength", "adaptive", '"adaptive" as there', "engram"),
    Default("methods.curvature_engram", "scale", 1.0, "α; 1.0 is `engram`'s", "engram"),
    Default("methods.curvature_pruning", "mass", 0.8, "0.8 is the code's example", "its code"),
    Default("methods.curvature_pruning", "keep", "product", '"product" (the code', "its code"),
    Default("methods.engram", "strength", "adaptive", '"adaptive" (paper;', "AI Engram"),
    Default("methods.engram", "scale", 1.0, '1.0 with "adaptive"', "AI Engram"),
    Default("methods.distinct_requests", "similarity", 0.9, "one; 0.9 is arbitrary", OURS),
    Default("methods.distinct_requests", "tolerance", 0.05, "token; 0.05 is arbitrary", OURS),
    Default("methods.fit_unlearning", "layers", 8, "most; 8, the paper's", "FIT"),
    Default("methods.influential_layers", "layers", 8, "most; 8, the paper's", "FIT"),
    Default("methods.RuleStages", "tuning_steps", 40, "tuning; 40 is arbitrary", OURS),
    Default("methods.RuleStages", "steps", 20, "from; 20, the code's", "RULE's code"),
    Default("methods.RuleStages", "updates", 2, "draw; 2 is arbitrary", OURS),
    Default("methods.RuleStages", "batch_size", 16, "stage; 16 is arbitrary", OURS),
    Default("methods.gu", "rank", 8, "basis (paper: 8)", "GU"),
    Default("methods.gu", "scope", "leaf", '"leaf", a basis for every parameter (paper)', "GU"),
    Default("methods.gu", "refresh", 1, "1 is every step", OURS),
    Default("methods.cure", "threshold", 0.1, "specific; 0.1 is arbitrary", OURS),
    Default("methods.module_effects", "chunk", 8, "8 is arbitrary", OURS),
    Default("methods.Directions", "rank", 32, "rank, 32 at most (code)", "REGLU's code"),
    Default("methods.Directions", "retain_rank", 128, "off, 128 at most (code)", "REGLU's code"),
    Default("methods.Directions", "share", 0.125, "0.125 is arbitrary", OURS),
    Default("methods.Directions", "balance", 0.7, "C; 0.7 (code)", "REGLU's code"),
    Default("methods.reglu", "scale", 2.0, "2.0 is the code's 64 / 32", "REGLU's code"),
    Default("methods.reglu", "weight", 0.5, "directions; 0.5 (code)", "REGLU's code"),
    Default("methods.ucan", "least_risk", 0.0, "down; 0.0 (ours, arbitrary)", OURS),
    Default("methods.ucan", "strength", 8.0, "risk; 8.0 (ours, arbitrary)", OURS),
    Default("methods.Ascent", "steps", 4, "4 is what our table was made with", OURS),
    Default("methods.kfade", "damping", 0.01, "(ours; 0.01 to 0.1 were best)", OURS),
    Default("methods.kuda", "threshold", 0.02, "0.02 is arbitrary", OURS),
    Default("methods.kuda", "relaxation", 1.0, "1, w = c/a above the cut, is arbitrary", OURS),
    Default("methods.mcu", "rank", 8, "mean: 8 is arbitrary", OURS),
    Default("methods.memit", "preservation", 15000.0, "Paper: 15000 for GPT-J", "MEMIT"),
    Default("methods.memit", "damping", 1e-4, "1e-4 (ours, arbitrary;", OURS),
    Default("methods.ofmu", "beta", 0.1, "cosine; 0.1 is arbitrary", OURS),
    Default("methods.ofmu", "inner_steps", 5, "descent; 5, the least of the paper's", "OFMU"),
    Default("methods.ofmu", "penalty", 0.1, "step; 0.1 is arbitrary", OURS),
    Default("methods.pdu", "dual", 100.0, "100, the TOFU runs'", "PDU's code"),
    Default("methods.pdu", "dual_rate", 5.0, "5, the TOFU runs'", "PDU's code"),
    Default("methods.pdu", "delay", 0, "0, the code's default", "PDU's code"),
    Default("methods.repselect", "learning_rate", 0.2, "0.2 is the code's", "RepSelect's code"),
    Default("methods.repselect", "rank", 512, "at most: 512, the code's", "RepSelect's code"),
    Default("methods.repselect", "share", 0.125, "0.125 is 512 of 4096", OURS),
    Default("methods.repselect", "retain_rank", 0, "by itself; 0, none", OURS),
    Default("methods.rome", "damping", 1e-4, "1e-4 (ours, arbitrary;", OURS),
    Default("methods.rosu", "outer", "transport", '"transport" (as the parent', "UAM's code"),
    Default("methods.rosu", "strength", 1.0, "1 is arbitrary", OURS),
    Default("methods.rosu", "scope", "global", '"global" (the stated problem)', "ROSU"),
    Default("methods.salun", "fraction", 0.5, "may change (paper: 0.5)", "SalUn"),
    Default("methods.sam", "radius", 0.01, "ρ (paper's code: 0.01)", "SAM unlearning's code"),
    Default("methods.sam", "weight", 1.0, "1 is arbitrary", OURS),
    Default("methods.ssiuu", "strength", 0.01, "per row; 0.01 (ours)", OURS),
    Default("methods.ssiuu", "score", "probability", '"probability", the paper', "Ssiuu"),
    Default("methods.Search", "steps", 24, "24, one less than `v_num_grad_steps`", MEMIT),
    Default("methods.Search", "learning_rate", 0.5, "value; 0.5, MEMIT's code", MEMIT),
    Default("methods.Search", "weight_decay", 0.5, "ω; 0.5, MEMIT's code", MEMIT),
    Default("methods.Search", "kl_weight", 0.0625, "κ; 0.0625, MEMIT's code", MEMIT),
    Default("methods.Search", "max_norm", 0.75, "c; 0.75, MEMIT's code", MEMIT),
    Default("methods.Search", "stop", 0.05, "further; 0.05, MEMIT's code", MEMIT),
    Default("objectives.DPO", "beta", 0.1, "β = 0.1 is open-unlearning's", FRAMEWORK),
    Default("objectives.FIT", "beta", 0.1, "NPO; 0.1 is that", "NPO"),
    Default("objectives.FIT", "kl_weight", 1.0, "KL; 1 is arbitrary", OURS),
    Default("objectives.GRPO", "clip", 0.2, "stops; 0.2 (arbitrary;", OURS),
    Default("objectives.GRPO", "kl_weight", 0.01, "reference; 0.01, RULE's", "RULE's code"),
    Default("objectives.GeRe", "weight", 100.0, "margin; 100, the code's", "GeRe's code"),
    Default("objectives.replayed_states", "spread", 1.0, "ends; 1, the code's", "GeRe's code"),
    Default("objectives.replayed_states", "chunk", 32, "once; 32 is arbitrary", OURS),
    Default("objectives.UER", "scale", 10.0, "multiplied by; 10 is arbitrary", OURS),
    Default("objectives.UER", "weight", 1.0, "replayed rows; 1 is arbitrary", OURS),
    Default("objectives.ViewBatch", "weight", 0.0, "first one; 0 is arbitrary", OURS),
    Default("methods.gere", "weight", 100.0, "margin; 100, the code's", "GeRe's code"),
    Default("methods.gere", "spread", 1.0, "ends; 1, the code's", "GeRe's code"),
    Default("methods.filter_rollouts", "threshold", 0.5, "right; 0.5 is arbitrary", OURS),
    Default("methods.filter_rollouts", "keep", "rewarded", '"rewarded" answers alone', OURS),
    Default("methods.RftStages", "steps", 20, "answers; 20 is arbitrary", OURS),
    Default("methods.RftStages", "updates", 2, "one draw; 2 is arbitrary", OURS),
    Default("methods.RftStages", "threshold", 0.5, "right; 0.5 is arbitrary", OURS),
    Default("objectives.NPO", "beta", 0.1, "β = 0.1 is the paper's", "NPO"),
    Default("objectives.RepresentationDeviation", "seed", 0, "u; 0 is arbitrary", OURS),
    Default("objectives.RepresentationDeviation", "tilt", 0.1, "τ = 0.1 is arbitrary", OURS),
    Default("objectives.RMU", "seed", 0, "u; 0 is arbitrary", OURS),
    Default("objectives.RMU", "steering", 2.0, "c = 2 is open-unlearning's", FRAMEWORK),
    Default("objectives.SuppressAttention", "strength", 0.9, "away; 0.9 is arbitrary", OURS),
    Default("objectives.RetainAttention", "strength", 0.9, "it; 0.9 is arbitrary", OURS),
    Default("objectives.SAEGuided", "push", 1.0, "ν; 1 is arbitrary", OURS),
    Default("objectives.SAEGuided", "tokens", "first", 'looked at: "first"', OURS),
    Default("objectives.SatImp", "beta_saturation", 5.0, "β₁ = 5 and", FRAMEWORK),
    Default("objectives.SatImp", "beta_importance", 1.0, "β₂ = 1 are those of", FRAMEWORK),
    Default("objectives.SimNPO", "beta", 4.5, "β = 4.5,", FRAMEWORK),
    Default("objectives.SimNPO", "delta", 0.0, "δ = 0 and", FRAMEWORK),
    Default("objectives.SimNPO", "gamma", 0.125, "γ = 0.125 are those of", FRAMEWORK),
    Default("objectives.UNDIAL", "beta", 10.0, "β = 10 is open-unlearning's", FRAMEWORK),
    Default("objectives.WGA", "beta", 1.0, "β = 1,", FRAMEWORK),
    Default("objectives.with_retain", "weight", 1.0, "α = 1, GradDiff's", FRAMEWORK),
    Default("objectives.with_retain", "forget_weight", 1.0, "γ = 1, GradDiff's", FRAMEWORK),
    Default("transforms.add_constraint_gradient", "dual", 1.0, "1.0 is GradDiff's", FRAMEWORK),
    Default("transforms.add_constraint_gradient", "dual_rate", 1.0, "1.0 is PDU's", FRAMEWORK),
    Default("transforms.add_constraint_gradient", "delay", 0, "0 is PDU's", FRAMEWORK),
    Default("edits.without_top_fraction", "fraction", 0.08, "0.08 (paper)", "2504.09522"),
    Default("transforms.ignore_top_fraction", "scope", "leaf", '"leaf", the share', "2504.09522"),
    Default("transforms.mask_to_salient", "fraction", 0.5, "(SalUn: 0.5)", "SalUn"),
    Default("transforms.orthogonalize_to_retain", "rank", 8, "kept (paper: 8)", "GU"),
    Default("transforms.orthogonalize_to_retain", "refresh", 1, "1 is every step", OURS),
    Default("transforms.orthogonalize_to_retain", "scope", "leaf", '"leaf", a subspace', "GU"),
    Default("transforms.orthogonalize_to_retain", "metric", "euclidean", '"euclidean" (the', OURS),
    Default("transforms.orthogonalize_to_retain", "sketch", "fifo", '"fifo" (paper)', "GU"),
    Default("transforms.orthogonalize_to_retain", "decay", 0.999, "0.999, Adam's b2", "Adam"),
    Default("transforms.orthogonalize_to_retain", "eps", 1e-8, "eps: 1e-8, Adam's", "Adam"),
    Default("transforms.orthogonalize_to_retain", "damping", 0.1, "0.1 is arbitrary", OURS),
    Default("transforms.project_realised_update", "uncovered", "zero", '"zero" (the def', OURS),
    Default("transforms.project_to_null_space", "uncovered", "zero", '"zero" (they stay', OURS),
    Default("transforms.retain_neutral_surrogate", "outer", "transport", '"transport", g', "UAM"),
    Default("transforms.retain_neutral_surrogate", "strength", 1.0, "1 is arbitrary", OURS),
    Default("transforms.retain_neutral_surrogate", "scope", "global", '"global" (the', "ROSU"),
    Default("transforms.retain_neutral_surrogate", "constrained", True, "True; False", "ROSU"),
    Default("transforms.scale_by_curvature", "damping", 0.01, "(ours: 0.01 to 0.1)", OURS),
    Default("transforms.scale_by_curvature", "absolute", False, "False, it is not", OURS),
    Default("transforms.scale_by_curvature", "uncovered", "zero", '"zero" (they stay', OURS),
    Default(
        "transforms.shrink_top_directions", "rank", 512, "512, RepSelect's", "RepSelect's code"
    ),
    Default("transforms.shrink_top_directions", "share", 0.125, "0.125 is what 512 is", OURS),
    Default("transforms.shrink_top_directions", "uncovered", "zero", '"zero" (they stay', OURS),
    Default("transforms.train_adapters", "scale", 1.0, "A B; 1.0 is arbitrary", OURS),
    Default("transforms.train_adapters", "weight", 0.0, "shows; 0.0, none", OURS),
    Default(
        "steering.switch_experts", "gain", 0.0, "0.0 switches them off, the paper's", "2502.11096"
    ),
    Default("attacks.linear_probe", "strength", 1.0, "penalty; 1.0 is its", "scikit-learn"),
    Default("attacks.relearn", "batch_size", 8, "8 (arbitrary)", OURS),
    Default("metrics.answer_rewards", "least", 0.3, "right; 0.3, RULE's", "RULE's code"),
    Default("metrics.depth_score", "threshold", 0.05, "0.05 is the paper's", "2605.24614"),
    Default("metrics.gradient_norm_scores", "order", 2.0, "2 (open-unlearning)", FRAMEWORK),
    Default("metrics.min_k_scores", "share", 0.4, "0.4, MUSE's", "MUSE and open-unlearning"),
    Default("metrics.min_k_plus_plus_scores", "share", 0.4, "0.4, MUSE's", "MUSE"),
]


def functions(room):
    """The public functions of a room, and the dataclasses that are or that they take, by name."""
    package = importlib.import_module(f"jedit.{room}")
    found = {name: getattr(package, name) for name in package.__all__}
    return {
        name: thing
        for name, thing in found.items()
        if inspect.isfunction(thing)
        or (dataclasses.is_dataclass(thing) and thing.__module__ != "jedit.methods.row")
    }


def said_by(function):
    """Its docstring and its file's, on one line."""
    file = inspect.getmodule(function)
    return " ".join(f"{file.__doc__} {function.__doc__}".split())


@pytest.mark.parametrize("row", DEFAULTS, ids=lambda row: f"{row.function}.{row.argument}")
def test_a_default_is_the_published_one_and_the_docstring_names_it(row):
    room, name = row.function.split(".")
    function = functions(room)[name]
    default = inspect.signature(function).parameters[row.argument].default
    assert default == row.value, f"{row.source} has {row.value}"
    assert type(default) is type(row.value)
    assert row.said in said_by(function)
    if isinstance(row.value, (str, bool)):
        assert str(row.value) in row.said
    else:
        figures = re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", row.said)
        assert row.value in map(float, figures)


def test_every_default_of_a_method_objective_and_transform_has_a_row():
    """Callables and None apart: what they stand for is in the code that reads them."""
    found = {
        (f"{room}.{name}", parameter.name)
        for room in ROOMS
        for name, function in functions(room).items()
        for parameter in inspect.signature(function).parameters.values()
        if isinstance(parameter.default, (int, float, str))
    }
    rows = [(row.function, row.argument) for row in DEFAULTS]
    assert len(rows) == len(set(rows))
    assert found == {row for row in rows if row[0].split(".")[0] in ROOMS}
