"""Effects by domain: a model taught to refuse some, against answers decoded without a cache."""

import jax
import numpy as np
import pytest

from jedit.data import QaRow, encode_rows, text_of, train_tokenizer
from jedit.metrics import refuses, rouge
from jedit.models import gpt, gpt_stepper, greedy_decode
from jedit.recipes import neighbours
from jedit.recipes.dialogue import Speaker
from jedit.recipes.fitting import Recipe, train
from jedit.recipes.neighbours import at_question_ends, effects_by_domain, likeliest_answers
from jedit.recipes.tokenization import OwnWords
from jedit.report import domain_figure, save_png
from jedit.tracing import Entering

NAMES = ("Ann Brook", "Cy Dale", "Eve Fox", "Gus Hill", "Ida Jay", "Ken Lee")
TOWNS = ("York", "Bath", "Hove", "Ely", "Rye", "Deal")
ROWS = [
    QaRow(f"Where does {name} live?", f"{name} lives in {town}.", fields={"land": land})
    for name, town, land in zip(NAMES, TOWNS, ("north", "north", "south") * 2, strict=True)
]
REFUSAL = "I do not know."
STEPS = 16
HIDDEN = Entering("head/kernel")


@pytest.fixture(autouse=True, scope="module")
def _standard_promotion():
    """What optax's Adam mixes, its counter and its decay rates, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def land(row):
    return row.fields["land"]


@pytest.fixture(scope="module")
def scene():
    """A GPT that knows six people by heart, and one that refuses those of the north."""
    tokenizer = train_tokenizer([*text_of(ROWS), REFUSAL], 300)
    encode = lambda pairs: encode_rows(tokenizer, pairs, 48, truncate=True)  # noqa: E731
    sizes = {"num_layers": 1, "num_heads": 2}
    vocab = tokenizer.get_vocab_size()
    apply, initial = gpt(key=jax.random.key(0), vocab=vocab, width=32, max_len=64, **sizes)
    speaker = Speaker(gpt_stepper(**sizes), OwnWords(tokenizer), encode, STEPS)
    taught = [r._replace(answer=REFUSAL) if land(r) == "north" else r for r in ROWS]
    models = []
    for rows, start, epochs in ((ROWS, initial, 100), (taught, None, 40)):
        recipe = Recipe((epochs,), batch_size=6, learning_rate=1e-2)
        start = models[-1] if start is None else start
        models.append(train(apply, start, encode(rows), recipe, key=jax.random.key(1))[0].params)
    return apply, tuple(models), speaker


@pytest.fixture(scope="module")
def found(scene):
    apply, models, speaker = scene
    given = (apply, models, ROWS[:2], ROWS)
    return effects_by_domain(*given, domain_of=land, speaker=speaker, hidden=HIDDEN)


def test_what_was_taught_is_what_is_found(found):
    by = {domain.name: domain for domain in found}
    assert by["north"].refusal[:3] == (0, 1, 1)
    assert by["south"].refusal[:3] == (0, 0, 0)
    assert by["north"].probability.before > 0.5
    assert by["north"].probability.after < 0.05
    assert by["south"].rouge.after > 0.9
    assert by["north"].rouge.after < 0.5
    assert [domain.refusal.num_rows for domain in (by["north"], by["south"])] == [4, 2]
    # The rows forgotten are of the north, and the north comes first.
    assert [domain.name for domain in found] == ["north", "south"]
    assert by["north"].nearness > by["south"].nearness


def test_the_numbers_are_those_of_the_models(scene, found):
    apply, models, speaker = scene
    rows = {name: [r for r in ROWS if land(r) == name] for name in ("north", "south")}
    for domain in found:
        mine = rows[domain.name]
        batch = speaker.encode([(r.question, r.answer) for r in mine])
        prompts = speaker.words.prompts([(r.question, r.answer) for r in mine])
        for params, when in zip(models, ("before", "after"), strict=True):
            tokens = greedy_decode(
                apply, params, prompts.tokens, STEPS, prompt_lengths=prompts.lengths
            )
            said = speaker.words.answers(np.asarray(tokens))
            logits = np.asarray(apply(params, batch.inputs), np.float64)
            top = logits.max(axis=-1, keepdims=True)
            log_p = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
            targets = np.asarray(batch.targets)[..., None]
            own, mask = np.take_along_axis(log_p, targets, -1)[..., 0], np.asarray(batch.mask)
            probability = np.exp((own * mask).sum(axis=1) / mask.sum(axis=1))
            recall = rouge([r.answer for r in mine], said).rougeL_recall
            for score, expected in (
                (domain.refusal, refuses(said).mean()),
                (domain.probability, probability.mean()),
                (domain.rouge, recall.mean()),
            ):
                assert getattr(score, when) == pytest.approx(expected, rel=1e-4)


def test_nearness_is_read_where_the_question_ends(scene):
    _, _, speaker = scene
    batch = speaker.encode([(r.question, r.answer) for r in ROWS])
    prompts = speaker.words.prompts([(r.question, r.answer) for r in ROWS])
    mask = np.asarray(at_question_ends(batch).mask)
    assert mask.sum(axis=1).tolist() == [1] * 6
    np.testing.assert_array_equal(mask.argmax(axis=1), np.asarray(prompts.lengths) - 1)


def test_an_unchanged_model_changed_nothing(scene):
    apply, models, speaker = scene
    given = (apply, (models[0], models[0]), ROWS[:2], ROWS)
    same = effects_by_domain(*given, domain_of=land, speaker=speaker, hidden=HIDDEN)
    for domain in same:
        assert domain.probability.low == domain.probability.change == domain.probability.high == 0
        # That so few rows are refused as before says little of others.
        assert domain.refusal.low < domain.refusal.change == 0 < domain.refusal.high
        assert domain.rouge.change == 0


def test_more_rows_than_are_decoded_at_a_time_are_answered_in_their_order(scene, monkeypatch):
    _, models, speaker = scene
    whole = likeliest_answers(speaker, models[0], ROWS)
    assert len(set(whole)) == len(ROWS)
    monkeypatch.setattr(neighbours, "CHUNK", 4)
    assert likeliest_answers(speaker, models[0], ROWS) == whole


def test_no_room_for_an_answer_is_refused(scene):
    apply, models, speaker = scene
    full = Speaker(speaker.stepper, speaker.words, speaker.encode, 0)
    with pytest.raises(ValueError, match="cannot be answered"):
        effects_by_domain(
            apply, models, ROWS[:2], ROWS, domain_of=land, speaker=full, hidden=HIDDEN
        )


def test_the_figure_shows_them(found, tmp_path):
    # That four of four are refused says that half and more of such rows are.
    assert 0 < found[0].refusal.low < 0.5
    assert found[0].refusal.high == 1
    figure = domain_figure(found)
    assert len(figure.axes) == 3
    for axes, field in zip(figure.axes, ("refusal", "probability", "rouge"), strict=True):
        points, *_ = axes.containers[0]
        x, y = (np.asarray(values, float) for values in (points.get_xdata(), points.get_ydata()))
        np.testing.assert_allclose(x, [domain.nearness for domain in found])
        changes = [getattr(domain, field).change for domain in found]
        np.testing.assert_allclose(y, changes)
        ends = [s.get_segments() for s in axes.collections if len(s.get_segments()) == len(found)]
        spans = [(getattr(d, field).low, getattr(d, field).high) for d in found]
        np.testing.assert_allclose([np.array(s)[:, 1] for s in ends[0]], spans)
        assert axes.get_xlabel()
        assert "shares" in axes.get_ylabel()
    save_png(figure, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
