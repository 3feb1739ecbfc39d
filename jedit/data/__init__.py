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
from jedit.data.cifar import load_cifar10
from jedit.data.digits import forget_cluster, load_digits, split_digits
from jedit.data.images import Images, forget_class, forget_random
from jedit.data.interactions import Interactions, generate_interactions, read_interactions
from jedit.data.invented.authors import generate_authors
from jedit.data.jsonl import DataError, QaRow, read_rows, write_rows
from jedit.data.mnist import load_mnist
from jedit.data.packing import Packing, pack
from jedit.data.pairing import neighbor_sets, pair_by_entity, pair_in_turn, pair_uniformly
from jedit.data.records import read_records, read_texts
from jedit.data.selection import check_disjoint, rows_with, select_rows
from jedit.data.task_streams import by_class, by_domain
from jedit.data.templates import Rendered, chat_template, encode_rendered, plain_template
from jedit.data.text import (
    Prompts,
    decode_answers,
    encode_rows,
    prompts_of,
    text_of,
    train_tokenizer,
)

__all__ = [
    "Choice",
    "DataError",
    "Images",
    "Interactions",
    "Packing",
    "Prompts",
    "QaRow",
    "Rendered",
    "Rewrite",
    "answers_only",
    "batches",
    "by_class",
    "by_domain",
    "chat_template",
    "check_disjoint",
    "decode_answers",
    "encode_rendered",
    "encode_rows",
    "forget_class",
    "forget_cluster",
    "forget_random",
    "generate_authors",
    "generate_interactions",
    "load_cifar10",
    "load_digits",
    "load_mnist",
    "pack",
    "neighbor_sets",
    "pair_by_entity",
    "pair_in_turn",
    "pair_uniformly",
    "plain_template",
    "prompts_of",
    "read_counterfact",
    "read_interactions",
    "read_muse_questions",
    "read_muse_texts",
    "read_records",
    "read_rows",
    "read_rwku",
    "read_rwku_texts",
    "read_texts",
    "read_tofu",
    "read_wmdp",
    "read_zsre",
    "rows_with",
    "select_rows",
    "split_digits",
    "stack_requests",
    "text_of",
    "train_tokenizer",
    "write_rows",
]
