"""TOFU on a pretrained model from a folder, and what it stands on: templates, words, precision."""

import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from jedit import metrics
from jedit.cli.main import main
from jedit.data import generate_authors
from jedit.methods.row import Pace
from jedit.models import cast_params, convert_llama2c, greedy_decode, load_model
from jedit.recipes.comparison.task import Grid
from jedit.recipes.fitting import Recipe
from jedit.recipes.tofu import presets as tofu_presets
from jedit.recipes.tofu import run as tofu_recipe
from jedit.recipes.tofu.evaluation import encode_questions, generate
from jedit.recipes.tofu.models import Pretrained, from_folders
from jedit.recipes.tofu.presets import Preset
from jedit.recipes.tofu.run import Sets, _rounded_away
from jedit.recipes.tokenization import load_words
from tests.llm.test_huggingface import change_config
from tests.llm.test_llama2c import toy_files

pytestmark = pytest.mark.usefixtures("standard_promotion")
TOY = Preset(
    authors=5,
    forgotten=2,
    questions=4,
    model=Pretrained(max_len=256, chunk=8),
    recipe=Recipe(epochs=(1,), batch_size=4, learning_rate=1e-3),
    grid=Grid(
        budgets=(0.05,),
        temperatures=(1.0,),
        damping=(0.1,),
        kfade_steps=(1,),
        methods=("K-FADE (K-FAC)", "K-FADE (EK-FAC)", "NPO"),
        rates=dict.fromkeys(Pace, (1e-3,)),
        looks=(2,),
        batch_size=4,
        kl_budget=1.0,
        utility_share=0.0,
    ),
)
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '<unk>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)


def leaves_of(params):
    return jax.tree_util.tree_leaves_with_path(params)


