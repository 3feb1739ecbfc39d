"""Imports of packages that only the extra `llm` brings."""

import importlib
from typing import Any


def optional(name: str) -> Any:
    """Import a module of an optional package.

    Raises:
        ImportError: the package is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"language models from a folder need {name}, which could not be imported ({error}): "
            "pip install 'jedit[llm]'."
        ) from None
