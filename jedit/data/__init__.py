"""Readers and generators of forget and retain sets."""

from jedit.data.batching import answers_only, batches, stack_requests
from jedit.data.benchmarks import (
    Choice,
    Rewrite,
    read_counterfact,
    read_muse_questions,
    read_muse_texts,
    read_rwku,
    read_rwku_texts,
    read_tofu,
    read_wmdp,
    read_zsre,
)
from jedit.data.digits import Digits, forget_class, forget_cluster, load_digits, split_digits
from jedit.data.invented.authors import Fact, generate_authors
from jedit.data.jsonl import DataError, QaRow, facts_to_rows, read_rows, write_rows
from jedit.data.mnist import load_mnist
from jedit.data.packing import Packing, pack
from jedit.data.pairing import pair_by_entity, pair_in_turn, pair_uniformly
from jedit.data.records import read_records
from jedit.data.selection import check_disjoint, select_rows
from jedit.data.templates import (
    Rendered,
    chat_template,
    encode_rendered,
    plain_template,
    prompts_of,
)
from jedit.data.text import (
    Encoded,
    Prompts,
    decode_answers,
    encode_pairs,
    encode_prompts,
    encode_rows,
    load_tokenizer,
    save_tokenizer,
    text_of,
    train_tokenizer,
)

__all__ = [
    "Choice",
    "DataError",
    "Digits",
    "Encoded",
    "Fact",
    "Packing",
    "Prompts",
    "QaRow",
    "Rendered",
    "Rewrite",
    "answers_only",
    "batches",
    "chat_template",
    "check_disjoint",
    "decode_answers",
    "encode_pairs",
    "encode_prompts",
    "encode_rendered",
    "encode_rows",
    "facts_to_rows",
    "forget_class",
    "forget_cluster",
    "generate_authors",
    "load_digits",
    "load_mnist",
    "load_tokenizer",
    "pack",
    "pair_by_entity",
    "pair_in_turn",
    "pair_uniformly",
    "plain_template",
    "prompts_of",
    "read_counterfact",
    "read_muse_questions",
    "read_muse_texts",
    "read_records",
    "read_rows",
    "read_rwku",
    "read_rwku_texts",
    "read_tofu",
    "read_wmdp",
    "read_zsre",
    "save_tokenizer",
    "select_rows",
    "split_digits",
    "stack_requests",
    "text_of",
    "train_tokenizer",
    "write_rows",
]
