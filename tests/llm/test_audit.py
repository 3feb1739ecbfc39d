"""`jedit audit` of real folders, and what it reads in their layers."""

import hashlib
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from jedit.core.batch import Batch
from jedit.data import write_rows
from jedit.models import load_model, save_model
from jedit.objectives.token_nll import counted_nll
from jedit.recipes.audit import depth
from jedit.recipes.audit.folders import difference, hashed, open_models, same_weights
from jedit.recipes.audit.rows import Rows
from jedit.recipes.tofu.evaluation import LanguageModel
from jedit.recipes.tokenization import load_words
from jedit.report.audit_results import Outcome
from tests.llm.random_folder import write_random
from tests.llm.test_forget_command import ROWS, UNSEEN

pytestmark = pytest.mark.usefixtures("standard_promotion")
FAMILIES = ("llama", "gemma2", "qwen3_moe")


@pytest.fixture(scope="module", params=FAMILIES)
def random_folder(request, tmp_path_factory):
    return write_random(request.param, tmp_path_factory.mktemp("random") / request.param)


def cut_to(folder, layers, out):
    """The same folder without its last layers."""
    out.mkdir()
    tensors = load_file(folder / "model.safetensors")
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not (match := re.search(r"layers\.(\d+)\.", name)) or int(match[1]) < layers
    }
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = layers
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_the_lens_is_the_model_without_its_later_layers(random_folder, tmp_path):
    apply, params, _ = load_model(random_folder)
    tokens = np.random.default_rng(0).integers(0, 37, (2, 7))
    assert depth.num_layers(params) == 2
    lens = depth.lens(apply)
    cut, kept, _ = load_model(cut_to(random_folder, 1, tmp_path / "cut"))
    after_one = lens((params, jnp.int32(1)), tokens)
    np.testing.assert_allclose(after_one, cut(kept, tokens), atol=1e-4)
    whole = apply(params, tokens)
    np.testing.assert_allclose(lens((params, jnp.int32(2)), tokens), whole, atol=1e-5)
    assert float(jnp.max(jnp.abs(after_one - whole))) > 0.1


def asked_of(apply, number=6, seq=7):
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 37, (number, seq + 1))
    mask = np.broadcast_to(np.arange(seq) >= 3, (number, seq)).astype(np.float32)
    whole = Batch(*(jnp.asarray(x) for x in (tokens[:, :-1], tokens[:, 1:], mask, mask * 0 + 1)))
    model = LanguageModel(apply, None, None, 16, 16)
    return model, Rows([None] * number, whole, [whole], None, 1, None)


def test_the_depth_score_of_the_two_ends(random_folder):
    apply, params, config = load_model(random_folder)
    never = jax.tree.map(lambda x: x + 0.3 * jnp.sin(7 * x), params)
    model, asked = asked_of(apply)
    finding, found = depth.depth_finding(model, params, never, never, asked)
    if config.model_type != "llama":
        assert finding.outcome is Outcome.NOT_MEASURED
        return
    assert found.value == pytest.approx(1)
    finding, found = depth.depth_finding(model, params, params, never, asked)
    assert found.value == pytest.approx(0)
    assert finding.outcome is Outcome.FAILED


def test_states_and_probes_by_layer(random_folder):
    apply, params, _ = load_model(random_folder)
    model, asked = asked_of(apply)
    states = depth.states_of(model, params, asked)
    assert states.shape == (3, 6, 16)
    # What enters the last matrix, by hand: the head's own outputs give it away, it is linear.
    head = params["embedder"]["input_embedding"]
    logits = np.asarray(apply(params, asked.whole.inputs))[:, 3:].mean(axis=1)
    if "llama" in str(random_folder):
        np.testing.assert_allclose(states[2] @ np.asarray(head).T, logits, atol=1e-3)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 40, 16))
    apart = np.stack([noise[0] + 3, noise[1]])
    far, near = depth.probed(apart, rng.normal(size=(2, 40, 16)))
    assert far.value == 1
    assert near.low < 0.5 < near.high


