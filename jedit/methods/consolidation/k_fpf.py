"""k-FPF: forgetting-prioritised fine-tuning, k times on a way (Zhao et al., arXiv 2304.04158).

    c_l(θ, θ')  = |θ'_l - θ_l|₁ / n_l                    change of module l, n_l its parameters
    C_l         = Σ c_l over pairs in a row, / Σ_l of it   normalised: the modules' sum to one
    S_l         = C_l(ends of tasks) - C_l(ends of epochs within a task)
    learn; after each `every` steps fine-tune the modules of largest S on the buffer for some steps

    S       `module_sensitivity`, `sensitive_modules`
    buffer  the retain set                             `transforms.finetune_modules`
    k       how often it comes to that: the steps of all tasks over `every`

Few modules change more between tasks than they do while one task is learnt: those are the ones that
forget, and to fine-tune them alone on a few old rows now and then takes the place of replaying at
each step.

Differences.  That the most sensitive modules, by a normalised l1 change across tasks less that
across epochs, are fine-tuned on the buffer k times is the paper's [notes]; how it normalises we do
not know, and ours (by the number of parameters, then by the sum over modules) is derived.  A module
is a parameter's path up to its last "/": a layer's kernel and bias together.  Between two
interruptions nothing is replayed; `every` counts from the beginning of a task, as the optimizer
begins anew with each.
"""

import re
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from jedit.core.arguments import check_optimizer
from jedit.core.checks import COUNT, check_numbers
from jedit.core.paths import parameter_paths
from jedit.core.precision import wide
from jedit.methods.trained._retain_gradient import RetainGradient
from jedit.objectives import LearnNLL, Objective, RetainNLL
from jedit.training.method import TrainingMethod
from jedit.transforms import finetune_modules


def k_fpf(
    optimizer: optax.GradientTransformation,
    modules: str | Sequence[str],
    *,
    every: int,
    tuning_steps: int,
    finetuner: optax.GradientTransformation | None = None,
    objective: Objective = LearnNLL(),  # noqa: B008 - frozen and hashable
    held: Objective = RetainNLL(),  # noqa: B008 - frozen and hashable
) -> TrainingMethod:
    """Make k-FPF around any optimizer.

        modules = sensitive_modules(module_sensitivity(seen), count=1)
        method = k_fpf(optax.sgd(0.1), modules, every=50, tuning_steps=10)
        params, _ = jedit.unlearn(method, apply, params, new_rows, buffer, steps=180, key=key)

    Args:
        optimizer: what learns, learning rate included.
        modules: regular expression, or several, of the modules that are fine-tuned.
        every: steps of learning between two interruptions.
        tuning_steps: steps of one interruption, which are steps of the loop as all others.
        finetuner: what fine-tunes; None: the optimizer's rule.
        objective: what is lowered while learning, on the rows in the place of the forget set.
        held: what is lowered while fine-tuning, on the buffer, in the place of the retain set;
            `with_retain(LearnNLL())` for the rows that are learnt beside those of the buffer.

    Returns:
        A method for `jedit.unlearn`. Each step costs one gradient of either, and of the objective
        in fine-tuning too.

    Raises:
        ValueError: a number out of its range.
    """
    check_optimizer(optimizer)
    transform = finetune_modules(
        optimizer, modules, every=every, tuning_steps=tuning_steps, finetuner=finetuner
    )
    return TrainingMethod(objective, transform, RetainGradient(held))


def module_sensitivity(trajectory: Sequence[Sequence[PyTree]]) -> dict[str, float]:
    """Return S of each module, from parameters that were seen while tasks were learnt.

    Args:
        trajectory: for each task in turn the parameters after each of its epochs, the last of them
            those at its end.

    Returns:
        By module, its share of all change across tasks less its share across epochs: above 0 where
        it changes more from task to task. They sum to 0.

    Raises:
        ValueError: fewer than two tasks, none with two epochs, or nothing has changed.
    """
    within = [pair for task in trajectory for pair in zip(task[:-1], task[1:], strict=True)]
    ends = [task[-1] for task in trajectory if task]
    across = list(zip(ends[:-1], ends[1:], strict=True))
    if not within or not across:
        raise ValueError(
            "the sensitivity of modules needs two tasks, and two epochs of one of them; got epochs "
            f"{[len(task) for task in trajectory]}"
        )
    tasks, epochs = (_shares(pairs) for pairs in (across, within))
    return {module: tasks[module] - epochs[module] for module in tasks}


def sensitive_modules(scores: Mapping[str, float], *, count: int) -> str:
    """Return the regular expression of the modules of the largest scores.

    Args:
        scores: by module, as `module_sensitivity` returns them.
        count: how many modules.

    Raises:
        ValueError: there are fewer modules.
    """
    check_numbers(COUNT, count=count)
    if count > len(scores):
        raise ValueError(f"count is {count}, and there are {len(scores)} modules: {list(scores)}")
    chosen = sorted(scores, key=lambda module: -scores[module])[:count]
    # Their own parameters: what stands in a folder of theirs is another module.
    return rf"^(?:{'|'.join(map(re.escape, chosen))})(?:/[^/]+)?$"


def _shares(pairs: Sequence[tuple[PyTree, PyTree]]) -> dict[str, float]:
    """Return C: each module's mean change per parameter, over all pairs, divided by their sum.

    Raises:
        ValueError: nothing has changed.
    """
    changes: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for before, after in pairs:
        leaves = zip(parameter_paths(before), parameter_paths(after), strict=True)
        for (path, old), (_, new) in leaves:
            module = path.rpartition("/")[0] or path
            change = float(jnp.sum(jnp.abs(wide(new) - wide(old))))
            changes[module] = changes.get(module, 0.0) + change
            sizes[module] = sizes.get(module, 0) + new.size
    found = {module: change / sizes[module] for module, change in changes.items()}
    total = sum(found.values())
    if not total > 0:
        raise ValueError("no parameter has changed: the sensitivity of modules is of a training")
    return {module: value / total for module, value in found.items()}