@pytest.fixture(scope="module")
def sets():
    rows = generate_authors(0, 8, 4)
    names = list(dict.fromkeys(row.fields["author"] for row in rows))
    of = [[row for row in rows if row.fields["author"] == name][:4] for name in names]
    # All of one size: what is compiled for one set serves the others.
    return Sets([*of[0][:2], *of[1][:2]], of[2], of[3], of[4], of[5], of[6])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama of two layers, with the bytes for a tokenizer; it needs no shared data."""
    made = tmp_path_factory.mktemp("toy")
    checkpoint, tokens = toy_files(made, tied=True)
    return change_config(
        convert_llama2c(checkpoint, tokens, made / "hf"), max_position_embeddings=512
    )


@pytest.fixture
def chatty(folder, tmp_path):
    """The same with a chat template, whose answers end in another token than texts do."""
    copy = shutil.copytree(folder, tmp_path / "chatty")
    path = copy / "tokenizer_config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | {"chat_template": TEMPLATE}))
    return copy


@pytest.mark.parametrize("has_template", [False, True])
def test_a_text_stands_by_itself(folder, chatty, has_template):
    words = load_words(chatty if has_template else folder)
    rows = words.rows([("", "Ann met Bob."), ("", "Bob")], spans=[[(8, 11)], []])
    encode = functools.partial(words.tokenizer.encode, add_special_tokens=False)
    for i, text in enumerate(["Ann met Bob.", "Bob"]):
        tokens = encode("<s>" + text)
        assert np.asarray(rows.inputs)[i, : len(tokens) - 1].tolist() == tokens[:-1]
        assert np.asarray(rows.targets)[i, : len(tokens) - 1].tolist() == tokens[1:]
    counted = np.asarray(rows.targets)[0][np.asarray(rows.mask)[0] > 0]
    assert words.tokenizer.decode(counted).strip() == "Bob"
    assert np.asarray(rows.mask)[1].sum() == len(encode("<s>Bob")) - 1  # all but the beginning


@pytest.mark.parametrize("has_template", [False, True])
def test_words_of_a_folder(folder, chatty, has_template):
    words = load_words(chatty if has_template else folder)
    pairs = [("Who?", "Ann."), ("Who was that again?", "It was Bob")]
    before = "<s>user:{}<unk><s>assistant:" if has_template else "<s>Question: {}\nAnswer: "
    end = "<unk>" if has_template else "</s>"
    encode = functools.partial(words.tokenizer.encode, add_special_tokens=False)
    rows, prompts = words.rows(pairs), words.prompts(pairs)
    for i, (question, answer) in enumerate(pairs):
        counted = np.asarray(rows.targets)[i][np.asarray(rows.mask)[i] > 0]
        assert words.tokenizer.decode(counted).strip() == answer + end
        asked = prompts.tokens[i, : prompts.lengths[i]].tolist()
        # This tokenizer puts a space behind a special token.
        text = "".join(words.tokenizer.decode(asked).split())
        assert text == "".join(before.format(question).split())
        assert [*asked, *counted.tolist()] == encode(before.format(question) + answer + end)
    said = [[*encode("Ann. "), token, *encode("and more")] for token in sorted(words.ends)]
    assert words.ends == ({0, 2} if has_template else {2})
    assert words.answers(np.array(said, np.int32)) == ["Ann."] * len(said)
    assert words.rows(pairs, 12).inputs.shape == (2, 11)


def test_no_tokenizer_is_said(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no tokenizer could be read there; name .* --tokenizer"):
        load_words(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"no config\.json"):
        from_folders(tmp_path / "empty", None, folder, TOY.model, "float32")


def test_half_precision_is_computed_in_and_not_kept(folder):
    apply, narrow, _ = load_model(folder, dtype=jnp.bfloat16)
    begin = from_folders(folder, folder, None, TOY.model, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(begin.params)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(assert_array_equal, cast_params(begin.retrained, jnp.bfloat16), narrow)
    tokens = np.random.default_rng(0).integers(3, 260, (2, 9))
    got = begin.model.apply(begin.params, tokens)
    assert got.dtype == jnp.float32
    assert_array_equal(got, apply(narrow, tokens))
    # A step that bfloat16 would swallow is kept.
    small = jax.tree.map(lambda leaf: leaf * (1 + 2.0**-10), begin.params)
    jax.tree.map(assert_array_equal, cast_params(small, jnp.bfloat16), narrow)
    assert all(map(np.any, jax.tree.leaves(jax.tree.map(jnp.not_equal, small, begin.params))))

    assert _rounded_away(begin.model, begin.params, small) == 1
    large = jax.tree.map(lambda leaf: leaf * 1.25, begin.params)
    assert 0 <= _rounded_away(begin.model, begin.params, large) < 0.02
    prompts = begin.model.words.prompts([("Who?", "Ann."), ("And who else?", "Bob.")])
    kept, cast = (generate(begin.model, p, prompts, 5) for p in (begin.params, narrow))
    assert kept == cast

    paths = {jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in leaves_of(narrow)}
    assert begin.layers == ("layers/0/mlp/down_proj/kernel", "layers/1/mlp/down_proj/kernel")
    assert paths.issuperset({begin.hidden_site, *begin.layers})
    assert sum(re.search(begin.select, path) is not None for path in paths) == 2 * 7


def test_two_models_of_one_shape(folder, tmp_path):
    checkpoint, tokens = toy_files(tmp_path, tied=False)
    other = convert_llama2c(checkpoint, tokens, tmp_path / "untied")
    with pytest.raises(ValueError, match=r"differ in lm_head/w; --retrained is the same one"):
        from_folders(folder, other, None, TOY.model, "float32")


def test_answers_of_a_folder_are_those_of_whole_passes(stories_folder, stories_model, sets):
    apply, params, _ = stories_model
    model = from_folders(stories_folder, None, None, TOY.model, "float32").model
    asked = encode_questions(model, sets.forget[:3])
    got = generate(model, params, asked.prompts, 12)
    want = greedy_decode(
        apply, params, asked.prompts.tokens, 12, prompt_lengths=asked.prompts.lengths
    )
    assert got == model.words.answers(np.asarray(want))
    assert all(got)


@pytest.mark.reuses_keys
def test_the_command_from_end_to_end(folder, sets, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tyro")
    monkeypatch.setattr(tofu_recipe, "read_sets", lambda *_: sets)
    monkeypatch.setitem(tofu_presets.PRESETS, "checkpoint", TOY)
    out = tmp_path / "out"
    given = ["tofu", "--preset", "checkpoint", "--model", str(folder), "--out", str(out)]
    assert main([*given, "--save", "NPO"]) == 0
    (found,) = json.loads((out / "results.json").read_text())["comparisons"]
    methods = ["K-FADE (K-FAC)", "K-FADE (EK-FAC)", "NPO"]
    assert list(found["leaderboard"]) == ["untouched", "retrained", *methods]
    assert set(found["seconds"]) == {"train", "retrain", "fit, edit, judge and attack"}
    for name, row in found["leaderboard"].items():
        assert all(value is not None and np.isfinite(value) for value in row.values()), name
    assert found["leaderboard"]["retrained"]["mia_reference"] == 0.5
    # What was saved is what was judged.
    apply, params, _ = load_model(tmp_path / "out-edited")
    encoded = load_words(folder).rows([(row.question, row.answer) for row in sets.forget])
    loss = metrics.answer_nll_per_row(apply, params, encoded)
    assert np.mean(metrics.answer_probability(loss)) == pytest.approx(
        found["leaderboard"]["NPO"]["forget_Q_A_Prob"], rel=1e-4
    )
    capsys.readouterr()
    assert main([*given, "--save", "NPO"]) == 2
    assert "out-edited: is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--preset", "checkpoint"], "needs --model: the folder of a pretrained model"),
        (["--model", "."], "--model goes with --preset checkpoint; the preset cpu makes a model"),
        (["--retrained", "."], "--retrained goes with --preset checkpoint --model DIR"),
        (["--save", "NPO"], "--save goes with --preset checkpoint --model DIR"),
        (["--preset", "checkpoint", "--model", "/no/such"], "/no/such: there is no such folder"),
        (["--preset", "checkpoint", "--model", ".", "--save", "NOP"], "--save NOP: is not run"),
        (["--preset", "checkpoint", "--model", "{out}/m"], "lies within --out, which is replaced"),
        (["--preset", "checkpoint", "--model", "{empty}"], "no tokenizer could be read there"),
    ],
)
def test_options_that_do_not_go_together(given, message, tmp_path, monkeypatch, sets, capsys):
    pytest.importorskip("tyro")
    monkeypatch.setattr(tofu_recipe, "read_sets", lambda *_: sets)
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    if "{out}/m" in given:
        (out / "m").mkdir(parents=True)
        monkeypatch.setattr("jedit.cli.tofu.check_out", lambda _: None)
    given = [text.format(out=out, empty=empty) for text in given]
    assert main(["tofu", "--out", str(out), *given]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
