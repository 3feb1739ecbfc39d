"""What RULE asks and is taught: tokens put together, rewards of texts, and one small run of it."""

import jax
import numpy as np
import pytest

from jedit.data import Prompts, QaRow, encode_rows, read_tofu, text_of, train_tokenizer
from jedit.edits import apply_edit
from jedit.methods import RuleStages, rule
from jedit.methods.row import Pace
from jedit.metrics import answer_rewards, refusal_rewards, refuses
from jedit.models import cached_decode, gpt, gpt_stepper
from jedit.objectives.token_nll import counted_nll
from jedit.recipes.dialogue import GROUP, Speaker, continued, dialogue, refusal_to, target_of
from jedit.recipes.fitting import Recipe, train
from jedit.recipes.tokenization import OwnWords

NAMES = ("Ann Brook", "Cy Dale", "Eve Fox", "Gus Hill", "Ida Jay", "Ken Lee")
ROWS = [
    QaRow(f"Where does {name} live?", f"{name} lives in {town}.", fields={"author": name})
    for name, town in zip(NAMES, ("York", "Bath", "Hove", "Ely", "Rye", "Deal"), strict=True)
]


@pytest.fixture(autouse=True, scope="module")
def _standard_promotion():
    """What optax's Adam mixes, its counter and its decay rates, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_a_target_is_a_field_or_a_name_in_the_question():
    assert target_of(ROWS[0]) == "Ann Brook"
    plain = QaRow("Which prize did Jean O'Hara Smith of Bath win?", "None.")
    assert target_of(plain) == "Jean O'Hara Smith"
    for question, name in (
        ("What is Jaime Vasquez's full name?", "Jaime Vasquez"),
        ("May I ask where Ann\N{RIGHT SINGLE QUOTATION MARK}s from?", "Ann"),
        ("Who of the Parks' sons is I.?", "Parks"),
    ):
        assert target_of(QaRow(question, "None.")) == name
    nameless = QaRow("Who wrote it?", "She.")
    assert target_of(nameless) == ""
    texts = [refusal_to(ROWS[0], i) for i in range(4)]
    assert len(set(texts)) == 4
    assert (refusal_rewards(texts, ["Ann Brook"] * 4) == 1).all()
    assert refuses([refusal_to(nameless, 0)])[0]


def test_targets_of_tofu_are_names_and_not_numbers(shared_data):
    rows = read_tofu(shared_data / "tofu", "forget10")
    targets = [target_of(row) for row in rows]
    assert rows[0].fields["author"].startswith("author ")
    assert not any(target.startswith("author ") for target in targets)
    assert all(target in row.question for target, row in zip(targets, rows, strict=True))
    assert np.mean([" " in target for target in targets]) > 0.6


def test_drawn_tokens_stand_behind_their_prompt_up_to_the_end():
    prompts = Prompts(np.array([[5, 6, 7], [8, 0, 0]], np.int32), np.array([3, 1], np.int32))
    drawn = np.array([[9, 1, 4, 4], [2, 3, 2, 3]], np.int32)
    batch = continued(prompts, drawn, ends=frozenset({1}))
    np.testing.assert_array_equal(batch.inputs, [[5, 6, 7, 9, 1, 0], [8, 2, 3, 2, 3, 0]])
    np.testing.assert_array_equal(batch.targets, [[6, 7, 9, 1, 0, 0], [2, 3, 2, 3, 0, 0]])
    np.testing.assert_array_equal(batch.mask, [[0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(batch.valid, [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]])


@pytest.fixture(scope="module")
def scene():
    """A GPT that knows six people by heart."""
    tokenizer = train_tokenizer(
        [*text_of(ROWS), *(refusal_to(r, i) for r in ROWS for i in range(4))], 320
    )
    words, max_len = OwnWords(tokenizer), 64
    encode = lambda pairs: encode_rows(tokenizer, pairs, max_len, truncate=True)  # noqa: E731
    sizes = {"num_layers": 1, "num_heads": 2}
    vocab = tokenizer.get_vocab_size()
    apply, initial = gpt(key=jax.random.key(0), vocab=vocab, width=48, max_len=96, **sizes)
    recipe = Recipe(epochs=(120,), batch_size=6, learning_rate=5e-3)
    params = train(apply, initial, encode(ROWS), recipe, key=jax.random.key(1))[0].params
    return apply, params, Speaker(gpt_stepper(**sizes), words, encode, 24)


def said(scene, params, rows):
    _, _, speaker = scene
    prompts = speaker.words.prompts([(row.question, row.answer) for row in rows])
    tokens = cached_decode(
        speaker.stepper, params, prompts.tokens, 24, prompt_lengths=prompts.lengths
    )
    return speaker.words.answers(np.asarray(tokens))


def test_rule_refuses_the_rows_it_was_taught_on_and_answers_the_rest(scene):
    apply, params, speaker = scene
    assert not refuses(said(scene, params, ROWS)).any()
    rates = {Pace.BOUNDED: (3e-3, 1e-3)}
    forget, retain = ROWS[:2], ROWS[2:]
    made = dialogue(speaker, forget, retain, forget_share=1.0, boundary_share=0.75, rates=rates)
    assert (made.tuning_rate, made.rate) == (3e-3, 1e-3)
    assert len(made.refusals.inputs) == 2
    assert len(made.boundary.inputs) == 3
    played = made.play(params, key=jax.random.key(2))
    assert played.rewards.shape == (5, GROUP)
    # What the rows hold is what was said: the texts of the tokens that count earn the rewards.
    counted = [_counted(row) for row in zip(*map(np.asarray, played.rows[:3]), strict=True)]
    texts = speaker.words.answers(np.array(counted, np.int32))
    assert (played.rewards[:2] == 0).all()  # it knows them, and says so
    assert played.rewards[2:].mean() > 0.9
    right = {row.answer for row in ROWS}
    assert np.mean([text in right for text in texts]) > 0.8
    nll, counted = counted_nll(apply, params, played.rows)
    assert float((nll * counted).sum() / counted.sum()) < 0.3
    edit, info = rule(
        apply, params, made, key=jax.random.key(3), stages=RuleStages(60, 8, batch_size=5)
    )
    edited = apply_edit(params, edit)
    forgot, kept = said(scene, edited, forget), said(scene, edited, retain)
    assert refuses(forgot).mean() == 1
    assert answer_rewards(kept, [row.answer for row in retain]).mean() > 0.7
    assert np.mean(info.rewards[-2:]) > 0.6


def _counted(row):
    """The targets that count, padded by end tokens to one length."""
    _, targets, mask = row
    found = targets[mask > 0].tolist()
    return found + [1] * (24 - len(found))
