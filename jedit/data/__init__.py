"""Readers and generators of forget and retain sets."""

from jedit.data.authors import Fact, generate_authors
from jedit.data.batching import batches
from jedit.data.digits import Digits, forget_class, forget_cluster, load_digits, split_digits
from jedit.data.jsonl import DataError, QaRow, facts_to_rows, read_rows, write_rows
from jedit.data.mnist import load_mnist
from jedit.data.selection import check_disjoint, select_rows
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
    "DataError",
    "Digits",
    "Encoded",
    "Fact",
    "Prompts",
    "QaRow",
    "batches",
    "check_disjoint",
    "decode_answers",
    "encode_pairs",
    "encode_prompts",
    "encode_rows",
    "facts_to_rows",
    "forget_class",
    "forget_cluster",
    "generate_authors",
    "load_digits",
    "load_mnist",
    "load_tokenizer",
    "read_rows",
    "save_tokenizer",
    "select_rows",
    "split_digits",
    "text_of",
    "train_tokenizer",
    "write_rows",
]
