"""`jedit forget --mesh` on eight devices: the same edit as on one, to rounding."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import jedit
from jedit.cli.main import main
from jedit.data import write_rows
from tests.conftest import COMPILE_FLAGS, IS_X64, ROOT
from tests.llm.test_forget_methods import ROWS, folder  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_eight_devices_make_the_edit_of_one(folder, tmp_path):  # noqa: F811
    """Of 20 rows to keep 14 are seen, which four devices do not divide; of 8 to forget each two."""
    write_rows(tmp_path / "rows.jsonl", [*ROWS, *(r._replace(question="Or?") for r in ROWS[:4])])
    given = ["forget", "--model", str(folder), "--data", str(tmp_path / "rows.jsonl")]
    given += ["--forget", "rows=0:8", "--batch-size", "4", "--steps", "4", "--recovery", "2"]
    given += ["--temperature", "1", "--no-attack"]
    one, several = tmp_path / "one", tmp_path / "several"
    assert main([*given, "--out", str(one)]) == 0
    width = "x64" if IS_X64 else "x32"
    mesh = ["--mesh", "data=4,model=2", "--out", str(several)]
    flags = f"--xla_force_host_platform_device_count=8 {COMPILE_FLAGS}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.llm.forget_mesh_program", width, *given, *mesh],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((out / "results.json").read_text()) for out in (one, several)]
    assert found[1]["settings"]["mesh"] == {"data": 4, "model": 2}
    assert found[1]["machine"]["devices"].startswith("8 ")
    for part in ("before", "after"):
        assert found[0][part] == pytest.approx(found[1][part], rel=1e-3, abs=1e-5)
    assert found[0]["path_kl"] == pytest.approx(found[1]["path_kl"], rel=1e-2)
    edits = [jedit.checkpoint.load_edit(out / "edit").blocks for out in (one, several)]
    assert set(edits[0]) == set(edits[1])
    for path, block in edits[0].items():
        atol = 1e-2 * np.abs(block).max()
        np.testing.assert_allclose(edits[1][path], block, rtol=0, atol=atol, err_msg=path)
