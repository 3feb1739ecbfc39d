"""The README's snippets run in order, in one namespace, as they are written."""

import os
import re
import subprocess
import sys

from jedit.methods import CATALOGUE
from tests.conftest import COMPILE_FLAGS, ROOT
from tests.readme import METHODS, README, TITLE, markdown_table, snippets


def run_readme(folder, *there):
    """All snippets that can be run where these things are; the last line it prints."""
    flags = f"--xla_force_host_platform_device_count=8 {COMPILE_FLAGS}"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-m", "tests.readme", *there],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_the_snippets_run_as_written(tmp_path):
    assert run_readme(tmp_path, "eight devices") == "ran 6 of 6"
    assert (tmp_path / "ledger").is_dir()


def test_what_is_needed_is_said_in_one_way():
    needs = [need for _, _, need in snippets(README.read_text(encoding="utf-8"))]
    assert [bool(need) for need in needs] == [*[False] * 5, True]
    found = list(
        snippets("a\n```python\nx = 1\n```\n\n```python\n# needs: eight devices\ny\n```\n")
    )
    assert found == [(3, "x = 1\n", ""), (7, "# needs: eight devices\ny\n", "eight devices")]


def test_nothing_is_installed_from_an_index_that_does_not_have_it():
    assert "pip install 'jedit" not in README.read_text(encoding="utf-8")


def test_it_is_short_and_the_methods_that_it_names_are_there():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    section = text.split("## Which method when")[1].split("\n## ")[0]
    rows = [line.split("|")[2] for line in section.splitlines() if line.startswith("|")][2:]
    named = [name.strip() for row in rows for name in row.split(",")]
    assert len(named) > 20
    assert [name for name in named if name not in CATALOGUE and name != "`jedit.forget`"] == []


def test_the_table_of_all_methods_is_the_catalogue_s():
    written = METHODS.read_text(encoding="utf-8")
    assert written == TITLE + markdown_table(), "python -m tests.readme --write"


def test_every_paper_is_linked_once_and_every_file_is_there():
    text = README.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    papers = [link for link in links if "arxiv" in link]
    assert len(papers) == len(set(papers))
    assert all((ROOT / link).exists() for link in links if "://" not in link)
