"""A pretrained model from a folder: what capture and a closed-form edit see of it, and back."""

import json
import re
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from numpy.testing import assert_allclose, assert_array_equal

import jedit
from jedit.models import convert_llama2c, load_model, save_model, with_lora
from tests.llm import llama2c_reference as reference
from tests.llm.test_llama2c import toy_files

FORGET = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside.",
    "Lily's mom said, let's go to the park. Lily was sad and didn't know what to do.",
]
RETAIN = [
    "One day, a big dog saw a red ball on the road. He wanted to play with it.",
    "Tom and Sam were friends. They liked to run and jump in the green grass.",
    "The sun was hot. The cat sat in the shade and drank some cold water.",
    "There was a small bird. It could not fly, so it asked the old owl for help.",
]


@pytest.fixture
def toy(tmp_path):
    """A folder with a random model; the tests change its configuration."""
    checkpoint, tokens = toy_files(tmp_path, tied=True)
    return convert_llama2c(checkpoint, tokens, tmp_path / "toy")


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def batch_of(tokenizer, texts, width=28):
    rows = np.zeros((len(texts), width + 1), np.int32)
    valid = np.zeros((len(texts), width), np.float32)
    for i, text in enumerate(texts):
        ids = tokenizer.encode(text).ids[: width + 1]
        rows[i, : len(ids)] = ids
        valid[i, : len(ids) - 1] = 1
    valid = jnp.asarray(valid)
    return jedit.Batch(jnp.asarray(rows[:, :-1]), jnp.asarray(rows[:, 1:]), valid, valid)


def test_right_padding_changes_nothing_before_it(stories_model):
    apply, params, _ = stories_model
    tokens = np.random.default_rng(0).integers(1, 512, (2, 12))
    padded = np.concatenate([tokens, np.full((2, 5), 7)], axis=1)
    got, want = np.asarray(apply(params, padded)), np.asarray(apply(params, tokens))
    # Sums of float32 over another number of keys, most of them masked.
    assert_allclose(got[:, :12], want, rtol=0, atol=1e-5 * np.abs(want).max())
    moved = tokens.copy()
    moved[:, 5] += 1
    changed = np.abs(np.asarray(apply(params, moved % 512)) - want).max(axis=(0, 2))
    assert changed[:5].max() == 0
    assert changed[5:].min() > 1e-3


def test_capture_covers_every_matrix(stories_model):
    apply, params, _ = stories_model
    sites = jedit.find_sites(apply, params, jnp.ones((2, 6), jnp.int32))
    assert not sites.uncovered, str(sites)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = {jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in leaves}
    assert set(sites.covered) == names
    kinds = {site.name: site.kind for site in sites.values()}
    matrices = {p for p in names if re.search("_proj", p)}
    assert len(matrices) == 5 * 7
    assert {kinds[path] for path in matrices} == {"dense"}
    assert kinds["embedder/input_embedding"] == "embedding"
    assert kinds["embedder/input_embedding#1"] == "dense"


def test_a_closed_form_edit_survives_the_folder(stories, stories_folder, tmp_path, key):
    apply, params, _ = load_model(stories_folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(stories_folder / "tokenizer.json"))
    forget, retain = batch_of(tokenizer, FORGET), batch_of(tokenizer, RETAIN)
    likelihood = jedit.likelihoods.Categorical()
    estimator = jedit.kfac(apply, likelihood, select=r"layers/[34]/mlp")
    curvature = jedit.estimate(estimator, params, [retain], key=key)
    ascent = jedit.methods.Ascent(2)
    given = (apply, params, curvature, forget, retain)
    edit, _ = jedit.methods.kfade(*given, budget=0.01, ascent=ascent)
    edited = jedit.apply_edit(params, edit)
    changed = {path for path, norm in jedit.edit_norms(edit).items() if norm > 0}
    assert changed == {
        f"layers/{i}/mlp/{n}_proj/kernel" for i in (3, 4) for n in ("gate", "up", "down")
    }

    def loss(weights, batch):
        chosen = jax.nn.log_softmax(apply(weights, batch.inputs))
        picked = jnp.take_along_axis(chosen, batch.targets[..., None], axis=-1)[..., 0]
        return float(-jnp.sum(picked * batch.mask) / jnp.sum(batch.mask))

    assert loss(edited, forget) > loss(params, forget) + 0.05
    assert abs(loss(edited, retain) - loss(params, retain)) < 0.05

    folder = save_model(edited, tmp_path / "edited", source=stories_folder)
    apply_again, again, _ = load_model(folder)
    jax.tree.map(assert_array_equal, edited, again)
    want = np.asarray(apply(edited, forget.inputs))
    assert_array_equal(np.asarray(apply_again(again, forget.inputs)), want)
    assert {f.name for f in folder.iterdir()} == {f.name for f in stories_folder.iterdir()}
    # Not only jedit's own reading: the edited matrices lie in the file as run.c's reference has it.
    header, tensors = reference.read(stories / "checkpoint_legacy.bin")
    for i in (3, 4):
        mlp = edited["layers"][str(i)]["mlp"]
        for name, ours in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            tensors[name] = tensors[name].copy()
            tensors[name][i] = np.asarray(mlp[ours]["kernel"], np.float64).T
    row = np.asarray(forget.inputs[0])
    assert_allclose(
        np.asarray(apply_again(again, row[None]))[0],
        reference.logits(header, tensors, row),
        rtol=0,
        atol=1e-4,
    )


