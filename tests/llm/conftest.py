"""The pretrained model of the tests: tinystories260k, converted and loaded once."""

import pytest

from jedit.models import convert_llama2c, load_model


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
