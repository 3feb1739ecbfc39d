"""Which files a folder's weights are read from, and what is said of those that are not whole."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jedit.models import load_model, load_stepper, save_model
from tests.llm.random_folder import write_random

INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path):
    """A small Llama in one file."""
    return write_random("llama", tmp_path / "llama")


def split(folder):
    """Cut the one file in two, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    weight_map = {}
    for i, (name, value) in enumerate(sorted(tensors.items())):
        part = list(parts)[i % 2]
        parts[part][name] = value
        weight_map[name] = part
    for name, part in parts.items():
        save_file(part, folder / name, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def stray(folder, name):
    """Beside the weights a file with another embedding."""
    tensors = load_file(next(iter(sorted(folder.glob("*.safetensors")))))
    tensors = {n: np.zeros_like(x) for n, x in tensors.items()}
    save_file(tensors, folder / name, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["a.safetensors", "zzz.safetensors"])
def test_a_tensor_that_stands_twice_is_refused(folder, name):
    stray(folder, name)
    for load in (load_model, load_stepper):
        with pytest.raises(ValueError, match=rf"stands in .*{name}.*{INDEX}|stands in {name}"):
            load(folder)


@pytest.mark.parametrize("name", ["a.safetensors", "zzz.safetensors"])
def test_the_index_decides(folder, tmp_path, name):
    _, expected, _ = load_model(folder)
    split(folder)
    stray(folder, name)
    _, params, _ = load_model(folder)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    saved = save_model(params, tmp_path / "saved", source=folder)
    assert {file.name for file in saved.glob("*.safetensors")} == {
        "model-1.safetensors",
        "model-2.safetensors",
    }
    jax.tree.map(np.testing.assert_array_equal, load_model(saved)[1], expected)


def test_an_index_of_other_files(folder):
    split(folder)
    for text, sentence in (
        ('{"weight_map": {"x": "gone.safetensors"}}', r"names \['gone.safetensors'\]"),
        ('{"weight_map": {"x": "../model.safetensors"}}', "no safetensors files beside it"),
        ('{"weight_map": 3}', "is no index of weights"),
        ("{", "is no index of weights"),
    ):
        (folder / INDEX).write_text(text)
        with pytest.raises(ValueError, match=sentence):
            load_model(folder)


@pytest.mark.parametrize("length", [0, 4, 100, -8])
def test_a_file_that_is_not_whole(folder, length):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    for call in (load_model, load_stepper):
        with pytest.raises(ValueError, match=r"is no whole safetensors file .* anew"):
            call(folder)


def test_a_name_on_the_hub_is_no_folder(folder):
    with pytest.raises(ValueError, match=r"no such folder.*hf download meta-llama/Llama"):
        load_model("meta-llama/Llama-3.2-1B")
    shutil.copy(folder / "config.json", folder.parent / "file")
    with pytest.raises(ValueError, match="no such folder"):
        load_model(folder.parent / "file")