def test_half_precision_says_what_it_rounds_away(stories_folder, tmp_path):
    apply, params, _ = load_model(stories_folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    tokens = jnp.ones((1, 4), jnp.int32)
    assert apply(params, tokens).dtype == jnp.float32

    path = "layers/0/mlp/up_proj/kernel"
    weight = params["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    noise = np.random.default_rng(0).normal(size=weight.shape)
    for size in (1e-5, 1e-2):
        delta = size * np.abs(np.asarray(weight, np.float64)) * noise
        edit = jedit.Edit({path: jnp.asarray(delta, jnp.float32)})
        edited = jedit.apply_edit(params, edit)
        report = jedit.cast_report(params, edit)[path]
        old = np.asarray(weight, np.float64)
        arrived = np.asarray(edited["layers"]["0"]["mlp"]["up_proj"]["kernel"], np.float64) - old
        lost = np.linalg.norm(delta - arrived) / np.linalg.norm(delta)
        assert_allclose(float(report.rounded_away), lost, rtol=1e-4)
        assert_allclose(float(report.swallowed), np.mean(arrived == 0), rtol=1e-6)
        assert (float(report.swallowed) > 0.99) is (size == 1e-5)

    folder = save_model(edited, tmp_path / "half", source=stories_folder)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    _, again, _ = load_model(folder)
    jax.tree.map(assert_array_equal, edited, again)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "bloom", "architectures": ["BloomForCausalLM"]}, "BloomForCausalLM .* not"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        ({"tie_word_embeddings": False}, "no tensors for lm_head.w"),
        ({"num_hidden_layers": 3}, r"no tensors for layers\.2\.attn\.k_proj\.w"),
        ({"vocab_size": 261}, r"embedder.input_embedding has shape \(260, 8\)"),
        ({"head_dim": 3}, "has not the shape of config.json"),
    ],
)
def test_what_is_not_supported(toy, fields, message):
    with pytest.raises(ValueError, match=message):
        load_model(change_config(toy, **fields))


def test_no_folder_of_a_model(tmp_path, toy):
    with pytest.raises(ValueError, match="no such folder"):
        load_model(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(tmp_path / "empty")
    (toy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no safetensors file"):
        load_model(toy)


def test_what_cannot_be_saved(toy, tmp_path):
    _, params, _ = load_model(toy)
    save = partial(save_model, source=toy)
    with pytest.raises(ValueError, match="a folder of its own"):
        save(params, toy)
    with pytest.raises(ValueError, match=r"in one only: \['extra'\]"):
        save({**params, "extra": jnp.ones(3, jnp.float32)}, tmp_path / "a")
    with pytest.raises(ValueError, match=r"final_norm\.w has shape \(3,\)"):
        save({**params, "final_norm": {"w": jnp.ones(3, jnp.float32)}}, tmp_path / "a")
    mixed = {**params, "final_norm": {"w": jnp.ones(8, jnp.bfloat16)}}
    with pytest.raises(ValueError, match="weights of one dtype"):
        save(mixed, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").mkdir()
    shutil.copyfile(toy / "model.safetensors", tmp_path / "b" / "old.safetensors")
    with pytest.raises(ValueError, match=r"other weights already: old\.safetensors"):
        save(params, tmp_path / "b")


@pytest.mark.usefixtures("unchecked_annotations")
def test_tokens_have_two_axes(toy):
    apply, params, _ = load_model(toy)
    with pytest.raises(ValueError, match=r"tokens must be \(batch, seq\)"):
        apply(params, np.arange(3))


def test_adapters_of_a_pretrained_model(stories_folder, stories_model, tmp_path, key):
    apply, params, _ = stories_model
    tokens = np.random.default_rng(0).integers(1, 512, (2, 8))
    adapted = with_lora(apply, params, tokens, rank=2, key=key, select=r"layers/[04]/.*_proj")
    assert_array_equal(adapted.apply(adapted.params, tokens), apply(params, tokens))
    sites = jedit.find_sites(adapted.apply, adapted.params, tokens, "^lora/")
    assert not sites.uncovered, str(sites)
    assert {site.kind for site in sites.values()} == {"dense"}
    assert len(sites) == 2 * 2 * 7

    noise = np.random.default_rng(1)
    lora = jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * noise.normal(size=leaf.shape), leaf.dtype),
        adapted.params["lora"],
    )
    moved = {**adapted.params, "lora": lora}
    folder = save_model(adapted.merge(moved), tmp_path / "merged", source=stories_folder)
    apply_again, merged, _ = load_model(folder)
    want = np.asarray(jax.jit(adapted.apply)(moved, tokens))
    assert np.abs(want - np.asarray(apply(params, tokens))).max() > 0.1
    assert_allclose(np.asarray(apply_again(merged, tokens)), want, rtol=0, atol=1e-4)