@pytest.fixture(scope="module")
def edited_folder(stories_folder, stories_model, tmp_path_factory):
    """The stories' model after one step up the loss of four rows."""
    apply, params, _ = stories_model
    rows = load_words(stories_folder).rows([(row.question, row.answer) for row in ROWS[:4]])
    loss = lambda p: counted_nll(apply, p, rows)[0].sum()  # noqa: E731
    gradient = jax.grad(loss)(params)
    length = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(gradient)))
    edited = jax.tree.map(lambda x, g: x + 0.3 * g / length, params, gradient)
    return save_model(edited, tmp_path_factory.mktemp("audit") / "edited", source=stories_folder)


def test_two_folders_from_the_command_line(stories_folder, edited_folder, tmp_path, capsys):
    pytest.importorskip("tyro")
    from jedit.cli.main import main

    data, unseen = tmp_path / "rows.jsonl", tmp_path / "unseen.jsonl"
    rows = [row._replace(fields={"half": i % 2}) for i, row in enumerate(ROWS)]
    write_rows(data, rows)
    write_rows(unseen, UNSEEN)
    given = ["--base", stories_folder, "--edited", edited_folder, "--data", data]
    given += ["--unseen", unseen, "--out", tmp_path / "out", "--group", "half"]
    given += ["--forget", "rows=0:4", "--rates", "1e-3", "--budget", "0.5", "--max-len", "64"]
    assert main(["audit", *map(str, given)]) == 0
    printed = capsys.readouterr().out
    assert "What is forgotten?" in printed
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert [section["name"] for section in found["sections"]] == [
        *("forgotten", "membership", "depth", "comeback", "cost")
    ]
    rules = {f["rule"]: f for section in found["sections"] for f in section["findings"]}
    assert rules["depth_score"]["outcome"] == "not_measured"
    # Four rows prove nothing, and nobody taught the model these.
    assert rules["known"]["outcome"] == "undecided"
    assert "4 rows prove nothing" in rules["known"]["sentence"]
    assert rules["probability"]["outcome"] == "not_measured"
    assert found["overall"]["outcome"] == "undecided"
    assert found["overall"]["sentence"].startswith("Whether there was anything to forget")
    assert rules["retain_kl"]["outcome"] == "undecided"
    measures = {m["name"]: m["models"] for s in found["sections"] for m in s["measures"]}
    assert measures["kl"]["edited"]["value"] > 0
    told = found["sections"][-1]
    groups = {m["name"]: m["models"]["near"]["value"] for m in told["groups"]}
    assert {d["name"]: d["nearness"] for d in told["curves"]["neighbours"]} == groups
    assert sum(groups.values()) == pytest.approx(0, abs=1e-6)  # of two, one is the other turned
    page = (tmp_path / "out" / "index.html").read_text()
    assert "over how near the group is to the rows to forget" in page
    assert measures["probability"]["edited"]["value"] < measures["probability"]["base"]["value"]
    lens = found["sections"][2]["curves"]["lens"]
    assert lens["edited"][-1]["value"] == pytest.approx(
        measures["probability"]["edited"]["value"], rel=1e-3
    )
    assert "erased" not in rules  # D+ and D- are shown and judge nothing
    for name in ("erased_influence", "hidden_influence"):
        assert np.isfinite(measures[name]["edited"]["value"])
    again = found["sections"][3]["curves"]["relearning"]
    assert set(again) == {"edited", "unseen"}
    assert again["edited"]["steps"] == [0, 2, 8, 16]
    weights = hashlib.sha256((edited_folder / "model.safetensors").read_bytes()).hexdigest()
    folders = {folder["role"]: folder for folder in found["folders"]}
    assert folders["edited"]["files"]["model.safetensors"][1] == weights
    assert len(found["rows"][0]["hashes"]) == 4
    assert found["versions"]["jax"]
    for name in ("index.html", "audit.json"):
        text = (tmp_path / "out" / name).read_text()
        assert "Lily" not in text  # no text of any row
        assert (tmp_path / "out" / "salt.txt").read_text().strip() not in text
    assert page.count('<img class="figure"') == 4


