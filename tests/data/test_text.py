"""Tokens, masks and batches, worked by hand."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from jedit.core.batch import Batch
from jedit.data import (
    QaRow,
    batches,
    decode_answers,
    encode_rows,
    generate_authors,
    prompts_of,
    text_of,
    train_tokenizer,
)

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def words():
    """A tokenizer whose tokens can be counted by eye: one per word, a space in front or not."""
    tokenizer = train_tokenizer([], 258)
    vocabulary = ["<pad>", "<eos>", "who", "is", "it", "?", "Ġbo", "Ġa", "Ġcat"]
    model = tokenizers.models.WordLevel(
        {word: i for i, word in enumerate(vocabulary)}, unk_token="?"
    )
    tokenizer.model = model
    return tokenizer


@pytest.fixture(scope="module")
def rows():
    return generate_authors(0, 10, 6)


@pytest.fixture(scope="module")
def tokenizer(rows):
    return train_tokenizer(text_of(rows), 600)


def test_masks_by_hand(words):
    """The tokens are 2 5 | 7 8 1 and 3 5 | 6 1, with | before the answer."""
    encoded = encode_rows(words, [("who?", "a cat"), ("is?", "bo")], 7)
    assert_array_equal(encoded.inputs, [[2, 5, 7, 8, 0, 0], [3, 5, 6, 0, 0, 0]])
    assert_array_equal(encoded.targets, [[5, 7, 8, 1, 0, 0], [5, 6, 1, 0, 0, 0]])
    assert_array_equal(encoded.mask, [[0, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0]])
    assert_array_equal(encoded.valid, [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
    assert encoded.inputs.dtype == encoded.targets.dtype == np.int32
    assert encoded.mask.dtype == encoded.valid.dtype == np.float32


def test_only_the_marked_tokens_count(words):
    """Of "a cat" the second word, of "bo" all, of "a cat" a character of each."""
    rows = [("who?", "a cat"), ("is?", "bo"), ("who?", "a cat")]
    encoded = encode_rows(words, rows, 7, spans=[[(2, 5)], [], [(0, 1), (4, 5)]])
    assert_array_equal(encoded.mask, [[0, 0, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0]])
    whole = encode_rows(words, rows, 7)
    for name in ("inputs", "targets", "valid"):
        assert_array_equal(getattr(encoded, name), getattr(whole, name))
    # What is cut off does not count, nor does a span behind the answer make all of it count.
    cut = encode_rows(words, rows, 3, truncate=True, spans=[[(2, 5)]] * 3)
    assert_array_equal(cut.mask, np.zeros((3, 2)))


def test_the_longest_row_decides_the_width_when_none_is_given(words):
    encoded = encode_rows(words, [("who?", "a cat"), ("is?", "bo")])
    assert encoded.inputs.shape == (2, 4)
    assert_array_equal(encoded.targets[0], [5, 7, 8, 1])


def test_truncation_only_when_asked(words):
    pairs = [("is?", "bo"), ("who?", "a cat")]
    message = r"row 1 \('who\?'\): the row is 5 tokens long, more than max_len = 4 \(as are 1 of 2"
    with pytest.raises(ValueError, match=message):
        encode_rows(words, pairs, 4)
    rows = [
        QaRow("is?", "bo", file="f.jsonl", line=3),
        QaRow("who?", "a cat", file="f.jsonl", line=4),
    ]
    with pytest.raises(ValueError, match=r"^f\.jsonl:4: the row is 5 tokens long"):
        encode_rows(words, rows, 4)
    cut = encode_rows(words, pairs, 4, truncate=True)
    assert_array_equal(cut.inputs, [[3, 5, 6], [2, 5, 7]])
    assert_array_equal(cut.targets, [[5, 6, 1], [5, 7, 8]])
    assert_array_equal(cut.mask, [[0, 1, 1], [0, 1, 1]])
    no_answer = encode_rows(words, pairs, 2, truncate=True)
    assert_array_equal(no_answer.mask, [[0], [0]])
    assert_array_equal(no_answer.valid, [[1], [1]])


def test_no_merge_crosses_the_boundary(tokenizer, rows):
    """The masked targets are the answer and the end, and the rest is the question."""
    encoded = encode_rows(tokenizer, rows)
    for i, row in enumerate(rows):
        answer = encoded.targets[i][encoded.mask[i] == 1].tolist()
        assert answer == [*tokenizer.encode(f" {row.answer}").ids, 1]
        asked = [
            encoded.inputs[i, 0],
            *encoded.targets[i][(1 - encoded.mask[i]) * encoded.valid[i] == 1],
        ]
        assert tokenizer.decode(asked) == row.question
    # A text that the tokenizer would merge across the boundary if it saw both parts at once.
    greedy = train_tokenizer(["a b" * 50], 300)
    greedy.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    greedy = train_like(greedy, ["a b"] * 50)
    assert len(greedy.encode("a b").ids) == 1
    encoded = encode_rows(greedy, [("a", "b")])
    assert greedy.decode(encoded.targets[0][encoded.mask[0] == 1].tolist()) == " b"


def train_like(tokenizer, texts):
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def test_a_wider_array_changes_nothing_but_padding(tokenizer, rows):
    narrow = encode_rows(tokenizer, rows)
    wide = encode_rows(tokenizer, rows, narrow.inputs.shape[1] + 9)
    for a, b in zip(narrow, wide, strict=True):
        assert_array_equal(a, b[:, : a.shape[1]])
        assert not b[:, a.shape[1] :].any()


def test_the_tokenizer_loses_nothing_and_comes_back_from_disk(tokenizer, rows, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*text_of(rows), "naïve – 東京 \n\t <eo s> 🜁"]:
        ids = tokenizer.encode(text).ids
        assert again.encode(text).ids == ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.get_vocab_size() == 600
    assert (tokenizer.token_to_id("<pad>"), tokenizer.token_to_id("<eos>")) == (0, 1)
    assert train_tokenizer(text_of(rows), 600).get_vocab() == tokenizer.get_vocab()


def test_prompts_and_decoded_answers(tokenizer, rows):
    questions = [row.question for row in rows[:5]]
    encoded = encode_rows(tokenizer, rows[:5])
    prompts = prompts_of(encoded)
    for i, question in enumerate(questions):
        length = prompts.lengths[i]
        assert tokenizer.decode(prompts.tokens[i, :length].tolist()) == question
        assert not prompts.tokens[i, length:].any()
        assert_array_equal(prompts.tokens[i, :length], encoded.inputs[i, :length])
    generated = [[*tokenizer.encode(f" {row.answer}").ids, 1, 7, 7][:12] for row in rows[:2]]
    texts = decode_answers(
        tokenizer, np.asarray([g + [1] * (12 - len(g)) for g in generated], np.int32)
    )
    assert all(row.answer.startswith(text) for row, text in zip(rows, texts, strict=False))


def test_the_prompt_of_a_row_cut_off_before_its_answer_is_what_is_left(words):
    """The tokens are 3 5 | 6 1 and 2 5 5 5 | 6 1, of which three stay."""
    prompts = prompts_of(
        encode_rows(words, [("is?", "bo"), ("who is it?", "bo")], 4, truncate=True)
    )
    assert_array_equal(prompts.lengths, [2, 3])
    assert_array_equal(prompts.tokens, [[3, 5, 0], [2, 5, 5]])


def test_failures_say_what_to_do(tokenizer):
    with pytest.raises(ValueError, match="vocab_size must be at least 258"):
        train_tokenizer(["a"], 257)
    with pytest.raises(ValueError, match="there are no rows to encode"):
        encode_rows(tokenizer, [])
    with pytest.raises(ValueError, match="max_len must be at least 2"):
        encode_rows(tokenizer, [("a", "b")], 1)
    bare = tokenizers.Tokenizer(tokenizers.models.BPE())
    with pytest.raises(ValueError, match="the tokenizer has no token <eos>"):
        encode_rows(bare, [("a", "b")])


def test_batches_keep_one_shape_and_count_each_row_once(words):
    encoded = encode_rows(words, [("who?", "a cat"), ("is?", "bo"), ("it?", "a")], 6)
    first, last = batches(encoded, 2)
    assert all(a.shape == b.shape == (2, 5) for a, b in zip(first, last, strict=True))
    assert all(a.dtype == b.dtype for a, b in zip(first, encoded, strict=True))
    for got, want in zip(last, encoded, strict=True):
        assert_array_equal(got[0], want[2])
        assert not np.asarray(got[1]).any()
    together = np.concatenate([first.inputs, last.inputs[:1]])
    assert_array_equal(together, encoded.inputs)
    assert sum(float(b.mask.sum()) for b in (first, last)) == encoded.mask.sum()
    assert len(list(batches(encoded, 2, drop_remainder=True))) == 1
    assert len(list(batches(encoded, 3))) == 1


def test_batches_in_another_order(words):
    encoded = encode_rows(words, [("who?", "a cat"), ("is?", "bo"), ("it?", "a")], 6)
    order = np.asarray([2, 0])
    (batch,) = batches(encoded, 2, order=order)
    for got, want in zip(batch, encoded, strict=True):
        assert_array_equal(got, want[order])


def test_batches_fill_in_masks_and_refuse_at_once():
    plain = Batch(np.ones((3, 4)), np.arange(3))
    first, last = batches(plain, 2)
    assert_array_equal(first.mask, [1, 1])
    assert_array_equal(last.mask, [1, 0])
    assert_array_equal(last.valid, [1, 0])
    assert_array_equal(last.inputs, [[1] * 4, [0] * 4])
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        batches(plain, 0)
    with pytest.raises(ValueError, match="3 examples make no batch of 4 when the remainder"):
        batches(plain, 4, drop_remainder=True)
