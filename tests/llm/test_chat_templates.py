"""The answer's tokens in chat templates, as transformers renders them."""

import numpy as np
import pytest
import tokenizers
from numpy.testing import assert_array_equal
from transformers import PreTrainedTokenizerFast

from jedit.data import chat_template, encode_rendered

LLAMA = (
    "{{ '<|begin|>' }}{% for m in messages %}{{ '<|role|>' + m['role'] + '<|end_role|>\n\n' + "
    "m['content'] | trim + '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|role|>assistant<|end_role|>\n\n' }}{% endif %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|role|>system\nBe kind.<|eot|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|role|>' + m['role'] + '\n' + m['content'] + '<|eot|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|role|>assistant\n' }}{% endif %}"
)
# Thinks before it answers, unless it is told not to, and writes an empty thought to a given answer.
THINKING = (
    "{% for m in messages %}{{ '<|role|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|eot|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|role|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
MOVED = "{% for m in messages %}{{ messages | length ~ m['content'] }}{% endfor %}"


@pytest.fixture
def tokenizer():
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    specials = ["<|begin|>", "<|role|>", "<|end_role|>", "<|eot|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(["system user assistant the capital of France is Paris"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<|begin|>",
        eos_token="<|eot|>",
        additional_special_tokens=specials[1:3],
    )


@pytest.mark.parametrize(
    ("template", "answer"), [(LLAMA, "Paris "), (QWEN, "Paris"), (THINKING, "Paris")]
)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_answer_and_end_token_count_and_nothing_else(tokenizer, template, answer, system):
    tokenizer.chat_template = template
    render = chat_template(tokenizer, system)
    row = render("the capital of France?", answer)
    assert row.answer == "Paris"
    assert row.end == "<|eot|>"
    assert (system or "user") in row.before
    encoded = encode_rendered(tokenizer, [row, render("?", "é")], pad=0)
    for i, expected in enumerate(["Paris<|eot|>", "é<|eot|>"]):
        counted = np.asarray(encoded.targets)[i][np.asarray(encoded.mask)[i] > 0]
        assert tokenizer.decode(counted) == expected
    # What stands before is what the model will be given when it is asked.
    asked = tokenizer(row.before, add_special_tokens=False)["input_ids"]
    assert_array_equal(encoded.inputs[0][: len(asked)], asked)
    assert int(np.argmax(encoded.mask[0] > 0)) == len(asked) - 1


def test_a_template_that_moves_the_question_is_refused(tokenizer):
    tokenizer.chat_template = MOVED
    with pytest.raises(ValueError, match="answer's place is not known"):
        chat_template(tokenizer)("what?", "this")
