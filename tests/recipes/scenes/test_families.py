"""The family scene: what is decayed, whom probes are fitted to and judged by, what a state is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.paths import parameter_paths
from jedit.recipes.scenes import families as scene
from jedit.recipes.scenes.families import Room, Size, Training

SIZE = Size(families=16, width=16, layers=2, steps=30, batch_size=64)


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """What optax's Adam mixes, its counter and its decay rates, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def found(standard_promotion) -> Room:
    del standard_promotion
    return scene.room(0, Training(0.0), SIZE)


def test_all_but_the_norms_decay(found):
    marks = {path: mark for path, mark in parameter_paths(scene._decayed(found.params))}
    assert not marks["norm/scale"]
    assert not marks["blocks/0/attn_norm/bias"]
    assert not marks["blocks/1/mlp_norm/scale"]
    rest = {path for path, mark in marks.items() if not mark}
    assert all("norm/" in path for path in rest)
    assert marks["embed/embedding"]
    assert marks["blocks/0/mlp/down/bias"]


def test_weight_decay_shrinks_and_one_function_serves_all(found):
    decayed = scene.room(0, Training(3.0), SIZE)
    assert decayed.apply is found.apply

    def size(room):
        return sum(
            float(jnp.sum(x**2)) for p, x in parameter_paths(room.params) if "norm/" not in p
        )

    assert size(decayed) < size(found)
    assert np.array_equal(decayed.families.facts, found.families.facts)


def test_reversed_text_is_read_with_relations_of_its_own():
    """What is told both ways can be asked both ways, and is more to learn."""
    few = Size(families=4, width=32, layers=1, steps=250, batch_size=64)
    both = scene.room(0, Training(0.0, both_ways=True), few)
    facts = both.families.facts[~both.families.is_withheld]
    assert both.said(facts) > 0.8
    assert both.said(scene.backwards(facts)) > 0.5


def test_a_state_is_of_who_alone(found):
    people = np.array([20, 33])
    site = "blocks/0/attn/query/kernel"
    states = scene.states_of(found, people, site)
    assert states.shape == (2, 16)
    # By hand: the embedding and the first position, normalised.
    x = found.params["embed"]["embedding"][people] + found.params["positions"][:1]
    norm = found.params["blocks"]["0"]["attn_norm"]
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(states, x * norm["scale"][None] + norm["bias"][None], atol=1e-5)


def test_probes_are_judged_by_families_that_chose_nothing(found, monkeypatch):
    seen = []
    people_of = scene._people

    def watched(families, numbers):
        seen.append(tuple(numbers.tolist()))
        return people_of(families, numbers)

    monkeypatch.setattr(scene, "_people", watched)
    result = scene.probed(found, ridges=(0.1, 1.0))
    fitted, chosen, judged = set(seen[0]), set(seen[1]), set(seen[-1])
    assert (len(fitted), len(chosen), len(judged)) == (4, 2, 2)
    assert not fitted & chosen
    assert not judged & (fitted | chosen)
    lost = set(found.families.family[found.families.is_withheld].tolist())
    assert not lost & (fitted | chosen | judged)
    assert result.structure.direct.shape == (8,)
    assert result.layer in scene._layers(found)


def test_too_few_families_to_probe_are_told(found):
    families = scene.make_families(0, 4)
    with pytest.raises(ValueError, match="2 of 4 have no withheld facts; give more families"):
        scene.probed(found._replace(families=families))
