"""Every public signature: few arguments, in one order, by words that mean one thing each."""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import types
import typing

import pytest

import jedit
from tests.conftest import ROOT

MOST = 8
ORDER = ("apply", "params", "curvature", "forget", "retain")
# What these are called elsewhere: `absolute`, `predicted_kl`, `refit`.
OTHER_WORDS = {"relative", "max_kl", "refitted"}
# Names and labels that a user makes up, or that a data set has.
FREE = {"name", "split", "retain", "file", "edited_by", "index_mode", "subset", "dtype"}


def public():
    """(name, function or class) of all that a package of jedit names in `__all__`, each once."""
    found = {}
    for module in pkgutil.walk_packages(jedit.__path__, "jedit."):
        if module.ispkg:
            package = importlib.import_module(module.name)
            for name in getattr(package, "__all__", ()):
                found[id(getattr(package, name))] = (name, getattr(package, name))
    found |= {id(getattr(jedit, name)): (name, getattr(jedit, name)) for name in jedit.__all__}
    return sorted(found.values(), key=lambda pair: pair[0])


def is_given(thing):
    """Whether a user calls it: functions, and values that he makes for a function's argument.

    Records are made by the library, and so are tuples of functions.
    """
    if isinstance(thing, types.FunctionType):
        return True
    rooms = ("jedit.methods", "jedit.requests", "jedit.curvature.likelihoods", "jedit.objectives")
    if not dataclasses.is_dataclass(thing):
        return False
    is_row = thing.__module__ == "jedit.methods.row"  # of the catalogue, and what a scene has
    return thing.__module__.startswith(rooms) and not is_row


CALLED = [(name, thing) for name, thing in public() if is_given(thing)]
each = pytest.mark.parametrize(("name", "thing"), CALLED, ids=[name for name, _ in CALLED])


def test_there_are_as_many_as_there_were():
    assert len(CALLED) > 150
    assert {"kfade", "solve", "Ascent", "Solver", "nll", "relearn"} <= {name for name, _ in CALLED}


@each
def test_it_takes_few_arguments(name, thing):
    number = len(inspect.signature(thing).parameters)
    assert number <= MOST, f"{name} takes {number} arguments"


def test_so_does_every_function_without_an_underscore():
    """Recipes and commands too, which no package names."""
    found = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in sorted((ROOT / "jedit").rglob("*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name[0] != "_"
        if len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs) > MOST
    ]
    assert not found


@each
def test_its_arguments_are_in_the_one_order(name, thing):
    positional = [
        parameter.name
        for parameter in inspect.signature(thing).parameters.values()
        if parameter.kind != parameter.KEYWORD_ONLY
    ]
    assert not OTHER_WORDS & set(inspect.signature(thing).parameters), name
    found = [argument for argument in positional if argument in ORDER]
    assert found == sorted(found, key=ORDER.index), name
    if {"apply", "params"} <= set(positional):
        assert found[:2] == ["apply", "params"], name


@each
def test_its_options_are_no_texts(name, thing):
    """A word out of a few is a `Literal`, so that a type checker knows them."""
    for parameter in inspect.signature(thing).parameters.values():
        is_text = isinstance(parameter.default, str) and parameter.default
        if is_text and parameter.name not in FREE:
            hint = parameter.annotation
            words = [hint, *typing.get_args(hint)]
            assert any(typing.get_origin(word) is typing.Literal for word in words), (
                f"{name}({parameter.name}={parameter.default!r}) is annotated {hint}"
            )
