"""The pretrained model of the tests: tinystories260k, converted and loaded once."""

import jax
import optax
import pytest

import jedit
from jedit.models import convert_llama2c, load_model, save_model
from jedit.objectives import RetainNLL
from tests.llm.test_huggingface import change_config
from tests.llm.test_llama2c import toy_files


@pytest.fixture(scope="session")
def stories(shared_data):
    """The folder with llama2.c's files."""
    path = shared_data / "tinystories260k"
    if not path.is_dir():
        pytest.skip(f"needs a pretrained model, which is not part of the repository: {path}")
    return path


@pytest.fixture(scope="session")
def stories_folder(stories, tmp_path_factory):
    """The same as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("stories") / "hf"
    return convert_llama2c(stories / "checkpoint_legacy.bin", stories / "tokenizer.bin", folder)


@pytest.fixture(scope="session")
def stories_model(stories_folder):
    """(apply, params, config) of it."""
    return load_model(stories_folder)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    """A Llama of two layers to be taught, with the bytes for a tokenizer; it needs no real data."""
    made = tmp_path_factory.mktemp("toy_folder")
    checkpoint, tokens = toy_files(made, tied=False, dim=32, hidden=48, scale=0.2)
    folder = convert_llama2c(checkpoint, tokens, made / "hf")
    return change_config(folder, max_position_embeddings=512)


@pytest.fixture(scope="session")
def teach(toy_folder):
    """A function that trains the toy on rows by jedit, and writes the folder."""

    def taught(rows, out, steps=200):
        apply, params, _ = load_model(toy_folder)
        with jax.numpy_dtype_promotion("standard"):
            params, history = jedit.fit(
                lambda params, batch: RetainNLL()(apply, params, None, batch),
                optax.adam(1e-2),
                params,
                rows,
                epochs=steps,
                batch_size=len(rows.inputs),
                key=jax.random.key(0),
            )
        assert history["loss"][-1] < 0.1
        return save_model(params, out, source=toy_folder)

    return taught
