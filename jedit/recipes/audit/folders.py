"""The folders of an audit: read one at a time, hashed, and refused where they do not match."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from jedit.checkpoint.sealed import sha256
from jedit.core.paths import parameter_paths
from jedit.models import load_model, load_stepper
from jedit.models.huggingface import read_config, stored_dtype
from jedit.models.weight_files import weight_files
from jedit.recipes.tofu.evaluation import LanguageModel
from jedit.recipes.tokenization import load_words
from jedit.report.audit_results import Folder

# What a configuration says that no model computes by. What ends in _token_id neither.
NOT_COMPUTED = {
    *("_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype", "name"),
    *("use_cache", "attn_implementation", "_attn_implementation", "_commit_hash", "auto_map"),
    *("id2label", "label2id", "problem_type", "finetuning_task", "initializer_range"),
    *("chunk_size_feed_forward", "gradient_checkpointing", "unsloth_version", "unsloth_fixed"),
    *("return_dict", "output_hidden_states", "output_attentions", "attention_dropout"),
}
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


class Models(NamedTuple):
    """The models of an audit: one set of functions, and parameters read when they are needed.

    Attributes:
        model: the functions and words that all share.
        folders: paths by role, "base", "edited" and perhaps "retrained".
        dtype: dtype in which all are read: the widest that one of them is stored in.
        description: family, size and dtype, in words.
    """

    model: LanguageModel
    folders: Mapping[str, Path]
    dtype: DTypeLike
    description: str

    def load(self, role: str) -> PyTree:
        """Read the parameters of one of the folders."""
        return load_model(self.folders[role], dtype=self.dtype)[1]


def open_models(
    folders: Mapping[str, Path], tokenizer: Path | None, max_len: int, chunk: int
) -> Models:
    """Check that the folders hold one kind of model, and make its functions.

    Args:
        folders: paths by role; "base" is what the others are compared with.
        tokenizer: folder of the tokenizer; None: the base's.
        max_len: number of tokens of a row, at most.
        chunk: number of rows evaluated at a time.

    Raises:
        ValueError: a folder that cannot be read, or that is not the base's family, shape or
            vocabulary; the message names it and what differs.
    """
    base = folders["base"]
    config = _config(base)
    words = load_words(tokenizer or base)
    for role, folder in folders.items():
        if role != "base":
            _check_config(base, config, folder, _config(folder))
            _check_words(tokenizer or base, words.tokenizer, folder)
    dtype = jnp.dtype(jnp.result_type(*(stored_dtype(folder) for folder in folders.values())))
    # A padding token that was added to the tokenizer alone is no token of any row.
    special = set(words.tokenizer.all_special_ids)
    largest = max(set(words.tokenizer.get_vocab().values()) - special)
    if largest >= config.vocab_size:
        raise ValueError(
            f"{tokenizer or base}: the tokenizer has tokens up to {largest}, the model in {base} "
            f"{config.vocab_size} of them; give its own tokenizer by --tokenizer"
        )
    # Reads no weights, but looks whether they are those of the configuration: before the work.
    steppers = {role: load_stepper(folder, dtype=dtype) for role, folder in folders.items()}
    apply, params, _ = load_model(base, dtype=dtype)
    shapes = {path: leaf.shape for path, leaf in parameter_paths(params)}
    positions = getattr(config, "max_position_embeddings", None) or max_len
    size = sum(int(np.prod(shape)) for shape in shapes.values())
    return Models(
        LanguageModel(
            apply,
            steppers["base"],
            words,
            min(max_len, positions),
            positions,
            chunk,
            dtype,
        ),
        dict(folders),
        dtype,
        f"{config.model_type}, {size:,} parameters, read and computed in {dtype.name}",
    )


def hashed(role: str, folder: Path, description: str) -> Folder:
    """Return the hashes of all files that lie in a folder itself.

    The folder's own is the SHA-256 of the lines "name size hash", sorted by name: what
    `sha256sum`, put into that form, gives on any machine.
    """
    files = {
        file.name: (file.stat().st_size, sha256(file))
        for file in sorted(folder.iterdir())
        if file.is_file()
    }
    table = "".join(f"{name} {size} {digest}\n" for name, (size, digest) in files.items())
    return Folder(role, str(folder), hashlib.sha256(table.encode()).hexdigest(), files, description)


def same_weights(one: Folder, other: Folder) -> bool:
    """Say whether two folders have weight files of the same bytes."""
    mine, theirs = (
        [folder.files[file.name] for file in weight_files(Path(folder.path))]
        for folder in (one, other)
    )
    return mine == theirs


def difference(base: PyTree, edited: PyTree) -> tuple[float, str]:
    """Return the relative size of an edit, and a sentence on what it changed."""
    before = dict(parameter_paths(base))
    changed, broken, squares, whole = [], [], 0.0, 0.0
    for path, leaf in parameter_paths(edited):
        moved, all_ = (float(x) for x in _squares(before[path], leaf))
        squares, whole = squares + moved, whole + all_
        if not math.isfinite(moved):
            broken.append(path)
        if moved != 0:  # NaN is a change, too
            changed.append((moved / max(all_, 1e-30), path))
    relative = float(np.sqrt(squares / max(whole, 1e-30)))
    if not changed:
        return 0.0, "The edited weights are the original ones, to the bit."
    if broken:
        return math.inf, (
            f"{len(changed)} of {len(before)} parameters differ from the original ones; {broken[0]}"
            f"{f' and {len(broken) - 1} others' * (len(broken) > 1)} hold numbers that are not "
            "finite."
        )
    most, path = max(changed)
    return relative, (
        f"{len(changed)} of {len(before)} parameters differ from the original ones, by "
        f"{relative:.2%} of their length in all; {path} most, by {np.sqrt(most):.2%}."
    )


@jax.jit
def _squares(before: Any, after: Any) -> tuple[Any, Any]:
    wide = before.astype(jnp.promote_types(before.dtype, jnp.float32))
    return jnp.sum((after.astype(wide.dtype) - wide) ** 2), jnp.sum(wide**2)


def _config(folder: Path) -> Any:
    """Read a folder's configuration.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    try:
        return read_config(folder)
    except (OSError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{folder}: its config.json cannot be read: {reason}") from error


def _check_config(base: Path, ours: Any, folder: Path, theirs: Any) -> None:
    """Refuse a folder whose model does not compute what the base's does.

    Raises:
        ValueError: another family, shape or setting.
    """
    mine, other = ours.to_dict(), theirs.to_dict()
    if mine.get("model_type") != other.get("model_type"):
        raise ValueError(
            f"{folder}: holds a model of the family {other.get('model_type')}, {base} one of "
            f"{mine.get('model_type')}; an audit compares two states of one model"
        )
    if mine.get("vocab_size") != other.get("vocab_size"):
        raise ValueError(
            f"{folder}: has a vocabulary of {other.get('vocab_size')} tokens, {base} one of "
            f"{mine.get('vocab_size')}; an audit compares two states of one model"
        )
    skipped = {name for name in mine | other if name.endswith("_token_id")} | NOT_COMPUTED
    differing = sorted(
        name for name in (mine.keys() | other.keys()) - skipped if mine.get(name) != other.get(name)
    )
    if differing:
        name = differing[0]
        raise ValueError(
            f"{folder}: is not the model of {base}: config.json differs in "
            f"{', '.join(differing[:4])} ({name} is {other.get(name)!r}, there {mine.get(name)!r})"
        )


def _plain_words(tokenizer: Any) -> dict[str, int]:
    """Return a vocabulary without special tokens: a padding one may be added, and is in no row."""
    special = set(tokenizer.all_special_ids)
    return {word: i for word, i in tokenizer.get_vocab().items() if i not in special}


def _check_words(source: Path, ours: Any, folder: Path) -> None:
    """Refuse a folder whose tokenizer, where it has one, reads texts as other tokens.

    Raises:
        ValueError: another vocabulary.
    """
    if not any((folder / name).is_file() for name in TOKENIZER):
        return
    mine, theirs = _plain_words(ours), _plain_words(load_words(folder).tokenizer)
    if differing := sorted(k for k in mine | theirs if mine.get(k) != theirs.get(k)):
        raise ValueError(
            f"{folder}: its tokenizer is not that of {source}: they differ in {len(differing)} "
            f"tokens, {differing[0]!r} among them; an audit reads all rows as the same tokens"
        )
