"""Records of a published data set: from a local folder, or by the `datasets` library.

A local folder is a copy of the data set's repository, or any folder whose files are named for its
parts.  For configuration C and split S these are tried, in this order, with the endings .jsonl,
.json and .parquet:

    C/S   C_S   C-S   C   S   C/S-00000-of-NNNNN (all shards)   C/S/0000 (all shards)

JSON files hold an array of objects, one object a line, or one object.  Nothing is ever unpickled,
and no code that comes with a data set is run.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jedit.data.jsonl import DataError

ENDINGS = (".jsonl", ".json", ".parquet")
SHARD = re.compile(r"(-\d{5}-of-\d{5}|/\d{4})$")


def read_records(where: str | Path, config: str, split: str = "train") -> list[dict[str, Any]]:
    """Read one split of one configuration.

    Args:
        where: a folder, or a data set's name as "owner/name", which the `datasets` library then
            finds in its cache or on its hub.
        config: name of the configuration.
        split: name of the split.

    Returns:
        The records in their order.

    Raises:
        DataError: no such folder or part, or a file that does not hold records.
    """
    folder = Path(where)
    if folder.is_dir():
        files = _files(folder, config, split)
        return [record for file in files for record in _read(file)]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(where)):
        raise DataError(f"{where}: there is no such folder, and it is no data set's owner/name.")
    return _from_library(str(where), config, split)


def read_file(file: str | Path) -> list[dict[str, Any]]:
    """Read the records of one file, which ends in .jsonl, .json or .parquet.

    Raises:
        DataError: no such file, another ending, or no records in it.
    """
    path = Path(file)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file.")
    if path.suffix not in ENDINGS:
        raise DataError(f"{path}: ends in none of {', '.join(ENDINGS)}.")
    return _read(path)


def read_texts(file: str | Path) -> list[str]:
    """Read texts of a file: its records' field "text", or one text of a .txt file.

    Args:
        file: a file that ends in .jsonl, .json or .parquet, or in .txt.

    Raises:
        DataError: no such file, another ending, or a record without a text.
    """
    path = Path(file)
    if path.suffix == ".txt" and path.is_file():
        return [_text_of(path)]
    texts = []
    for i, record in enumerate(read_file(path), 1):
        if not isinstance(text := record.get("text"), str) or not text.strip():
            raise DataError(f'{path}, record {i}: needs "text", a string that is not empty.')
        texts.append(text)
    return texts


def check_name(name: str) -> str:
    """Return the name of a part, which may have folders in it but leads out of none.

    Links inside the folder are followed: a hub's cache consists of them.

    Raises:
        DataError: the name is absolute, or goes up.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{name!r}: names a part outside the data set's folder.")
    return name


def _files(folder: Path, config: str, split: str) -> list[Path]:
    config, split = check_name(config), check_name(split)
    stems = (f"{config}/{split}", f"{config}_{split}", f"{config}-{split}", config, split)
    for stem in stems:
        for ending in ENDINGS:
            file = folder / f"{stem}{ending}"
            if file.is_file():
                return [file]
    shards = sorted(_shards(folder, config, split))
    if shards:
        return shards
    raise DataError(
        f"{folder}: no file for {config!r}, split {split!r}; looked for "
        f"{', '.join(stems)} with the endings {', '.join(ENDINGS)}, and for shards of the first."
    )


def _shards(folder: Path, config: str, split: str) -> Iterator[Path]:
    for file in folder.glob(f"{config}/{split}*"):
        candidates = file.glob("*") if file.is_dir() else [file]
        for found in candidates:
            stem = str(found.relative_to(folder).with_suffix(""))
            is_shard = SHARD.sub("", stem) == f"{config}/{split}" and SHARD.search(stem)
            if found.is_file() and found.suffix in ENDINGS and is_shard:
                yield found


def _read(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".parquet":
        return _parquet().read_table(file).to_pylist()
    text = _text_of(file)
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        found = [_line(line, file, i) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    records = found if isinstance(found, list) else [found]
    if not records or not all(isinstance(record, dict) for record in records):
        raise DataError(f"{file}: holds no records: an array of objects, or one object a line.")
    return records


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}.") from None


def _line(line: str, file: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise DataError(f"{file}:{number}: not valid JSON: {reason}.") from None


def _parquet() -> Any:
    try:
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(
            "a parquet file needs the package pyarrow: pip install 'jedit[llm]'; or save the "
            "data set as JSON lines."
        ) from None
    return parquet


def _from_library(name: str, config: str, split: str) -> list[dict[str, Any]]:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(
            f"{name}: there is no such folder, and the package datasets, which could fetch it, is "
            "not installed: pip install 'jedit[llm]'."
        ) from None
    try:
        return list(datasets.load_dataset(name, config, split=split))
    # OSError is the hub's and the network's errors; ValueError an unknown configuration or split.
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{name}, {config!r}, split {split!r}: the datasets library could not load it: "
            f"{type(error).__name__}: {reason}"
        ) from error
