"""Which tokens are the answer: hand-worked rows, one whose merge crosses the boundary."""

import pytest
from numpy.testing import assert_array_equal

from jedit.data import Rendered, encode_rendered, plain_template, prompts_of

tokenizers = pytest.importorskip("tokenizers")

# Tokens 0 to 6, a merge that joins a space with what follows it, and an end token.
VOCAB = {"Q": 0, ":": 1, " ": 2, "P": 3, "a": 4, "\n": 5, " P": 6, " Pa": 7, "aa": 8}
MERGES = [(" ", "P"), (" P", "a"), ("a", "a")]
PAD, END = 0, 9


@pytest.fixture(scope="module")
def tokenizer():
    made = tokenizers.Tokenizer(tokenizers.models.BPE(VOCAB, MERGES))
    made.add_special_tokens(["</s>"])
    assert made.token_to_id("</s>") == END
    return made


def test_a_merge_across_the_boundary_belongs_to_the_answer(tokenizer):
    # "Q: " + "Pa" is Q, :, " Pa": the space in front of the answer has gone into its token.
    row = plain_template("{question}: ", "</s>")("Q", "Pa")
    encoded = encode_rendered(tokenizer, [row], pad=PAD)
    assert_array_equal(encoded.inputs, [[0, 1, 7]])
    assert_array_equal(encoded.targets, [[1, 7, END]])
    assert_array_equal(encoded.mask, [[0, 1, 1]])
    prompts = prompts_of(encoded)
    assert_array_equal(prompts.tokens, [[0, 1]])
    assert_array_equal(prompts.lengths, [2])


def test_without_a_merge_the_space_is_the_prompts(tokenizer):
    # "Q: " + "aaa": nothing joins the space, so it is given and not predicted.
    row = plain_template("{question}: ", "</s>")("Q", "aaa")
    encoded = encode_rendered(tokenizer, [row], pad=PAD)
    assert_array_equal(encoded.targets, [[1, 2, 8, 4, END]])
    assert_array_equal(encoded.mask, [[0, 0, 1, 1, 1]])


def test_rows_are_padded_and_the_end_token_counts(tokenizer):
    template = plain_template("{question}:", "</s>")
    rows = [template("Q", " Pa"), template("Qa", "a")]
    encoded = encode_rendered(tokenizer, rows, 7, pad=PAD)
    assert_array_equal(encoded.inputs, [[0, 1, 7, 0, 0, 0], [0, 4, 1, 4, 0, 0]])
    assert_array_equal(encoded.targets, [[1, 7, END, 0, 0, 0], [4, 1, 4, END, 0, 0]])
    assert_array_equal(encoded.mask, [[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0]])
    assert_array_equal(encoded.valid, [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
    assert_array_equal(prompts_of(encoded).tokens, [[0, 1, 0], [0, 4, 1]])
    without = encode_rendered(tokenizer, [Rendered("Q:", " Pa", "")], pad=PAD)
    assert_array_equal(without.mask, [[0, 1]])


def test_the_marked_tokens_of_a_template(tokenizer):
    # " Pa" is one token of "Q: Pa", the space the template's: a mark on "a" marks it whole.
    row = plain_template("{question}: ", "</s>")("Q", "Paaa")
    assert_array_equal(encode_rendered(tokenizer, [row], pad=PAD).targets, [[1, 7, 8, END]])
    for span, mask in (((1, 2), [0, 1, 0, 0]), ((3, 4), [0, 0, 1, 0]), ((1, 3), [0, 1, 1, 0])):
        encoded = encode_rendered(tokenizer, [row], pad=PAD, spans=[[span]])
        assert_array_equal(encoded.mask, [mask])


def test_a_cut_row_has_no_end(tokenizer):
    rows = [plain_template("{question}:", "</s>")("Q", "aaaa")]
    cut = encode_rendered(tokenizer, rows, 4, pad=PAD, truncate=True)
    assert_array_equal(cut.targets, [[1, 8, 8]])
    assert_array_equal(cut.mask, [[0, 1, 1]])
    with pytest.raises(ValueError, match="5 tokens long, more than max_len = 4"):
        encode_rendered(tokenizer, rows, 4, pad=PAD)


@pytest.mark.parametrize("row", [Rendered("Q:", "", ""), Rendered("", "a", "</s>")])
def test_a_row_without_a_prediction_is_refused(tokenizer, row):
    with pytest.raises(ValueError, match="no token that follows another"):
        encode_rendered(tokenizer, [row], pad=PAD)


def test_a_text_by_itself(tokenizer):
    rows = encode_rendered(tokenizer, [Rendered("", "aaPa", "")], pad=PAD)
    assert rows.inputs.shape == (1, 2)
    assert_array_equal(rows.mask, [[1, 1]])


def test_a_template_needs_a_place_for_the_question():
    with pytest.raises(ValueError, match="{question} once"):
        plain_template("Question:", "</s>")
