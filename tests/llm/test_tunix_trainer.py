"""Every transform of the contract table in tunix's trainer."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

from jedit.transforms import with_update_args
from tests.tracing.oracle import user_rules
from tests.transforms import test_training_loops as loops
from tests.transforms.training_loops import Loop, flax_nnx, nnx_model

# tunix's trainer uses a name that optax has moved.
pytestmark = pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated:DeprecationWarning")


@pytest.fixture(scope="module", name="library")
def _library():
    with user_rules():
        loop = tunix()
        return loop, loops.curvature_of(loop)


def tunix() -> Loop:
    """`PeftTrainer`, whose optimizer is `nnx.Optimizer` without further arguments."""
    apply, tree, named, _ = flax_nnx()

    def run(arrays, transform, extras, gradient, steps):
        model, traces, seen = nnx_model(tree(arrays)), [], []

        def loss_fn(model, rows):
            del rows
            traces.append(1)
            return gradient.loss(model)

        def look():
            params = nnx.as_pure(nnx.state(model, nnx.Param))
            seen.append(named(jax.tree.map(jnp.copy, params)))

        def batches():
            for k in range(steps):
                if k:
                    look()
                yield {"rows": gradient.forget.inputs}

        config = TrainingConfig(eval_every_n_steps=steps + 1, max_steps=steps)
        trainer = PeftTrainer(model, with_update_args(transform, extras), config)
        trainer.with_loss_fn(loss_fn).train(batches())
        look()
        return seen, len(traces)

    return Loop(apply, tree, named, run)


@pytest.mark.parametrize("name", loops.ROWS)
def test_a_transform_in_tunix_s_trainer(name, library, tolerance):
    with user_rules():
        loops.check_row(name, library, tolerance)