def test_a_destroyed_folder_is_audited_to_the_end(stories_folder, stories_model, tmp_path):
    pytest.importorskip("tyro")
    from jedit.cli.main import main

    broken = jax.tree.map(lambda x: jnp.nan * x, stories_model[1])
    edited = save_model(broken, tmp_path / "edited", source=stories_folder)
    data, unseen = tmp_path / "rows.jsonl", tmp_path / "unseen.jsonl"
    write_rows(data, [row._replace(fields={"who": f"Lily{i % 2}"}) for i, row in enumerate(ROWS)])
    write_rows(unseen, UNSEEN)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "salt.txt").write_text("ab" * 32 + "\n")  # an earlier audit's, kept
    given = ["--base", stories_folder, "--edited", edited, "--data", data, "--unseen", unseen]
    given += ["--out", tmp_path / "out", "--forget", "who=Lily1", "--rates", "1e-3"]
    assert main(["audit", *map(str, given), "--max-len", "64", "--rows", "6"]) == 0
    text = (tmp_path / "out" / "audit.json").read_text()
    found = json.loads(text)
    assert "not finite" in found["difference"]
    rules = {f["rule"]: f for section in found["sections"] for f in section["findings"]}
    assert rules["relearning"]["outcome"] == "not_measured"
    assert (tmp_path / "out" / "salt.txt").read_text().strip() == "ab" * 32
    assert "who=..." in found["command"]
    assert "Lily1" not in text
    if found["rows"][1]["given"] >= 5:
        assert rules["retain_kl"]["outcome"] == "failed"


def changed(folder, out, **settings):
    """A copy with another configuration."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text()) | settings
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_folders_of_other_models_are_refused(stories_folder, tmp_path):
    def refusal(edited, match):
        with pytest.raises(ValueError, match=match):
            open_models({"base": stories_folder, "edited": edited}, None, 64, 4)

    refusal(write_random("qwen2", tmp_path / "qwen2"), "a model of the family qwen2, .* of llama")
    refusal(changed(stories_folder, tmp_path / "v", vocab_size=600), "a vocabulary of 600 tokens")
    eps = changed(stories_folder, tmp_path / "e", rms_norm_eps=0.5)
    refusal(eps, "differs in rms_norm_eps")
    broken = changed(stories_folder, tmp_path / "b")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    refusal(broken, "final_norm")
    words = changed(stories_folder, tmp_path / "w")
    tokenizer = json.loads((words / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (words / "tokenizer.json").write_text(json.dumps(tokenizer))
    refusal(words, "its tokenizer is not that of")
    (words / "config.json").write_text('{"model_type": ')
    refusal(words, "w: its config.json cannot be read")
    padded = changed(stories_folder, tmp_path / "p")
    tokenizer = transformers.AutoTokenizer.from_pretrained(padded)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(padded)
    assert open_models({"base": stories_folder, "edited": padded}, None, 64, 4).dtype == jnp.float32
    empty = tmp_path / "empty"
    empty.mkdir()
    refusal(empty, "empty")


def test_what_does_not_compute_may_differ_and_the_widest_dtype_is_read(stories_folder, tmp_path):
    other = changed(stories_folder, tmp_path / "o", transformers_version="1.0", use_cache=False)
    models = open_models({"base": stories_folder, "edited": other}, None, 64, 4)
    assert models.dtype == jnp.float32
    assert "llama, 2" in models.description
    one, two = (hashed(role, folder, "") for role, folder in models.folders.items())
    assert same_weights(one, two)
    assert one.sha256 != two.sha256  # their configurations are not the same bytes
    params = models.load("base")
    assert difference(params, models.load("edited"))[0] == 0
    broken = jax.tree.map(lambda x: jnp.nan * x, params)
    relative, sentence = difference(params, broken)
    assert relative == float("inf")
    assert "hold numbers that are not finite" in sentence
    half = jax.tree.map(lambda x: 0.5 * x, params)
    relative, sentence = difference(params, half)
    assert relative == pytest.approx(0.5)
    assert "differ from the original ones, by 50.00%" in sentence
