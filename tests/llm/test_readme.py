"""The README's snippets, those that need the extra llm included."""

from tests.llm.random_folder import write_random
from tests.test_readme import run_readme


def test_the_snippets_run_as_written(tmp_path):
    write_random("llama", tmp_path / "Llama-3.2-1B")
    assert run_readme(tmp_path, "[llm]", "eight devices") == "ran 7 of 7"
    assert (tmp_path / "Llama-3.2-1B-edited" / "model.safetensors").exists()
